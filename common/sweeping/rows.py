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
from common.places.positions import PositionTracker, TokenSelection, TokenSpan, of_rows
from common.places.sites import Site, find_site
from common.vectors.activation_additions import SpanHook
from common.vectors.operators import PatchDeltaOperator


class RowSteering(NamedTuple):
    """What is added to one row: `vectors` [count, d_model] at `site`.

    `location` says to which tokens of the prompt ("front", "mid" or "back"); None adds the only
    vector to all tokens, those that are generated included. For this one, `operator` may say what
    is added instead, and `first` from which token on (negative: counted from the prompt's end).
    `more` steers the same row at later layers.
    """

    site: Site
    vectors: Tensor
    location: Literal["front", "mid", "back"] | None = None
    operator: PatchDeltaOperator | None = None
    first: int | None = None
    more: tuple["RowSteering", ...] = ()

    @property
    def in_stream(self) -> bool:
        """Whether it acts between blocks, and not on a part of one."""
        return self.site.part in ("resid_pre", "resid_post")


class _EverywhereHook(SteeringHook):
    """Adds vectors [batch, 1, d_model] to all tokens, and to padding, which nothing looks at.

    With an operator, or a tracker that selects tokens, rows that are not meant stay as they are.

    Args:
        vectors: one for each row, 0 where none is meant.
        meant: which rows are meant, [batch, 1, 1], bool.
        operator: what is added instead of the vectors.
        tracker: follows the passes where not all tokens are steered.
    """

    def __init__(
        self,
        vectors: Tensor,
        meant: Tensor,
        operator: PatchDeltaOperator | None = None,
        tracker: PositionTracker | None = None,
    ):
        self.vectors, self.meant = vectors, meant
        self.operator, self.tracker = operator, tracker

    def steer(self, hidden: Tensor) -> Tensor:
        vectors = of_rows(self.vectors, len(hidden), "the steering").to(hidden)
        if self.operator is None and self.tracker is None:
            return hidden + vectors
        mask = of_rows(self.meant, len(hidden), "the steering").to(hidden.device)
        if self.tracker is not None and self.tracker.mask is not None:
            mask = mask & self.tracker.mask.to(hidden.device)
        delta = vectors if self.operator is None else self.operator(hidden, vectors).to(hidden)
        return torch.where(mask, hidden + delta, hidden)


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
    for number, first_of_row in enumerate(rows):
        for row in () if first_of_row is None else (first_of_row, *first_of_row.more):
            key = row.site, row.location, row.vectors.shape, row.operator, row.first
            groups[key][number] = row.vectors
    with ExitStack() as stack:
        for (site, location, shape, operator, first), members in groups.items():
            numbers = list(members)
            vectors = torch.zeros(
                len(rows), *shape, dtype=stream_dtype(model), device=input_device(model)
            )
            vectors[numbers] = torch.stack(list(members.values())).to(vectors)
            module, side = find_site(model, site)
            meant, tracker = torch.zeros(len(rows), dtype=torch.bool), None
            meant[numbers] = True
            if location is not None or first is not None:
                which = (
                    TokenSelection(first)
                    if location is None
                    else TokenSpan(shape[0], location, meant)
                )
                tracker = PositionTracker(holder_of_blocks(model), which)
                stack.callback(hook_passes(model, tracker).remove)
            if location is None or tracker is None:
                hook: SteeringHook = _EverywhereHook(
                    vectors, meant[:, None, None], operator, tracker
                )
            else:
                hook = SpanHook(vectors, tracker)
            stack.callback((hook_input if side == "input" else hook_output)(module, hook).remove)
        yield


def steered_after(row: RowSteering | None) -> int | None:
    """Return the last block that steering leaves alone or acts after.

    None where a row is not steered, -1 for the embeddings.
    """
    return None if row is None else row.site.layer - (row.site.part != "resid_post")


def in_one_row(steps: Sequence[RowSteering]) -> RowSteering | None:
    """Return what steers one row at several layers, the lowest first; None for nothing."""
    return steps[0]._replace(more=tuple(steps[1:])) if steps else None


def at_once(rows: Sequence[RowSteering | None]) -> list[RowSteering | None]:
    """Return what is done to the stream after `steered_after`; None where that is nothing."""
    return [row._replace(more=()) if row is not None and row.in_stream else None for row in rows]


def later(rows: Sequence[RowSteering | None]) -> list[RowSteering | None]:
    """Return what is done beyond `at_once`: inside blocks, and after later ones."""
    return [row if row is None or not row.in_stream else in_one_row(row.more) for row in rows]


def row_deltas(
    rows: Sequence[RowSteering | None], hidden: Tensor, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Return what is added to hidden states in a pass over prompts, [batch, pos or 1, d_model].

    Args:
        rows: how each row is steered there; `more` is not looked at.
        hidden: [batch, pos, d_model]; the positions may be fewer than those of the inputs, from the
            first on.
        inputs: the prompts, [batch, pos], padded on the left.
    """
    simple = [row.vectors for row in rows if row is not None and row[2:5] == (None,) * 3]
    if len(simple) == len(rows):
        return torch.stack(simple).to(hidden)
    delta, mask = torch.zeros_like(hidden), inputs["attention_mask"]
    # Padding lies at position -1, in no span.
    positions, lengths = (mask.cumsum(-1) - 1)[:, : hidden.shape[1]], mask.sum(-1)
    for number, row in enumerate(rows):
        if row is None:
            continue
        vectors, one = row.vectors.to(hidden), slice(number, number + 1)
        where = positions[one], lengths[one]
        if row.location is not None:
            span = TokenSpan(len(vectors), row.location)
            chosen = span.select(*where)[0]
            delta[number, chosen] = vectors[span.offsets(*where)[0][chosen]]
            continue
        chosen = TokenSelection(row.first).select(*where)[0]
        if row.operator is None:
            delta[number, chosen] = vectors
        else:
            delta[number, chosen] = row.operator(hidden[one], vectors[None])[0, chosen].to(hidden)
    return delta
