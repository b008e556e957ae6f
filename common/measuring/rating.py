"""Blind rating: a person rates steered and unsteered completions without knowing which is which.

The completions come in a random order and without their origin. Every rating is on disk before the
next text is shown; the file does not hold the origin either, which `report` joins at the end.
`python -m common.measuring.rating COMPLETIONS.csv` asks in the terminal, `rating_widget` in a
notebook.

The file only grows: one line of JSON for each rating, and one for each that is taken back.
`ratings_to_csv` writes the ratings for a spreadsheet.
"""

import argparse
import csv
import hashlib
import html
import json
import math
import os
import random
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pandas as pd
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    import ipywidgets

QUESTION = "How positive is this text?"
SCALE = (1, 5)
# How a cell begins that a spreadsheet runs as a formula (OWASP, CSV injection), and the mark that
# tells it not to.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "'")
_ORIGINS = {"true": True, "1": True, "false": False, "0": False}


class RatingSession:
    """Ask for ratings in a random order, and save each at once.

    A session on a file that holds ratings goes on where that one stopped. Nothing is written before
    the first rating. The session does not keep the origin of a completion.

    Args:
        completions: one row for each completion: `prompts`, `completions`, and `is_modified` (is it
            steered?).
        path: the file of the ratings, one line of JSON each, in the order in which they are given;
            it need not exist.
        question: what the person is asked.
        scale: the lowest and the highest rating, both whole numbers.
        seed: what the order depends on, besides the texts.

    Attributes:
        current: prompt and completion to rate now, or None when all are rated.
        ratings: the ratings by row number of the completions, counted from 0.
        total: how many completions there are.
        values: the ratings that can be given.

    Raises:
        ValueError: completions, question or scale are not as described, or the file does not hold
            ratings of these completions for this question on this scale; it is left as it is.
    """

    def __init__(
        self,
        completions: pd.DataFrame,
        path: str | os.PathLike,
        question: str = QUESTION,
        scale: tuple[int, int] = SCALE,
        seed: int = 0,
    ):
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"expected a question, got {question!r}")
        is_whole = len(scale) == 2 and all(isinstance(end, int) for end in scale)
        if not is_whole or scale[0] >= scale[1]:
            raise ValueError(
                "expected the lowest and the highest rating as scale, two whole numbers, got"
                f" {scale!r}"
            )
        self._texts, _ = _checked(completions)
        self.path, self.total = Path(path), len(self._texts)
        self.question, self.scale = question, (scale[0], scale[1])
        self.values = range(scale[0], scale[1] + 1)
        # An id that hides the row number: in most tables the unsteered completions come first.
        digest = hashlib.sha256(json.dumps(self._texts).encode()).hexdigest()
        ids = (hashlib.sha256(f"{digest} {row}".encode()) for row in range(self.total))
        self._rows = {name.hexdigest()[:16]: row for row, name in enumerate(ids)}
        self._ids = list(self._rows)
        # Two tables of equal size must not come in one order: whoever knew the first would know the
        # origins in the second.
        self._order = random.Random(f"{seed} {digest}").sample(range(self.total), self.total)
        self._load()

    def rate(self, value: int) -> None:
        """Save the rating of the current completion; it is on disk when this returns.

        Raises:
            ValueError: a value that is not on the scale, no completion is left, or another session
                wrote to the file meanwhile. Then nothing was saved.
        """
        if isinstance(value, bool) or value not in self.values:
            raise ValueError(
                f"expected a whole number from {self.values[0]} to {self.values[-1]}, got {value!r}"
            )
        if self._current_row is None:
            raise ValueError("all completions are rated already")
        self._append(self._current_row, int(value))

    def undo(self) -> tuple[str, str] | None:
        """Take the last rating back, even one of an earlier session.

        Returns:
            Its prompt and completion, or None where there is no rating.

        Raises:
            ValueError: another session wrote to the file meanwhile. Then nothing was taken back.
        """
        if not self.ratings:
            return None
        last = list(self.ratings)[-1]
        self._append(last, None)
        return self._texts[last]

    def _entry(self, row: int, value: int | None) -> dict[str, Any]:
        """What a line says: a rating, or None where it is taken back."""
        prompt, completion = self._texts[row]
        return {
            "id": self._ids[row],
            "prompt": prompt,
            "completion": completion,
            "question": self.question,
            "scale": list(self.scale),
            "rating": value,
        }

    def _line(self, row: int, value: int | None) -> bytes:
        return json.dumps(self._entry(row, value)).encode() + b"\n"

    def _append(self, row: int, value: int | None) -> None:
        """Add a line, and wait for the disk; whole lines are never written again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.path, "ab") as file:
                if file.tell() != self._size:
                    raise ValueError(
                        f"another session wrote to {str(self.path)!r}; it was read again, and"
                        " nothing else was done"
                    )
                file.truncate(self._end)  # without what a crash left of a line
                file.write(self._line(row, value))
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._load()

    def _load(self) -> None:
        """Read the file; the last line may be half-written, anything else is refused."""
        data = self.path.read_bytes() if self.path.exists() else b""
        *lines, rest = data.split(b"\n")
        ratings: dict[int, int] = {}
        for line in lines:
            row, value = self._read(line)
            if (row in ratings) != (value is None):
                self._refuse(line)  # rated twice, or taken back without a rating
            if value is None:
                del ratings[row]
            else:
                ratings[row] = value
        self._check_half_written(rest)
        self.ratings, self._size, self._end = ratings, len(data), len(data) - len(rest)
        unrated = (row for row in self._order if row not in ratings)
        self._current_row = next(unrated, None)
        self.current = None if self._current_row is None else self._texts[self._current_row]

    def _read(self, line: bytes) -> tuple[int, int | None]:
        """Return the row number and the rating that a line holds."""
        try:
            entry = json.loads(line)
            row, value = self._rows.get(entry["id"]), entry["rating"]
            lowest, highest = entry["scale"]
            asked = entry["question"], (lowest, highest)
        except (ValueError, TypeError, KeyError):
            self._refuse(line)
        if asked != (self.question, self.scale):
            raise ValueError(
                f"{str(self.path)!r} holds ratings for {_say(*asked)}, not for"
                f" {_say(self.question, self.scale)}"
            )
        is_rating = value is None or (type(value) is int and value in self.values)
        if row is None or not is_rating or entry != self._entry(row, value):
            self._refuse(line)
        return row, value

    def _check_half_written(self, rest: bytes) -> None:
        """Refuse an end that no session can have left: it would be lost with the next rating."""
        start = rest.rstrip(b"\0")  # after a power cut a file can also end in zeros
        possible = (self._line(row, value) for row in self._order for value in (*self.values, None))
        if start and not any(line.startswith(start) for line in possible):
            self._refuse(rest)

    def _refuse(self, found: bytes) -> NoReturn:
        name = repr(str(self.path))
        if re.match(rb'\W*id"?[,;\t]"?prompt\b', found):
            raise ValueError(
                f"{name} holds ratings as CSV, as an earlier version saved them; this one saves"
                " JSON lines: give the path of another file, this one stays as it is"
            )
        raise ValueError(
            f"{name} holds something other than ratings of these completions: {found[:60]!r}"
        )


@dataclass(frozen=True)
class Report:
    """What the ratings say. A mean without ratings, and what cannot be computed, is nan.

    Attributes:
        total: how many completions there are.
        n_steered: how many steered ones are rated.
        n_unsteered: how many unsteered ones are rated.
        mean_steered: the mean rating of the steered ones.
        mean_unsteered: the mean rating of the unsteered ones.
        difference: steered minus unsteered.
        low: the lower end of its 95 % confidence interval (Welch).
        high: the upper end.
    """

    total: int
    n_steered: int
    n_unsteered: int
    mean_steered: float
    mean_unsteered: float
    difference: float
    low: float
    high: float


def report(completions: pd.DataFrame, path: str | os.PathLike) -> Report:
    """Join the ratings with the origin of the completions, and compare.

    The interval is Welch's: the two sides may spread differently. It takes the ratings to be
    independent, which those of the same text, rated many times, are not; and it speaks of one
    person.

    Args:
        completions: the table that was rated.
        path: the file of the ratings; where there is none, nothing is rated.

    Raises:
        ValueError: as for `RatingSession`.
    """
    _, origins = _checked(completions)
    ratings = _open(completions, path).ratings
    steered, unsteered = (
        [value for row, value in ratings.items() if origins[row] == side] for side in (True, False)
    )
    mean, other = (statistics.fmean(side) if side else math.nan for side in (steered, unsteered))
    low, high = _welch_interval(steered, unsteered)
    return Report(len(origins), len(steered), len(unsteered), mean, other, mean - other, low, high)


def describe(report: Report) -> str:
    """Say in one sentence what a report shows, and what it does not."""
    steered, unsteered = (
        "none" if math.isnan(mean) else f"{mean:.2f}"
        for mean in (report.mean_steered, report.mean_unsteered)
    )
    rated = report.n_steered + report.n_unsteered
    so_far = f"So far ({rated} of {report.total} rated): " if rated < report.total else ""
    start = (
        f"{so_far}Steered {steered}, unsteered {unsteered} ({report.n_steered} and"
        f" {report.n_unsteered} ratings): "
    )
    if not math.isnan(report.difference):
        start += f"difference {report.difference:z.2f}, "
    if min(report.n_steered, report.n_unsteered) < 2:
        return start + "an interval needs at least 2 ratings on each side."
    if math.isnan(report.low):
        return start + "no interval, because the ratings of each side are all the same."
    start += f"95 % interval {report.low:z.2f} to {report.high:z.2f}"
    apart = not report.low <= 0 <= report.high
    return start + (
        "." if apart else ", which includes 0: steered and unsteered cannot be told apart."
    )


def ratings_to_csv(
    completions: pd.DataFrame, path: str | os.PathLike, csv_path: str | os.PathLike
) -> None:
    """Write the ratings so far, without the origins, as CSV for a spreadsheet.

    No text is run there as a formula: one that would be has an apostrophe in front, and so has one
    that begins with an apostrophe.

    Args:
        completions: the table that was rated.
        path: the file of the ratings.
        csv_path: the file to write; it must not exist.

    Raises:
        FileExistsError: it does exist.
        ValueError: as for `RatingSession`.
    """
    session = _open(completions, path)
    entries = [session._entry(row, value) for row, value in session.ratings.items()]
    table = pd.DataFrame(entries, columns=["id", "prompt", "completion", "question", "rating"])
    table["scale"] = " to ".join(map(str, session.scale))
    for name in set(table) - {"rating"}:
        table[name] = [f"'{text}" if text.startswith(_FORMULAS) else text for text in table[name]]
    # All text is in quotes, so that a carriage return in it does no harm.
    table.to_csv(csv_path, mode="x", index=False, quoting=csv.QUOTE_NONNUMERIC)


def rating_widget(
    completions: pd.DataFrame,
    path: str | os.PathLike,
    question: str = QUESTION,
    scale: tuple[int, int] = SCALE,
    seed: int = 0,
) -> "ipywidgets.Widget":
    """Return a widget that asks for the ratings and then shows the report.

    It is made for the last line of a notebook cell, and goes on with the same file when the cell is
    run again. Arguments and errors are those of `RatingSession`.
    """
    import ipywidgets as widgets  # here, since the terminal does without

    session = RatingSession(completions, path, question, scale, seed)
    text, progress, undo = widgets.HTML(), widgets.HTML(), widgets.Button(description="undo")
    buttons = [widgets.Button(description=str(value)) for value in session.values]

    def show(problem: str = "") -> None:
        if session.current is None:
            text.value = html.escape(describe(report(completions, path)))
        else:
            prompt, completion = map(html.escape, session.current)
            text.value = (
                '<p style="white-space:'
                f' pre-wrap"><b>{prompt}</b>{completion}</p><p>{html.escape(question)}</p>'
            )
        progress.value = html.escape(f"{len(session.ratings)} of {session.total} rated. {problem}")
        undo.disabled = not session.ratings
        for button in buttons:
            button.disabled = session.current is None

    def act(action: Callable, *arguments: int) -> None:
        # An exception in a click goes to a log that nobody reads.
        try:
            action(*arguments)
            show()
        except (ValueError, OSError) as error:
            show(f"Not done: {error}")

    for button in buttons:
        button.on_click(lambda clicked: act(session.rate, int(clicked.description)))
    undo.on_click(lambda _: act(session.undo))
    show()
    return widgets.VBox([text, widgets.HBox(buttons), widgets.HBox([undo, progress])])


def _checked(completions: pd.DataFrame) -> tuple[list[tuple[str, str]], list[bool]]:
    """The texts and the origins of a table of completions."""
    if missing := {"prompts", "completions", "is_modified"} - set(completions.columns):
        raise ValueError(
            "expected the columns prompts, completions and is_modified, got none called"
            f" {min(missing)!r}"
        )
    if completions.empty:
        raise ValueError("expected at least one completion, got none")
    texts = list(zip(completions["prompts"], completions["completions"]))
    for row in texts:
        if not all(isinstance(text, str) for text in row):
            raise ValueError(f"expected text as prompt and completion, got {row}")
    names = [str(value).strip().lower() for value in completions["is_modified"]]
    if unknown := [number for number, name in enumerate(names) if name not in _ORIGINS]:
        found = completions["is_modified"].iloc[unknown[0]]
        raise ValueError(f"expected True or False as is_modified, got {found!r}")
    return texts, [_ORIGINS[name] for name in names]


def _open(completions: pd.DataFrame, path: str | os.PathLike) -> RatingSession:
    """Return a session for the question and on the scale of the first line of a file."""
    try:
        with open(path, "rb") as file:
            entry = json.loads(file.readline())
        lowest, highest = entry["scale"]
        asked = (entry["question"], (lowest, highest))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        asked = (QUESTION, SCALE)
    return RatingSession(completions, path, *asked)


def _say(question: str, scale: tuple[int, int]) -> str:
    return f"the question {question!r} on the scale {scale[0]} to {scale[1]}"


def _welch_interval(left: Sequence[int], right: Sequence[int]) -> tuple[float, float]:
    """The 95 % confidence interval of the difference of two means; nan where there is none."""
    from scipy import stats  # here, since it takes a while and asking does without

    if min(len(left), len(right)) < 2 or len({*left}) == len({*right}) == 1:
        return math.nan, math.nan
    with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):  # one side is constant
        interval = stats.ttest_ind(left, right, equal_var=False).confidence_interval()
    return float(interval.low), float(interval.high)


def read_completions(path: Path) -> pd.DataFrame:
    """Read completions as `DataFrame.to_csv` wrote them, or as a spreadsheet saved them.

    "NA" and "null" are texts like others, a carriage return ends no row, and the separator may be
    another one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a table.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}; write one with"
            f" gen_normal_and_modified(...).to_csv({str(path)!r}, index=False), from common"
        )
    with open(path, "rb") as file:
        header = file.readline()
    ending = None if header.endswith(b"\r\n") else "\n"
    separator = max(",;\t", key=header.decode("latin-1").count)
    try:
        return pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, lineterminator=ending
        )
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a table of completions: {error}") from None


def _ask(session: RatingSession, console: Console) -> None:
    """Ask in the terminal until all is rated or the person stops."""
    lowest, highest = session.scale
    while session.current is not None:
        # Control characters would act on the terminal.
        prompt, completion = (
            re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text) for text in session.current
        )
        console.print(
            f"\n{len(session.ratings)} of {session.total} rated", style="dim", highlight=False
        )
        console.print(Text.assemble((prompt, "bold"), completion))
        asked = Text(f"{session.question} {lowest} to {highest}, u undoes, q stops: ")
        answer = console.input(asked).strip().lower()
        if answer == "q":
            return
        if answer == "u":
            taken_back = session.undo() is not None
            console.print(
                "The last rating is taken back."
                if taken_back
                else "There is no rating to take back."
            )
        elif answer in map(str, session.values):
            session.rate(int(answer))
        else:
            expected = f"expected a number from {lowest} to {highest}, u or q, got {answer!r}"
            console.print(Text(f"Not saved: {expected}."))


def _place_of_ratings(completions: Path) -> Path:
    """Return where the ratings of a file of completions are saved by default."""
    path, earlier = (completions.with_suffix(f".ratings.{end}") for end in ("jsonl", "csv"))
    if earlier.exists() and not path.exists():
        raise ValueError(
            f"{str(earlier)!r} may hold ratings of an earlier version, which this one does not"
            f" read: give --ratings {str(path)!r} to begin anew, or move that file"
        )
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.measuring.rating",
        description="Rate completions without knowing which are steered; the same command goes on"
        " after a stop.",
    )
    add = parser.add_argument
    columns = "the columns prompts, completions and is_modified"
    add("completions", type=Path, help=f"a CSV file with {columns}")
    where = "where the ratings are saved (default: COMPLETIONS.ratings.jsonl)"
    add("--ratings", type=Path, help=where)
    add("--question", default=QUESTION, help="asked of each text (default: %(default)s)")
    ends = ("LOWEST", "HIGHEST")
    add("--scale", type=int, nargs=2, default=SCALE, metavar=ends, help="default: 1 5")
    add("--seed", type=int, default=0, help="another order for another number")
    add("--report", action="store_true", help="say what the ratings show so far, and ask nothing")
    spreadsheet = "write the ratings so far to this CSV file for a spreadsheet, and ask nothing"
    add("--csv", type=Path, help=spreadsheet)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Rate completions in the terminal; see `_parser` for the arguments."""
    options, console = _parser().parse_args(arguments), Console()
    try:
        completions = read_completions(options.completions)
        path = options.ratings or _place_of_ratings(options.completions)
        if options.csv:
            ratings_to_csv(completions, path, options.csv)
            return 0
        if not options.report:
            session = RatingSession(
                completions, path, options.question, tuple(options.scale), options.seed
            )
            try:
                _ask(session, console)
            except (KeyboardInterrupt, EOFError):
                console.print()
            if session.current is not None:
                saved = f" and saved in {str(path)!r}" if session.ratings else ""
                stopped = f"Stopped: {len(session.ratings)} of {session.total} are rated{saved}."
                again = "To go on, run the same command again."
                console.print(Text(f"{stopped} {again}"), soft_wrap=True)
                return 0
        console.print(f"\n{describe(report(completions, path))}", highlight=False, soft_wrap=True)
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
