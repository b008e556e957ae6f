"""Steer every row of a batch by a vector of its own: each (layer, coefficient, prompt) is a row."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.passes.hooks import SteeringHook, holder_of_blocks, hook_input, hook_output, hook_passes
from common.passes.running import input_device
from common.places.blocks import stream_dtype
from common.places.positions import PositionTracker, TokenSpan, of_rows
from common.places.sites import Site, find_site
from common.vectors.activation_additions import SpanHook


class RowSteering(NamedTuple):
    """What is added to one row: `vectors` [count, d_model] at `site`.

    `location` says to which tokens of the prompt ("front", "mid" or "back"); None adds the only
    vector to all tokens, those that are generated included.
    """

    site: Site
    vectors: Tensor
    location: Literal["front", "mid", "back"] | None = None


class _EverywhereHook(SteeringHook):
    """Adds vectors [batch, 1, d_model] to all tokens, and to padding, which nothing looks at."""

    def __init__(self, vectors: Tensor):
        self.vectors = vectors

    def steer(self, hidden: Tensor) -> Tensor:
        return hidden + of_rows(self.vectors, len(hidden), "the steering").to(hidden)


@contextmanager
def steering_rows(model: PreTrainedModel, rows: Sequence[RowSteering | None]) -> Iterator[None]:
    """Steer each row of the batches that the model reads while the block is open.

    Args:
        model: a causal language model; as it was afterwards and after any exception.
        rows: one for each row of the batch; None leaves it as it is.

    Raises:
        ValueError: the model has no such place; in a pass, a prompt shorter than the vectors that
            are added to it.
    """
    groups: dict[tuple, dict[int, Tensor]] = defaultdict(dict)
    for number, row in enumerate(rows):
        if row is not None:
            groups[row.site, row.location, row.vectors.shape][number] = row.vectors
    with ExitStack() as stack:
        for (site, location, shape), members in groups.items():
            numbers = list(members)
            vectors = torch.zeros(
                len(rows), *shape, dtype=stream_dtype(model), device=input_device(model)
            )
            vectors[numbers] = torch.stack(list(members.values())).to(vectors)
            module, side = find_site(model, site)
            if location is None:
                hook: SteeringHook = _EverywhereHook(vectors)
            else:
                meant = torch.zeros(len(rows), dtype=torch.bool)
                meant[numbers] = True
                span = TokenSpan(shape[0], location, meant)
                tracker = PositionTracker(holder_of_blocks(model), span)
                stack.callback(hook_passes(model, tracker).remove)
                hook = SpanHook(vectors, tracker)
            stack.callback((hook_input if side == "input" else hook_output)(module, hook).remove)
        yield


def steered_after(row: RowSteering | None) -> int | None:
    """Return the block after which a row is steered: None if nowhere, -1 for the embeddings."""
    return None if row is None else row.site.layer - (row.site.part == "resid_pre")


def row_deltas(
    rows: Sequence[RowSteering | None], hidden: Tensor, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Return what is added to hidden states in a pass over prompts, [batch, pos or 1, d_model].

    Args:
        rows: how each row is steered.
        hidden: [batch, pos, d_model]; the positions may be fewer than those of the inputs, from the
            first on.
        inputs: the prompts, [batch, pos], padded on the left.
    """
    everywhere = [row.vectors for row in rows if row is not None and row.location is None]
    if len(everywhere) == len(rows):
        return torch.stack(everywhere).to(hidden)
    delta, mask = torch.zeros_like(hidden), inputs["attention_mask"]
    # Padding lies at position -1, in no span.
    positions, lengths = (mask.cumsum(-1) - 1)[:, : hidden.shape[1]], mask.sum(-1)
    for number, row in enumerate(rows):
        if row is None:
            continue
        vectors = row.vectors.to(hidden)
        if row.location is None:
            delta[number] = vectors
            continue
        span = TokenSpan(len(vectors), row.location)
        where = positions[number : number + 1], lengths[number : number + 1]
        chosen = span.select(*where)[0]
        delta[number, chosen] = vectors[span.offsets(*where)[0][chosen]]
    return delta
