"""The search for a target: it gets there on any growing curve, and its bracket only narrows."""

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.sweeping.searching import Search, search

TOLERANCE, PASSES = 0.01, 12


def saturating(unit: float, power: float, top: float):
    """As a divergence grows: with a power of x at first, and not above `top`."""
    return lambda x: top * -math.expm1(-((x / unit) ** power))


def run(curve, start: float, target: float, passes: int = PASSES) -> tuple[Search, list]:
    """A search, and its bracket after each pass."""
    brackets = []

    one = Search(start, target, TOLERANCE)
    for _ in range(passes):
        if one.done:
            break
        x = one.next()
        one.note(x, curve(x))
        brackets.append(one.bracket)
    return one, brackets


@given(
    unit=st.floats(1e-3, 1e3),
    power=st.floats(1.0, 3.0),
    top=st.floats(1.0, 30.0),
    share=st.floats(0.01, 0.9),
    start=st.floats(-3, 1),
)
@example(unit=1.0, power=2.98, top=16.8, share=0.94, start=-0.86)  # a plain secant creeps here
@example(unit=1.0, power=2.92, top=16.9, share=0.87, start=0.97)  # flat where it begins
def test_a_growing_curve_meets_its_target_in_twelve_passes(unit, power, top, share, start):
    """From a thousandth of the natural unit to ten of it; the value is the target again."""
    curve, target = saturating(unit, power, top), share * top
    (one,) = search(
        lambda wanted: {number: curve(x) for number, x in wanted.items()},
        [unit * 10**start],
        target,
        TOLERANCE,
        PASSES,
    )
    x, value = one.seen[-1]
    assert one.done and value == curve(x) == pytest.approx(target, rel=TOLERANCE)
    assert len(one.seen) <= PASSES


@given(
    unit=st.floats(1e-2, 1e2),
    share=st.floats(0.05, 0.9),
    start=st.floats(-2, 1),
    jump=st.booleans(),
)
def test_the_bracket_only_narrows_and_holds_what_comes_next(unit, share, start, jump):
    """On curves without a solution too: here one that jumps over the target."""
    smooth = saturating(unit, 2.0, 1.0)
    curve = (lambda x: 3.0 * (smooth(x) > share) + 0.01) if jump else smooth
    one, brackets = run(curve, unit * 10**start, share)
    assert one.done is not jump
    for (low, high), (next_low, next_high) in itertools.pairwise(brackets):
        assert low is None or next_low >= low
        assert high is None or next_high <= high
    low, high = brackets[-1]
    if jump:
        assert low < high and curve(low) < share < curve(high) and low < one.next() < high


def noted(*points: tuple[float, float]) -> Search:
    one = Search(1.0, 1.0, TOLERANCE)
    for x, height in points:
        one.note(math.exp(x), math.exp(height) if math.isfinite(height) else max(height, 0.0))
    return one


@pytest.mark.parametrize("sign", [-1, 1])
def test_an_end_that_stays_counts_half(sign):
    """All on logarithms; the first time it stays it counts whole, then half, then a quarter."""
    one = noted((0.0, -sign), (2.0 * sign, sign))
    assert math.log(one.next()) == pytest.approx(sign)
    for factor in (1, 2, 4):
        x = math.log(one.next())
        one.note(math.exp(x), math.exp(-0.1 * sign))
        weight = 0.1 / (0.1 + 1 / factor)
        assert math.log(one.next()) == pytest.approx(x + (2.0 * sign - x) * weight)


def test_between_ends_without_a_height_lies_the_middle():
    """A curve that is 0 below and no number above; and no step ends at an end."""
    assert noted((0.0, -math.inf), (4.0, math.inf)).next() == pytest.approx(math.exp(2.0))
    assert noted((0.0, -600.0), (4.0, 0.1)).next() == pytest.approx(math.exp(3.96))
    assert noted((0.0, -0.1), (4.0, 600.0)).next() == pytest.approx(math.exp(0.04))


def test_what_is_no_number_is_too_much():
    """A multiplier at which the model overflows lies above the solution."""
    one, _ = run(lambda x: x if x < 5 else math.nan, 100.0, 2.0)
    assert one.done and one.seen[-1][0] == pytest.approx(2.0, rel=TOLERANCE)


@pytest.mark.parametrize("value, side", [(0.5, 0), (0.0, 0), (9.0, 1), (math.inf, 1)])
def test_a_curve_that_stays_on_one_side_has_no_solution(value, side):
    one, _ = run(lambda x: value, 1.0, 2.0)
    assert not one.done and len(one.seen) == PASSES
    assert one.bracket[side] is not None and one.bracket[1 - side] is None


def test_only_open_curves_are_measured():
    """All in one pass; one that is there costs nothing more."""
    curves, asked = [lambda x: x, lambda x: x**2, lambda x: 0.0], []

    def measure(wanted):
        asked.append(sorted(wanted))
        return {number: curves[number](x) for number, x in wanted.items()}

    found = search(measure, [4.0, 0.1, 1.0], 4.0, TOLERANCE, PASSES)
    assert [one.done for one in found] == [True, True, False]
    assert asked[0] == [0, 1, 2] and asked[1] == [1, 2] and asked[-1] == [2]
    assert len(asked) == PASSES and len(found[0].seen) == 1
    assert found[1].seen[-1][0] == pytest.approx(2.0, rel=TOLERANCE)
