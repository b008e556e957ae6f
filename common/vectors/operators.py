"""What happens at a steered position: addition is the default, and these are the alternatives.

An operator takes the hidden states [batch, pos, d_model] and the steering vector [1, 1, d_model],
already multiplied, and returns what is added: `steered = hidden + operator(hidden, vector)`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from common.arguments import finite_number

PatchDeltaOperator = Callable[[Tensor, Tensor], Tensor]
"""Says what is added, given the hidden states [..., d_model] and the vector times multiplier."""


def addition_operator() -> PatchDeltaOperator:
    """Return an operator that adds the vector, the default."""
    return lambda hidden, vector: vector


def ablation_operator() -> PatchDeltaOperator:
    """Return an operator that removes the component along the vector: the projection becomes 0.

    The length of the vector and its multiplier do not matter; the vector 0 removes nothing.
    """

    def ablate(hidden: Tensor, vector: Tensor) -> Tensor:
        direction = direction_of(vector)
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
        wide = _wide(hidden)
        return direction_of(wide + vector) * wide.norm(dim=-1, keepdim=True) - wide

    return add


def cap_operator(upper: float | None = None, lower: float | None = None) -> PatchDeltaOperator:
    """Return an operator that keeps the component along the vector within bounds.

    Where it is within them nothing changes, to the last bit. This is activation capping
    (https://arxiv.org/abs/2601.10387), which takes as bound a percentile of the components at
    normal texts; `component_quantile` measures it. The length of the vector and its multiplier do
    not matter; a negative multiplier turns the direction around, and the vector 0 changes nothing.
    Bounds belong to one layer: for several, open one `apply` for each
    `vector.select([layer])`.

    Args:
        upper: the largest component along the direction of the vector.
        lower: the smallest.

    Raises:
        ValueError: no bound, one that is not a finite number, or `lower` above `upper`.
    """
    if upper is None and lower is None:
        raise ValueError("expected a bound: upper, lower, or both")
    high = math.inf if upper is None else finite_number(upper, "upper")
    low = -math.inf if lower is None else finite_number(lower, "lower")
    if low > high:
        raise ValueError(f"expected lower below upper, got {lower!r} and {upper!r}")

    def cap(hidden: Tensor, vector: Tensor) -> Tensor:
        wide, direction = _wide(hidden), direction_of(vector)
        component = (wide * direction).sum(-1, keepdim=True)
        return (component.clamp(low, high) - component) * direction

    return cap


def rotation_operator(angle: float, second: Tensor, adaptive: bool = False) -> PatchDeltaOperator:
    """Return an operator that turns hidden states, in a plane, to an angle with the vector.

    The plane is spanned by the vector and a second one; what lies outside of it stays, and so does
    the length of what lies inside, and with it the norm. At 0 degrees all of it points along the
    vector, at 90 nothing is left along it (as with ablation), at 180 it points the other way, and
    270 is 90 on the other side. This is angular steering (https://arxiv.org/abs/2510.26243), where
    the vector is a difference of means, and the second one the first principal component of such
    differences over layers.

    The lengths of both do not matter; a negative multiplier turns the vector around, and the vector
    0 changes nothing.

    Args:
        angle: in degrees.
        second: the other vector, [d_model]; only what is orthogonal to the first one counts.
        adaptive: turn only hidden states with a positive component along the vector.

    Raises:
        ValueError: an angle that is not a finite number; a second vector that is not one of
            floating-point numbers, finite and not 0. In a pass: one of another width, or along the
            first.
    """
    turn = math.radians(finite_number(angle, "angle"))
    if (
        not isinstance(second, Tensor)
        or second.dim() != 1
        or not second.is_floating_point()
        or not torch.isfinite(second).all()
        or not second.any()
    ):
        raise ValueError(
            f"expected a vector [d_model] other than 0, of finite numbers, as second, got {second}"
        )

    def rotate(hidden: Tensor, vector: Tensor) -> Tensor:
        if len(second) != hidden.shape[-1]:
            raise ValueError(
                f"the second vector has {len(second)} numbers, the hidden states {hidden.shape[-1]}"
            )
        wide, first = _wide(hidden), direction_of(vector)
        other = direction_of(second.to(hidden.device)).to(wide)
        other = _orthogonal(other, first)
        if bool((other.norm(dim=-1) < 1e-4).any()):
            raise ValueError("the second vector points along the first: they span no plane")
        # Of two that lie close together, rounding is a part of what is left: once more without it.
        other = direction_of(_orthogonal(direction_of(other), first))
        x, y = ((wide * axis).sum(-1, keepdim=True) for axis in (first, other))
        length = torch.hypot(x, y)
        moved = (length * math.cos(turn) - x) * first + (length * math.sin(turn) - y) * other
        turned = vector.any(-1, keepdim=True)
        if adaptive:
            turned = turned & (x > 0)
        return torch.where(turned, moved, 0.0)

    return rotate


def _orthogonal(vector: Tensor, direction: Tensor) -> Tensor:
    return vector - (direction * vector).sum(-1, keepdim=True) * direction


def direction_of(vectors: Tensor) -> Tensor:
    """Return vectors [..., d_model] at length 1, in float32 at least; the vector 0 stays 0.

    The length does not matter: the square of 1e-25 would be 0 in float32.
    """
    wide = _wide(vectors)
    largest = wide.abs().amax(-1, keepdim=True)
    return functional.normalize(wide / torch.where(largest > 0, largest, 1.0), dim=-1)


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: 16 bits are too few for the difference of two components."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
