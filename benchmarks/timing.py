"""Timing: ways that take turns, and the ratio of their medians. Only ratios within one run mean anything."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from tqdm import tqdm


def interleaved(ways: dict[str, Callable[[], float | None]], rounds: int, description: str) -> dict[str, list[float]]:
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


def machine(*packages: str) -> dict[str, str]:
    """Say where figures come from: processor, cores, threads, versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), processor)
    return {
        "processor": processor, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads()), "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", *packages)},
    }
