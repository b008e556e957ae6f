"""The file of a sweep: whole batches come out as they went in, and other files are left alone."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import read_sweep
from common.sweeping.store import SweepStore, typed

SETTINGS = {"prompts": ["I think"], "coeffs": [0.5, 2.0], "seed": 0}
COLUMNS = ["layer", "coeff", "text"]
ROOT = Path(__file__).resolve().parents[2]
texts = st.text(st.characters(exclude_categories=["Cs"]))
values = (
    st.none()
    | st.text()
    | texts
    | st.integers()
    | st.integers(-(2**66), 2**66)
    | st.floats()
    | st.booleans()
    | st.floats(-9, 9).map(np.float64)
    | st.integers(-9, 9).map(np.int64)
    | st.booleans().map(np.bool_)
    | st.just(np.uint64(2**64 - 1))
)


def row(number: int) -> dict:
    return {"layer": number, "coeff": number / 2, "text": f"text {number}"}


def write(path, numbers=range(3), settings=SETTINGS, columns=COLUMNS) -> pd.DataFrame:
    """Write rows, as a sweep does, and return what is there."""
    store = SweepStore(path, settings, columns)
    try:
        store.add((number, row(number)) for number in numbers)
        return store.frame()
    finally:
        store.close()


# --- rows ---


@given(st.dictionaries(st.integers(0, 2**40), st.tuples(values, values), max_size=6))
def test_what_goes_in_comes_out(tmp_path_factory, given):
    """Each value as it is, in the order of the rows: truth values, NaN, any number or text."""
    path = tmp_path_factory.mktemp("values") / "a.sweep"
    expected = [[_python(value) for value in given[number]] for number in sorted(given)]
    for where in (None, path):
        store = SweepStore(where, {}, ["a"], ["b"])
        store.add((number, {"a": a, "more": 1}) for number, (a, _) in given.items())
        store.add_metrics((number, {"b": b}) for number, (_, b) in given.items())
        assert store.done() == set(given) and list(map(repr, store.column("a").values())) == [
            repr(a) for a, _ in expected
        ]
        found = store.frame()
        store.close()
        pd.testing.assert_frame_equal(found, pd.DataFrame(expected, columns=["a", "b"]))
    pd.testing.assert_frame_equal(read_sweep(path), found)


def _python(value):
    return value.item() if isinstance(value, np.generic) else value


@pytest.mark.parametrize(
    "value",
    [
        Decimal("0.1"),
        [1],
        1j,
        np.complex64(1j),
        np.datetime64("2020-01-01"),
        pd.NaT,
        b"x",
        "\ud800",
        object(),
    ],
)
def test_other_values_are_refused(tmp_path, value):
    """They are named, and nothing is written."""
    store = SweepStore(tmp_path / "a.sweep", {}, ["a"])
    with pytest.raises(
        ValueError, match=re.escape(f"expected a number or a text, got {_python(value)!r}")
    ):
        store.add([(0, {"a": 1}), (1, {"a": value})])
    assert store.done() == set()
    store.close()


def test_metrics_may_be_others_when_a_file_is_opened_again(tmp_path):
    """A file holds those of the last call; equal ones leave it alone; rows without have gaps."""
    path = tmp_path / "a.sweep"
    for metrics in (
        {"m": [1, float("nan")]},
        {"m": [True, None], "n": ["a", 2**70]},
        {},
        {"n": [1, 2]},
        {"m": [1, 2]},
    ):
        rows = [
            (number, {name: column[number] for name, column in metrics.items()})
            for number in range(2)
        ]
        for attempt in range(2):
            content = path.read_bytes() if attempt else b""
            store = SweepStore(path, SETTINGS, COLUMNS, list(metrics))
            if not store.done():
                store.add((number, row(number)) for number in range(2))
            store.set_metrics(rows)
            found = store.frame()
            store.close()
            assert not attempt or path.read_bytes() == content
            pd.testing.assert_frame_equal(
                read_sweep(path)[COLUMNS + list(metrics)].astype(object), found.astype(object)
            )
            assert {name: list(map(repr, found[name])) for name in metrics} == {
                name: list(map(repr, pd.Series(column))) for name, column in metrics.items()
            }
            assert list(found) == COLUMNS + list(metrics)
    store = SweepStore(path, SETTINGS, COLUMNS, ["m"])
    store.add([(9, row(9))])
    store.close()
    assert read_sweep(path)["m"].isna().tolist() == [False, False, True]


def test_a_file_of_the_former_format(tmp_path):
    """It is read as it was, and no sweep goes on in it: what it depends on was known by less."""
    path = tmp_path / "a.sweep"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE settings (settings TEXT)")
        connection.execute(
            "INSERT INTO settings VALUES (?)",
            [json.dumps({"format": 1, "columns": [*COLUMNS, "tone"], **SETTINGS})],
        )
        connection.execute(
            "CREATE TABLE rows (number INTEGER PRIMARY KEY, layer, coeff, text, tone)"
        )
        connection.execute("INSERT INTO rows VALUES (0, 3, 0.5, 'so it goes', NULL)")
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"another version of this library \(format 1, expected 2\).*read_sweep"
    ):
        SweepStore(path, SETTINGS, COLUMNS, ["tone"])
    assert path.read_bytes() == before and read_sweep(path).to_dict("list") == {
        "layer": [3],
        "coeff": [0.5],
        "text": ["so it goes"],
        "tone": [None],
    }


def test_rows_are_in_the_order_of_their_numbers():
    """Whatever order they were written in."""
    store = SweepStore(None, SETTINGS, COLUMNS)
    store.add((number, row(99 - number)) for number in (5, 1))
    store.add([(3, row(0))])
    assert store.frame()["text"].tolist() == ["text 98", "text 0", "text 94"]
    store.close()


@given(
    names=st.lists(
        texts.filter(lambda name: "\0" not in name and name.lower() != "number"),
        min_size=1,
        max_size=4,
        unique_by=str.lower,
    )
)
def test_columns_have_any_names(tmp_path_factory, names):
    """Quotes, spaces, words of SQL: a metric is called what its author likes."""
    path = tmp_path_factory.mktemp("names") / "a.sweep"
    store = SweepStore(path, {}, names)
    store.add([(0, {name: number for number, name in enumerate(names)})])
    assert store.frame().to_dict("list") == {name: [number] for number, name in enumerate(names)}
    store.close()
    assert list(read_sweep(path)) == names


@pytest.mark.parametrize(
    "columns", [["layer", "tone", "Tone"], ["layer", "number"], ["layer", "layer"]]
)
def test_columns_that_are_there_twice_are_refused(tmp_path, columns):
    """To SQLite "tone" is "Tone", and "number" is the number of the row. Nothing is written."""
    with pytest.raises(ValueError, match="twice"):
        SweepStore(tmp_path / "new.sweep", SETTINGS, columns)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyError, KeyboardInterrupt])
def test_a_batch_is_there_or_not_there(tmp_path, stop):
    """Whatever happens in the middle of it; what was written before stays."""

    def batch():
        yield 1, row(1)
        raise stop

    store = SweepStore(tmp_path / "a.sweep", SETTINGS, COLUMNS)
    store.add([(0, row(0))])
    with pytest.raises(stop):
        store.add(batch())
    with pytest.raises(sqlite3.IntegrityError):
        store.add([(1, row(1)), (0, row(0))])
    assert store.done() == {0}
    store.close()
    assert read_sweep(tmp_path / "a.sweep")["text"].tolist() == ["text 0"]


def test_layers_are_whole_numbers_with_gaps():
    """Also where no row has one, and where there is no row."""
    for layers in ([None, 3.0], [3, 4], [None], []):
        frame = typed(pd.DataFrame({"layer": layers}))
        assert (
            frame["layer"].dtype == "Int64"
            and [None if pd.isna(layer) else layer for layer in frame["layer"]] == layers
        )
    assert list(typed(pd.DataFrame({"a": [1]}))) == ["a"]


# --- going on ---


@pytest.mark.parametrize(
    "name",
    ["a.sweep", "with spaces.db", "50% #1?.sweep", "ü?mode=memory&x#", "new/folders/a.sweep"],
)
def test_a_sweep_goes_on(tmp_path, name):
    """The file is where it was asked to be, and holds what was there before."""
    path = tmp_path / name
    write(path, range(2))
    assert path.is_file()
    store = SweepStore(str(path), SETTINGS, COLUMNS)
    assert store.done() == {0, 1}
    store.add([(5, row(5))])
    store.close()
    assert (
        read_sweep(path)["text"].tolist()
        == read_sweep(str(path))["text"].tolist()
        == ["text 0", "text 1", "text 5"]
    )
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    "other, says",
    [({"seed": 1}, "seed"), ({"prompts": []}, "prompts"), ({"more": 1, "seed": 2}, "more, seed")],
)
def test_other_settings_are_refused(tmp_path, other, says):
    """They are named, and the file stays as it is; so does one of other columns."""
    path = tmp_path / "a.sweep"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"other settings \({says}\)"):
        SweepStore(path, {**SETTINGS, **other}, COLUMNS)
    with pytest.raises(ValueError, match=r"other settings \(columns\)"):
        SweepStore(path, SETTINGS, [*COLUMNS, "tone"])
    with pytest.raises(ValueError, match=r"other settings \(coeffs, prompts, seed\)"):
        SweepStore(path, {}, COLUMNS)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.none() | st.floats(-9, 9) | texts | st.lists(st.integers(0, 3), max_size=3),
        max_size=4,
    )
)
def test_equal_settings_are_equal(tmp_path_factory, given):
    """What went through JSON and back is still the same setting, tuples and lists alike."""
    path = tmp_path_factory.mktemp("equal") / "a.sweep"
    SweepStore(path, given, ["a"]).close()
    SweepStore(
        path,
        {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()},
        ["a"],
    ).close()


def make_text(path):
    path.write_text("steering,layer\nLove,3\n")


def make_empty(path):
    path.touch()


def make_other_table(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE books (title TEXT)")
        connection.execute("INSERT INTO books VALUES ('Emma')")
    connection.close()


def make_other_settings(content):
    """A database of someone else that has a table of settings, too."""

    def make(path):
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE settings (settings TEXT)")
            connection.executemany("INSERT INTO settings VALUES (?)", content)
        connection.close()

    return make


def make_cut_off(path):
    write(path, range(500))
    path.write_bytes(path.read_bytes()[:5000])


NO_SWEEPS = {
    "text": make_text,
    "empty": make_empty,
    "other table": make_other_table,
    "no settings": make_other_settings([]),
    "settings that are no JSON": make_other_settings([["x"]]),
    "settings that are a list": make_other_settings([["[1]"]]),
    "settings without columns": make_other_settings([["{}"]]),
    "settings without rows": make_other_settings([['{"columns": ["a"]}']]),
    "cut off": make_cut_off,
    "null": make_other_settings([[None]]),
}


@pytest.mark.parametrize("kind", NO_SWEEPS)
def test_a_file_that_is_no_sweep_is_left_alone(tmp_path, kind):
    path = tmp_path / "a file"
    NO_SWEEPS[kind](path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a file"):
        SweepStore(path, SETTINGS, COLUMNS)
    with pytest.raises(ValueError, match="a file"):
        read_sweep(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_sweep(tmp_path):
    with pytest.raises(ValueError, match=tmp_path.name):
        SweepStore(tmp_path, SETTINGS, COLUMNS)
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        read_sweep(tmp_path)


def test_reading_does_not_make_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_sweep(tmp_path / "nothing.sweep")
    assert not list(tmp_path.iterdir())


# --- two at once, and one that dies ---


@pytest.mark.parametrize("there_before", [False, True])
def test_a_second_sweep_on_the_file_is_told_so(tmp_path, there_before):
    """While the first one runs, new or gone on with; afterwards the file is free."""
    path = tmp_path / "a.sweep"
    if there_before:
        write(path, range(2))
    first = SweepStore(path, SETTINGS, COLUMNS)
    for call in (lambda: SweepStore(path, SETTINGS, COLUMNS), lambda: read_sweep(path)):
        with pytest.raises(ValueError, match="being written|running"):
            call()
    first.add([(7, row(7))])
    first.close()
    assert 7 in SweepStore(path, SETTINGS, COLUMNS).done()


KILLED = """
import os, signal, sys
from common.sweeping.store import SweepStore

store = SweepStore(sys.argv[1], {settings}, {columns})
rows = [{{"layer": number, "coeff": 0, "text": f"text {{number}}"}} for number in range(3)]
store.add(enumerate(rows))
# A batch goes to the file before it is complete.
store.connection.execute("PRAGMA cache_size = 1")
store.connection.execute("BEGIN")
for number in range(3, 3000):
    row = [number, number, 0, 50 * "half a batch"]
    store.connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", row)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_sweep_that_is_killed_while_it_writes(tmp_path):
    """Half a batch is in the file, its journal beside it: only complete batches are found."""
    path = tmp_path / "a.sweep"
    script = KILLED.format(settings=SETTINGS, columns=COLUMNS)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (
        done.returncode == -signal.SIGKILL
        and b"half a batch" in path.read_bytes()
        and len(list(tmp_path.iterdir())) == 2
    )
    assert read_sweep(path)["text"].tolist() == ["text 0", "text 1", "text 2"]
    store = SweepStore(path, SETTINGS, COLUMNS)
    assert store.done() == {0, 1, 2}
    store.close()
    assert list(tmp_path.iterdir()) == [path]


# --- no room ---


NO_ROOM = """
import resource, sys
from common.sweeping.store import SweepStore

limit, count = int(sys.argv[2]), int(sys.argv[3])
# Writing beyond it fails, as on a disk that is full.
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
store = None
try:
    store = SweepStore(sys.argv[1], {settings}, {columns}, ["m"])
    for number in range(count):
        store.add([(number, {{"layer": number, "coeff": 0.5, "text": 2000 * "a"}})])
        store.add_metrics([(number, {{"m": True}})])
except OSError as error:
    print(error)
finally:
    if store is not None:
        print(len(store.done()))
        store.close()
"""


def full_disk(path, limit: int) -> str:
    """Write rows where a file cannot grow beyond a limit; returns what was said."""
    script = NO_ROOM.format(settings=SETTINGS, columns=COLUMNS)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(limit), "50"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize("limit", [0, 5000])
def test_no_room_for_a_new_file(tmp_path, limit):
    """One sentence, and nothing is left that would stand in the way later."""
    path = tmp_path / "a.sweep"
    assert "a.sweep' cannot be written" in full_disk(path, limit) and not list(tmp_path.iterdir())
    assert len(write(path)) == 3


def test_no_room_midway(tmp_path):
    """Complete rows are readable, and once there is room the sweep goes on with the next one."""
    path = tmp_path / "a.sweep"
    said, count = full_disk(path, 60_000).splitlines()
    assert "cannot be written" in said and "goes on" in said and 5 < int(count) < 50
    part = read_sweep(path)
    assert (
        len(part) == int(count)
        and part["m"].iloc[:-1].all()
        and (part["text"].str.len() == 2000).all()
    )
    store = SweepStore(path, SETTINGS, COLUMNS, ["m"])
    assert store.done() == set(range(int(count)))
    store.add((number, row(number)) for number in range(int(count), 50))
    store.set_metrics((number, {"m": False}) for number in range(50))
    store.close()
    assert (
        len(read_sweep(path)) == 50
        and not read_sweep(path)["m"].any()
        and list(tmp_path.iterdir()) == [path]
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, TypeError])
def test_a_file_that_is_being_made_is_gone_when_that_fails(tmp_path, stop, monkeypatch):
    """Whatever ended it; a file that was there before stays."""

    class Stopped(sqlite3.Connection):
        def execute(self, sql, *given):
            if sql.startswith("CREATE TABLE rows"):
                raise stop
            return super().execute(sql, *given)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Stopped))
        with pytest.raises((stop, ValueError)):
            SweepStore(tmp_path / "a.sweep", SETTINGS, COLUMNS)
    assert not list(tmp_path.iterdir())
