"""What a sweep runs over: steering by name, layers, coefficients, and the controls beside it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import (
    finite_number,
    finite_product,
    function_of_two,
    integer,
    is_integer,
    layer_list,
)
from common.identity import hash_of_tensors
from common.passes.running import input_device
from common.places.blocks import get_blocks, stream_dtype
from common.places.positions import TokenSelection, TokenSpan
from common.places.sites import Site, get_layers
from common.sweeping.rows import RowSteering, in_one_row
from common.vectors.activation_additions import ActivationAddition, AdditionLocation, read_sites
from common.vectors.directions import random_directions
from common.vectors.operators import PatchDeltaOperator
from common.vectors.steering_vector import SteeringVector

Swept = SteeringVector | Sequence[ActivationAddition]
KEYS = ("steering", "kind", "layer", "coeff")


@dataclass(frozen=True)
class Grid:
    """What is swept: every steering at every layer with every coefficient.

    Args:
        steering: by name, steering vectors (added at all tokens to what their layer type says,
            resid_post of `layer` for most; they need all `layers`), or activation additions, for
            example of `get_x_vector` with coefficient 1 (added to resid_pre of `layer`, or
            resid_post if their names say so, at the tokens of the prompt; the layer in their names
            does not matter).
        layers: which layers, one at a time; None takes those of the vectors, or all for additions.
        coeffs: what the vectors are multiplied by.
        controls: more steering, of kind "control" in the result: unrelated pairs, say.
        random_controls: so many random directions for each steering, with the same norm at each
            layer and token.
        addition_location: see `apply_activation_additions`.
        operator: what is done with the vectors instead of adding them; see `SteeringVector.apply`.
        min_token_index: likewise, which token and all later ones are steered by the vectors.
        together: steer at all layers at once, as `apply` does with a vector of several layers. The
            result has no `layer` then. To compare groups of layers, give each a name:
            `{"early": vector.select(range(3)), "late": vector.select(range(3, 6))}`.

    Raises:
        ValueError: no steering, or none by name; layers or coefficients that are not a list of
            numbers; a coefficient twice; no such location; an operator that is not a function of
            two tensors; an operator or a `min_token_index` beside additions; `together` that is no
            truth value. What only a model can tell, such as a layer it does not have, is refused by
            the sweep.
    """

    steering: Mapping[str, Swept]
    layers: Iterable[int] | None = None
    coeffs: Iterable[float] = (1.0,)
    controls: Mapping[str, Swept] | None = None
    random_controls: int = 0
    addition_location: AdditionLocation = "front"
    operator: PatchDeltaOperator | None = None
    min_token_index: int | None = None
    together: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.steering, Mapping) or not self.steering:
            raise ValueError(
                "expected steering by name, for example {'Love - Hate': vector}, got"
                f" {self.steering!r}"
            )
        if not isinstance(self.controls or {}, Mapping):
            raise ValueError(f"expected controls by name, got {self.controls!r}")
        object.__setattr__(
            self, "random_controls", integer(self.random_controls, "random_controls")
        )
        TokenSpan(0, self.addition_location)
        if isinstance(self.coeffs, str) or not isinstance(self.coeffs, Iterable):
            raise ValueError(f"expected a list of numbers as coeffs, got {self.coeffs!r}")
        coeffs = tuple(finite_number(coeff, "coefficient") for coeff in self.coeffs)
        if not coeffs or len(set(coeffs)) < len(coeffs):
            raise ValueError(f"expected different finite coefficients, got {list(coeffs)}")
        object.__setattr__(self, "coeffs", coeffs)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(layer_list(self.layers)))
        if self.operator is not None:
            function_of_two(self.operator, "operator", "ablation_operator()")
        TokenSelection(self.min_token_index)
        if not isinstance(self.together, bool):
            raise ValueError(f"expected True or False as together, got {self.together!r}")
        everywhere = self.operator is None and self.min_token_index is None
        if not everywhere and not self._only_vectors():
            raise ValueError(
                "operator and min_token_index are for steering vectors: expected no activation"
                " additions beside them"
            )

    def bos(self, prepend_bos: bool | None) -> bool | None:
        """Return what stands in front of prompts: by default one BOS where there are additions."""
        return True if prepend_bos is None and not self._only_vectors() else prepend_bos

    def _only_vectors(self) -> bool:
        swept = [*self.steering.values(), *(self.controls or {}).values()]
        return all(isinstance(what, SteeringVector) for what in swept)

    def cells(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list["Cell"]:
        """Return the unsteered model and every point of the grid, in the order of the rows.

        Raises:
            ValueError: a layer that the model or a vector does not have, a vector that does not fit
                the model, a product outside its dtype, a name that is there twice.
        """
        everything = self._resolved(model, tokenizer)
        names = [one.name for one in everything]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"{twice[0]!r} is the name of two of what is swept, controls and random controls"
                " included"
            )
        largest = max(self.coeffs, key=abs)
        for one in everything:
            for layer, vectors in one.vectors.items():
                finite_product(largest, vectors, model.dtype, f"{one.name!r} at layer {layer}")
        return [
            Cell(None),
            *(
                Cell(one, layer, coeff)
                for one in everything
                for layer in ((None,) if self.together else one.vectors)
                for coeff in self.coeffs
            ),
        ]

    def _resolved(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list["Resolved"]:
        """Everything that is swept, read from the model: steering, controls, random controls."""
        layers = None if self.layers is None else _layers_of(model, self.layers)

        def resolve(name: str, what: Swept, kind: Literal["steering", "control"]) -> Resolved:
            if isinstance(what, SteeringVector):
                found = _resolved_vector(model, name, what, kind, layers)
                return found._replace(operator=self.operator, first=self.min_token_index)
            return _resolved_additions(
                model, tokenizer, name, what, kind, layers, self.addition_location
            )

        steering = [resolve(name, what, "steering") for name, what in self.steering.items()]
        controls = [resolve(name, what, "control") for name, what in (self.controls or {}).items()]
        randoms = [one.random(number) for one in steering for number in range(self.random_controls)]
        return steering + controls + randoms


class Resolved(NamedTuple):
    """Something that is swept: by layer, the vectors [count, d_model] that coefficient 1 adds.

    `content` says what they are made of, as JSON can hold it: activations differ in the last bits
    from machine to machine. `operator` and `first` are those of the grid.
    """

    name: str
    kind: Literal["steering", "control", "random"]
    part: str
    vectors: dict[int, Tensor]
    location: AdditionLocation | None
    content: Any
    operator: PatchDeltaOperator | None = None
    first: int | None = None

    def __reduce__(self) -> tuple:
        """Go to another process in main memory; its device may be another."""
        vectors = {layer: vector.cpu() for layer, vector in self.vectors.items()}
        return Resolved, tuple(self._replace(vectors=vectors))

    def row(self, layer: int, coeff: float) -> RowSteering:
        """Return what is added to a row of this layer and coefficient."""
        # In 16 bit the product may lie outside the dtype of the vectors, and inside the model's.
        vectors = self.vectors[layer]
        wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        site = Site(layer, self.part)
        return RowSteering(site, coeff * wide, self.location, self.operator, self.first)

    def random(self, number: int) -> "Resolved":
        """Return a random control: another direction at every layer and token, of the same norm."""
        found = {}
        for layer, vectors in self.vectors.items():
            count, d_model = vectors.shape
            directions = random_directions(d_model, count, seed=1000 * number + layer)
            found[layer] = (directions * vectors.float().cpu().norm(dim=-1, keepdim=True)).to(
                vectors
            )
        return self._replace(
            name=f"{self.name}, random {number + 1}",
            kind="random",
            vectors=found,
            content=[self.content, number],
        )


@dataclass
class Cell:
    """One point of the grid.

    Attributes:
        steering: None is the unsteered model.
        layer: None is all layers of the steering together.
        coeff: what it is multiplied by.
    """

    steering: Resolved | None
    layer: int | None = None
    coeff: float = 0.0

    def __str__(self) -> str:
        """Name what steers, and where."""
        if self.steering is None:
            return repr("unsteered")
        where = "all its layers" if self.layer is None else f"layer {self.layer}"
        return f"{self.steering.name!r} at {where}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave `row`, which lies on a device, to be made again."""
        return {name: value for name, value in vars(self).items() if name != "row"}

    def keys(self) -> dict[str, Any]:
        """Return its part of a row of the table."""
        if self.steering is None:
            return dict(zip(KEYS, ("unsteered", "unsteered", None, 0.0)))
        return dict(zip(KEYS, (self.steering.name, self.steering.kind, self.layer, self.coeff)))

    @cached_property
    def row(self) -> RowSteering | None:
        """How a row of it is steered."""
        if self.steering is None:
            return None
        layers = sorted(self.steering.vectors) if self.layer is None else [self.layer]
        return in_one_row([self.steering.row(layer, self.coeff) for layer in layers])


def _layers_of(model: PreTrainedModel, layers: Iterable[int]) -> list[int]:
    """The layers as numbers, once it is clear that the model has them."""
    given, count = list(layers), len(get_blocks(model)[1])
    if not given or not all(is_integer(layer) and 0 <= layer < count for layer in given):
        raise ValueError(f"expected layers from 0 to {count - 1}, got {given}")
    found = [int(layer) for layer in given]
    if twice := [layer for layer in found if found.count(layer) > 1]:
        raise ValueError(f"layer {twice[0]} is given twice: {found}")
    return found


def _resolved_vector(
    model: PreTrainedModel,
    name: str,
    what: SteeringVector,
    kind: Literal["steering", "control"],
    layers: Sequence[int] | None,
) -> Resolved:
    """A steering vector at the layers that are wanted, [1, d_model] each."""
    try:
        numbers = get_layers(model, what.layer_type, layers=list(what.layer_activations))
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    own = dict(zip(numbers, what.layer_activations.values()))
    d_model, vectors = model.config.get_text_config().hidden_size, {}
    for layer in sorted(own) if layers is None else layers:
        if layer not in own:
            raise ValueError(
                f"{name!r} has no vector for layer {layer}: it has layers {sorted(own)}"
            )
        if len(own[layer]) != d_model:
            raise ValueError(
                f"{name!r} has {len(own[layer])} numbers at layer {layer}, and d_model is {d_model}"
            )
        if not torch.isfinite(own[layer]).all():
            raise ValueError(
                f"expected finite numbers, got nan or inf in {name!r} at layer {layer}"
            )
        vectors[layer] = own[layer].detach()[None].to(input_device(model))
    part = "resid_post" if what.layer_type == "decoder_block" else what.layer_type
    return Resolved(name, kind, part, vectors, None, hash_of_tensors(vectors.values()))


def _resolved_additions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    what: Sequence[ActivationAddition],
    kind: Literal["steering", "control"],
    layers: Sequence[int] | None,
    location: AdditionLocation,
) -> Resolved:
    """Activation additions together, read at the layers that are wanted, [count, d_model] each."""
    additions = list(what) if isinstance(what, Sequence) and not isinstance(what, str) else []
    if not additions or not all(isinstance(addition, ActivationAddition) for addition in additions):
        raise ValueError(
            f"expected a SteeringVector or ActivationAdditions for {name!r}, got {what!r}"
        )
    parts = sorted({addition.site.part for addition in additions})
    if parts not in (["resid_pre"], ["resid_post"]):
        raise ValueError(
            f"expected additions of {name!r} at resid_pre, or at resid_post, got {', '.join(parts)}"
        )
    wanted = range(len(get_blocks(model)[1])) if layers is None else layers
    rows = [addition.token_ids(tokenizer) for addition in additions]
    read = read_sites(model, rows, [Site(layer, parts[0]) for layer in wanted])
    vectors = {}
    for layer in wanted:
        hidden = [read[tuple(row), Site(layer, parts[0])] for row in rows]
        vectors[layer] = _laid_together(model, additions, hidden, location)
    content = [[addition.coeff, row] for addition, row in zip(additions, rows)]
    return Resolved(name, kind, parts[0], vectors, location, content)


def _laid_together(
    model: PreTrainedModel,
    additions: Sequence[ActivationAddition],
    hidden: Sequence[Tensor],
    location: AdditionLocation,
) -> Tensor:
    """The sum of additions, [longest, d_model]: shorter ones lie in it where they would lie alone.

    `hidden` is what each addition reads, [count, d_model].
    """
    longest = max(map(len, hidden))
    total = torch.zeros(
        longest, hidden[0].shape[-1], dtype=stream_dtype(model), device=input_device(model)
    )
    first, length = torch.zeros(1, 1, dtype=torch.long), torch.tensor([longest])
    for addition, activations in zip(additions, hidden):
        count = len(activations)
        start = -int(TokenSpan(count, location).offsets(first, length))
        total[start : start + count] += addition.coeff * activations
    return total
