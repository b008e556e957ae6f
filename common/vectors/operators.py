"""What is done at a steered position. Addition is the default; these are the others.

An operator takes the hidden states [batch, pos, d_model] and the steering vector [1, 1, d_model],
already multiplied, and
returns what is added to the hidden states: `steered = hidden + operator(hidden, vector)`.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

PatchDeltaOperator = Callable[[Tensor, Tensor], Tensor]


def addition_operator() -> PatchDeltaOperator:
    """Return an operator that adds the vector, the default."""
    return lambda hidden, vector: vector


def ablation_operator() -> PatchDeltaOperator:
    """Return an operator that takes the component along the vector away, so that the projection on it becomes 0.

    The length of the vector and its multiplier do not matter; the vector 0 takes nothing away.
    """

    def ablate(hidden: Tensor, vector: Tensor) -> Tensor:
        direction = functional.normalize(vector, dim=-1)
        return -(hidden * direction).sum(-1, keepdim=True) * direction

    return ablate


def ablation_then_addition_operator() -> PatchDeltaOperator:
    """Return an operator that ablates the vector and then adds it: the component along it becomes the vector itself."""
    ablate = ablation_operator()
    return lambda hidden, vector: ablate(hidden, vector) + vector


def norm_preserving_addition_operator() -> PatchDeltaOperator:
    """Return an operator that adds the vector and scales the sum back to the norm that the hidden states had.

    It turns the residual stream and never makes it longer. A sum of exactly 0 has no direction, and
    stays 0.
    """

    def add(hidden: Tensor, vector: Tensor) -> Tensor:
        moved = hidden + vector
        return functional.normalize(moved, dim=-1) * hidden.norm(dim=-1, keepdim=True) - hidden

    return add
