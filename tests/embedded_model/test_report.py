"""The card's table: bars, verdicts, and what was missed in front of all."""

import json
import re

import pytest

from embedded_model import card, report
from embedded_model.report import MET, MISSED, ON_AVERAGE, Asked, Figure


@pytest.fixture(scope="module")
def evaluation() -> dict:
    return json.loads((card.HERE / "evaluation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("asked", "verdict"),
    [
        (Asked([96, 97, 98], least=96), MET),
        (Asked([95, 97, 98], least=96), ON_AVERAGE),
        (Asked([95, 96, 96], least=96), MISSED),
        (Asked([4, 5], most=5), MET),
        (Asked([4, 5.5], most=5), ON_AVERAGE),
        (Asked([4, 7], most=5), MISSED),
        (Asked([6, 6], most=5, whole=5), ON_AVERAGE),
    ],
)
def test_a_bar_is_met_by_every_seed_or_on_average(asked: Asked, verdict: str):
    """A mean above the bar hides no seed below it."""
    assert asked.verdict() == verdict


def test_a_row_is_as_good_as_its_worst_figure():
    """It shows the mean and the range of each; without a bar there is no verdict."""
    row = report.figure("tone", " %", [Asked([97.0, 99.0], 96), Asked([90.0, 90.0], 95)])
    assert row == ("tone", ">= 96 / >= 95 %", "98.0 (97.0 to 99.0) / 90.0 %", MISSED)
    assert report.figure("tone", " %", [Asked([1.0])]) == ("tone", "-", "1.0 %", "")


def test_moves_of_other_directions_are_means_over_seeds():
    """Chance that moves a direction to and fro in turn is no move of it."""
    median, largest = report.spread_of_moves([[10, -10], [4, 4], [-9, -1]], 5, 12)
    assert (median.whole, largest.whole) == (4, 5)
    assert (median.values, largest.values) == ([9, 4], [10, 10])


def test_what_was_missed_is_said_first():
    """By name, with figure and bar; then what a single seed may miss."""
    rows = [
        Figure("a", ">= 1", "2", MET),
        Figure("b", ">= 1", "0.5", MISSED),
        Figure("c", ">= 1", "1", ON_AVERAGE),
        Figure("d", "-", "1", ""),
    ]
    assert report.verdict(rows) == (
        "**Missed, 1 of 3:**\n\n- b: 0.5, asked >= 1"
        "\n\n**Met on average, not with every sampling seed:**\n\n- c: 1"
    )
    assert report.verdict(rows[:1]) == "**Nothing is missed:** all 1 bars are met."


def test_card_begins_with_the_verdict_of_its_own_table(evaluation):
    """Every row that says "missed" is named above the table."""
    above, _, table = report.markdown(evaluation).partition("| what |")
    missed = re.findall(r"^\| (.*?) \|.*\| missed \|$", table, re.MULTILINE)
    assert len(missed) == sum(row.verdict == MISSED for row in report.figures(evaluation))
    assert all(what in above for what in missed)


def test_models_stand_side_by_side(evaluation):
    """A column for each, in the order given, and what one misses is marked in its own."""
    other = json.loads(json.dumps(evaluation))
    other["training_seed"] = 99
    seeds = len(other["table"]["love"]["positive"])
    other["table"]["love"]["positive"] = [10.0] * seeds
    lines = report.comparison([evaluation, other]).splitlines()
    first = evaluation["training_seed"]
    assert lines[0] == f"| what | asked for | seed {first} | seed 99 |"
    (row,) = [line for line in lines if line.startswith("| (a) +c positive / -c negative |")]
    _, _, mine, others = row.strip("| ").split(" | ")
    assert "10.0 /" in others and "missed" in others
    assert "10.0 /" not in mine
    assert len(lines) == 2 + len(report.figures(evaluation)) + 3
