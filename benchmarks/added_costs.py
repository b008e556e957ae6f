"""What steering adds to a forward pass, in microseconds, and the ratio that follows for each size.

    python -m benchmarks.added_costs [--quick] [--rounds N]

A pass of a large model varies by more than steering costs, so a ratio that is measured there is
mostly noise. Steering acts on the width of the residual stream, and a mechanism may also do
something at every block. So models of one and of five blocks of each width are measured here, in
many short runs, each beside an unsteered one; what is added grows on a line with the number of
blocks. Divided by the unsteered time at full size (`mechanisms.json`) it is the ratio. The control
is the same comparison between unsteered and unsteered: what it shows is noise.

Prints a table and writes `added_costs.json` and `.png` into `results/`.
"""

import argparse
import datetime
import gc
import random
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import bootstrap
from tqdm import tqdm

from benchmarks.mechanism_costs import load_results
from benchmarks.shapes import SHAPES
from benchmarks.stored import machine, machine_line, provenance, store
from benchmarks.timing import seconds_of
from benchmarks.workbench import XL, Case, Workbench
from repository.mechanisms import MECHANISMS

CONTROL = "unsteered"  # as it is called where it is steered by nothing, beside itself
# By the names of `mechanisms.json`, with the number of threads that is fastest there.
SIZES: dict[str, tuple[dict[str, int], int | None]] = {
    "embedded": ({"n_layer": 6, "n_embd": 256, "n_head": 4}, 1),
    "gpt2-small shape": (SHAPES["gpt2-small"], None),
    XL: (SHAPES["gpt2-xl"], None),
}
DEPTHS = (1, 5)  # blocks
# The head is not steered, and would only add noise.
SMALL_HEAD = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0}
PASSES = 3  # in a run; one more comes before, after switching on or off, and does not count
WARM_UP = 3  # rounds that do not count
DRAWS = 2000  # of the bootstrap


def differences(bench: Workbench, rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Time short runs of each mechanism beside unsteered ones, in changing order.

    Returns:
        By mechanism, and for the control: seconds that a pass took longer than the unsteered one
        beside it, in each round.
    """
    order, found = random.Random(seed), {name: [] for name in (CONTROL, *MECHANISMS)}
    gc.collect()
    gc.disable()  # else it is one way or the other that pays for both
    try:
        for turn in tqdm(range(rounds + WARM_UP), desc=bench.case.name, unit="round"):
            names = order.sample(list(found), len(found))
            for name in names:
                pair = [(CONTROL, -1), (name, 1)]
                seconds = sum(
                    sign * _run(bench, one) for one, sign in order.sample(pair, len(pair))
                )
                if turn >= WARM_UP:
                    found[name].append(seconds)
    finally:
        gc.enable()
    return found


def _run(bench: Workbench, name: str) -> float:
    """Time a few passes; return the seconds of one."""
    work = bench.work(name, "forward")
    with bench.steered(name):
        work()
        return seconds_of(lambda: [work() for _ in range(PASSES)], bench.device) / PASSES


def estimate(
    by_depth: dict[int, list[float]], blocks: int, seconds: float
) -> dict[str, list[float]]:
    """Return what steering adds at full depth, with 95 % intervals.

    Args:
        by_depth: by number of blocks, what `differences` found for one mechanism.
        blocks: of the model at full size.
        seconds: that an unsteered pass takes there.

    Returns:
        `microseconds` a pass, `each block`, and `ratio` to unsteered, each as median, low and high.
    """
    (few, there), (many, here) = [(depth, _medians(one)) for depth, one in by_depth.items()]
    slope = (here - there) / (many - few)  # [median, draws]
    added = there + slope * (blocks - few)
    return {
        "microseconds": _interval(1e6 * added),
        "each block": _interval(1e6 * slope),
        "ratio": _interval(1 + added / seconds),
    }


def _medians(values: list[float]) -> NDArray[np.float64]:
    """Return the median, followed by those of the bootstrap."""
    drawn = bootstrap(
        (values,), np.median, n_resamples=DRAWS, method="percentile", random_state=0
    ).bootstrap_distribution
    return np.concatenate([[np.median(values)], drawn])


def _interval(values: NDArray[np.float64]) -> list[float]:
    """Return the first value, and the 95 % interval of the others."""
    return [float(values[0]), *np.quantile(values[1:], [0.025, 0.975]).tolist()]


def measure(size: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure at the width of one size.

    Args:
        size: of `SIZES`.
        rounds: how many runs of each mechanism are compared, at each depth.
        seconds: that an unsteered pass takes at full size.

    Returns:
        `estimate` by mechanism, in `added`, and what it was made of.
    """
    shape, threads = SIZES[size]
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    by_depth = {}
    try:
        for depth in DEPTHS:
            small = {**shape, **SMALL_HEAD, "n_layer": depth}
            case = Case(f"{size}, {depth} blocks", small, torch.float32, layer=0, new_tokens=1)
            by_depth[depth] = differences(Workbench(case, "cpu"), rounds)
    finally:
        torch.set_num_threads(before)
    return {
        "d_model": shape["n_embd"],
        "blocks": shape["n_layer"],
        "unsteered, s": seconds,
        "added": {
            name: estimate(
                {depth: found[name] for depth, found in by_depth.items()}, shape["n_layer"], seconds
            )
            for name in (CONTROL, *MECHANISMS)
        },
    }


def added_table(results: dict[str, Any], size: str) -> pd.DataFrame:
    """Return what is added at one size: microseconds and percent, with their intervals."""
    found = results["sizes"][size]["added"]
    rows = {}
    for name, one in found.items():
        percent = [100 * (value - 1) for value in one["ratio"]]
        rows[_label(name)] = {
            "microseconds": one["microseconds"][0],
            "from": one["microseconds"][1],
            "to": one["microseconds"][2],
            "each block": one["each block"][0],
            "%": percent[0],
            "% from": percent[1],
            "% to": percent[2],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _label(name: str) -> str:
    return "control: unsteered twice" if name == CONTROL else name


def plot_added(results: dict[str, Any]) -> Figure:
    """Draw the microseconds that a pass takes longer and the ratio, for each size."""
    sizes = results["sizes"]
    figure = Figure(figsize=(11, 2.6 * len(sizes) + 0.8), layout="constrained")
    grid = figure.subplots(len(sizes), 2, sharey=True, squeeze=False)
    for (left, right), (size, found) in zip(grid, sizes.items(), strict=True):
        added = found["added"]
        for axis, kind, form in ((left, "microseconds", ".0f"), (right, "ratio", ".4f")):
            for place, (name, one) in enumerate(added.items()):
                middle, low, high = one[kind]
                colour = "0.55" if name == CONTROL else "#4878a8"
                axis.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.5)
                axis.plot(middle, place, "o", color=colour, clip_on=False)
                # In a column of their own, where no mark can lie on them.
                axis.annotate(
                    f"{middle:{form}}",
                    (1.02, place),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=9,
                )
            axis.axvline(float(kind == "ratio"), color="0.3", linewidth=0.8, zorder=0)
            axis.spines[["top", "right"]].set_visible(False)
        left.set_xscale("symlog", linthresh=100)
        left.set_yticks(range(len(added)), [_label(name) for name in added])
        left.set_ylim(len(added) - 0.5, -0.5)
        left.set_title(f"{size}: microseconds more a pass", fontsize=10)
        right.set_title(f"{size}: times as long, {found['blocks']} blocks", fontsize=10)
    figure.suptitle(
        "What steering adds to a pass: medians of pairs with 95 % intervals; grey is noise",
        fontsize=10,
    )
    figure.supxlabel(provenance(results), fontsize=7)
    return figure


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure what steering adds to a pass.")
    parser.add_argument(
        "--quick", action="store_true", help="only the narrowest, few rounds; writes nothing"
    )
    parser.add_argument("--rounds", type=int, default=100, help="runs of each comparison")
    options = parser.parse_args()
    rounds = 10 if options.quick else options.rounds
    stored = load_results()["models"]
    sizes = list(SIZES)[:1] if options.quick else list(SIZES)
    results: dict[str, Any] = {
        "measured": datetime.date.today().isoformat(),
        "machine": machine("transformer-lens", "nnsight"),
        "rounds": rounds,
        "sizes": {
            size: measure(size, rounds, stored[size]["times"]["unsteered"]["forward"]["seconds"])
            for size in sizes
        },
    }
    for size in sizes:
        table = added_table(results, size).to_string(float_format=lambda value: f"{value:.2f}")
        print(f"\n{size}: what a steered pass takes longer, with 95 % intervals\n\n{table}")
    print("\n" + machine_line(results))
    if not options.quick:
        store(results, {"added_costs": plot_added(results)}, "added_costs")


if __name__ == "__main__":
    main()
