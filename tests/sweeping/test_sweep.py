"""Sweeps: many settings in one batch give what one run for each gives, and nothing runs twice."""

import copy
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from decimal import Decimal
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from architectures import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import pipeline

from common import (
    ActivationAddition,
    Grid,
    Sampling,
    apply_activation_additions,
    embedded,
    get_x_vector,
    perplexity_ratio_by_cell,
    read_sweep,
    sweep,
    sweep_logits,
    sweep_perplexity,
    token_logprob,
)
from common.checking.pristine import assert_pristine, snapshot
from common.loading import copy_sharing_weights
from common.passes.padding import encode
from common.sweeping.store import SweepStore
from common.texts.generation import completions, generate, logits
from common.vectors.activation_additions import read_sites
from common.vectors.steering_vector import SteeringVector

ROOT = Path(__file__).resolve().parents[2]
CONFIG = json.loads((embedded.FOLDER / "config.json").read_text(encoding="utf-8"))
D_MODEL = CONFIG["n_embd"]  # of the embedded model
PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the", "This year winter is"]
LONG = [
    "I went up to my friend and said that",
    "My mother went to the old library on Monday and said",
]
WEDDINGS = ("I talk about weddings constantly", "I do not talk about weddings constantly")
TINY = 1  # bytes: one row in a batch
NEW = 6
GREEDY = Sampling(max_new_tokens=NEW, temperature=0.0)
SAMPLING = Sampling(max_new_tokens=NEW, temperature=1.0, top_p=0.9, freq_penalty=1.0)


def a_vector(seed: int = 0, layers=range(6)) -> SteeringVector:
    """A random vector for some layers of the embedded model, about as long as the hidden states."""
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector(
        {layer: 0.5 * torch.randn(D_MODEL, generator=generator) for layer in layers}
    )


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    return a_vector()


def x_vector(tokenizer, coeff: float = 1.0, act_name=0) -> tuple[ActivationAddition, ...]:
    return get_x_vector(*WEDDINGS, coeff, act_name, tokenizer=tokenizer, pad_method="tokens_right")


def completed(model, tokenizer, prompt: str, bos: bool, context=None) -> str:
    """The greedy completion of one prompt."""
    inputs = encode(tokenizer, [prompt], bos)
    with context or nullcontext():
        return completions(tokenizer, inputs, generate(model, inputs, max_new_tokens=NEW))[0]


def by_cell(frame: pd.DataFrame, column: str) -> dict:
    """The values of a column by everything that tells rows apart."""
    keys = [
        name for name in ("steering", "layer", "coeff", "prompt", "text", "sample") if name in frame
    ]
    rows = [
        tuple(None if pd.isna(value) else value for value in row)
        for row in frame[keys].itertuples(index=False)
    ]
    assert len(set(rows)) == len(rows)
    return dict(zip(rows, frame[column], strict=True))


# --- completions ---


def test_a_sweep_of_vectors_is_one_run_for_each_setting(model, tokenizer, vector):
    """At each layer and coefficient, for each prompt, one of one token too; vectors need no BOS."""
    prompts, coeffs = [*PROMPTS, "I"], [-2.0, 1.5]
    found = by_cell(
        sweep(model, tokenizer, Grid({"v": vector}, [5, 0, 3], coeffs), prompts, sampling=GREEDY),
        "completion",
    )
    expected = {
        ("unsteered", None, 0.0, prompt, 0): completed(model, tokenizer, prompt, False)
        for prompt in prompts
    }
    for layer in (0, 3, 5):
        one = SteeringVector({layer: vector.layer_activations[layer]})
        for coeff in coeffs:
            expected |= {
                ("v", layer, coeff, prompt, 0): completed(
                    model, tokenizer, prompt, False, one.apply(model, multiplier=coeff)
                )
                for prompt in prompts
            }
    assert found == expected and len(set(found.values())) > len(prompts)


@pytest.mark.parametrize("location", ["front", "mid", "back"])
@pytest.mark.parametrize("part", ["resid_pre", "resid_post"])
def test_a_sweep_of_additions_is_one_run_for_each_setting(model, tokenizer, location, part):
    """After BOS, at layer 0 as well; the layer that the additions name does not matter."""
    found = by_cell(
        sweep(
            model,
            tokenizer,
            Grid(
                {"w": x_vector(tokenizer, 1.0, (2, part))},
                [0, 4],
                [3.0, -1.0],
                addition_location=location,
            ),
            LONG,
            sampling=GREEDY,
        ),
        "completion",
    )
    expected = {
        ("unsteered", None, 0.0, prompt, 0): completed(model, tokenizer, prompt, True)
        for prompt in LONG
    }
    for layer in (0, 4):
        for coeff in (3.0, -1.0):
            additions = x_vector(tokenizer, coeff, (layer, part))
            expected |= {
                ("w", layer, coeff, prompt, 0): completed(
                    model,
                    tokenizer,
                    prompt,
                    True,
                    apply_activation_additions(model, tokenizer, additions, location),
                )
                for prompt in LONG
            }
    assert found == expected and len(set(found.values())) > len(LONG)


@pytest.mark.parametrize("location", ["front", "mid", "back"])
def test_additions_of_different_lengths(model, tokenizer, location):
    """Without padding each one is laid where it would lie alone."""
    prompt, pair = LONG[1], [("I love the old garden", 1.0), ("Hate", -1.0), ("I hate", -0.5)]
    additions = [ActivationAddition(coeff, 3, text) for text, coeff in pair]
    strong = [ActivationAddition(2 * coeff, 3, text) for text, coeff in pair]
    frame = sweep_logits(
        model,
        tokenizer,
        Grid({"a": additions}, [3], [2.0], addition_location=location),
        [prompt],
        {"at 5": lambda steered, plain: steered[:, 5]},
    )
    with apply_activation_additions(model, tokenizer, strong, location):
        assert frame["at 5"][1] == pytest.approx(
            logits(model, encode(tokenizer, [prompt]))[0, -1, 5].item(), abs=1e-4
        )


def test_columns_and_kinds(model, tokenizer, vector):
    """One row for each completion; what was not steered is there once for each prompt."""
    frame = sweep(
        model,
        tokenizer,
        Grid(
            {"v": vector, "w": x_vector(tokenizer)},
            [1, 3],
            [0.5, -0.5, 1.0],
            controls={"c": a_vector(1)},
            random_controls=2,
        ),
        LONG,
        {
            "length": lambda texts: list(map(len, texts)),
            "both": lambda texts: pd.DataFrame({"a": [1.5] * len(texts), "b": [True] * len(texts)}),
        },
        sampling=Sampling(max_new_tokens=3, temperature=0.5),
        per_prompt=2,
    )
    assert list(frame) == [
        "steering",
        "kind",
        "layer",
        "coeff",
        "prompt",
        "sample",
        "completion",
        "length",
        "both_a",
        "both_b",
    ]
    each = 2 * 3 * len(LONG) * 2
    assert Counter(zip(frame["steering"], frame["kind"])) == {
        ("unsteered", "unsteered"): len(LONG) * 2,
        ("v", "steering"): each,
        ("w", "steering"): each,
        ("c", "control"): each,
        ("v, random 1", "random"): each,
        ("v, random 2", "random"): each,
        ("w, random 1", "random"): each,
        ("w, random 2", "random"): each,
    }
    assert (
        frame["layer"].dtype == "Int64"
        and frame["coeff"].dtype == "float64"
        and frame["layer"].isna().sum() == len(LONG) * 2
    )
    assert frame["length"].tolist() == frame["completion"].map(len).tolist()
    assert (frame["both_a"] == 1.5).all() and (frame["both_b"] == 1).all()
    assert set(frame["sample"]) == {0, 1} and set(frame["prompt"]) == set(LONG)


def test_layers_by_default(model, tokenizer):
    """Those of the vectors, all for additions; layers from a table will do."""
    own = SteeringVector({1: torch.ones(D_MODEL), -1: torch.ones(D_MODEL)})
    frame = sweep_logits(
        model, tokenizer, Grid({"v": own, "w": x_vector(tokenizer)}, None, [1.0]), LONG
    )
    layers = frame.groupby("steering")["layer"].unique().map(list).to_dict()
    assert layers["v"] == [1, 5] and layers["w"] == list(range(6))
    again = sweep_logits(
        model, tokenizer, Grid({"v": own}, frame["layer"].dropna().unique()[:1], [1.0]), LONG
    )
    assert again["layer"].dropna().tolist() == [1] * len(LONG)


@pytest.mark.parametrize("bos", [None, True, False])
def test_bos_by_default_where_there_are_additions(model, tokenizer, vector, bos):
    """In front of the unsteered prompts as well, and also where only a control is one."""
    for steering, controls, default in (
        ({"v": vector}, {}, False),
        ({"v": vector}, {"c": x_vector(tokenizer)}, True),
    ):
        grid, front = Grid(steering, [3], controls=controls), default if bos is None else bos
        frame = sweep(model, tokenizer, grid, LONG, sampling=GREEDY, prepend_bos=bos)
        expected = [completed(model, tokenizer, prompt, front) for prompt in LONG]
        assert frame[frame["kind"] == "unsteered"]["completion"].tolist() == expected
        # The same greedy text can follow with and without BOS; the logits differ.
        metrics = {"first": lambda steered, plain: plain[:, 0]}
        frame = sweep_logits(model, tokenizer, grid, LONG, metrics, prepend_bos=bos)
        expected = [
            logits(model, encode(tokenizer, [prompt], front))[0, -1, 0].item() for prompt in LONG
        ]
        assert frame["first"][:2].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_grid_by_default_and_of_an_iterator(vector):
    """Coefficient 1 at the layers of the vectors; what can be read once is kept."""
    grid = Grid({"v": vector})
    assert grid.coeffs == (1.0,) and grid.layers is None and grid.random_controls == 0
    grid = Grid({"v": vector}, iter([3, 1]), iter([2, -1]))
    assert grid.layers == (3, 1) and grid.coeffs == (2.0, -1.0)


def test_coefficient_0_is_unsteered(model, tokenizer, vector):
    """The same text for each sample, vectors and additions alike."""
    frame = sweep(
        model,
        tokenizer,
        Grid({"v": vector, "w": x_vector(tokenizer)}, [0, 3], [0.0]),
        LONG,
        sampling=SAMPLING,
        per_prompt=3,
    )
    plain = frame[frame["kind"] == "unsteered"]["completion"].tolist()
    assert len(set(plain)) > 3
    for _, part in frame[frame["kind"] == "steering"].groupby(["steering", "layer"]):
        assert part["completion"].tolist() == plain


def test_samples_do_not_depend_on_what_is_beside_them(model, tokenizer, vector):
    """Neither on batches, nor on other coefficients, layers and later prompts; but on the seed."""
    options = {"sampling": SAMPLING, "per_prompt": 3}
    frame = sweep(model, tokenizer, Grid({"v": vector}, [1, 4], [-1.0, 1.0]), PROMPTS, **options)
    pd.testing.assert_frame_equal(
        frame,
        sweep(
            model,
            tokenizer,
            Grid({"v": vector}, [1, 4], [-1.0, 1.0]),
            PROMPTS,
            max_memory=TINY,
            **options,
        ),
    )
    whole = by_cell(frame, "completion")
    part = by_cell(
        sweep(model, tokenizer, Grid({"v": vector}, [4], [0.25, 1.0]), PROMPTS[:2], **options),
        "completion",
    )
    shared = whole.keys() & part.keys()
    assert len(shared) == 2 * 2 * 3 and all(whole[key] == part[key] for key in shared)
    # Three samples of each prompt; two may be alike by chance.
    unsteered = {text for (name, *_), text in whole.items() if name == "unsteered"}
    assert len(unsteered) > 2 * len(PROMPTS)
    other = by_cell(
        sweep(
            model, tokenizer, Grid({"v": vector}, [1, 4], [-1.0, 1.0]), PROMPTS, seed=1, **options
        ),
        "completion",
    )
    assert sum(whole[key] == other[key] for key in whole) < len(whole) / 3
    twice = sweep(model, tokenizer, Grid({"v": vector}, [4], [0.0]), [PROMPTS[0]] * 2, **options)
    assert twice["completion"][:6].nunique() == 6  # a prompt that is there twice is two prompts


def seen_rows(monkeypatch) -> list:
    """What rows are steered by, as it comes by."""
    rows = []

    def note(model, steering):
        rows.extend(row for row in steering if row is not None)
        return nullcontext()

    monkeypatch.setattr("common.sweeping.runs.steering_rows", note)
    return rows


def test_random_controls_are_as_long_as_the_vector(model, tokenizer, monkeypatch):
    """At each layer and token; each has a direction of its own, the same at every call."""
    lengths = {1: 2.0, 2: 5.0}
    own = SteeringVector(
        {
            layer: length * torch.nn.functional.one_hot(torch.tensor(7), D_MODEL).float()
            for layer, length in lengths.items()
        }
    )
    calls = []
    for _ in range(2):
        calls.append(seen_rows(monkeypatch))
        sweep(
            model,
            tokenizer,
            Grid({"v": own, "w": x_vector(tokenizer)}, [1, 2], [-1.0, 2.0], random_controls=2),
            LONG[:1],
            sampling=replace(GREEDY, max_new_tokens=1),
        )
    rows, again = calls
    assert (
        len(rows) == 2 * 3 * 2 * 2
    )  # two steerings, with two random ones each, at two layers with two coefficients
    assert all(
        torch.equal(one.vectors, other.vectors) for one, other in zip(rows, again, strict=True)
    )
    for index, length in enumerate(lengths.values()):
        one, two = (rows[8 + 4 * number + 2 * index + 1].vectors[0] for number in (0, 1))
        for random in (one, two):
            assert (
                random.norm().item() == pytest.approx(2 * length, rel=1e-5)
                and abs(torch.cosine_similarity(random, own.layer_activations[1], 0)) < 0.4
            )
        assert abs(torch.cosine_similarity(one, two, 0)) < 0.4
    # Layer by layer, token by token, and from number to number they are others.
    drawn = [row.vectors[0] for number in (0, 1) for row in rows[8 + 4 * number :][:4:2]]
    drawn += list(rows[-1].vectors)
    for one, two in itertools.combinations(drawn, 2):
        assert abs(torch.cosine_similarity(one, two, 0)) < 0.5
    spans = [row for row in rows if row.location]
    assert len(spans) == 12
    for random in (spans[4:8], spans[8:]):
        for real, made in zip(spans[:4], random, strict=True):
            assert torch.allclose(made.vectors.norm(dim=-1), real.vectors.norm(dim=-1), rtol=1e-4)
            assert real.site == made.site and not torch.allclose(
                made.vectors, real.vectors, atol=0.1
            )


def test_the_model_and_the_random_state_are_as_before(model, tokenizer, vector):
    before, state = snapshot(model), torch.random.get_rng_state()
    sweep(
        model,
        tokenizer,
        Grid({"v": vector, "w": x_vector(tokenizer)}, [0, 3], [1.0], random_controls=1),
        LONG,
        sampling=replace(SAMPLING, max_new_tokens=2),
        per_prompt=3,
    )
    assert_pristine(model, before)

    def broken(texts):
        if texts != LONG:
            raise KeyError("broken")
        return [0] * len(texts)

    with pytest.raises(KeyError, match="broken"):
        sweep(model, tokenizer, Grid({"v": vector}, [3], [1.0]), LONG, {"m": broken})
    with pytest.raises(KeyError, match="broken"):
        sweep_logits(
            model,
            tokenizer,
            Grid({"v": vector}, [3], [1.0]),
            LONG,
            {"m": lambda steered, plain: broken([]) if steered.any() else [0, 0]},
        )
    assert_pristine(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the next token ---


def next_logits(model, tokenizer, prompt: str, context=None) -> torch.Tensor:
    with context or nullcontext():
        return logits(model, encode(tokenizer, [prompt], True))[0, -1]


def check_logits(
    frame: pd.DataFrame, model, tokenizer, contexts: dict, prompts: list[str], tokens
) -> None:
    """Every row beside a plain pass, steered by the context of its cell."""
    found = {token: by_cell(frame, f"token {token}") for token in tokens}
    kl = by_cell(frame, "kl")
    for prompt in prompts:
        plain = next_logits(model, tokenizer, prompt)
        for cell, context in {("unsteered", None, 0.0): nullcontext(), **contexts}.items():
            steered = next_logits(model, tokenizer, prompt, context)
            for token in tokens:
                assert found[token][*cell, prompt] == pytest.approx(steered[token].item(), abs=1e-4)
            one, other = steered.log_softmax(-1), plain.log_softmax(-1)
            assert kl[*cell, prompt] == pytest.approx(
                torch.nn.functional.kl_div(other, one, log_target=True, reduction="sum").item(),
                abs=1e-4,
            )


@pytest.mark.parametrize("memory", [2**30, 3_000_000, TINY])
def test_logits_are_those_of_plain_passes(model, tokenizer, vector, memory):
    """At every layer, for vectors and additions, however many rows fit into a batch."""
    tokens = (3, 77, 2000)
    metrics = {
        "kl": (
            lambda steered, plain: (
                steered.softmax(-1) * (steered.log_softmax(-1) - plain.log_softmax(-1))
            ).sum(-1)
        )
    }
    metrics |= {
        f"token {token}": lambda steered, plain, token=token: steered[:, token] for token in tokens
    }
    layers, prompts = (range(6), LONG) if memory > TINY else ([0, 5], LONG)
    frame = sweep_logits(
        model,
        tokenizer,
        Grid({"v": vector, "w": x_vector(tokenizer)}, layers, [-1.0, 2.0]),
        prompts,
        metrics,
        max_memory=memory,
    )
    contexts = {}
    for layer in layers:
        for coeff in (-1.0, 2.0):
            one = SteeringVector({layer: vector.layer_activations[layer]})
            contexts["v", layer, coeff] = one.apply(model, multiplier=coeff)
            contexts["w", layer, coeff] = None
    for prompt in prompts:  # a context opens once
        made = {
            (name, layer, coeff): SteeringVector({layer: vector.layer_activations[layer]}).apply(
                model, multiplier=coeff
            )
            if name == "v"
            else apply_activation_additions(model, tokenizer, x_vector(tokenizer, coeff, layer))
            for name, layer, coeff in contexts
        }
        check_logits(frame[frame["prompt"] == prompt], model, tokenizer, made, [prompt], tokens)
    assert len(frame) == (1 + len(contexts)) * len(prompts)


@pytest.mark.parametrize("name", ["GPT-NeoX", "Llama", "Mistral", "Gemma", "BLOOM", "OPT"])
def test_other_architectures(name, tokenizer):
    """Completions and logits, steered after a block and at what block 0 reads."""
    other = tiny_model(name, len(tokenizer))
    generator = torch.Generator().manual_seed(1)  # in this draw no two tokens tie
    vector = SteeringVector({layer: 2 * torch.randn(32, generator=generator) for layer in range(4)})
    steering = {"v": vector, "w": get_x_vector("Love", "Hate", 1, 0)}
    texts = by_cell(
        sweep(other, tokenizer, Grid(steering, [0, 3], [2.0]), LONG, sampling=GREEDY), "completion"
    )
    values = by_cell(
        sweep_logits(
            other,
            tokenizer,
            Grid(steering, [0, 3], [2.0]),
            LONG,
            {"at": lambda steered, plain: steered[:, 9]},
        ),
        "at",
    )
    for cell in texts:
        steered, layer, coeff, prompt, _ = cell
        contexts = {
            "unsteered": lambda: nullcontext(),
            "v": (
                lambda: SteeringVector({int(layer): vector.layer_activations[layer]}).apply(
                    other, multiplier=coeff
                )
            ),
            "w": lambda: apply_activation_additions(
                other, tokenizer, get_x_vector("Love", "Hate", coeff, int(layer))
            ),
        }
        assert texts[cell] == completed(other, tokenizer, prompt, True, contexts[steered]())
        assert values[cell[:-1]] == pytest.approx(
            next_logits(other, tokenizer, prompt, contexts[steered]())[9].item(), abs=1e-4
        )


def test_divergence_by_default_and_log_probabilities(model, tokenizer, vector):
    """Each is that of plain passes."""
    tokens = [11, 40, 900]
    frame = sweep_logits(model, tokenizer, Grid({"v": vector}, [2], [0.0, 1.0]), PROMPTS)
    assert list(frame) == ["steering", "kind", "layer", "coeff", "prompt", "kl"]
    assert (frame["kl"] >= 0).all() and (frame[frame["coeff"] == 0]["kl"] < 1e-5).all()
    for row in frame[frame["coeff"] == 1].itertuples():
        inputs = encode(tokenizer, [row.prompt], False)
        plain = logits(model, inputs)[0, -1].double().log_softmax(-1)
        with SteeringVector({2: vector.layer_activations[2]}).apply(model):
            steered = logits(model, inputs)[0, -1].double().log_softmax(-1)
        expected = (steered.exp() * (steered - plain)).sum().item()
        assert row.kl == pytest.approx(expected, rel=1e-2) and expected > 1e-3
    frame = sweep_logits(
        model, tokenizer, Grid({"v": vector}, [2], [1.0]), PROMPTS, {"p": token_logprob(tokens)}
    )
    for row in frame.itertuples():
        with SteeringVector({2: vector.layer_activations[2]}).apply(model, multiplier=row.coeff):
            probs = logits(model, encode(tokenizer, [row.prompt], False))[0, -1].softmax(-1)
        assert row.p == pytest.approx(probs[tokens].sum().log().item(), abs=1e-4)


def test_metrics_of_logits_see_float32(model, tokenizer, vector):
    """In bf16 a log-probability has three digits."""
    seen = []

    def metric(steered, unsteered):
        seen.append((steered.dtype, unsteered.dtype, steered.device, steered.shape[1:]))
        return steered[:, 0].numpy()

    sweep_logits(
        copy.deepcopy(model).to(torch.bfloat16),
        tokenizer,
        Grid({"v": vector}, [2], [1.0]),
        PROMPTS,
        {"m": metric},
    )
    assert set(seen) == {(torch.float32, torch.float32, torch.device("cpu"), (len(tokenizer),))}


@contextmanager
def counting(model, layer: int):
    """How many rows the MLP of a block has seen, pass by pass."""
    passes = []
    handle = model.transformer.h[layer].mlp.register_forward_hook(
        lambda module, args, output: passes.append(len(output))
    )
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize("run", [sweep_logits, sweep_perplexity])
def test_blocks_below_run_once_for_each_prompt(model, tokenizer, vector, run):
    """This is what makes a sweep fast. The last block sees every row that is steered before it."""
    with counting(model, 0) as first, counting(model, 5) as last:
        run(model, tokenizer, Grid({"v": vector}, range(6), [-1.0, 1.0, 2.0]), PROMPTS)
    assert first == [len(PROMPTS)]
    assert sum(last) == len(PROMPTS) * (1 + 5 * 3)
    with counting(model, 0) as first, counting(model, 5) as last:
        run(model, tokenizer, Grid({"v": vector}, range(6), [-1.0, 1.0]), PROMPTS, max_memory=TINY)
    assert first == [1] * len(PROMPTS) and last == [1] * len(PROMPTS) * (
        1 + 5 * 2
    )  # no batch is larger than it may be


def test_what_block_0_reads_is_steered_there(model, tokenizer):
    """Additions at layer 0 run through all blocks, those at layer 1 start after block 0."""
    additions = [ActivationAddition(1.0, 0, "Love")]
    for layers, rows in (([0], 1 + 3), ([1], 1), ([0, 1], 1 + 3)):
        with counting(model, 0) as first:
            sweep_logits(
                model, tokenizer, Grid({"a": additions}, layers, [1.0, 2.0, 3.0]), LONG[:1]
            )
        # Reading the addition itself at layer 1 is one pass more.
        assert sum(first) == rows + (1 in layers)


def test_generation_computes_prompts_once(model, tokenizer, vector):
    """Block 0 sees each prompt once, and then only new tokens, one row for each completion."""
    with counting(model, 0) as first:
        sweep(
            model,
            tokenizer,
            Grid({"v": vector}, [3, 4], [1.0, 2.0, 3.0]),
            LONG[:1],
            sampling=replace(GREEDY, max_new_tokens=4),
            prepend_bos=True,
        )
    assert first == [1] + [7] * 4


# --- perplexity ---


TEXTS = [
    "The old library is on the hill.",
    "My neighbour is in the garden.",
    "It was a long winter, and the captain sailed home.",
]


@pytest.mark.parametrize("mask_len", [0, 1, 4])
@pytest.mark.parametrize("memory", [2**30, TINY])
def test_losses_are_those_of_a_plain_pass(model, tokenizer, vector, mask_len, memory):
    """Mean loss with labels, after BOS, in a padded batch; the first predictions can be masked."""
    frame = sweep_perplexity(
        model,
        tokenizer,
        Grid({"v": vector, "w": x_vector(tokenizer)}, [0, 5], [2.0], controls={"c": a_vector(1)}),
        TEXTS,
        mask_len=mask_len,
        max_memory=memory,
    )
    assert list(frame) == [
        "steering",
        "kind",
        "layer",
        "coeff",
        "text",
        "loss",
        "unsteered_loss",
        "tokens",
    ] and len(frame) == 7 * len(TEXTS)
    for row in frame.itertuples():
        ids = encode(tokenizer, [row.text])["input_ids"]
        labels = ids.clone()
        labels[:, : mask_len + 1] = -100
        if row.steering == "unsteered":
            context = nullcontext()
        elif row.steering == "w":
            context = apply_activation_additions(
                model, tokenizer, x_vector(tokenizer, 2.0, int(row.layer))
            )
        else:
            one = {"v": vector, "c": a_vector(1)}[row.steering]
            context = SteeringVector({int(row.layer): one.layer_activations[row.layer]}).apply(
                model, multiplier=2.0
            )
        with torch.no_grad():
            plain = model(ids, labels=labels).loss.item()
            with context:
                steered = model(ids, labels=labels).loss.item()
        assert row.loss == pytest.approx(steered, abs=1e-4) and row.unsteered_loss == pytest.approx(
            plain, abs=1e-4
        )
        assert row.tokens == ids.shape[1] - 1 - mask_len and (row.loss != row.unsteered_loss) == (
            row.steering != "unsteered"
        )


def test_perplexity_ratios_are_over_all_tokens_of_all_texts(model, tokenizer, vector):
    frame = sweep_perplexity(model, tokenizer, Grid({"v": vector}, [2], [1.0, -1.0]), TEXTS)
    ratios = perplexity_ratio_by_cell(frame).set_index("coeff")["ratio"]

    def total(context) -> tuple[float, int]:
        losses, count = 0.0, 0
        for text in TEXTS:
            ids = encode(tokenizer, [text])["input_ids"]
            with torch.no_grad(), context():
                losses += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        return losses / count

    for coeff in (1.0, -1.0):
        more = total(
            lambda: SteeringVector({2: vector.layer_activations[2]}).apply(model, multiplier=coeff)
        ) - total(nullcontext)
        assert ratios[coeff] == pytest.approx(torch.tensor(more).exp().item(), rel=1e-4)


# --- stopped, and gone on with ---


def words(texts) -> list[int]:
    return [len(text.split()) for text in texts]


def small_grid(steering) -> Grid:
    return Grid(steering, [1, 4], [-1.0, 1.0], random_controls=1)


def complete_all(model, tokenizer, steering, **options) -> pd.DataFrame:
    given = {"metrics": {"words": words}, "sampling": replace(SAMPLING, max_new_tokens=3)}
    options = {**given, "per_prompt": 3, **options}
    return sweep(model, tokenizer, small_grid(steering), PROMPTS, **options)


RUNS = {
    "completions": complete_all,
    "logits": lambda model, tokenizer, steering, **options: sweep_logits(
        model, tokenizer, small_grid(steering), PROMPTS, **options
    ),
    "perplexity": lambda model, tokenizer, steering, **options: sweep_perplexity(
        model, tokenizer, small_grid(steering), TEXTS, **options
    ),
}


class Stopped(Exception):
    """What ends a sweep in a test."""


@contextmanager
def stopping(monkeypatch, after: int):
    """Let a sweep write so many batches; returns the row numbers of all that it wanted to write."""
    written, add = [], SweepStore.add

    def note(store, rows):
        rows = list(rows)
        if len(written) == after:
            raise Stopped
        written.append([number for number, _ in rows])
        add(store, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SweepStore, "add", note)
        yield written


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_sweep_that_was_stopped_goes_on(
    model, tokenizer, vector, monkeypatch, tmp_path, kind, after
):
    """The same table as in one go; no row is computed twice, and a finished file is only read."""
    path, before = tmp_path / "50% done #1?.sweep", snapshot(model)
    options = {"path": path, "max_memory": 1_000_000}
    expected = RUNS[kind](model, tokenizer, {"v": vector})
    with stopping(monkeypatch, after) as first, pytest.raises(Stopped):
        RUNS[kind](model, tokenizer, {"v": vector}, **options)
    assert_pristine(model, before)
    part = read_sweep(path)
    assert (
        list(part) == list(expected)
        and part.dtypes["layer"] == "Int64"
        and len(part) == sum(map(len, first)) < len(expected)
    )
    with stopping(monkeypatch, 10**6) as second:
        found = RUNS[kind](model, tokenizer, {"v": vector}, **options)
    assert sorted(number for batch in first + second for number in batch) == list(
        range(len(expected))
    )
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3, atol=1e-5)
    assert (
        len(part) == 0
        or by_cell(part, part.columns[-1]).items() <= by_cell(found, found.columns[-1]).items()
    )

    content = path.read_bytes()
    with passes(model) as count:
        pd.testing.assert_frame_equal(RUNS[kind](model, tokenizer, {"v": vector}, **options), found)
    pd.testing.assert_frame_equal(read_sweep(path), found)
    assert not count and path.read_bytes() == content


@contextmanager
def passes(model):
    """Count what comes out of the model, pass by pass; reading an addition ends before that."""
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda module, args, output: seen.append(len(output))
    )
    try:
        yield seen
    finally:
        handle.remove()


@given(
    stops=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    memory=st.sampled_from([TINY, 1_000_000, 3_000_000, 2**30]),
)
def test_however_often_it_was_stopped(model, tokenizer, tmp_path_factory, stops, memory):
    """A metric that throws costs no row: each is completed once, and measured in the end."""
    path, prompts = tmp_path_factory.mktemp("stops") / "a.sweep", PROMPTS[:2]
    seen = []

    def failing_after(limit):
        calls = itertools.count()

        def metric(texts):
            if list(texts) == prompts:  # it is tried on the prompts
                return [0] * len(texts)
            if next(calls) == limit:
                raise Stopped
            return words(texts)

        return metric

    for limit in (*stops, None):
        with stopping(pytest.MonkeyPatch(), 10**6) as written, suppress(Stopped):
            found = sweep(
                model,
                tokenizer,
                Grid({"v": a_vector()}, [2], [1.0, 2.0]),
                prompts,
                {"m": failing_after(limit)},
                sampling=replace(GREEDY, max_new_tokens=2),
                path=path,
                max_memory=memory,
            )
        seen += [number for batch in written for number in batch]
    assert sorted(seen) == list(range(6)) and found["m"].tolist() == words(found["completion"])
    pd.testing.assert_frame_equal(found, read_sweep(path))


KILLED = """
import os, signal, sys
sys.path[:0] = ["tests", "tests/sweeping"]
from test_sweep import PROMPTS, RUNS, a_vector, words
from common.loading import load_model

calls = 0

def metric(texts):
    global calls
    calls += 1
    if calls == 4:  # the first call tries it on the prompts
        os.kill(os.getpid(), signal.SIGKILL)
    return words(texts)

model, tokenizer, _ = load_model("embedded", device="cpu")
options = {"metrics": {"words": metric}, "path": sys.argv[1], "max_memory": 3_000_000}
RUNS["completions"](model, tokenizer, {"v": a_vector()}, **options)
"""


def test_a_sweep_that_was_killed_goes_on(model, tokenizer, vector, monkeypatch, tmp_path):
    path = tmp_path / "a.sweep"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    part, expected = read_sweep(path), RUNS["completions"](model, tokenizer, {"v": vector})
    with stopping(monkeypatch, 10**6) as written:
        found = RUNS["completions"](
            model, tokenizer, {"v": vector}, path=path, max_memory=3_000_000
        )
    pd.testing.assert_frame_equal(found, expected)
    assert 0 < len(part) < len(expected) and sum(map(len, written)) == len(expected) - len(part)


def changed(model):
    """A copy of a model with one weight changed a little, the last of many."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.h[3].mlp.c_fc.weight[-1, -1] += 1e-3
    return other


def ending_at(model, token: int):
    """A model whose texts end at another token."""
    other = copy_sharing_weights(model)
    other.generation_config = copy.deepcopy(model.generation_config)
    other.generation_config.eos_token_id = token
    return other


def relabelled(tokenizer):
    """A tokenizer that reads as another one, and writes one token differently."""

    class Relabelled(type(tokenizer)):
        def batch_decode(self, rows, **options):
            return [text.replace("z", "Z") for text in super().batch_decode(rows, **options)]

    other = copy.deepcopy(tokenizer)
    other.__class__ = Relabelled
    return other


@pytest.mark.parametrize(
    "what, says",
    [
        ("coeffs", "layers and coeffs"),
        ("layers", "layers and coeffs, steering"),
        ("prompts", "prompts"),
        ("seed", "seed"),
        ("weights", "weights"),
        ("dtype", "weights"),
        ("vector", "steering"),
        ("name", "layers and coeffs, steering"),
        ("controls", "layers and coeffs, steering"),
        ("kind", "steering"),
        ("ends", "ends"),
        ("tokens", "tokens"),
        ("per_prompt", "per_prompt"),
        ("temperature", "temperature"),
        ("prepend_bos", "prompts"),
        ("max_new_tokens", "max_new_tokens"),
    ],
)
def test_a_file_of_other_settings_is_left_alone(model, tokenizer, vector, tmp_path, what, says):
    """The error says what differs; the file stays as it is, and the model does not run."""
    path, w = tmp_path / "a.sweep", a_vector(1)
    shifted = {layer: values + 1e-6 for layer, values in w.layer_activations.items()}
    grid = Grid({"v": vector, "w": w}, [1, 4], [1.0, 2.0])
    sampling = Sampling(max_new_tokens=2, temperature=1.0)
    given = {
        "model": model,
        "tokenizer": tokenizer,
        "grid": grid,
        "prompts": PROMPTS[:2],
        "metrics": {"words": words},
        "sampling": sampling,
        "per_prompt": 2,
    }
    sweep(path=path, **given)
    other = {
        "coeffs": lambda: {"grid": replace(grid, coeffs=[1.0, 2.5])},
        "layers": lambda: {"grid": replace(grid, layers=[1, 5])},
        "vector": lambda: {
            "grid": replace(grid, steering={"v": vector, "w": SteeringVector(shifted)})
        },
        "name": lambda: {"grid": replace(grid, steering={"v": vector, "x": w})},
        "controls": lambda: {"grid": replace(grid, controls={"c": w})},
        "kind": lambda: {"grid": replace(grid, steering={"v": vector}, controls={"w": w})},
        "prompts": lambda: {"prompts": PROMPTS[1:3]},
        "prepend_bos": lambda: {"prepend_bos": True},
        "weights": lambda: {"model": changed(model)},
        "dtype": lambda: {"model": copy.deepcopy(model).to(torch.float64)},
        "ends": lambda: {"model": ending_at(model, 3)},
        "tokens": lambda: {"tokenizer": relabelled(tokenizer)},
        "seed": lambda: {"seed": 1},
        "per_prompt": lambda: {"per_prompt": 3},
        "temperature": lambda: {"sampling": replace(sampling, temperature=0.5)},
        "max_new_tokens": lambda: {"sampling": replace(sampling, max_new_tokens=3)},
    }[what]()
    content, settings = path.read_bytes(), {**given, **other}
    with (
        passes(settings["model"]) as count,
        pytest.raises(ValueError, match=rf"other settings \({says}\)"),
    ):
        sweep(path=path, **settings)
    assert not count and path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


# --- metrics ---


def test_ends_in_another_form_are_the_same(model, tokenizer, vector, tmp_path):
    """An id or a list of ids, in any order."""
    given = {
        "grid": Grid({"v": vector}, [1]),
        "prompts": PROMPTS[:1],
        "sampling": replace(GREEDY, max_new_tokens=1),
    }
    for number, (one, other) in enumerate(((3, [3]), ([0, 3], [3, 0, 3]))):
        path = tmp_path / f"{number}.sweep"
        sweep(ending_at(model, one), tokenizer, path=path, **given)
        with passes(model) as count:
            sweep(ending_at(model, other), tokenizer, path=path, **given)
        assert not count
        with pytest.raises(ValueError, match=r"other settings \(ends\)"):
            sweep(ending_at(model, [3, 4]), tokenizer, path=path, **given)


def test_a_metric_with_other_columns_than_at_its_trial_is_refused(model, tokenizer, vector):
    """By their names, whether they are as many or not."""
    for columns in (["b"], ["a", "b"], []):

        def metric(texts):
            return pd.DataFrame(
                {name: [1] * len(texts) for name in (["a"] if texts == PROMPTS[:1] else columns)},
                index=range(len(texts)),
            )

        with pytest.raises(
            ValueError,
            match="returned the columns .* when they were tried on the prompts: expected the same",
        ):
            sweep(
                model,
                tokenizer,
                Grid({"v": vector}, [1], [1.0]),
                PROMPTS[:1],
                {"m": metric},
                sampling=replace(GREEDY, max_new_tokens=1),
            )


FEW = [
    "I think",
    "My neighbour",
]  # as long as each other: their rows come in the order of the table


def few(model, tokenizer, vector, metrics, **options) -> pd.DataFrame:
    return sweep(
        model,
        tokenizer,
        Grid({"v": vector}, [2], [1.0]),
        FEW,
        metrics,
        sampling=replace(GREEDY, max_new_tokens=2),
        **options,
    )


@pytest.mark.parametrize("stopped", [False, True])
def test_metrics_are_those_of_the_last_call(
    model, tokenizer, vector, monkeypatch, tmp_path, stopped
):
    """Changed, renamed or gone: they are taken of the texts in the file, which are written once."""
    path, options = tmp_path / "a.sweep", {"path": tmp_path / "a.sweep", "max_memory": TINY}
    with (
        stopping(monkeypatch, 2 if stopped else 10**6) as first,
        pytest.raises(Stopped) if stopped else nullcontext(),
    ):
        few(model, tokenizer, vector, {"m": words}, **options)
    expected = few(model, tokenizer, vector, {})
    with stopping(monkeypatch, 10**6) as written:
        for metrics in (
            {"m": lambda texts: [-len(text) for text in texts]},
            {"n": words, "m": words},
            {},
        ):
            found = few(model, tokenizer, vector, metrics, **options)
            wanted = expected.assign(
                **{name: metric(expected["completion"]) for name, metric in metrics.items()}
            )
            pd.testing.assert_frame_equal(found, wanted)
            pd.testing.assert_frame_equal(read_sweep(path), wanted)
    assert sorted(number for batch in first + written for number in batch) == list(range(4))


def test_a_metric_of_a_sweep_may_take_prompts(model, tokenizer, vector, tmp_path):
    """Each completion comes with its own prompt, now and from a file; pipelines are metrics too."""

    def judge(prompts, completions):
        return [f"{prompt} | {text}" for prompt, text in zip(prompts, completions, strict=True)]

    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    more = partial(writer, max_new_tokens=1, do_sample=False, return_full_text=False)
    options = {"path": tmp_path / "a.sweep", "max_memory": TINY}
    few(model, tokenizer, vector, {}, **options)
    for _ in range(2):
        found = few(model, tokenizer, vector, {"judge": judge, "more": more}, **options)
        both = zip(found["prompt"], found["completion"])
        assert found["judge"].tolist() == [f"{prompt} | {text}" for prompt, text in both]
        assert found["prompt"].nunique() == 2 and found["more_generated_text"].str.len().all()
        options = {"max_memory": TINY}


ODD = {
    "truth values": [True, False, True, False],
    "NaN": [float("nan"), 1.5, 2.5, 1.0],
    "nothing but NaN": [float("nan")] * 4,
    "gaps": [None, 1, 2, 3],
    "no value": [None] * 4,
    "infinity": [float("inf"), -float("inf"), 0.0, 1.0],
    "large numbers": [2**63, -(2**70), 0, 10**30],
    "2**63 - 1": [2**63 - 1, 0, 1, 2],
    "texts": ["a", "", "\0ü", None],
    "texts and numbers": ["a", 1, 0.5, True],
}


@pytest.mark.parametrize("kind", ODD)
def test_values_of_metrics_are_the_same_from_memory_and_from_a_file(
    model, tokenizer, vector, tmp_path, kind
):
    """Whatever they are, and each of its kind; the trial on the prompts cannot see them coming."""
    values = iter(ODD[kind])

    def metric(texts):
        return [0] * len(texts) if list(texts) == FEW else [next(values) for _ in texts]

    memory = few(model, tokenizer, vector, {"m": metric}, max_memory=TINY)
    values = iter(ODD[kind])
    stored = few(
        model, tokenizer, vector, {"m": metric}, max_memory=TINY, path=tmp_path / "a.sweep"
    )
    pd.testing.assert_frame_equal(memory, stored)
    pd.testing.assert_frame_equal(memory, read_sweep(tmp_path / "a.sweep"))
    pd.testing.assert_series_equal(memory["m"], pd.Series(ODD[kind], name="m"))


MIDWAY = {
    "no number": (
        lambda texts: [object() for _ in texts],
        "'m' of a text: expected a number or a text",
    ),
    "a decimal": (
        lambda texts: [Decimal(1) for _ in texts],
        "'m' of a text: expected a number or a text, got Decimal",
    ),
    "no text": (lambda texts: ["\ud800" for _ in texts], "'m' of a text: "),
    "too few": (lambda texts: [], "'m' returned 0 values"),
    "other columns": (
        lambda texts: pd.DataFrame({"x": [1] * len(texts)}),
        r"columns \['m_x'\], and \['m'\] when",
    ),
}


@pytest.mark.parametrize("kind", MIDWAY)
def test_what_a_metric_does_after_its_trial_costs_no_completion(
    model, tokenizer, vector, monkeypatch, tmp_path, kind
):
    """A sentence; mended, the metric is taken of the texts that are there."""
    broken, says = MIDWAY[kind]
    path = tmp_path / "a.sweep"
    with stopping(monkeypatch, 10**6) as written:
        with pytest.raises(ValueError, match=says):
            few(
                model,
                tokenizer,
                vector,
                {"m": lambda texts: words(texts) if list(texts) == FEW else broken(texts)},
                path=path,
                max_memory=TINY,
            )
        assert len(read_sweep(path)) == 1
        found = few(model, tokenizer, vector, {"m": words}, path=path, max_memory=TINY)
    assert [number for batch in written for number in batch] == list(range(4))
    pd.testing.assert_frame_equal(found, few(model, tokenizer, vector, {"m": words}))


@pytest.mark.parametrize("given", ["a", None, [[1], [2, 3]], Decimal, [10**400, 1]])
def test_metrics_of_logits_that_give_no_numbers(model, tokenizer, vector, given):
    """A sentence with the metric's name, before the model runs."""
    with passes(model) as count, pytest.raises(ValueError, match="'m' returned"):
        sweep_logits(
            model,
            tokenizer,
            Grid({"v": vector}, [2], [1.0]),
            PROMPTS,
            {"m": lambda steered, plain: given},
        )
    assert not count


def test_a_changed_metric_of_logits_needs_another_file(model, tokenizer, vector, tmp_path):
    """Logits are not kept: the file holds what the old one gave. An equal one may go on."""
    path, scale = tmp_path / "a.sweep", torch.ones(1)

    def metric_with(factor, scale):
        return lambda steered, plain: factor * scale * steered[:, 3]

    found = RUNS["logits"](
        model, tokenizer, {"v": vector}, path=path, metrics={"m": metric_with(1, scale)}
    )
    content = path.read_bytes()
    again = RUNS["logits"](
        model, tokenizer, {"v": vector}, path=path, metrics={"m": metric_with(1, scale.clone())}
    )
    pd.testing.assert_frame_equal(found, again)
    for other in (
        metric_with(2, scale),
        metric_with(1, scale + 1),
        lambda steered, plain: steered[:, 3],
    ):
        with passes(model) as count, pytest.raises(ValueError, match=r"other settings \(metrics\)"):
            RUNS["logits"](model, tokenizer, {"v": vector}, path=path, metrics={"m": other})
    assert not count and path.read_bytes() == content


def test_a_metric_without_content_needs_no_file(model, tokenizer, vector, tmp_path):
    """It is refused by name where a file could hold an older one; in memory any will do."""
    numbers = iter(range(10**6))
    metrics = {
        "counted": lambda steered, plain: [next(numbers) for _ in steered],
        "m": lambda steered, plain, numbers=(n for n in [0]): steered[:, 0],
    }
    RUNS["logits"](model, tokenizer, {"v": vector}, metrics=metrics)
    with (
        passes(model) as count,
        pytest.raises(ValueError, match="the metric 'm' reaches <generator"),
    ):
        RUNS["logits"](model, tokenizer, {"v": vector}, metrics=metrics, path=tmp_path / "a.sweep")
    assert not count and not list(tmp_path.iterdir())


def test_what_is_in_memory_needs_no_identity(model, tokenizer, vector, monkeypatch, tmp_path):
    """The weights are read where there is a file to compare with, and only there."""

    def read(model):
        raise Stopped

    monkeypatch.setattr("common.sweeping.sweep.identity_of_model", read)
    for run in RUNS.values():
        run(model, tokenizer, {"v": vector})
        with pytest.raises(Stopped):
            run(model, tokenizer, {"v": vector}, path=tmp_path / "a.sweep")


def test_a_sweep_is_free_of_the_settings_of_a_checkpoint(model, tokenizer, vector, tmp_path):
    """They change no text, and the file is the same sweep with them and without."""
    other = copy_sharing_weights(model)
    other.generation_config = copy.deepcopy(model.generation_config)
    other.generation_config.update(
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        num_beams=3,
        suppress_tokens=list(range(3, 900)),
        cache_implementation="static",
    )
    expected = RUNS["completions"](model, tokenizer, {"v": vector})
    pd.testing.assert_frame_equal(
        RUNS["completions"](other, tokenizer, {"v": vector}, path=tmp_path / "a.sweep"), expected
    )
    with passes(model) as count:
        RUNS["completions"](model, tokenizer, {"v": vector}, path=tmp_path / "a.sweep")
    assert not count


def test_a_sweep_of_additions_goes_on(model, tokenizer, monkeypatch, tmp_path):
    """Also where activations differ in the last bits; but not with other additions."""
    path, grid = (tmp_path / "a.sweep", Grid({"w": x_vector(tokenizer)}, [2], random_controls=1))
    sweep_logits(model, tokenizer, grid, LONG, path=path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "common.sweeping.grid.read_sites",
            lambda *given: {key: hidden * (1 + 1e-6) for key, hidden in read_sites(*given).items()},
        )
        sweep_logits(model, tokenizer, grid, LONG, path=path)
    first, second = x_vector(tokenizer)
    for other, more in (
        ([first], {}),
        ([first, ActivationAddition(-0.9, 0, tokens=second.tokens)], {}),
        (x_vector(tokenizer, act_name=(0, "resid_post")), {}),
        (x_vector(tokenizer), {"addition_location": "back"}),
        ([first, ActivationAddition(-1, 0, tokens=second.tokens.flip(0))], {}),
    ):
        changed = replace(grid, steering={"w": other}, **more)
        with pytest.raises(ValueError, match=r"other settings \(steering\)"):
            sweep_logits(model, tokenizer, changed, LONG, path=path)


def test_each_kind_of_sweep_has_its_own_file(model, tokenizer, vector, tmp_path):
    path = tmp_path / "a.sweep"
    RUNS["logits"](model, tokenizer, {"v": vector}, path=path)
    for kind in ("completions", "perplexity"):
        with pytest.raises(ValueError, match="what"):
            RUNS[kind](model, tokenizer, {"v": vector}, path=path)
    with pytest.raises(ValueError, match=r"\(columns, metrics\)"):
        RUNS["logits"](
            model, tokenizer, {"v": vector}, path=path, metrics={"p": token_logprob([3])}
        )
    path = tmp_path / "another.sweep"
    RUNS["perplexity"](model, tokenizer, {"v": vector}, path=path)
    with pytest.raises(ValueError, match="mask_len"):
        RUNS["perplexity"](model, tokenizer, {"v": vector}, path=path, mask_len=2)


@pytest.mark.parametrize("content", [b"", b"prompt,completion\n", None])
def test_a_file_that_is_no_sweep_is_left_alone(model, tokenizer, vector, tmp_path, content):
    path = tmp_path / "notes.txt"
    if content is None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE notes (note TEXT)")
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    for kind in RUNS:
        with passes(model) as count, pytest.raises(ValueError, match="not the file of a sweep"):
            RUNS[kind](model, tokenizer, {"v": vector}, path=path)
    assert not count and path.read_bytes() == before


def test_two_sweeps_on_one_file(model, tokenizer, vector, tmp_path):
    """The second is told so, before it runs the model, and does no harm to the first."""
    path, refused = tmp_path / "a.sweep", []

    def metric(texts):
        if list(texts) != PROMPTS and not refused:
            with pytest.raises(ValueError, match="another sweep is running"):
                RUNS["completions"](model, tokenizer, {"v": vector}, path=path)
            refused.append(True)
        return words(texts)

    found = RUNS["completions"](
        model, tokenizer, {"v": vector}, metrics={"words": metric}, path=path
    )
    assert refused
    pd.testing.assert_frame_equal(found, read_sweep(path))


# --- what is refused ---


WRONG_GRID = {
    "no steering": ({"steering": {}}, "expected steering by name"),
    "steering without a name": ({"steering": a_vector()}, "expected steering by name"),
    "controls without a name": ({"controls": a_vector(1)}, "expected controls by name"),
    "no coefficient": ({"coeffs": []}, "different finite coefficients"),
    "a coefficient twice": ({"coeffs": [1, 2, 1.0]}, "different finite coefficients"),
    "nan": ({"coeffs": [1.0, float("nan")]}, "finite number as coefficient"),
    "infinity": ({"coeffs": [float("inf")]}, "finite number as coefficient"),
    "random controls below 0": ({"random_controls": -1}, "integer of 0 or more as random_controls"),
    "half a random control": ({"random_controls": 0.5}, "integer of 0 or more as random_controls"),
    "unknown location": ({"addition_location": "middle"}, "front, mid, back"),
}
WRONG = {
    "no vector": (
        {"steering": {"v": torch.ones(D_MODEL)}},
        "expected a SteeringVector or ActivationAdditions for 'v'",
    ),
    "a text": (
        {"steering": {"v": "Love"}},
        "expected a SteeringVector or ActivationAdditions for 'v'",
    ),
    "no additions": (
        {"steering": {"v": []}},
        "expected a SteeringVector or ActivationAdditions for 'v'",
    ),
    "unknown layer": ({"layers": [3, 6]}, "layers from 0 to 5"),
    "negative layer": ({"layers": [-1]}, "layers from 0 to 5"),
    "no layer": ({"layers": []}, "layers from 0 to 5"),
    "a truth value as layer": ({"layers": [True]}, "layers from 0 to 5"),
    "a layer twice": ({"layers": [3, 1, 3]}, "layer 3 is given twice"),
    "vector without the layer": (
        {"steering": {"v": a_vector(0, [1, 2])}},
        "'v' has no vector for layer 3",
    ),
    "control without the layer": (
        {"controls": {"c": a_vector(0, [1, 2])}},
        "'c' has no vector for layer 3",
    ),
    "vector of a larger model": (
        {"steering": {"v": a_vector(0, [3, 9])}},
        "'v'.*layer 9 does not exist",
    ),
    "vector with a layer twice": (
        {"steering": {"v": a_vector(0, [3, -3])}},
        "'v'.*layer 3 is given twice",
    ),
    "vector of another width": (
        {
            "steering": {"v": SteeringVector({1: torch.ones(D_MODEL), 3: torch.ones(64)})},
            "layers": [1, 3],
        },
        f"'v' has 64 numbers at layer 3, and d_model is {D_MODEL}",
    ),
    "vector with nan": (
        {"steering": {"v": SteeringVector({3: torch.full((D_MODEL,), torch.nan)})}},
        "nan or inf in 'v' at layer 3",
    ),
    "a large coefficient below 0": (
        {
            "steering": {"v": SteeringVector({3: torch.full((D_MODEL,), 10.0)})},
            "coeffs": [1, -1e38],
        },
        "'v' at layer 3 holds 1e.39",
    ),
    "additions elsewhere": (
        {"steering": {"v": [ActivationAddition(1, (3, "mlp"), "Love")]}},
        "at resid_pre, or at resid_post, got mlp",
    ),
    "additions at two places": (
        {
            "steering": {
                "v": [
                    ActivationAddition(1, 3, "Love"),
                    ActivationAddition(1, (3, "resid_post"), "Hate"),
                ]
            }
        },
        "got resid_post, resid_pre",
    ),
    "addition of an unknown token": (
        {"steering": {"v": [ActivationAddition(1, 3, tokens=[10**6])]}},
        "token 1000000 does not exist",
    ),
    "prompt shorter than the addition": (
        {"steering": {"v": [ActivationAddition(1, 3, "I love the old garden behind the mill")]}},
        "only 3",
    ),
    "prompt shorter than a control": (
        {"controls": {"c": [ActivationAddition(1, 3, "I love the old garden behind the mill")]}},
        "only 3",
    ),
    "no prompts": ({"prompts": []}, "list of prompts"),
    "one text as prompts": ({"prompts": "I think"}, "list of prompts"),
    "empty prompt": ({"prompts": ["I", ""]}, "empty"),
    "prompt longer than the model": ({"prompts": ["I think " * 200]}, "256 positions"),
    "same name": ({"controls": {"v": a_vector(1)}}, "'v' is the name of two"),
    "name of a random control": (
        {"controls": {"v, random 1": a_vector(1)}, "random_controls": 1},
        "'v, random 1' is the name of two",
    ),
    "no memory": ({"max_memory": 0}, "integer of 1 or more as max_memory"),
}
WRONG_COMPLETIONS = {
    "metric of the wrong length": (
        {"metrics": {"m": lambda texts: [0]}},
        "'m' returned 1 values for 2 texts",
    ),
    "metric of one number": ({"metrics": {"m": lambda texts: 0.5}}, "'m' returned 0.5 for 2 texts"),
    "metric of arrays": (
        {"metrics": {"m": lambda texts: [torch.ones(3).numpy() for _ in texts]}},
        "'m'.*a number or a text",
    ),
    "two metrics of one name": ({"metrics": {"Tone": words, "tone": words}}, "twice"),
    "metric with the name of a column": ({"metrics": {"layer": words}}, "twice"),
    "no completions": ({"per_prompt": 0}, "integer of 1 or more as per_prompt"),
    "True completions": ({"per_prompt": True}, "integer of 1 or more as per_prompt"),
    "several greedy completions": ({"per_prompt": 2}, "temperature"),
    "more tokens than the model has positions": (
        {"sampling": Sampling(max_new_tokens=255)},
        "256 positions",
    ),
    "negative seed": ({"seed": -1}, "seed"),
    "half a seed": ({"seed": 0.5}, "seed"),
}
WRONG_LOGITS = {
    "metric of the wrong length": (
        {"metrics": {"m": lambda steered, plain: [0.0]}},
        r"'m' returned values of shape \(1,\) for 2 rows",
    ),
    "metric of one number": (
        {"metrics": {"m": lambda steered, plain: steered.sum()}},
        r"'m' returned values of shape \(\) for 2 rows",
    ),
    "metric of a table": (
        {"metrics": {"m": lambda steered, plain: steered}},
        rf"'m' returned values of shape \(2, {CONFIG['vocab_size']}\) for 2 rows",
    ),
    "metric with the name of a column": (
        {"metrics": {"prompt": lambda steered, plain: steered[:, 0]}},
        "twice",
    ),
}
WRONG_PERPLEXITY = {
    "text that is masked": ({"mask_len": 4, "prompts": [LONG[0], "I"]}, "'I' .* only 2"),
    "a text of BOS": ({"prompts": [LONG[0], ""]}, "'' .* only 1"),
    "negative mask": ({"mask_len": -1}, "mask_len"),
}
CASES = [
    *(
        (run, name)
        for run in ("sweep", "sweep_logits", "sweep_perplexity")
        for name in WRONG
        if (run, name) != ("sweep_perplexity", "empty prompt")
    ),
    *(("sweep", name) for name in WRONG_COMPLETIONS),
    *(("sweep_logits", name) for name in WRONG_LOGITS),
    *(("sweep_perplexity", name) for name in WRONG_PERPLEXITY),
]


@pytest.mark.parametrize("name", WRONG_GRID)
def test_what_is_not_a_grid_is_refused_when_it_is_made(vector, name):
    given, says = WRONG_GRID[name]
    with pytest.raises(ValueError, match=says):
        Grid(**{"steering": {"v": vector}, **given})


@pytest.mark.parametrize("run, name", CASES)
def test_what_cannot_be_swept_is_refused_before_the_model_runs(
    model, tokenizer, vector, tmp_path, run, name
):
    """With a sentence that says what is wrong, and without a file."""
    own = {
        "sweep": WRONG_COMPLETIONS,
        "sweep_logits": WRONG_LOGITS,
        "sweep_perplexity": WRONG_PERPLEXITY,
    }[run]
    given, says = own[name] if name in own else WRONG[name]
    call = {"sweep": sweep, "sweep_logits": sweep_logits, "sweep_perplexity": sweep_perplexity}[run]
    swept = {"steering": {"v": vector}, "layers": [3], "coeffs": [1.0]}
    swept |= {name: given[name] for name in given.keys() & {field.name for field in fields(Grid)}}
    prompts = given.get("prompts", ["I think that", "My neighbour"])
    options = {name: value for name, value in given.items() if name not in {*swept, "prompts"}}
    with passes(model) as count, pytest.raises(ValueError, match=says):
        call(model, tokenizer, Grid(**swept), prompts, path=tmp_path / "a.sweep", **options)
    assert not count and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", RUNS)
def test_a_steered_model_is_refused(model, tokenizer, vector, kind):
    """What is unsteered in the table has to be unsteered, and a hook on a block would act twice."""
    with vector.apply(model), pytest.raises(ValueError, match="hook"):
        RUNS[kind](model, tokenizer, {"v": vector})
    other = copy_sharing_weights(model)
    block = other.transformer.h[2]
    for register in (block.register_forward_hook, block.register_forward_pre_hook):
        handle = register(lambda *given: None)
        with pytest.raises(ValueError, match="block 2 has a hook"):
            RUNS[kind](other, tokenizer, {"v": vector})
        handle.remove()
    RUNS[kind](other, tokenizer, {"v": vector})


def test_a_product_may_be_too_large_for_the_dtype_of_the_vector(model, tokenizer):
    """It is made in the wider dtype: 1000 times 100 lies outside float16."""
    thousand = torch.linspace(-1000, 1000, D_MODEL).half()
    found, wanted = (
        sweep_logits(
            model, tokenizer, Grid({"v": SteeringVector({3: vector})}, coeffs=[100]), PROMPTS[:1]
        )["kl"].tolist()
        for vector in (thousand, thousand.float())
    )
    assert found == wanted and all(value == value for value in found)


def test_all_positions_of_the_model_can_be_used(model, tokenizer, vector):
    """The last new token is never read, so that there may be one more than positions are left."""
    prompt = "I think dogs are " * 49
    length, limit = len(tokenizer(prompt)["input_ids"]), model.config.n_positions
    assert limit - 60 < length < limit
    grid, fits = Grid({"v": vector}, [3]), Sampling(limit - length + 1, temperature=0.0)
    assert len(sweep(model, tokenizer, grid, [prompt], sampling=fits)) == 2
    more = replace(fits, max_new_tokens=fits.max_new_tokens + 1)
    with pytest.raises(ValueError, match=f"the {limit} positions"):
        sweep(model, tokenizer, grid, [prompt], sampling=more)
