"""Steer every row of a batch by a vector of its own, and start a pass after a block.

Both make sweeps fast: each (layer, coefficient, prompt) is a row of one batch, and blocks below the
steered place are not computed again.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from common.passes.batching import first_logits, same_logits, unhooked
from common.passes.hooks import (
    SteeringHook,
    holder_of_blocks,
    hook_input,
    hook_output,
    hook_passes,
    uncompiled,
)
from common.passes.running import input_device, pass_inputs
from common.places.blocks import get_blocks, get_hidden, stream_dtype, with_hidden
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
    """Adds vectors [batch, 1, d_model] to all tokens. Padding gets them too, and nothing looks at it."""

    def __init__(self, vectors: Tensor):
        self.vectors = vectors

    def steer(self, hidden: Tensor) -> Tensor:
        return hidden + of_rows(self.vectors, len(hidden), "the steering").to(hidden)


class _PromptHook(SteeringHook):
    """Steers rows in a pass over prompts."""

    def __init__(self, rows: Sequence[RowSteering], inputs: Mapping[str, Tensor]):
        self.rows, self.inputs = rows, inputs

    def steer(self, hidden: Tensor) -> Tensor:
        return hidden + row_deltas(self.rows, hidden, self.inputs)


@contextmanager
def steering_rows(model: PreTrainedModel, rows: Sequence[RowSteering | None]) -> Iterator[None]:
    """Steer each row of the batches that the model reads while the block is open; None leaves a row as it is.

    Args:
        model: a causal language model; as it was afterwards and after any exception.
        rows: one for each row of the batch.

    Raises:
        ValueError: the model has no such place; in a pass, a prompt shorter than the vectors that
            are added to it.
    """
    dtype, device = stream_dtype(model), input_device(model)
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if row is not None:
            groups[row.site, len(row.vectors), row.location].append(number)
    with ExitStack() as stack:
        for (site, count, location), members in groups.items():
            vectors = torch.zeros(
                len(rows), count, rows[members[0]].vectors.shape[1], dtype=dtype, device=device
            )
            vectors[members] = torch.stack([rows[number].vectors for number in members]).to(vectors)
            module, side = find_site(model, site)
            if location is None:
                hook: SteeringHook = _EverywhereHook(vectors)
            else:
                tracker = PositionTracker(
                    holder_of_blocks(model), TokenSpan(count, location, _marked(len(rows), members))
                )
                stack.callback(hook_passes(model, tracker).remove)
                hook = SpanHook(vectors, tracker)
            stack.callback((hook_input if side == "input" else hook_output)(module, hook).remove)
        yield


def _marked(count: int, members: Sequence[int]) -> Tensor:
    """Which rows are meant, [batch], bool."""
    marked = torch.zeros(count, dtype=torch.bool)
    marked[list(members)] = True
    return marked


class Recorded(NamedTuple):
    """An unsteered pass: what each block gave, by its number, and the logits [batch, pos, vocab]."""

    outputs: Mapping[int, Any]
    logits: Tensor


@torch.no_grad()
def record_blocks(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Sequence[int],
    last_only: bool = False,
    cache: Cache | None = None,
) -> Recorded:
    """Run one pass and keep the outputs of some blocks, and the logits, of the last position only where so asked.

    `cache` is an empty KV cache to fill.
    """
    _, blocks = get_blocks(model)
    outputs: dict[int, Any] = {}
    with ExitStack() as stack:
        for layer in layers:
            handle = blocks[layer].register_forward_hook(
                lambda module, args, output, layer=layer: outputs.update({layer: output})
            )
            stack.callback(handle.remove)
        return Recorded(outputs, _logits(model, inputs, last_only, cache))


@torch.no_grad()
def logits_from(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer: int,
    output: Any,
    hidden: Tensor,
    last_only: bool = False,
    cache: Cache | None = None,
) -> Tensor:
    """Run the blocks after `layer` as if it had given `hidden`, and return the logits.

    The blocks below do nothing meanwhile; the model is as it was afterwards.

    Args:
        model: a causal language model.
        inputs: the batch, [batch, pos]; masks and positions are made from it.
        layer: the block that `hidden` stands for.
        output: what a block gave in another pass, for the form of its output.
        hidden: resid_post of `layer`, [batch, pos, d_model].
        last_only: the logits of the last position only.
        cache: an empty KV cache; the blocks that run fill it.

    Returns:
        [batch, pos, vocab], or [batch, 1, vocab].
    """
    _, blocks = get_blocks(model)

    def instead(module: nn.Module, given: Tensor | None) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return with_hidden(
                output, (args[0] if args else kwargs["hidden_states"]) if given is None else given
            )

        return forward

    with ExitStack() as stack:
        for number, block in enumerate(blocks[: layer + 1]):
            if "forward" in vars(block):  # accelerate puts its own there
                stack.callback(setattr, block, "forward", block.forward)
            else:
                stack.callback(delattr, block, "forward")
            block.forward = instead(block, hidden if number == layer else None)
        return _logits(model, inputs, last_only, cache)


def steered_after(row: RowSteering | None) -> int | None:
    """Return which block gives what is steered in a row: None if nothing is, -1 for the embeddings."""
    return None if row is None else row.site.layer - (row.site.part == "resid_pre")


def row_deltas(rows: Sequence[RowSteering], hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what is added to the hidden states of a pass over prompts, [batch, pos or 1, d_model].

    Args:
        rows: how each row is steered.
        hidden: [batch, pos, d_model]; the positions may be fewer than those of the inputs, from the
            first on.
        inputs: the prompts, [batch, pos], padded on the left.
    """
    if all(row.location is None for row in rows):
        return torch.stack([row.vectors for row in rows]).to(hidden)
    delta = torch.zeros_like(hidden)
    mask = inputs["attention_mask"]
    positions, lengths = (
        (mask.cumsum(-1) - 1)[:, : hidden.shape[1]],
        mask.sum(-1),
    )  # padding lies at -1, in no span
    for number, row in enumerate(rows):
        if row.location is None:
            delta[number] = row.vectors.to(hidden)
            continue
        span, where = (
            TokenSpan(len(row.vectors), row.location),
            (positions[number : number + 1], lengths[number : number + 1]),
        )
        chosen = span.select(*where)[0]
        delta[number, chosen] = row.vectors.to(hidden)[span.offsets(*where)[0][chosen]]
    return delta


@torch.no_grad()
def prefilled_cache(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], rows: Sequence[RowSteering | None]
) -> DynamicCache | None:
    """Return a KV cache with all tokens of the prompts but the last, for rows that are steered each in its own way.

    What lies below the steered place is computed once for each distinct prompt. Generation then
    begins with the last token of the prompt, inside `steering_rows`.

    Args:
        model: a causal language model; as it was afterwards.
        inputs: the prompts, [batch, pos], padded on the left.
        rows: how each row is steered.

    Returns:
        The cache; None where there is nothing to share (prompts of one token, or another kind of
        cache).
    """
    cache, count = DynamicCache(config=model.config), inputs["input_ids"].shape[1] - 1
    kinds = [type(layer) for layer in cache.layers]
    if not count or kinds != [DynamicLayer] * len(get_blocks(model)[1]):
        return None
    both = torch.cat([inputs["input_ids"], inputs["attention_mask"]], dim=1)
    distinct, place = both.unique(dim=0, return_inverse=True)
    prompts = {"input_ids": distinct[:, :count], "attention_mask": distinct[:, count + 1 : -1]}
    groups: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if row is not None:
            groups[steered_after(row)].append(number)
    outputs = record_blocks(
        model, prompts, [layer for layer in groups if layer >= 0], True, cache
    ).outputs
    cache.batch_select_indices(place)
    for behind, members in groups.items():
        chosen = torch.tensor(members, device=place.device)
        part = {name: values[chosen] for name, values in inputs.items()}
        short = {name: values[:, :count] for name, values in part.items()}
        steering, own = [rows[number] for number in members], DynamicCache(config=model.config)
        if behind < 0:
            handle = hook_input(get_blocks(model)[1][0], _PromptHook(steering, part))
            try:
                record_blocks(model, short, [], True, own)
            finally:
                handle.remove()
        else:
            hidden = get_hidden(outputs[behind])[place[chosen]]
            logits_from(
                model,
                short,
                behind,
                outputs[behind],
                hidden + row_deltas(steering, hidden, part),
                True,
                own,
            )
        for layer, found in list(zip(cache.layers, own.layers))[behind + 1 :]:
            layer.keys[chosen], layer.values[chosen] = found.keys, found.values
    return cache


def can_skip_blocks(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether passes may start after a block (`logits_from`): whether that gives what a whole pass gives.

    It does not where blocks hand on more than the residual stream, such as the keys that later
    blocks of Gemma 4 share. It is measured, at the tokens of these prompts.

    Args:
        model: a causal language model; unchanged.
        inputs: some prompts.
    """
    model = unhooked(model)
    count, real = len(get_blocks(model)[1]), inputs["attention_mask"].bool()
    layers = sorted({0, count // 2, max(0, count - 2)})
    outputs, plain = record_blocks(model, inputs, layers)
    for layer in layers:
        try:
            found = logits_from(model, inputs, layer, outputs[layer], get_hidden(outputs[layer]))
        except Exception:  # whatever a block says that misses what the skipped ones leave
            return False
        if not same_logits(found[real], plain[real]):
            return False
    return True


def can_prefill(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether generation may begin with a `prefilled_cache`: whether that gives what plain generation gives.

    It does not where there is more to a cache than keys and values, or where its length counts, as
    in MPT. It is measured on rows "steered" by 0 at several layers.

    Args:
        model: a causal language model; unchanged.
        inputs: some prompts, padded on the left.
    """
    model = unhooked(model)
    count, prompts = len(get_blocks(model)[1]), len(inputs["input_ids"])
    zero = torch.zeros(1, model.config.get_text_config().hidden_size)
    rows = [
        None,
        *(RowSteering(Site(layer, "resid_post"), zero) for layer in sorted({0, max(0, count - 2)})),
    ]
    repeated = {name: values.repeat(len(rows), 1) for name, values in inputs.items()}
    steering = [row for row in rows for _ in range(prompts)]
    try:
        cache = prefilled_cache(model, repeated, steering)
    except Exception:  # see `can_skip_blocks`
        return False
    return cache is not None and same_logits(
        first_logits(model, repeated, past_key_values=cache), first_logits(model, repeated)
    )


def _logits(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    last_only: bool,
    cache: Cache | None = None,
) -> Tensor:
    """The logits of a pass; the head is run on what is asked for."""
    more = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    with uncompiled():  # compiled code does not see what was changed around the blocks
        return model(**pass_inputs(inputs), **more, logits_to_keep=1 if last_only else 0).logits
