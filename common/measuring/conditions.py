"""Find what is needed to steer only where it is wanted: a condition, or the bound of a cap.

The search is that of conditional activation steering (https://arxiv.org/abs/2409.05907), with two
changes: the condition vector is a difference of means, and how well the condition works is said of
prompts that had no part in the search.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.arguments import finite_number, integer
from common.passes.prompts import Prompt, prompt_ids
from common.places.sites import get_layers
from common.vectors.conditions import Condition, prompt_means, read_alone
from common.vectors.steering_vector import SteeringVector


@dataclass(frozen=True)
class FoundCondition:
    """What `find_condition` returns.

    Attributes:
        condition: the best one.
        f1: its F1 on the prompts that were held out.
        layers: a row for each layer, the best first: `layer`, `threshold`, `above`, `f1` (on the
            prompts of the search), `gap` (between the cosines of the two sides at the threshold, as
            a share of their range) and `held-out f1`.
        held_out: the numbers of the prompts that were held out, on both sides; copies of a prompt
            are held out together.
    """

    condition: Condition
    f1: float
    layers: pd.DataFrame
    held_out: tuple[list[int], list[int]]


def find_condition(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    matching: Sequence[Prompt],
    others: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    held_out: float = 0.5,
    absolute: bool = False,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> FoundCondition:
    """Find a condition that tells prompts that match from others.

    Of each side a share is held out. On the rest, the condition vector of a layer is the difference
    of the means, and threshold and direction of the comparison are those with the largest F1; then
    the layer with the largest F1 is taken, and of equal ones the one with the widest gap.

    Args:
        model: a causal language model; unchanged.
        tokenizer: its tokenizer.
        matching: prompts that are to be steered: texts, or messages for a chat model.
        others: prompts that are not.
        layers: which layers are tried; all by default.
        held_out: which share of each side has no part in the search.
        absolute: compare the absolute value of the cosine, see `Condition`.
        seed: of the drawing.
        prepend_bos: see `prompt_ids`; it should be as in generation, for `encode` puts a BOS in
            front by default, and some tokenizers by themselves do not.

    Raises:
        ValueError: fewer than two different prompts on a side, so that none is held out or none is
            left; a prompt that is on both sides; a share that is not between 0 and 1; a prompt
            without tokens; a layer that is not there.
    """
    if not 0 < finite_number(held_out, "held_out") < 1:
        raise ValueError(f"expected a share between 0 and 1 as held_out, got {held_out!r}")
    sides, generator = [], np.random.default_rng(integer(seed, "seed"))
    for name, prompts in (("matching", matching), ("others", others)):
        if isinstance(prompts, str) or len(prompts) < 2:
            raise ValueError(f"expected a list of two prompts or more as {name}, got {prompts!r}")
        rows = prompt_ids(tokenizer, prompts, prepend_bos)
        sides.append((rows, *_split(rows, held_out, generator, name)))
    (my_rows, search, rest), (their_rows, other_search, other_rest) = sides
    if both := {*map(tuple, my_rows)} & {*map(tuple, their_rows)}:
        text = tokenizer.decode([*min(both)], skip_special_tokens=True)
        raise ValueError(f"{text!r} is on both sides: no condition tells it from itself")
    wanted = get_layers(model, layers=layers)
    mine, theirs = (prompt_means(model, rows, wanted) for rows in (my_rows, their_rows))
    found = []
    for layer in mine:
        known = mine[layer][search], theirs[layer][other_search]
        new = mine[layer][rest], theirs[layer][other_rest]
        found.append(_best_at(layer, known, new, absolute))
    found.sort(key=lambda one: (-one[1]["f1"], -one[1]["gap"]))
    table = pd.DataFrame([row for _, row in found])
    out = sorted(rest.tolist()), sorted(other_rest.tolist())
    return FoundCondition(found[0][0], float(table["held-out f1"].iloc[0]), table, out)


def _split(
    rows: list[list[int]], share: float, generator: np.random.Generator, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the prompts for the search, and of those held out, with all their copies."""
    copies: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        copies.setdefault(tuple(row), []).append(number)
    count = len(copies)
    if count < 2:
        raise ValueError(f"expected two different prompts or more as {name}, got {count}")
    out = min(max(round(count * share), 1), count - 1)
    groups, order = list(copies.values()), generator.permutation(count)
    search, rest = (
        np.concatenate([groups[n] for n in part]) for part in (order[out:], order[:out])
    )
    return search, rest


def _best_at(
    layer: int, known: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], absolute: bool
) -> tuple[Condition, dict]:
    """The best condition at a layer, from means [prompt, d_model] of both sides, and its row."""
    vector = known[0].mean(0) - known[1].mean(0)
    if not vector.any():
        raise ValueError(
            f"layer {layer}: the prompts of both sides are the same in the mean: no condition tells"
            " them apart"
        )
    trial = Condition(vector, layer, 0.0, absolute=absolute)
    one, other = (trial.similarity(means).numpy() for means in known)
    threshold, above, f1, gap = best_threshold(one, other)
    condition = Condition(vector, layer, threshold, above, absolute)
    decided = [condition.of_means({layer: means}).numpy() for means in new]
    held = _f1(decided[0].sum(), decided[1].sum(), len(decided[0]))
    row = {"layer": layer, "threshold": threshold, "above": above, "f1": f1, "gap": gap}
    return condition, {**row, "held-out f1": float(held)}


def best_threshold(one: np.ndarray, other: np.ndarray) -> tuple[float, bool, float, float]:
    """The threshold between two similarities with the largest F1, its direction, F1 and gap.

    `one` are the similarities of prompts that match. The gap is a share of the range of all.
    """
    values = np.unique(np.concatenate([one, other]))
    middle = (values[1:] + values[:-1]) / 2
    width = values[-1] - values[0] or 1.0
    # Beyond both ends too, where everything is meant.
    thresholds = np.concatenate([[values[0] - width], middle, [values[-1] + width]])
    gaps = np.concatenate([[0.0], np.diff(values) / width, [0.0]])
    best = (-1.0, -1.0, 0.0, True)
    for above in (True, False):
        mine, theirs = (
            (side > thresholds[:, None] if above else side < thresholds[:, None]).sum(-1)
            for side in (one, other)
        )
        scores = _f1(mine, theirs, len(one))
        top = max(range(len(scores)), key=lambda n: (scores[n], gaps[n]))
        best = max(best, (scores[top], gaps[top], thresholds[top], above), key=lambda it: it[:2])
    f1, gap, threshold, above = best
    return float(threshold), above, float(f1), float(gap)


def _f1(right: np.ndarray, wrong: np.ndarray, wanted: int) -> np.ndarray:
    """F1 where so many of the wanted were found, and so many others."""
    return 2 * right / (right + wrong + wanted)


def component_quantile(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    texts: Sequence[Prompt],
    quantile: float = 0.75,
    prepend_bos: bool | None = None,
) -> dict[int, float]:
    """Return a quantile of the components of hidden states along a vector: a bound for a cap.

    Args:
        model: a causal language model; unchanged.
        tokenizer: its tokenizer.
        vector: of the residual stream; only its direction counts.
        texts: texts as they should be, or messages. All their tokens count, but not the first one,
            whose hidden states are unlike all others.
        quantile: between 0 and 1. Most texts stay as they are with a high one as `upper`, or a low
            one as `lower`.
        prepend_bos: see `prompt_ids`.

    Returns:
        By layer, the quantile over all tokens, for `cap_operator`.

    Raises:
        ValueError: a vector of another layer type, that is 0, or of another width; a quantile
            outside 0 and 1; no token that counts.
    """
    if vector.layer_type != "decoder_block":
        raise ValueError(f"expected a vector of 'decoder_block', got one of {vector.layer_type!r}")
    if not 0 <= finite_number(quantile, "quantile") <= 1:
        raise ValueError(f"expected a quantile between 0 and 1, got {quantile!r}")
    unit = vector.unit().layer_activations
    numbers = list(get_layers(model, layers=vector.layers))
    directions = {number: unit[own] for number, own in zip(numbers, vector.layers)}
    for number, direction in directions.items():
        Condition(direction, number, 0.0).check(model)
    rows = [row for row in prompt_ids(tokenizer, texts, prepend_bos) if len(row) > 1]
    if not rows:
        raise ValueError("expected texts of two tokens or more")
    found = read_alone(model, rows, numbers, lambda hidden: hidden[0, 1:].float().cpu())
    components = {
        number: torch.cat(hidden) @ directions[number].float().cpu()
        for number, hidden in found.items()
    }
    return {
        own: float(np.quantile(components[number].numpy(), quantile))
        for number, own in zip(numbers, vector.layers)
    }
