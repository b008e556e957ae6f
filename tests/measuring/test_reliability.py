"""For whom steering fails: slopes, shares, and what of the pairs foretells them."""

import random

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from scipy import stats

from common import (
    Grid,
    SteeringVector,
    agreement_by_layer,
    extract_activations,
    pair_agreement,
    plot_steerability,
    steerability,
    steerable_shares,
    sweep_logits,
    token_logprob,
    train_steering_vector,
)
from common.measuring.next_token import token_set
from common.plots import REVERSED, STEERED
from embedded_model import grammar
from embedded_model.prompts import TABLE_PROMPTS

NAN = float("nan")
UNSTEERED = ("unsteered", "unsteered", None, 0.0)


def rows_of(values: dict[tuple, dict[str, list[float]]]) -> pd.DataFrame:
    """A table as `sweep` returns it, from the metric of every prompt's samples at each cell."""
    rows = [
        dict(zip(("steering", "kind", "layer", "coeff"), cell)) | {"prompt": prompt, "tone": value}
        for cell, by_prompt in values.items()
        for prompt, samples in by_prompt.items()
        for value in samples
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(layer=frame["layer"].astype("Int64"))


def line(slope: float, coeffs=(-2.0, -1.0, 1.0, 2.0), name="Love", layer=3, prompt="I") -> dict:
    """A prompt on a straight line through 1 at coefficient 0."""
    return {(name, "steering", layer, c): {prompt: [1.0 + slope * c]} for c in coeffs}


# --- slopes ---


@given(
    slope=st.floats(-5, 5),
    coeffs=st.lists(st.integers(-9, 9).filter(bool), min_size=1, max_size=6, unique=True),
    noise=st.lists(st.floats(-1, 1), min_size=14, max_size=14),
)
def test_a_slope_is_that_of_scipy(slope, coeffs, noise):
    """Over all samples, with the unsteered ones at 0; the interval is Student's."""
    draws = iter(noise)
    values = {UNSTEERED: {"I": [next(draws), next(draws)]}}
    for coeff in coeffs:
        samples = [slope * coeff + next(draws), slope * coeff + next(draws)]
        values["Love", "steering", 3, float(coeff)] = {"I": samples}
    rows = rows_of(values)
    (found,) = steerability(rows, "tone").itertuples()
    expected = stats.linregress(rows["coeff"].to_numpy(), rows["tone"].to_numpy(dtype=float))
    error = 0.0 if np.isnan(expected.stderr) else expected.stderr  # of what is all the same
    wide = stats.t.ppf(0.975, len(rows) - 2) * error
    assert found.slope == pytest.approx(expected.slope, abs=1e-9)
    assert (found.low, found.high) == pytest.approx(
        (expected.slope - wide, expected.slope + wide), abs=1e-6
    )
    assert found.points == len(rows)


def test_each_prompt_steering_and_layer_has_its_line():
    values = {UNSTEERED: {"I": [1.0], "You": [1.0]}}
    for slope, name, layer, prompt in (
        (0.5, "Love", 3, "I"),
        (-0.25, "Love", 3, "You"),
        (2.0, "Love", 4, "I"),
        (-1.0, "Hate", 3, "I"),
    ):
        for cell, found in line(slope, name=name, layer=layer, prompt=prompt).items():
            values.setdefault(cell, {}).update(found)
    slopes = steerability(rows_of(values), "tone")
    found = slopes.set_index(["steering", "layer", "prompt"])["slope"].to_dict()
    assert found == pytest.approx(
        {
            ("Love", 3, "I"): 0.5,
            ("Love", 3, "You"): -0.25,
            ("Love", 4, "I"): 2.0,
            ("Hate", 3, "I"): -1.0,
        }
    )
    assert (slopes["low"] - slopes["slope"]).abs().max() < 1e-6  # nothing is off its line


@given(scale=st.floats(0.1, 10), shift=st.floats(-10, 10), stretch=st.floats(0.1, 10))
def test_units_only_scale_a_slope(scale, shift, stretch):
    """Scale · metric + shift over stretch · coefficient: slope and interval times scale/stretch."""
    values = {UNSTEERED: {"I": [0.3]}, **line(0.7)}
    values["Love", "steering", 3, 3.0] = {"I": [1.1]}
    rows = rows_of(values)
    other = rows.assign(tone=scale * rows["tone"] + shift, coeff=stretch * rows["coeff"])
    columns = ["slope", "low", "high"]
    one, two = (steerability(frame, "tone")[columns].to_numpy() for frame in (rows, other))
    assert two == pytest.approx(one * scale / stretch, rel=1e-6)


def test_gaps_and_zeros_count_as_they_should():
    """A gap is no point; "steering" by 0 is no second unsteered text; one coefficient: no slope."""
    values = {UNSTEERED: {"I": [1.0], "You": [NAN]}, **line(0.5)}
    values["Love", "steering", 3, 0.0] = {"I": [99.0]}
    values["Love", "steering", 3, 4.0] = {"I": [None], "You": [1.0]}
    slopes = steerability(rows_of(values), "tone").set_index("prompt")
    assert slopes["slope"]["I"] == pytest.approx(0.5) and slopes["points"]["I"] == 5
    assert np.isnan(slopes["slope"]["You"]) and slopes["points"]["You"] == 1
    (two,) = steerability(rows_of({UNSTEERED: {"I": [0]}, **line(0.5, [2])}), "tone").itertuples()
    assert two.slope == pytest.approx(1.0) and np.isnan(two.low) and two.points == 2
    assert steerable_shares(slopes.reset_index())["prompts"].tolist() == [1]


@pytest.mark.parametrize("layer", [3, None])
def test_without_any_value_there_is_no_slope(layer):
    """Of any prompt: NaN, and not an error. Steerings at all layers together have no layer."""
    rows = rows_of({UNSTEERED: {"I": [NAN]}, **line(NAN, layer=layer)})
    (found,) = steerability(rows, "tone").to_dict("records")
    assert found["prompt"] == "I" and found["points"] == 0
    assert all(np.isnan(found[name]) for name in ("slope", "low", "high"))
    rows = rows_of({UNSTEERED: {"I": [1.0]}, **line(0.5, layer=layer)})
    assert steerability(rows, "tone")["slope"].tolist() == pytest.approx([0.5])


def test_other_tables_are_refused():
    rows = rows_of({UNSTEERED: {"I": [1.0]}, **line(0.5)})
    steered, kinds = rows[rows["kind"] != "unsteered"], rows[rows["kind"] == "unsteered"]
    for bad in (steered, kinds):
        with pytest.raises(ValueError, match="expected steered rows, and unsteered ones"):
            steerability(bad, "tone")
    with pytest.raises(ValueError, match="other than 0"):
        steerability(rows.assign(coeff=0.0), "tone")
    with pytest.raises(ValueError, match="as sweep or sweep_logits returns them"):
        steerability(rows.drop(columns="prompt"), "tone")
    for column in ("coeff", "layer", "steering", "kind", "prompt"):
        with pytest.raises(ValueError, match=f"the column of a metric, got '{column}'"):
            steerability(rows.assign(prompt=1), column)
    with pytest.raises(ValueError, match="no column 'love'"):
        steerability(rows, "love")
    with pytest.raises(ValueError, match="as steerability returns"):
        steerable_shares(rows)
    with pytest.raises(ValueError, match="what pair_agreement returns"):
        agreement_by_layer(rows)


# --- shares ---


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=12))
def test_shares_are_over_prompts(slopes):
    """The mean with Student's interval over prompts, the share of negative slopes with Wilson's."""
    frame = pd.DataFrame({"slope": slopes, "high": np.array(slopes) + 0.5, "prompt": "I"})
    frame = frame.assign(steering="Love", kind="steering", layer=3)
    (found,) = steerable_shares(frame).to_dict("records")
    anti, count = sum(slope < 0 for slope in slopes), len(slopes)
    ends = stats.t.interval(0.95, count - 1, np.mean(slopes), stats.sem(slopes) or 1e-300)
    assert found["slope"] == pytest.approx(np.mean(slopes))
    assert (found["low"], found["high"]) == pytest.approx(ends, abs=1e-6)
    assert found["anti"] == anti / count and found["prompts"] == count
    assert found["anti low"] <= found["anti"] <= found["anti high"]
    assert found["surely anti"] == sum(slope < -0.5 for slope in slopes) / count


# --- pairs ---


def test_agreement_is_that_of_the_activations(model, tokenizer):
    """With a vector, and without one against the mean of all other pairs."""
    pairs = grammar.contrast_pairs(6)
    sides = [
        {layer: torch.cat(acts) for layer, acts in side.items()}
        for side in extract_activations(model, tokenizer, pairs, [1, 4])
    ]
    vector = train_steering_vector(model, tokenizer, grammar.contrast_pairs(12)[6:], [1, 4])
    for other in (vector, None):
        where = {} if other else {"layers": [1, 4]}
        found = pair_agreement(model, tokenizer, pairs, other, **where)
        assert found["layer"].tolist() == [1] * 6 + [4] * 6 and found["pair"].tolist() == [
            *range(6),
            *range(6),
        ]
        for row in found.itertuples():
            positive, negative = (side[row.layer] for side in sides)
            if other:
                line = vector.layer_activations[row.layer]
            else:
                others = [n for n in range(6) if n != row.pair]
                line = (positive - negative)[others].mean(0)
            p, n = positive[row.pair], negative[row.pair]
            cosine = torch.cosine_similarity(p - n, line, dim=0).item()
            assert row.cosine == pytest.approx(cosine, abs=1e-5)
            ends = [(side @ line / line.norm()).item() for side in (p, n)]
            assert [row.positive, row.negative] == pytest.approx(ends, rel=1e-4, abs=1e-4)
    assert found["cosine"].mean() > 0.2


def test_the_order_of_the_layers_does_not_matter(model, tokenizer):
    """Nor do negative numbers: each layer is compared with its own vector."""
    pairs = grammar.contrast_pairs(4)
    vector = train_steering_vector(model, tokenizer, pairs, [1, 4])
    count, own = model.config.num_hidden_layers, vector.layer_activations
    expected = pair_agreement(model, tokenizer, pairs, vector)
    for other in (
        vector.select([4, 1]),
        SteeringVector({4 - count: own[4], 1: own[1]}),
        SteeringVector({4 - count: own[4], 1 - count: own[1]}),
    ):
        found = pair_agreement(model, tokenizer, pairs, other)
        pd.testing.assert_frame_equal(found, expected)


def test_separation_is_the_discriminability_index():
    """Of two normal samples it is the distance of their means in standard deviations."""
    draws = np.random.default_rng(0).normal(size=(2, 4000))
    frame = pd.DataFrame({"layer": 2, "positive": 3.0 + 2 * draws[0], "negative": 2 * draws[1]})
    frame["cosine"] = np.where(np.arange(4000) % 4, 0.5, -0.1)
    (found,) = agreement_by_layer(frame).to_dict("records")
    assert found["separation"] == pytest.approx(1.5, abs=0.1)
    assert found["against"] == 0.25 and found["pairs"] == 4000
    assert found["cosine"] == pytest.approx(0.35)


def test_pairs_that_cannot_be_compared_are_refused(model, tokenizer):
    pairs = grammar.contrast_pairs(2)
    with pytest.raises(ValueError, match="two pairs or more"):
        pair_agreement(model, tokenizer, pairs[:1])
    vector = train_steering_vector(model, tokenizer, pairs, [1])
    with pytest.raises(ValueError, match="of the vector, and no others"):
        pair_agreement(model, tokenizer, pairs, vector, layers=[1])


# --- good and mixed pairs ---


def mixed(pairs, seed: int = 0):
    """Pairs of which half, drawn at random, are the wrong way round."""
    draw = random.Random(seed)
    turned = set(draw.sample(range(len(pairs)), len(pairs) // 2))
    return [pair[::-1] if n in turned else pair for n, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def reports(model, tokenizer, loaded) -> dict:
    """Slopes, shares and agreement of vectors from good pairs and from mixed ones."""
    good, layer = grammar.contrast_pairs(60), loaded.preset.layer
    reading = {"read_token_index": lambda prompt: -2, "batch_size": 30}
    sets, grid = {"good": good, "mixed": mixed(good)}, {}
    for name, pairs in sets.items():
        vector = train_steering_vector(model, tokenizer, pairs, [layer], **reading)
        grid[name] = vector.unit()
    nice, bad = (
        token_logprob(token_set(tokenizer, words))
        for words in (["wonderful", "lovely", "kind"], ["awful", "horrible", "bad"])
    )
    metrics = {"difference": lambda steered, plain: nice(steered, plain) - bad(steered, plain)}
    coeffs = [loaded.preset.coeff * step for step in (-0.5, -0.25, 0.25, 0.5)]
    rows = sweep_logits(model, tokenizer, Grid(grid, None, coeffs), TABLE_PROMPTS, metrics)
    slopes = steerability(rows, "difference")
    agreement = {
        name: agreement_by_layer(
            pair_agreement(model, tokenizer, pairs, layers=[layer], **reading)
        ).iloc[0]
        for name, pairs in sets.items()
    }
    shares = steerable_shares(slopes).set_index("steering")
    return {"slopes": slopes, "shares": shares, "agreement": agreement, "layer": layer}


def test_good_pairs_steer_reliably_and_mixed_ones_do_not(reports):
    shares = reports["shares"]
    assert shares["anti"]["good"] == 0 and shares["low"]["good"] > 0
    assert shares["slope"]["good"] > 2 * abs(shares["slope"]["mixed"])


def test_the_agreement_of_the_pairs_foretells_it(reports):
    """Before anything is steered: cosine, pairs against the others, and separation."""
    good, bad = (reports["agreement"][name] for name in ("good", "mixed"))
    assert good["cosine"] > 0.3 > abs(bad["cosine"]) + 0.1
    assert good["against"] < 0.05 < 0.3 < bad["against"]
    assert good["separation"] > 2 and abs(bad["separation"]) < 1


def test_a_strip_shows_every_prompt(reports):
    """One dot for each, in the colour of its sign, and the share that is anti-steerable."""
    slopes, layer = reports["slopes"], reports["layer"]
    try:
        (axes,) = plot_steerability(slopes, layer, "a title").axes
        dots = np.concatenate([c.get_offsets()[:, 0] for c in axes.collections])
        assert sorted(dots) == pytest.approx(sorted(slopes["slope"]))
        for found in axes.collections:
            colour = {bool(x < 0) for x in found.get_offsets()[:, 0]}
            if colour:
                expected = to_rgba(REVERSED if colour == {True} else STEERED, 0.6)
                assert tuple(found.get_facecolor()[0]) == expected and len(colour) == 1
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == ["good", "mixed"]
        assert [text.get_text() for text in axes.texts] == [
            f"{reports['shares']['anti'][name]:.0%} anti-steerable" for name in names
        ]
        with pytest.raises(ValueError, match="layer 99 has no slopes"):
            plot_steerability(slopes, 99)
    finally:
        plt.close("all")
