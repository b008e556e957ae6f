"""Timing: ways that take turns, and the ratio of their medians; peak memory. Only ratios within one run mean anything.

It imports nothing from this project, since the peers run it in their own environment.
"""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATUS = "/proc/self/status"


def interleaved(
    ways: dict[str, Callable[[], float | None]], rounds: int, description: str
) -> dict[str, list[float]]:
    """Time several ways of doing something, in turn, after one round that does not count.

    Args:
        ways: functions by name; one that returns a number has timed itself, in seconds.
        rounds: how often each is run.
        description: what stands in front of the progress bar.

    Returns:
        The seconds of each round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in tqdm(range(rounds + 1), desc=description, unit="round"):
        names = list(ways)
        if turn % 2:  # the order changes, so that no way always comes second
            names.reverse()
        for name in names:
            started = time.perf_counter()
            own = ways[name]()
            if turn:
                seconds[name].append(own if own is not None else time.perf_counter() - started)
    return seconds


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Return the median of the ratios, round by round, and their quartiles."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return statistics.median(ratios), low, high


def summary(above: list[float], below: list[float]) -> dict[str, float]:
    """Return what is stored of a way: its ratio to another one with quartiles, and its own median in seconds."""
    median, low, high = ratio(above, below)
    return {"median": median, "low": low, "high": high, "seconds": statistics.median(above)}


def seconds_of(work: Callable[[], Any], device: str = "cpu") -> float:
    """Time one piece of work; on a GPU until all of it is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(work: Callable[[], Any], device: str = "cpu") -> int | None:
    """Return how many bytes more than before were in use at the worst moment of the work.

    On the CPU it is the memory of the process, which only Linux can count from a given moment on;
    elsewhere it is None.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not os.path.exists(STATUS):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if (
        trim
    ):  # what was freed goes back to the system, else it could be used again without being seen
        trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A figure of this process, in bytes."""
    with open(STATUS, encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def bars(
    axis: "Axes",
    labels: list[str],
    values: list[float],
    spreads: list[tuple[float, float]],
    marks: list[float | None],
    colors: str | list[str] = "#4878a8",
    start: float = 0.0,
    form: str = ".3g",
) -> None:
    """Draw horizontal bars from top to bottom, with quartiles, the figure behind each, and a red mark at what was asked for.

    Args:
        axis: where to draw.
        labels: one for each bar.
        values: where the bars end; nan for none.
        spreads: the quartiles of each.
        marks: what was asked for, or None.
        colors: of all, or of each bar.
        start: where the bars begin.
        form: how the figures are written.
    """
    errors = [
        [value - low for value, (low, _) in zip(values, spreads)],
        [high - value for value, (_, high) in zip(values, spreads)],
    ]
    widths = [value - start for value in values]
    axis.barh(labels, widths, left=start, xerr=errors, color=colors, ecolor="#333333", capsize=3)
    for place, (value, (_, high), mark) in enumerate(zip(values, spreads, marks)):
        if value == value:
            end = max(value, high, start)
            axis.annotate(
                f"{value:{form}}",
                (end, place),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        if mark:
            axis.plot([mark] * 2, [place - 0.4, place + 0.4], color="#c0392b", linewidth=2)
    axis.spines[["top", "right"]].set_visible(False)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()


def machine(*packages: str) -> dict[str, str]:
    """Say where figures come from: processor, cores, threads, versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")),
                processor,
            )
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", *packages)},
    }


def provenance(results: dict[str, Any]) -> str:
    """Say in one line when and where stored results were measured: their `measured` and `machine`."""
    there = dict(results["machine"])
    processor, cores, versions = (
        there.pop("processor"),
        there.pop("cores"),
        {name: there[name] for name in there if name not in ("threads", "python")},
    )
    return f"measured {results['measured']}, {processor}, {cores} cores; " + ", ".join(
        f"{name} {version}" for name, version in versions.items()
    )
