"""Laws of `common.positions` and `common.generation`, which every notebook leans on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PROMPTS

from common.generation import FrequencyPenalty, completions, generate, generation_options, logits
from common.positions import position_ids, with_position_ids

masks = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.integers(1, width), min_size=1, max_size=4).map(lambda rows: (width, rows))
)


@given(masks)
def test_positions_count_real_tokens_from_zero(rows):
    """With padding on the left, the real tokens of each row are numbered 0, 1, 2 … and padding gets 0."""
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
    assert list(inputs) == [*batch, "position_ids"] and all(inputs[key] is batch[key] for key in batch)


def test_plain_forward_needs_positions(model, batch):
    """The trap behind it: without position ids the logits of padded rows are wrong, and only theirs."""
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
    for row, (prompt, text) in enumerate(zip(PROMPTS, completions(tokenizer, batch, ids), strict=True)):
        assert tokenizer.decode(ids[row], skip_special_tokens=True, clean_up_tokenization_spaces=False) == prompt + text


@given(data=st.data(), penalty=st.floats(0, 5))
def test_frequency_penalty_lowers_by_the_count(data, penalty):
    """A token that occurred n times loses n · penalty; row by row; the given scores are not changed."""
    rows, vocab = data.draw(st.integers(1, 3)), 7
    ids = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, vocab - 1), min_size=5, max_size=5), min_size=rows, max_size=rows))
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
    ids = generate(model, batch, logits_processor=[FrequencyPenalty(1e6)], max_new_tokens=8, min_new_tokens=8)
    for row, mask in zip(ids, batch["attention_mask"], strict=True):
        new, prompt = row[len(mask) :].tolist(), row[: len(mask)][mask.bool()].tolist()
        assert len(set(new)) == len(new) and not set(new) & set(prompt)
