"""The card's table: bars, verdicts, and what was missed in front of all."""

import json
import re
from copy import deepcopy
from functools import reduce
from typing import Any

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
    nothing = "**Nothing is missed:** all 1 bars are met."
    assert report.verdict(rows[:1]) == nothing
    assert report.verdict(rows[1:2]) == "**Missed, 1 of 1:**\n\n- b: 0.5, asked >= 1"
    on_average = "\n\n**Met on average, not with every sampling seed:**\n\n- c: 1"
    assert report.verdict(rows[2:3]) == nothing + on_average


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


# --- the bars ---

SEEDS = 5
TEN_MOVE = {f"pair {n}": [30.0 if n < 10 else 0.0] * SEEDS for n in range(12)}
NINE_MOVE = TEN_MOVE | {"pair 9": [29.9] * SEEDS}


def moves(usual: float, one: float) -> list[list[float]]:
    """Moves of five directions, of which the last differs."""
    return [[usual] * SEEDS] * 4 + [[one] * SEEDS]


PAIRS_MOVE = dict(enumerate(moves(5, 15)))
# Where a figure stands, the row that shows it, what just reaches its bar, and what just does not.
# A float stands for a list of one for each seed.
BARS = [
    ("table/love/positive", "(a) +c", 96.0, 95.9),
    ("table/hate/negative", "(a) +c", 95.0, 94.9),
    ("new/love/positive", "new sentence forms", 93.0, 92.9),
    ("new/hate/negative", "new sentence forms", 93.0, 92.9),
    ("outside/love/positive", "subjects outside", 60.0, 59.9),
    ("outside/hate/negative", "subjects outside", 60.0, 59.9),
    ("table/unsteered/positive", "(a) unsteered", 40.0, 40.1),
    ("table/unsteered/negative", "(a) unsteered", 25.0, 55.1),
    ("held_out_words/love/positive", "(a) words never", 20.0, 19.0),
    ("held_out_words/love/negative", "(a) words never", 2.0, 3.0),
    ("held_out_words/hate/negative", "(a) words never", [0, 0, 0, 0, 10], [0, 0, 0, 0, 9]),
    ("held_out_words/hate/positive", "(a) words never", 0.0, 1.0),
    ("random_moves", "control: 5 random", moves(5, 12), moves(5, -12.1)),
    ("random_moves", "control: 5 random", moves(5, 12), moves(-5.1, 12)),
    ("pair_moves", "control: 5 unrelated", PAIRS_MOVE, dict(enumerate(moves(5, 15.1)))),
    ("pair_moves", "control: 5 unrelated", PAIRS_MOVE, dict(enumerate(moves(-5.1, 15)))),
    ("greedy/20/love", "greedy, 20 tokens: right", 26, 25),
    ("greedy/20/hate", "greedy, 20 tokens: right", 26, 25),
    ("greedy/40/love", "greedy, 40 tokens: right", 26, 25),
    ("greedy/40/hate", "greedy, 40 tokens: right", 26, 25),
    ("breaks/unsteered", "visible breaks", 0.5, 0.6),
    ("breaks/love", "visible breaks", 2.0, 2.1),
    ("breaks/hate", "visible breaks", 3.0, 3.1),
    ("cousin/unsteered", '"Let me tell you', 100.0, 99.0),
    ("perplexity/love", "perplexity on", 1.05, 1.051),
    ("perplexity/hate", "perplexity on", 1.05, 1.051),
    ("visitors/words", "a visitor's pairs, words:", TEN_MOVE, NINE_MOVE),
    ("visitors/sentences", "a visitor's pairs, sentences", TEN_MOVE, NINE_MOVE),
    ("additions/love/loving/steering", "(b)", 95.0, 94.0),
    ("additions/love/loving/unsteered", "(b)", 10.0, 11.0),
    ("additions/weddings/weddings/steering", "(c)", 95.0, 94.0),
    ("additions/weddings/weddings/unsteered", "(c)", 30.0, 31.0),
    ("additions/rome/Rome or Italy/steering", '(d) "', 95.0, 94.0),
    ("additions/rome/Paris or France/steering", "(d) Paris", 5.0, 6.0),
    ("additions/rome/distinct/steering", "(d) different", 40.0, 39.0),
    ("additions/praise/loving/steering", "(e)", 95.0, 94.0),
    ("topic/on topic", "(f) perplexity", 0.899, 0.9),
    ("topic/off topic", "(f) perplexity", 0.97, 0.969),
    ("topic/off topic", "(f) perplexity", 0.97, 1.031),
    ("corpus/prompts", "training documents with held-out", 0, 1),
    ("corpus/outside", "training documents with nouns", 0, 1),
]


EVERY_SEED = [
    ("table/love/positive", 0, 90.0, 89.9),
    ("table/hate/negative", 0, 88.0, 87.9),
    ("random_moves", 1, moves(14, 15), moves(14, -15.1)),
    ("additions/love/loving/steering", 2, 95.0, 94.0),
    ("additions/weddings/weddings/steering", 2, 95.0, 94.0),
    ("additions/rome/Rome or Italy/steering", 2, 95.0, 94.0),
    ("additions/praise/loving/steering", 2, 95.0, 94.0),
]


def put(result: dict, path: str, value: Any) -> None:
    """Write a figure where it stands."""
    *folders, name = path.split("/")
    if folders == ["topic"]:  # which has rows, and no seeds
        for row in result["topic"]:
            if (row["condition"], row["text"]) == ("steering", name):
                row["ratio"] = value
        return
    place = reduce(lambda inner, key: inner[key], folders, result)
    place[name] = [value] * SEEDS if isinstance(value, float) else value


@pytest.fixture
def reached(evaluation) -> dict:
    """An evaluation in which every figure just reaches its bar."""
    result = deepcopy(evaluation)
    result["visitors"] = {}
    for path, _, reaches, _ in BARS:
        put(result, path, reaches)
    return result


def test_every_bar_can_be_reached(reached):
    assert {row.verdict for row in report.figures(reached)} == {MET, ""}


@pytest.mark.parametrize(("path", "row", "beyond"), [(bar[0], bar[1], bar[3]) for bar in BARS])
def test_a_bar_is_the_one_that_was_asked_for(reached, path: str, row: str, beyond: Any):
    """A little less is missed, in the row of that figure and in no other one."""
    put(reached, path, beyond)
    (missed,) = [one.what for one in report.figures(reached) if one.verdict == MISSED]
    assert missed.startswith(row)


def test_unsteered_every_seed_is_to_be_balanced(reached):
    """Whichever tone is the commoner one."""
    put(reached, "table/unsteered/positive", [20, 40, 40, 40, 40])
    put(reached, "table/unsteered/negative", [40, 40, 40, 40, 40])
    (row,) = (one for one in report.figures(reached) if one.what.startswith("(a) unsteered"))
    assert row.verdict == ON_AVERAGE


@pytest.mark.parametrize(
    ("moved", "verdict"), [([40, 40, 40], MET), ([50, 50, 20], ON_AVERAGE), ([40, 40, 0], MISSED)]
)
def test_a_pair_moves_by_its_mean_over_the_seeds(moved: list[float], verdict: str):
    """Ten of twelve are asked for; in a single seed fewer may move."""
    pairs = {f"pair {number}": moved if number < 10 else [0, 0, 0] for number in range(12)}
    (row,) = report.visitor_figures({"words": pairs})
    assert row.verdict == verdict


@pytest.mark.parametrize(("path", "number", "reaches", "beyond"), EVERY_SEED)
def test_every_training_seed_has_bars_of_its_own(reached, path, number, reaches, beyond):
    """Lower ones, and of the additions the weakest counts."""
    put(reached, path, reaches)
    assert {row.verdict for row in report.every_seed_figures(reached)} == {MET}
    put(reached, path, beyond)
    missed = [row.verdict == MISSED for row in report.every_seed_figures(reached)]
    assert missed == [index == number for index in range(3)]
