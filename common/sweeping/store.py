"""Where a sweep keeps its rows: a SQLite file for one set of settings.

It holds numbers, texts and gaps as SQLite has them, and what SQLite has no type for (truth values,
NaN, integers of more than 64 bits) as JSON in a BLOB. The metrics of texts, which can be computed
again from the rows, have a table of their own.
"""

import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

FORMAT_VERSION = 2  # 1 knew a model by a part of its weights, and metrics by their names

_NOT_WRITTEN = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
}  # codes of SQLite


class SweepStore:
    """Numbered rows of one sweep; a batch is written whole or not at all, so it can be killed.

    Args:
        path: the file; it need not exist. None keeps the rows in memory.
        settings: what the rows depend on, as JSON can hold it.
        columns: the names of the columns.
        metrics: more columns, whose values follow from the rows; they may be others when the file
            is opened again.

    Raises:
        ValueError: the file holds another sweep, one of an earlier version, or something else; it
            is left as it is.
        OSError: there is no room for it; nothing is left behind.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        settings: Mapping[str, Any],
        columns: Sequence[str],
        metrics: Sequence[str] = (),
    ):
        self.path, self.columns, self.metrics = path, list(columns), list(metrics)
        names = ["number", *self.columns, *self.metrics]
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(
                "a column is there twice (in SQLite 'a' is 'A', and 'number' is taken):"
                f" {', '.join(names[1:])}"
            )
        settings = json.loads(
            json.dumps({"format": FORMAT_VERSION, "columns": self.columns, **settings})
        )
        with _made_here(path) as is_new, _explained(path), ExitStack() as stack:
            self.connection = sqlite3.connect(":memory:" if path is None else path, timeout=1)
            stack.callback(self.connection.close)
            # One sweep at a time: from here on to the end the file is locked, and a second sweep on
            # it is told so.
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.connection.execute("BEGIN EXCLUSIVE")
            with self.connection:
                if is_new:
                    self.connection.execute("CREATE TABLE settings (settings TEXT)")
                    self.connection.execute(
                        "INSERT INTO settings VALUES (?)", [json.dumps(settings)]
                    )
                    self._make("rows", self.columns)
                    self._make("metrics", self.metrics)
                else:
                    _check(_name(path), _settings(self.connection), settings)
            stack.pop_all()

    def expect(self, rows: int) -> None:
        """Note how many rows there will be, for `progress`."""
        with _explained(self.path), self.connection:
            if _expected(self.connection) != rows:
                # A number in the header of the file, which SQLite leaves to its users.
                self.connection.execute(f"PRAGMA user_version = {rows}")

    def done(self) -> set[int]:
        """Return the numbers of the rows that are there."""
        with _explained(self.path):
            return {number for (number,) in self.connection.execute("SELECT number FROM rows")}

    def column(self, name: str) -> dict[int, Any]:
        """Return what the rows that are there hold in a column, by their numbers."""
        with _explained(self.path):
            return {
                number: _read(value)
                for number, value in self.connection.execute(
                    f"SELECT number, {_quoted(name)} FROM rows ORDER BY number"
                )
            }

    def add(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Write rows, all or none of them.

        Raises:
            ValueError: a value that is not a number, a text or a gap.
            OSError: there is no room for them; the rows so far are there.
        """
        self._insert("rows", self.columns, rows)

    def add_metrics(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Write the metrics of rows that are there, all or none of them; see `add`."""
        self._insert("metrics", self.metrics, rows)

    def set_metrics(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Replace the metrics of all rows; see `add`. Equal ones leave the file alone."""
        values = _values(self.metrics, rows)
        with _explained(self.path):
            found = self.connection.execute("SELECT * FROM metrics ORDER BY number")
            if (
                found.fetchall() == values
                and [name for name, *_ in found.description[1:]] == self.metrics
            ):
                return
            with self.connection:
                self.connection.execute("BEGIN")
                self.connection.execute("DROP TABLE metrics")
                self._make("metrics", self.metrics)
                self._write("metrics", values)

    def frame(self) -> pd.DataFrame:
        """Return all rows in the order of their numbers."""
        with _explained(self.path):
            return _frame(self.connection)

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()

    def _make(self, table: str, columns: Sequence[str]) -> None:
        self.connection.execute(
            f"CREATE TABLE {table}"
            f" ({', '.join(['number INTEGER PRIMARY KEY', *map(_quoted, columns)])})"
        )

    def _insert(
        self, table: str, columns: Sequence[str], rows: Iterable[tuple[int, Mapping[str, Any]]]
    ) -> None:
        values = _values(columns, rows)
        with _explained(self.path), self.connection:
            self._write(table, values)

    def _write(self, table: str, values: list[tuple]) -> None:
        if values:
            self.connection.executemany(
                f"INSERT INTO {table} VALUES ({', '.join('?' * len(values[0]))})", values
            )


def read_sweep(path: str | os.PathLike) -> pd.DataFrame:
    """Return the rows of a sweep that is finished, or as far as it came.

    They are those that the sweep returned, with the metrics that it was last called with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the file of a sweep.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {os.fspath(path)!r}")
    with _explained(path), closing(sqlite3.connect(path, timeout=1)) as connection:
        _settings(connection)
        return typed(_frame(connection))


class Progress(NamedTuple):
    """How far a sweep has come.

    Attributes:
        rows: how many are in the file.
        expected: how many there will be; None in files of earlier versions.
        running: whether a process writes to the file right now.
    """

    rows: int
    expected: int | None
    running: bool


def progress(path: str | os.PathLike) -> Progress:
    """Return how far the sweep in a file has come, also while it runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the file of a sweep.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {os.fspath(path)!r}")
    with _explained(path):
        try:
            return _progress(path, running=False)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
        for _ in range(5):
            # Reading past the lock of whoever writes may meet a page that is half written.
            with suppress(sqlite3.DatabaseError, KeyError, TypeError, json.JSONDecodeError):
                return _progress(path, running=True)
            time.sleep(0.1)
        return _progress(path, running=True)


def _progress(path: str | os.PathLike, running: bool) -> Progress:
    uri = f"{Path(path).absolute().as_uri()}?{'immutable=1' if running else 'mode=rw'}"
    with closing(sqlite3.connect(uri, uri=True, timeout=0.1)) as connection:
        _settings(connection)
        (rows,) = connection.execute("SELECT COUNT(*) FROM rows").fetchone()
        return Progress(rows, _expected(connection) or None, running)


def _expected(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Give the layers whole numbers, with a gap where a row is not steered."""
    return frame.assign(layer=frame["layer"].astype("Int64")) if "layer" in frame else frame


@contextmanager
def _made_here(path: str | os.PathLike | None) -> Iterator[bool]:
    """Make a file where there is none, and say whether; it goes again if what follows fails."""
    if path is None:
        yield True
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644))
    except FileExistsError:
        yield False
        return
    try:
        yield True
    except BaseException:
        for made in (path, f"{os.fspath(path)}-journal"):
            Path(made).unlink(missing_ok=True)
        raise


@contextmanager
def _explained(path: str | os.PathLike | None) -> Iterator[None]:
    """Say what is wrong with a file that does not hold a sweep, or cannot be written."""
    name = _name(path)
    try:
        yield
    except sqlite3.IntegrityError:  # a row twice
        raise
    except (sqlite3.DatabaseError, json.JSONDecodeError, TypeError, KeyError) as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_WRITTEN:
            raise OSError(
                f"{name} cannot be written ({error}): rows that were complete are still there; once"
                " there is room, the same call goes on after them"
            ) from None
        raise ValueError(
            f"{name} is not the file of a sweep, or another sweep is running on it ({error})"
        ) from None


def _name(path: str | os.PathLike | None) -> str:
    return "memory" if path is None else repr(os.fspath(path))


def _settings(connection: sqlite3.Connection) -> dict[str, Any]:
    settings = {**json.loads(connection.execute("SELECT settings FROM settings").fetchone()[0])}
    if not isinstance(settings["columns"], list):
        raise TypeError("no columns")
    return settings


def _frame(connection: sqlite3.Connection) -> pd.DataFrame:
    """The rows with their metrics: gaps where a sweep stopped between the two, none in format 1."""
    rows = "SELECT * FROM rows LEFT JOIN metrics USING (number) ORDER BY number"
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'metrics'").fetchone():
        rows = "SELECT * FROM rows ORDER BY number"
    found = connection.execute(rows)
    names = [name for name, *_ in found.description]
    return pd.DataFrame([list(map(_read, row)) for row in found], columns=names).drop(
        columns="number"
    )


def _check(name: str, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a file that holds another sweep."""
    if stored["format"] != FORMAT_VERSION:
        raise ValueError(
            f"{name} was written by another version of this library (format"
            f" {stored['format']}, expected {FORMAT_VERSION}), and what its rows depend on is not"
            " known well enough to go on: read it with read_sweep, and give another path"
        )
    if differing := sorted(
        name for name in {*stored, *settings} if stored.get(name) != settings.get(name)
    ):
        raise ValueError(
            f"{name} holds a sweep with other settings ({', '.join(differing)}): give"
            " another path, or delete the file"
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _values(columns: Sequence[str], rows: Iterable[tuple[int, Mapping[str, Any]]]) -> list[tuple]:
    return [(number, *(plain(row[column]) for column in columns)) for number, row in rows]


def plain(value: Any) -> Any:
    """Return a value as SQLite takes it; `_read` undoes it.

    Raises:
        ValueError: it is not a number, a text or a gap.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or value is pd.NA:
        return None
    if not isinstance(value, bool | int | float | str) or (
        isinstance(value, str) and value != value.encode(errors="replace").decode()
    ):
        # Half of a surrogate pair is not a text either.
        raise ValueError(f"expected a number or a text, got {value!r}")
    return value if _is_native(value) else json.dumps(value).encode()


def _is_native(value: bool | int | float | str) -> bool:
    """Whether SQLite gives it back as it was."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, str) or not math.isnan(value)


def _read(value: Any) -> Any:
    return json.loads(value) if isinstance(value, bytes) else value
