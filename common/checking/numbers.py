"""Checks of numbers: how precise a difference is, and whether a vector does more than chance."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.arguments import integer
from common.checking.watching import PROMPTS, checked_batch, fail
from common.measuring.likelihood import kl_divergence
from common.passes.rounding import rounding_error
from common.texts import generation
from common.vectors.directions import random_directions


def precision_of_difference(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> float:
    """Return about how many significant bits the difference of two activations has left at most.

    Each was rounded to the precision of `dtype` (by default their own), and what they share
    cancels. The passes that gave them have rounded too, so there may be fewer.
    """
    if a.shape != b.shape or not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(
            f"expected two floating-point tensors of one shape, got {a.dtype} {list(a.shape)} and"
            f" {b.dtype} {list(b.shape)}"
        )
    error = rounding_error(a, b, dtype=dtype or torch.promote_types(a.dtype, b.dtype))
    difference = (a.double() - b.double()).norm().item()
    return max(0.0, math.log2(difference / error)) if difference else 0.0


def assert_precise_difference(
    a: Tensor, b: Tensor, bits: float = 5, dtype: torch.dtype | None = None
) -> None:
    """Fail if the difference of two activations has fewer significant bits left.

    See `precision_of_difference`.
    """
    if (left := precision_of_difference(a, b, dtype)) < bits:
        name = str(dtype or torch.promote_types(a.dtype, b.dtype)).removeprefix("torch.")
        fail(
            f"of a difference of {(a.double() - b.double()).norm():.1g} between activations of"
            f" {a.double().norm():.2g} in {name}, significant bits left at most: {int(left)}",
            f"{bits:g} or more",
            "large activations in 16 bit: read them in float32",
        )


def assert_beats_random(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steer: Callable[[Tensor], AbstractContextManager],
    vector: Tensor,
    measure: Callable[[], float] | None = None,
    controls: int = 8,
    margin: float = 1.5,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
) -> None:
    """Fail unless a vector does clearly more than random directions of the same norm.

    It catches a coefficient so large that everything "works", and a vector that means nothing.

    Args:
        model, tokenizer: see `common.checking`.
        steer: a vector [d_model] -> a context manager, for example `lambda v: my_steer(model, v)`.
        vector: with its coefficient.
        measure: a number, taken once unsteered and once under each vector; the effect is how far it
            moves. By default the divergence of the next token after `prompts` from unsteered, in
            nats, which says how much happens, and not what.
        controls: how many random directions, drawn from `seed`.
        margin: by which factor the effect must be larger than the largest effect of a control.
        prompts: for the default measure.
        seed: of the random directions.
    """
    integer(controls, "controls", 1)
    measured = measure or _divergence(model, tokenizer, prompts)
    unsteered = measured()

    def effect(candidate: Tensor) -> float:
        with steer(candidate):
            return abs(measured() - unsteered)

    randoms = random_directions(len(vector), controls, seed).to(vector) * vector.norm()
    ours, largest = effect(vector), max(map(effect, randoms))
    if not ours > margin * largest:
        fail(
            f"the vector, of norm {vector.norm():.3g}, moves the measure by {ours:.2g}, and random"
            f" directions of that norm by up to {largest:.2g}",
            f"more than {margin:g} times as much",
            "a coefficient so large that any direction would do, or a vector that means nothing",
        )


def _divergence(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Callable[[], float]:
    """A measure: the mean divergence of the next token after the prompts from what it is now."""
    batch = checked_batch(model, tokenizer, None, prompts)

    @torch.no_grad()
    def last() -> Tensor:
        return generation.logits(model, batch)[:, -1].float()

    unsteered = last()
    return lambda: kl_divergence(last(), unsteered).mean().item()
