"""One place between two blocks, as each library names it, and what it is called in another one."""

import re
from typing import NamedTuple

from torch import nn

from common.places.blocks import get_block, get_blocks
from common.places.sites import Site, parse_site

# --- the same place in several vocabularies ---


class Place(NamedTuple):
    """One place between two blocks, as the libraries name it; None where a vocabulary has no name for it."""

    layer: int | None  # our number: the block whose resid_post it is
    module: str | None  # the module of Hugging Face that gives it
    resid_post: str | None  # TransformerLens, as what a block gives
    resid_pre: str | None  # TransformerLens, as what the next block gets
    hidden_states: str | None  # with output_hidden_states=True
    nnsight: str | None  # in a trace; ARENA writes it this way
    steering_vectors: str | None  # layer and layer type of that library, and of ours
    post: str | None  # the activation-addition post and its library: what a block gets


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
    """Return what another vocabulary, a field of `Place`, calls a place; for example "hidden_states[6]" to "layer".

    Raises:
        ValueError: an unknown name or vocabulary, or one without a name for this place: no block
            gives what block 0 reads, and what the last block gives is read by none, nor is it in
            `hidden_states`. A number, which says no side of a block.
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
    """The names of all places: what block 0 reads, what the next ones read, what the last one gives."""
    path, blocks = get_blocks(model)
    found = []
    for place in range(len(blocks) + 1):
        last = place - 1
        given = (
            (last, f"{path}.{last} output", str(Site(last, "resid_post"))) if place else (None,) * 3
        )
        read = (
            (str(Site(place, "resid_pre")), f"hidden_states[{place}]")
            if place < len(blocks)
            else (None,) * 2
        )
        traced = (
            (f"model.{path}[{last}].output", f"layer {last} decoder_block")
            if place
            else (None,) * 2
        )
        found.append(
            Place(*given, *read, *traced, f"layer {place}" if place < len(blocks) else None)
        )
    return found


def _find(model: nn.Module, name: int | str | Site) -> int:
    """A name, or our layer, as the number of the block that reads there; as many as there are blocks is after the last one."""
    if isinstance(name, int):
        get_block(model, name)
        return name + 1
    places = _places(model)
    text = name if isinstance(name, str) else str(parse_site(name))
    if match := re.fullmatch(r"hidden_states\[(-?\d+)\]", text):
        if (number := int(match[1])) in (-1, len(places) - 1):
            raise ValueError(
                f"{name!r} is after the final layer norm and no resid_post; that of the last layer"
                " is in no hidden_states"
            )
        text = f"hidden_states[{number % len(places) if -len(places) <= number < 0 else number}]"
    for number, place in enumerate(places):
        if _plain(text) in [_plain(known) for known in place[1:] if known]:
            return number
    last = len(places) - 2
    raise ValueError(
        f"{name!r} is no place between two blocks of {type(model).__name__} (0 to {last}): expected"
        f" a name such as {places[last][1:]}"
    )


def _plain(name: str) -> str:
    """A name without the differences of writing: "h[5].output[0]", "h.5 output"."""
    return re.sub(
        r"\.output\[0\]$",
        ".output",
        re.sub(r"\[(\d+)\](?!$)", r".\1", name.replace(" output", ".output")),
    )
