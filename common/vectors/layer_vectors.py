"""Vectors by layer, with arithmetic: what a steering vector is before it steers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Self

from torch import Tensor
from torch.nn import functional

from common.arguments import integer, layer_list
from common.places.sites import LayerType

CARD = "card"  # of the metadata: what `choose` says of a vector, which is true of no other


@dataclass(eq=False, repr=False)
class LayerVectors:
    """Vectors of one width, one for each of some layers, that can be added, scaled and compared.

    Attributes:
        layer_activations: by layer number, a vector [d_model].
        layer_type: which part of the blocks they belong to.
        metadata: where they come from.

    Raises:
        ValueError: no layers, or something that is not a vector of floating-point numbers.
    """

    layer_activations: dict[int, Tensor]
    layer_type: LayerType = "decoder_block"
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.layer_activations, dict) or not self.layer_activations:
            raise ValueError(
                f"expected a dict from layer number to vector, got {self.layer_activations!r}"
            )
        for layer, vector in self.layer_activations.items():
            integer(layer, "layer number", least=None)
            if not isinstance(vector, Tensor):
                given = repr(vector)
            elif not vector.is_floating_point() or vector.dim() != 1:
                given = f"a {vector.dtype} tensor {list(vector.shape)}"
            else:
                continue
            raise ValueError(
                f"expected a floating-point vector [d_model] for layer {layer}, got {given}"
            )
        self.layer_activations = {int(n): vector for n, vector in self.layer_activations.items()}

    def __repr__(self) -> str:
        """Say on one line where it acts, how long it is, and what it was made for."""
        lengths, widths = self.norm().values(), {len(v) for v in self.layer_activations.values()}
        ends = dict.fromkeys(f"{length:.3g}" for length in (min(lengths), max(lengths)))
        model = f", made for {self.metadata['model']!r}" if self.metadata.get("model") else ""
        return (
            f"{type(self).__name__}(layers={self.layers}, layer_type={self.layer_type!r},"
            f" d_model={' or '.join(map(str, sorted(widths)))}, length={' to '.join(ends)}{model})"
        )

    @property
    def layers(self) -> list[int]:
        """The numbers of its layers."""
        return list(self.layer_activations)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the vector on another device or in another dtype, like `torch.Tensor.to`."""
        moved = {n: vector.to(*args, **kwargs) for n, vector in self.layer_activations.items()}
        return replace(self, layer_activations=moved)

    def select(self, layers: Iterable[int]) -> Self:
        """Return the vector with some of its layers only, for example those that GGUF takes.

        Args:
            layers: numbers as they are in `layer_activations`; the result has them in this order.

        Raises:
            ValueError: no layers, one that the vector does not have, or not a list of integers.
        """
        chosen = [integer(layer, "layer number", least=None) for layer in layer_list(layers)]
        mine = self.layer_activations
        if not chosen or not mine.keys() >= set(chosen):
            raise ValueError(f"expected layers out of {sorted(mine)}, got {chosen}")
        return replace(self, layer_activations={layer: mine[layer] for layer in chosen})

    def __add__(self, other: Self) -> Self:
        """Add layer by layer; a layer that only one of them has is taken as it is.

        Raises:
            ValueError: another layer type, or another width.
        """
        if not isinstance(other, LayerVectors):
            return NotImplemented
        self._check_alike(other)
        summed = dict(self.layer_activations)
        for layer, vector in other.layer_activations.items():
            mine = summed.get(layer)
            summed[layer] = vector if mine is None else mine + vector.to(mine.device)
        return replace(self, layer_activations=summed, metadata=self._common_metadata(other))

    def __sub__(self, other: Self) -> Self:
        """Subtract layer by layer; as `self + (-other)`."""
        return self + (-other) if isinstance(other, LayerVectors) else NotImplemented

    def __mul__(self, factor: float) -> Self:
        """Multiply every vector by a number."""
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        return self._map(lambda vector: float(factor) * vector)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        """Divide every vector by a number other than 0."""
        if isinstance(divisor, bool) or not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0:
            raise ValueError("cannot divide a steering vector by 0")
        return self._map(lambda vector: vector / float(divisor))

    def __neg__(self) -> Self:
        """Turn every vector around."""
        return self._map(lambda vector: -vector)

    def norm(self) -> dict[int, float]:
        """Return the length of the vector of every layer."""
        # In float32 the square of 1e20 is inf, and that of 1e-25 is 0.
        return {
            layer: vector.detach().cpu().double().norm().item()
            for layer, vector in self.layer_activations.items()
        }

    def unit(self) -> Self:
        """Return the direction: every vector scaled to norm 1.

        Raises:
            ValueError: the vector of a layer is 0, or has nan or inf.
        """
        if endless := [layer for layer, norm in self.norm().items() if not math.isfinite(norm)]:
            raise ValueError(
                f"expected finite numbers, got nan or inf in the vector of layer {endless[0]}"
            )
        if zero := [layer for layer, norm in self.norm().items() if norm == 0]:
            raise ValueError(f"the vector of layer {zero[0]} is 0 and has no direction")
        return self._map(
            lambda vector: functional.normalize((vector / vector.abs().max()).float(), dim=0).to(
                vector.dtype
            )
        )

    def cosine_similarity(self, other: Self) -> dict[int, float]:
        """Return the cosine of the angle between two vectors, for every layer that both have.

        Raises:
            ValueError: another layer type or width, no layer in common, a vector that is 0.
        """
        self._check_alike(other)
        shared = [layer for layer in self.layer_activations if layer in other.layer_activations]
        if not shared:
            raise ValueError(
                f"no layer in common: {sorted(self.layer_activations)} and"
                f" {sorted(other.layer_activations)}"
            )
        mine, others = self.unit().layer_activations, other.unit().layer_activations
        return {
            layer: float(mine[layer].cpu().float() @ others[layer].cpu().float())
            for layer in shared
        }

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = {layer: change(vector) for layer, vector in self.layer_activations.items()}
        kept = {name: value for name, value in self.metadata.items() if name != CARD}
        return replace(self, layer_activations=changed, metadata=kept)

    def _check_alike(self, other: Self) -> None:
        if self.layer_type != other.layer_type:
            raise ValueError(
                f"the vectors act in different places: {self.layer_type!r} and {other.layer_type!r}"
            )
        widths = {
            len(vector) for part in (self, other) for vector in part.layer_activations.values()
        }
        if len(widths) > 1:
            raise ValueError(f"the vectors have different widths: {sorted(widths)}")

    def _common_metadata(self, other: Self) -> dict[str, str]:
        """What is true of a sum: the entries in which both agree, but for a card."""
        return {
            name: value
            for name, value in self.metadata.items()
            if other.metadata.get(name) == value and name != CARD
        }
