"""Blind rating: a person rates steered and unsteered completions without knowing which is which.

The completions come in a random order and without their origin. Every rating is on disk before the next text is shown;
the file does not hold the origin either, which `report` joins at the end. `python -m common.rating COMPLETIONS.csv` asks
in the terminal, `rating_widget` in a notebook.
"""

import argparse
import csv
import hashlib
import html
import io
import json
import math
import os
import random
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.text import Text
from scipy.special import stdtrit

if TYPE_CHECKING:
    import ipywidgets

QUESTION = "How positive is this text?"
SCALE = (1, 5)
COLUMNS = ("id", "prompt", "completion", "question", "lowest", "highest", "rating")
_ORIGINS = {"true": True, "1": True, "false": False, "0": False}


class RatingSession:
    """Ask for ratings in a random order, and save each at once.

    A session on a file that holds ratings goes on where that one stopped. Nothing is written before the first rating.
    The session does not keep the origin of a completion.

    Args:
        completions: one row for each completion: `prompts`, `completions`, and `is_modified` (is it steered?).
        path: the CSV file of the ratings, one row each, in the order in which they are given; it need not exist.
        question: what the person is asked.
        scale: the lowest and the highest rating, both whole numbers.
        seed: what the order depends on, besides the number of completions.

    Attributes:
        current: prompt and completion to rate now, or None when all are rated.
        ratings: the ratings by row number of the completions, counted from 0.
        total: how many completions there are.
        values: the ratings that can be given.

    Raises:
        ValueError: completions, question or scale are not as described, or the file holds something else than ratings of
            these completions for this question on this scale; it is left as it is.
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
        if len(scale) != 2 or not all(isinstance(end, int) for end in scale) or scale[0] >= scale[1]:
            raise ValueError(f"expected the lowest and the highest rating as scale, two whole numbers, got {scale!r}")
        self._texts, _ = _checked(completions)
        self.path, self.question, self.scale, self.total = Path(path), question, tuple(scale), len(self._texts)
        self.values = range(scale[0], scale[1] + 1)
        self._order = random.Random(seed).sample(range(self.total), self.total)
        # An id that shows no row number: in most tables the unsteered completions come first.
        digest = hashlib.sha256(json.dumps(self._texts, ensure_ascii=False).encode()).hexdigest()
        ids = [hashlib.sha256(f"{digest} {row}".encode()).hexdigest()[:16] for row in range(self.total)]
        # Every line that this session can write; a file of others is told by a line that is none of these.
        self._lines = {
            (row, value): _line([ids[row], *text, question, *scale, value])
            for row, text in enumerate(self._texts)
            for value in self.values
        }
        self._load()

    def rate(self, value: int) -> None:
        """Save the rating of the current completion; it is on disk when this returns.

        Raises:
            ValueError: a value that is not on the scale, no completion is left, or another session wrote to the file
                meanwhile. Then nothing was saved.
        """
        if isinstance(value, bool) or value not in self.values:
            raise ValueError(f"expected a whole number from {self.values[0]} to {self.values[-1]}, got {value!r}")
        if self._row is None:
            raise ValueError("all completions are rated already")
        header = b"" if len(self._ends) > 1 else _line(COLUMNS)
        self._write(self._ends[-1], header + self._lines[self._row, int(value)])

    def undo(self) -> tuple[str, str] | None:
        """Take the last rating back, also one of an earlier session; return prompt and completion, or None if there is none.

        The file is cut behind the row before, so that a crash can touch no other rating.

        Raises:
            ValueError: another session wrote to the file meanwhile. Then nothing was taken back.
        """
        if not self.ratings:
            return None
        last = list(self.ratings)[-1]
        self._write(self._ends[-2], b"")
        return self._texts[last]

    def _write(self, keep: int, data: bytes) -> None:
        """Cut the file behind its first bytes, append, and wait for the disk. What is kept is never written again."""
        if (self.path.stat().st_size if self.path.exists() else 0) != self._size:
            self._load()
            raise ValueError(f"another session wrote to {str(self.path)!r}; it was read again, and nothing else was done")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(keep)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._load()

    def _load(self) -> None:
        """Read the file, and refuse it unless it holds lines of this session, the last one perhaps half-written."""
        data = self.path.read_bytes() if self.path.exists() else b""
        key_of, header = {line: key for key, line in self._lines.items()}, _line(COLUMNS)
        ratings: dict[int, int] = {}
        ends, end = [0], 0
        while (end := data.find(b"\n", end) + 1) and data.startswith(header):
            line = data[ends[-1] : end]  # no whole one yet where the line break stands in a text
            if line in key_of and key_of[line][0] not in ratings:
                ratings.update([key_of[line]])
            elif line != header or len(ends) > 1:
                continue
            ends.append(end)
        # After a power cut a file can also end in zeros.
        rest = data[ends[-1] :].rstrip(b"\0")
        if not any(line.startswith(rest) and line != rest for line in (key_of if len(ends) > 1 else [header])):
            other, this = _asked(self.path), (self.question, self.scale)
            if other and other != this:
                raise ValueError(f"{str(self.path)!r} holds ratings for {_say(*other)}, not for {_say(*this)}")
            raise ValueError(f"{str(self.path)!r} holds something else than ratings of these completions: {rest[:60]!r}")
        self.ratings, self._ends, self._size = ratings, ends, len(data)
        self._row = next((row for row in self._order if row not in ratings), None)
        self.current = None if self._row is None else self._texts[self._row]


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

    The interval is Welch's: the two sides may spread differently. It takes the ratings to be independent, which those of
    the same text, rated many times, are not; and it speaks of one person.

    Args:
        completions: the table that was rated.
        path: the file of the ratings; where there is none, nothing is rated.

    Raises:
        ValueError: as for `RatingSession`.
    """
    _, origins = _checked(completions)
    ratings = RatingSession(completions, path, *(_asked(Path(path)) or ())).ratings
    steered, unsteered = ([value for row, value in ratings.items() if origins[row] == side] for side in (True, False))
    means = [statistics.fmean(side) if side else math.nan for side in (steered, unsteered)]
    difference, margin = means[0] - means[1], _welch_margin(steered, unsteered)
    return Report(len(origins), len(steered), len(unsteered), *means, difference, difference - margin, difference + margin)


def describe(report: Report) -> str:
    """Say in one sentence what a report shows, and what it does not."""
    steered, unsteered = ("none" if math.isnan(mean) else f"{mean:.2f}" for mean in (report.mean_steered, report.mean_unsteered))
    rated = report.n_steered + report.n_unsteered
    so_far = f"So far ({rated} of {report.total} rated): " if rated < report.total else ""
    start = f"{so_far}Steered {steered}, unsteered {unsteered} ({report.n_steered} and {report.n_unsteered} ratings): "
    if not math.isnan(report.difference):
        start += f"difference {report.difference:z.2f}, "
    if min(report.n_steered, report.n_unsteered) < 2:
        return start + "an interval needs at least 2 ratings on each side."
    if math.isnan(report.low):
        return start + "no interval, because the ratings of each side are all the same."
    start += f"95 % interval {report.low:z.2f} to {report.high:z.2f}"
    apart = not report.low <= 0 <= report.high
    return start + ("." if apart else ", which includes 0: steered and unsteered are not told apart.")


def rating_widget(
    completions: pd.DataFrame, path: str | os.PathLike, question: str = QUESTION, scale: tuple[int, int] = SCALE, seed: int = 0
) -> "ipywidgets.Widget":
    """Return a widget that asks for the ratings, for the last line of a notebook cell; at the end it shows the report.

    Arguments and errors are those of `RatingSession`. Running the cell again goes on with the same file.
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
            text.value = f'<p style="white-space: pre-wrap"><b>{prompt}</b>{completion}</p><p>{html.escape(question)}</p>'
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
        raise ValueError(f"expected the columns prompts, completions and is_modified, got none called {min(missing)!r}")
    if completions.empty:
        raise ValueError("expected at least one completion, got none")
    texts = list(zip(completions["prompts"], completions["completions"]))
    for row in texts:
        if not all(isinstance(text, str) for text in row):
            raise ValueError(f"expected text as prompt and completion, got {row}")
    origins = [_ORIGINS.get(str(value).strip().lower()) for value in completions["is_modified"]]
    if None in origins:
        raise ValueError(f"expected True or False as is_modified, got {completions['is_modified'].iloc[origins.index(None)]!r}")
    return texts, origins


def _line(fields: Sequence[str | int]) -> bytes:
    """A line of a CSV file. Text is always in quotes, so that a carriage return in it does no harm."""
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerow(fields)
    return buffer.getvalue().encode()


def _asked(path: Path) -> tuple[str, tuple[int, int]] | None:
    """The question and the scale of the first rating in a file, or None where there is none."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            first = next(csv.DictReader(file))
        int(first["rating"])  # behind the others: where it is there, they are whole
        return first["question"], (int(first["lowest"]), int(first["highest"]))
    except (OSError, StopIteration, KeyError, TypeError, ValueError, csv.Error):
        return None


def _say(question: str, scale: tuple[int, int]) -> str:
    return f"the question {question!r} on the scale {scale[0]} to {scale[1]}"


def _welch_margin(left: Sequence[int], right: Sequence[int]) -> float:
    """Half the width of the 95 % confidence interval of the difference of two means; nan where there is none."""
    if min(len(left), len(right)) < 2 or len({*left}) == len({*right}) == 1:
        return math.nan
    parts = [statistics.variance(side) / len(side) for side in (left, right)]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (left, right)))
    return float(stdtrit(freedom, 0.975)) * math.sqrt(sum(parts))


def _read_completions(path: Path) -> pd.DataFrame:
    """Read what `DataFrame.to_csv` wrote; "NA" and "null" are texts like others, and a carriage return ends no row."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}; write one with gen_normal_and_modified(...).to_csv({str(path)!r}, index=False), from common"
        )
    with open(path, "rb") as file:
        ending = None if file.readline().endswith(b"\r\n") else "\n"
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, lineterminator=ending)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no table of completions: {error}") from None


def _ask(session: RatingSession, console: Console) -> None:
    """Ask in the terminal until all is rated or the person stops."""
    lowest, highest = session.scale
    while session.current is not None:
        # Control characters would act on the terminal.
        prompt, completion = (re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text) for text in session.current)
        console.print(f"\n{len(session.ratings)} of {session.total} rated", style="dim", highlight=False)
        console.print(Text.assemble((prompt, "bold"), completion))
        answer = console.input(Text(f"{session.question} {lowest} to {highest}, u undoes, q stops: ")).strip().lower()
        if answer == "q":
            return
        if answer == "u":
            console.print("The last rating is taken back." if session.undo() else "There is no rating to take back.")
        elif answer in map(str, session.values):
            session.rate(int(answer))
        else:
            console.print(Text(f"Not saved: expected a number from {lowest} to {highest}, u or q, got {answer!r}."))


def main(arguments: Sequence[str] | None = None) -> int:
    """Rate completions without knowing which are steered; the same command goes on after a stop."""
    parser = argparse.ArgumentParser(prog="python -m common.rating", description=main.__doc__)
    parser.add_argument("completions", type=Path, help="a CSV file with the columns prompts, completions and is_modified")
    parser.add_argument("--ratings", type=Path, help="where the ratings are saved; COMPLETIONS.ratings.csv by default")
    parser.add_argument("--question", default=QUESTION, help="what is asked of each text (default: %(default)s)")
    parser.add_argument("--scale", type=int, nargs=2, default=SCALE, metavar=("LOWEST", "HIGHEST"), help="default: 1 5")
    parser.add_argument("--seed", type=int, default=0, help="another order for another number")
    parser.add_argument("--report", action="store_true", help="say what the ratings show so far, and ask nothing")
    options = parser.parse_args(arguments)
    path, console = options.ratings or options.completions.with_suffix(".ratings.csv"), Console()
    try:
        completions = _read_completions(options.completions)
        if not options.report:
            session = RatingSession(completions, path, options.question, tuple(options.scale), options.seed)
            try:
                _ask(session, console)
            except (KeyboardInterrupt, EOFError):
                console.print()
            if session.current is not None:
                saved = f" and saved in {str(path)!r}" if session.ratings else ""
                stopped = f"Stopped: {len(session.ratings)} of {session.total} are rated{saved}."
                console.print(Text(f"{stopped} To go on, run the same command again."), soft_wrap=True)
                return 0
        console.print(f"\n{describe(report(completions, path))}", highlight=False, soft_wrap=True)
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
