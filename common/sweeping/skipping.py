"""Passes that start after a block: what lies below the steered place is not computed again."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from common.passes.batching import first_logits, same_logits, unhooked
from common.passes.hooks import SteeringHook, hook_input, prompts_of, uncompiled
from common.passes.recording import Location, recording
from common.passes.running import pass_inputs
from common.places.blocks import get_blocks, get_hidden, with_hidden
from common.places.sites import Site
from common.sweeping.rows import (
    RowSteering,
    at_once,
    later,
    row_deltas,
    steered_after,
    steering_rows,
)


class Recorded(NamedTuple):
    """An unsteered pass: what blocks gave, by their numbers, and the logits [batch, pos, vocab]."""

    outputs: Mapping[int, Any]
    logits: Tensor


@torch.no_grad()
def record_blocks(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Sequence[int],
    keep: int = 0,
    cache: Cache | None = None,
) -> Recorded:
    """Run one pass, and keep the logits and what some blocks gave.

    Args:
        model: a causal language model; unchanged.
        inputs: the batch, [batch, pos].
        layers: the blocks.
        keep: the logits of so many last positions; 0 keeps all.
        cache: an empty KV cache to fill.
    """
    blocks, outputs = get_blocks(model)[1], {}
    places: dict[int, Location] = {layer: (blocks[layer], "output") for layer in layers}
    with recording(places, outputs.__setitem__):
        return Recorded(outputs, _logits(model, inputs, keep, cache))


@torch.no_grad()
def logits_from(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layer: int,
    output: Any,
    hidden: Tensor,
    keep: int = 0,
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
        keep: the logits of so many last positions; 0 keeps all.
        cache: an empty KV cache; the blocks that run fill it.

    Returns:
        [batch, pos, vocab], or [batch, keep, vocab].
    """

    def instead(given: Tensor | None) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            reads = args[0] if args else kwargs["hidden_states"]
            return with_hidden(output, reads if given is None else given)

        return forward

    with ExitStack() as stack:
        for number, block in enumerate(get_blocks(model)[1][: layer + 1]):
            forward = instead(hidden if number == layer else None)
            stack.enter_context(_replaced_forward(block, forward))
        return _logits(model, inputs, keep, cache)


@contextmanager
def _replaced_forward(block: nn.Module, forward: Any) -> Iterator[None]:
    own = vars(block).get("forward")  # accelerate puts its own there
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _logits(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], keep: int, cache: Cache | None
) -> Tensor:
    """The logits of a pass; the head is run on what is asked for."""
    more = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    with uncompiled():  # compiled code does not see what was changed around the blocks
        return model(**pass_inputs(inputs), **more, logits_to_keep=keep).logits


@torch.no_grad()
def prefilled_cache(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], rows: Sequence[RowSteering | None]
) -> DynamicCache | None:
    """Return a KV cache that holds all tokens of the prompts but the last, each row steered.

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
        if (after := steered_after(row)) is not None:
            groups[after].append(number)
    wanted = [after for after in groups if after >= 0]
    outputs = record_blocks(model, prompts, wanted, 1, cache).outputs
    cache.batch_select_indices(place)
    for after, members in groups.items():
        chosen = torch.tensor(members, device=place.device)
        part = {name: values[chosen] for name, values in inputs.items()}
        steering, output = [rows[number] for number in members], outputs.get(after)
        hidden = None if output is None else get_hidden(output)[place[chosen]]
        own = _steered_cache(model, part, steering, after, output, hidden)
        for layer, steered in zip(_layers(cache, after + 1), _layers(own, after + 1)):
            layer.keys[chosen], layer.values[chosen] = steered.keys, steered.values
    return cache


def _steered_cache(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    rows: Sequence[RowSteering | None],
    after: int,
    output: Any,
    hidden: Tensor | None,
) -> DynamicCache:
    """The cache of prompts without their last tokens, filled above the steered place.

    `output` and `hidden` are what block `after` gave; None where what block 0 reads is steered.
    """
    short = {name: values[:, :-1] for name, values in inputs.items()}
    cache = DynamicCache(config=model.config)
    if hidden is not None:
        steered = hidden + row_deltas(at_once(rows), hidden, inputs)
        with prompts_of(model, inputs["attention_mask"]), steering_rows(model, later(rows)):
            logits_from(model, short, after, output, steered, 1, cache)
        return cache
    handle = hook_input(get_blocks(model)[1][0], _PromptHook(at_once(rows), inputs))
    try:
        with prompts_of(model, inputs["attention_mask"]), steering_rows(model, later(rows)):
            record_blocks(model, short, [], 1, cache)
    finally:
        handle.remove()
    return cache


class _PromptHook(SteeringHook):
    """Steers rows in a pass over prompts."""

    def __init__(self, rows: Sequence[RowSteering | None], inputs: Mapping[str, Tensor]):
        self.rows, self.inputs = rows, inputs

    def steer(self, hidden: Tensor) -> Tensor:
        return hidden + row_deltas(self.rows, hidden, self.inputs)


def _layers(cache: Cache, first: int) -> list[Any]:
    """The layers from `first` on; their types do not say that they have keys and values."""
    return cache.layers[first:]


def can_skip_blocks(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether a pass that starts after a block (`logits_from`) gives what a whole one gives.

    It does not where blocks hand on more than the residual stream, such as the keys that later
    blocks of Gemma 4 share. It is measured, at the tokens of these prompts.

    Args:
        model: a causal language model; unchanged.
        inputs: some prompts.
    """
    twin: Any = unhooked(model)
    count, real = len(get_blocks(twin)[1]), inputs["attention_mask"].bool()
    layers = sorted({0, count // 2, max(0, count - 2)})
    outputs, plain = record_blocks(twin, inputs, layers)
    for layer in layers:
        try:
            found = logits_from(twin, inputs, layer, outputs[layer], get_hidden(outputs[layer]))
        except Exception:  # whatever a block says that misses what the skipped ones leave
            return False
        if not same_logits(found[real], plain[real]):
            return False
    return True


def can_prefill(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether generation from a `prefilled_cache` gives what plain generation gives.

    It does not where there is more to a cache than keys and values, or where its length counts, as
    in MPT. It is measured on rows "steered" by 0 at several layers.

    Args:
        model: a causal language model; unchanged.
        inputs: some prompts, padded on the left.
    """
    twin: Any = unhooked(model)
    count, prompts = len(get_blocks(twin)[1]), len(inputs["input_ids"])
    zero = torch.zeros(1, twin.config.get_text_config().hidden_size)
    edges = [Site(layer, "resid_post") for layer in sorted({0, max(0, count - 2)})]
    rows = [None, *(RowSteering(site, zero) for site in edges)]
    repeated = {name: values.repeat(len(rows), 1) for name, values in inputs.items()}
    steering = [row for row in rows for _ in range(prompts)]
    try:
        cache = prefilled_cache(twin, repeated, steering)
    except Exception:  # see `can_skip_blocks`
        return False
    return cache is not None and same_logits(
        first_logits(twin, repeated, past_key_values=cache), first_logits(twin, repeated)
    )
