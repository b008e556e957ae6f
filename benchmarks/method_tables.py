"""Tables and pictures of `benchmarks.methods`: means over seeds, intervals, and ranks."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats

from common.plots import styled

CONFIDENCE = 0.95
SETTINGS = ("seed", "sign", "method", "at", "multiplier")
CONTROLS = ("unsteered", "random")
NOT_DRAWN = ("unsteered", "bias editing")  # a line of its own, and the same as the mean
HUES = "blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan"

Results = Mapping[str, Any]  # what `methods.compare_methods` returns


def interval(values: Sequence[float], texts: int | None = None) -> tuple[float, float, float]:
    """Return the mean of some values, one for each seed, and its 95 % interval.

    It is Student's t; for a share at least as wide as Wilson's interval of that many texts, since
    seeds that all give 100 % do not say that the next text will.

    Args:
        values: one for each seed.
        texts: how many texts each is a share of; None if it is no share.
    """
    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, math.nan, math.nan
    half = float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    low, high = mean - half, mean + half
    if texts:
        pooled = stats.binomtest(round(mean * texts * count), texts * count)
        wilson = pooled.proportion_ci(CONFIDENCE, method="wilson")
        low, high = max(0.0, min(low, wilson.low)), min(1.0, max(high, wilson.high))
    return mean, float(low), float(high)


def summary(results: Results) -> list[dict[str, Any]]:
    """Summarise rows of trials by method and divergence.

    A seed's value is the mean of its two directions; where one is missing, the seed does not count.

    Returns:
        For each `method`, `at` (what was asked for, as a text) and `measure`: `mean`, `low` and
        `high` (the 95 % interval over seeds; NaN with one), `seeds`, and `rank`: the places, from
        the best to the worst, that a method may have among those it is compared with, since a rank
        is only what intervals that do not touch decide. The divergence has none, and neither has
        the unsteered model.
    """
    trials: dict[tuple[str, str], dict[int, list[Mapping]]] = {}
    for row in results["rows"]:
        seeds = trials.setdefault((row["method"], str(row["at"])), {})
        seeds.setdefault(row["seed"], []).append(row)
    found = []
    for (method, at), seeds in trials.items():
        for name in [name for name in results["rows"][0] if name not in SETTINGS]:
            both = [[row[name] for row in rows] for rows in seeds.values() if len(rows) == 2]
            means = [sum(values) / 2 for values in both]
            if values := [mean for mean in means if not math.isnan(mean)]:
                texts = 2 * results["texts"][name] if name in results["shares"] else None
                place = {"method": method, "at": at, "measure": name, "seeds": len(values)}
                found.append(place | dict(zip(("mean", "low", "high"), interval(values, texts))))
    return [row | {"rank": rank(row, found, results)} for row in found]


def rank(row: Mapping[str, Any], rows: Sequence[Mapping], results: Results) -> list[int] | None:
    """Return the first and the last place that a row may have among those it is compared with."""
    if row["measure"] == "kl" or row["method"] == "unsteered" or math.isnan(row["low"]):
        return None
    sign = -1 if row["measure"] in results["smaller is better"] else 1
    rivals = [
        other
        for other in rows
        if (other["at"], other["measure"]) == (row["at"], row["measure"])
        and other["method"] != "unsteered"
    ]
    better = sum(parted(other, row) == sign for other in rivals)
    worse = sum(parted(other, row) == -sign for other in rivals)
    return [1 + better, len(rivals) - worse]


def parted(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Return 1 where one interval lies above the other, -1 below, 0 where they touch."""
    return (one["low"] > other["high"]) - (one["high"] < other["low"])


def table(results: Results, at: str) -> pd.DataFrame:
    """Return means with intervals as texts, one line for each method, best concept first."""
    rows = [row for row in summary(results) if row["at"] in (at, "None")]
    order = {row["method"]: row["mean"] for row in rows if row["measure"] == "concept"}
    methods = sorted(order, key=lambda name: -order[name])
    found = {(row["method"], row["measure"]): written(row, results) for row in rows}
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    return pd.DataFrame(
        {name: [found.get((method, name), "") for method in methods] for name in measures},
        index=pd.Index(methods, name="method"),
    )


def written(row: Mapping[str, Any], results: Results) -> str:
    """Write a mean with its interval; shares in percent."""
    numbers = [row[name] for name in ("mean", "low", "high")]
    if row["measure"] in results["shares"]:
        mean, low, high = (f"{100 * number:.0f}" for number in numbers)
        text = f"{mean} % ({low} to {high})"
    else:
        mean, low, high = (f"{number:.2f}" for number in numbers)
        text = f"{mean} ({low} to {high})"
    return mean + " %" * (row["measure"] in results["shares"]) if math.isnan(row["low"]) else text


def ranks(results: Results, at: str) -> pd.DataFrame:
    """Return the places of each method in each measure, "2 to 5" where intervals do not decide."""
    rows = [row for row in summary(results) if row["at"] == at and row["rank"]]
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    found = {(row["method"], row["measure"]): places(row["rank"]) for row in rows}
    methods = [method for method in table(results, at).index if (method, measures[0]) in found]
    return pd.DataFrame(
        {name: [found.get((method, name), "") for method in methods] for name in measures},
        index=pd.Index(methods, name="method"),
    )


def places(rank: Sequence[int]) -> str:
    """Write the places that a method may have."""
    first, last = rank
    return str(first) if first == last else f"{first} to {last}"


def print_tables(results: Results) -> None:
    """Print what was measured at the divergence of prompting."""
    print(
        f"\n{results['model']}, layer {results['layer']}: at the divergence of prompting, means"
        f" over {len(results['seeds'])} seeds with 95 % intervals\n"
    )
    print(table(results, "prompt").to_string())
    if any(row["rank"] for row in summary(results)):
        print("\nplaces; a single number only where intervals part\n")
        print(ranks(results, "prompt").to_string())
    if results["same texts"] is not None:
        print(f"\ntexts that bias editing and the mean share: {results['same texts']:.1%}")


@styled
def plot_measures(results: Results, at: str = "prompt") -> Figure:
    """Draw every measure of every method with its interval, unsteered as a line."""
    rows = [row for row in summary(results) if row["at"] == at and row["measure"] != "kl"]
    plain = {row["measure"]: row["mean"] for row in summary(results) if row["at"] == "None"}
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    methods = list(table(results, at).index.drop("unsteered"))
    size = 1.7 * len(measures) + 1.2, 0.34 * len(methods) + 1.2
    figure, grid = plt.subplots(1, len(measures), sharey=True, squeeze=False, figsize=size)
    axes = grid[0]
    for axis, measure in zip(axes, measures):
        mine = {row["method"]: row for row in rows if row["measure"] == measure}
        for line, method in enumerate(methods):
            if method in mine:
                _dot(axis, mine[method], line)
        axis.axvline(plain[measure], color="0.4", linewidth=1, linestyle=":")
        better = "smaller" if measure in results["smaller is better"] else "larger"
        axis.set_title(f"{measure}\n({better} is better)", fontsize=9)
        if measure in results["shares"]:
            axis.xaxis.set_major_formatter(PercentFormatter(1))
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    return figure


def _dot(axis: Axes, row: Mapping[str, Any], line: int) -> None:
    control = row["method"] in CONTROLS
    colour = "0.5" if control else "tab:purple" if row["method"] == "prompt" else "tab:red"
    axis.plot(row["mean"], line, "o", color=colour, markersize=5)
    axis.plot([row["low"], row["high"]], [line, line], color=colour, linewidth=1.5)


@styled
def plot_by_divergence(results: Results, measure: str = "concept") -> Figure:
    """Draw a measure over the divergence, one line for each method, prompting as a point."""
    rows = [row for row in summary(results) if row["measure"] in (measure, "kl")]
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["at"]), {})[row["measure"]] = row
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    shown = [name for name in table(results, "prompt").index if name not in NOT_DRAWN]
    for method, hue in zip(shown, cycle(HUES)):
        points = sorted(
            (pair["kl"]["mean"], *(pair[measure][end] for end in ("mean", "low", "high")))
            for (name, _), pair in found.items()
            if name == method
        )
        x, mean, low, high = map(list, zip(*points))
        style: dict[str, Any] = {"color": f"tab:{hue}", "marker": "o", "markersize": 4}
        style |= {"color": "0.6", "linestyle": "--"} if method in CONTROLS else {}
        style |= {"color": "black", "marker": "*", "markersize": 12} if method == "prompt" else {}
        axis.plot(x, mean, label=method, **style)
        axis.vlines(x, low, high, color=style["color"], linewidth=1)
    if plain := found.get(("unsteered", "None")):
        axis.axhline(plain[measure]["mean"], color="0.4", linestyle=":", linewidth=1)
    if measure in results["shares"]:
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    ticks = sorted(
        round(pair["kl"]["mean"], 2) for (name, _), pair in found.items() if name == "mean"
    )
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("divergence KL(steered ‖ unsteered), nats, 95th percentile of the tokens")
    axis.set_ylabel(measure)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
