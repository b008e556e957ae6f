"""Every picture of what the library measures, in one style (`style.mplstyle`)."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike
from torch import Tensor

from common.measuring.effects import (
    WorkingWindow,
    moves_by_prompt,
    unsteered_by_prompt,
    with_numbers,
)

STYLE = Path(__file__).with_name("style.mplstyle")
STEERED, REVERSED, BETTER, UNSTEERED = "tab:red", "tab:blue", "tab:green", "0.5"
RULE = {"color": "0.4", "linewidth": 1, "zorder": 0}  # the line that stands for no effect
Given = ParamSpec("Given")
SMALL = {"fontsize": 8, "ha": "center", "va": "center"}  # numbers and tokens inside a picture


def styled(draw: Callable[Given, Figure]) -> Callable[Given, Figure]:
    """Let a function draw in the style of this library; the caller's settings stay as they are."""

    @wraps(draw)
    def drawn(*args: Given.args, **kwargs: Given.kwargs) -> Figure:
        with plt.style.context(STYLE):
            figure = draw(*args, **kwargs)
            interactive = matplotlib.is_interactive()
        # In a notebook the first picture loads the backend, which then asks to show each one; the
        # end of the context would forget that, and no later picture would be shown.
        matplotlib.interactive(interactive)
        return figure

    return drawn


def _plain(given: object, width: int | None = None) -> str:
    """A text for a picture, in lines of `width` characters; its dollars do not begin a formula."""
    text = str(given) if width is None else textwrap.fill(str(given), width)
    return text.replace("$", r"\$")


def _shown(tokens: Sequence[str]) -> list[str]:
    """Tokens as labels, with blanks that are seen."""
    signs = str.maketrans({" ": "·", "\n": "↵", "\t": "→"})
    return [_plain(token.translate(signs)) for token in tokens]


def _legend_below(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside lower center", ncols=columns)


def _lines(count: int, height: float = 0.42, width: float = 7.5) -> tuple[Figure, Axes]:
    """A figure with one line for each of `count` things, named on the left."""
    figure, axes = plt.subplots(figsize=(width, height * count + 1.3))
    axes.spines["left"].set_visible(False)
    return figure, axes


def _pairs_of_bars(axes: Axes, bars: Sequence[tuple[str, ArrayLike, str]]) -> None:
    """Two bars side by side at each place, each given as (label, heights, colour)."""
    for shift, (label, given, colour) in zip((-0.2, 0.2), bars, strict=True):
        heights = np.asarray(given)
        axes.bar(np.arange(len(heights)) + shift, heights, width=0.4, color=colour, label=label)


@styled
def plot_effectiveness_and_disruption(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw effectiveness and disruption at each token of a prompt.

    Args:
        frame: what `effectiveness_and_disruption` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = plt.subplots(figsize=(max(5, 0.75 * len(frame) + 2), 3.6))
    colours = {"effectiveness": STEERED, "disruption": "0.6"}
    _pairs_of_bars(
        axes, [(name, frame[name].to_numpy(), colour) for name, colour in colours.items()]
    )
    labels = {"rotation": 30, "ha": "right", "family": "monospace"}
    axes.set_xticks(range(len(frame)), _shown(frame["token"].tolist()), **labels)
    axes.axhline(0, **RULE)
    axes.set(ylabel="nats", title=_plain(title))
    _legend_below(figure, 2)
    return figure


@styled
def plot_top_changed_tokens(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw the probabilities of the changed tokens, unsteered and steered, on a log scale.

    Those below 1e-8 stand at 1e-8.

    Args:
        frame: what `top_changed_tokens` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = plt.subplots(figsize=(7, 0.34 * len(frame) + 1.2))
    lines = range(len(frame))
    probs = frame[["unsteered", "steered"]].clip(lower=1e-8)
    for line, ends in zip(lines, probs.to_numpy()):
        axes.plot(ends, [line, line], color="0.8", linewidth=2, zorder=1)
    for name, colour in (("unsteered", "0.4"), ("steered", STEERED)):
        axes.scatter(probs[name], lines, color=colour, label=name, zorder=2)
    axes.set_yticks(lines, _shown(frame["token"].tolist()), family="monospace")
    axes.set_ylim(len(frame) - 0.5, -0.5)
    axes.set(xscale="log", xlabel="probability of the next token", title=_plain(title))
    _legend_below(figure, 2)
    return figure


@styled
def plot_perplexity_ratios(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw the ratios with their intervals: left of 1 the text became likelier.

    Green: the whole interval lies below 1; red: above; grey: 1 is within.

    Args:
        frame: what `perplexity_ratios` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = _lines(len(frame))
    columns = frame[["ratio", "low", "high"]].to_numpy()
    for line, (ratio, low, high) in enumerate(columns):
        # By rounding, or with very few pieces, the ratio can lie outside its interval.
        ends = np.clip([[ratio - low], [high - ratio]], 0, None)
        colour = BETTER if high < 1 else STEERED if low > 1 else UNSTEERED
        axes.errorbar(ratio, line, xerr=ends, fmt="o", color=colour)
        axes.annotate(
            f"{ratio:.3f}",
            (ratio, line),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.axvline(1, **RULE)
    names = zip(frame["condition"], frame["text"])
    axes.set_yticks(
        range(len(frame)), [_plain(f"{condition}, {text}") for condition, text in names]
    )
    axes.set_ylim(len(frame) - 0.5, -0.7)
    axes.set(xlabel="perplexity / unsteered perplexity", title=_plain(title))
    return figure


@styled
def plot_heat_map(window: WorkingWindow, title: str = "") -> Figure:
    """Draw effect and perplexity ratio over layer and coefficient.

    The working window is framed, a star marks the choice; a cell without a value stays empty.

    Args:
        window: what `working_window` returned.
        title: above the picture; say which model it shows.
    """
    grids = window.cells.pivot(index="layer", columns="coeff", values=["effect", "ratio", "works"])
    effect, ratio = (grids[name].to_numpy(dtype=float) for name in ("effect", "ratio"))
    layers, coeffs = list(grids.index), list(grids["effect"].columns)
    size = (1.2 * len(coeffs) + 3.5, 0.42 * len(layers) + 1.8)
    figure, both = plt.subplots(1, 2, figsize=size, sharey=True)
    limit = _largest(effect) or 1.0
    _heat(both[0], effect, "RdBu_r", (-limit, limit), dark_from=0.6 * limit)
    highest = max(1.3, min(2.0, _largest(ratio)))
    _heat(both[1], ratio, "Greys", (1.0, highest), dark_from=(1.0 + highest) / 2)
    works = grids["works"].fillna(False).to_numpy(dtype=bool)
    for axes, name in zip(both, ("effect", "perplexity ratio")):
        axes.spines[:].set_visible(True)
        axes.set_xticks(range(len(coeffs)), [f"{coeff:g}" for coeff in coeffs])
        axes.set_yticks(range(len(layers)), layers)
        axes.set(xlabel="size of the coefficient")
        axes.set_title(name, fontsize=10)
        for line, place in np.argwhere(works):
            frame = {"fill": False, "edgecolor": BETTER, "linewidth": 2}
            axes.add_patch(Rectangle((place - 0.46, line - 0.44), 0.92, 0.88, **frame))
    both[0].set_ylabel("layer")
    if window.layer is not None:
        spot = coeffs.index(window.coeff) + 0.3, layers.index(window.layer) + 0.27
        both[0].plot(*spot, marker="*", color="gold", markeredgecolor="0.2", markersize=10)
    figure.suptitle(_plain(title, 28 * len(coeffs)), fontsize=9)
    return figure


def _largest(grid: np.ndarray) -> float:
    """The largest size of a value; that of infinity is 2, of none 0."""
    return float(np.nan_to_num(np.abs(grid), posinf=2.0).max())


def _heat(
    axes: Axes, grid: np.ndarray, colours: str, limits: tuple[float, float], dark_from: float
) -> None:
    """Colour a grid and write each number into its cell, white where larger than `dark_from`."""
    low, high = limits
    axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower")
    for (line, place), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if abs(value) > dark_from else "0.2"
            axes.text(place, line, f"{round(value, 2) + 0:.2f}", color=colour, **SMALL)


def _at_layer(table: pd.DataFrame, layer: int | None) -> np.ndarray:
    """Which rows are steered at a layer; None: at all layers together."""
    layers = table["layer"].to_numpy(dtype=float, na_value=np.nan)
    if layer is None:
        return np.isnan(layers) & (table["kind"] != "unsteered").to_numpy()
    return layers == layer


@styled
def plot_effect(
    rows: pd.DataFrame,
    metric: str,
    layer: int | None,
    label: str = "",
    title: str = "",
    over: Literal["coeff", "kl"] = "coeff",
) -> Figure:
    """Draw a metric over the coefficient at one layer, or over the divergence.

    Steering is in colour with its standard error, controls in grey. At equal coefficients a
    direction may move the text further because it moves everything further; over the divergence,
    with the sign of the coefficient, what is compared is equally strong. That axis is scaled by the
    root, since the divergence grows with the square of small coefficients.

    Args:
        rows: what `sweep` returned; with `over="kl"`, `with_kl` of it.
        metric: the column.
        layer: which layer; None where all were swept together.
        label: of the axis; the metric's name by default.
        title: above the picture; say which model it shows.
        over: the coefficient or the divergence.

    Raises:
        ValueError: the layer was not swept, or no column `kl` where it is asked for.
    """
    rows = with_numbers(with_numbers(rows, metric), over)
    part = rows[_at_layer(rows, layer)]
    if part.empty:
        swept = sorted(rows["layer"].dropna().unique().tolist())
        raise ValueError(f"layer {layer} was not swept: the table has {swept}")
    name_of_axis = {
        "coeff": "coefficient",
        "kl": "divergence from unsteered in nats, signed, root scale",
    }
    figure, axes = plt.subplots(figsize=(7, 4.2))
    plain = unsteered_by_prompt(rows, metric).mean()
    greys: dict[str, dict[str, Any]] = {
        "random": {"color": "0.7", "linestyle": "-", "label": "random directions"},
        "control": {"color": "0.5", "linestyle": ":", "label": "unrelated pairs"},
    }
    for name, kind in dict.fromkeys(zip(part["steering"], part["kind"])):
        group = part.loc[(part["steering"] == name) & (part["kind"] == kind)]
        by_prompt = group.groupby(["coeff", "prompt"]).agg(found=(metric, "mean"))
        curve = by_prompt.groupby("coeff")["found"].agg(["mean", "sem"])
        curve.loc[0.0] = plain, 0.0
        curve.index = _strengths(group, curve.index, over)
        curve = curve.sort_index()
        if kind == "steering":
            error = np.nan_to_num(curve["sem"])  # NaN: of a single prompt
            style = {"fmt": "o-", "linewidth": 2, "zorder": 3, "label": _plain(name, 80)}
            axes.errorbar(curve.index, curve["mean"], error if error.any() else None, **style)
        else:
            axes.plot(curve.index, curve["mean"], linewidth=1, **greys[kind])
            greys[kind]["label"] = None  # one entry of the legend for all of a kind
    for line, place in ((axes.axvline, 0), (axes.axhline, plain)):
        line(place, color="0.85", linewidth=1, zorder=0)
    if over == "kl":
        scale = (lambda x: np.sign(x) * np.abs(x) ** 0.5), (lambda x: np.sign(x) * x**2)
        axes.set_xscale("function", functions=scale)
    axes.set(
        xlabel=f"{name_of_axis[over]}, layer {layer}",
        ylabel=_plain(label or metric, 45),
        title=_plain(title, 70),
    )
    longest = max(len(name) for name in axes.get_legend_handles_labels()[1])
    _legend_below(figure, max(1, min(3, 100 // (longest + 8))))
    return figure


def _strengths(group: pd.DataFrame, coeffs: pd.Index, over: str) -> pd.Index:
    """The coefficients of a steering, or its divergences there with their signs; 0 stays 0."""
    if over == "coeff":
        return coeffs
    kls = dict(zip(group["coeff"], group["kl"]))
    return pd.Index([math.copysign(kls.get(coeff, 0.0), coeff) for coeff in coeffs])


@styled
def plot_prompts(
    rows: pd.DataFrame,
    metric: str,
    steering: str,
    layer: int | None,
    coeff: float,
    label: str = "",
    title: str = "",
) -> Figure:
    """Draw a metric for each prompt, unsteered as a ring and steered both ways as dots.

    The prompts that moved furthest, and the right way, stand on top.

    Args:
        rows: what `sweep` returned.
        metric: the column.
        steering: which one.
        layer: which layer; None where all were swept together.
        coeff: the size of the coefficient; -coeff is drawn too where it was swept.
        label: of the axis; the metric's name by default.
        title: above the picture; say which model it shows.

    Raises:
        ValueError: the cell was not swept.
    """
    rows, moved = with_numbers(rows, metric), moves_by_prompt(rows, metric)
    mine = (moved["steering"] == steering) & _at_layer(moved, layer)
    moved = moved[mine & (moved["coeff"].abs() == coeff)]
    if moved.empty:
        raise ValueError(f"layer {layer}, coefficient {coeff:g} of {steering!r} was not swept")
    wide = moved.pivot(index="prompt", columns="coeff", values="move")
    wide = wide.loc[(wide * np.sign(wide.columns)).mean(axis=1).sort_values(kind="stable").index]
    plain = unsteered_by_prompt(rows, metric).loc[wide.index]
    found = wide.add(plain, axis=0)  # [prompt, coefficient]
    names, lines = [textwrap.wrap(prompt, 40) for prompt in wide.index], range(len(wide))
    height = sum(max(0.3, 0.16 * len(name) + 0.1) for name in names)
    figure, axes = _lines(1, height + 0.2)
    ends = found.assign(plain=plain).agg(["min", "max"], axis=1).to_numpy()
    for line, (low, high) in enumerate(ends):
        axes.plot([low, high], [line, line], color="0.88", linewidth=3, zorder=1)
    for value, colour in ((coeff, STEERED), (-coeff, REVERSED)):
        if value in found:
            axes.plot(found[value], lines, "o", color=colour, label=f"{value:+g}", markersize=6)
    # A ring around whatever lies at the same place, so that it never hides nor is hidden.
    ring = {"markerfacecolor": "none", "markersize": 10, "markeredgewidth": 1.5}
    axes.plot(plain, lines, "o", color=UNSTEERED, label="unsteered", **ring)
    axes.set_yticks(lines, [_plain("\n".join(name)) for name in names], fontsize=9)
    axes.set(
        xlabel=_plain(label or metric, 45), ylim=(-0.6, len(names) - 0.4), title=_plain(title, 45)
    )
    _legend_below(figure, 3)
    return figure


@styled
def plot_steerability(slopes: pd.DataFrame, layer: int | None, title: str = "") -> Figure:
    """Draw the slope of every prompt at one layer: right of 0 it is steerable, left anti-steerable.

    A dot is a prompt, a bar the mean of a steering; on the right stands the share of prompts with a
    negative slope. Random directions share a line.

    Args:
        slopes: what `steerability` returned.
        layer: which layer; None where all were swept together.
        title: above the picture; say which model it shows.

    Raises:
        ValueError: the layer was not swept.
    """
    part = slopes.loc[_at_layer(slopes, layer) & slopes["slope"].notna()]
    if part.empty:
        swept = sorted(slopes["layer"].dropna().unique().tolist())
        raise ValueError(f"layer {layer} has no slopes: the table has {swept}")
    names = part["steering"].where(part["kind"] != "random", "random directions")
    groups = part.groupby(names, sort=False)["slope"]
    figure, axes = _lines(len(groups))
    axes.use_sticky_edges = False
    for line, (_, found) in enumerate(groups):
        values = found.to_numpy(dtype=float)
        axes.barh(line, values.mean(), color="0.88", height=0.66, zorder=1)
        # Dots of equal slopes side by side: in turn above and below the middle.
        places = line + 0.24 * np.sin(2.4 * np.arange(len(values)))
        for mask, colour in ((values >= 0, STEERED), (values < 0, REVERSED)):
            dots = {"color": colour, "alpha": 0.6, "s": 20, "linewidths": 0, "zorder": 2}
            axes.scatter(values[mask], places[mask], **dots)
        text, beside = f"{(values < 0).mean():.0%} anti-steerable", axes.get_yaxis_transform()
        axes.text(1.01, line, text, transform=beside, va="center", fontsize=8)
    axes.axvline(0, **RULE)
    labels = [_plain(name, 30) for name, _ in groups]
    axes.set_yticks(range(len(labels)), labels)
    where = "all layers together" if layer is None else f"layer {layer}"
    axes.set(xlabel=f"slope of a prompt, {where}", title=_plain(title, 60))
    axes.invert_yaxis()
    return figure


@styled
def plot_beside_controls(frame: pd.DataFrame, label: str, title: str = "") -> Figure:
    """Draw effects one below the other, with their intervals; controls of a kind share a line.

    Args:
        frame: `name` of the line, `kind` ("vector" in colour), `mean`, and `low` and `high`, NaN
            where there is no interval.
        label: of the axis.
        title: above the picture; say which model it shows.
    """
    groups = list(frame.groupby("name", sort=False))
    figure, axes = _lines(len(groups), 0.6)
    for line, (_, group) in enumerate(groups):
        means = group["mean"].to_numpy(dtype=float)
        if len(group) > 1:
            # Dots of equal effects side by side: in turn above and below the middle.
            places = line + 0.24 * np.sin(2.4 * np.arange(len(means)))
            axes.scatter(means, places, color=UNSTEERED, alpha=0.6, s=20, linewidths=0)
            continue
        (kind,), ends = group["kind"], group[["low", "high"]].to_numpy(dtype=float)
        error = np.nan_to_num(np.abs(ends - means[:, None])).T
        colour = STEERED if kind == "vector" else REVERSED
        axes.errorbar(means, [line], xerr=error, fmt="o", color=colour, linewidth=2)
    axes.axvline(0, **RULE)
    names = [_plain(name, 30) for name, _ in groups]
    axes.set_yticks(range(len(groups)), names)
    axes.set(xlabel=_plain(label, 60), title=_plain(title, 60))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    return figure


@styled
def plot_moves(tones: pd.DataFrame, title: str = "") -> Figure:
    """Draw how far every prompt moved under each condition, and the mean as a bar.

    Args:
        tones: what `tone_by_prompt` returned.
        title: above the picture; say which model it shows.
    """
    moved = tones.drop("unsteered") - tones.loc["unsteered"]
    figure, axes = _lines(len(moved))
    axes.use_sticky_edges = False  # a dot at 0 would be cut in half
    axes.barh(range(len(moved)), moved.mean(axis=1), color="0.85", height=0.6)
    axes.set_yticks(range(len(moved)), [_plain(name) for name in moved.index])
    dots = {"color": STEERED, "alpha": 0.5, "markersize": 5, "markeredgewidth": 0}
    for line, values in enumerate(moved.to_numpy()):
        axes.plot(values, np.full(len(values), line), "o", **dots)
    axes.axvline(0, color="0.4", linewidth=1)
    label = (
        "move of the tone (positive minus negative share);\na dot is a prompt, the bar their mean"
    )
    axes.set(xlabel=label, title=_plain(title, 45))
    axes.invert_yaxis()
    return figure


@styled
def plot_tones(shares: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """Draw how many texts are positive, neither and negative, one bar for each thing done.

    Args:
        shares: what `tone_shares` returned, by what was done.
        title: above the picture; say how many texts a bar stands for.
    """
    figure, axes = _lines(len(shares))
    colours = {"positive": STEERED, "neither": "0.85", "negative": REVERSED}
    left = np.zeros(len(shares))
    for name, colour in colours.items():
        widths = np.array([share[name] for share in shares.values()])
        axes.barh(range(len(shares)), widths, left=left, height=0.7, color=colour, label=name)
        ink = "0.25" if name == "neither" else "white"
        for line, (start, width) in enumerate(zip(left, widths)):
            if width >= 0.05:  # room for the number
                axes.text(start + width / 2, line, f"{width:.0%}", color=ink, **SMALL)
        left += widths
    axes.set_yticks(range(len(shares)), [_plain(label) for label in shares])
    axes.tick_params(left=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlim=(0, 1), xlabel="share of the texts", title=_plain(title))
    axes.invert_yaxis()
    _legend_below(figure, len(colours))
    return figure


@styled
def token_strip(
    rows: Sequence[Sequence[str]],
    marked: Sequence[Sequence[int]],
    labels: Sequence[str],
    title: str = "",
) -> Figure:
    """Draw texts as strips of tokens, the marked ones in colour.

    Args:
        rows: the tokens of each text; blanks are made visible.
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
    figure, axes = plt.subplots(figsize=(11, 0.45 * len(rows) + 0.5))
    width = 0.0
    for line, (row, positions) in enumerate(zip(rows, marked)):
        # A fixed width for each character, so that the strips of two texts can be compared.
        ends = np.cumsum([0.0, *(0.6 + 0.42 * len(token) for token in row)])
        for position, token in enumerate(_shown(row)):
            left, size = ends[position], ends[position + 1] - ends[position]
            box, ink = (STEERED, "white") if position in positions else ("0.92", "0.25")
            axes.barh(line, size, left=left, height=0.72, color=box, edgecolor="white")
            axes.text(left + size / 2, line, token, family="monospace", color=ink, **SMALL)
        width = max(width, ends[-1])
    axes.set(xlim=(0, width), title=_plain(title))
    axes.set_yticks(range(len(rows)), [_plain(label) for label in labels], fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return figure


@styled
def plot_line_up(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw the size of an addition at each token of a prompt, beside that of the prompt itself.

    Args:
        frame: what `activation_additions.line_up` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = plt.subplots(figsize=(0.95 * len(frame) + 1.5, 3.6))
    prompt, addition = frame["residual"].to_numpy(), frame["steering"].to_numpy()
    label = "residual stream of the prompt"
    _pairs_of_bars(axes, [(label, prompt, "0.75"), ("addition", addition, STEERED)])
    for place, (norm, ratio) in enumerate(zip(addition, frame["ratio"])):
        if norm:
            text = {"ha": "center", "va": "bottom", "fontsize": 8}
            axes.annotate(f"{ratio:.1f}×", (place + 0.2, norm), **text)
    axes.margins(y=0.08)  # room for these numbers
    # Below each bar its tokens: those of the prompt, and those of each addition.
    tokens = frame.drop(columns=["steering", "residual", "ratio"])
    columns = [list(tokens), *tokens.to_numpy().tolist()]
    named = [
        [text.replace("<|endoftext|>", "BOS") or "–" for text in _shown(column)]
        for column in columns
    ]
    places = [-0.9, *range(len(frame))]
    axes.set_xticks(places, ["\n".join(names) for names in named], fontsize=8, family="monospace")
    axes.tick_params(length=0)
    axes.set(ylabel="norm", title=_plain(title), xlim=(-1.2, len(frame) - 0.4))
    axes.legend()
    return figure


@styled
def plot_shift(
    points: Mapping[str, Tensor], names: tuple[str, str], labels: Sequence[str], title: str = ""
) -> Figure:
    """Draw hidden states in a plane, with arrows from where each was unsteered.

    The axes have scales of their own.

    Args:
        points: coordinates [n, 2] by what was done; the first are the unsteered ones, from which
            the arrows start.
        names: what the two axes are.
        labels: of the n unsteered points.
        title: above the picture; say which model it shows.

    Raises:
        ValueError: the coordinates have different shapes, or there is not one label for each; or
            more than three things were done.
    """
    wanted = (len(labels), 2)
    for what, found in points.items():
        if tuple(found.shape) != wanted:
            raise ValueError(
                f"expected coordinates of shape {list(wanted)} for {what!r}, got"
                f" {list(found.shape)}"
            )
    if len(points) > 4:
        raise ValueError(f"expected the unsteered points and up to three more, got {len(points)}")
    figure, axes = plt.subplots(figsize=(8, 4))
    (start, at_first), *others = points.items()
    axes.scatter(*at_first.T, color=UNSTEERED, label=_plain(start), zorder=3)
    for (what, found), colour in zip(others, (STEERED, REVERSED, BETTER)):
        axes.scatter(*found.T, color=colour, label=_plain(what), zorder=3)
        for tail, head in zip(at_first.tolist(), found.tolist()):
            arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 4, "shrinkB": 4}
            axes.annotate("", head, tail, arrowprops=arrow)
    # Above and below in turn, from the lowest up: of two that are equally high, both can be read.
    heights = at_first[:, 1].tolist()
    for rank, number in enumerate(sorted(range(len(labels)), key=heights.__getitem__)):
        axes.annotate(
            _plain(labels[number].strip()),
            tuple(at_first[number].tolist()),
            xytext=(0, -14 if rank % 2 else 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set(xlabel=_plain(names[0]), ylabel=_plain(names[1]), title=_plain(title))
    axes.margins(0.12, 0.25)  # scales of their own: points that are close to each other have labels
    figure.legend(loc="outside lower center", ncols=len(points))
    return figure
