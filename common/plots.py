"""Pictures that several notebooks draw."""

import itertools
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from common.measuring.effects import WorkingWindow, moves_by_prompt, with_numbers


def _shown(tokens: Sequence[str]) -> list[str]:
    """Tokens as labels: blanks that are seen, and dollars that do not begin a formula."""
    return [
        token.replace(" ", "·").replace("\n", "↵").replace("\t", "→").replace("$", r"\$")
        for token in tokens
    ]


def plot_effectiveness_and_disruption(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw effectiveness and disruption at each token of a prompt.

    Args:
        frame: what `effectiveness_and_disruption` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = plt.subplots(figsize=(max(5, 0.75 * len(frame) + 2), 3.6), layout="constrained")
    places = range(len(frame))
    axes.bar(
        [place - 0.2 for place in places],
        frame["effectiveness"],
        width=0.4,
        color="tab:red",
        label="effectiveness",
    )
    axes.bar(
        [place + 0.2 for place in places],
        frame["disruption"],
        width=0.4,
        color="0.6",
        label="disruption",
    )
    axes.set_xticks(
        list(places), _shown(frame["token"]), rotation=30, ha="right", family="monospace"
    )
    axes.axhline(0, color="0.4", linewidth=1)
    axes.set(ylabel="nats", title=title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_top_changed_tokens(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw the probabilities of the changed tokens, unsteered and steered, on a log scale; those below 1e-8 stand at 1e-8.

    Args:
        frame: what `top_changed_tokens` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = plt.subplots(figsize=(7, 0.34 * len(frame) + 1.2), layout="constrained")
    for line, row in enumerate(frame.itertuples()):
        axes.plot(
            [max(row.unsteered, 1e-8), max(row.steered, 1e-8)],
            [line, line],
            color="0.8",
            linewidth=2,
            zorder=1,
        )
    axes.scatter(
        frame["unsteered"].clip(lower=1e-8),
        range(len(frame)),
        color="0.4",
        label="unsteered",
        zorder=2,
    )
    axes.scatter(
        frame["steered"].clip(lower=1e-8),
        range(len(frame)),
        color="tab:red",
        label="steered",
        zorder=2,
    )
    axes.set_yticks(range(len(frame)), _shown(frame["token"]), family="monospace")
    axes.set_ylim(len(frame) - 0.5, -0.5)
    axes.set(xscale="log", xlabel="probability of the next token", title=title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_perplexity_ratios(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw the ratios with their intervals: left of 1 the text became likelier.

    Green: the whole interval lies below 1; red: above; grey: 1 is within.

    Args:
        frame: what `perplexity_ratios` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(frame) + 1.3), layout="constrained")
    labels = [f"{row.condition}, {row.text}" for row in frame.itertuples()]
    # By rounding, or with very few pieces, the ratio can lie outside its interval.
    errors = [
        (frame["ratio"] - frame["low"]).clip(lower=0),
        (frame["high"] - frame["ratio"]).clip(lower=0),
    ]
    colours = [
        "tab:green" if row.high < 1 else "tab:red" if row.low > 1 else "0.5"
        for row in frame.itertuples()
    ]
    for line, (ratio, colour) in enumerate(zip(frame["ratio"], colours)):
        axes.errorbar(
            ratio,
            line,
            xerr=[[errors[0].iloc[line]], [errors[1].iloc[line]]],
            fmt="o",
            color=colour,
            capsize=3,
        )
        axes.annotate(
            f"{ratio:.3f}",
            (ratio, line),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.axvline(1, color="0.4", linewidth=1, zorder=0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.7)
    axes.set(xlabel="perplexity / unsteered perplexity", title=title)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def plot_heat_map(window: WorkingWindow, title: str = "") -> Figure:
    """Draw effect and perplexity ratio over layer and coefficient; the working window is framed, a star marks the choice.

    Args:
        window: what `working_window` returned.
        title: above the picture; say which model it shows.
    """
    cells = window.cells
    layers, coeffs = sorted(cells["layer"].unique()), sorted(cells["coeff"].unique())
    figure, both = plt.subplots(
        1,
        2,
        figsize=(1.2 * len(coeffs) + 3.5, 0.42 * len(layers) + 1.8),
        sharey=True,
        layout="constrained",
    )
    for axes, (column, label, colours) in zip(
        both, (("effect", "effect", "RdBu_r"), ("ratio", "perplexity ratio", "Greys"))
    ):
        grid = (
            cells.pivot(index="layer", columns="coeff", values=column)
            .loc[layers, coeffs]
            .to_numpy(dtype=float)
        )
        largest = np.nan_to_num(
            np.abs(grid), posinf=2.0
        ).max()  # a cell without a value stays empty
        limit = largest or 1.0
        low, high = (-limit, limit) if column == "effect" else (1.0, max(1.3, min(2.0, largest)))
        axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower")
        for (line, place), value in np.ndenumerate(grid):
            dark = abs(value) > 0.6 * limit if column == "effect" else value > (low + high) / 2
            if not np.isnan(value):
                axes.text(
                    place,
                    line,
                    f"{round(value, 2) + 0:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "0.2",
                )
        axes.set_xticks(range(len(coeffs)), [f"{coeff:g}" for coeff in coeffs])
        axes.set_yticks(range(len(layers)), layers)
        axes.set(xlabel="size of the coefficient", title=label)
        axes.title.set_fontsize(10)
        for row in cells[cells["works"]].itertuples():
            corner = coeffs.index(row.coeff) - 0.46, layers.index(row.layer) - 0.44
            axes.add_patch(
                Rectangle(corner, 0.92, 0.88, fill=False, edgecolor="tab:green", linewidth=2)
            )
    both[0].set_ylabel("layer")
    if window.layer is not None:
        spot = coeffs.index(window.coeff) + 0.3, layers.index(window.layer) + 0.27
        both[0].plot(*spot, marker="*", color="gold", markeredgecolor="0.2", markersize=10)
    figure.suptitle(textwrap.fill(title, 28 * len(coeffs)), fontsize=9)
    return figure


def plot_effect(
    rows: pd.DataFrame, metric: str, layer: int, label: str = "", title: str = ""
) -> Figure:
    """Draw a metric over the coefficient at one layer: steering in colour with its standard error, controls in grey.

    Args:
        rows: what `sweep` returned.
        metric: the column.
        layer: which layer.
        label: of the axis; the metric's name by default.
        title: above the picture; say which model it shows.

    Raises:
        ValueError: the layer was not swept.
    """
    rows = with_numbers(rows, metric)
    part = rows[(rows["layer"] == layer).fillna(False).astype(bool)]
    if part.empty:
        raise ValueError(
            f"layer {layer} was not swept: the table has"
            f" {sorted(rows['layer'].dropna().unique().tolist())}"
        )
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    plain = rows.loc[rows["kind"] == "unsteered"].groupby("prompt")[metric].mean().mean()
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    seen, colours = set(), itertools.cycle(colours[3:] + colours[:3])  # red first
    for (name, kind), group in part.groupby(["steering", "kind"], sort=False):
        by_prompt = group.groupby(["coeff", "prompt"])[metric].mean().groupby("coeff")
        mean, error = by_prompt.mean(), by_prompt.std() / by_prompt.count() ** 0.5
        mean.loc[0.0], error.loc[0.0] = plain, 0.0
        mean, error = mean.sort_index(), error.sort_index().fillna(0.0)
        if kind == "steering":
            axes.errorbar(
                mean.index,
                mean,
                error if error.any() else None,
                fmt="o-",
                color=next(colours),
                linewidth=2,
                capsize=2,
                label=textwrap.fill(name, 90),
                zorder=3,
            )
        else:
            style = {
                "random": ("0.7", "-", "random directions"),
                "control": ("0.5", ":", "unrelated pairs"),
            }[kind]
            axes.plot(
                mean.index,
                mean,
                color=style[0],
                linestyle=style[1],
                linewidth=1,
                label=None if kind in seen else style[2],
            )
            seen.add(kind)
    axes.axvline(0, color="0.85", linewidth=1, zorder=0)
    axes.axhline(plain, color="0.85", linewidth=1, zorder=0)
    axes.set(
        xlabel=f"coefficient, layer {layer}",
        ylabel=textwrap.fill(label or metric, 45),
        title=textwrap.fill(title, 70),
    )
    axes.spines[["top", "right"]].set_visible(False)
    longest = max(len(name) for name in axes.get_legend_handles_labels()[1])
    figure.legend(
        fontsize=8,
        loc="outside lower center",
        ncols=max(1, min(3, 110 // (longest + 8))),
        frameon=False,
    )
    return figure


def plot_prompts(
    rows: pd.DataFrame,
    metric: str,
    steering: str,
    layer: int,
    coeff: float,
    label: str = "",
    title: str = "",
) -> Figure:
    """Draw, for each prompt, a metric unsteered and steered both ways, those that moved furthest (and the right way) on top.

    Args:
        rows: what `sweep` returned.
        metric: the column.
        steering: which one.
        layer: which layer.
        coeff: the size of the coefficient; -coeff is drawn too where it was swept.
        label: of the axis; the metric's name by default.
        title: above the picture; say which model it shows.

    Raises:
        ValueError: the cell was not swept.
    """
    rows, moved = with_numbers(rows, metric), moves_by_prompt(rows, metric)
    moved = moved[
        (moved["steering"] == steering)
        & (moved["layer"] == layer)
        & (moved["coeff"].abs() == coeff)
    ]
    if moved.empty:
        raise ValueError(f"layer {layer}, coefficient {coeff:g} of {steering!r} was not swept")
    plain = rows[rows["kind"] == "unsteered"].groupby("prompt", sort=False)[metric].mean()
    wide = moved.pivot(index="prompt", columns="coeff", values="move")
    order = (wide * np.sign(wide.columns)).mean(axis=1).sort_values(kind="stable").index
    lines = sum(max(0.3, 0.16 * len(textwrap.wrap(prompt, 40)) + 0.1) for prompt in order)
    figure, axes = plt.subplots(figsize=(7.5, lines + 1.5), layout="constrained")
    for line, prompt in enumerate(order):
        ends = [plain[prompt] + move for move in wide.loc[prompt]]
        axes.plot(
            [min(ends + [plain[prompt]]), max(ends + [plain[prompt]])],
            [line, line],
            color="0.88",
            linewidth=3,
            zorder=1,
        )
    axes.plot(
        plain.loc[order], range(len(order)), "o", color="0.5", label="unsteered", markersize=5
    )
    for value, colour in ((coeff, "tab:red"), (-coeff, "tab:blue")):
        if value in wide:
            axes.plot(
                plain.loc[order] + wide.loc[order, value],
                range(len(order)),
                "o",
                color=colour,
                label=f"{value:+g}",
                markersize=6,
            )
    axes.set_yticks(range(len(order)), [textwrap.fill(prompt, 40) for prompt in order], fontsize=9)
    axes.set(
        xlabel=textwrap.fill(label or metric, 45),
        ylim=(-0.6, len(order) - 0.4),
        title=textwrap.fill(title, 45),
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_moves(tones: pd.DataFrame, title: str = "") -> Figure:
    """Draw how far every prompt moved under each condition, and the mean as a bar.

    Args:
        tones: what `tone_by_prompt` returned.
        title: above the picture; say which model it shows.
    """
    moved = tones.drop("unsteered") - tones.loc["unsteered"]
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(moved) + 1.3), layout="constrained")
    axes.barh(moved.index, moved.mean(axis=1), color="0.85", height=0.6)
    for line, (_, row) in enumerate(moved.iterrows()):
        axes.plot(
            row, [line] * len(row), "o", color="tab:red", alpha=0.5, markersize=5, markeredgewidth=0
        )
    axes.axvline(0, color="0.4", linewidth=1)
    label = (
        "move of the tone (positive minus negative share);\na dot is a prompt, the bar their mean"
    )
    axes.set(xlabel=label, title=textwrap.fill(title, 45))
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def token_strip(
    rows: Sequence[Sequence[str]],
    marked: Sequence[Sequence[int]],
    labels: Sequence[str],
    title: str = "",
) -> Figure:
    """Draw texts as strips of tokens, the marked ones in colour.

    Args:
        rows: the tokens of each text; a space in front of a token is shown as it is written, with a
            dot.
        marked: the positions to colour in each text.
        labels: what stands in front of each strip.
        title: above the picture.

    Raises:
        ValueError: the three have different lengths, or a position lies outside its text.
    """
    if not len(rows) == len(marked) == len(labels):
        raise ValueError(
            f"expected as many rows as marks and labels, got {len(rows)}, {len(marked)} and"
            f" {len(labels)}"
        )
    for row, positions in zip(rows, marked):
        if any(not 0 <= position < len(row) for position in positions):
            raise ValueError(f"expected positions from 0 to {len(row) - 1}, got {list(positions)}")
    figure, axes = plt.subplots(figsize=(11, 0.45 * len(rows) + 0.5), layout="constrained")
    width = 0.0
    for line, (row, positions) in enumerate(zip(rows, marked)):
        left = 0.0
        for position, token in enumerate(row):
            # A fixed width for each character, so that the strips of two texts can be compared.
            size = 0.6 + 0.42 * len(token)
            colour = "tab:red" if position in positions else "0.92"
            axes.barh(line, size, left=left, height=0.72, color=colour, edgecolor="white")
            axes.text(
                left + size / 2,
                line,
                token.replace(" ", "·"),
                ha="center",
                va="center",
                fontsize=8,
                family="monospace",
                color="white" if position in positions else "0.25",
            )
            left += size
        width = max(width, left)
    axes.set(xlim=(0, width), yticks=range(len(rows)), title=title)
    axes.set_yticklabels(labels, fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return figure


def plot_line_up(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw how large an addition is at each token of a prompt, beside what the prompt itself has there.

    Args:
        frame: what `activation_additions.line_up` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = plt.subplots(figsize=(0.95 * len(frame) + 1.5, 3.6), layout="constrained")
    places = range(len(frame))
    axes.bar(
        [place - 0.2 for place in places],
        frame["residual"],
        width=0.4,
        color="0.75",
        label="residual stream of the prompt",
    )
    axes.bar(
        [place + 0.2 for place in places],
        frame["steering"],
        width=0.4,
        color="tab:red",
        label="addition",
    )
    for place, row in zip(places, frame.itertuples()):
        if row.steering:
            axes.annotate(
                f"{row.ratio:.1f}×",
                (place + 0.2, row.steering),
                ha="center",
                va="bottom",
                fontsize=8,
            )
    added = [
        column
        for column in frame.columns
        if column not in ("prompt", "steering", "residual", "ratio")
    ]
    names = [
        ["prompt", *added],
        *([row[column] for column in ("prompt", *added)] for _, row in frame.iterrows()),
    ]
    labels = [
        "\n".join(text.replace(" ", "·").replace("<|endoftext|>", "BOS") or "–" for text in name)
        for name in names
    ]
    axes.set_xticks([-0.9, *places], labels, fontsize=8, family="monospace")
    axes.tick_params(length=0)
    axes.set(ylabel="norm", title=title, xlim=(-1.2, len(frame) - 0.4))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
