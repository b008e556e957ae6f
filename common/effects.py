"""Where steering works and what it costs: the effect beside its controls, over layers, coefficients and prompts.

The tables come from `sweeps`. An effect is a move of something measured, against unsteered, prompt by prompt.
"""

import textwrap
import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.embedded import grammar
from common.generation import completions, encode, generate
from common.metrics import tone_shares
from common.passes import input_device
from common.prompts import Prompt, prompt_text

CELL = ["steering", "kind", "layer", "coeff"]


def effect_by_cell(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Say how far steering moved a metric at every cell, prompt by prompt.

    A prompt whose metric has no value (NaN or None) at a cell, or unsteered, does not count there, and neither does one that
    is infinite both times; `prompts` says how many count. At a cell where none does, the numbers are NaN.

    Args:
        rows: what `sweep` or `sweep_logits` returned: the cells, `prompt`, the metric, and the unsteered rows.
        metric: the name of its column; truth values are 0 and 1.

    Returns:
        By cell, over the prompts that count: `effect` (mean of the move against unsteered), `spread` (standard deviation),
        `error` (standard error of the effect), `wrong way` (the share of prompts that moved against the sign of the
        coefficient) and `prompts`, their number.

    Raises:
        ValueError: no such column, texts in it, or no unsteered rows.
    """
    moved = moves_by_prompt(rows, metric)
    against = moved["move"] * np.sign(moved["coeff"]) < 0
    moved["wrong"] = against.where(moved["move"].notna(), np.nan).astype(float)
    table = moved.groupby(CELL, sort=False, dropna=False).agg(
        effect=("move", "mean"), spread=("move", "std"), prompts=("move", "count"), wrong=("wrong", "mean")
    )
    table["error"] = table["spread"] / table["prompts"] ** 0.5
    return table.rename(columns={"wrong": "wrong way"})[["effect", "spread", "error", "wrong way", "prompts"]].reset_index()


def moves_by_prompt(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the cells, `prompt`, and `move`: the metric's mean over the samples of a prompt, minus its unsteered mean.

    Means are over the samples that have a value; where none has one, the move is NaN.

    Raises:
        ValueError: no such column, texts in it, or no unsteered rows.
    """
    rows = _with_numbers(rows, metric)
    plain = rows[rows["kind"] == "unsteered"].groupby("prompt", sort=False)[metric].mean()
    if plain.empty:
        raise ValueError("the table has no unsteered rows to compare with")
    steered = rows[rows["kind"] != "unsteered"].groupby([*CELL, "prompt"], sort=False)[metric].mean().reset_index()
    steered["move"] = steered[metric] - steered["prompt"].map(plain)
    return steered.drop(columns=metric)


def _with_numbers(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows with a metric as float: a gap is NaN, a truth value 0 or 1."""
    if metric not in rows:
        raise ValueError(f"no column {metric!r}: the table has {', '.join(map(str, rows.columns))}")
    values = rows[metric].dropna()
    if len(other := values[[not isinstance(value, Real | np.bool_) for value in values]]):
        raise ValueError(f"expected numbers in the column {metric!r}, got {other.iloc[0]!r}")
    return rows.assign(**{metric: rows[metric].to_numpy(dtype=float, na_value=np.nan)})


def perplexity_ratio_by_cell(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the perplexity ratio steered / unsteered at every cell, over all tokens of the texts.

    Where a text has no loss (a steering so large that the model gives NaN), the ratio of the cell is NaN: a broken model is
    not one that costs nothing.

    Args:
        rows: what `sweep_perplexity` returned.
    """
    steered = rows[rows["kind"] != "unsteered"]
    more = (steered["loss"] - steered["unsteered_loss"]) * steered["tokens"]
    table = steered[CELL].assign(more=more, tokens=steered["tokens"]).groupby(CELL, sort=False).agg(_whole_sum).reset_index()
    table["ratio"] = np.exp(table["more"] / table["tokens"])
    return table.drop(columns=["more", "tokens"])


def _whole_sum(values: pd.Series) -> float:
    return values.sum(skipna=False)


@dataclass
class WorkingWindow:
    """Where a steering works.

    Attributes:
        cells: one row for each layer and size of the coefficient: `layer`, `coeff` (its size), `effect` (the smaller of the
            two signs, where both were swept), `ratio` (the larger perplexity ratio of the two signs), `wrong way` (likewise),
            `control` (the largest move of a control there, NaN where none was swept or one has no value), `works`, and `neighbours` (how many
            of the cells beside it work).
        layer: the recommended layer; None where no cell works.
        coeff: the recommended coefficient.
        reason: why, in a sentence.
    """

    cells: pd.DataFrame
    layer: int | None
    coeff: float | None
    reason: str


def working_window(
    rows: pd.DataFrame,
    costs: pd.DataFrame,
    metric: str,
    steering: str | None = None,
    min_effect: float | None = None,
    max_ratio: float = 1.1,
    max_wrong_way: float = 0.25,
) -> WorkingWindow:
    """Find the layers and coefficients at which steering works and does not cost too much, and recommend one.

    A cell works when its effect is at least `min_effect` and larger than that of every control there, the perplexity
    ratio of other text stays within `max_ratio`, and few prompts move the wrong way. Where both signs were swept, both have
    to. Recommended is the cell with the most working neighbours (a layer or a coefficient further), since a window that is
    wide is where other prompts will work as well; among equals the one with the largest effect.

    Args:
        rows: what `sweep` returned, with controls.
        costs: what `sweep_perplexity` returned, for the same steering, layers and coefficients.
        metric: the column of the effect; larger values are what positive coefficients are to bring.
        steering: which one, where several were swept.
        min_effect: in units of the metric; by default half of the largest effect that is found.
        max_ratio: how much perplexity may grow.
        max_wrong_way: the share of prompts that may move the wrong way.

    Raises:
        ValueError: other tables than these, or in another order; no such column or steering, several of them and none named,
            only coefficient 0, a cell without its cost, or no unsteered rows.
    """
    for name, table, columns in (("rows", rows, {*CELL, "prompt"}), ("costs", costs, {*CELL, "loss", "unsteered_loss", "tokens"})):
        if not isinstance(table, pd.DataFrame) or not columns <= set(table):
            what = f"a table of {', '.join(map(str, table))}" if isinstance(table, pd.DataFrame) else repr(table)
            wanted = "sweep" if name == "rows" else "sweep_perplexity"
            raise ValueError(f"expected as {name} what {wanted} returned, as in working_window(rows, costs, metric); got {what}")
    if metric not in rows:
        raise ValueError(f"no column {metric!r}: the table has {', '.join(map(str, rows.columns))}")
    names = rows.loc[rows["kind"] == "steering", "steering"].unique().tolist()
    if steering is None and len(names) == 1:
        steering = names[0]
    if steering not in names:
        raise ValueError(f"expected one of {', '.join(map(repr, names)) or 'no steering'} as steering, got {steering!r}")
    table = effect_by_cell(rows, metric)
    ratios = perplexity_ratio_by_cell(costs)
    mine = table[(table["steering"] == steering) & (table["coeff"] != 0)].merge(ratios, on=CELL, how="left", indicator=True)
    if mine.empty:
        raise ValueError(f"expected a coefficient other than 0 of {steering!r}")
    if len(lacking := mine[mine["_merge"] == "left_only"]):
        lacking = lacking.iloc[0]
        raise ValueError(f"the costs lack layer {lacking['layer']}, coefficient {lacking['coeff']:g} of {steering!r}")
    own_random = (table["kind"] == "random") & table["steering"].str.fullmatch(rf"{re.escape(steering)}, random \d+")
    others = table[(table["kind"] == "control") | own_random]
    mine = mine.assign(effect=mine["effect"] * np.sign(mine["coeff"]), coeff=mine["coeff"].abs())
    cells = mine.groupby(["layer", "coeff"], as_index=False).agg(
        {"effect": lambda both: both.min(skipna=False), "ratio": _largest, "wrong way": _largest}
    )
    largest = others.assign(coeff=others["coeff"].abs(), control=others["effect"].abs()).groupby(["layer", "coeff"], as_index=False)["control"].agg(_largest)
    cells = cells.merge(largest, on=["layer", "coeff"], how="left", indicator=True)
    unknown = (cells.pop("_merge") == "both") & cells["control"].isna()  # swept, and without a value: nothing is beaten
    if cells["effect"].isna().all():
        cells["works"], cells["neighbours"] = False, 0
        return WorkingWindow(cells, None, None, f"no cell works: {metric!r} has no value that could be compared with unsteered")
    min_effect = cells["effect"].max() / 2 if min_effect is None else min_effect
    cells["works"] = (
        (cells["effect"] >= min_effect) & (cells["effect"] > cells["control"].fillna(0)) & (cells["ratio"] <= max_ratio)
        & (cells["wrong way"] <= max_wrong_way) & ~unknown
    )
    layers, coeffs = sorted(cells["layer"].unique()), sorted(cells["coeff"].unique())
    place = {(row.layer, row.coeff): (layers.index(row.layer), coeffs.index(row.coeff)) for row in cells.itertuples()}
    working = {place[row.layer, row.coeff] for row in cells[cells["works"]].itertuples()}
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    cells["neighbours"] = [
        sum((place[row.layer, row.coeff][0] + a, place[row.layer, row.coeff][1] + b) in working for a, b in steps) for row in cells.itertuples()
    ]
    if not working:
        best = cells.loc[cells["effect"].idxmax()]
        return WorkingWindow(cells, None, None, f"no cell works: the largest effect is that of {_saying(best, min_effect, max_ratio)}")
    best = cells[cells["works"]].sort_values(["neighbours", "effect"], ascending=False, kind="stable").iloc[0]
    reason = f"{_saying(best, min_effect, max_ratio)}; {best['neighbours']:.0f} of its neighbours work too"
    return WorkingWindow(cells, int(best["layer"]), float(best["coeff"]), reason)


def _largest(values: pd.Series) -> float:
    """NaN where one of them is: it could be larger than the others."""
    return values.max(skipna=False)


def _saying(cell: pd.Series, min_effect: float, max_ratio: float) -> str:
    """What was found at a cell, beside what was asked for."""
    control = "no controls" if pd.isna(cell["control"]) else f"controls at most {cell['control']:.2f}"
    return (
        f"layer {cell['layer']}, coefficient {cell['coeff']:g}: effect {cell['effect']:.2f} (asked {min_effect:.2f}), {control}, "
        f"perplexity ratio {cell['ratio']:.2f} (at most {max_ratio:g}), {cell['wrong way']:.0%} of the prompts the wrong way"
    )


def plot_heat_map(window: WorkingWindow, title: str = "") -> Figure:
    """Draw effect and perplexity ratio over layer and coefficient; the working window is framed, a star marks the choice.

    Args:
        window: what `working_window` returned.
        title: above the picture; say which model it shows.
    """
    cells = window.cells
    layers, coeffs = sorted(cells["layer"].unique()), sorted(cells["coeff"].unique())
    figure, both = plt.subplots(1, 2, figsize=(1.2 * len(coeffs) + 3.5, 0.42 * len(layers) + 1.8), sharey=True, layout="constrained")
    for axes, (column, label, colours) in zip(both, (("effect", "effect", "RdBu_r"), ("ratio", "perplexity ratio", "Greys"))):
        grid = cells.pivot(index="layer", columns="coeff", values=column).loc[layers, coeffs].to_numpy(dtype=float)
        largest = np.nan_to_num(np.abs(grid), posinf=2.0).max()  # a cell without a value stays empty
        limit = largest or 1.0
        low, high = (-limit, limit) if column == "effect" else (1.0, max(1.3, min(2.0, largest)))
        axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower")
        for (line, place), value in np.ndenumerate(grid):
            dark = abs(value) > 0.6 * limit if column == "effect" else value > (low + high) / 2
            if not np.isnan(value):
                axes.text(place, line, f"{round(value, 2) + 0:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "0.2")
        axes.set_xticks(range(len(coeffs)), [f"{coeff:g}" for coeff in coeffs])
        axes.set_yticks(range(len(layers)), layers)
        axes.set(xlabel="size of the coefficient", title=label)
        axes.title.set_fontsize(10)
        for row in cells[cells["works"]].itertuples():
            corner = coeffs.index(row.coeff) - 0.46, layers.index(row.layer) - 0.44
            axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor="tab:green", linewidth=2))
    both[0].set_ylabel("layer")
    if window.layer is not None:
        spot = coeffs.index(window.coeff) + 0.3, layers.index(window.layer) + 0.27
        both[0].plot(*spot, marker="*", color="gold", markeredgecolor="0.2", markersize=10)
    figure.suptitle(textwrap.fill(title, 28 * len(coeffs)), fontsize=9)
    return figure


def plot_effect(rows: pd.DataFrame, metric: str, layer: int, label: str = "", title: str = "") -> Figure:
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
    rows = _with_numbers(rows, metric)
    part = rows[(rows["layer"] == layer).fillna(False).astype(bool)]
    if part.empty:
        raise ValueError(f"layer {layer} was not swept: the table has {sorted(rows['layer'].dropna().unique().tolist())}")
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
            axes.errorbar(mean.index, mean, error if error.any() else None, fmt="o-", color=next(colours), linewidth=2, capsize=2, label=textwrap.fill(name, 90), zorder=3)
        else:
            style = {"random": ("0.7", "-", "random directions"), "control": ("0.5", ":", "unrelated pairs")}[kind]
            axes.plot(mean.index, mean, color=style[0], linestyle=style[1], linewidth=1, label=None if kind in seen else style[2])
            seen.add(kind)
    axes.axvline(0, color="0.85", linewidth=1, zorder=0)
    axes.axhline(plain, color="0.85", linewidth=1, zorder=0)
    axes.set(xlabel=f"coefficient, layer {layer}", ylabel=textwrap.fill(label or metric, 45), title=textwrap.fill(title, 70))
    axes.spines[["top", "right"]].set_visible(False)
    longest = max(len(name) for name in axes.get_legend_handles_labels()[1])
    figure.legend(fontsize=8, loc="outside lower center", ncols=max(1, min(3, 110 // (longest + 8))), frameon=False)
    return figure


def plot_prompts(rows: pd.DataFrame, metric: str, steering: str, layer: int, coeff: float, label: str = "", title: str = "") -> Figure:
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
    rows, moved = _with_numbers(rows, metric), moves_by_prompt(rows, metric)
    moved = moved[(moved["steering"] == steering) & (moved["layer"] == layer) & (moved["coeff"].abs() == coeff)]
    if moved.empty:
        raise ValueError(f"layer {layer}, coefficient {coeff:g} of {steering!r} was not swept")
    plain = rows[rows["kind"] == "unsteered"].groupby("prompt", sort=False)[metric].mean()
    wide = moved.pivot(index="prompt", columns="coeff", values="move")
    order = (wide * np.sign(wide.columns)).mean(axis=1).sort_values(kind="stable").index
    lines = sum(max(0.3, 0.16 * len(textwrap.wrap(prompt, 40)) + 0.1) for prompt in order)
    figure, axes = plt.subplots(figsize=(7.5, lines + 1.5), layout="constrained")
    for line, prompt in enumerate(order):
        ends = [plain[prompt] + move for move in wide.loc[prompt]]
        axes.plot([min(ends + [plain[prompt]]), max(ends + [plain[prompt]])], [line, line], color="0.88", linewidth=3, zorder=1)
    axes.plot(plain.loc[order], range(len(order)), "o", color="0.5", label="unsteered", markersize=5)
    for value, colour in ((coeff, "tab:red"), (-coeff, "tab:blue")):
        if value in wide:
            axes.plot(plain.loc[order] + wide.loc[order, value], range(len(order)), "o", color=colour, label=f"{value:+g}", markersize=6)
    axes.set_yticks(range(len(order)), [textwrap.fill(prompt, 40) for prompt in order], fontsize=9)
    axes.set(xlabel=textwrap.fill(label or metric, 45), ylim=(-0.6, len(order) - 0.4), title=textwrap.fill(title, 45))
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def tone_by_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conditions: Mapping[str, AbstractContextManager],
    prompts: Sequence[Prompt] = tuple(grammar.TABLE_PROMPTS),
    per_prompt: int = 20,
    max_new_tokens: int = 24,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """Sample completions (top_p 0.9) of each prompt under each condition, and take their mean tone.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        conditions: what is open while it generates, by name, for example `vector.apply(model)`; unsteered is added.
        prompts: each is completed `per_prompt` times, all in one batch.
        per_prompt: completions of each prompt.
        max_new_tokens: length of a completion.
        seed: set again for each condition, so that they differ by the steering only.
        prepend_bos: what stands in front of a text: by default what the tokenizer puts there; see `prompts.prompt_ids`.

    Returns:
        [condition, prompt]: the share of positive minus that of negative completions, from -1 to 1.
    """
    inputs = encode(tokenizer, list(prompts) * per_prompt, prepend_bos).to(input_device(model))
    rows = {}
    for name, condition in {"unsteered": nullcontext(), **conditions}.items():
        torch.manual_seed(seed)
        with condition:
            ids = generate(model, inputs, do_sample=True, top_p=0.9, max_new_tokens=max_new_tokens)
        texts = completions(tokenizer, inputs, ids)
        shares = [tone_shares(texts[number :: len(prompts)]) for number in range(len(prompts))]
        rows[name] = [share["positive"] - share["negative"] for share in shares]
    return pd.DataFrame(rows, index=[prompt_text(tokenizer, prompt) for prompt in prompts]).T.rename_axis(index="condition", columns="prompt")


def moves(tones: pd.DataFrame) -> pd.DataFrame:
    """Say how far each condition moved the tone of what `tone_by_prompt` found.

    Returns:
        By condition: `moved` (mean over the prompts, from -2 to 2), `spread` (standard deviation over the prompts) and
        `wrong way` (the share of prompts that moved against the mean).
    """
    moved = tones.drop("unsteered") - tones.loc["unsteered"]
    mean = moved.mean(axis=1)
    wrong = moved.mul(mean.map(lambda value: -1 if value < 0 else 1), axis=0) < 0
    return pd.DataFrame({"moved": mean, "spread": moved.std(axis=1), "wrong way": wrong.mean(axis=1)})


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
        axes.plot(row, [line] * len(row), "o", color="tab:red", alpha=0.5, markersize=5, markeredgewidth=0)
    axes.axvline(0, color="0.4", linewidth=1)
    label = "move of the tone (positive minus negative share);\na dot is a prompt, the bar their mean"
    axes.set(xlabel=label, title=textwrap.fill(title, 45))
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure
