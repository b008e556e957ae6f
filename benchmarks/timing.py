"""Timing in turns, ratios and peak memory; only ratios within one run mean anything.

It imports nothing from this project, since the peers run it in their own environment.
"""

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

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
    """Return the ratio of one way to another with quartiles, and its own median in seconds."""
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
