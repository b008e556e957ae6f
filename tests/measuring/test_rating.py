"""Blind rating: the origin stays hidden, no rating is lost, and the report counts right."""

import csv
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.measuring import rating
from common.measuring.rating import (
    QUESTION,
    RatingSession,
    Report,
    describe,
    rating_widget,
    ratings_to_csv,
    read_completions,
    report,
)
from repository.mechanisms import ROOT

GIVEN_AWAY = ("steered", "modified", "true", "false")


def table(count: int = 8) -> pd.DataFrame:
    """Completions, the unsteered ones first, with texts that CSV, HTML or a terminal may mangle."""
    texts = [f"text {row}" for row in range(count)]
    nasty = ['a "pet",\nno\n\n"', "<b>&amp; [bold]é\x1b\r", "NA", "NA"]
    texts[max(0, count - len(nasty)) :] = nasty[-count:]
    prompts = [f"I think {'dogs' if row % 2 else 'cats'} are " for row in range(count)]
    return pd.DataFrame(
        {
            "prompts": prompts,
            "completions": texts,
            "is_modified": [row >= count // 2 for row in range(count)],
        }
    )


def flipped(completions: pd.DataFrame) -> pd.DataFrame:
    return completions.assign(is_modified=~completions["is_modified"])


def score(row: tuple[str, str]) -> int:
    """A rating from 1 to 5 that depends on the text alone."""
    return 1 + sum(map(ord, "".join(row))) % 5


def rate(session: RatingSession, count: int | None = None) -> RatingSession:
    """Rate some completions, or all that are left."""
    while session.current is not None and (count is None or count > 0):
        session.rate(score(session.current))
        count = count and count - 1
    return session


def rate_rows(
    completions: pd.DataFrame, path: Path, values: list[int], scale: tuple[int, int] = (1, 5)
) -> Report:
    """Give the completion in each row its own rating, and report."""
    session = RatingSession(completions, path, scale=scale)
    while session.current is not None:
        [row] = completions.index[completions["completions"] == session.current[1]]
        session.rate(values[row])
    return report(completions, path)


def two_sides(steered: list[int], unsteered: list[int]) -> tuple[pd.DataFrame, list[int]]:
    """A table with a row for each rating, and the ratings in the order of the rows."""
    values = unsteered + steered
    origins = [False] * len(unsteered) + [True] * len(steered)
    texts = [f"text {row}" for row in range(len(values))]
    return pd.DataFrame({"prompts": "I", "completions": texts, "is_modified": origins}), values


def lines(path: Path) -> list[dict]:
    """What the lines of a file say."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def saved(path: Path) -> list[int | None]:
    """The ratings in the lines of a file, None where one is taken back."""
    return [line["rating"] for line in lines(path)]


def run(*arguments: str | Path, answers: str = "") -> subprocess.CompletedProcess:
    """Run the command with answers on its standard input."""
    command = [sys.executable, "-m", "common.measuring.rating", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, input=answers, capture_output=True, encoding="utf-8", timeout=60
    )


# --- blind ---


def test_what_is_shown_and_saved_does_not_depend_on_the_origin(tmp_path):
    """Exchange all origins: the same texts come in the same order, and the file is the same."""
    shown = []
    for name, completions in (("one", table()), ("other", flipped(table()))):
        session = RatingSession(completions, tmp_path / name)
        while session.current is not None:
            shown.append(session.current)
            session.rate(score(session.current))
    assert shown[:8] == shown[8:] and sorted(shown[:8]) == sorted(
        zip(table()["prompts"], table()["completions"])
    )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert not any(word in (tmp_path / "one").read_text().lower() for word in GIVEN_AWAY)


def test_the_file_shows_no_row_number(tmp_path):
    """The order of neither rows nor ids is that of the table, where origins lie in blocks."""
    rate(session := RatingSession(table(), tmp_path / "ratings.jsonl"))
    ids = [line["id"] for line in lines(tmp_path / "ratings.jsonl")]
    rows = list(session.ratings)
    assert len(set(ids)) == 8 and sorted(rows) == list(range(8)) and rows != sorted(rows)
    assert [row for _, row in sorted(zip(ids, rows))] != sorted(rows)


def test_order_is_random_and_stable(tmp_path):
    """The order mixes the origins and follows its seed; the global random state is left alone."""

    def order(seed: int) -> list[int]:
        random.seed(seed * 7)
        before = random.getstate()
        rows = list(
            rate(RatingSession(table(40), tmp_path / f"{random.random()}", seed=seed)).ratings
        )
        random.setstate(before)
        return rows

    orders = [order(seed) for seed in (0, 1, 2)]
    random.seed(99)
    state = random.getstate()
    again = list(rate(RatingSession(table(40), tmp_path / "again", seed=1)).ratings)
    assert random.getstate() == state and again == orders[1]
    assert len({tuple(rows) for rows in orders}) == 3
    for rows in orders:
        changes = sum((left < 20) != (right < 20) for left, right in itertools.pairwise(rows))
        assert 10 < changes < 30  # 19.5 on average


def test_two_tables_of_equal_size_have_two_orders(tmp_path):
    """Whoever has seen the origins of one table learns nothing about the next one."""
    orders = []
    for name in ("one", "other"):
        completions = table(40).assign(prompts=name)
        orders.append(list(rate(RatingSession(completions, tmp_path / name)).ratings))
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


# --- nothing is lost ---


def test_each_rating_is_on_disk_when_rate_returns(tmp_path, monkeypatch):
    """After each rating the file holds it, and the system was asked to write it to the disk."""
    path, synced = tmp_path / "folder" / "ratings.jsonl", []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (fsync(descriptor), synced.append(path.read_bytes()))
    )
    completions = table()
    session = RatingSession(completions, path)
    assert not path.exists()
    for count in range(1, 9):
        prompt, completion = session.current
        session.rate(score((prompt, completion)))
        assert len(synced) == count and synced[-1] == path.read_bytes()
        last = lines(path)[-1]
        assert last.pop("id") and last == {
            "prompt": prompt,
            "completion": completion,
            "question": QUESTION,
            "scale": [1, 5],
            "rating": score((prompt, completion)),
        }
        assert len(lines(path)) == count
    assert session.current is None and session.ratings.keys() == set(range(8))


def test_killed_session_loses_nothing(tmp_path):
    """A process killed in the middle of a write leaves every rating that it had taken."""
    table().to_csv(tmp_path / "completions.csv", index=False)
    code = """
import os, signal, sys
from common.measuring import rating
session = rating.RatingSession(rating.read_completions(rating.Path(sys.argv[1])), sys.argv[2])
for count in range(5):
    session.rate(4)
    print(count, flush=True)
def killed(descriptor):
    os.ftruncate(descriptor, os.fstat(descriptor).st_size - 9)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
session.rate(5)
"""
    command = [sys.executable, "-c", code, tmp_path / "completions.csv", tmp_path / "ratings.jsonl"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.split()) == (-signal.SIGKILL, list("01234"))
    session = RatingSession(table(), tmp_path / "ratings.jsonl")
    assert list(session.ratings.values()) == [4] * 5
    assert (
        rate(session, 1).ratings.keys()
        == rate(RatingSession(table(), tmp_path / "other"), 6).ratings.keys()
    )


@given(st.integers(1, 12), st.lists(st.integers(0, 5), max_size=6), st.integers(0, 9))
def test_any_interruptions_give_the_same_file(
    tmp_path_factory, count: int, parts: list[int], seed: int
):
    """However the work is split into sessions, the file ends as after one session."""
    folder = tmp_path_factory.mktemp("split")
    rate(RatingSession(table(count), folder / "whole", seed=seed))
    done = 0
    for part in parts:
        rate(session := RatingSession(table(count), folder / "split", seed=seed), part)
        done = min(done + part, count)
        assert len(session.ratings) == done
    rate(RatingSession(table(count), folder / "split", seed=seed))
    assert (folder / "split").read_bytes() == (folder / "whole").read_bytes()


def test_half_written_end_is_asked_again(tmp_path):
    """A cut file keeps its whole lines; finishing it gives the whole file."""
    path = tmp_path / "ratings.jsonl"
    rate(whole := RatingSession(table(), path))
    data = path.read_bytes()
    first, last = data.index(b"\n") + 1, data.rindex(b"\n", 0, -1) + 1
    for cut in [*range(first + 9), *range(last - 9, len(data) + 1)]:
        for tail in (b"", b"\0" * 20):
            path.write_bytes(data[:cut] + tail)
            session = RatingSession(table(), path)
            count = data[:cut].count(b"\n")
            assert list(session.ratings.items()) == list(whole.ratings.items())[:count]
            assert path.read_bytes() == data[:cut] + tail
            result = report(table(), path)
            assert result.n_steered + result.n_unsteered == count
        if cut % 10 == 0 and session.current is not None:
            rate(session)
            assert path.read_bytes() == data


def test_half_written_end_can_be_taken_back(tmp_path):
    """A line that takes a rating back may be half-written too; the next line is whole."""
    path = tmp_path / "ratings.jsonl"
    rate(session := RatingSession(table(), path), 3)
    session.undo()
    path.write_bytes(path.read_bytes()[:-5])
    session = RatingSession(table(), path)
    assert len(session.ratings) == 3
    session.undo()
    assert saved(path)[-1] is None and len(saved(path)) == 4 and len(session.ratings) == 2


def test_failed_write_is_no_rating(tmp_path, monkeypatch):
    """If the disk takes half a line, the session says so, and goes on once there is room."""
    path = tmp_path / "ratings.jsonl"
    rate(session := RatingSession(table(), path), 2)
    before, shown = path.read_bytes(), session.current

    def full(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 9)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            session.rate(1)
    assert path.read_bytes().startswith(before) and session.current == shown
    session.rate(2)
    assert saved(path)[2:] == [2] and path.read_bytes().startswith(before)


@given(st.integers(1, 8), st.integers(1, 9))
def test_undo_takes_back_one_rating_each(tmp_path_factory, rated: int, undone: int):
    """After n undos the ratings are those of n ratings before; the file only grows."""
    path = tmp_path_factory.mktemp("undo") / "ratings.jsonl"
    session, states, shown = RatingSession(table(), path), [], []
    for _ in range(rated):
        states.append(session.ratings)
        shown.append(session.current)
        session.rate(3)
    for step in range(undone):
        before = path.read_bytes()
        if step % 2:
            session = RatingSession(table(), path)
        assert (
            session.undo() == session.current == shown[max(0, rated - step - 1)]
            if step < rated
            else session.undo() is None
        )
        assert path.read_bytes().startswith(before)
    left = max(0, rated - undone)
    assert session.ratings == (states[left] if left < rated else session.ratings)
    assert len(session.ratings) == left
    assert saved(path) == [3] * rated + [None] * min(rated, undone)
    rate(session)
    assert RatingSession(table(), path).ratings.keys() == set(range(8))


def test_second_session_on_the_same_file_overwrites_nothing(tmp_path):
    """A session whose file grew meanwhile saves nothing, reads the file again, and then goes on."""
    path = tmp_path / "ratings.jsonl"
    first, second = RatingSession(table(), path), RatingSession(table(), path)
    rate(first, 2)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another session wrote"):
        second.rate(1)
    assert (
        path.read_bytes() == before
        and second.ratings == first.ratings
        and second.current == first.current
    )
    rate(second)
    with pytest.raises(ValueError, match="another session wrote"):
        first.undo()
    assert len(first.ratings) == 8 and path.read_bytes().startswith(before)


# --- what is refused ---


def _other_text(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(completions=["another", *rows["completions"][1:]])


def _other_prompt(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(prompts=["another", *rows["prompts"][1:]])


def _other_order(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.iloc[::-1]


def _one_more(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([rows, rows.iloc[:1]])


@pytest.mark.parametrize("alter", [_other_text, _other_prompt, _other_order, _one_more])
def test_ratings_of_other_completions_are_refused(tmp_path, alter: Callable):
    """Neither a session nor a report takes a file of other completions; the file stays."""
    path = tmp_path / "ratings.jsonl"
    rate(RatingSession(table(), path), 3)
    before = path.read_bytes()
    for use in (RatingSession, report):
        with pytest.raises(
            ValueError, match="holds something other than ratings of these completions"
        ):
            use(alter(table()), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "changed", [{"question": "How funny?"}, {"scale": (1, 7)}, {"scale": (0, 5)}]
)
def test_ratings_for_another_question_or_scale_are_refused(tmp_path, changed: dict):
    """The error names both questions and scales; the report takes its own from the file."""
    path = tmp_path / "ratings.jsonl"
    rate(RatingSession(table(), path, **changed), 3)
    before = path.read_bytes()
    with pytest.raises(
        ValueError,
        match=(
            r"holds ratings for the question .* on the scale . to ., not for .* on the scale 1 to 5"
        ),
    ):
        RatingSession(table(), path)
    assert path.read_bytes() == before
    assert report(table(), path).n_steered + report(table(), path).n_unsteered == 3


def _other_bytes(lines: list[bytes]) -> list[bytes]:
    return [b"\x89PNG\r\n\x1a\n\0\0"]


def _other_csv(lines: list[bytes]) -> list[bytes]:
    return [b"prompts,completions,is_modified\n", b"I,am,True\n"]


def _other_json(lines: list[bytes]) -> list[bytes]:
    return [b'{"prompt": "I", "completion": "am"}\n', b"[1, 2]\n"]


def _no_line_end(lines: list[bytes]) -> list[bytes]:
    return [*lines, b"notes of somebody"]


def _only_notes(lines: list[bytes]) -> list[bytes]:
    return [b"notes of somebody"]


def _odd_scale(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b"[1, 5]", b"[1]"), *lines[1:]]


def _changed_text(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b'"text', b'"Text'), *lines[1:]]


def _changed_rating(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1][:-3] + b"9}\n"]


def _truth_as_rating(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1][:-3] + b"true}\n"]


def _taken_back_twice(lines: list[bytes]) -> list[bytes]:
    return [*lines, *[lines[-1][:-3] + b"null}\n"] * 2]


def _doubled_line(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[-1]]


def _rated_twice(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[-1][:-3] + b"1}\n"]


def _broken_in_the_middle(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1][:-9], *lines[2:]]


@pytest.mark.parametrize(
    "alter",
    [
        _other_bytes,
        _other_csv,
        _other_json,
        _no_line_end,
        _only_notes,
        _odd_scale,
        _changed_text,
        _changed_rating,
        _truth_as_rating,
        _doubled_line,
        _rated_twice,
        _taken_back_twice,
        _broken_in_the_middle,
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, alter: Callable):
    """What no session wrote is refused and kept: only the end of a file may be missing."""
    path = tmp_path / "ratings.jsonl"
    completions, values = two_sides([3] * 3, [4] * 3)
    rate_rows(completions, path, values)
    path.write_bytes(b"".join(alter(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    for use in (RatingSession, report):
        with pytest.raises(
            ValueError, match="holds something other than ratings of these completions"
        ):
            use(completions, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (table().drop(columns="prompts"), "expected the columns .* got none called 'prompts'"),
        (
            table().drop(columns="is_modified"),
            "expected the columns .* got none called 'is_modified'",
        ),
        (table().iloc[:0], "at least one completion"),
        (table().assign(is_modified=[True] * 7 + [None]), "True or False as is_modified, got None"),
        (table().assign(is_modified=range(8)), "True or False as is_modified, got .*2"),
        (
            table().assign(completions=["a"] * 7 + [math.nan]),
            r"expected text .* got \('I think dogs are ', nan\)",
        ),
        (table().assign(prompts=range(8)), "expected text"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, completions: pd.DataFrame, message: str):
    """Missing columns, no rows, an origin that is neither True nor False, and what is no text."""
    for use in (RatingSession, report):
        with pytest.raises(ValueError, match=message):
            use(completions, tmp_path / "ratings.jsonl")


@pytest.mark.parametrize(
    "origins",
    [[0, 1], ["False", "true"], np.array([False, True]), pd.array([False, True], dtype="boolean")],
)
def test_origins_in_any_spelling(tmp_path, origins: object):
    """What a CSV file or numpy makes of True and False is understood."""
    completions = pd.DataFrame(
        {"prompts": "I", "completions": ["no", "yes"], "is_modified": origins}
    )
    assert rate_rows(completions, tmp_path / "ratings.jsonl", [1, 5]).difference == 4


def test_wrong_settings_and_ratings_are_refused(tmp_path):
    """Questions that ask nothing, empty scales, ratings off the scale: nothing is saved."""
    path = tmp_path / "ratings.jsonl"
    for settings in (
        {"question": " "},
        {"scale": (5, 1)},
        {"scale": (1, 1)},
        {"scale": (1.0, 5)},
        {"scale": (1, 3, 5)},
    ):
        with pytest.raises(ValueError, match="expected "):
            RatingSession(table(), path, **settings)
    session = RatingSession(table(), path)
    for value in (0, 6, 2.5, "3", True, None, math.nan):
        with pytest.raises(ValueError, match="expected a whole number from 1 to 5"):
            session.rate(value)
    assert not path.exists()
    rate(session)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="all completions are rated"):
        session.rate(3)
    assert path.read_bytes() == before


# --- spreadsheets ---

FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'quoted'",
    "''",
    "= not",
    "plain",
    "",
    " =1",
    "007",
]


def formulas() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompts": ["=A1", *FORMULAS[1:]],
            "completions": FORMULAS,
            "is_modified": [row % 2 for row in range(13)],
        }
    )


@given(st.lists(st.text() | st.sampled_from(FORMULAS), min_size=4, max_size=4))
def test_texts_come_back_and_none_is_a_formula(tmp_path_factory, texts: list[str]):
    """What is exported are the ratings in their order, and no cell begins as a formula does."""
    folder = tmp_path_factory.mktemp("csv")
    completions = pd.DataFrame(
        {"prompts": texts[:2], "completions": texts[2:], "is_modified": [True, False]}
    )
    rate(session := RatingSession(completions, folder / "ratings", "= " + texts[0], (-3, 5)))
    ratings_to_csv(completions, folder / "ratings", folder / "csv")
    assert not any(word in (folder / "csv").read_text() for word in ("is_modified", "steered"))
    with open(folder / "csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "prompt", "completion", "question", "rating", "scale"]
    for cells, (row, value) in zip(rows, session.ratings.items(), strict=True):
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for cell in cells)
        plain = [cell[1:] if cell.startswith("'") else cell for cell in cells]
        asked = ["= " + texts[0], str(value), "-3 to 5"]
        assert plain[1:] == [texts[row], texts[row + 2], *asked]


def test_export_of_nothing_and_over_something(tmp_path):
    """Without ratings there is a header alone; a file that is there stays."""
    ratings_to_csv(table(), tmp_path / "ratings", tmp_path / "csv")
    before = (tmp_path / "csv").read_bytes()
    assert len(before.splitlines()) == 1
    rate(RatingSession(table(), tmp_path / "ratings"), 2)
    with pytest.raises(FileExistsError):
        ratings_to_csv(table(), tmp_path / "ratings", tmp_path / "csv")
    assert (tmp_path / "csv").read_bytes() == before


EARLIER = ["id", "prompt", "completion", "question", "lowest", "highest", "rating"]


@pytest.mark.parametrize("saved", [{"quoting": csv.QUOTE_NONNUMERIC}, {"sep": ";"}, {"sep": "\t"}])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_ratings_of_an_earlier_version_are_refused(tmp_path, saved: dict, encoding: str):
    """Ratings were CSV, perhaps saved again by a spreadsheet: the error says so, the file stays."""
    path = tmp_path / "ratings.csv"
    row = ["0123456789abcdef", "I think dogs are ", "text 1", QUESTION, 1, 5, 3]
    pd.DataFrame([row], columns=EARLIER).to_csv(path, index=False, encoding=encoding, **saved)
    before = path.read_bytes()
    for use in (RatingSession, report):
        with pytest.raises(ValueError, match="ratings as CSV, as an earlier version saved them"):
            use(table(), path)
    assert path.read_bytes() == before


def test_spoiled_while_a_session_runs(tmp_path):
    """A session whose file became something else saves nothing to it, however often it is asked."""
    path = tmp_path / "ratings.jsonl"
    rate(session := RatingSession(table(), path), 3)
    other = b"something else, and longer than the file was" * 20
    path.write_bytes(other)
    for _ in range(3):
        with pytest.raises(ValueError, match="something other than ratings"):
            session.rate(3)
    assert path.read_bytes() == other and len(session.ratings) == 3


# --- the report ---


def test_report_by_hand(tmp_path):
    """Variances 1 and 1 of 3 each: 4 degrees of freedom, 2 ± 2.7764 · sqrt(2/3) = 2 ± 2.2670."""
    completions, values = two_sides([3, 4, 5], [1, 2, 3])
    result = rate_rows(completions, tmp_path / "ratings.jsonl", values)
    assert (result.total, result.n_steered, result.n_unsteered) == (6, 3, 3)
    assert (result.mean_steered, result.mean_unsteered, result.difference) == (4, 2, 2)
    assert (result.low, result.high) == pytest.approx((-0.2670, 4.2670), abs=1e-4)
    assert (
        describe(result)
        == "Steered 4.00, unsteered 2.00 (3 and 3 ratings): difference 2.00, 95 % interval -0.27 to"
        " 4.27, which includes 0: steered and unsteered cannot be told apart."
    )


SIDE = st.lists(st.integers(1, 5), min_size=2, max_size=8)


@given(SIDE, SIDE)
def test_report_agrees_with_the_formula(tmp_path_factory, steered: list[int], unsteered: list[int]):
    """Welch's interval, written out; where neither side has a spread there is none."""
    completions, values = two_sides(steered, unsteered)
    result = rate_rows(completions, tmp_path_factory.mktemp("report") / "ratings.jsonl", values)
    means = [statistics.fmean(side) for side in (steered, unsteered)]
    assert [result.mean_steered, result.mean_unsteered] == pytest.approx(means)
    assert result.difference == pytest.approx(means[0] - means[1])
    if len({*steered}) == len({*unsteered}) == 1:
        assert math.isnan(result.low) and math.isnan(result.high)
        assert "no interval" in describe(result)
        return
    parts = [statistics.variance(side) / len(side) for side in (steered, unsteered)]
    squares = [part**2 / (len(side) - 1) for part, side in zip(parts, (steered, unsteered))]
    margin = stats.t.ppf(0.975, sum(parts) ** 2 / sum(squares)) * math.sqrt(sum(parts))
    expected = result.difference - margin, result.difference + margin
    assert (result.low, result.high) == pytest.approx(expected)
    assert ("cannot be told apart" in describe(result)) == (result.low <= 0 <= result.high)


@given(SIDE, SIDE, st.integers(-3, 3))
def test_shifted_ratings_shift_the_difference(
    tmp_path_factory, steered: list[int], unsteered: list[int], shift: int
):
    """Steered ratings higher by s move everything by s; exchanged origins turn the sign."""
    folder = tmp_path_factory.mktemp("shift")
    completions, values = two_sides(steered, unsteered)
    _, moved = two_sides([value + shift for value in steered], unsteered)
    before = rate_rows(completions, folder / "before", values, scale=(-9, 9))
    after = rate_rows(completions, folder / "after", moved, scale=(-9, 9))
    turned = report(flipped(completions), folder / "after")
    for name in ("difference", "low", "high"):
        assert getattr(after, name) == pytest.approx(getattr(before, name) + shift, nan_ok=True)
    assert (turned.difference, turned.low, turned.high) == pytest.approx(
        (-after.difference, -after.high, -after.low), nan_ok=True
    )


def test_few_ratings_give_no_interval(tmp_path):
    """With fewer than two ratings on a side the sentence says what is missing."""
    completions, values = two_sides([5], [1, 2])
    few = rate_rows(completions, tmp_path / "few", values)
    assert (few.difference, math.isnan(few.low), math.isnan(few.high)) == (3.5, True, True)
    assert (
        describe(few)
        == "Steered 5.00, unsteered 1.50 (1 and 2 ratings): difference 3.50, an interval needs at"
        " least 2 ratings on each side."
    )
    none = report(completions, tmp_path / "none")
    assert math.isnan(none.difference) and (none.n_steered, none.n_unsteered, none.total) == (
        0,
        0,
        3,
    )
    assert describe(none).startswith(
        "So far (0 of 3 rated): Steered none, unsteered none (0 and 0 ratings): an interval needs"
    )


def test_sentence_says_what_is_known():
    """A clear difference is stated plainly, an unfinished one as such, and no zero has a sign."""
    clear = Report(48, 24, 24, 3.9, 2.1, 1.8, 1.2, 2.4)
    assert (
        describe(clear)
        == "Steered 3.90, unsteered 2.10 (24 and 24 ratings): difference 1.80, 95 % interval 1.20"
        " to 2.40."
    )
    assert "cannot be told apart" not in describe(Report(48, 24, 24, 2.1, 3.9, -1.8, -2.4, -1.2))
    for low, high in ((0.0, 2.0), (-2.0, 0.0), (-1.0, 1.0)):
        assert "cannot be told apart" in describe(
            Report(48, 24, 24, 3.0, 2.0, (low + high) / 2, low, high)
        )
    assert (
        describe(Report(50, 24, 24, 3.9, 2.1, 1.8, 1.2, 2.4))
        == f"So far (48 of 50 rated): {describe(clear)}"
    )
    assert "-0.00" not in describe(Report(4, 2, 2, 2.0, 2.001, -0.001, -0.002, -0.001))


# --- the terminal ---


def test_command_asks_until_all_is_rated(tmp_path):
    """Wrong input asks again, u undoes, q and end of input stop, the same command goes on."""
    path, ratings = tmp_path / "texts.csv", tmp_path / "texts.ratings.jsonl"
    table().to_csv(path, index=False)
    first = run(path, answers="u\n9\nwell\n\n1\nu\n4\n2\n Q \n5\n")
    assert (first.returncode, first.stderr) == (0, "")
    assert (
        "There is no rating to take back." in first.stdout
        and first.stdout.count("Not saved: ") == 3
    )
    assert (
        f"Stopped: 2 of 8 are rated and saved in {str(ratings)!r}. To go on, run the same command"
        " again." in first.stdout
    )
    assert saved(ratings) == [1, None, 4, 2]

    second = run(path, answers="3\n")
    assert (second.returncode, second.stderr) == (
        0,
        "",
    ) and "Stopped: 3 of 8 are rated" in second.stdout
    so_far = run(path, "--report")
    assert (so_far.returncode, so_far.stderr) == (0, "")
    assert so_far.stdout.strip() == describe(
        report(table(), ratings)
    ) and so_far.stdout.strip().startswith("So far (3 of 8")

    last = run(path, answers="3\n1\n5\n2\n4\n")
    assert (last.returncode, last.stderr) == (0, "")
    assert saved(ratings) == [1, None, 4, 2, 3, 3, 1, 5, 2, 4]
    assert last.stdout.splitlines()[-1] == describe(report(table(), ratings))
    asked = (
        first.stdout + second.stdout + last.stdout.removesuffix(last.stdout.splitlines()[-1] + "\n")
    )
    assert not any(word in asked.replace(str(tmp_path), "").lower() for word in GIVEN_AWAY)
    for text in ("text 0", "[bold]é\ufffd", "I think dogs are NA", "0 of 8 rated", "7 of 8 rated"):
        assert text in asked
    assert "\x1b" not in asked


def test_command_has_options(tmp_path, monkeypatch, capsys):
    """Question, scale, order and place of the ratings can be chosen; a scale may go below zero."""
    path, ratings = tmp_path / "texts.csv", tmp_path / "elsewhere" / "ratings.jsonl"
    table().to_csv(path, index=False)
    inputs = iter(["-2", "3", KeyboardInterrupt])

    def answer() -> str:
        if (given := next(inputs)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return given

    monkeypatch.setattr("builtins.input", answer)
    options = [
        "--question",
        "How [odd]?",
        "--scale",
        "-2",
        "2",
        "--seed",
        "5",
        "--ratings",
        str(ratings),
    ]
    assert rating.main([str(path), *options]) == 0
    out, err = capsys.readouterr()
    assert "How [odd]? -2 to 2, u undoes, q stops: " in out and "Stopped: 1 of 8" in out and not err
    session = RatingSession(table(), ratings, "How [odd]?", (-2, 2), seed=5)
    first = RatingSession(table(), tmp_path / "new", seed=5).current
    assert (lines(ratings)[0]["prompt"], lines(ratings)[0]["completion"]) == first
    assert list(session.ratings.values()) == [-2]
    assert rating.main([str(path), "--ratings", str(ratings)]) == 1
    assert (
        "holds ratings for the question 'How [odd]?' on the scale -2 to 2, not for"
        in capsys.readouterr().err
    )


def test_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    """A missing file, and one that is not such a table: one line on stderr, exit code 1."""
    missing = run(tmp_path / "missing.csv")
    assert (missing.returncode, missing.stdout, len(missing.stderr.splitlines())) == (1, "", 1)
    assert "no file" in missing.stderr and "gen_normal_and_modified(...).to_csv(" in missing.stderr
    files = {
        "empty": "",
        "uneven": "prompts,completions,is_modified\na,b,True\na,b,c,d\n",
        "other": "a,b\n1,2\n",
    }
    files["cut"] = "prompts,completions,is_modified\na,b,True\na,b\n"
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert rating.main([str(tmp_path / name)]) == 1
        out, err = capsys.readouterr()
        assert (
            not out
            and len(err.splitlines()) == 1
            and ("is not a table of completions" in err or "expected " in err)
        )


@pytest.mark.parametrize(
    "saved",
    [
        {"lineterminator": "\n", "quoting": 1},
        {"lineterminator": "\r\n", "quoting": 1},
        {},
        {"sep": ";", "encoding": "utf-8-sig"},
        {"sep": "\t", "lineterminator": "\r\n", "quoting": 1},
    ],
)
def test_table_survives_its_file(tmp_path, saved: dict):
    """Texts and origins that a CSV reader takes for something else come back as they were."""
    path = tmp_path / "texts.csv"
    table().replace({True: "TRUE", False: "FALSE"}).to_csv(path, index=False, **saved)
    found = read_completions(path)
    for column in ("prompts", "completions"):
        assert found[column].tolist() == table()[column].tolist()
    assert found["is_modified"].str.lower().tolist() == ["false"] * 4 + ["true"] * 4
    rate(session := RatingSession(table(), tmp_path / "ratings"))
    assert RatingSession(found, tmp_path / "ratings").ratings == session.ratings
    assert report(found, tmp_path / "ratings") == report(table(), tmp_path / "ratings")


def test_command_exports(tmp_path, capsys):
    """`--csv` writes the ratings so far, asks nothing, and refuses a file that is there."""
    path, out = tmp_path / "texts.csv", tmp_path / "out.csv"
    table().to_csv(path, index=False)
    rate(RatingSession(table(), tmp_path / "texts.ratings.jsonl"), 3)
    assert rating.main([str(path), "--csv", str(out)]) == 0
    assert pd.read_csv(out)["rating"].tolist() == saved(tmp_path / "texts.ratings.jsonl")
    assert rating.main([str(path), "--csv", str(path)]) == 1
    assert "exists" in capsys.readouterr().err
    assert read_completions(path).equals(table().astype(str))


def test_command_does_not_begin_anew_beside_earlier_ratings(tmp_path, capsys):
    """Whoever has ratings of an earlier version, under its name, is told, and can begin anew."""
    path, earlier = tmp_path / "texts.csv", tmp_path / "texts.ratings.csv"
    table().to_csv(path, index=False)
    earlier.write_text(",".join(EARLIER) + "\n")
    assert rating.main([str(path), "--report"]) == 1
    assert "ratings of an earlier version" in capsys.readouterr().err
    new = tmp_path / "texts.ratings.jsonl"
    assert rating.main([str(path), "--report", "--ratings", str(new)]) == 0
    rate(RatingSession(table(), new), 1)
    assert rating.main([str(path), "--report"]) == 0


# --- the notebook ---


def _displayed(widget: object) -> str:
    """Everything that a widget shows, as its HTML."""
    own = str(getattr(widget, "value", "")) + " " + str(getattr(widget, "description", ""))
    return own + " ".join(_displayed(child) for child in getattr(widget, "children", ()))


def test_widget_by_clicks(tmp_path):
    """Each click saves, undo takes back, nothing shows the origin, the report comes at the end."""
    path, completions = tmp_path / "ratings.jsonl", table()
    asked = (completions, path, "How <nice>?", (1, 3))
    box = rating_widget(*asked)
    text, buttons, (undo, progress) = (
        box.children[0],
        box.children[1].children,
        box.children[2].children,
    )
    assert [button.description for button in buttons] == ["1", "2", "3"] and undo.disabled
    seen, given = set(), []
    for count in range(8):
        assert (
            progress.value.startswith(f"{count} of 8 rated") and "How &lt;nice&gt;?" in text.value
        )
        assert not any(word in _displayed(box).lower() for word in GIVEN_AWAY)
        seen.add(text.value)
        buttons[1].click()
        assert list(RatingSession(*asked).ratings.values()) == [*given, 2]
        undo.click()
        assert list(RatingSession(*asked).ratings.values()) == given and saved(path)[-1] is None
        buttons[count % 3].click()
        given.append(count % 3 + 1)
    assert len(seen) == 8 and any("<b>I think dogs are </b>text 1</p>" in value for value in seen)
    assert any("&lt;b&gt;&amp;amp; [bold]é" in value for value in seen)
    assert describe(report(completions, path)) in text.value and all(
        button.disabled for button in buttons
    )
    undo.click()
    assert progress.value.startswith("7 of 8 rated") and not any(
        button.disabled for button in buttons
    )
    again = rating_widget(*asked)
    assert _displayed(again.children[0]) == _displayed(text)


def test_widget_says_that_nothing_was_saved(tmp_path):
    """A click in an old copy of the widget saves nothing, and says so."""
    path = tmp_path / "ratings.jsonl"
    old, new = rating_widget(table(), path), rating_widget(table(), path)
    new.children[1].children[0].click()
    old.children[1].children[4].click()
    assert "Not done: another session wrote" in old.children[2].children[1].value
    assert saved(path) == [1] and old.children[0].value == new.children[0].value


def test_import_does_without_notebook_libraries():
    """The terminal needs neither ipywidgets nor IPython, nor the time that torch takes."""
    code = (
        "import sys, common.measuring.rating; print(sorted({'ipywidgets', 'IPython', 'torch'} &"
        " set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr
