"""What steering adds to a pass: the arithmetic on made-up times, and one short run. No times."""

import gc

import numpy as np
import pytest

from benchmarks.added_costs import CONTROL, SIZES, added_table, differences, estimate, plot_added
from benchmarks.mechanism_costs import load_results
from benchmarks.workbench import Workbench, cases
from repository.mechanisms import MECHANISMS

ROUNDS = 101


def pairs(median: float, spread: float, seed: int) -> list[float]:
    """Differences in seconds around a median, noisy to both sides alike."""
    half = np.random.default_rng(seed).exponential(spread, ROUNDS // 2)
    return [median, *(median + half), *(median - half)]


def test_what_is_added_grows_on_a_line():
    """With 20 µs at one block and 60 at five it is 10 for each, and 490 for all 48."""
    found = estimate({1: pairs(20e-6, 0.0, 0), 5: pairs(60e-6, 0.0, 1)}, 48, seconds=0.049)
    assert found["each block"] == pytest.approx([10.0] * 3)
    assert found["microseconds"] == pytest.approx([490.0] * 3)
    assert found["ratio"] == pytest.approx([1.01] * 3)


def test_intervals_hold_the_median_and_tighten_with_less_noise():
    loud, quiet = (
        estimate({1: pairs(20e-6, spread, 0), 5: pairs(20e-6, spread, 1)}, 48, seconds=0.3)
        for spread in (1e-3, 1e-5)
    )
    for found in (loud, quiet):
        for middle, low, high in found.values():
            assert low < middle < high
    widths = [found["microseconds"][2] - found["microseconds"][1] for found in (loud, quiet)]
    assert widths[0] > 50 * widths[1]


def test_single_disturbances_do_not_count():
    """A few runs in which the machine did something else leave the median as it is."""
    calm = pairs(20e-6, 1e-6, 0)
    struck = [1.0 if place % 10 == 0 else value for place, value in enumerate(calm)]
    found = estimate({1: struck, 5: struck}, 6, seconds=0.004)
    assert found["microseconds"][0] == pytest.approx(20, abs=1)


def test_every_mechanism_is_compared_as_often_as_the_control():
    """In one short run; the garbage collector works again afterwards."""
    found = differences(Workbench(cases("cpu", quick=True)[0], "cpu"), rounds=2)
    assert list(found) == [CONTROL, *MECHANISMS]
    assert {len(one) for one in found.values()} == {2} and gc.isenabled()


@pytest.fixture
def results() -> dict:
    """Made-up results of all sizes."""
    one = {"microseconds": [20.0, 10.0, 30.0], "each block": [0.0, -1.0, 1.0]}
    added = {name: {**one, "ratio": [1.001, 0.999, 1.003]} for name in (CONTROL, *MECHANISMS)}
    return {
        "measured": "a day",
        "machine": {"processor": "P", "cores": "2", "torch": "T"},
        "sizes": {
            size: {"blocks": shape["n_layer"], "added": added} for size, (shape, _) in SIZES.items()
        },
    }


def test_the_table_has_microseconds_and_percent(results):
    row = added_table(results, "embedded").loc["pytorch_hooks"]
    assert row[["microseconds", "from", "to"]].tolist() == [20, 10, 30]
    assert row[["%", "% from", "% to"]].tolist() == pytest.approx([0.1, -0.1, 0.3])


def test_the_picture_shows_both_and_the_control(results):
    """Each size has a panel of microseconds and one of ratios; no figure lies on a mark."""
    figure = plot_added(results)
    figure.canvas.draw()
    assert len(figure.axes) == 2 * len(SIZES)
    for axis in figure.axes:
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert names == ["control: unsteered twice", *MECHANISMS]
        assert len(axis.texts) == 1 + len(MECHANISMS)
        assert all(text.get_window_extent().x0 > axis.bbox.x1 for text in axis.texts)


def test_sizes_are_those_of_the_stored_times():
    """Whose unsteered passes the ratio is of; shapes as they were measured."""
    stored = load_results()["models"]
    assert set(SIZES) <= set(stored)
    assert {size: shape["n_embd"] for size, (shape, _) in SIZES.items()} == {
        size: stored[size]["d_model"] for size in SIZES
    }
