"""Where steering works and what it costs: effects beside their controls, by layer and coefficient.

The tables come from sweeps. An effect is a move of something measured, against unsteered, prompt by
prompt.
"""

import re
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

CELL = ["steering", "kind", "layer", "coeff"]


def effect_by_cell(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Say how far steering moved a metric at every cell, prompt by prompt.

    A prompt whose metric has no value (NaN or None) at a cell, or unsteered, does not count there,
    and neither does one that is infinite both times; `prompts` says how many count. At a cell where
    none does, the numbers are NaN.

    Args:
        rows: what `sweep` or `sweep_logits` returned: the cells, `prompt`, the metric, and the
            unsteered rows.
        metric: the name of its column; truth values are 0 and 1.

    Returns:
        By cell, over the prompts that count: `effect` (mean of the move against unsteered),
        `spread` (standard deviation), `error` (standard error of the effect), `wrong way` (the
        share of prompts that moved against the sign of the coefficient) and `prompts`, their
        number.

    Raises:
        ValueError: no such column, texts in it, or no unsteered rows.
    """
    moved = moves_by_prompt(rows, metric)
    against = moved["move"] * np.sign(moved["coeff"]) < 0
    moved["wrong"] = against.where(moved["move"].notna(), np.nan).astype(float)
    table = moved.groupby(CELL, sort=False, dropna=False).agg(
        effect=("move", "mean"),
        spread=("move", "std"),
        prompts=("move", "count"),
        wrong=("wrong", "mean"),
    )
    table["error"] = table["spread"] / table["prompts"] ** 0.5
    return table.rename(columns={"wrong": "wrong way"})[
        ["effect", "spread", "error", "wrong way", "prompts"]
    ].reset_index()


def with_kl(table: pd.DataFrame, kls: pd.DataFrame) -> pd.DataFrame:
    """Return a table with the divergence of each cell as a column `kl`, beside the coefficient.

    Args:
        table: what a sweep, `effect_by_cell` or `perplexity_ratio_by_cell` returned.
        kls: what `kl_by_cell` returned for the same grid, or several such tables joined: a cell
            may be there more than once, with the same divergence.

    Raises:
        ValueError: a column that is missing, a `kl` that is there already, a cell that was not
            measured, or that has two divergences.
    """
    for name, given, columns in (("table", table, {*CELL}), ("kls", kls, {*CELL, "kl"})):
        if not isinstance(given, pd.DataFrame) or not columns <= set(given):
            wanted = ", ".join([*CELL, "kl"][: len(columns)])
            found = ", ".join(map(str, given)) if isinstance(given, pd.DataFrame) else repr(given)
            raise ValueError(f"expected {name} with the columns {wanted}, got {found}")
    if "kl" in table:
        raise ValueError("the table has a column 'kl' already")
    kls = kls.reindex(columns=[*CELL, "kl"]).drop_duplicates()
    for cell in kls.loc[kls.duplicated(CELL), CELL].to_numpy():
        raise ValueError(f"two values as kl of {_where(*cell)}")
    found = table.merge(kls, how="left", on=CELL, indicator=True)
    for cell in found.loc[found.pop("_merge") == "left_only", CELL].to_numpy():
        raise ValueError(f"no kl of {_where(*cell)}")
    return found


def _where(steering: str, kind: str, layer: Any, coeff: float) -> str:
    where = "all its layers" if pd.isna(layer) else f"layer {layer}"
    return f"{steering!r} at {where}, coefficient {coeff:g}"


def moves_by_prompt(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the cells, `prompt`, and `move`: the mean of a metric for a prompt, minus unsteered.

    Means are over the samples of the prompt that have a value; where none has one, the move is NaN.

    Raises:
        ValueError: no such column, texts in it, or no unsteered rows.
    """
    rows = with_numbers(rows, metric)
    plain = unsteered_by_prompt(rows, metric)
    if plain.empty:
        raise ValueError("the table has no unsteered rows to compare with")
    steered = rows[rows["kind"] != "unsteered"]
    steered = steered.groupby([*CELL, "prompt"], sort=False, dropna=False)
    moved = steered.agg(move=(metric, "mean")).reset_index()
    before = plain.reindex(moved["prompt"]).to_numpy()
    return moved.assign(move=moved["move"] - before)


def unsteered_by_prompt(rows: pd.DataFrame, metric: str) -> pd.Series:
    """Return the mean of a metric over the unsteered samples of each prompt."""
    plain = rows[rows["kind"] == "unsteered"].groupby("prompt", sort=False)
    return pd.Series(plain.agg(found=(metric, "mean"))["found"])


def with_numbers(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows with a metric as float: a gap is NaN, a truth value 0 or 1."""
    if metric not in rows:
        raise ValueError(f"no column {metric!r}: the table has {', '.join(map(str, rows.columns))}")
    for value in rows[metric].dropna():
        if not isinstance(value, Real | np.bool_):
            raise ValueError(f"expected numbers in the column {metric!r}, got {value!r}")
    return rows.assign(**{metric: rows[metric].to_numpy(dtype=float, na_value=np.nan)})


def perplexity_ratio_by_cell(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the perplexity ratio steered / unsteered at every cell, over all tokens of the texts.

    Where a text has no loss (a steering so large that the model gives NaN), the ratio of the cell
    is NaN: a broken model is not one that costs nothing.

    Args:
        rows: what `sweep_perplexity` returned.
    """
    rows = rows.assign(more=(rows["loss"] - rows["unsteered_loss"]) * rows["tokens"])
    cells = rows[rows["kind"] != "unsteered"].groupby(CELL, sort=False, dropna=False)
    table = cells.agg({"more": _whole_sum, "tokens": "sum"}).reset_index()
    table["ratio"] = np.exp(table["more"] / table["tokens"])
    return table.drop(columns=["more", "tokens"])


def _whole_sum(values: pd.Series) -> float:
    return values.sum(skipna=False)


@dataclass
class WorkingWindow:
    """Where a steering works.

    Attributes:
        cells: one row for each layer and size of the coefficient: `layer`, `coeff` (its size),
            `effect` (the smaller of the two signs, where both were swept), `ratio` (the larger
            perplexity ratio of the two signs), `wrong way` (likewise), `control` (the largest move
            of a control there, NaN where none was swept or one has no value), `works`, and
            `neighbours` (how many of the cells beside it work).
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
    """Find where steering works and does not cost too much, and recommend a layer and coefficient.

    A cell works when its effect is at least `min_effect` and larger than that of every control
    there, the perplexity ratio of other text stays within `max_ratio`, and few prompts move the
    wrong way. Where both signs were swept, both have to. Recommended is the cell with the most
    working neighbours (a layer or a coefficient further), since a window that is wide is where
    other prompts will work as well; among equals the one with the largest effect.

    Args:
        rows: what `sweep` returned, with controls.
        costs: what `sweep_perplexity` returned, for the same steering, layers and coefficients.
        metric: the column of the effect; larger values are what positive coefficients are to bring.
        steering: which one, where several were swept.
        min_effect: in units of the metric; by default half of the largest effect that is found.
        max_ratio: how much perplexity may grow.
        max_wrong_way: the share of prompts that may move the wrong way.

    Raises:
        ValueError: other tables than these, or in another order; no such column or steering,
            several of them and none named, only coefficient 0, a cell without its cost, or no
            unsteered rows.
    """
    _check_tables(rows, costs)
    cells = _window_cells(rows, costs, metric, _one_steering(rows, steering))
    if bool(cells["effect"].isna().all()):
        cells = cells.drop(columns="beaten").assign(works=False, neighbours=0)
        reason = f"{metric!r} has no value that could be compared with unsteered"
        return WorkingWindow(cells, None, None, f"no cell works: {reason}")
    least = np.nanmax(cells["effect"]) / 2 if min_effect is None else min_effect
    cells["works"] = (
        cells.pop("beaten")
        & (cells["effect"] >= least)
        & (cells["ratio"] <= max_ratio)
        & (cells["wrong way"] <= max_wrong_way)
    )
    cells = _with_neighbours(cells)
    if not bool(cells["works"].any()):
        best = cells.loc[cells["effect"].idxmax()]
        saying = f"the largest effect is that of {_saying(best, least, max_ratio)}"
        return WorkingWindow(cells, None, None, f"no cell works: {saying}")
    working = cells.loc[cells["works"]]
    widest = working[working["neighbours"] == working["neighbours"].max()]
    best = widest.loc[widest["effect"].idxmax()]
    saying = _saying(best, least, max_ratio)
    reason = f"{saying}; {best['neighbours']:.0f} of its neighbours work too"
    return WorkingWindow(cells, int(best["layer"]), float(best["coeff"]), reason)


def _check_tables(rows: pd.DataFrame, costs: pd.DataFrame) -> None:
    """Refuse other tables than those of the two sweeps."""
    wanted = (
        ("rows", "sweep", rows, {*CELL, "prompt"}),
        ("costs", "sweep_perplexity", costs, {*CELL, "loss", "unsteered_loss", "tokens"}),
    )
    for name, maker, table, columns in wanted:
        if isinstance(table, pd.DataFrame) and columns <= set(table):
            continue
        given = repr(table)
        if isinstance(table, pd.DataFrame):
            given = f"a table of {', '.join(map(str, table))}"
        raise ValueError(
            f"expected as {name} what {maker} returned, as in working_window(rows, costs, metric);"
            f" got {given}"
        )


def _one_steering(rows: pd.DataFrame, name: str | None) -> str:
    """The steering that is meant: the one that is named, or the only one."""
    names = rows.loc[rows["kind"] == "steering", "steering"].unique().tolist()
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        known = ", ".join(map(repr, names)) or "no steering"
        raise ValueError(f"expected one of {known} as steering, got {name!r}")
    return name


def _window_cells(
    rows: pd.DataFrame, costs: pd.DataFrame, metric: str, steering: str
) -> pd.DataFrame:
    """The cells of a window, both signs in one; `beaten`: the effect exceeds every control's."""
    table = effect_by_cell(rows, metric)
    mine = table[(table["steering"] == steering) & (table["coeff"] != 0)]
    if mine.empty:
        raise ValueError(f"expected a coefficient other than 0 of {steering!r}")
    if pd.isna(mine["layer"].tolist()).any():
        raise ValueError(f"{steering!r} was swept at all its layers together: there is no window")
    mine = mine.merge(perplexity_ratio_by_cell(costs), on=CELL, how="left", indicator=True)
    for layer, coeff in mine.loc[mine["_merge"] == "left_only", ["layer", "coeff"]].to_numpy():
        raise ValueError(f"the costs lack layer {layer}, coefficient {coeff:g} of {steering!r}")
    size = mine["coeff"].abs()
    mine = mine.assign(effect=mine["effect"] * np.sign(mine["coeff"]), coeff=size)
    cells = mine.groupby(["layer", "coeff"], as_index=False).agg(
        {"effect": _smallest, "ratio": _largest, "wrong way": _largest}
    )
    own = table["steering"].str.fullmatch(rf"{re.escape(steering)}, random \d+")
    sizes = table.assign(coeff=table["coeff"].abs(), control=table["effect"].abs())
    others = sizes[(table["kind"] == "control") | (table["kind"] == "random") & own]
    controls = others.groupby(["layer", "coeff"], as_index=False).agg({"control": _largest})
    cells = cells.merge(controls, on=["layer", "coeff"], how="left", indicator=True)
    # A control that was swept and has no value is not beaten; one that was not swept counts 0.
    swept = cells.pop("_merge") == "both"
    cells["beaten"] = cells["effect"] > cells["control"].where(swept, 0.0)
    return cells


def _with_neighbours(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with `neighbours`: how many of the four beside each one work."""
    works = cells.astype({"works": int}).pivot(index="layer", columns="coeff", values="works")
    works = works.fillna(0)
    shifted = [works.shift(step, axis=axis, fill_value=0) for step in (1, -1) for axis in (0, 1)]
    counts = sum(shifted[1:], shifted[0]).astype(int).melt(ignore_index=False)
    counts = counts.rename(columns={"value": "neighbours"}).reset_index()
    return cells.merge(counts, on=["layer", "coeff"], how="left")


def _smallest(values: pd.Series) -> float:
    """NaN where one of them is: it could be smaller than the others."""
    return values.min(skipna=False)


def _largest(values: pd.Series) -> float:
    """NaN where one of them is: it could be larger than the others."""
    return values.max(skipna=False)


def _saying(cell: pd.Series, min_effect: float, max_ratio: float) -> str:
    """What was found at a cell, beside what was asked for."""
    control = (
        "no controls" if np.isnan(cell["control"]) else f"controls at most {cell['control']:.2f}"
    )
    return (
        f"layer {cell['layer']}, coefficient {cell['coeff']:g}: effect {cell['effect']:.2f} (asked"
        f" {min_effect:.2f}), {control}, perplexity ratio {cell['ratio']:.2f} (at most"
        f" {max_ratio:g}), {cell['wrong way']:.0%} of the prompts the wrong way"
    )
