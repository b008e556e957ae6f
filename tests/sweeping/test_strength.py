"""Calibration: at the multiplier that was found, the divergence is the target, measured anew."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES, D_MODEL, LAYERS, ODD, tiny_model

from common import (
    ActivationAddition,
    Grid,
    ablation_operator,
    apply_activation_additions,
    calibrate,
    calibrate_grid,
    encode,
    kl_by_cell,
    norm_preserving_addition_operator,
    prompting_kl,
    random_directions,
    steer_rows,
    steering_kl,
    sweep_logits,
    train_steering_vector,
)
from common.checking.pristine import assert_pristine, snapshot
from common.sweeping import strength
from common.vectors.steering_vector import SteeringVector

PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the"]
NEW = 8


@pytest.fixture(scope="module")
def vector(model, tokenizer) -> SteeringVector:
    return train_steering_vector(model, tokenizer, [("Love", "Hate")])


@pytest.fixture(autouse=True, scope="module")
def unchanged(model):
    before = snapshot(model)
    yield
    assert_pristine(model, before)


def kls_by_hand(
    model, tokenizer, prompt: str, steered, cached: bool, new: int = NEW
) -> list[float]:
    """The divergences after one prompt, by transformers alone, token by token."""
    prompted = encode(tokenizer, [prompt], None)["input_ids"]
    ids = model.generate(prompted, max_new_tokens=new, do_sample=False)[0]
    start = prompted.shape[1]

    def predictions(context):
        found, past = [], None
        with context, torch.no_grad():
            for end in range(start, len(ids)):
                if not cached:
                    scores = model(ids[None, :end], use_cache=False).logits
                else:
                    read = ids[None, :end] if past is None else ids[None, end - 1 : end]
                    output = model(read, past_key_values=past, use_cache=True)
                    scores, past = output.logits, output.past_key_values
                found.append(scores[0, -1].double().log_softmax(-1))
        return torch.stack(found)

    after, before = predictions(steered()), predictions(nullcontext())
    return (after.exp() * (after - before)).sum(-1).tolist()


def by_hand(model, tokenizer, prompts, steered, cached: bool = True, new: int = NEW) -> float:
    pooled = [
        kl
        for prompt in prompts
        for kl in kls_by_hand(model, tokenizer, prompt, steered, cached, new)
    ]
    return float(np.quantile(pooled, 0.95))


def one_layer(vector: SteeringVector, layer: int, factor: float = 1.0) -> SteeringVector:
    return SteeringVector({layer: factor * vector.layer_activations[layer]})


# --- one steering ---


@pytest.mark.parametrize("target, layers", [(0.05, [3]), (1.0, [0]), (1.0, [1, 2, 4]), (2.5, [5])])
def test_measured_again_it_is_the_target(model, tokenizer, vector, layers, target):
    """By prompts one at a time, with and without a cache, as `apply` steers them."""
    part = vector.select(layers)
    found = calibrate(model, tokenizer, part, PROMPTS, target, new_tokens=NEW)
    assert found > 0
    steered = partial(part.apply, model, multiplier=found)
    assert steering_kl(model, tokenizer, steered, PROMPTS, new_tokens=NEW) == pytest.approx(
        target, rel=0.01
    )
    for cached in (True, False):
        again = by_hand(model, tokenizer, PROMPTS, steered, cached)
        assert again == pytest.approx(target, rel=0.011)


def test_both_directions_have_multipliers_of_their_own(model, tokenizer, vector):
    ways = {
        sign: calibrate(model, tokenizer, sign * one_layer(vector, 3), PROMPTS) for sign in (1, -1)
    }
    assert ways[1] != pytest.approx(ways[-1], rel=0.01)


@pytest.mark.parametrize("factor", [1e-4, 0.3, 1e3])
def test_the_length_of_the_vector_does_not_matter(model, tokenizer, vector, factor):
    """Of a vector k times as long, a k-th."""
    one = calibrate(model, tokenizer, one_layer(vector, 2), PROMPTS, new_tokens=NEW)
    other = calibrate(model, tokenizer, one_layer(vector, 2, factor), PROMPTS, new_tokens=NEW)
    assert factor * other == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("layer_type", ["mlp", "self_attn"])
def test_any_part_of_a_block_and_any_operator_is_calibrated(model, tokenizer, vector, layer_type):
    part = SteeringVector(vector.select([2, 4]).layer_activations, layer_type)
    found = calibrate(model, tokenizer, part, PROMPTS, new_tokens=NEW)
    steered = partial(part.apply, model, multiplier=found)
    assert by_hand(model, tokenizer, PROMPTS, steered) == pytest.approx(1.0, rel=0.011)

    def turned(multiplier):
        operator = norm_preserving_addition_operator()
        return one_layer(vector, 3).apply(model, multiplier=multiplier, operator=operator)

    found = calibrate(model, tokenizer, turned, PROMPTS, new_tokens=NEW)
    assert by_hand(model, tokenizer, PROMPTS, lambda: turned(found)) == pytest.approx(1, rel=0.011)


def test_steering_that_counts_from_the_end_of_the_prompt_falls_where_it_falls(
    model, tokenizer, vector
):
    """At the last token of each prompt, and not of the text that is read."""

    def at_last(multiplier):
        return one_layer(vector, 3).apply(model, multiplier=multiplier, token_indices=[-1])

    found = calibrate(model, tokenizer, at_last, PROMPTS, 0.5, new_tokens=3)

    def kl(prompt: str) -> list[float]:
        inputs = encode(tokenizer, [prompt], None)["input_ids"]
        ids = model.generate(inputs, max_new_tokens=3, do_sample=False)
        last = [inputs.shape[1] - 1]
        with torch.no_grad():
            before = model(ids[:, :-1]).logits[0, last[0] :].log_softmax(-1)
            with one_layer(vector, 3).apply(model, multiplier=found, token_indices=last):
                after = model(ids[:, :-1]).logits[0, last[0] :].log_softmax(-1)
        return (after.exp() * (after - before)).sum(-1).tolist()

    pooled = [value for prompt in PROMPTS for value in kl(prompt)]
    assert np.quantile(pooled, 0.95) == pytest.approx(0.5, rel=0.011)


@pytest.mark.parametrize("name", ["embedded", "BART decoder", "RWKV"])
def test_rows_have_what_is_given_to_their_prompts(model, tokenizer, name, monkeypatch):
    """In their order, whichever prompts share a batch: as each has it by itself."""
    model = model if name == "embedded" else tiny_model(name, len(tokenizer))
    generator = torch.Generator().manual_seed(2)
    draw = 2 * torch.randn(model.config.hidden_size, generator=generator)
    part, prompts, each = SteeringVector({2: draw}), [*PROMPTS, "You are"], [3.0, 0.0, -1.0, 1.5]
    pooled = [
        kl
        for prompt, x in zip(prompts, each)
        for kl in kls_by_hand(
            model, tokenizer, prompt, partial(part.apply, model, multiplier=x), False, 4
        )
    ]
    expected = pytest.approx(np.quantile(pooled, 0.95), rel=1e-3)
    seen: list[int] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda *given: seen.append(len(given[2])))
    try:
        for steered in (
            partial(part.apply, model, multiplier=each),
            partial(steer_rows, model, [part if x else None for x in each], each),
        ):
            assert steering_kl(model, tokenizer, steered, prompts, new_tokens=4) == expected
        monkeypatch.setattr(strength, "MEMORY", 1)
        seen.clear()
        assert steering_kl(model, tokenizer, steered, prompts, new_tokens=4) == expected
        assert {*seen[-len(prompts) :]} == {1}, "as many as memory holds"
    finally:
        handle.remove()
    three = partial(part.apply, model, multiplier=each[:3])
    with pytest.raises(ValueError, match="the multiplier has 3 rows and the batch has 4"):
        steering_kl(model, tokenizer, three, prompts, new_tokens=4)


def test_it_takes_twelve_passes_at_most(model, tokenizer, vector):
    """Whatever the first multiplier; all twelve where none is found."""
    for factor in (1e-5, 1.0, 1e4):
        opened = []

        def steered(multiplier, factor=factor, opened=opened):
            opened.append(multiplier)
            return one_layer(vector, 3, factor).apply(model, multiplier=multiplier)

        calibrate(model, tokenizer, steered, PROMPTS, new_tokens=NEW)
        assert len(opened) <= 12 and len(set(opened)) == len(opened)
    opened.clear()
    with pytest.raises(ValueError, match="KL of 200"):
        calibrate(model, tokenizer, steered, PROMPTS, 200.0, new_tokens=NEW)
    assert len(opened) == 12


def test_more_strength_is_more_divergence(model, tokenizer, vector):
    targets = [0.1, 0.3, 1.0, 2.0]
    found = [
        calibrate(model, tokenizer, one_layer(vector, 3), PROMPTS, target, new_tokens=NEW)
        for target in targets
    ]
    assert found == sorted(found)


# --- a grid ---


def test_a_grid_is_one_calibration_for_each(model, tokenizer, vector):
    """All at once, row by row, and one by one: at every layer, in both directions."""
    grid = Grid({"v": vector}, [0, 3, 5], (-1, 1), random_controls=2)
    settings = {"new_tokens": NEW, "tolerance": 1e-3}
    frame = calibrate_grid(model, tokenizer, grid, PROMPTS, **settings)
    rows = calibrate_grid(model, tokenizer, grid, PROMPTS, max_memory=1, **settings)
    assert len(frame) == 3 * 3 * 2 and frame["kind"].value_counts().to_dict() == {
        "random": 12,
        "steering": 6,
    }
    pd.testing.assert_frame_equal(frame, rows, rtol=1e-3)
    assert np.sign(frame["coeff"]).tolist() == [-1.0, 1.0] * 9
    for row in frame[frame["steering"] == "v"].itertuples():
        way = one_layer(vector, row.layer, np.sign(row.coeff))
        alone = calibrate(model, tokenizer, way, PROMPTS, **settings)
        assert abs(row.coeff) == pytest.approx(alone, rel=2e-3)
        assert row.kl == pytest.approx(1.0, rel=1e-3)


def test_what_a_grid_was_calibrated_to_is_what_its_cells_have(model, tokenizer, vector):
    """Measured by the other function, at the coefficients that were found."""
    directions = random_directions(len(vector.layer_activations[3]), 3)
    grid = Grid({f"{n}": SteeringVector({3: row}) for n, row in enumerate(directions)})
    frame = calibrate_grid(model, tokenizer, grid, PROMPTS, 0.7, new_tokens=NEW)
    scaled = {
        row.steering: SteeringVector({3: directions[int(row.steering)] * row.coeff})
        for row in frame.itertuples()
    }
    kls = kl_by_cell(model, tokenizer, Grid(scaled), PROMPTS, new_tokens=NEW)
    assert kls["kl"].tolist() == pytest.approx([0.0, *frame["kl"]], rel=1e-3)
    assert kls["kl"].tolist()[1:] == pytest.approx([0.7] * 3, rel=0.011)


def test_the_divergence_of_a_cell_is_that_of_its_steering(model, tokenizer, vector):
    """Vectors, and additions at the front, at the input of a block and at its output."""
    given = {
        "v": vector,
        "pre": [ActivationAddition(1.0, 0, "Love"), ActivationAddition(-1.0, 0, "Hate")],
        "post": [ActivationAddition(1.0, (0, "resid_post"), "Love it")],
    }
    grid, settings = Grid(given, [0, 4], [-3.0, 2.0]), {"new_tokens": NEW, "prepend_bos": True}
    kls = kl_by_cell(model, tokenizer, grid, PROMPTS, **settings)
    assert kls["steering"][0] == "unsteered" and kls["kl"][0] == 0.0
    for row in kls[1:].itertuples():
        if row.steering == "v":
            part = one_layer(vector, row.layer)
            steered = partial(part.apply, model, multiplier=row.coeff)
        else:
            site = row.layer if row.steering == "pre" else (row.layer, "resid_post")
            additions = [
                ActivationAddition(row.coeff * one.coeff, site, one.prompt)
                for one in given[row.steering]
            ]
            steered = partial(apply_activation_additions, model, tokenizer, additions)
        expected = steering_kl(model, tokenizer, steered, PROMPTS, **settings)
        assert expected > 1e-3 and row.kl == pytest.approx(expected, rel=1e-3)


def test_at_one_token_of_one_prompt_it_is_the_divergence_of_a_sweep(model, tokenizer, vector):
    grid = Grid({"v": vector}, [1, 4], [2.0])
    found = kl_by_cell(model, tokenizer, grid, PROMPTS[:1], new_tokens=1)
    swept = sweep_logits(model, tokenizer, grid, PROMPTS[:1])
    pd.testing.assert_frame_equal(found, swept.drop(columns="prompt"), rtol=1e-4)


# --- texts that end, other models ---


def test_what_follows_the_end_of_a_text_does_not_count(tokenizer):
    """Prompts whose texts end at different places, in one batch."""
    other = tiny_model("GPT-2", len(tokenizer))
    part = SteeringVector({1: torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))})
    inputs = encode(tokenizer, PROMPTS[:1], None)
    ids = other.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    other.generation_config.eos_token_id = int(ids[0, inputs["input_ids"].shape[1] + 2])
    steered = partial(part.apply, other)
    short, long = (kls_by_hand(other, tokenizer, prompt, steered, False) for prompt in PROMPTS[:2])
    assert len(short) <= 3 < len(long)
    expected = np.quantile([*short, *long], 0.95)
    settings = {"new_tokens": NEW}
    found = steering_kl(other, tokenizer, steered, PROMPTS[:2], **settings)
    cells = kl_by_cell(other, tokenizer, Grid({"v": part}), PROMPTS[:2], **settings)
    assert [found, cells["kl"][1]] == pytest.approx([expected] * 2, rel=1e-3)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ODD])
def test_other_architectures_are_calibrated(tokenizer, name):
    """By hand one prompt at a time without a cache; the grid finds the same."""
    other = tiny_model(name, len(tokenizer))
    before = snapshot(other)
    generator = torch.Generator().manual_seed(1)
    part = SteeringVector({LAYERS // 2: torch.randn(D_MODEL, generator=generator)})
    settings = {"new_tokens": 4, "prepend_bos": None}
    found = calibrate(other, tokenizer, part, PROMPTS, **settings)
    steered = partial(part.apply, other, multiplier=found)
    again = by_hand(other, tokenizer, PROMPTS, steered, False, 4)
    assert again == pytest.approx(1.0, rel=0.012)
    frame = calibrate_grid(other, tokenizer, Grid({"v": part}), PROMPTS, **settings)
    assert frame["coeff"][0] == pytest.approx(found, rel=0.01)
    assert_pristine(other, before)


# --- what is refused ---


def test_what_no_multiplier_reaches_is_refused(model, tokenizer, vector):
    """Too much; a steering that knows no strength, for too much and for too little."""
    part = one_layer(vector, 3)
    with pytest.raises(ValueError, match=r"KL of 200: the largest that was found is \d"):
        calibrate(model, tokenizer, part, PROMPTS, 200.0, new_tokens=NEW)
    with pytest.raises(ValueError, match="'v' at layer 2 gives a KL of 200.*1 more like it"):
        calibrate_grid(
            model, tokenizer, Grid({"v": vector}, [2, 3]), PROMPTS, 200.0, new_tokens=NEW
        )

    def ablated(multiplier):
        return part.apply(model, operator=ablation_operator())

    for target, message in ((50.0, "the largest that was found"), (1e-9, "even at")):
        with pytest.raises(ValueError, match=message):
            calibrate(model, tokenizer, ablated, PROMPTS, target, new_tokens=NEW)

    def switched(multiplier):
        return part.apply(model, multiplier=50.0 * (multiplier > 3))

    with pytest.raises(ValueError, match=r"jumps from 0 at 2\.\d+ to .* at 3\.\d+; a larger"):
        calibrate(model, tokenizer, switched, PROMPTS, new_tokens=NEW)


def test_what_cannot_be_calibrated_is_refused(model, tokenizer, vector):
    part = one_layer(vector, 3)
    for bad in (0.0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="target_kl"):
            calibrate(model, tokenizer, part, PROMPTS, bad)
    with pytest.raises(ValueError, match="tolerance above 0"):
        calibrate(model, tokenizer, part, PROMPTS, tolerance=0)
    with pytest.raises(ValueError, match="new_tokens"):
        calibrate(model, tokenizer, part, PROMPTS, new_tokens=0)
    with pytest.raises(ValueError, match="a vector is 0"):
        calibrate(model, tokenizer, one_layer(vector, 3, 0.0), PROMPTS)
    with pytest.raises(ValueError, match="and 999 new ones are more than"):
        calibrate(model, tokenizer, part, PROMPTS, new_tokens=999)
    with part.apply(model), pytest.raises(ValueError, match="starts from the model as it is"):
        calibrate(model, tokenizer, part, PROMPTS)
    for coeffs in ((0.0,), (1.0, 2.0)):
        with pytest.raises(ValueError, match="one coefficient for each direction"):
            calibrate_grid(model, tokenizer, Grid({"v": vector}, [3], coeffs), PROMPTS)
    love = [ActivationAddition(1.0, 3, "Love")]
    with pytest.raises(ValueError, match="at the front of the prompt"):
        kl_by_cell(model, tokenizer, Grid({"w": love}, addition_location="back"), PROMPTS)
    with pytest.raises(ValueError, match="min_token_index counted from the front, got -1"):
        kl_by_cell(model, tokenizer, Grid({"v": vector}, min_token_index=-1), PROMPTS)
    for measure in (kl_by_cell, calibrate_grid):
        with pytest.raises(ValueError, match="max_memory"):
            measure(model, tokenizer, Grid({"v": vector}, [3]), PROMPTS, max_memory=0)


# --- prompting ---


def test_prompting_is_measured_on_the_plain_text(model, tokenizer):
    """By transformers alone; prompts of other lengths may take their place, and the same give 0."""
    fronts = ["I am happy.", "What a terrible day! It was awful.", "You"]
    prompted = [f"{front} {prompt}" for front, prompt in zip(fronts, PROMPTS)]
    pooled = []
    for prompt, changed in zip(PROMPTS, prompted):
        given, other = (
            tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, changed)
        )
        new = model.generate(given, max_new_tokens=NEW, do_sample=False)[:, given.shape[1] :]
        with torch.no_grad():
            plain, after = (
                model(torch.cat([ids, new[:, :-1]], dim=1)).logits[0, ids.shape[1] - 1 :].double()
                for ids in (given, other)
            )
        plain, after = plain.log_softmax(-1), after.log_softmax(-1)
        pooled += (after.exp() * (after - plain)).sum(-1).tolist()
    found = prompting_kl(model, tokenizer, prompted, PROMPTS, new_tokens=NEW)
    assert found == pytest.approx(np.quantile(pooled, 0.95), rel=1e-4) and found > 0.1
    assert prompting_kl(model, tokenizer, PROMPTS, PROMPTS, new_tokens=NEW) < 1e-6


@pytest.mark.parametrize(
    ("prompted", "message"),
    [
        (PROMPTS[:2], "expected a list of 3 prompts, one in place of each"),
        ("Love", "expected a list of 3 prompts"),
        (["", "I", "You"], "one token or more"),
        (["I " * 300, "I", "You"], "more than the 256 positions"),
    ],
)
def test_prompts_that_cannot_take_a_place_are_refused(model, tokenizer, prompted, message):
    with pytest.raises(ValueError, match=message):
        prompting_kl(model, tokenizer, prompted, PROMPTS, new_tokens=NEW)
