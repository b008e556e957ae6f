"""What happens at a steered position: addition is the default, and these are the alternatives.

An operator takes the hidden states [batch, pos, d_model] and the steering vector [1, 1, d_model],
already multiplied, and returns what is added: `steered = hidden + operator(hidden, vector)`.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

PatchDeltaOperator = Callable[[Tensor, Tensor], Tensor]


def addition_operator() -> PatchDeltaOperator:
    """Return an operator that adds the vector, the default."""
    return lambda hidden, vector: vector


def ablation_operator() -> PatchDeltaOperator:
    """Return an operator that removes the component along the vector: the projection becomes 0.

    The length of the vector and its multiplier do not matter; the vector 0 removes nothing.
    """

    def ablate(hidden: Tensor, vector: Tensor) -> Tensor:
        direction = functional.normalize(vector, dim=-1)
        return -(hidden * direction).sum(-1, keepdim=True) * direction

    return ablate


def ablation_then_addition_operator() -> PatchDeltaOperator:
    """Return an operator that makes the component along the vector the vector itself.

    It ablates the vector and then adds it.
    """
    ablate = ablation_operator()
    return lambda hidden, vector: ablate(hidden, vector) + vector


def norm_preserving_addition_operator() -> PatchDeltaOperator:
    """Return an operator that adds the vector and keeps the norm of the hidden states.

    It turns the residual stream and never makes it longer. A sum of exactly 0 has no direction, and
    stays 0.
    """

    def add(hidden: Tensor, vector: Tensor) -> Tensor:
        moved = hidden + vector
        return functional.normalize(moved, dim=-1) * hidden.norm(dim=-1, keepdim=True) - hidden

    return add
