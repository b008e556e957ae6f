"""Positions of padded prompts, and completions: the laws that every notebook leans on."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PROMPTS
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from common.loading import copy_sharing_weights
from common.places.positions import position_ids, with_position_ids
from common.texts.generation import completions, generate, generation_options, logits
from common.texts.sampling import FrequencyPenalty, Sampling, sample

masks = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.integers(1, width), min_size=1, max_size=4).map(
        lambda rows: (width, rows)
    )
)


@given(masks)
def test_positions_count_real_tokens_from_zero(rows):
    """With padding on the left, the tokens of each row are numbered 0, 1, 2 …; padding gets 0."""
    width, lengths = rows
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    for kind in (mask, mask.bool()):
        positions = position_ids(kind)
        assert positions.dtype == torch.int64 and positions.shape == mask.shape
        for row, length in zip(positions, lengths, strict=True):
            assert row.tolist() == [0] * (width - length) + list(range(length))


def test_inputs_keep_what_the_tokenizer_gave(batch):
    """`with_position_ids` adds one entry and changes none."""
    inputs = with_position_ids(batch)
    assert list(inputs) == [*batch, "position_ids"] and all(
        inputs[key] is batch[key] for key in batch
    )


def test_plain_forward_needs_positions(model, batch):
    """The trap behind it.

    Without position ids the logits of padded rows are wrong, and only theirs.
    """
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**batch).logits
    wrong = [
        not torch.allclose(*rows, atol=0.1)
        for rows in zip(*((x[r] for x, r in zip(y, real)) for y in (plain, logits(model, batch))))
    ]
    assert wrong == (~real[:, 0]).tolist() and any(wrong)


def test_options_are_greedy_and_without_top_k():
    """Greedy, 20 tokens; sampling has no top-k that nobody asked for; what is given is kept."""
    assert generation_options() == {"max_new_tokens": 20, "do_sample": False}
    assert generation_options(do_sample=True, top_p=0.3) == {
        "max_new_tokens": 20,
        "do_sample": True,
        "top_p": 0.3,
        "top_k": 0,
    }
    assert generation_options(do_sample=True, top_k=5, max_new_tokens=1) == {
        "max_new_tokens": 1,
        "do_sample": True,
        "top_k": 5,
    }


def test_sampling_reaches_beyond_the_50_likeliest(model, tokenizer):
    """At a high temperature most sampled tokens are not among the 50 likeliest."""
    inputs = tokenizer(PROMPTS[:1] * 64, return_tensors="pt")
    torch.manual_seed(0)
    tokens = generate(model, inputs, do_sample=True, temperature=100.0, max_new_tokens=1)[:, -1]
    likeliest = logits(model, inputs)[0, -1].topk(50).indices
    assert torch.isin(tokens, likeliest).float().mean() < 0.5


def test_completions_are_the_new_text(model, tokenizer, batch):
    """What a row's completion says is what comes behind its prompt, up to the end of text."""
    ids = generate(model, batch, max_new_tokens=4)
    new = torch.tensor([[tokenizer.encode(" dogs")[0], tokenizer.eos_token_id]])
    ended = torch.cat([batch["input_ids"][:1], new], dim=1)
    assert completions(tokenizer, batch, ended) == [" dogs"]
    for row, (prompt, text) in enumerate(
        zip(PROMPTS, completions(tokenizer, batch, ids), strict=True)
    ):
        assert (
            tokenizer.decode(ids[row], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            == prompt + text
        )


@given(data=st.data(), penalty=st.floats(0, 5))
def test_frequency_penalty_lowers_by_the_count(data, penalty):
    """A token that occurred n times loses n · penalty.

    Row by row; the given scores are not changed.
    """
    rows, vocab = data.draw(st.integers(1, 3)), 7
    ids = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, vocab - 1), min_size=5, max_size=5),
                min_size=rows,
                max_size=rows,
            )
        )
    )
    scores = torch.linspace(-3, 3, rows * vocab).view(rows, vocab)
    before = scores.clone()
    penalised = FrequencyPenalty(penalty)(ids, scores)
    counts = torch.stack([row.bincount(minlength=vocab) for row in ids])
    torch.testing.assert_close(penalised, before - penalty * counts)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("penalty", [-1, -0.5, "1", None])
def test_negative_penalty_is_refused(penalty):
    """A reward for repeating, or no number, is a mistake."""
    with pytest.raises(ValueError, match="expected a frequency penalty of 0 or more"):
        FrequencyPenalty(penalty)


def test_frequency_penalty_takes_effect_in_generate(model, batch):
    """Given to `generate` as a logits processor, a large penalty lets no token come twice."""
    ids = generate(
        model, batch, logits_processor=[FrequencyPenalty(1e6)], max_new_tokens=8, min_new_tokens=8
    )
    for row, mask in zip(ids, batch["attention_mask"], strict=True):
        new, prompt = row[len(mask) :].tolist(), row[: len(mask)][mask.bool()].tolist()
        assert len(set(new)) == len(new) and not set(new) & set(prompt)


# --- sampling by its own settings ---

# What a checkpoint may bring along, each value one that changes or stops what is written where it
# is obeyed.
FROM_A_CHECKPOINT = {
    "max_length": 3,
    "max_new_tokens": 2,
    "min_length": 60,
    "min_new_tokens": 12,
    "early_stopping": True,
    "max_time": 0.0,
    "stop_strings": ["e", " "],
    "do_sample": True,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"max_cache_len": 4},
    "max_cache_len": 4,
    "temperature": 9.0,
    "top_k": 3,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 0.2,
    "length_penalty": -3.0,
    "no_repeat_ngram_size": 1,
    "renormalize_logits": True,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 9.0),
    "suppress_tokens": list(range(8, 1500)),
    "begin_suppress_tokens": list(range(8, 1500)),
    "bad_words_ids": [[token] for token in range(8, 1500)],
    "sequence_bias": {(9,): 50.0},
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": WatermarkingConfig(bias=50.0),
    "num_return_sequences": 3,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "encoder_no_repeat_ngram_size": 1,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 2,
    "assistant_lookbehind": 2,
    "target_lookbehind": 2,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "prompt_lookup",
    "compile_config": CompileConfig(),
    "disable_compile": True,
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 3.0,
    "num_beam_groups": 3,
    "constraints": [object()],
    "force_words_ids": [[9]],
    "prefill_chunk_size": 2,
    "continuous_batching_config": object(),
}
NO_SETTINGS = {
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "transformers_version",
}


def from_a_checkpoint(model, settings: dict):
    """The model with a generation config that says more than which tokens begin and end a text."""
    other = copy_sharing_weights(model)
    other.generation_config = copy.deepcopy(model.generation_config)
    for name, value in settings.items():
        setattr(other.generation_config, name, value)
    return other


def test_the_settings_of_a_checkpoint_are_all_tried():
    """Every one that this version of transformers knows."""
    assert {
        name for name in vars(GenerationConfig()) if not name.startswith("_")
    } == FROM_A_CHECKPOINT.keys() | NO_SETTINGS


@pytest.fixture(scope="module")
def own_words(model, batch) -> dict:
    """Greedy and drawn, what is written without such settings."""
    return {
        temperature: sample(
            model, batch, [1, 2, 3], Sampling(temperature=temperature, max_new_tokens=5)
        )
        for temperature in (0.0, 1.0)
    }


@pytest.mark.parametrize("name", [*FROM_A_CHECKPOINT, "all of them"])
def test_sampling_obeys_its_arguments_only(model, batch, own_words, recwarn, name):
    """The ids are those of a checkpoint that brings no settings; its own config stays as it was."""
    settings = FROM_A_CHECKPOINT if name == "all of them" else {name: FROM_A_CHECKPOINT[name]}
    if name == "num_return_sequences":  # transformers itself refuses several greedy ones
        settings["do_sample"] = True
    other = from_a_checkpoint(model, settings)
    before = dict(vars(other.generation_config))
    for temperature, expected in own_words.items():
        assert torch.equal(
            sample(other, batch, [1, 2, 3], Sampling(temperature=temperature, max_new_tokens=5)),
            expected,
        )
    assert vars(other.generation_config) == before and not recwarn


def test_a_text_ends_where_the_checkpoint_says(model, batch):
    """Which tokens end a text is a fact of the model, and no setting of sampling."""
    written = sample(model, batch, [1, 2, 3], Sampling(temperature=0, max_new_tokens=3))
    first = written[:, batch["input_ids"].shape[1]]
    other = from_a_checkpoint(model, {"eos_token_id": first.unique().tolist()})
    assert (
        sample(other, batch, [1, 2, 3], Sampling(temperature=0, max_new_tokens=3)).shape[1]
        == batch["input_ids"].shape[1] + 1
    )


def test_options_of_sampling_count(model, batch):
    """What the caller asks for goes through to `generate`, whatever the checkpoint says."""
    tokens = sample(model, batch, [1, 2, 3], Sampling(temperature=0, max_new_tokens=4))[
        :, batch["input_ids"].shape[1] :
    ]
    suppressed = tokens.unique().tolist()
    for one in (model, from_a_checkpoint(model, {"suppress_tokens": [5]})):
        found = sample(
            one,
            batch,
            [1, 2, 3],
            Sampling(temperature=0, max_new_tokens=4),
            suppress_tokens=suppressed,
        )
        assert not torch.isin(
            found[:, batch["input_ids"].shape[1] :].contiguous(), tokens.contiguous()
        ).any()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"top_k": 5},
        {"min_p": 0.1},
        {"generation_config": GenerationConfig(top_k=5)},
    ],
)
def test_options_that_sampling_would_pass_over_are_refused(model, batch, options):
    """Its random numbers belong to the rows.

    `generate` must not draw on top, and settings for that drawing mean nothing.
    """
    with pytest.raises(ValueError, match=next(iter(options))):
        sample(model, batch, [1, 2, 3], **options)
