"""What an engine costs and gains on this machine, and what one driver can take.

    python -m benchmarks.scale [--quick]

prints a table and writes `results/scale.json`. The same sweep of the embedded model runs in this
process, on one worker, and on two, one thread each, in turns; and, as a control, in two processes
that know nothing of each other: more than these gain, no engine can gain on this machine. How long
an engine takes to start is measured by itself. It needs `requirements-scale.txt`.
"""

import argparse
import multiprocessing
import pickle
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.stored import machine, machine_line, store
from benchmarks.timing import interleaved, summary
from common.loading import load_model
from common.scaling.ray_engine import RayEngine
from common.scaling.units import Engine
from common.sweeping.grid import Grid
from common.sweeping.runs import MEMORY, Completing
from common.sweeping.store import SweepStore
from common.sweeping.sweep import sweep
from common.sweeping.texts import Texts
from common.texts.sampling import Sampling
from common.vectors.training import train_steering_vector
from embedded_model.prompts import SWEEP_PROMPTS, TABLE_PROMPTS

COEFFS = [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0]
SAMPLING = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.9)
ROWS_IN_A_UNIT = 100  # about
CONTROL = "two processes without an engine"
LARGE_SWEEP = 1920  # cells of a sweep that is only cut into units
SAMPLES = 6  # of each prompt
ASKED = {"one worker, of none": 1.05, "two workers, of one": 1.8}

load_embedded = partial(load_model, "embedded", device="cpu")


class Case:
    """Some 5,000 completions: 17 prompts, 6 layers, 8 coefficients, 6 samples of each."""

    def __init__(self, quick: bool):
        self.model, self.tokenizer, _ = load_embedded()
        vector = train_steering_vector(self.model, self.tokenizer, [("Love", "Hate")]).unit()
        self.grid = Grid({"v": vector}, coeffs=COEFFS[:2] if quick else COEFFS)
        prompts = [*TABLE_PROMPTS, *SWEEP_PROMPTS]
        self.prompts = list(dict.fromkeys(prompts))[: 4 if quick else 17]
        config = self.model.config
        bytes_of_row = 4 * 32 * config.n_embd * (2 * config.n_layer + 12) + 16 * config.vocab_size
        self.unit = ROWS_IN_A_UNIT * bytes_of_row
        self.frames: dict[str, pd.DataFrame] = {}

    def run(self, name: str, engine: Engine | None = None) -> None:
        """Sweep into a new file."""
        with tempfile.TemporaryDirectory() as folder:
            self.frames[name] = sweep(
                self.model,
                self.tokenizer,
                self.grid,
                self.prompts,
                sampling=SAMPLING,
                per_prompt=SAMPLES,
                path=Path(folder) / "a.sweep",
                max_memory=self.unit,
                show_progress=False,
                engine=engine,
            )


_alone: list[Case] = []  # in each process of the control


def _begin(quick: bool) -> None:
    torch.set_num_threads(1)
    _alone.append(Case(quick))


def _sweep_alone(name: str) -> None:
    _alone[0].run(name)


def measure_engine(case: Case, quick: bool, rounds: int) -> dict[str, Any]:
    """Time the sweep without an engine, on one worker, on two, and twice at once."""
    with ExitStack() as stack:
        processes = multiprocessing.get_context("spawn").Pool(2, _begin, [quick])
        stack.callback(processes.join)
        stack.callback(processes.close)
        started = time.perf_counter()
        engines = [RayEngine(workers=count, load=load_embedded, num_cpus=3) for count in (2, 1)]
        for engine in engines:  # the first starts the cluster, for both
            stack.enter_context(engine)
        ways = {"two workers": engines[0], "one worker": engines[1], "none": None}
        case.run("two workers", engines[0])
        first = time.perf_counter() - started
        runs = {name: partial(case.run, name, engine) for name, engine in ways.items()}
        both = partial(processes.map, _sweep_alone, ["none", "none"], 1)
        seconds = interleaved(runs | {CONTROL: lambda: both() and None}, rounds, "sweeping")
    rows = len(case.frames["none"])
    same = all(case.frames["none"].equals(case.frames[name]) for name in ways)
    return {
        "rows": rows,
        "same rows": same,
        "rows per second": {
            name: rows * (2 if name == CONTROL else 1) / statistics.median(found)
            for name, found in seconds.items()
        },
        "one worker, of none": summary(seconds["one worker"], seconds["none"]),
        "two workers, of one": summary(seconds["one worker"], seconds["two workers"]),
        "two processes, of one": summary([2 * s for s in seconds["none"]], seconds[CONTROL]),
        "start of cluster and two workers, s": first - statistics.median(seconds["two workers"]),
    }


def measure_driver(case: Case, rounds: int) -> dict[str, Any]:
    """Measure how large a row is on its way, and how many a second the driver cuts and writes."""
    frame = case.frames["none"]
    rows = [
        {name: None if pd.isna(value) else value for name, value in row.items()}
        for row in frame.to_dict("records")
    ]
    size = len(pickle.dumps(dict(enumerate(rows[:ROWS_IN_A_UNIT])))) / ROWS_IN_A_UNIT

    def write() -> float:
        with tempfile.TemporaryDirectory() as folder:
            sweep_store = SweepStore(Path(folder) / "a.sweep", {}, list(frame))
            started = time.perf_counter()
            for start in range(0, len(rows), ROWS_IN_A_UNIT):
                part = rows[start : start + ROWS_IN_A_UNIT]
                sweep_store.add(enumerate(part, start))
            seconds = time.perf_counter() - started
            sweep_store.close()
        return seconds

    cells = case.grid.cells(case.model, case.tokenizer)
    cells = (cells * LARGE_SWEEP)[:LARGE_SWEEP]
    texts = Texts(case.model, case.tokenizer, case.prompts, None)
    large = Completing(texts, cells, SAMPLING, SAMPLES, 0, MEMORY)

    def cut() -> None:
        large.units(())

    seconds = interleaved({"store": write, "cut": cut}, rounds, "writing and cutting")
    return {
        "bytes per row": size,
        "rows per second into the file": len(rows) / statistics.median(seconds["store"]),
        "rows per second cut": len(large) / statistics.median(seconds["cut"]),
        "rows in a transaction": ROWS_IN_A_UNIT,
    }


def report(results: dict[str, Any]) -> None:
    """Print what was measured, beside what was asked for."""
    engine, driver = results["engine"], results["driver"]
    print(f"\n{engine['rows']} completions; the same rows in all three: {engine['same rows']}\n")
    for name, rate in engine["rows per second"].items():
        print(f"{name}: {rate:.0f} rows per second")
    for name, sign in (("one worker, of none", "at most"), ("two workers, of one", "at least")):
        found = engine[name]
        print(
            f"{name}: {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f}),"
            f" asked for {sign} {ASKED[name]}"
        )
    found = engine["two processes, of one"]
    print(
        f"{CONTROL}, of one: {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f}),"
        " what this machine can gain"
    )
    print(f"start: {engine['start of cluster and two workers, s']:.1f} s")
    print(
        f"driver: {driver['bytes per row']:.0f} bytes per row,"
        f" {driver['rows per second into the file']:.0f} rows per second into the file,"
        f" {driver['rows per second cut']:.0f} rows per second cut into units\n"
    )
    print(machine_line(results))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure what an engine costs and gains.")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny sweep and one round; writes nothing"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each case")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    torch.set_num_threads(1)
    case = Case(options.quick)
    results: dict[str, Any] = {"machine": machine("ray"), "rounds": rounds}
    results["engine"] = measure_engine(case, options.quick, rounds)
    results["driver"] = measure_driver(case, rounds)
    report(results)
    if not options.quick:
        store(results, {}, "scale")


if __name__ == "__main__":
    main()
