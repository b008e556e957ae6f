"""What a request asks for: which vector, how strong, where.

A request brings plain values in `SamplingParams.extra_args`, over HTTP in `vllm_xargs`: a name, not
a tensor. The front end checks them against what the engine was started with, and hands on a
`Steering` of plain values under one key, which scheduler and workers read.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from common.arguments import finite_number, integer, layer_list

NAME, COEFF = "steering", "steering_coeff"
LAYERS, MIN_TOKEN_INDEX = "steering_layers", "steering_min_token_index"
ARGUMENTS = (NAME, COEFF, LAYERS, MIN_TOKEN_INDEX)
CHECKED = "steering_checked"
SALT = "steering-"  # the prefix of our salts


def is_ours(key: object) -> bool:
    """Say whether a key of what a request brings is about steering; some keys are not strings."""
    return isinstance(key, str) and key.startswith(NAME)


def steering_args(
    name: str,
    coeff: float = 1.0,
    layers: Iterable[int] | None = None,
    min_token_index: int | None = None,
) -> dict[str, Any]:
    """Return what a request to vLLM carries to be steered; the engine checks it.

    Give it as `SamplingParams(extra_args=…)`, or to an OpenAI client as
    `extra_body={"vllm_xargs": …}`.

    Args:
        name: the name of a vector or an addition that the engine was started with.
        coeff: multiplies it.
        layers: only these of its layers; all by default.
        min_token_index: steer this token and all later ones, all by default; negative numbers count
            from the end of the prompt. Not for additions, which have their place.
    """
    args: dict[str, Any] = {NAME: name, COEFF: coeff}
    if layers is not None:
        args[LAYERS] = list(layers)
    if min_token_index is not None:
        args[MIN_TOKEN_INDEX] = min_token_index
    return args


@dataclass(frozen=True)
class Steering:
    """What is added to one request, checked: plain values that travel between processes.

    Attributes:
        name: the vector or the addition.
        coeff: the coefficient.
        layers: the layers after which it is added.
        start: the first position that is steered.
        end: the position after the last one; None where all that follow are.
    """

    name: str
    coeff: float
    layers: tuple[int, ...]
    start: int = 0
    end: int | None = None

    def selected(self, position: int, length: int) -> range:
        """Return which of the positions from `position` to `position + length` are steered."""
        stop = position + length
        if self.end is not None:
            stop = min(stop, self.end)
        start = max(position, self.start)
        return range(start, max(start, stop))

    def count(self, position: int, length: int) -> int:
        """Return how many tokens x layers of these positions are to be steered."""
        return len(self.selected(position, length)) * len(self.layers)

    def to_wire(self) -> dict[str, Any]:
        """Return it as values that JSON and msgpack have."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "Steering":
        """Read what `to_wire` gave."""
        return cls(**{**wire, "layers": tuple(wire["layers"])})

    def salt(self, digest: str, given: str | None = None) -> str:
        """Return the salt of the prefix cache: two requests share keys and values if it is equal.

        Args:
            digest: that of the vector's numbers.
            given: the salt that the request brings.
        """
        what = json.dumps([self.to_wire(), digest, given], sort_keys=True)
        return f"{SALT}{hashlib.sha256(what.encode()).hexdigest()}"


@dataclass(frozen=True)
class Offer:
    """What is known of a vector or an addition without its numbers.

    Attributes:
        layers: the layers that it has.
        tokens: how many tokens an addition has; None for a vector, which has no end.
        largest: the largest of its numbers, without sign.
        digest: a hash of the numbers.
    """

    layers: tuple[int, ...]
    tokens: int | None
    largest: float
    digest: str


@dataclass(frozen=True)
class Menu:
    """What requests may ask for.

    Attributes:
        offers: by name.
        max_coeff: the largest coefficient, without sign.
        largest: the largest number of the dtype in which the model runs.
    """

    offers: Mapping[str, Offer]
    max_coeff: float
    largest: float

    def read(self, extra_args: Mapping[str, Any] | None, prompt_length: int) -> Steering | None:
        """Return what a request asks for, or None if it asks for no steering.

        Args:
            extra_args: what the request brings; keys that do not begin with "steering" belong to
                others.
            prompt_length: how many tokens its prompt has.

        Raises:
            ValueError: an unknown argument, an unknown name, no name; no coefficient, or one that
                is not finite or too large; a layer that the vector does not have; a position that
                is no integer, or one for an addition; a prompt shorter than an addition.
        """
        asked = {key: value for key, value in (extra_args or {}).items() if is_ours(key)}
        if not asked:
            return None
        if unknown := sorted(set(asked) - set(ARGUMENTS)):
            raise ValueError(
                f"unknown argument {unknown[0]!r}: expected some of {', '.join(ARGUMENTS)}"
            )
        if not self.offers:
            raise ValueError("this engine was started without steering vectors")
        name = asked.get(NAME)
        if not isinstance(name, str) or name not in self.offers:
            raise ValueError(
                f"unknown steering vector {name!r}: expected {NAME!r} to be one of"
                f" {', '.join(sorted(self.offers))}"
            )
        offer = self.offers[name]
        return Steering(
            name,
            self._coeff(name, offer, asked),
            _layers(name, offer, asked.get(LAYERS)),
            *_span(name, offer, asked.get(MIN_TOKEN_INDEX), prompt_length),
        )

    def _coeff(self, name: str, offer: Offer, asked: Mapping[str, Any]) -> float:
        if COEFF not in asked:  # under another name it would be passed over, and be 1 instead
            raise ValueError(
                f"expected {COEFF} beside {NAME!r}: the number that multiplies {name!r}"
            )
        coeff = finite_number(asked[COEFF], COEFF)
        if abs(coeff) > self.max_coeff:
            raise ValueError(
                f"expected {COEFF} between {-self.max_coeff:g} and {self.max_coeff:g}, the limit of"
                f" this engine, got {coeff:g}"
            )
        if abs(coeff) * offer.largest > self.largest:
            raise ValueError(
                f"{COEFF} {coeff:g} times {name!r} lies outside the numbers of the model, which end"
                f" at {self.largest:.3g}"
            )
        return coeff


def _layers(name: str, offer: Offer, given: Any) -> tuple[int, ...]:
    """Return the layers that a request steers."""
    if given is None:
        return offer.layers
    layers = [integer(layer, f"layer in {LAYERS}") for layer in layer_list(given)]
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"expected different layers as {LAYERS}, got {layers}")
    if missing := [layer for layer in layers if layer not in offer.layers]:
        raise ValueError(
            f"{name!r} has no vector for layer {missing[0]}: it has {list(offer.layers)}"
        )
    return tuple(sorted(layers))


def _span(name: str, offer: Offer, given: Any, prompt_length: int) -> tuple[int, int | None]:
    """Return the first steered position and the one after the last."""
    if offer.tokens is None:
        first = 0 if given is None else integer(given, MIN_TOKEN_INDEX, least=None)
        return (first if first >= 0 else max(0, prompt_length + first)), None
    if given is not None:
        raise ValueError(
            f"{name!r} is added to the front of the prompt: it takes no {MIN_TOKEN_INDEX}"
        )
    if prompt_length < offer.tokens:
        raise ValueError(
            f"the prompt has {prompt_length} tokens, and {name!r} is added to its first"
            f" {offer.tokens}"
        )
    return 0, offer.tokens
