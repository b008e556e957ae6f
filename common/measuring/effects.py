"""Where steering works and what it costs: the effect beside its controls, over layers, coefficients and prompts.

The tables come from `sweeps`. An effect is a move of something measured, against unsteered, prompt
by prompt.
"""

import re
from dataclasses import dataclass
from numbers import Real

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
            `spread` (standard deviation),
        `error` (standard error of the effect), `wrong way` (the share of prompts that moved against
        the sign of the coefficient) and `prompts`, their number.

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


def moves_by_prompt(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the cells, `prompt`, and `move`: the metric's mean over the samples of a prompt, minus its unsteered mean.

    Means are over the samples that have a value; where none has one, the move is NaN.

    Raises:
        ValueError: no such column, texts in it, or no unsteered rows.
    """
    rows = with_numbers(rows, metric)
    plain = rows[rows["kind"] == "unsteered"].groupby("prompt", sort=False)[metric].mean()
    if plain.empty:
        raise ValueError("the table has no unsteered rows to compare with")
    steered = (
        rows[rows["kind"] != "unsteered"]
        .groupby([*CELL, "prompt"], sort=False)[metric]
        .mean()
        .reset_index()
    )
    steered["move"] = steered[metric] - steered["prompt"].map(plain)
    return steered.drop(columns=metric)


def with_numbers(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows with a metric as float: a gap is NaN, a truth value 0 or 1."""
    if metric not in rows:
        raise ValueError(f"no column {metric!r}: the table has {', '.join(map(str, rows.columns))}")
    values = rows[metric].dropna()
    if len(other := values[[not isinstance(value, Real | np.bool_) for value in values]]):
        raise ValueError(f"expected numbers in the column {metric!r}, got {other.iloc[0]!r}")
    return rows.assign(**{metric: rows[metric].to_numpy(dtype=float, na_value=np.nan)})


def perplexity_ratio_by_cell(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the perplexity ratio steered / unsteered at every cell, over all tokens of the texts.

    Where a text has no loss (a steering so large that the model gives NaN), the ratio of the cell
    is NaN: a broken model is not one that costs nothing.

    Args:
        rows: what `sweep_perplexity` returned.
    """
    steered = rows[rows["kind"] != "unsteered"]
    more = (steered["loss"] - steered["unsteered_loss"]) * steered["tokens"]
    table = (
        steered[CELL]
        .assign(more=more, tokens=steered["tokens"])
        .groupby(CELL, sort=False)
        .agg(_whole_sum)
        .reset_index()
    )
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
    """Find the layers and coefficients at which steering works and does not cost too much, and recommend one.

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
    for name, table, columns in (
        ("rows", rows, {*CELL, "prompt"}),
        ("costs", costs, {*CELL, "loss", "unsteered_loss", "tokens"}),
    ):
        if not isinstance(table, pd.DataFrame) or not columns <= set(table):
            what = (
                f"a table of {', '.join(map(str, table))}"
                if isinstance(table, pd.DataFrame)
                else repr(table)
            )
            wanted = "sweep" if name == "rows" else "sweep_perplexity"
            raise ValueError(
                f"expected as {name} what {wanted} returned, as in working_window(rows, costs,"
                f" metric); got {what}"
            )
    if metric not in rows:
        raise ValueError(f"no column {metric!r}: the table has {', '.join(map(str, rows.columns))}")
    names = rows.loc[rows["kind"] == "steering", "steering"].unique().tolist()
    if steering is None and len(names) == 1:
        steering = names[0]
    if steering not in names:
        raise ValueError(
            f"expected one of {', '.join(map(repr, names)) or 'no steering'} as steering, got"
            f" {steering!r}"
        )
    table = effect_by_cell(rows, metric)
    ratios = perplexity_ratio_by_cell(costs)
    mine = table[(table["steering"] == steering) & (table["coeff"] != 0)].merge(
        ratios, on=CELL, how="left", indicator=True
    )
    if mine.empty:
        raise ValueError(f"expected a coefficient other than 0 of {steering!r}")
    if len(lacking := mine[mine["_merge"] == "left_only"]):
        lacking = lacking.iloc[0]
        raise ValueError(
            f"the costs lack layer {lacking['layer']}, coefficient {lacking['coeff']:g} of"
            f" {steering!r}"
        )
    own_random = (table["kind"] == "random") & table["steering"].str.fullmatch(
        rf"{re.escape(steering)}, random \d+"
    )
    others = table[(table["kind"] == "control") | own_random]
    mine = mine.assign(effect=mine["effect"] * np.sign(mine["coeff"]), coeff=mine["coeff"].abs())
    cells = mine.groupby(["layer", "coeff"], as_index=False).agg(
        {"effect": lambda both: both.min(skipna=False), "ratio": _largest, "wrong way": _largest}
    )
    largest = (
        others.assign(coeff=others["coeff"].abs(), control=others["effect"].abs())
        .groupby(["layer", "coeff"], as_index=False)["control"]
        .agg(_largest)
    )
    cells = cells.merge(largest, on=["layer", "coeff"], how="left", indicator=True)
    unknown = (cells.pop("_merge") == "both") & cells[
        "control"
    ].isna()  # swept, and without a value: nothing is beaten
    if cells["effect"].isna().all():
        cells["works"], cells["neighbours"] = False, 0
        return WorkingWindow(
            cells,
            None,
            None,
            f"no cell works: {metric!r} has no value that could be compared with unsteered",
        )
    min_effect = cells["effect"].max() / 2 if min_effect is None else min_effect
    cells["works"] = (
        (cells["effect"] >= min_effect)
        & (cells["effect"] > cells["control"].fillna(0))
        & (cells["ratio"] <= max_ratio)
        & (cells["wrong way"] <= max_wrong_way)
        & ~unknown
    )
    layers, coeffs = sorted(cells["layer"].unique()), sorted(cells["coeff"].unique())
    place = {
        (row.layer, row.coeff): (layers.index(row.layer), coeffs.index(row.coeff))
        for row in cells.itertuples()
    }
    working = {place[row.layer, row.coeff] for row in cells[cells["works"]].itertuples()}
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    cells["neighbours"] = [
        sum(
            (place[row.layer, row.coeff][0] + a, place[row.layer, row.coeff][1] + b) in working
            for a, b in steps
        )
        for row in cells.itertuples()
    ]
    if not working:
        best = cells.loc[cells["effect"].idxmax()]
        return WorkingWindow(
            cells,
            None,
            None,
            f"no cell works: the largest effect is that of {_saying(best, min_effect, max_ratio)}",
        )
    best = (
        cells[cells["works"]]
        .sort_values(["neighbours", "effect"], ascending=False, kind="stable")
        .iloc[0]
    )
    reason = (
        f"{_saying(best, min_effect, max_ratio)}; {best['neighbours']:.0f} of its neighbours"
        " work too"
    )
    return WorkingWindow(cells, int(best["layer"]), float(best["coeff"]), reason)


def _largest(values: pd.Series) -> float:
    """NaN where one of them is: it could be larger than the others."""
    return values.max(skipna=False)


def _saying(cell: pd.Series, min_effect: float, max_ratio: float) -> str:
    """What was found at a cell, beside what was asked for."""
    control = (
        "no controls" if pd.isna(cell["control"]) else f"controls at most {cell['control']:.2f}"
    )
    return (
        f"layer {cell['layer']}, coefficient {cell['coeff']:g}: effect {cell['effect']:.2f} (asked"
        f" {min_effect:.2f}), {control}, perplexity ratio {cell['ratio']:.2f} (at most"
        f" {max_ratio:g}), {cell['wrong way']:.0%} of the prompts the wrong way"
    )
