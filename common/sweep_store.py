"""Where a sweep keeps what it has computed: rows in a SQLite file, complete or not there, for these settings only."""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

FORMAT_VERSION = 1


class SweepStore:
    """Numbered rows of one sweep. Every batch is written at once or not at all, so that a killed sweep can go on.

    Args:
        path: the file; it need not exist. None keeps the rows in memory.
        settings: what the rows depend on, as JSON can hold it.
        columns: the names of the columns.

    Raises:
        ValueError: the file holds another sweep, or something else; it is left as it is.
    """

    def __init__(self, path: str | os.PathLike | None, settings: Mapping[str, Any], columns: Sequence[str]):
        self.columns = list(columns)
        if len({name.lower() for name in ("number", *self.columns)}) <= len(self.columns):
            raise ValueError(f"a column is there twice (in SQLite 'a' is 'A', and 'number' is taken): {', '.join(self.columns)}")
        settings = json.loads(json.dumps({"format": FORMAT_VERSION, "columns": self.columns, **settings}))
        is_new = path is None or not Path(path).exists()
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with _explained(path), ExitStack() as stack:
            self.connection = sqlite3.connect(":memory:" if path is None else path, timeout=1)
            stack.callback(self.connection.close)
            # One sweep at a time: from here on to the end the file is locked, and a second sweep on it is told so.
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.connection.execute("BEGIN EXCLUSIVE")
            with self.connection:
                if is_new:
                    names = ", ".join(map(_quoted, self.columns))
                    self.connection.execute("CREATE TABLE settings (settings TEXT)")
                    self.connection.execute("INSERT INTO settings VALUES (?)", [json.dumps(settings)])
                    self.connection.execute(f"CREATE TABLE rows (number INTEGER PRIMARY KEY, {names})")
                else:
                    _check(path, _settings(self.connection), settings)
            stack.pop_all()

    def done(self) -> set[int]:
        """Return the numbers of the rows that are there."""
        return {number for (number,) in self.connection.execute("SELECT number FROM rows")}

    def add(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Write rows, all or none of them."""
        marks = ", ".join("?" * (len(self.columns) + 1))
        values = [(number, *(_plain(row[column]) for column in self.columns)) for number, row in rows]
        with self.connection:
            self.connection.executemany(f"INSERT INTO rows VALUES ({marks})", values)

    def frame(self) -> pd.DataFrame:
        """Return all rows in the order of their numbers."""
        return _frame(self.connection, self.columns)

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()


def read_sweep(path: str | os.PathLike) -> pd.DataFrame:
    """Return the rows of a sweep that is finished, or as far as it came.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of a sweep.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {os.fspath(path)!r}")
    with _explained(path), closing(sqlite3.connect(path, timeout=1)) as connection:
        return typed(_frame(connection, _settings(connection)["columns"]))


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Give the layers whole numbers, with a gap where a row is not steered."""
    return frame.assign(layer=frame["layer"].astype("Int64")) if "layer" in frame else frame


@contextmanager
def _explained(path: str | os.PathLike | None) -> Iterator[None]:
    """Say what is wrong with a file that holds no sweep."""
    try:
        yield
    except (sqlite3.DatabaseError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no file of a sweep, or another sweep is running on it ({error})") from None


def _settings(connection: sqlite3.Connection) -> dict[str, Any]:
    return {**json.loads(connection.execute("SELECT settings FROM settings").fetchone()[0])}


def _frame(connection: sqlite3.Connection, columns: Sequence[str]) -> pd.DataFrame:
    rows = connection.execute("SELECT * FROM rows ORDER BY number").fetchall()
    return pd.DataFrame(rows, columns=["number", *columns]).drop(columns="number")


def _check(path: str | os.PathLike, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a file that holds another sweep."""
    if differing := sorted(name for name in {*stored, *settings} if stored.get(name) != settings.get(name)):
        raise ValueError(
            f"{os.fspath(path)!r} holds a sweep with other settings ({', '.join(differing)}): give another path, or delete the file"
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _plain(value: Any) -> Any:
    """A value as SQLite takes it."""
    return value.item() if isinstance(value, np.generic) else value
