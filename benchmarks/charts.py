"""Pictures of ratios: horizontal bars with quartiles, and a mark at what was asked for."""

import math
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Panel(NamedTuple):
    """One column of bars, by the keys of a row of results."""

    value: str  # the median
    spread: str  # its quartiles
    asked: str  # what was asked for; a row may lack it
    title: str


def plot_ratios(
    rows: list[dict[str, Any]], labels: list[str], panels: list[Panel], title: str
) -> Figure:
    """Draw a bar for each row in every panel.

    Args:
        rows: results; where one lacks a value it has no bar.
        labels: one for each row.
        panels: side by side.
        title: above all panels.
    """
    figure = Figure(figsize=(11, 0.5 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        nothing = float("nan")
        values = [row.get(panel.value, nothing) for row in rows]
        spreads = [row.get(panel.spread, (nothing, nothing)) for row in rows]
        bars(axis, labels, values, spreads, [row.get(panel.asked) for row in rows])
        axis.set_xlabel(panel.title)
    figure.suptitle(
        f"{title}: bars are medians with quartiles, red marks what was asked for", fontsize=10
    )
    return figure


def bars(
    axis: Axes,
    labels: list[str],
    values: list[float],
    spreads: list[tuple[float, float]],
    marks: list[float | None],
    colors: str | list[str] = "#4878a8",
    start: float = 0.0,
    form: str = ".3g",
) -> None:
    """Draw horizontal bars, top to bottom, with quartiles, figures and red marks at what was asked.

    Args:
        axis: where to draw.
        labels: one for each bar.
        values: where the bars end; nan for none.
        spreads: the quartiles of each.
        marks: what was asked for, or None.
        colors: of all, or of each bar.
        start: where the bars begin.
        form: how figures are written.
    """
    errors = [
        [value - low for value, (low, _) in zip(values, spreads)],
        [high - value for value, (_, high) in zip(values, spreads)],
    ]
    widths = [value - start for value in values]
    axis.barh(labels, widths, left=start, xerr=errors, color=colors, ecolor="#333333", capsize=3)
    for place, (value, (_, high), mark) in enumerate(zip(values, spreads, marks)):
        if not math.isnan(value):
            end = max(value, high, start, mark or start)  # the figure must not lie on the mark
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
