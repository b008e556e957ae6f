"""Applying, saving and computing with steering vectors: the laws, and known faults of others."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from architectures import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config

from common.checking.pristine import assert_pristine, snapshot
from common.embedded import FOLDER
from common.places.positions import with_position_ids
from common.vectors.operators import (
    ablation_operator,
    ablation_then_addition_operator,
    norm_preserving_addition_operator,
)
from common.vectors.reading import record_activations
from common.vectors.steering_vector import SteeringVector, model_name

D_MODEL = GPT2Config.from_pretrained(FOLDER).hidden_size  # of the embedded model
LAYER = 2
TEXTS = [
    "I think dogs are",
    "My neighbour is a man who lives behind the mill.",
    "You",
    "We talk about weddings constantly. The bride",
]


def random_vector(
    seed: int = 0, size: float = 4.0, d_model: int = D_MODEL, layers: tuple[int, ...] = (LAYER,)
) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    draws = {layer: torch.randn(d_model, generator=generator) for layer in layers}
    return SteeringVector({layer: size * draw / draw.norm() for layer, draw in draws.items()})


def encode(tokenizer, texts: list[str], side: str = "left"):
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        return tokenizer(texts, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = before


@torch.no_grad()
def hidden_of(model, inputs, layer: int = LAYER) -> torch.Tensor:
    """resid_post [batch, pos, d_model] under whatever steering is open."""
    with record_activations(model, layer_nums=[layer]) as records:
        model(**with_position_ids(inputs))
    return records[layer][0]


def moved_positions(model, inputs, vector: SteeringVector, **where) -> list[list[int]]:
    """Which real tokens of each row a steering moved; it asserts that padding did not move."""
    plain = hidden_of(model, inputs)
    with vector.apply(model, **where):
        steered = hidden_of(model, inputs)
    moved = (steered - plain).abs().amax(-1) > 1e-3
    real = inputs["attention_mask"].bool()
    assert not moved[~real].any(), "padding was steered"
    return [row[mask].nonzero().flatten().tolist() for row, mask in zip(moved, real)]


# --- steered = unsteered + vector ---


@given(coeff=st.floats(-3, 3), side=st.sampled_from(["left", "right"]), rows=st.integers(1, 4))
def test_steered_is_unsteered_plus_vector(model, tokenizer, coeff, side, rows):
    """At the steered layer, in every row, at every real token, for any multiplier."""
    inputs = encode(tokenizer, TEXTS[:rows], side)
    vector = random_vector()
    plain = hidden_of(model, inputs)
    with vector.apply(model, multiplier=coeff):
        steered = hidden_of(model, inputs)
    real = inputs["attention_mask"].bool()
    wanted = plain + coeff * vector.layer_activations[LAYER]
    torch.testing.assert_close(steered[real], wanted[real])
    assert torch.equal(steered[~real], plain[~real])


def test_hidden_states_show_the_steering(model, tokenizer):
    """Also when transformers' own hooks were there first, and for the layer itself."""
    inputs = encode(tokenizer, TEXTS[:1])
    vector = random_vector()
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with vector.apply(model):
            steered = model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        steered[LAYER + 1], plain[LAYER + 1] + vector.layer_activations[LAYER]
    )
    assert torch.equal(steered[LAYER], plain[LAYER])


def test_several_layers_and_vectors_at_once(model, tokenizer):
    """Two vectors on one layer are their sum; a vector of two layers is two vectors of one."""
    inputs = encode(tokenizer, TEXTS)
    first, second, elsewhere = random_vector(1), random_vector(2), random_vector(3, layers=(4,))
    with torch.no_grad():
        with first.apply(model), second.apply(model), elsewhere.apply(model):
            one_by_one = model(**with_position_ids(inputs)).logits
        with (first + second + elsewhere).apply(model):
            at_once = model(**with_position_ids(inputs)).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(one_by_one[real], at_once[real], atol=1e-4, rtol=1e-5)


def test_vectors_act_in_the_order_in_which_they_were_opened(model, tokenizer):
    """Adding and then ablating leaves nothing along the vector; the other order leaves it there."""
    inputs = encode(tokenizer, TEXTS[:1])
    vector = random_vector()
    direction = vector.unit().layer_activations[LAYER]
    with vector.apply(model), vector.apply(model, operator=ablation_operator()):
        assert (hidden_of(model, inputs) @ direction).abs().max() < 1e-4
    with vector.apply(model, operator=ablation_operator()), vector.apply(model):
        torch.testing.assert_close(
            hidden_of(model, inputs) @ direction, torch.full((1, 4), 4.0), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    "operator",
    [ablation_operator(), ablation_then_addition_operator(), norm_preserving_addition_operator()],
)
def test_operators_are_what_is_added(model, tokenizer, operator):
    """Hidden + operator(hidden, vector), the vector multiplied before, of shape [1, 1, d_model]."""
    inputs = encode(tokenizer, TEXTS[:1])
    vector = random_vector()
    plain = hidden_of(model, inputs)
    with vector.apply(model, operator=operator, multiplier=-2.0):
        steered = hidden_of(model, inputs)
    torch.testing.assert_close(
        steered, plain + operator(plain, -2.0 * vector.layer_activations[LAYER].view(1, 1, -1))
    )


def test_an_operator_of_the_wrong_shape_is_named(model, tokenizer):
    """An operator that gives another width: one sentence, and the model as it was."""
    before = snapshot(model)
    with (
        pytest.raises(ValueError, match=r"layer 2: cannot add \[2, 1, 4, \d+\] to hidden states"),
        random_vector().apply(model, operator=lambda hidden, _: hidden.new_ones(2, 1, 4, D_MODEL)),
    ):
        model(**encode(tokenizer, TEXTS[:1]))
    assert_pristine(model, before)


# --- positions are absolute ---


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "where, wanted",
    [
        ({}, lambda n: range(n)),
        ({"min_token_index": 2}, lambda n: range(2, n)),
        ({"token_indices": [0, 3]}, lambda n: [i for i in (0, 3) if i < n]),
        ({"token_indices": [-1]}, lambda n: [n - 1]),
        ({"token_indices": slice(1, 3)}, lambda n: range(n)[1:3]),
        ({"token_indices": slice(-2, None)}, lambda n: range(n)[-2:]),
        ({"token_indices": torch.tensor([0, 1, 1, 0])}, lambda n: [i for i in (1, 2) if i < n]),
    ],
)
def test_where_in_a_padded_batch(model, tokenizer, side, where, wanted):
    """Left-padded = right-padded = alone: padding has no position and is never steered."""
    inputs = encode(tokenizer, TEXTS, side)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 4 and min(lengths) == 1
    found = moved_positions(model, inputs, random_vector(), **where)
    assert found == [list(wanted(length)) for length in lengths]
    for row, text in enumerate(TEXTS):
        assert moved_positions(model, encode(tokenizer, [text]), random_vector(), **where) == [
            found[row]
        ]


def test_a_mask_for_each_row(model, tokenizer):
    """[batch, pos]: each row has its own positions, counted without its padding."""
    inputs = encode(tokenizer, TEXTS[:3])
    mask = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1]])
    assert moved_positions(model, inputs, random_vector(), token_indices=mask) == [[0], [1, 2], [0]]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    "where",
    [
        {},
        {"min_token_index": 6},
        {"min_token_index": -1},
        {"token_indices": [-1, 0]},
        {"token_indices": slice(-2, None, 2)},
        {"token_indices": [12, 13, 14]},
        {"token_indices": torch.tensor([[0, 1] * 10, [1, 0] * 10, [0, 0] * 10, [1, 1] * 10])},
    ],
)
def test_cached_is_uncached(model, tokenizer, where, beams):
    """The same text with a cache and without, padded, greedily and with beams; steering shows."""
    inputs = encode(tokenizer, TEXTS)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    with random_vector(size=20).apply(model, **where):
        cached, uncached = (
            model.generate(**inputs, **options, use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, model.generate(**inputs, **options))


@pytest.mark.parametrize(
    "where", [{}, {"min_token_index": 3}, {"min_token_index": -1}, {"token_indices": [-1]}]
)
def test_batched_is_single(model, tokenizer, where):
    """A row of a left-padded batch gets the text that its prompt gets alone."""
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with random_vector(size=8).apply(model, **where):
        batched = model.generate(**encode(tokenizer, TEXTS), **options)[:, -12:]
        for row, text in enumerate(TEXTS):
            assert torch.equal(
                model.generate(**encode(tokenizer, [text]), **options)[0, -12:], batched[row]
            )


def test_from_token_n_on_includes_every_generated_token(model, tokenizer):
    """All after the prompt is steered, with a cache too: a mask over the local length misses it."""
    inputs = encode(tokenizer, TEXTS[:1])
    start = inputs["input_ids"].shape[1]
    vector = random_vector()
    for use_cache in (True, False):
        states = []
        for steering in (
            vector.apply(model, min_token_index=start),
            vector.apply(model, multiplier=0.0),
        ):
            with steering, record_activations(model, layer_nums=[LAYER]) as records:
                ids = model.generate(
                    **inputs, max_new_tokens=3, do_sample=False, use_cache=use_cache
                )
            states.append((ids, records[LAYER]))
        (ids, steered), (_, plain) = states
        torch.testing.assert_close(steered[0], plain[0])
        if use_cache:
            assert [part.shape[1] for part in steered] == [start, 1, 1]
            torch.testing.assert_close(
                steered[1] - plain[1],
                vector.layer_activations[LAYER].expand(1, 1, -1),
                atol=1e-4,
                rtol=1e-4,
            )


def test_generating_after_a_cached_prompt(model, tokenizer):
    """A prompt in the cache, then several tokens at once: positions go on where the cache ends."""
    inputs = encode(tokenizer, TEXTS[1:2])
    whole = inputs["input_ids"]
    for where in ({"min_token_index": 4}, {"token_indices": [5, 7]}):
        with torch.no_grad(), random_vector().apply(model, **where):
            at_once = model(whole).logits
            first = model(whole[:, :3], use_cache=True)
            rest = model(whole[:, 3:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(
            torch.cat([first.logits, rest], 1), at_once, atol=1e-4, rtol=1e-4
        )


def test_without_attention_mask_and_with_embeddings(model, tokenizer):
    """Ids alone, or embeddings in their place, count from the first entry."""
    ids = encode(tokenizer, TEXTS[:1])["input_ids"]
    with torch.no_grad(), random_vector().apply(model, token_indices=[1]):
        by_ids = model(ids).logits
        torch.testing.assert_close(model(inputs_embeds=model.transformer.wte(ids)).logits, by_ids)
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits[:, 1:], by_ids[:, 1:], atol=1e-2)
        torch.testing.assert_close(model(ids).logits[:, 0], by_ids[:, 0])


def test_static_cache(model, tokenizer):
    """A static cache has a mask of its own kind; the positions are the same."""
    inputs = encode(tokenizer, TEXTS)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with random_vector(size=12).apply(model, min_token_index=5):
        wanted = model.generate(**inputs, **options)
        assert torch.equal(
            model.generate(
                **inputs, **options, cache_implementation="static", disable_compile=True
            ),
            wanted,
        )


# --- the model, restored and otherwise untouched ---


@given(which=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), fails=st.booleans())
def test_removed_is_restored(model, tokenizer, which, fails):
    """After the block, an exception in it, or nested blocks, the model is as it was."""
    before = snapshot(model)
    vector = random_vector(layers=tuple(which))
    try:
        with vector.apply(model), vector.apply(model, min_token_index=1):
            model(**encode(tokenizer, TEXTS[:1]))
            if fails:
                raise RuntimeError("boom")
    except RuntimeError:
        assert fails
    assert_pristine(model, before)


@pytest.mark.parametrize("method", ["patch", "patch_activations"])
def test_patch_and_remove(model, tokenizer, method):
    """The handle steers until removed; a second remove() does nothing, to others either."""
    inputs = encode(tokenizer, TEXTS[:1])
    before, plain = snapshot(model), hidden_of(model, inputs)
    handle = getattr(random_vector(), method)(model, token_indices=[0])
    assert not torch.equal(hidden_of(model, inputs), plain)
    handle.remove()
    assert torch.equal(hidden_of(model, inputs), plain)
    with random_vector(1).apply(model):
        handle.remove()
        assert not torch.equal(hidden_of(model, inputs), plain)
    assert_pristine(model, before)


def test_an_error_while_patching_leaves_no_hook(model, monkeypatch):
    """The second of three hooks cannot be registered: the first goes as well."""
    before = snapshot(model)
    block = model.transformer.h[3]
    monkeypatch.setattr(
        block,
        "register_forward_hook",
        lambda *_: (_ for _ in ()).throw(RuntimeError("no more hooks")),
    )
    after_patch = snapshot(model)
    with pytest.raises(RuntimeError, match="no more hooks"):
        random_vector(layers=(2, 3, 4)).patch_activations(model)
    assert_pristine(model, after_patch)
    monkeypatch.undo()
    assert_pristine(model, before)


def test_inference_mode_and_training_mode(tokenizer):
    """Nothing is written in place: inference tensors and leaves with gradients are steered too."""
    model = tiny_model("GPT-2", len(tokenizer))
    inputs = encode(tokenizer, TEXTS)
    vector = random_vector(d_model=32)
    with torch.no_grad(), vector.apply(model):
        wanted = model(**inputs).logits
    with torch.inference_mode(), vector.apply(model):
        assert torch.equal(model(**inputs).logits, wanted)
    model.train()
    before = snapshot(model)
    with vector.apply(model):
        model(**inputs).logits.sum().backward()
    assert_pristine(model, before)


def test_gradient_checkpointing(tokenizer):
    """The same gradients with and without checkpoints, with all positions steered and with some."""
    inputs = encode(tokenizer, TEXTS)
    for where in ({}, {"min_token_index": 2}):
        gradients = []
        for checkpoints in (False, True):
            torch.manual_seed(0)
            model = tiny_model("GPT-2", len(tokenizer))
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            model.train()
            if checkpoints:
                model.gradient_checkpointing_enable()
            with random_vector(d_model=32).apply(model, **where):
                model(**inputs, use_cache=False).logits.square().mean().backward()
            gradients.append({name: weight.grad for name, weight in model.named_parameters()})
        assert all(
            torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6)
            for name in gradients[0]
        )


def test_a_vector_can_be_learned(model, tokenizer):
    """Gradients reach a vector that requires them, in pass after pass within one block."""
    numbers = torch.zeros(D_MODEL, requires_grad=True)
    inputs = encode(tokenizer, TEXTS)
    with SteeringVector({LAYER: numbers}).apply(model, multiplier=2.0):
        for _ in range(2):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            (gradient,) = torch.autograd.grad(loss, numbers)
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_other_dtypes_are_moved_once(tokenizer, dtype):
    """A vector of any dtype on a bfloat16 model is converted once, not at every step."""
    model = tiny_model("GPT-2", len(tokenizer)).bfloat16()
    vector = random_vector(d_model=32).to(dtype)
    moved = []
    with vector.apply(model, operator=lambda hidden, given: moved.append(given) or given):
        model.generate(**encode(tokenizer, TEXTS), max_new_tokens=6, eos_token_id=None)
        assert hidden_of(model, encode(tokenizer, TEXTS)).dtype == torch.bfloat16
    assert len(moved) == 7 and all(given is moved[0] for given in moved)
    assert vector.layer_activations[LAYER].dtype == dtype


class _Returns(nn.Module):
    """A block that returns more than its hidden states."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs), "more", 7


class _TakesFirst(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.inner = block

    def forward(self, *args, **kwargs):
        hidden, more, seven = self.inner(*args, **kwargs)
        assert (more, seven) == ("more", 7)
        return hidden


def test_a_block_that_returns_more(tokenizer):
    """The tuple keeps its other entries, and every row of the batch is steered."""
    model = tiny_model("GPT-2", len(tokenizer))
    inputs = encode(tokenizer, TEXTS, "right")
    vector = random_vector(d_model=32)
    with torch.no_grad(), vector.apply(model):
        wanted = model(**inputs).logits
    other = copy.deepcopy(model)
    other.transformer.h[LAYER] = _TakesFirst(_Returns(other.transformer.h[LAYER]))
    config = {
        "decoder_block": lambda num: f"transformer.h.{num}" + (".inner" if num == LAYER else "")
    }
    with torch.no_grad(), vector.apply(other, layer_config=config):
        torch.testing.assert_close(other(**inputs).logits, wanted)


# --- bad input ---


@pytest.mark.parametrize(
    "vector, options, says",
    [
        (
            random_vector(d_model=64),
            {},
            f"the vector of layer 2 has 64 numbers, and d_model of GPT2LMHeadModel is {D_MODEL}",
        ),
        (random_vector(layers=(9,)), {}, "layer 9 does not exist: GPT2LMHeadModel has 6 layers"),
        (
            SteeringVector({2: torch.full((D_MODEL,), torch.nan)}),
            {},
            "nan or inf in the vector of layer 2",
        ),
        (random_vector(), {"multiplier": float("inf")}, "finite number as multiplier"),
        (random_vector(), {"multiplier": "2"}, "finite number as multiplier, got '2'"),
        (random_vector(), {"min_token_index": 1, "token_indices": [0]}, "not both"),
        (SteeringVector({2: torch.ones(D_MODEL)}, "norm"), {}, "unknown layer_type 'norm'"),
        (random_vector(layers=(2, -4)), {}, "layer 2 is given twice"),
    ],
)
def test_bad_input_is_refused_before_anything_is_changed(model, vector, options, says):
    """Each mistake is named, and no hook exists."""
    before = snapshot(model)
    for method in (vector.patch_activations, lambda m, **o: vector.apply(m, **o).__enter__()):
        with pytest.raises(ValueError, match=says):
            method(model, **options)
    assert_pristine(model, before)


@pytest.mark.parametrize(
    "given, says",
    [
        ({}, "expected a dict from layer number to vector"),
        ({"2": torch.ones(3)}, "expected an integer as layer number, got '2'"),
        (
            {2: torch.ones(1, 3)},
            r"vector \[d_model\] for layer 2, got a torch.float32 tensor \[1, 3\]",
        ),
        ({2: torch.ones(3, dtype=torch.long)}, "got a torch.int64 tensor"),
        ({2: [1.0, 2.0]}, r"got \[1.0, 2.0\]"),
    ],
)
def test_what_is_not_a_vector_is_refused(given, says):
    """At construction already."""
    with pytest.raises(ValueError, match=says):
        SteeringVector(given)


def test_an_index_before_the_prompt(model, tokenizer):
    """Known only when the prompt is: a clear error from the pass, and the model as it was."""
    before = snapshot(model)
    with (
        pytest.raises(
            ValueError, match="token index -9 lies before the first token of a prompt of 4 tokens"
        ),
        random_vector().apply(model, token_indices=[-9]),
    ):
        model(**encode(tokenizer, TEXTS[:1]))
    assert_pristine(model, before)


# --- arithmetic ---


vectors = st.builds(
    random_vector,
    seed=st.integers(0, 10**6),
    size=st.floats(0.1, 10),
    layers=st.sampled_from([(2,), (1, 2), (0, 3)]),
)


def assert_same(one: SteeringVector, other: SteeringVector) -> None:
    assert one.layer_type == other.layer_type
    torch.testing.assert_close(one.layer_activations, other.layer_activations)


@given(vectors, vectors, st.floats(-3, 3))
def test_arithmetic(a, b, c):
    """The laws of a vector space, layer by layer; operands are not changed."""
    before = copy.deepcopy(a.layer_activations)
    summed, other = (dict(sorted(s.layer_activations.items())) for s in (a + b, b + a))
    torch.testing.assert_close(summed, other)
    assert summed.keys() == a.layer_activations.keys() | b.layer_activations.keys()
    assert_same((a + a), 2 * a)
    assert_same((a - a), 0 * a)
    assert_same(-a, -1 * a)
    assert_same(a * c, c * a)
    assert_same(a / 2, 0.5 * a)
    assert_same(c * (a + a), c * a + c * a)
    assert all(norm == pytest.approx(1, abs=1e-5) for norm in a.unit().norm().values())
    for layer, norm in a.norm().items():
        torch.testing.assert_close(
            a.unit().layer_activations[layer] * norm, a.layer_activations[layer]
        )
    assert all(
        cosine == pytest.approx(-1, abs=1e-5) for cosine in a.cosine_similarity(-3 * a).values()
    )
    torch.testing.assert_close(a.layer_activations, before)


def test_a_sum_keeps_what_is_true_of_both():
    """The entries of the metadata that differ, or that only one has, are gone."""
    one = SteeringVector({1: torch.ones(3)}, metadata={"model": "m", "pairs": "1", "only": "a"})
    other = SteeringVector({1: torch.ones(3)}, metadata={"model": "m", "pairs": "2", "own": "b"})
    assert (one + other).metadata == (one - other).metadata == {"model": "m"}
    assert (2 * one).metadata == one.metadata


@given(st.integers(0, 10**6), st.sampled_from([1e-30, 1e-25, 1.0, 1e20, 1e30]))
def test_norm_and_direction_at_any_size(seed, size):
    """The squares of such numbers lie outside float32; layer type, dtype and layers are kept."""
    draw = torch.randn(5, generator=torch.Generator().manual_seed(seed))
    draw /= draw.norm()
    vector = SteeringVector({1: (size * draw).bfloat16(), np.int64(2): size * draw}, "mlp")
    assert vector.norm()[2] == pytest.approx(size, rel=1e-5)
    unit = vector.unit()
    assert unit.layer_type == "mlp" and [*map(type, unit.layer_activations)] == [int, int]
    assert unit.layer_activations[1].dtype == torch.bfloat16
    torch.testing.assert_close(unit.layer_activations[2], draw)


def test_what_has_no_direction_is_refused():
    """0, nan and inf, each by its layer."""
    for wrong in (torch.nan, torch.inf):
        vector = SteeringVector({1: torch.ones(3), 4: torch.tensor([1.0, wrong, 0.0])})
        with pytest.raises(ValueError, match="nan or inf in the vector of layer 4"):
            vector.unit()
    a = random_vector()
    for other, says in (
        (SteeringVector(a.layer_activations, "mlp"), "'decoder_block' and 'mlp'"),
        (random_vector(d_model=64), "different widths"),
    ):
        with pytest.raises(ValueError, match=says):
            a.cosine_similarity(other)


def test_arithmetic_refuses_what_does_not_fit():
    """Other places, other widths, 0 as divisor or direction, nothing in common, other types."""
    a = random_vector()
    mlp = SteeringVector(a.layer_activations, "mlp")
    for wrong, says in [
        (lambda: a + mlp, "'decoder_block' and 'mlp'"),
        (lambda: a + random_vector(d_model=64), rf"different widths: \[64, {D_MODEL}\]"),
        (lambda: a / 0, "divide a steering vector by 0"),
        (lambda: (0 * a).unit(), "layer 2 is 0 and has no direction"),
        (
            lambda: a.cosine_similarity(random_vector(layers=(1,))),
            r"no layer in common: \[2\] and \[1\]",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            wrong()
    for wrong in (lambda: a + 1, lambda: a * "2", lambda: a * a, lambda: a / a, lambda: a - 1):
        with pytest.raises(TypeError):
            wrong()
    for wrong in (lambda: a * True, lambda: a / True):
        with pytest.raises(TypeError):
            wrong()


# --- files ---


def described(vector: SteeringVector) -> SteeringVector:
    vector.metadata |= {
        "model": "embedded",
        "model_type": "gpt2",
        "pairs": "3",
        "aggregator": "mean",
    }
    return vector


@given(
    vector=vectors,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layer_type=st.sampled_from(["decoder_block", "mlp"]),
)
def test_saved_is_loaded(tmp_path_factory, vector, dtype, layer_type):
    """Bit for bit, with layer type and metadata."""
    path = tmp_path_factory.mktemp("vectors") / "folder" / "love.safetensors"
    vector = described(SteeringVector(vector.to(dtype).layer_activations, layer_type))
    vector.save(path)
    loaded = SteeringVector.load(path)
    assert (
        loaded.layer_type == layer_type
        and loaded.layer_activations.keys() == vector.layer_activations.keys()
    )
    assert all(
        torch.equal(loaded.layer_activations[layer], given)
        for layer, given in vector.layer_activations.items()
    )
    assert vector.metadata.items() <= loaded.metadata.items()
    assert set(json.loads(loaded.metadata["versions"])) == {"torch", "transformers", "safetensors"}
    assert [file.name for file in path.parent.iterdir()] == ["love.safetensors"]


@pytest.mark.parametrize("save, load", [("save", "load"), ("save_gguf", "load_gguf")])
def test_files_are_not_overwritten_silently(tmp_path, save, load):
    """An existing file is kept by default, and a failed write leaves the old one and no other."""
    path = tmp_path / "love"
    first, second = described(random_vector(1)), described(random_vector(2))
    getattr(first, save)(path)
    with pytest.raises(
        FileExistsError, match="is there already; give another name, or overwrite=True"
    ):
        getattr(second, save)(path)
    assert_same(getattr(SteeringVector, load)(path), first)
    getattr(second, save)(path, overwrite=True)
    assert_same(getattr(SteeringVector, load)(path), second)
    second.metadata["model_type"] = 3
    with pytest.raises((TypeError, AttributeError), match="int"):
        getattr(second, save)(path, overwrite=True)
    second.metadata["model_type"] = "gpt2"
    assert_same(getattr(SteeringVector, load)(path), second)
    assert [file.name for file in tmp_path.iterdir()] == ["love"]


@given(cut=st.floats(0, 0.99))
@pytest.mark.parametrize(
    "save, load, kind", [("save", "load", "safetensors"), ("save_gguf", "load_gguf", "GGUF")]
)
def test_a_truncated_file_is_refused(tmp_path_factory, save, load, kind, cut):
    """Cut anywhere, it gives one sentence that names the file."""
    path = tmp_path_factory.mktemp("cut") / "love"
    getattr(described(random_vector(layers=(1, 2, 3))), save)(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(ValueError, match=f"love' is not a complete {kind} file"):
        getattr(SteeringVector, load)(path)


def test_a_file_is_readable_for_others_and_in_order(tmp_path):
    """Also of layers that share memory, or are views; the metadata are those that were given."""
    column = torch.arange(6.0).reshape(3, 2)[:, 1]
    own = {"model": "tiny", "format": "mine", "layer_type": "mine"}
    vector = SteeringVector({10: column, 2: column, 1: torch.ones(3)}, "mlp", own)
    vector.save(tmp_path / "v")
    loaded = SteeringVector.load(tmp_path / "v")
    assert list(loaded.layer_activations) == [1, 2, 10] and loaded.layer_type == "mlp"
    assert torch.equal(loaded.layer_activations[10], column)
    assert loaded.metadata.keys() == {"model", "versions"}
    assert (tmp_path / "v").stat().st_mode & 0o777 == 0o644


def test_foreign_files_are_refused(tmp_path):
    """Other safetensors, other GGUF, later formats, missing files."""
    from safetensors.torch import save_file

    path = tmp_path / "file"
    save_file({"layer.1": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="is a safetensors file, but holds no steering vector"):
        SteeringVector.load(path)
    for tensors in (
        {},
        {"other": torch.ones(3)},
        {"layer.1": torch.ones(3)},
    ):  # the last one does not say where it acts
        save_file(tensors, path, {"format": "steering_vector", "format_version": "1"})
        with pytest.raises(ValueError, match="holds no steering vector"):
            SteeringVector.load(path)
    save_file(
        {"layer.1": torch.ones(3)},
        path,
        {"format": "steering_vector", "format_version": "99", "layer_type": "mlp"},
    )
    with pytest.raises(ValueError, match="has format '99'; this version reads '1'"):
        SteeringVector.load(path)
    ours = {"format": "steering_vector", "format_version": "1", "layer_type": "mlp"}
    more = {"layer.1": torch.ones(3), "other": torch.ones(3)}
    for tensors, metadata in ((more, ours), ({"layer.1": torch.ones(3)}, ours | {"format": "x"})):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match="holds no steering vector"):
            SteeringVector.load(path)
    for name in ("output.weight", "direction.1"):
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_tensor(name, np.ones(3, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match="is a GGUF file of 'llama', and holds no control"):
            SteeringVector.load_gguf(path)
    for load in (SteeringVector.load, SteeringVector.load_gguf):
        with pytest.raises(FileNotFoundError, match="no file"):
            load(tmp_path / "nothing")


def test_gguf_has_the_form_that_llama_cpp_reads(tmp_path):
    """Architecture, hint, count, float32 `direction.N` of one dimension; back to the same one."""
    path = tmp_path / "love.gguf"
    vector = described(random_vector(layers=(1, 4)).to(torch.bfloat16))
    vector.save_gguf(path)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "gpt2"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [(t.name, t.tensor_type.name, list(t.shape)) for t in reader.tensors] == [
        ("direction.1", "F32", [D_MODEL]),
        ("direction.4", "F32", [D_MODEL]),
    ]
    loaded = SteeringVector.load_gguf(path)
    assert_same(loaded, vector.to(torch.float32))
    assert loaded.metadata == {"model_type": "gpt2"}


@pytest.mark.parametrize(
    "vector, says",
    [
        (
            SteeringVector({1: torch.ones(3)}, "mlp", {"model_type": "gpt2"}),
            "acts on 'decoder_block', this one on 'mlp'",
        ),
        (
            SteeringVector({0: torch.ones(3)}, metadata={"model_type": "gpt2"}),
            "has layers from 1 on, and this one has 0: add it to a bias",
        ),
        (SteeringVector({1: torch.ones(3)}), "set metadata"),
    ],
)
def test_gguf_refuses_what_it_cannot_say(tmp_path, vector, says):
    """Other places, layer 0, no kind of model; no file is written."""
    with pytest.raises(ValueError, match=says):
        vector.save_gguf(tmp_path / "love.gguf")
    assert not list(tmp_path.iterdir())


def test_another_model_is_warned_of(model):
    """A vector made for a model of another name warns once; of the same name or none, never."""
    other = SteeringVector({LAYER: torch.ones(D_MODEL)}, metadata={"model": "gpt2-xl"})
    with pytest.warns(UserWarning, match="made for 'gpt2-xl' and is applied to 'embedded'"):
        other.patch_activations(model).remove()
    with pytest.warns(UserWarning, match="made for 'gpt2-xl'"), other.apply(model):
        pass
    assert model_name(model) == "embedded"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SteeringVector(
            {LAYER: torch.ones(D_MODEL)}, metadata={"model": "embedded"}
        ).patch_activations(model).remove()
        random_vector().patch_activations(model).remove()


def test_a_saved_vector_steers_in_a_fresh_process(model, tokenizer, tmp_path):
    """Another process loads the file and writes the same text."""
    vector = random_vector(size=8)
    vector.save(tmp_path / "love.safetensors")
    inputs = encode(tokenizer, TEXTS[:1])
    with vector.apply(model):
        wanted = tokenizer.decode(model.generate(**inputs, max_new_tokens=10)[0])
    code = (
        "import sys\nfrom common import SteeringVector\nfrom common.loading import"
        " load_model\nmodel, tokenizer, _ = load_model('embedded', device='cpu')\nwith"
        " SteeringVector.load(sys.argv[1]).apply(model):\n   "
        " print(tokenizer.decode(model.generate(**tokenizer(sys.argv[2], return_tensors='pt'),"
        " max_new_tokens=10)[0]))"
    )
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "love.safetensors"), TEXTS[0]],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines()[-1] == wanted


def test_a_vector_is_shown_on_one_line():
    """Layers, place, width and length, whatever the numbers are."""
    vector = SteeringVector({2: torch.tensor([3.0, 4.0])}, metadata={"model": "embedded"})
    shown = (
        "SteeringVector(layers=[2], layer_type='decoder_block', d_model=2, length=5, made for"
        " 'embedded')"
    )
    assert repr(vector) == shown and vector.layers == [2]
    two = SteeringVector({-1: torch.ones(4), 0: torch.full((9,), torch.inf)}, "mlp")
    shown = "SteeringVector(layers=[-1, 0], layer_type='mlp', d_model=4 or 9, length=2 to inf)"
    assert repr(two) == shown and two.layers == [-1, 0]
    learned = SteeringVector({0: torch.ones(4, dtype=torch.bfloat16, requires_grad=True)})
    assert "length=2)" in repr(learned) and "\n" not in repr(learned)
