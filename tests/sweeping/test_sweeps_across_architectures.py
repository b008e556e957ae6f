"""Sweeps, batches and readings on odd models, offloaded and with dropout: each row as alone."""

import copy
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import accelerate
import pandas as pd
import pytest
import torch
from architectures import D_MODEL, LAYERS, ODD, tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    DynamicCache,
    Gemma3nTextConfig,
    HYV4Config,
    ProphetNetConfig,
    T5Config,
    T5ForConditionalGeneration,
    TopPLogitsWarper,
    XLNetConfig,
)

from common import (
    ActivationAddition,
    Grid,
    Sampling,
    addition_vectors,
    apply_activation_additions,
    complete,
    get_stats_over_corpus,
    next_token_probs,
    read_activations,
    sweep,
    sweep_logits,
    sweep_perplexity,
    train_steering_vector,
)
from common.checking.pristine import assert_pristine, snapshot
from common.measuring.likelihood import token_logprobs
from common.passes.batching import batching
from common.passes.padding import encode
from common.passes.running import input_device
from common.places.blocks import get_blocks
from common.places.sites import Site
from common.texts.generation import completions, end_of_text, generate, joined, logits
from common.texts.sampling import sample
from common.vectors.activation_additions import read_sites
from common.vectors.steering_vector import SteeringVector

PROMPTS = ["I think dogs are animals on the old bridge", "My neighbour said", "The library is"]
EDGES = (0, LAYERS // 2, LAYERS - 1)
NEW = 3
GREEDY = Sampling(max_new_tokens=NEW, temperature=0.0)
TOGETHER = {
    "BART decoder": "equal",
    "Whisper decoder": "equal",
    "RoBERTa decoder": "equal",
    "RecurrentGemma": "equal",
    "RWKV": "alone",
}


@pytest.fixture(scope="module")
def models(tokenizer) -> dict:
    """Made when one is asked for."""

    class Models(dict):
        def __missing__(self, name):
            self[name] = tiny_model(name, len(tokenizer))
            return self[name]

    return Models()


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    generator = torch.Generator().manual_seed(1)
    return SteeringVector({layer: 2 * torch.randn(D_MODEL, generator=generator) for layer in EDGES})


def additions(layer: int) -> list[ActivationAddition]:
    return [ActivationAddition(3.0, layer, "I love"), ActivationAddition(-3.0, layer, "I hate")]


def cells(model, tokenizer, steering):
    """The unsteered model, and each steering at each layer, as a run of one prompt opens it."""
    yield "unsteered", None, nullcontext
    for layer in EDGES:
        if "v" in steering:
            yield (
                "v",
                layer,
                lambda layer=layer: SteeringVector(
                    {layer: steering["v"].layer_activations[layer]}
                ).apply(model),
            )
        if "w" in steering:
            yield (
                "w",
                layer,
                lambda layer=layer: apply_activation_additions(model, tokenizer, additions(layer)),
            )


def rows_of(frame: pd.DataFrame, name: str, layer: int | None) -> pd.DataFrame:
    return frame[
        (frame["steering"] == name)
        & (frame["layer"].isna() if layer is None else frame["layer"] == layer)
    ]


@pytest.mark.parametrize("name", ODD)
def test_completions_are_those_of_single_runs(models, tokenizer, vector, name):
    """Prompts of different lengths, unsteered and steered: the ids of a plain greedy run."""
    model = models[name]
    before = snapshot(model)
    given = {"v": vector, "w": additions(0)}
    frame = sweep(
        model, tokenizer, Grid(given, EDGES, [1.0]), PROMPTS, sampling=GREEDY, prepend_bos=True
    )
    assert len(frame) == len(PROMPTS) * (1 + len(given) * len(EDGES)) and frame[
        "completion"
    ].nunique() > len(PROMPTS)
    for steering, layer, context in cells(model, tokenizer, given):
        expected = []
        for prompt in PROMPTS:
            inputs = encode(tokenizer, [prompt])
            with context():
                expected.append(
                    completions(
                        tokenizer,
                        inputs,
                        model.generate(
                            **inputs, max_new_tokens=NEW, do_sample=False, forced_eos_token_id=None
                        ),
                    )[0]
                )
        assert rows_of(frame, steering, layer)["completion"].tolist() == expected, (steering, layer)
    assert_pristine(model, before)


@pytest.mark.parametrize("name", ODD)
def test_logits_and_losses_are_those_of_single_runs(models, tokenizer, vector, name):
    """The next token after each prompt, and the loss of each text."""
    model = models[name]
    before = snapshot(model)
    given = {"v": vector, "w": additions(0)}
    frame = sweep_logits(
        model,
        tokenizer,
        Grid(given, EDGES, [1.0]),
        PROMPTS,
        {"at 5": lambda steered, plain: steered[:, 5]},
        prepend_bos=True,
    )
    losses = sweep_perplexity(model, tokenizer, Grid(given, EDGES, [1.0]), PROMPTS)
    for label, layer, context in cells(model, tokenizer, given):
        for prompt, found, loss in zip(
            PROMPTS,
            rows_of(frame, label, layer)["at 5"],
            rows_of(losses, label, layer)["loss"],
            strict=True,
        ):
            inputs = encode(tokenizer, [prompt])
            with context(), torch.no_grad():
                scores = model(**inputs).logits[0]
            assert found == pytest.approx(scores[-1, 5].item(), abs=1e-3)
            expected = torch.nn.functional.cross_entropy(
                scores[:-1], inputs["input_ids"][0, 1:]
            ).item()
            assert loss == pytest.approx(expected, rel=1e-4)
    assert_pristine(model, before)


@pytest.mark.parametrize("name", ODD)
def test_batches_outside_sweeps_are_single_runs(models, tokenizer, name):
    """Logits, greedy ids, samples and log-probabilities of a padded batch, and activations."""
    model, inputs = models[name], encode(tokenizer, PROMPTS)
    seeds = list(range(len(PROMPTS)))
    with torch.no_grad():
        found, ids, drawn = (
            logits(model, inputs),
            generate(model, inputs, max_new_tokens=NEW),
            sample(model, inputs, seeds, Sampling(max_new_tokens=NEW)),
        )
        logprobs = token_logprobs(model, tokenizer, PROMPTS)
        acts = [
            read_activations(model, tokenizer, PROMPTS, EDGES, batch_size=size)
            for size in (1, len(PROMPTS))
        ]
        rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        read = read_sites(model, rows, [Site(2, "resid_pre")])
        for number, prompt in enumerate(PROMPTS):
            alone = encode(tokenizer, [prompt])
            count, plain = alone["input_ids"].shape[1], model(**alone).logits[0]
            torch.testing.assert_close(found[number, -count:], plain, atol=1e-3, rtol=1e-4)
            padded = logits(
                model, {name: values[number : number + 1] for name, values in inputs.items()}
            )
            torch.testing.assert_close(padded[0, -count:], plain, atol=1e-3, rtol=1e-4)
            expected = plain.log_softmax(-1)[:-1].gather(-1, alone["input_ids"][0, 1:, None])[:, 0]
            torch.testing.assert_close(logprobs[number], expected, atol=1e-3, rtol=1e-4)
            one, other = (
                model.generate(**alone, max_new_tokens=NEW, do_sample=False),
                sample(model, alone, [number], Sampling(max_new_tokens=NEW)),
            )
            for batch, single in ((ids, one), (drawn, other)):
                new = single[0, count:]
                assert torch.equal(batch[number, inputs["input_ids"].shape[1] :][: len(new)], new)
            for site, hidden in read_sites(model, [rows[number]], [Site(2, "resid_pre")]).items():
                torch.testing.assert_close(read[site], hidden, atol=1e-4, rtol=1e-4)
    for layer in EDGES:
        torch.testing.assert_close(*(part[layer] for part in acts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["BART decoder", "Whisper decoder", "MPT", "RWKV", "Mamba", "RecurrentGemma", "GPT-1"]
)
def test_complete_is_single_runs(models, tokenizer, vector, name):
    """Texts and losses, steered and not."""
    greedy = Sampling(max_new_tokens=NEW, temperature=0.0)
    one = SteeringVector({1: vector.layer_activations[0]})
    together = complete(models[name], tokenizer, PROMPTS, one.apply(models[name]), sampling=greedy)
    for row in together.itertuples():
        (alone,) = complete(
            models[name], tokenizer, [row.prompts], one.apply(models[name]), sampling=greedy
        ).itertuples()
        assert row.completions == alone.completions
        assert (row.loss, row.unsteered_loss) == pytest.approx(
            (alone.loss, alone.unsteered_loss), rel=1e-4
        )


@pytest.mark.parametrize("name", ["Llama", "Mistral", "BLOOM", *ODD])
def test_which_rows_share_a_batch_is_measured_unseen(models, tokenizer, name):
    """Once, whatever the mode of the model; neither its hooks nor its steering see it."""
    model, inputs = tiny_model(name, len(tokenizer), seed=1), encode(tokenizer, PROMPTS)
    seen, before = [], snapshot(model.train())
    handles = [
        register(lambda *_: seen.append(1))
        for block in get_blocks(model)[1][:1]
        for register in (block.register_forward_hook, block.register_forward_pre_hook)
    ]
    with SteeringVector({0: torch.full((D_MODEL,), 9.0)}).apply(model, token_indices=[-1]):
        assert batching(model, inputs) == TOGETHER.get(name, "any") and not seen
    for handle in handles:
        handle.remove()
    assert_pristine(model, before)


def test_a_compiled_model_and_one_of_16_bit_are_measured(tokenizer):
    """Nothing is compiled for the trial; rounding in 16 bit is no disturbance."""
    compiled, inputs = [], encode(tokenizer, PROMPTS)
    fast = torch.compile(
        tiny_model("Llama", len(tokenizer)), backend=lambda graph, _: compiled.append(1) or graph
    )
    assert batching(fast, inputs) == "any" and not compiled
    assert batching(tiny_model("Llama", len(tokenizer)).bfloat16(), inputs) == "any"


def test_the_trial_is_made_once_and_steered_by_nothing(tokenizer):
    """Not even where an offloaded model keeps its hooks: this steering is for three rows."""
    model, inputs = (
        accelerate.cpu_offload(tiny_model("Llama", len(tokenizer))),
        encode(tokenizer, PROMPTS[:3]),
    )
    mask, ran = torch.ones(3, 1, dtype=torch.long), []
    model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    with SteeringVector({0: torch.full((D_MODEL,), 9.0)}).apply(model, token_indices=mask):
        assert batching(model, inputs) == "any" and ran
    ran.clear()
    assert batching(model, inputs) == "any" and not ran


def test_the_trial_does_not_end_with_a_text(tokenizer):
    """Here the text of the one row ends at once, and that beside it goes on."""
    model, inputs = tiny_model("Llama", len(tokenizer)), encode(tokenizer, ["My neighbour went"])
    model.generation_config.eos_token_id = int(logits(model, inputs)[0, -1].argmax())
    assert batching(model, inputs) == "any"


def test_ids_go_to_the_processor_where_no_weight_is():
    assert input_device(tiny_model("Llama", 99).to("meta")) == torch.device("cpu")


def test_texts_that_ended_early_are_filled_up_with_their_end():
    """When the parts of a batch are put together, whose texts are of different lengths."""
    for end, fill in ((7, 7), ([7, 8], 7), (None, 0)):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=end))
        inputs = {"input_ids": torch.tensor([[0, 1], [2, 3]])}
        parts = [
            (torch.tensor([1]), torch.tensor([True, True]), torch.tensor([[2, 3, 4, 7]])),
            (torch.tensor([0]), torch.tensor([False, True]), torch.tensor([[1, 7]])),
        ]
        assert joined(inputs, parts, end_of_text(model, {})).tolist() == [
            [0, 1, 7, fill],
            [2, 3, 4, 7],
        ]


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_return_sequences", 2),
        ("past_key_values", DynamicCache()),
        ("logits_processor", [TopPLogitsWarper(0.5)]),
        ("return_dict_in_generate", True),
    ],
)
def test_options_of_a_whole_batch_are_refused_where_rows_disturb_each_other(
    models, tokenizer, name, value
):
    """An empty cache too: the second part would go on with what the first one left in it."""
    before = snapshot(models["BART decoder"])
    with pytest.raises(
        ValueError, match=f"rows of BartForCausalLM disturb each other: with {name} give one prompt"
    ):
        generate(
            models["BART decoder"], encode(tokenizer, PROMPTS), do_sample=True, **{name: value}
        )
    assert_pristine(models["BART decoder"], before)


SMALL = {"hidden_size": D_MODEL, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
OTHERS = {
    "altup_num_inputs": lambda: AutoModelForCausalLM.from_config(
        Gemma3nTextConfig(
            **GROUPED,
            intermediate_size=48,
            vocab_size_per_layer_input=99,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            altup_num_inputs=2,
            laurel_rank=4,
            activation_sparsity_pattern=None,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "hyper-connections": lambda: AutoModelForCausalLM.from_config(
        HYV4Config(
            **GROUPED,
            intermediate_size=48,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "n-gram": lambda: AutoModelForCausalLM.from_config(
        ProphetNetConfig(
            hidden_size=D_MODEL,
            num_encoder_layers=1,
            num_decoder_layers=2,
            num_decoder_attention_heads=4,
            decoder_ffn_dim=48,
            vocab_size=99,
        )
    ),
    "in front of the batch": lambda: AutoModelForCausalLM.from_config(
        XLNetConfig(d_model=D_MODEL, n_layer=2, n_head=4, d_inner=48, vocab_size=99)
    ),
    "both directions": lambda: AutoModelForCausalLM.from_config(
        BertConfig(**SMALL, intermediate_size=48)
    ),
    "BartForConditionalGeneration has an encoder and a decoder": lambda: (
        BartForConditionalGeneration(
            BartConfig(
                d_model=16,
                vocab_size=99,
                **{
                    f"{side}_{what}": number
                    for side in ("encoder", "decoder")
                    for what, number in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
                },
            )
        )
    ),
    "T5ForConditionalGeneration has an encoder and a decoder": lambda: T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=99)
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_models_are_refused_by_name(tokenizer, what):
    """Blocks without one residual stream, and models that are not causal: before anything runs."""
    model = OTHERS[what]()
    before = snapshot(model)
    for call in (
        lambda: sweep(
            model,
            tokenizer,
            Grid({"v": SteeringVector({0: torch.ones(D_MODEL)})}, [0], [1.0]),
            PROMPTS,
        ),
        lambda: SteeringVector({0: torch.ones(D_MODEL)}).patch_activations(model),
        lambda: train_steering_vector(model, tokenizer, [("Love", "Hate")]),
    ):
        with pytest.raises(ValueError, match=what):
            call()
    assert_pristine(model, before)


# --- offloaded models ---


def partly(model, folder):
    """Embeddings and every second block on the disk."""
    path, blocks = get_blocks(model)
    base = path.rpartition(".")[0]
    modules = {
        f"{base}.{name}": "cpu"
        for name, _ in model.get_submodule(base).named_children()
        if f"{base}.{name}" != path
    }
    places = {
        **modules,
        "model.embed_tokens": "disk",
        "lm_head": "disk",
        **{f"{path}.{layer}": ("cpu", "disk")[layer % 2] for layer in range(len(blocks))},
    }
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


OFFLOADED = {
    "CPU": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")),
    "partly": partly,
}


@pytest.mark.parametrize("how", OFFLOADED)
def test_an_offloaded_model_gives_the_same(tokenizer, vector, how, tmp_path):
    """Sweeps, training, additions, completions, probabilities and losses, to the last bit."""
    plain = tiny_model("Llama", len(tokenizer))
    model = OFFLOADED[how](copy.deepcopy(plain), tmp_path)
    assert model.get_input_embeddings().weight.is_meta and input_device(model) == torch.device(
        "cpu"
    )
    steering = {"v": vector, "w": additions(0)}
    for call in (
        lambda model: sweep(
            model, tokenizer, Grid(steering, EDGES, [1.0]), PROMPTS, sampling=GREEDY
        ),
        lambda model: sweep_logits(model, tokenizer, Grid(steering, EDGES, [1.0]), PROMPTS),
        lambda model: sweep_perplexity(model, tokenizer, Grid(steering, EDGES, [1.0]), PROMPTS),
        lambda model: complete(
            model,
            tokenizer,
            PROMPTS,
            vector.apply(model),
            seed=0,
            sampling=Sampling(max_new_tokens=NEW),
        ),
        lambda model: sweep_logits(
            model, tokenizer, Grid({"v": vector}, EDGES, [1.0]), PROMPTS, path=tmp_path / "one file"
        ),  # they are one model
    ):
        pd.testing.assert_frame_equal(call(model), call(plain), check_exact=True)
    for call in (
        lambda model: train_steering_vector(model, tokenizer, [("Love", "Hate")]).layer_activations,
        lambda model: addition_vectors(model, tokenizer, additions(2)),
        lambda model: dict(enumerate(token_logprobs(model, tokenizer, PROMPTS))),
        lambda model: {
            0: next_token_probs(
                model,
                tokenizer,
                PROMPTS[0],
                lambda: apply_activation_additions(model, tokenizer, additions(1)),
            )
        },
        lambda model: {
            0: torch.tensor(get_stats_over_corpus(model, tokenizer, PROMPTS).avg_logprob)
        },
    ):
        found, expected = call(model), call(plain)
        assert found.keys() == expected.keys() and all(
            torch.equal(found[key], expected[key]) for key in expected
        )


# --- training mode ---


def test_dropout_is_off_in_whatever_mode_the_model_is(tokenizer, vector):
    """As in evaluation mode; each module's own mode comes back, also after an exception."""
    config = tiny_config("GPT-2", len(tokenizer))
    assert config.resid_pdrop > 0
    model = tiny_model("GPT-2", len(tokenizer))
    calls = [
        lambda: sweep(
            model, tokenizer, Grid({"v": vector}, EDGES, [1.0]), PROMPTS, sampling=GREEDY
        ),
        lambda: sweep_logits(model, tokenizer, Grid({"v": vector}, EDGES, [0.0, 1.0]), PROMPTS),
        lambda: sweep_perplexity(model, tokenizer, Grid({"v": vector}, EDGES, [1.0]), PROMPTS),
        lambda: complete(
            model,
            tokenizer,
            PROMPTS,
            vector.apply(model),
            seed=0,
            sampling=Sampling(max_new_tokens=NEW),
        ),
        lambda: pd.DataFrame(next_token_probs(model, tokenizer, PROMPTS[0])),
        lambda: pd.DataFrame(logits(model, encode(tokenizer, PROMPTS)).flatten(1)),
        lambda: pd.DataFrame(generate(model, encode(tokenizer, PROMPTS), max_new_tokens=NEW)),
        lambda: pd.Series(get_stats_over_corpus(model, tokenizer, PROMPTS).avg_logprob),
    ]
    expected = [call() for call in calls]
    model.train()
    model.transformer.h[1].eval()
    before = snapshot(model)
    for call, frame in zip(calls, expected):
        assert call().equals(frame)
        assert_pristine(model, before)

    def broken(texts):
        if texts != PROMPTS:
            raise RuntimeError("no")
        return [0] * len(texts)

    with pytest.raises(RuntimeError, match="no"):
        sweep(
            model,
            tokenizer,
            Grid({"v": vector}, EDGES, [1.0]),
            PROMPTS,
            {"m": broken},
            sampling=GREEDY,
        )
    assert_pristine(model, before)


def test_a_model_that_refuses_the_trials_gets_its_batches_whole(tokenizer):
    """A module put into it may take batches of one shape only; once it is gone, all is measured."""
    model, inputs = tiny_model("BART decoder", len(tokenizer)), encode(tokenizer, PROMPTS)
    block, rows = get_blocks(model)[1][1], torch.randn(len(PROMPTS), 1, D_MODEL)

    def forward(hidden, *args, **kwargs):
        return type(block).forward(
            block, torch.cat([hidden[:, :1] + rows, hidden[:, 1:]], dim=1), *args, **kwargs
        )

    block.forward = forward
    assert batching(model, inputs) == "any" and logits(model, inputs).shape[0] == len(PROMPTS)
    with pytest.raises(RuntimeError, match="size of tensor|Sizes of tensors"):
        logits(model, {name: values[:2] for name, values in inputs.items()})
    del block.forward
    assert batching(model, inputs) == "equal"


class Tied(nn.Module):
    """A block that ties itself to others at its first pass, as TransformerBridge does."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.outside, self.is_tied = [block], False

    def forward(self, *args, **kwargs):
        if not self.is_tied:
            this, self.is_tied = weakref.proxy(self), True
            self.outside[0].register_forward_pre_hook(
                lambda module, given: setattr(this, "is_tied", True)
            )
        return self.outside[0](*args, **kwargs)


def test_modules_of_other_libraries_are_not_copied(tokenizer):
    """What they are tied to would belong to the copy, and break when that is gone."""
    model, inputs = tiny_model("GPT-2", len(tokenizer)), encode(tokenizer, PROMPTS)
    blocks = get_blocks(model)[1]
    blocks[1] = Tied(blocks[1])
    first = logits(model, inputs)
    assert torch.equal(logits(model, inputs), first)
