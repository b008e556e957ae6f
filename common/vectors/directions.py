"""Random directions: what a steering vector is compared with."""

import torch
from torch import Tensor

from common.arguments import integer


def random_directions(d_model: int, count: int = 1, seed: int = 0) -> Tensor:
    """Draw random directions, spread evenly over all of the space.

    An effect that a random direction of the same norm has as well cannot be credited to a steering
    vector. The control is `direction * vector.norm()`.

    Args:
        d_model: how many numbers each direction has.
        count: how many directions.
        seed: the same directions for the same seed, on every machine.

    Returns:
        [count, d_model], fp32 on the CPU, each row at unit norm.

    Raises:
        ValueError: `d_model` below 1, a negative `count` or `seed`, or one that is not an integer.
    """
    size = integer(count, "count"), integer(d_model, "d_model", least=1)
    generator = torch.Generator().manual_seed(integer(seed, "seed"))
    noise = torch.randn(size, generator=generator)
    return noise / noise.norm(dim=-1, keepdim=True)
