"""What `make engines` compares and stores, and what the page says of it."""

import importlib.metadata
import os
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch
from matplotlib.axes import Axes
from transformers import GPT2LMHeadModel

from benchmarks import engine_costs, engine_texts, servers, stored
from benchmarks.engine_costs import BUSY, SINGLE, Case, steered, times_written
from benchmarks.engine_texts import Subject, Text, compared
from benchmarks.servers import server
from benchmarks.stored import load, provenance
from common.serving import vllm_plugin
from common.vectors.steering_vector import SteeringVector
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


def test_without_tokens_on_either_side_the_letters_are_compared():
    whole, silent = Text("a b", [1, 2]), Text("a b")
    assert whole.equals(silent) and silent.equals(whole) and whole.equals(Text("other", [1, 2]))
    assert not whole.equals(Text("a c")) and not Text("a c").equals(whole)


# --- the texts of transformers, with which others are compared ---


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def wanted(subject) -> dict[str, list[Text]]:
    """Shorter than those that are stored."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_texts, "NEW", 10)
        return engine_texts.by_transformers(subject)


def test_stored_texts_are_those_that_transformers_writes_today(subject, wanted):
    stored = load("engines")["texts"]
    assert (stored["layer"], stored["coeff"]) == (subject.preset.layer, subject.preset.coeff)
    assert list(stored["texts"]) == list(engine_texts.PROMPTS)
    for number, by_sign in enumerate(stored["texts"].values()):
        assert list(by_sign) == list(SIGNS)
        for sign, text in by_sign.items():
            assert len(wanted[sign][number].tokens) == 10
            assert text.startswith(wanted[sign][number].text)


@torch.no_grad()
def test_its_probabilities_are_those_of_the_steered_model(subject, wanted):
    """Token by token, each after the prompt and all tokens before it."""
    for sign, factor in engine_texts.SIGNS.items():
        text, ids = wanted[sign][0], list(subject.ids[0])
        with subject.vector.apply(subject.model, multiplier=factor * subject.preset.coeff):
            for token, logprob in zip(text.tokens, text.logprobs, strict=True):
                last = subject.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                assert last.argmax() == token
                assert last[token].item() == pytest.approx(logprob, abs=1e-4)
                ids.append(token)


@torch.no_grad()
def test_checkpoints_hold_the_vector(subject, wanted):
    """Each is a model by itself, which writes what the vector does; so is its GGUF file there."""
    for sign in SIGNS:
        model = GPT2LMHeadModel.from_pretrained(subject.checkpoint(sign))
        given = torch.tensor([subject.ids[0]])
        mask = torch.ones_like(given)
        whole = model.generate(given, attention_mask=mask, max_new_tokens=10, do_sample=False)
        assert whole[0, given.shape[1] :].tolist() == wanted[sign][0].tokens
        assert subject.gguf(sign).stat().st_size > 0
        assert (subject.checkpoint(sign) / "tokenizer.json").exists()
    assert len({tuple(wanted[sign][0].tokens) for sign in SIGNS}) == 3
    stored = SteeringVector.load(subject.folder / "love.safetensors")
    (layer,) = stored.layer_activations
    assert layer == subject.preset.layer and stored.norm()[layer] == pytest.approx(1.0)
    assert torch.equal(
        stored.layer_activations[layer], subject.vector.layer_activations[layer].detach()
    )


def test_a_text_stops_before_its_end(subject):
    ids = subject.tokenizer(" wonderful.")["input_ids"]
    gone = [*ids, subject.end, *ids]
    scores = [float(number) for number in range(len(gone))]
    assert subject.text(gone, scores) == Text(" wonderful.", ids, scores[: len(ids)])
    assert subject.text(ids, scores[: len(ids)]) == Text(" wonderful.", ids, scores[: len(ids)])


def test_the_texts_of_one_batch_are_told_apart():
    """Those of a sign lie together, in the order of the prompts."""
    many = [Text(f"{sign}{n}") for sign in SIGNS for n in range(len(engine_texts.PROMPTS))]
    for sign, some in engine_texts._by_sign(many).items():
        assert [text.text for text in some] == [f"{sign}{n}" for n in range(len(some))]
        assert len(some) == len(engine_texts.PROMPTS)


def test_the_table_says_how_many_are_equal_and_how_near():
    row = {"engine": "A", "steered by": "b", "equal": 8, "texts": 9, "largest difference": 0.0042}
    other = row | {"engine": "C", "largest difference": None}
    table = engine_texts.texts_table({"rows": [row, other]})
    assert table.to_numpy().tolist() == [["A", "b", "8 of 9", "4e-03"], ["C", "b", "8 of 9", "-"]]


# --- what is stored, and what the page says ---


@pytest.mark.parametrize("row", load("engines")["texts"]["rows"], ids=lambda row: row["engine"])
def test_stored_texts_are_equal(row):
    """llama.cpp looks its activation function up in a table of 16 bits."""
    assert row["equal"] == row["texts"] == 3 * len(engine_texts.PROMPTS)
    gap = row["largest difference"]
    assert row["engine"] == "transformers serve" or gap < {"vLLM": 1e-3}.get(row["engine"], 0.01)


def test_every_way_is_stored():
    rows = load("engines")["texts"]["rows"]
    assert [(row["engine"], row["steered by"]) for row in rows] == list(engine_texts.WAYS)


def test_stored_costs_are_as_low_as_was_asked():
    """Measured while the machine was free; every case, every number of vectors."""
    stored = load("engines")["costs"]
    assert stored["other programs"] <= BUSY
    asked = [row for row in stored["rows"] if row["asked"]]
    cases, numbers = engine_costs.CASES, engine_costs.DISTINCT
    assert [(row["model"], row["way"], row["asked"]) for row in asked] == [
        (case.name, steered(number), case.asked) for case in cases for number in numbers
    ]
    assert all(row["times"] <= row["asked"] for row in asked)


def test_the_page_says_when_and_with_what_it_was_measured():
    page = nbformat.read(ROOT / "guides" / "engines.ipynb", as_version=4)
    said = "\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
    for part in ("texts", "costs"):
        assert provenance(load("engines")[part]) in said
    cost = {name: times_written(load("engines")["costs"], name) for name in ("vLLM", "llama.cpp")}
    assert f"| {cost['vLLM']}; no graphs |" in said
    assert f"| none measurable: {cost['llama.cpp']} |" in said


# --- what it costs ---

CASE = Case("small", None, 2, 10, 1.5)
WAYS = {
    "vLLM": 4.0,
    "vLLM, started with vectors": 4.5,
    steered(1): 5.0,
    "transformers": 2.0,
    "transformers, steered": 3.0,
    "llama.cpp": 0.5,
    "llama.cpp, steered": 0.25,
}


@pytest.fixture
def measured(monkeypatch) -> SimpleNamespace:
    """What is measured of engines that take as long as is said above, and how they ended."""
    noted = SimpleNamespace(closed=0, made=None)

    class Engines:
        def __init__(self, *made: object):
            noted.made = made

        def ways(self) -> dict[str, Callable[[], float]]:
            return {way: lambda seconds=seconds: seconds for way, seconds in WAYS.items()}

        def close(self) -> None:
            noted.closed += 1

    monkeypatch.setattr(engine_costs, "Engines", Engines)
    # Ten seconds of the processors, of which this program used 4.
    spent = iter([(100.0, 10.0), (110.0, 14.0)])
    monkeypatch.setattr(engine_costs, "_processor_seconds", lambda: next(spent))
    noted.rows, noted.others = engine_costs.measure(CASE, "cpu", 3)
    return noted


def test_ways_are_compared_with_their_engine_unsteered(measured):
    """llama.cpp writes fewer texts; only what steers in vLLM was asked to be cheap."""
    assert measured.made == (CASE, "cpu") and measured.closed == 1 and measured.others > 0
    rows = {row["way"]: row for row in measured.rows}
    assert list(rows) == list(WAYS)
    assert {way: row["compared with"] for way, row in rows.items()} == {
        way: way.split(",")[0] for way in WAYS
    }
    times = {way: row["times"] for way, row in rows.items()}
    assert times == dict(zip(WAYS, [1, 1.125, 1.25, 1, 1.5, 1, 0.5]))
    assert rows[steered(1)]["tokens per second"] == 64 * 10 / 5
    assert rows["llama.cpp, steered"]["tokens per second"] == SINGLE * 10 / 0.25
    assert {way for way, row in rows.items() if row["asked"]} == {steered(1)}
    assert rows["vLLM"]["asked"] is None
    assert rows[steered(1)]["asked"] == 1.5 and rows[steered(1)]["spread"] == (1.25, 1.25)
    assert {row["model"] for row in measured.rows} == {"small"}


def results_of(measured: SimpleNamespace) -> dict[str, Any]:
    where = {"measured": "today", "machine": {"processor": "P", "cores": "2"}}
    return {"rows": measured.rows, "other programs": 0.031, **where}


def test_table_picture_and_report_say_what_was_measured(measured, capsys):
    """What others are compared with has no row of its own in the table, and no bar."""
    results = results_of(measured)
    table = engine_costs.cost_table(results)
    compared_with = {"vLLM", "transformers", "llama.cpp"}
    assert list(table["way"]) == [way for way in WAYS if way not in compared_with]
    assert list(table) == ["model", "way", "times unsteered", "quartiles", "asked"]
    row = table[table["way"] == steered(1)].to_numpy().tolist()
    assert row == [["small", steered(1), 1.25, "1.25–1.25", 1.5]]
    (axis,) = engine_costs.plot(results).axes
    assert isinstance(axis, Axes)
    assert [bar.get_width() for bar in axis.patches] == list(table["times unsteered"])
    lines = [list(line.get_xdata()) for line in axis.lines]
    assert [1.5, 1.5] in lines, "no mark at what was asked"
    assert any(1.25 in line for line in lines), "no quartiles"
    assert axis.get_xlabel() == "times as long as the same, unsteered"
    engine_costs.report(results)
    said = capsys.readouterr().out
    for way in WAYS:
        assert f"{way} " in said
    assert "64 prompts of 16 tokens" in said and "other programs took 3%" in said
    assert f"{'128':>10}   1.250   1.250–1.250    1.50" in said


def test_the_share_is_that_of_the_time_it_took(measured, monkeypatch):
    """Without the time in which engines start and end."""
    clock = iter([1000.0, 1000.0, 1008.0, 1008.0])
    monkeypatch.setattr(engine_costs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(engine_costs, "interleaved", lambda *_: next(clock) and {})
    monkeypatch.setattr(engine_costs, "_processor_seconds", lambda: (0.0, 0.0))
    monkeypatch.setattr(engine_costs, "_others", lambda before, after, seconds: seconds)
    assert engine_costs.measure(CASE, "cpu", 3) == ([], 8.0)


def test_a_page_says_the_range_of_what_steers(measured):
    """Neither what is unsteered nor an engine whose vectors nobody asks for."""
    rows = measured.rows
    assert times_written({"rows": rows}, "vLLM") == "1.25 times"
    more = next(row for row in rows if row["way"] == steered(1)) | {"times": 1.005}
    assert times_written({"rows": [*rows, more]}, "vLLM") == "1.00 to 1.25 times"
    assert times_written({"rows": [more, *rows]}, "llama.cpp") == "0.50 times"


def test_engines_are_closed_after_an_error(measured, monkeypatch):
    monkeypatch.setattr(engine_costs, "interleaved", lambda *_: {}["an error"])
    monkeypatch.setattr(engine_costs, "_processor_seconds", lambda: (0.0, 0.0))
    with pytest.raises(KeyError):
        engine_costs.measure(CASE, "cpu", 3)
    assert measured.closed == 2


def test_the_share_of_other_programs(monkeypatch):
    """Of all processors; never below 0, since the clocks of programs tick."""
    monkeypatch.setattr(engine_costs.os, "cpu_count", lambda: 4)
    assert engine_costs._others((100.0, 10.0), (112.0, 18.0), 10.0) == pytest.approx(0.1)
    assert engine_costs._others((100.0, 10.0), (101.0, 18.0), 10.0) == 0.0
    monkeypatch.setattr(engine_costs.os, "cpu_count", lambda: None)
    assert engine_costs._others((100.0, 10.0), (112.0, 18.0), 10.0) == pytest.approx(0.4)


LINUX = "user nice system idle iowait irq softirq steal guest guest_nice"


@pytest.mark.parametrize(
    ("fields", "used"),
    [(LINUX, 1 + 2 + 4 + 32 + 64 + 128), ("user nice system idle", 1 + 2 + 4)],
    ids=["Linux", "macOS"],
)
def test_processors_that_wait_are_not_used(monkeypatch, fields, used):
    """What guests use is in `user` already; programs have children, and these have others."""
    times = namedtuple("times", fields)(*(2.0**n for n in range(len(fields.split()))))

    class Process:
        def __init__(self, user: float = 1.0, system: float = 0.5):
            self.times = SimpleNamespace(user=user, system=system, children_user=99.0)

        def cpu_times(self) -> SimpleNamespace:
            return self.times

        def children(self, recursive: bool = False) -> list["Process"]:
            return [Process(10.0, 20.0), *([Process(100.0, 200.0)] if recursive else [])]

    psutil = SimpleNamespace(cpu_times=lambda: times, Process=Process)
    monkeypatch.setattr(engine_costs, "psutil", psutil)
    assert engine_costs._processor_seconds() == (used, 331.5)


def test_the_time_of_this_program_is_its_own_and_that_of_its_children():
    """A child that works for a third of a second while it lives."""
    busy = "import time\nwhile time.process_time() < 0.4: pass\ninput()"
    everything, mine = engine_costs._processor_seconds()
    child = subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE)
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            more, own = engine_costs._processor_seconds()
            if own - mine > 0.3:
                break
            time.sleep(0.05)
        assert own - mine > 0.3 and more - everything > 0.2
    finally:
        child.communicate(b"\n")


@pytest.mark.parametrize(
    ("arguments", "others", "stored"),
    [
        ([], 0.0, ["embedded", "gpt2-small shape"]),
        ([], BUSY, ["embedded", "gpt2-small shape"]),
        ([], BUSY + 0.01, None),
        (["--quick"], 0.0, None),
        (["--quick"], BUSY + 0.01, None),
    ],
)
def test_costs_are_stored_if_the_machine_was_free(
    measured, monkeypatch, capsys, arguments, others, stored
):
    """And all cases were measured; the case with the most other programs counts."""
    shares, rounds = iter([0.0, others]) if not arguments else iter([others]), []

    def measure(case: Case, device: str, count: int) -> tuple[list, float]:
        rounds.append(count)
        return [row | {"model": case.name} for row in measured.rows], next(shares)

    written = []
    monkeypatch.setattr(engine_costs, "measure", measure)
    monkeypatch.setattr(engine_costs, "machine", lambda *packages: {"packages": str(packages)})
    monkeypatch.setattr(engine_costs, "store_part", lambda *given: written.append(given))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["engine_costs", *arguments, "--rounds", "5"])
    settings = ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_NO_USAGE_STATS", "VLLM_CPU_KVCACHE_SPACE")
    for name in settings:
        monkeypatch.setenv(name, "")
    engine_costs.main()
    assert rounds == ([1] if arguments else [5, 5])
    assert [os.environ[name] for name in settings] == ["0", "1", "1"]
    assert ("nothing is written" in capsys.readouterr().out) == (others > BUSY)
    if stored is None:
        assert not written
        return
    ((part, results, pictures, name),) = written
    assert (part, list(pictures), name) == ("costs", ["engines_cost"], "engines")
    assert list(dict.fromkeys(row["model"] for row in results["rows"])) == stored
    assert results["other programs"] == others and results["rounds"] == 5
    assert results["machine"] == {"packages": "('vllm-cpu', 'llama-cpp-python')"}


def test_vectors_that_are_timed_are_different_and_of_length_1(model):
    vectors = engine_costs._vectors(model, 3)
    assert len(vectors) == max(engine_costs.DISTINCT)
    rows = torch.stack([vector.layer_activations[3] for vector in vectors])
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
    assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 0.5
    assert [steered(number) for number in (1, 8)] == [
        "vLLM, 1 distinct vector",
        "vLLM, 8 distinct vectors",
    ]


# --- a server ---


def python(program: str, *arguments: str) -> Callable[[int], list[str]]:
    """What starts a server that is this program."""
    return lambda port: [sys.executable, "-c", program, str(port), *arguments]


FILES = """
import http.server, os, sys
os.chdir(sys.argv[2])
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""


def test_a_server_that_does_not_start_is_reported_with_its_log(tmp_path):
    """With the end of it, where the reason is; it has the variables that it is given, and ours."""
    program = "import os; raise SystemExit(5000 * '.' + os.environ['WHAT'] + os.environ['OURS'])"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OURS", "here")
        with (
            pytest.raises(RuntimeError, match="no model here") as error,
            server(python(program), tmp_path / "log", {"WHAT": "no model "}),
        ):
            pass
    assert len(str(error.value)) < 4000


def test_a_server_that_does_not_answer_in_time_is_ended(monkeypatch, tmp_path):
    """This one says at /health that there is no such thing."""
    monkeypatch.setattr(servers, "PATIENCE", 1.5)
    addresses = []

    def command(port: int) -> list[str]:
        addresses.append(f"http://127.0.0.1:{port}/")
        return python(FILES, str(tmp_path))(port)

    with pytest.raises(RuntimeError, match="did not start"), server(command, tmp_path / "log", {}):
        pass
    with pytest.raises(OSError, match="refused"):
        engine_texts.urlopen(addresses[0])


def test_a_server_ends_with_its_block(tmp_path):
    (tmp_path / "health").write_text("well")
    with server(python(FILES, str(tmp_path)), tmp_path / "log", {}) as one:
        address = one
        assert engine_texts.urlopen(f"{address}/health").read() == b"well"
    with pytest.raises(OSError, match="refused"):
        engine_texts.urlopen(f"{address}/health")


def test_a_server_that_does_not_listen_is_ended_all_the_same(monkeypatch, tmp_path):
    """It ignores that it is asked to end, as one does that waits for its own processes."""
    monkeypatch.setattr(servers, "FAREWELL", 0.2)
    (tmp_path / "health").write_text("well")
    deaf = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{FILES}"
    with server(python(deaf, str(tmp_path)), tmp_path / "log", {}) as one:
        address = one
    with pytest.raises(OSError, match="refused"):
        engine_texts.urlopen(f"{address}/health")


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_results_name_the_build_of_vllm_that_is_installed(monkeypatch, name):
    """The official one, on a machine with a GPU, has another name than the one for CPUs."""

    def version(package: str) -> str:
        if package.startswith("vllm") and package != name:
            raise importlib.metadata.PackageNotFoundError(package)
        return "0.30.0"

    for module in (stored, vllm_plugin):
        monkeypatch.setattr(module, "version", version)
    assert stored.machine(vllm_plugin.vllm_package())[name] == "0.30.0"
