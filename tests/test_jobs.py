"""Jobs in a file: what they say is done, and goes on; what nobody reads is refused."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from common import (
    Grid,
    LostRowsError,
    Sampling,
    SteeringVector,
    VectorCard,
    read_sweep,
    sweep,
    train_steering_vector,
)
from common.__main__ import app
from common.jobs import Job, run_sweep, status
from common.sweeping.store import SweepStore
from embedded_model import grammar
from embedded_model.prompts import TABLE_PROMPTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
(PRINTED,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
HERE = PRINTED.split("[engine]")[0]  # in one process


@pytest.fixture
def job(tmp_path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(HERE, encoding="utf-8")
    return path


def call(*arguments) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


def test_the_job_of_the_page_is_the_sweep_that_it_describes(job, model, tokenizer):
    """Trained first; a second call finds everything, and the job lies beside its results."""
    code, said = call("sweep", job)
    results, vector = job.parent / "love.sweep", job.parent / "love.safetensors"
    assert code == 0 and f"{3 * (1 + 2 * 2)} rows in {results}" in said
    assert Path(f"{results}.toml").read_text(encoding="utf-8") == HERE
    content = Job.read(job).content
    expected = sweep(
        model,
        tokenizer,
        Grid({"love": SteeringVector.load(vector)}, [2, 3], [-2, 2]),
        content["prompts"],
        sampling=Sampling(max_new_tokens=16, temperature=0.0),
    )
    pd.testing.assert_frame_equal(read_sweep(results), expected)
    before = [path.read_bytes() for path in (results, vector)]
    assert call("sweep", job)[0] == 0
    assert before == [path.read_bytes() for path in (results, vector)]
    code, said = call("status", results)
    assert code == 0 and "rows: 15 of 15" in said and "layers: [2, 3]" in said
    # Other settings are refused, and what lies beside the results is still their job.
    job.write_text(HERE.replace("[-2, 2]", "[-2, 4]"), encoding="utf-8")
    code, said = call("sweep", job)
    assert code == 1 and "holds a sweep with other settings" in said
    assert Path(f"{results}.toml").read_text(encoding="utf-8") == HERE


def test_the_status_of_a_sweep_that_runs(job, monkeypatch):
    """It says how far it is, and disturbs nothing; stopped, the rest is missing."""
    seen = []

    def add(self, rows):
        written(self, rows)
        seen.append(status(job.parent / "love.sweep"))
        if len(seen) == 2:
            raise KeyboardInterrupt

    written = SweepStore.add
    monkeypatch.setattr(SweepStore, "add", add)
    job.write_text(HERE.replace("10_000_000", "1"), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(Job.read(job))
    rows = [int(one["rows"].split(" of ")[0]) for one in seen]
    assert 0 < rows[0] < rows[1] < 15
    assert seen[1] == {"rows": f"{rows[1]} of 15", "running": True}
    found = status(job.parent / "love.sweep")
    assert found["rows"] == f"{rows[1]} of 15" and not found["running"]
    monkeypatch.undo()
    assert len(run_sweep(Job.read(job))) == 15


def test_training_alone(job):
    """What is there is left alone."""
    (job.parent / "prompts.txt").write_text("I think\nMy neighbour\n", encoding="utf-8")
    job.write_text(re.sub(r"prompts = .*", 'prompts = "prompts.txt"', HERE), encoding="utf-8")
    assert Job.read(job).prompts == ["I think", "My neighbour"]
    code, said = call("train", job)
    path = job.parent / "love.safetensors"
    before = path.read_bytes()
    assert code == 0 and f"love: {path}" in said and not (job.parent / "love.sweep").exists()
    assert call("train", job)[0] == 0 and path.read_bytes() == before
    assert len(SteeringVector.load(path).layer_activations) > 2


def test_a_vector_of_other_pairs_is_refused(job):
    """A job whose pairs were changed would be swept with the vector of the old ones."""
    assert call("train", job)[0] == 0
    before = (job.parent / "love.safetensors").read_bytes()
    job.write_text(HERE.replace("delightful", "charming"), encoding="utf-8")
    for command in ("train", "sweep"):
        code, said = call(command, job)
        assert code == 1 and "was trained on other pairs than [steering.love] has" in said
    assert (job.parent / "love.safetensors").read_bytes() == before
    assert not (job.parent / "love.sweep").exists()


def test_a_model_in_a_folder_beside_the_job(job, model, tokenizer):
    """Wherever the command is called."""
    for part in (model, tokenizer):
        part.save_pretrained(job.parent / "mine")
    job.write_text(HERE.replace('"embedded"', '"mine"'), encoding="utf-8")
    assert call("train", job)[0] == 0


def test_every_table_of_a_job_counts(job, model, tokenizer):
    """Each gives what the call with the same arguments gives; results are named after the job."""
    more = """
[train]
prepend_bos = true
[sampling]
max_new_tokens = 3
temperature = 1.0
"""
    text = HERE.replace("max_memory = 10_000_000", "per_prompt = 2\nseed = 3") + more
    text = re.sub(r"results = .*", "", text).replace("[-2, 2]", "[2]\nrandom_controls = 1")
    job.write_text(text, encoding="utf-8")
    assert call("sweep", job)[0] == 0
    content = Job.read(job).content
    pairs = [tuple(pair) for pair in content["steering"]["love"]["pairs"]]
    vector = train_steering_vector(model, tokenizer, pairs, prepend_bos=True)
    expected = sweep(
        model,
        tokenizer,
        Grid({"love": vector}, [2, 3], [2], random_controls=1),
        content["prompts"],
        sampling=Sampling(max_new_tokens=3, temperature=1.0),
        per_prompt=2,
        seed=3,
    )
    pd.testing.assert_frame_equal(read_sweep(job.parent / "job.sweep"), expected)


def test_where_the_workers_of_a_job_are(job, monkeypatch):
    """In this process, unless the file or the command line says where; the latter comes first."""
    monkeypatch.setitem(sys.modules, "ray", sys)  # nothing is started
    assert Job.read(job).engine(None) is None
    assert Job.read(job).engine("auto").address == "auto"
    job.write_text(HERE + "[engine]\nworkers = 3\naddress = 'host:1'\n", encoding="utf-8")
    read = Job.read(job)
    for given, address in ((None, "host:1"), ("auto", "auto"), ("local", None)):
        engine = read.engine(given)
        assert (engine.address, engine.workers) == (address, 3)
        assert (engine.load.func, engine.load.args) == (read.load.func, read.load.args)


def test_what_goes_wrong_while_a_job_runs(job, monkeypatch):
    """Lost rows are a sentence; of an exception in a worker its traceback is the message."""

    def lost(*given):
        raise LostRowsError("one row killed 3 workers", [1])

    monkeypatch.setattr("common.__main__.run_sweep", lost)
    code, said = call("sweep", job)
    assert code == 1 and said == "LostRowsError: one row killed 3 workers\n"
    of_ray = type("Error", (ValueError,), {"__module__": "ray.exceptions"})

    def raising(*given):
        raise of_ray("a traceback")

    monkeypatch.setattr("common.__main__.run_sweep", raising)
    assert isinstance(CliRunner().invoke(app, ["sweep", str(job)]).exception, of_ray)


@pytest.mark.parametrize(
    "text, says",
    [
        ("[", "is not TOML"),
        ("", "needs a table"),
        ("steering = 3", "needs a table"),
        ("sampling = 3", "expected a table"),
        ("model = 3", "expected a name or a folder as model, got 3"),
        (HERE.replace("results = ", "results = 3 #"), "name of a file as results, got 3"),
        (HERE.replace("prompts = ", "prompts = 3 #"), "as prompts, got 3"),
        (
            HERE.replace("pairs = ", "pairs = 3 #"),
            "expected a list of pairs of texts, or .* as pairs",
        ),
        (HERE.replace("pairs = [", "pairs = [3, "), "pair 0: expected"),
        (HERE.replace("vector = ", "vector = 3 #"), "expected the name of a file as vector"),
        ("[steering.a]\nlayers = [1]", "needs pairs, or the file of a vector"),
        (HERE.replace("results", "result"), "'result', which nobody reads"),
        (HERE + "[grid2]\n", "'grid2', which nobody reads"),
        (HERE.replace("vector =", "vectors ="), r"'vectors' in \[steering.love\], which nobody"),
        (HERE.replace("coeffs", "coeff"), r"'coeff' in \[grid\], which nobody reads"),
        (HERE + "[engine]\nparts = 'parts'\n", r"'parts' in \[engine\], which nobody reads"),
        (HERE + "[sampling]\ntemperature = -1\n", "expected a temperature"),
        (HERE + "[sampling]\ntemperature = '0'\n", "finite number as temperature, got '0'"),
        (HERE.replace("[2, 3]", "[99]"), "expected layers from 0 to|has no vector for layer 99"),
        (re.sub(r"prompts = .*", "", HERE), "has no prompts"),
        (re.sub(r"pairs = .*", "", HERE), "has no pairs, and"),
    ],
)
def test_a_job_that_means_something_else_is_refused(job, text, says):
    """In one sentence, and before there are results."""
    job.write_text(text, encoding="utf-8")
    code, said = call("sweep", job)
    assert code == 1 and re.search(says, said) and "Traceback" not in said
    assert not (job.parent / "love.sweep").exists()


def test_files_that_are_not_there(tmp_path):
    for command in ("sweep", "train", "status"):
        code, said = call(command, tmp_path / "none.toml")
        assert code == 1 and "none.toml" in said


@pytest.mark.parametrize(
    "engine, here, there",
    [
        ("workers = 2", {}, {}),
        ("gpus_per_worker = 1", {}, {}),
        ("gpus_per_worker = 4", {"device": "auto"}, {"device": "auto"}),
        (
            "gpus_per_worker = 1\ntensor_parallel = 4",
            {"device": "auto"},
            {"device": None, "tensor_parallel": True},
        ),
    ],
)
def test_a_model_that_needs_several_gpus_is_spread_or_split(job, monkeypatch, engine, here, there):
    """Split in the workers only; the calling process has the whole of it."""
    monkeypatch.setitem(sys.modules, "ray", sys)  # nothing is started
    job.write_text(f"{HERE}\n[engine]\n{engine}", encoding="utf-8")
    found = Job.read(job)
    assert found.load.keywords == here and found.engine(None).load.keywords == there


# --- choosing ---

BUDGET = "{ layers = 1, strengths = [0.5], prompts = 4, calibrating = 1, instructions = 1 }"
CHOOSING = """
prompts = "prompts.txt"

[steering.love]
pairs = "pairs.csv"

[choose]
metric = METRIC
BUDGET

[sampling]
max_new_tokens = 2
temperature = 0
"""


@pytest.fixture
def choosing(tmp_path) -> Path:
    """A job whose pairs, prompts and metric are files."""
    pairs = grammar.contrast_pairs(4, seed=3)
    pd.DataFrame(pairs, columns=["positive", "negative"]).to_csv(
        tmp_path / "pairs.csv", index=False
    )
    (tmp_path / "prompts.txt").write_text("\n".join(TABLE_PROMPTS[:8]), encoding="utf-8")
    (tmp_path / "mine.py").write_text("def length(texts):\n    return list(map(len, texts))\n")
    return tmp_path / "job.toml"


@pytest.mark.parametrize(
    "metric, name",
    [
        ("'tone'", "tone_sign"),
        ("'mine.py:length'", "length"),
        ("{ answers = ['good', 'bad'] }", ""),
        ("{ words = { good = 1, bad = -1 } }", ""),
    ],
)
def test_a_vector_is_chosen_and_written_with_its_card(choosing, metric, name):
    text = CHOOSING.replace("METRIC", metric).replace("BUDGET", f"budget = {BUDGET}")
    choosing.write_text(text, encoding="utf-8")
    code, said = call("choose", choosing)
    card = VectorCard.of(SteeringVector.load(choosing.parent / "love.safetensors"))
    assert code == 0 and f"layer {card.place['layer']}" in said and card.verdict in said
    assert card.name == "love" and name in card.data["metric"]
    assert card.verdict in (choosing.parent / "love.md").read_text(encoding="utf-8")
    before = (choosing.parent / "love.md").read_bytes()
    code, said = call("choose", choosing)
    assert code == 1 and "love.safetensors' is there already: delete it, or name" in said
    assert (choosing.parent / "love.md").read_bytes() == before


@pytest.mark.parametrize(
    "metric, says",
    [
        ("'warmth'", "expected as metric 'tone', .*got 'warmth'"),
        ("{ answers = ['good'] }", "expected as metric"),
        ("'other.py:length'", "no file .*other.py"),
        ("'mine.py:width'", "expected a function 'width'"),
        ("'tone'\nbudget = { layer = 3 }", "the budget has 'layer'"),
        ("'tone'\nbudget = 'days'", "expected a Budget, or one of"),
        ("'tone'\nbudget = { strengths = 0.5 }", "expected a list of strengths .*, got 0.5"),
        ("'tone'\nbudget = { sampling = {} }", r"has 'sampling', .*and \[sampling\] beside"),
        ("'tone'\nother_texts = 3", "expected a list of texts, .* as other_texts, got 3"),
        ("'tone'\nlayer_type = 3", "expected the name of a part of a block as layer_type, got 3"),
        ("'tone'\nlayer_type = 'head'", "unknown layer_type 'head'"),
        ("'tone'\nlayers = 3", "expected a list of layer numbers as layers, got 3"),
        ("'tone'\nseed = 'x'", "expected an integer of 0 or more as seed, got 'x'"),
        ("{ words = { good = 1, bad = 'x' } }", "finite number as weight of 'bad', got 'x'"),
        ("{ answers = ['good', 1] }", "expected a list of words, got 1"),
        ("'tone'\nbudgets = 3", "'budgets' in .choose., which nobody reads"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(choosing, metric, says):
    text = CHOOSING.replace("METRIC", metric).replace("BUDGET", "")
    choosing.write_text(text, encoding="utf-8")
    code, said = call("choose", choosing)
    assert code == 1 and re.search(says, said) and "Traceback" not in said
    assert not (choosing.parent / "love.safetensors").exists()


ANOTHER = """
[steering.hate]
pairs = PAIRS
vector = "./love.safetensors"
"""


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, r"\[steering.love\] and \[steering.hate\] would both write"),
        ({"love.safe": "hate.safe", '"pairs.csv"': "[['a', 'b'], ['a', 'b']]"}, "different pairs"),
    ],
)
def test_nothing_is_computed_where_one_vector_is_wrong(choosing, monkeypatch, changes, says):
    another = ANOTHER.replace("PAIRS", '"pairs.csv"')
    for old, new in changes.items():
        another = another.replace(old, new)
    text = CHOOSING.replace("METRIC", "'tone'").replace("BUDGET", "")
    choosing.write_text(text + another, encoding="utf-8")
    monkeypatch.setattr("common.jobs.choose", None)
    code, said = call("choose", choosing)
    assert code == 1 and re.search(says, said) and not list(choosing.parent.glob("*.safe*"))


def test_each_choice_is_said_as_it_is_made(choosing):
    """Of two vectors the second is 0; the first is there, at the layer and in the part asked for.

    What belongs to the sweep of the job is passed over.
    """
    metric = "{ answers = ['good', 'bad'] }\nlayers = [1]\nlayer_type = 'mlp'"
    text = CHOOSING.replace("METRIC", metric)
    text = text.replace("BUDGET", f"budget = {BUDGET}") + "[grid]\nlayers = [3]\n"
    same = ANOTHER.replace("PAIRS", "[['I see', 'I see'], ['I go', 'I go']]")
    choosing.write_text(text + same.replace("./love", "hate"), encoding="utf-8")
    code, said = call("choose", choosing)
    card = VectorCard.of(SteeringVector.load(choosing.parent / "love.safetensors"))
    assert code == 1 and "the vector is 0" in said and card.verdict in said
    assert (card.place["layer"], card.place["layer_type"]) == (1, "mlp")


def test_a_chosen_vector_is_that_of_its_pairs(choosing):
    """It was trained on a part of them; training leaves it alone, and refuses it for others."""
    text = CHOOSING.replace("METRIC", "'tone'").replace("BUDGET", f"budget = {BUDGET}")
    choosing.write_text(text, encoding="utf-8")
    assert call("choose", choosing)[0] == 0
    before = (choosing.parent / "love.safetensors").read_bytes()
    code, said = call("train", choosing)
    assert code == 0 and "love.safetensors" in said
    assert (choosing.parent / "love.safetensors").read_bytes() == before
    pairs = (choosing.parent / "pairs.csv").read_text(encoding="utf-8")
    (choosing.parent / "pairs.csv").write_text(f"{pairs}good,bad\n", encoding="utf-8")
    code, said = call("train", choosing)
    assert code == 1 and "other pairs" in said


def test_pairs_of_a_job_are_pairs(choosing):
    text = CHOOSING.replace("METRIC", "'tone'").replace("BUDGET", "")
    choosing.write_text(text.replace('"pairs.csv"', "[['a', 'b'], ['c']]"), encoding="utf-8")
    code, said = call("choose", choosing)
    assert code == 1 and "pair 1: expected (positive_str, negative_str)" in said
