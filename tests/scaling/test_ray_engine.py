"""The engine on a cluster of this machine: the same rows, and what is lost is done again.

`make scale` also runs what is marked here, and `test_ray_failures.py`.
"""

import os
import re
import signal
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from played import load_another, load_embedded
from ray_driver import PROMPTS, run, vector
from tokenizers import normalizers

from common import (
    Grid,
    extract_activations,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    perplexity_ratios,
    read_sweep,
    sweep_logits,
    sweep_perplexity,
    train_steering_vector,
)
from common.jobs import Job, run_sweep
from common.scaling.ray_engine import RayEngine, check_identity, identity_here

pytest.importorskip(
    "ray", reason="Ray is not installed: python3 -m pip install -r requirements-scale.txt"
)

SCALE = pytest.mark.scale
ROOT = Path(__file__).resolve().parents[2]
GRID = Grid({"v": vector()}, [1, 4], [-1.0, 1.0])
PAIRS = [(f"I love {what}", f"I hate {what}") for what in ("dogs", "you", "the old garden")] * 100


@pytest.fixture(scope="module")
def engine():
    with RayEngine(workers=2, load=load_embedded, num_cpus=4) as engine:
        yield engine


@pytest.fixture(autouse=True)
def one_thread():
    """As many as the workers have, so that the last bits are the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_all_kinds_of_work_give_what_this_process_gives(model, tokenizer, engine, tmp_path):
    """To the last bit, where nothing is added in another order."""
    frames = [
        lambda **more: run(model, tokenizer, **more),
        lambda **more: sweep_logits(model, tokenizer, GRID, PROMPTS, max_memory=10**6, **more),
        lambda **more: sweep_perplexity(model, tokenizer, GRID, PROMPTS, max_memory=10**6, **more),
        lambda **more: perplexity_ratios(
            model, tokenizer, {"t": PROMPTS}, {"c": "I", "v": vector().apply}, bootstrap=9, **more
        ),
    ]
    for number, frame in enumerate(frames):
        path = {} if number == 3 else {"path": tmp_path / f"{number}.sweep"}
        found = frame(engine=engine, **path)
        pd.testing.assert_frame_equal(found, frame(), check_exact=True)
    assert len(engine.workers_alive()) == 2
    for aggregator in (mean_aggregator(), pca_aggregator(), logistic_aggregator()):
        options = {"layers": [1], "aggregator": aggregator}
        found = train_steering_vector(model, tokenizer, PAIRS, engine=engine, **options)
        expected = train_steering_vector(model, tokenizer, PAIRS, **options)
        torch.testing.assert_close(
            found.layer_activations, expected.layer_activations, rtol=1e-3, atol=1e-4
        )
    found = extract_activations(model, tokenizer, PAIRS, [3], engine=engine)
    expected = extract_activations(model, tokenizer, PAIRS, [3])
    torch.testing.assert_close(found, expected)


def test_a_worker_that_is_killed_is_replaced(model, tokenizer, engine, tmp_path):
    """In the middle of its work; no row is lost, and none comes twice."""
    path, killed = tmp_path / "a.sweep", []

    def metric(texts):
        if not killed and len(texts) < len(PROMPTS):  # not at the trial
            killed.append(next(iter(engine.workers_alive())))
            os.kill(killed[0], signal.SIGKILL)
        return [len(text.split()) for text in texts]

    found = run(model, tokenizer, metric, path=path, engine=engine)
    pd.testing.assert_frame_equal(found, run(model, tokenizer))
    pd.testing.assert_frame_equal(read_sweep(path), found)
    assert killed and not psutil.pid_exists(killed[0])


def broken(steered, plain):
    if steered.abs().max() > 0:  # not at the trial
        raise KeyError("a bug in the metric")
    return [0.0] * len(steered)


def test_an_exception_comes_at_once_with_the_workers_traceback(model, tokenizer, engine):
    """And nothing goes on behind the caller's back: the workers are gone."""
    workers = engine.workers_alive()
    with pytest.raises(KeyError, match=r"in broken[\s\S]*a bug in the metric"):
        sweep_logits(model, tokenizer, GRID, PROMPTS, {"m": broken}, engine=engine)
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(map(psutil.pid_exists, workers)) and not engine.workers_alive()


@pytest.mark.scale
def test_one_work_at_a_time(model, tokenizer, engine):
    """A second call is told so, and the first goes on."""
    refused = []

    def metric(texts):
        if not refused and len(texts) < len(PROMPTS):  # not at the trial
            with pytest.raises(RuntimeError, match="this engine is at work") as error:
                sweep_logits(model, tokenizer, GRID, PROMPTS, engine=engine)
            refused.append(error)
        return [len(text.split()) for text in texts]

    found = run(model, tokenizer, metric, engine=engine)
    pd.testing.assert_frame_equal(found, run(model, tokenizer))
    sweep_logits(model, tokenizer, GRID, PROMPTS, engine=engine)
    assert refused


def test_a_function_that_holds_the_model_here_is_refused(model, tokenizer, engine):
    with pytest.raises(ValueError, match="the model is another one"):
        perplexity_ratios(
            model, tokenizer, {"t": PROMPTS}, {"v": lambda _: vector().apply(model)}, engine=engine
        )


def load_no_tokenizer():
    return load_embedded().model


def load_other_reading():
    """The embedded model with a tokenizer that writes the same and reads otherwise."""
    model, tokenizer, _ = load_embedded()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return model, tokenizer


@pytest.mark.parametrize(
    "load, says",
    [
        pytest.param(load_another, "what differs: weights$", marks=SCALE),
        pytest.param(load_other_reading, "what differs: tokenizer$", marks=SCALE),
        pytest.param(load_no_tokenizer, "expected load to return a model and", marks=SCALE),
    ],
)
def test_a_worker_with_another_model_is_refused(model, tokenizer, engine, load, says):
    """Before it computes a row."""
    with RayEngine(workers=1, load=load) as other, pytest.raises(ValueError, match=says):
        sweep_logits(model, tokenizer, GRID, PROMPTS, engine=other)


@pytest.mark.parametrize(
    "load, name", [(load_another, "weights"), (load_other_reading, "tokenizer")]
)
def test_another_model_is_told_by_one_weight_or_reading(model, tokenizer, load, name):
    here = identity_here(model, tokenizer, None)
    check_identity(identity_here(*load_embedded()[:2], None), here)
    with pytest.raises(ValueError, match=f"what differs: {name}$"):
        check_identity(identity_here(*load(), None), here)


@SCALE
def test_the_job_of_the_page_runs_on_the_cluster(engine, tmp_path):
    """As printed, and with the rows of one process."""
    (printed,) = re.findall(
        r"```toml\n(.*?)```", (ROOT / "docs/scaling.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for name, text in (("job", printed), ("here", printed.split("[engine]")[0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.toml").write_text(text, encoding="utf-8")
    frames = [run_sweep(Job.read(tmp_path / name / "job.toml")) for name in ("job", "here")]
    assert len(frames[0]) == 15
    pd.testing.assert_frame_equal(*frames)
