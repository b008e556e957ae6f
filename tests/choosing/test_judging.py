"""Judging by itself, on numbers: as many false alarms as are allowed, whatever is chosen."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.choosing.judging import (
    LEVEL,
    beats,
    gentlest_of_the_best,
    interval,
    moves_the_right_way,
    shown,
    tells_apart,
)

NAN = float("nan")


# --- beaten controls ---


@given(st.lists(st.integers(-30, 30), min_size=20, max_size=60))
def test_whichever_of_equals_is_called_the_vector_few_win(effects):
    """An exact law: of n effects, each called the vector in turn, at most a twentieth pass."""
    passed = [
        beats(effect, effects[:n] + effects[n + 1 :], "others").passed
        for n, effect in enumerate(effects)
    ]
    assert sum(passed) <= LEVEL * len(effects)


@pytest.mark.parametrize("count, may_win", [(19, 0), (38, 0), (39, 1), (59, 2)])
def test_the_best_of_different_ones_passes(count, may_win):
    """The test is no stricter than it has to be."""
    effects = [float(n) for n in range(count)]
    for larger in range(5):
        effect = count - larger - 0.5
        assert beats(effect, effects, "others").passed == (larger <= may_win)
        assert beats(effect, effects, "others").p == pytest.approx((1 + larger) / (1 + count))


def test_what_has_no_value_is_not_beaten_and_beats_nothing():
    assert not beats(1.0, [0.0] * 18 + [NAN], "others").passed
    assert beats(1.0, [0.0] * 19, "others").passed
    assert beats(NAN, [0.0] * 19, "others").p == 1
    assert not beats(1.0, [1.0, *[0.0] * 18], "others").passed  # as much is not more


# --- labels ---


@pytest.mark.parametrize("count", range(5, 12))
def test_of_all_labels_few_pass(count):
    """An exact law: of all ways to swap the sides of pairs, at most a twentieth pass."""
    passed = [tells_apart(signs, 10).passed for signs in product((-1.0, 1.0), repeat=count)]
    assert 0 < sum(passed) <= LEVEL * len(passed)


def test_without_pairs_nobody_is_asked():
    answer = tells_apart([], 10)
    assert answer.passed is None and answer.p is None and "10" in answer.found
    assert not tells_apart([0.0] * 8, 10).passed  # no difference is no side


def test_an_effect_has_to_lie_above_zero():
    assert moves_the_right_way(0.1, 0.2).passed
    assert not any(moves_the_right_way(low, 0.2).passed for low in (0.0, -0.1, NAN))
    wrong = moves_the_right_way(-0.2, -0.1)
    assert not wrong.passed and "swapped" in wrong.found
    assert "swapped" not in moves_the_right_way(-0.2, 0.0).found


# --- numbers ---


@given(st.floats(-1e9, 1e9))
def test_a_number_that_is_not_zero_is_not_shown_as_zero(value):
    assert float(shown(value)) == pytest.approx(value, rel=0.1)
    assert float(shown(value)) != 0 or value == 0
    assert shown(-0.0) == "0.00" and shown(0.96) == "0.96" and shown(-1.5) == "-1.50"


# --- choosing ---


def cells(*values: tuple, name: str = "a") -> pd.DataFrame:
    """Settings (layer, target_kl, effect, error) of a steering."""
    frame = pd.DataFrame(values, columns=["layer", "target_kl", "effect", "error"])
    return frame.assign(steering=name)


NUMBERS = st.floats(-2, 2)
SETTINGS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0.3, 1.0, 2.0]), NUMBERS, st.floats(0, 1)),
    min_size=1,
    max_size=8,
)


@given(SETTINGS)
def test_chosen_is_the_gentlest_of_those_near_the_best(settings_):
    (chosen,) = gentlest_of_the_best(cells(*settings_)).itertuples()
    best = max(settings_, key=lambda one: one[2])
    near = [one for one in settings_ if one[2] >= best[2] - best[3]]
    assert (chosen.layer, chosen.target_kl, chosen.effect, chosen.error) in near
    assert all((chosen.target_kl, -chosen.effect) <= (one[1], -one[2]) for one in near)


def test_each_steering_chooses_for_itself_and_never_what_has_no_value():
    tried = pd.concat(
        [
            cells((0, 0.3, 0.1, 0.0), (1, 1.0, 0.9, 0.1), (2, 1.0, NAN, 0.1)),
            cells((0, 0.3, 0.5, 0.0), (1, 1.0, 0.4, 0.0), name="b"),
            cells((0, 0.3, NAN, NAN), name="c"),
            cells((4, 0.3, 0.5, NAN), name="d"),
        ]
    )
    chosen = gentlest_of_the_best(tried)
    assert dict(zip(chosen["steering"], chosen["layer"])) == {"a": 1, "b": 0, "d": 4}


def judged(random: np.random.Generator, good: float = 0.0) -> bool:
    """Twenty directions choose among six settings on one half, and the first is judged.

    A move is what the setting does to every direction, what the direction does there, and what the
    prompt adds; strong settings scatter more. `good` is what the first does besides.
    """
    names, settings_, prompts = 20, 6, 8
    scale = np.linspace(0.2, 1.5, settings_)
    true = random.normal(0.3, 1, settings_) + scale * random.normal(size=(names, settings_))
    true[0] += good
    moves = true[..., None] + 2 * random.normal(size=(names, settings_, prompts))
    tried = pd.DataFrame(
        {
            "steering": np.repeat(np.arange(names), settings_),
            "layer": np.tile(np.arange(settings_), names),
            "target_kl": np.tile(scale, names),
            "effect": moves.mean(-1).ravel(),
            "error": (moves.std(-1, ddof=1) / prompts**0.5).ravel(),
        }
    )
    chosen = gentlest_of_the_best(tried)["layer"].to_numpy(dtype=int)
    again = true[np.arange(names), chosen] + random.normal(size=names) / 2
    return bool(beats(again[0], again[1:].tolist(), "others").passed)


def test_choosing_among_settings_makes_no_false_alarms_and_keeps_power():
    """A vector that is one of its controls passes one time in twenty, however settings differ."""
    random = np.random.default_rng(0)
    false = sum(judged(random) for _ in range(400))
    assert false <= stats.binom.ppf(0.999, 400, LEVEL)
    assert false >= stats.binom.ppf(0.001, 400, LEVEL)  # and is not stricter than it says
    assert sum(judged(random, good=6) for _ in range(50)) >= 45


# --- intervals ---


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_an_interval_is_that_of_scipy(values):
    mean, low, high = interval([*values, NAN])
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    if np.std(values) > 1e-6:
        found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (low, high) == pytest.approx((found.low, found.high), abs=1e-6)


def test_an_interval_needs_two_values():
    assert interval([1.0])[0] == 1 and np.isnan(interval([1.0])[1:]).all()
    assert np.isnan(interval([])).all() and np.isnan(interval([NAN])).all()
