"""Blind rating: a person rates steered and unsteered completions without knowing which is which.

The completions come in a random order and without their origin. Every rating is on disk before the
next text is shown; the file does not hold the origin either, which `report` joins at the end.
`python -m common.measuring.rating COMPLETIONS.csv` asks in the terminal, `rating_widget` in a
notebook.

The file may be opened in a spreadsheet: a text that would be run there as a formula has an
apostrophe in front (and so has one that begins with an apostrophe), and a file that was saved there
is read, and written anew with the next rating.
"""

import argparse
import codecs
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
from collections.abc import Callable, Iterator, Sequence
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
# How a cell begins that a spreadsheet runs as a formula (OWASP, CSV injection), and the mark that
# tells it not to.
_MARKED = ("=", "+", "-", "@", "\t", "\r", "'")
_ORIGINS = {"true": True, "1": True, "false": False, "0": False}


class RatingSession:
    """Ask for ratings in a random order, and save each at once.

    A session on a file that holds ratings goes on where that one stopped. Nothing is written before
    the first rating. The session does not keep the origin of a completion.

    Args:
        completions: one row for each completion: `prompts`, `completions`, and `is_modified` (is it
            steered?).
        path: the CSV file of the ratings, one row each, in the order in which they are given; it
            need not exist.
        question: what the person is asked.
        scale: the lowest and the highest rating, both whole numbers.
        seed: what the order depends on, besides the texts.

    Attributes:
        current: prompt and completion to rate now, or None when all are rated.
        ratings: the ratings by row number of the completions, counted from 0.
        total: how many completions there are.
        values: the ratings that can be given.

    Raises:
        ValueError: completions, question or scale are not as described, or the file holds something
            else than ratings of these completions for this question on this scale; it is left as it
            is.
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
        if (
            len(scale) != 2
            or not all(isinstance(end, int) for end in scale)
            or scale[0] >= scale[1]
        ):
            raise ValueError(
                "expected the lowest and the highest rating as scale, two whole numbers, got"
                f" {scale!r}"
            )
        self._texts, _ = _checked(completions)
        self.path, self.question, self.scale, self.total = (
            Path(path),
            question,
            tuple(scale),
            len(self._texts),
        )
        self.values = range(scale[0], scale[1] + 1)
        # An id that shows no row number: in most tables the unsteered completions come first.
        digest = hashlib.sha256(json.dumps(self._texts, ensure_ascii=False).encode()).hexdigest()
        self._ids = [
            hashlib.sha256(f"{digest} {row}".encode()).hexdigest()[:16] for row in range(self.total)
        ]
        # Two tables of equal size must not come in one order: who knew the first would know the
        # origins in the second.
        self._order = random.Random(f"{seed} {digest}").sample(range(self.total), self.total)
        # Every line that this session can write; a file of others is told by a line that is none of
        # these.
        fields = {
            (row, value): [self._ids[row], *text, question, *scale, value]
            for row, text in enumerate(self._texts)
            for value in self.values
        }
        self._lines = {key: _line(line) for key, line in fields.items()}
        # Files of before have no apostrophes in front of formulas.
        self._key_of = {_line(line, mark=""): key for key, line in fields.items()}
        self._key_of |= {line: key for key, line in self._lines.items()}
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
        if self._row is None:
            raise ValueError("all completions are rated already")
        header = b"" if len(self._ends) > 1 else _line(COLUMNS)
        self._write(self._ends[-1], header + self._lines[self._row, int(value)])

    def undo(self) -> tuple[str, str] | None:
        """Take the last rating back, also one of an earlier session; return prompt and completion, or None if there is none.

        The file is cut after the row before, so that a crash can touch no other rating.

        Raises:
            ValueError: another session wrote to the file meanwhile. Then nothing was taken back.
        """
        if not self.ratings:
            return None
        last = list(self.ratings)[-1]
        self._write(self._ends[-2], b"")
        return self._texts[last]

    def _write(self, keep: int, data: bytes) -> None:
        """Cut the file after its first bytes, append, and wait for the disk. What is kept is never written again."""
        if (self.path.stat().st_size if self.path.exists() else 0) != self._size:
            self._load()
            raise ValueError(
                f"another session wrote to {str(self.path)!r}; it was read again, and nothing else"
                " was done"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = (
            self.path
            if self._again is None
            else self.path.with_name(f".{self.path.name}.unfinished")
        )
        with open(unfinished, "ab") as file:
            if self._again is not None:
                file.truncate(0)
                file.write(self._again)
            file.truncate(keep)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)
        self._load()

    def _load(self) -> None:
        """Read the file, and refuse it unless it holds ratings of this session, the last line perhaps half-written."""
        data, again = self.path.read_bytes() if self.path.exists() else b"", None
        ratings, ends, whole = self._read_lines(data)
        if not whole:
            try:
                ratings = self._saved_again(data)
            except ValueError:
                other, this = _asked(self.path), (self.question, self.scale)
                if other and other != this:
                    raise ValueError(
                        f"{str(self.path)!r} holds ratings for {_say(*other)}, not for"
                        f" {_say(*this)}"
                    ) from None
                found = data[ends[-1] :][:60]
                raise ValueError(
                    f"{str(self.path)!r} holds something else than ratings of these completions:"
                    f" {found!r}"
                ) from None
            again = _line(COLUMNS) + b"".join(self._lines[key] for key in ratings.items())
            _, ends, _ = self._read_lines(again)
        self.ratings, self._ends, self._again, self._size = ratings, ends, again, len(data)
        self._row = next((row for row in self._order if row not in ratings), None)
        self.current = None if self._row is None else self._texts[self._row]

    def _read_lines(self, data: bytes) -> tuple[dict[int, int], list[int], bool]:
        """Read lines that sessions write: the ratings, where each line ends, and whether that is all but a half-written end."""
        key_of, header = self._key_of, _line(COLUMNS)
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
        return (
            ratings,
            ends,
            any(
                line.startswith(rest) and line != rest
                for line in (key_of if len(ends) > 1 else [header])
            ),
        )

    def _saved_again(self, data: bytes) -> dict[int, int]:
        """Read the ratings in a file that a spreadsheet saved, which may have altered the texts: the ids say which they are.

        Raises:
            ValueError: something else.
        """
        if data.startswith(_line(COLUMNS)) and not data.endswith(b"\n"):
            raise ValueError("cut: the last number may have lost a digit")
        ratings: dict[int, int] = {}
        for name, _, _, question, lowest, highest, rating in _rows(data):
            [row] = [
                row for row, own in enumerate(self._ids) if name == own or _is_number(name, own)
            ]
            asked = _one_break(question), (_whole(lowest), _whole(highest))
            if (
                asked != (_one_break(self.question), self.scale)
                or row in ratings
                or _whole(rating) not in self.values
            ):
                raise ValueError(
                    "another question or scale, a completion rated twice, or a value off the scale"
                )
            ratings[row] = _whole(rating)
        return ratings


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
    ratings = RatingSession(completions, path, *(_asked(Path(path)) or ())).ratings
    steered, unsteered = (
        [value for row, value in ratings.items() if origins[row] == side] for side in (True, False)
    )
    means = [statistics.fmean(side) if side else math.nan for side in (steered, unsteered)]
    difference, margin = means[0] - means[1], _welch_margin(steered, unsteered)
    return Report(
        len(origins),
        len(steered),
        len(unsteered),
        *means,
        difference,
        difference - margin,
        difference + margin,
    )


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
        "." if apart else ", which includes 0: steered and unsteered are not told apart."
    )


def rating_widget(
    completions: pd.DataFrame,
    path: str | os.PathLike,
    question: str = QUESTION,
    scale: tuple[int, int] = SCALE,
    seed: int = 0,
) -> "ipywidgets.Widget":
    """Return a widget that asks for the ratings, for the last line of a notebook cell; at the end it shows the report.

    Arguments and errors are those of `RatingSession`. Running the cell again goes on with the same
    file.
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
    origins = [_ORIGINS.get(str(value).strip().lower()) for value in completions["is_modified"]]
    if None in origins:
        raise ValueError(
            "expected True or False as is_modified, got"
            f" {completions['is_modified'].iloc[origins.index(None)]!r}"
        )
    return texts, origins


def _line(fields: Sequence[str | int], mark: str = "'") -> bytes:
    """A line of a CSV file. Text is always in quotes, so that a carriage return in it does no harm; no text is a formula."""
    buffer = io.StringIO()
    fields = [
        mark + field if isinstance(field, str) and field.startswith(_MARKED) else field
        for field in fields
    ]
    csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerow(fields)
    return buffer.getvalue().encode()


def _rows(data: bytes) -> Iterator[list[str]]:
    """Read the rows below the header, as `_line` wrote them or as a spreadsheet saved them, and take the marks away.

    A spreadsheet saves with other quotes, separators, line ends and encodings, and with empty cells
    around.

    Raises:
        ValueError: these are no ratings.
    """
    try:
        text = data.decode(
            "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        )
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    width = len(COLUMNS)
    try:
        for number, cells in enumerate(table):
            if (
                any(cells[width:])
                or (cells and len(cells) < width)
                or (not number and tuple(cells[:width]) != COLUMNS)
            ):
                raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {cells[:9]}")
            if number and any(cells):
                yield [cell[1:] if cell.startswith("'") else cell for cell in cells[:width]]
    except csv.Error as error:
        raise ValueError(str(error)) from None


def _whole(text: str) -> int:
    """The whole number that a cell holds, perhaps with decimals: 4, 4.0 or 4,00."""
    number = float(text.replace(",", "."))
    if not number.is_integer():
        raise ValueError(f"expected a whole number, got {text!r}")
    return int(number)


def _is_number(text: str, own: str) -> bool:
    """Say whether a cell is an id that a spreadsheet took for a number, as 1234567890123456 becomes 1.23457E+15."""
    try:
        return math.isclose(float(text.replace(",", ".")), float(own), rel_tol=1e-4)
    except ValueError:
        return False


def _one_break(text: str) -> str:
    """A text with one kind of line end."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _asked(path: Path) -> tuple[str, tuple[int, int]] | None:
    """The question and the scale of the first rating in a file, or None where there is none."""
    try:
        _, _, _, question, lowest, highest, rating = next(_rows(path.read_bytes()))
        _whole(rating)  # the last one: where it is there, the others are whole
        return question, (_whole(lowest), _whole(highest))
    except (OSError, StopIteration, ValueError):
        return None


def _say(question: str, scale: tuple[int, int]) -> str:
    return f"the question {question!r} on the scale {scale[0]} to {scale[1]}"


def _welch_margin(left: Sequence[int], right: Sequence[int]) -> float:
    """Half the width of the 95 % confidence interval of the difference of two means; nan where there is none."""
    if min(len(left), len(right)) < 2 or len({*left}) == len({*right}) == 1:
        return math.nan
    parts = [statistics.variance(side) / len(side) for side in (left, right)]
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(side) - 1) for part, side in zip(parts, (left, right))
    )
    return float(stdtrit(freedom, 0.975)) * math.sqrt(sum(parts))


def _read_completions(path: Path) -> pd.DataFrame:
    """Read what `DataFrame.to_csv` wrote; "NA" and "null" are texts like others, and a carriage return ends no row.

    A spreadsheet may have saved it with another separator.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}; write one with"
            f" gen_normal_and_modified(...).to_csv({str(path)!r}, index=False), from common"
        )
    with open(path, "rb") as file:
        header = file.readline()
    ending, separator = (
        None if header.endswith(b"\r\n") else "\n",
        max(",;\t", key=header.decode("latin-1").count),
    )
    try:
        return pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, lineterminator=ending
        )
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no table of completions: {error}") from None


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
        answer = (
            console.input(Text(f"{session.question} {lowest} to {highest}, u undoes, q stops: "))
            .strip()
            .lower()
        )
        if answer == "q":
            return
        if answer == "u":
            console.print(
                "The last rating is taken back."
                if session.undo()
                else "There is no rating to take back."
            )
        elif answer in map(str, session.values):
            session.rate(int(answer))
        else:
            console.print(
                Text(
                    f"Not saved: expected a number from {lowest} to {highest}, u or q, got"
                    f" {answer!r}."
                )
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Rate completions without knowing which are steered; the same command goes on after a stop."""
    parser = argparse.ArgumentParser(
        prog="python -m common.measuring.rating", description=main.__doc__
    )
    parser.add_argument(
        "completions",
        type=Path,
        help="a CSV file with the columns prompts, completions and is_modified",
    )
    parser.add_argument(
        "--ratings",
        type=Path,
        help="where the ratings are saved; COMPLETIONS.ratings.csv by default",
    )
    parser.add_argument(
        "--question", default=QUESTION, help="what is asked of each text (default: %(default)s)"
    )
    parser.add_argument(
        "--scale",
        type=int,
        nargs=2,
        default=SCALE,
        metavar=("LOWEST", "HIGHEST"),
        help="default: 1 5",
    )
    parser.add_argument("--seed", type=int, default=0, help="another order for another number")
    parser.add_argument(
        "--report", action="store_true", help="say what the ratings show so far, and ask nothing"
    )
    options = parser.parse_args(arguments)
    path, console = options.ratings or options.completions.with_suffix(".ratings.csv"), Console()
    try:
        completions = _read_completions(options.completions)
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
                console.print(
                    Text(f"{stopped} To go on, run the same command again."), soft_wrap=True
                )
                return 0
        console.print(f"\n{describe(report(completions, path))}", highlight=False, soft_wrap=True)
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
