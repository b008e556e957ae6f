"""Checks of where steering acts in a pass, what it adds there, and that it does nothing else."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.checking.watching import (
    PROMPTS,
    Logits,
    Pass,
    agree,
    checked_batch,
    fail,
    first_place,
    module_of,
    named,
    read,
    same_logits,
)
from common.passes.running import Steering
from common.places.blocks import check_vector, get_block, get_hidden, with_hidden
from common.places.names import where_is
from common.places.positions import TokenSelection, position_ids
from common.places.sites import Site
from common.texts import generation


class _Row(NamedTuple):
    """How the tokens of a row move in a batch and alone, each [pos], and whether that is the same.

    `silent` says that nothing moves anywhere when the row runs alone.
    """

    together: Tensor
    alone: Tensor
    same: bool
    silent: bool


@torch.no_grad()
def assert_steers_every_row(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    prompts: Sequence[str] = PROMPTS,
    *,
    logits: Logits = generation.logits,
) -> None:
    """Fail if steering treats a row of a left-padded batch differently from its prompt alone.

    It catches `output[0]` on a block that gives the bare tensor (only row 0 moves), positions
    counted from the padding, and, with your own `logits`, a pass without position ids. The prompts
    need two lengths or more; one that is too short for the steering, and does not move alone, must
    not move in the batch.
    """
    batch = checked_batch(model, tokenizer, steering, prompts)
    mask = batch["attention_mask"].bool()
    if len(set(mask.sum(-1).tolist())) < 2:
        raise ValueError(
            "expected prompts of two lengths or more, so that there is padding; got"
            f" {list(prompts)}"
        )
    before, after = read(model, batch, logits), read(model, batch, logits, steering)
    rows = []
    for row, real in enumerate(mask):
        one = {name: batch[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
        alone = read(model, one, logits), read(model, one, logits, steering)
        _assert_runs_alike(before.logits[row, real], alone[0].logits[0], row)
        rows.append(_compared(row, mask, before, after, *alone))
    _assert_rows_alike(rows)


def _assert_runs_alike(together: Tensor, alone: Tensor, row: int) -> None:
    """Fail if a row of an unsteered batch has other logits [pos, vocab] than its prompt alone."""
    if not same_logits(together, alone):
        fail(
            f"without any steering, the logits of row {row} of a padded batch are off by"
            f" {(together - alone).abs().max().item():.1g}",
            "those of the prompt alone",
            "a left-padded pass without position ids: use common.with_position_ids(inputs)",
        )


def _compared(
    row: int, mask: Tensor, before: Pass, after: Pass, alone_before: Pass, alone_after: Pass
) -> _Row:
    """Compare how a row moves in the batch and alone, at the first place that moves."""
    first, real = first_place(alone_before, alone_after), mask[row]
    place = first if first is not None else first_place(before, after, mask) or 0
    together = after.moves(before, place)[row, real]
    alone = alone_after.moves(alone_before, place)[0]
    same = agree(together, alone, alone_before.places[place][0]) and same_logits(
        after.logits[row, real], alone_after.logits[0]
    )
    return _Row(together.any(-1), alone.any(-1), same, first is None)


def _assert_rows_alike(rows: Sequence[_Row]) -> None:
    """Fail if nothing moves, if rows do not move in the batch, or if they move in another way."""
    if all(row.silent for row in rows):
        fail(
            "no prompt is moved anywhere",
            "steering",
            "a hook on a module that does not run, or a vector of 0",
        )
    unmoved = [
        number for number, row in enumerate(rows) if row.alone.any() and not row.together.any()
    ]
    if unmoved:
        fail(
            f"rows {unmoved} of a batch of {len(rows)} do not move, and each prompt alone does",
            "all rows to move",
            "output[0] of a block, which is the first row where the block gives the bare tensor:"
            " use common.get_hidden and common.with_hidden",
        )
    for number, row in enumerate(rows):
        if not row.same:
            tokens, alone = (
                part.nonzero().flatten().tolist() for part in (row.together, row.alone)
            )
            fail(
                f"row {number} of a padded batch is moved at its tokens {tokens}, and alone at"
                f" {alone} or by something else",
                "the same in both",
                "positions counted from the padding, not from the row's first token",
            )


@torch.no_grad()
def assert_adds(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    layer: int,
    vector: Tensor,
    positions: list[int] | slice | None = None,
    prompts: Sequence[str] = PROMPTS,
    *,
    logits: Logits = generation.logits,
) -> None:
    """Fail unless steering adds `vector` [d_model] once at resid_post of `layer` and nothing else.

    It catches steering twice, another sign or scale, a layer that is off by one, rows and positions
    that are left out, another dtype than the model's, and whatever else is steered further up.

    Args:
        model, tokenizer, steering, logits: see `common.checking`.
        layer: the block after which it is added, counted from 0.
        vector: other than 0, of any floating-point dtype.
        positions: the tokens that are meant, as absolute positions, negative ones from the end of
            the prompt; all by default.
        prompts: one or more, run as one batch.
    """
    vector = check_vector(module_of(model), layer, vector)
    if not vector.any():
        raise ValueError("expected a vector other than 0")
    batch = checked_batch(model, tokenizer, steering, prompts)
    mask, place = batch["attention_mask"], layer + 1
    selection = TokenSelection(token_indices=positions)
    meant = selection.select(position_ids(mask), mask.sum(-1)) & mask.bool()
    before, after = read(model, batch, logits), read(model, batch, logits, steering)
    _assert_first_place(before, after, mask.bool(), place)
    moves, hidden = after.moves(before, place), before.places[place]
    _assert_tokens(moves.any(-1), meant, mask)
    _assert_vector(moves[meant], vector.float(), hidden[meant], place)
    addition = vector * meant[..., None]

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        return with_hidden(output, get_hidden(output) + addition)

    handle = get_block(module_of(model), layer).register_forward_hook(add)
    try:
        plain = read(model, batch, logits)
    finally:
        handle.remove()
    _assert_nothing_above(before, after, plain, mask.bool(), place)


def _assert_first_place(before: Pass, after: Pass, real: Tensor, place: int) -> None:
    """Fail unless `place` is the first that moves, in the dtype of the model."""
    found = first_place(before, after, real)
    if found is None:
        fail(
            "nothing is moved",
            f"the vector at {named(place)}",
            "a hook on a module that does not run, or that is gone already",
        )
    if found != place:
        fail(
            f"the first place that moves is {named(found)}",
            named(place),
            "'resid_pre' 6 and the 'layer 6' of the activation-addition post are resid_post of"
            " layer 5 (see common.where_is)",
        )
    given, expected = after.places[place].dtype, before.places[place].dtype
    if given != expected:
        fail(
            f"steered hidden states are {given}",
            str(expected),
            "a vector that was not brought to the model's dtype",
        )


def _assert_tokens(moved: Tensor, meant: Tensor, mask: Tensor) -> None:
    """Fail unless the tokens that move are those that are meant, each [batch, pos]."""
    for row, real in enumerate(mask.bool()):
        found, expected = (part[row, real].nonzero().flatten().tolist() for part in (moved, meant))
        if found != expected:
            fail(
                f"row {row} is moved at its tokens {found}",
                f"{expected}",
                "output[0] of a bare tensor, or positions counted from the padding",
            )


def _assert_vector(moves: Tensor, vector: Tensor, hidden: Tensor, place: int) -> None:
    """Fail unless hidden states [token, d_model] move by the vector."""
    if agree(moves, vector.expand_as(moves), hidden):
        return
    times = (moves @ vector / vector.square().sum()).mean().item()
    cosine = torch.cosine_similarity(moves.mean(0), vector, dim=0).item()
    if abs(cosine) <= 0.99:
        cause = "another vector, or several at this layer"
    elif times < 0:
        cause = "the sign of the difference"
    else:
        cause = "steering that is open twice" if times > 1.5 else "the scale"
    fail(
        f"what is added at {named(place)} is {times:.2g} times the vector (cosine {cosine:.2f})",
        "the vector once",
        cause,
    )


def _assert_nothing_above(before: Pass, after: Pass, plain: Pass, real: Tensor, place: int) -> None:
    """Fail if places above move otherwise than after a plain addition at `place`."""
    for above in range(place + 1, len(before.places)):
        if not agree(
            after.moves(before, above)[real],
            plain.moves(before, above)[real],
            before.places[above][real],
        ):
            fail(
                f"besides the vector at {named(place)}, something acts further up:"
                f" {named(above)} is not that of a plain addition",
                "nothing else",
                "steering at several layers, or a hook that was left behind",
            )


def assert_same_place(model: nn.Module, *names: int | str | Site) -> None:
    """Fail unless all names mean one place; numbers are our layers. It catches an off-by-one."""
    layers = [where_is(model, name).layer for name in names]
    places = [named(0 if layer is None else layer + 1) for layer in layers]
    for name, place in zip(names, places):
        if place != places[0]:
            fail(
                f"{names[0]!r} is {places[0]}, and {name!r} is {place}",
                "one place",
                "what a block reads (resid_pre, hidden_states, the post's 'layer') is counted one"
                " higher than what the block before it gives",
            )
