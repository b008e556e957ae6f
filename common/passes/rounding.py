"""Tell a difference of activations from rounding.

Two passes that compute the same in another order (other neighbours in the batch, other padding)
give activations that are not equal to the last bit. Their difference means nothing, however large
it is made.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The largest part of its size by which an activation differs between two passes that compute the
# same. In float32 small models of up to 12 layers stay below 4e-6; two words before a hundred
# others leave 7e-5 after the first block.
NOISE = 2e-5


def rounding_error(*activations: Tensor, dtype: torch.dtype) -> float:
    """Return about how long the error of a sum or difference is, of tensors rounded to `dtype`."""
    half_step = torch.finfo(dtype).eps / 2
    # Roundings spread evenly up to half a step of a number; a step belongs to a power of 2, on
    # average 3/4 of the number.
    size = math.hypot(*(part.double().norm() for part in activations))
    return half_step * 0.75 / math.sqrt(3) * size


class Spread(NamedTuple):
    """How far the activations of a layer lie apart; those of two lots of pairs add up.

    Attributes:
        pairs_differ: whether a pair (of sets of different sizes: anything) differs by more than
            rounding.
        counts: how many activations are positive, how many negative.
        sums: of both, [2, d_model], in float64.
        squares: sums of squares of both, [2, d_model], in float64.
        largest: the largest of all in each dimension, [d_model], in float64.
        dtype: in which the model computed them.
    """

    pairs_differ: bool
    counts: tuple[int, int]
    sums: Tensor
    squares: Tensor
    largest: Tensor
    dtype: torch.dtype

    def plus(self, other: "Spread") -> "Spread":
        """Return that of both lots together."""
        return Spread(
            self.pairs_differ or other.pairs_differ,
            (self.counts[0] + other.counts[0], self.counts[1] + other.counts[1]),
            self.sums + other.sums,
            self.squares + other.squares,
            torch.maximum(self.largest, other.largest),
            torch.promote_types(self.dtype, other.dtype),
        )


def spread_of(positive: Tensor, negative: Tensor) -> Spread:
    """Return how far activations [prompt, d_model] lie apart, in the dtype of the model."""
    dtype = torch.promote_types(positive.dtype, negative.dtype)
    both = positive.double(), negative.double()
    if len(positive) == len(negative):
        one, other = both
    else:
        one = torch.cat(both)
        other = one[:1].expand_as(one)
    # In 16 bit a faint difference of meaning is no larger than the noise of many layers, but it is
    # never below one rounding.
    share = max(NOISE, 1.5 * rounding_error(torch.ones(1), dtype=dtype))
    size = torch.hypot(one.norm(dim=-1), other.norm(dim=-1))
    # A few huge dimensions make up most of some models' norm; beside them all others could differ
    # unseen.
    usual = torch.hypot(one.abs().median(dim=-1).values, other.abs().median(dim=-1).values)
    differ = one - other
    alike = (differ.norm(dim=-1) <= share * size) & (
        differ.abs().median(dim=-1).values <= share * usual
    )
    return Spread(
        not bool(alike.all()),
        (len(positive), len(negative)),
        torch.stack([part.sum(0) for part in both]),
        torch.stack([part.square().sum(0) for part in both]),
        torch.maximum(one.abs(), other.abs()).amax(0),
        dtype,
    )


def is_rounding(vector: Tensor, spread: Spread) -> bool:
    """Say whether a vector was made of nothing but rounding.

    That is so where no pair differs by more than rounding; for sets of different sizes, which have
    no pairs, where all activations are the same but for rounding. It is also so where the mean
    difference is lost in the rounding of the activations, as when the same prompts are on both
    sides in another order, and the vector is as short.

    Args:
        vector: [d_model], from any aggregator; only its length is used, where the mean difference
            is lost.
        spread: of the activations that it was made from.
    """
    if not spread.pairs_differ:
        return True
    counts = torch.tensor(spread.counts, dtype=torch.float64, device=spread.sums.device)[:, None]
    positive, negative = spread.sums / counts
    means = positive - negative
    # Of each dimension; and aggregators compute in float32.
    unit = rounding_error(torch.ones(1), dtype=spread.dtype)
    lost = torch.hypot(*(unit * spread.squares.sqrt() / counts))
    lost += torch.finfo(torch.float32).eps * spread.largest
    is_short = max(means.norm().item(), vector.double().norm().item()) <= lost.norm().item()
    return is_short and means.abs().median().item() <= 2 * lost.median().item()
