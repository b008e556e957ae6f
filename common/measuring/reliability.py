"""For whom steering fails: the slope of every prompt, and what of the pairs foretells it.

A mean effect hides prompts that steering moves the wrong way. The steerability of a prompt is the
slope of the least-squares line of a metric over the coefficient; a prompt whose slope is negative
is anti-steerable (Tan et al. 2024, "Analyzing the Generalization and Reliability of Steering
Vectors", https://arxiv.org/abs/2407.12404). Vectors are more reliable where the differences of the
pairs agree in direction, and where the vector separates the two sides well (Braun et al. 2025,
"Understanding (Un)Reliability of Steering Vectors in Language Models",
https://arxiv.org/abs/2505.22637).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.measuring.effects import CELL, with_numbers
from common.places.sites import get_layers
from common.vectors.pairs import Sample
from common.vectors.steering_vector import SteeringVector
from common.vectors.training import extract_activations

LINE = ["steering", "kind", "layer", "prompt"]
CONFIDENCE = 0.95


def steerability(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Fit a line to a metric over the coefficient, for every prompt.

    A prompt's points are all its samples at all coefficients, with the unsteered ones at 0. Points
    without a value do not count. Sweep a range in which the metric has not levelled off: a line
    through what is flat says little.

    Args:
        rows: what `sweep` or `sweep_logits` returned: the cells, `prompt`, the metric, and the
            unsteered rows.
        metric: its column, for example the difference of two log-probabilities, or the tone; larger
            values are what positive coefficients are to bring.

    Returns:
        By steering, layer and prompt: `slope` (of the metric, for 1 of the coefficient), `low` and
        `high` (its 95 % interval, from Student's t with as many degrees of freedom as there are
        points but two; NaN with two points), and `points`, their number. A prompt with values at
        one coefficient only has no slope: NaN.

    Raises:
        ValueError: other rows than these, no unsteered ones, no coefficient but 0, or a metric that
            is one of the columns of a cell, or `prompt`.
    """
    if not isinstance(rows, pd.DataFrame) or not {*CELL, "prompt"} <= set(rows):
        given = list(rows) if isinstance(rows, pd.DataFrame) else rows
        raise ValueError(f"expected rows as sweep or sweep_logits returns them, got {given!r}")
    if metric in (*CELL, "prompt"):
        raise ValueError(
            f"expected the column of a metric, got {metric!r}, which says what was swept"
        )
    rows = with_numbers(rows, metric).reindex(columns=[*CELL, "prompt", metric])
    rows = rows.rename(columns={metric: "value"})
    plain = rows.loc[rows["kind"] == "unsteered", ["prompt", "value"]]
    if plain.empty or set(rows["kind"]) == {"unsteered"}:
        raise ValueError("expected steered rows, and unsteered ones to compare them with")
    # What was "steered" by 0 is the unsteered text once more.
    steered = rows.loc[(rows["kind"] != "unsteered") & (rows["coeff"] != 0)]
    lines = steered[LINE].drop_duplicates(ignore_index=True)
    if lines.empty:
        raise ValueError("expected a coefficient other than 0")
    numbers = lines.reset_index(names="line")
    unsteered = numbers.merge(plain, on="prompt").assign(coeff=0.0)
    points = pd.concat([steered.merge(numbers, on=LINE), unsteered])[["line", "coeff", "value"]]
    fits = [
        _line(*group.dropna().to_numpy(dtype=float).T[1:])  # coefficients, values
        for _, group in points.groupby("line")
    ]
    return lines.join(pd.DataFrame(fits))


def _line(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The slope of the least-squares line and its interval."""
    found = {"slope": np.nan, "low": np.nan, "high": np.nan, "points": len(x)}
    if len(x) < 2:
        return found
    x = x - x.mean()
    if not (spread := x @ x):
        return found
    slope, free = x @ y / spread, len(x) - 2
    rest = y - y.mean() - slope * x
    wide = np.nan
    if free > 0:
        wide = stats.t.ppf((1 + CONFIDENCE) / 2, free) * np.sqrt(rest @ rest / free / spread)
    return found | {"slope": slope, "low": slope - wide, "high": slope + wide}


def steerable_shares(slopes: pd.DataFrame) -> pd.DataFrame:
    """Sum up slopes: how steerable the prompts are together, and how many are anti-steerable.

    Args:
        slopes: what `steerability` returned; prompts without a slope do not count.

    Returns:
        By steering and layer: `slope`, the mean over the prompts, with `low` and `high` (its 95 %
        interval over prompts, Student's t); `anti`, the share of prompts with a negative slope,
        with `anti low` and `anti high` (Wilson's 95 % interval); `surely anti`, the share whose
        whole interval is negative; and `prompts`, how many count.

    Raises:
        ValueError: another table.
    """
    if not isinstance(slopes, pd.DataFrame) or not {*LINE, "slope", "high"} <= set(slopes):
        raise ValueError("expected slopes as steerability returns them")
    groups = slopes.groupby(LINE[:3], sort=False, dropna=False)
    return groups[["slope", "high"]].apply(_shares).astype({"prompts": int}).reset_index()


def _shares(group: pd.DataFrame) -> pd.Series:
    slopes, highest = group.dropna(subset="slope").to_numpy(dtype=float).T
    count, anti = len(slopes), int((slopes < 0).sum())
    mean = slopes.mean() if count else np.nan
    wide = np.nan
    if count > 1:
        wide = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * slopes.std(ddof=1) / count**0.5
    ends = (np.nan, np.nan)
    if count:
        found = stats.binomtest(anti, count).proportion_ci(CONFIDENCE, "wilson")
        ends = (found.low, found.high)
    return pd.Series(
        {
            "slope": mean,
            "low": mean - wide,
            "high": mean + wide,
            "anti": anti / count if count else np.nan,
            "anti low": ends[0],
            "anti high": ends[1],
            "surely anti": (highest < 0).mean() if count else np.nan,
            "prompts": count,
        }
    )


def pair_agreement(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Sample],
    vector: SteeringVector | None = None,
    **reading: Any,
) -> pd.DataFrame:
    """Say of each contrast pair how well it agrees with a steering vector, or with the other pairs.

    Args:
        model: a causal language model; unchanged.
        tokenizer: its tokenizer.
        pairs: contrast pairs.
        vector: its layers are looked at. A vector that was trained on these very pairs agrees with
            each of them to some degree because the pair is a part of it: with n pairs of random
            noise the cosine is 1/√n. So by default each pair is compared with the mean difference
            of all others. Then each pair has a line of its own, and what all hidden states have in
            common lies differently far along each: with few pairs the `separation` of
            `agreement_by_layer` comes out too small. Give a vector from other pairs for that.
        reading: how the pairs are read: `layers`, `layer_type`, `read_token_index`, `batch_size`,
            … of `extract_activations`.

    Returns:
        By layer (never negative) and pair (its number): `cosine` of the pair's difference and the
        vector (NaN where the two sides do not differ), `positive` and `negative`, how far each side
        lies along the vector at norm 1.

    Raises:
        ValueError: fewer than two pairs without a vector, layers beside those of the vector, or
            what `extract_activations` raises.
    """
    if vector is not None:
        if {"layers", "layer_type"} & set(reading):
            raise ValueError("expected layers and layer_type of the vector, and no others")
        reading |= {"layers": list(vector.layer_activations), "layer_type": vector.layer_type}
    elif len(pairs) < 2:
        raise ValueError("expected two pairs or more, or a vector to compare the pair with")
    sides = extract_activations(model, tokenizer, pairs, **reading)
    tables, given = [], {}
    if vector is not None:
        # The activations come in the order of the layers, whatever the order of the vector.
        config = reading.get("layer_config")
        numbers = get_layers(model, vector.layer_type, config, vector.layers)
        given = dict(zip(numbers, vector.layer_activations.values(), strict=True))
    for layer in sides[0]:
        positive, negative = (torch.cat(side[layer]).double().cpu() for side in sides)
        difference = positive - negative
        if vector is None:
            line = difference.sum(0) - difference
        else:
            line = given[layer].detach().double().cpu().expand_as(difference)
        line = line / line.norm(dim=-1, keepdim=True)
        columns = {
            "cosine": _along(difference, line) / difference.norm(dim=-1),
            "positive": _along(positive, line),
            "negative": _along(negative, line),
        }
        table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
        tables.append(table.rename_axis("pair").reset_index().assign(layer=layer))
    columns = ["layer", "pair", "cosine", "positive", "negative"]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns)


def _along(states: Tensor, line: Tensor) -> Tensor:
    return (states * line).sum(-1)


def agreement_by_layer(agreement: pd.DataFrame) -> pd.DataFrame:
    """Sum up the agreement of pairs: what foretells whether their vector steers reliably.

    Args:
        agreement: what `pair_agreement` returned.

    Returns:
        By layer: `cosine`, the mean; `against`, the share of pairs with a negative one;
        `separation`, the discriminability index d' = (m₊ - m₋) / √((s₊² + s₋²) / 2) of the two
        sides along the vector, with their means m and variances s²; and `pairs`.

    Raises:
        ValueError: another table.
    """
    wanted = {"layer", "cosine", "positive", "negative"}
    if not isinstance(agreement, pd.DataFrame) or not wanted <= set(agreement):
        raise ValueError("expected what pair_agreement returns")
    rows = []
    for layer, group in agreement.groupby("layer", sort=False):
        cosines, positive, negative = (
            group[name].to_numpy(dtype=float) for name in ("cosine", "positive", "negative")
        )
        spread = (positive.var(ddof=1) + negative.var(ddof=1)) / 2 if len(group) > 1 else np.nan
        known = cosines[~np.isnan(cosines)]
        rows.append(
            {
                "layer": layer,
                "cosine": known.mean() if len(known) else np.nan,
                "against": (known < 0).mean() if len(known) else np.nan,
                "separation": (positive.mean() - negative.mean()) / spread**0.5,
                "pairs": len(group),
            }
        )
    return pd.DataFrame(rows)
