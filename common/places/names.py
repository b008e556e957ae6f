"""Translate the name of a place between two blocks from one library to another."""

import re
from typing import NamedTuple

from torch import nn

from common.places.blocks import get_block, get_blocks
from common.places.sites import Site, parse_site


class Place(NamedTuple):
    """The names of one place between two blocks; None where a vocabulary has none.

    Attributes:
        layer: our number, the block whose resid_post it is.
        module: the Hugging Face module that gives it.
        resid_post: TransformerLens, as what a block gives.
        resid_pre: TransformerLens, as what the next block reads.
        hidden_states: its entry with `output_hidden_states=True`.
        nnsight: in a trace; ARENA writes it this way.
        steering_vectors: layer and layer type of that library, and of ours.
        post: what a block reads, in the activation-addition post and its library.
    """

    layer: int | None = None
    module: str | None = None
    resid_post: str | None = None
    resid_pre: str | None = None
    hidden_states: str | None = None
    nnsight: str | None = None
    steering_vectors: str | None = None
    post: str | None = None


def where_is(model: nn.Module, place: int | str | Site) -> Place:
    """Return the names of a place in all vocabularies.

    Args:
        model: a causal language model.
        place: a block, counted from 0, whose resid_post is meant; or a name as in `Place`, in any
            of the vocabularies.

    Raises:
        ValueError: no such layer or name; a place inside a block; `hidden_states[-1]`, which is
            after the final layer norm.
    """
    return _places(model)[_find(model, place)]


def translate(model: nn.Module, name: str | Site, to: str) -> str | int:
    """Return the name of a place in another vocabulary, for example of "hidden_states[6]".

    Args:
        model: a causal language model.
        name: a name as in `Place`, in any of the vocabularies.
        to: the vocabulary, a field of `Place`.

    Raises:
        ValueError: an unknown name or vocabulary, or one without a name for this place: no block
            gives what block 0 reads, and no block reads what the last one gives, nor is that in
            `hidden_states`. A number, which does not say which side of a block it means.
    """
    if to not in Place._fields or isinstance(name, int):
        raise ValueError(
            f"expected a name and one of {', '.join(Place._fields)}; got {name!r} and {to!r}"
        )
    if (translated := getattr(where_is(model, name), to)) is None:
        why = (
            "block 0 reads it and no block gives it"
            if not _find(model, name)
            else (
                "the last block gives it and no block reads it; hidden_states[-1] is after the"
                " final layer norm"
            )
        )
        raise ValueError(f"{name!r} has no name in the vocabulary {to!r}: {why}")
    return translated


def _places(model: nn.Module) -> list[Place]:
    """Return the names of all places: what block 0 reads, …, what the last block gives."""
    path, blocks = get_blocks(model)
    found = []
    for place in range(len(blocks) + 1):
        names = {}
        if place:
            layer = place - 1
            names |= {
                "layer": layer,
                "module": f"{path}.{layer} output",
                "resid_post": str(Site(layer, "resid_post")),
                "nnsight": f"model.{path}[{layer}].output",
                "steering_vectors": f"layer {layer} decoder_block",
            }
        if place < len(blocks):
            names |= {
                "resid_pre": str(Site(place, "resid_pre")),
                "hidden_states": f"hidden_states[{place}]",
                "post": f"layer {place}",
            }
        found.append(Place(**names))
    return found


def _find(model: nn.Module, name: int | str | Site) -> int:
    """Return the index in `_places` of a name, or of our layer."""
    if isinstance(name, int):
        get_block(model, name)
        return name + 1
    places = _places(model)
    text = name if isinstance(name, str) else str(parse_site(name))
    if match := re.fullmatch(r"hidden_states\[(-?\d+)\]", text):
        if (number := int(match[1])) in (-1, len(places) - 1):
            raise ValueError(
                f"{name!r} is after the final layer norm and is not a resid_post; no"
                " hidden_states hold that of the last layer"
            )
        text = f"hidden_states[{number % len(places) if -len(places) <= number < 0 else number}]"
    for number, place in enumerate(places):
        if _plain(text) in [_plain(known) for known in place[1:] if known]:
            return number
    last = len(places) - 2
    raise ValueError(
        f"{name!r} is not a place between two blocks of {type(model).__name__} (0 to {last}):"
        f" expected a name such as {places[last][1:]}"
    )


def _plain(name: str) -> str:
    """Return a name as all spellings of it share it: "h[5].output[0]" is "h.5 output"."""
    name = re.sub(r"\[(\d+)\](?!$)", r".\1", name.replace(" output", ".output"))
    return re.sub(r"\.output\[0\]$", ".output", name)
