"""What may happen to a cluster: no row is lost, nothing hangs. `make scale` runs this."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from played import load_deadly, load_embedded
from ray_driver import PROMPTS, ROWS, run, vector, words

from common import (
    Grid,
    Sampling,
    mean_aggregator,
    pca_aggregator,
    read_sweep,
    sweep,
    train_steering_vector,
)
from common.scaling.dispatch import LostRowsError
from common.scaling.ray_engine import RayEngine

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
PAIRS = [
    (f"I love {what} and {who}", f"I hate {what} and {who}")
    for what in ("dogs", "the garden", "you", "the old library", "them", "it")
    for who in ("you", "the captain", "my neighbour", "us")
] * 40

pytest.importorskip(
    "ray", reason="Ray is not installed: python3 -m pip install -r requirements-scale.txt"
)
pytestmark = pytest.mark.scale


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as the workers have, so that the last bits are the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    """The frame of this process, in units of some rows."""
    return run(model, tokenizer)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_frames_and_vectors_for_any_number_of_workers(model, tokenizer, workers):
    """Three cuts, to the last bit; and vectors that are the same for all."""
    with RayEngine(workers=workers, load=load_embedded) as engine:
        for memory in (1, 3_000_000, 2**30):
            if memory not in KNOWN:
                KNOWN[memory] = run(model, tokenizer, max_memory=memory)
            found = run(model, tokenizer, max_memory=memory, engine=engine)
            pd.testing.assert_frame_equal(found, KNOWN[memory], check_exact=True)
        for aggregator in (mean_aggregator(), pca_aggregator()):
            options = {"aggregator": aggregator, "engine": engine, "batch_size": 16}
            found = train_steering_vector(model, tokenizer, PAIRS, **options).layer_activations
            name = aggregator.__name__
            for layer, vector in found.items():
                assert torch.equal(KNOWN.setdefault((name, layer), vector), vector)


KNOWN: dict = {}  # frames by cut, vectors by aggregator and layer


def test_a_row_that_ends_its_process_is_named(model, tokenizer, tmp_path):
    """All others are in the file. Where it can be computed, the same call does the rest."""
    path, prompts = tmp_path / "a.sweep", [*PROMPTS, "I think cats are"]
    (only,) = set(prompts[-1].split()) - {w for p in PROMPTS for w in p.split()}
    options = {"sampling": Sampling(max_new_tokens=2, temperature=0.0), "path": path}
    grid = Grid({"v": vector()}, [3], [1.0])
    with (
        RayEngine(workers=2, load=partial(load_deadly, f" {only}")) as engine,
        pytest.raises(LostRowsError, match=f"2 rows killed 3 workers each.*{only}") as error,
    ):
        sweep(model, tokenizer, grid, prompts, engine=engine, **options)
    assert sorted(error.value.numbers) == [4, 9] and len(read_sweep(path)) == 8
    found = sweep(model, tokenizer, grid, prompts, **options)
    assert len(found) == 10 and found["completion"].notna().all()


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_node_that_vanishes(model, tokenizer, expected, tmp_path, nodes):
    """Its raylet is killed in the middle, with all its workers; the others do its rows."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    others = [cluster.add_node(num_cpus=1) for _ in range(nodes - 1)]
    path, gone = tmp_path / "a.sweep", []
    try:
        with RayEngine(cluster.address, workers=nodes, load=load_embedded) as engine:

            def metric(texts):
                if list(texts) != PROMPTS and not gone:
                    if len(engine.workers_alive()) == nodes:
                        gone.append(others[0])
                        cluster.remove_node(others[0], allow_graceful=False)
                    else:
                        time.sleep(0.5)
                return words(texts)

            found = run(model, tokenizer, metric, path=path, engine=engine)
            pd.testing.assert_frame_equal(found, expected)
            pd.testing.assert_frame_equal(read_sweep(path), found)
            assert gone
    finally:
        ray.shutdown()
        cluster.shutdown()


def driver(path: Path, *limit: str) -> tuple[subprocess.Popen, list[int]]:
    """A program that sweeps, once rows are in its file, and the processes that it started."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "ray_driver.py"), str(path), *limit],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("processes"):
            return process, [int(word) for word in line.split()[1:]]
    raise AssertionError(process.stderr.read())


def gone(pids: list[int], seconds: float = 120) -> bool:
    """Whether processes are gone, now or soon; a zombie is gone.

    Two agents of Ray notice only after some 50 s that the driver was killed.
    """
    deadline = time.monotonic() + seconds

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not any(map(alive, pids))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_is_stopped_leaves_no_process_and_goes_on(
    model, tokenizer, expected, tmp_path, sent
):
    """By Ctrl-C, or killed; the next call computes only what is missing."""
    path = tmp_path / "a.sweep"
    process, pids = driver(path)
    os.kill(process.pid, sent)
    process.wait(60)
    assert process.returncode and len(pids) > 3 and gone(pids)
    part, computed = read_sweep(path), []

    def metric(texts):
        computed.extend(texts if list(texts) != PROMPTS else [])
        return words(texts)

    with RayEngine(workers=2, load=load_embedded) as engine:
        found = run(model, tokenizer, metric, path=path, engine=engine)
    pd.testing.assert_frame_equal(found, expected)
    assert 0 < len(part) < ROWS and len(computed) >= ROWS - len(part)


def test_a_disk_that_is_full(model, tokenizer, expected, tmp_path):
    """The driver says so; what it had written is there, and the rest comes once there is room."""
    path = tmp_path / "a.sweep"
    process, pids = driver(path, "20000")
    said = process.communicate(timeout=120)[1]
    assert process.returncode and "cannot be written" in said and gone(pids)
    assert 0 < len(read_sweep(path)) < ROWS
    pd.testing.assert_frame_equal(run(model, tokenizer, path=path), expected)


def test_two_drivers_on_one_file(model, tokenizer, expected, tmp_path):
    """The second is told so before it starts a worker; the first goes on."""
    path = tmp_path / "a.sweep"
    process, _ = driver(path)
    engine = RayEngine(workers=1, load=load_embedded)
    with pytest.raises(ValueError, match="another sweep is running on it"):
        run(model, tokenizer, path=path, engine=engine)
    assert not engine.workers_alive()
    assert process.wait(120) == 0, process.stderr.read()
    pd.testing.assert_frame_equal(read_sweep(path), expected)
