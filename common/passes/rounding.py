"""Tell a difference of activations from rounding.

Two passes that compute the same in another order (other neighbours in the batch, other padding)
give activations that are not equal to the last bit. Their difference means nothing, however large
it is made.
"""

import math

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


def is_rounding(vector: Tensor, positive: Tensor, negative: Tensor) -> bool:
    """Say whether a vector was made of nothing but rounding.

    That is so where no pair differs by more than rounding; for sets of different sizes, which have
    no pairs, where all activations are the same but for rounding. It is also so where the mean
    difference is lost in the rounding of the activations, as when the same prompts are on both
    sides in another order, and the vector is as short.

    Args:
        vector: [d_model], from any aggregator; only its length is used, where the mean difference
            is lost.
        positive, negative: the activations [prompt, d_model], in the dtype in which the model
            computed them.
    """
    dtype = torch.promote_types(positive.dtype, negative.dtype)
    if len(positive) == len(negative):
        one, other = positive.double(), negative.double()
    else:
        one = torch.cat([positive, negative]).double()
        other = one[:1].expand_as(one)
    # In 16 bit a faint difference of meaning is no larger than the noise of many layers, but it is
    # never below one rounding.
    unit = rounding_error(torch.ones(1), dtype=dtype)
    share = max(NOISE, 1.5 * unit)
    size = torch.hypot(one.norm(dim=-1), other.norm(dim=-1))
    # A few huge dimensions make up most of some models' norm; beside them all others could differ
    # unseen.
    usual = torch.hypot(one.abs().median(dim=-1).values, other.abs().median(dim=-1).values)
    differ = one - other
    if (
        (differ.norm(dim=-1) <= share * size)
        & (differ.abs().median(dim=-1).values <= share * usual)
    ).all():
        return True
    means = positive.double().mean(0) - negative.double().mean(0)
    # Of each dimension; and aggregators compute in float32.
    lost = torch.hypot(
        *(unit * part.double().norm(dim=0) / len(part) for part in (positive, negative))
    )
    lost += torch.finfo(torch.float32).eps * torch.maximum(one.abs(), other.abs()).amax(0)
    is_short = max(means.norm().item(), vector.double().norm().item()) <= lost.norm().item()
    return is_short and means.abs().median().item() <= 2 * lost.median().item()
