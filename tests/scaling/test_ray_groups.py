"""Workers that are groups of processes, each of which holds a part of the model."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from architectures import D_MODEL, tiny_model
from played import load_embedded

from common import (
    Grid,
    Sampling,
    SteeringVector,
    extract_activations,
    load_model,
    mean_aggregator,
    read_sweep,
    sweep,
    sweep_logits,
    train_steering_vector,
)
from common.scaling.ray_engine import RayEngine

pytest.importorskip(
    "ray", reason="Ray is not installed: python3 -m pip install -r requirements-scale.txt"
)
pytestmark = pytest.mark.scale

VECTOR = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
GRID = Grid({"v": SteeringVector({1: VECTOR, 2: VECTOR})}, [1, 2], [-1.0, -0.5, 0.5, 1.0])
PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the"]
PAIRS = [("I love you", "I hate you"), ("Love.", "Hate."), ("My garden", "The bride")] * 9


def load_split(folder: str):
    """The model in parts, and a file that says which process has one."""
    found = load_model(folder, tensor_parallel=True)
    Path(folder, f"process {os.getpid()}").touch()
    return found


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("Llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(folder):
    return load_model(str(folder), device="cpu")[:2]


@pytest.fixture(scope="module")
def engine(folder):
    load = partial(load_split, str(folder))
    options = {"parts": folder / "parts", "num_cpus": 4}
    with RayEngine(workers=1, tensor_parallel=2, load=load, **options) as engine:
        yield engine


def processes(folder: Path) -> set[int]:
    """Those that have loaded a part, and live; they descend from this one."""
    found = {int(path.name.split()[1]) for path in folder.glob("process *")}
    return found & {one.pid for one in psutil.Process().children(recursive=True)}


def run(model, tokenizer, metric=None, **options):
    metrics = {"words": metric or (lambda texts: [len(text.split()) for text in texts])}
    options = {"max_memory": 120_000, "sampling": Sampling(max_new_tokens=6)} | options
    return sweep(model, tokenizer, GRID, PROMPTS, metrics, **options)


def test_a_group_gives_what_one_process_gives(llama, engine, tmp_path):
    """Sampled texts are the same; logits and means differ by rounding."""
    found = run(*llama, path=tmp_path / "a.sweep", engine=engine)
    pd.testing.assert_frame_equal(found, run(*llama))
    found, expected = (sweep_logits(*llama, GRID, PROMPTS, engine=one) for one in (engine, None))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-5)
    means = [
        train_steering_vector(*llama, PAIRS, aggregator=mean_aggregator(), engine=one)
        for one in (engine, None)
    ]
    for layer, vector in means[1].layer_activations.items():
        largest = vector.abs().max().item()
        torch.testing.assert_close(
            means[0].layer_activations[layer], vector, rtol=0, atol=1e-5 * max(1, largest)
        )


def test_a_group_keeps_activations_once(llama, engine, folder):
    """In files that one of its processes writes, and that none reads the model for again."""
    found = [extract_activations(*llama, PAIRS, [1, 3], engine=engine) for _ in range(2)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    expected = extract_activations(*llama, PAIRS, [1, 3])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert [path.suffix for path in (folder / "parts").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("first", [True, False], ids=["the first process", "another process"])
def test_a_group_that_loses_a_process_is_replaced(llama, engine, folder, tmp_path, first):
    """Whole, and no row is lost; nothing waits for the one that is gone."""
    path, before = tmp_path / "a.sweep", set()

    def metric(texts):
        if not before and len(texts) < len(PROMPTS):  # not at the trial
            (leader,) = engine.workers_alive()
            before.update(processes(folder))
            os.kill(leader if first else next(iter(before - {leader})), signal.SIGKILL)
        return [len(text.split()) for text in texts]

    found = run(*llama, metric, path=path, engine=engine)
    pd.testing.assert_frame_equal(found, run(*llama))
    pd.testing.assert_frame_equal(read_sweep(path), found)
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(before) == 2 and not before & processes(folder)


def broken(steered, plain):
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
        raise KeyError("a bug in the metric")
    return [0.0] * len(steered)


def test_an_exception_of_any_process_ends_the_work(llama, engine, folder):
    with pytest.raises(KeyError, match="a bug in the metric"):
        sweep_logits(*llama, GRID, PROMPTS, {"m": broken}, engine=engine)
    deadline = time.monotonic() + 10
    while processes(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(folder) and not engine.workers_alive()


def test_a_group_that_loads_whole_models_is_refused(model, tokenizer):
    with (
        RayEngine(workers=1, tensor_parallel=2, load=load_embedded, num_cpus=4) as engine,
        pytest.raises(ValueError, match="each of 2 processes a whole model: expected .*split"),
    ):
        train_steering_vector(model, tokenizer, PAIRS, engine=engine)
