"""What `make engines` compares and stores, and what the page says of it."""

import sys

import nbformat
import pytest

from benchmarks import engine_texts
from benchmarks.engine_costs import times_written
from benchmarks.engine_texts import Text, compared
from benchmarks.servers import server
from benchmarks.stored import load, provenance
from repository.mechanisms import ROOT

SIGNS = tuple(engine_texts.SIGNS)


def texts(**changed: list[Text]) -> dict[str, list[Text]]:
    """Three equal texts for each sign, but for those that are given."""
    same = [Text("a b", [1, 2], [-0.5, -1.0])] * 3
    return {sign: changed.get(name, same) for sign, name in zip(SIGNS, ("none", "plus", "minus"))}


def test_equal_texts_are_counted_and_their_probabilities_compared():
    near = Text("a b", [1, 2], [-0.5, -1.25])
    odd = [near, Text("a b", [1, 3], [-9.0, -9.0]), Text("a b", [1], [-0.5])]
    found = compared(texts(plus=odd), texts())
    # The one that differs in a token, and the one that is shorter, are not equal.
    assert found == {"equal": 7, "texts": 9, "largest difference": 0.25}


def test_an_engine_that_gives_no_probabilities_is_not_said_to_be_near():
    """Its texts are compared, since there are no tokens either."""
    silent = {sign: [Text("a b"), Text("a b"), Text("a c")] for sign in SIGNS}
    assert compared(silent, texts()) == {"equal": 6, "texts": 9, "largest difference": None}


def test_texts_that_are_missing_are_no_equal_texts():
    with pytest.raises(ValueError, match="longer"):
        compared(texts(minus=[Text("a b")] * 2), texts())


@pytest.mark.parametrize("row", load("engines")["texts"]["rows"], ids=lambda row: row["engine"])
def test_stored_texts_are_equal(row):
    """llama.cpp looks its activation function up in a table of 16 bits."""
    assert row["equal"] == row["texts"] == 3 * len(engine_texts.PROMPTS)
    gap = row["largest difference"]
    assert row["engine"] == "transformers serve" or gap < {"vLLM": 1e-3}.get(row["engine"], 0.01)


def test_the_page_says_when_and_with_what_it_was_measured():
    page = nbformat.read(ROOT / "guides" / "engines.ipynb", as_version=4)
    said = "\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
    for part in ("texts", "costs"):
        assert provenance(load("engines")[part]) in said
    for engine, rest in (("vLLM", "; no graphs |"), ("llama.cpp", " |")):
        assert f"| {times_written(load('engines')['costs'], engine)}{rest}" in said


def test_a_server_that_does_not_start_is_reported_with_its_log(tmp_path):
    program = [sys.executable, "-c", "raise SystemExit('no model here')"]
    with (
        pytest.raises(RuntimeError, match="no model here"),
        server(lambda port: program, tmp_path / "log", {}),
    ):
        pass


def test_a_server_ends_with_its_block(tmp_path):
    (tmp_path / "health").write_text("well")
    program = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory"]
    with server(lambda port: [*program, str(tmp_path), str(port)], tmp_path / "log", {}) as one:
        address = one
        assert engine_texts.urlopen(f"{address}/health").read() == b"well"
    with pytest.raises(OSError, match="refused"):
        engine_texts.urlopen(f"{address}/health")
