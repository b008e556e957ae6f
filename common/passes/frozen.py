"""Frozen attention: steered tokens look at others as these are without steering.

Steering at a token reaches later tokens through attention, which reads keys and values of steered
hidden states. Frozen, attention reads the keys and values that the unsteered model has for the same
text, and steering acts at each token by itself, through its own stream and its own queries. What is
left of an effect is its direct part.
"""

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from common.passes.batching import same_logits, unhooked
from common.passes.hooks import (
    forget_compiled,
    holder_of_blocks,
    is_suspended,
    uncounted,
    unsteered,
)
from common.passes.running import in_evaluation_mode, input_device
from common.places.blocks import get_blocks

KeysAndValues = dict[int, Any]  # by layer, what a cache hands to attention


@contextmanager
def frozen_attention(model: nn.Module) -> Iterator[None]:
    """Let attention read the keys and values of the unsteered model while the block is open.

    It goes with every kind of steering, opened before or after it:

        with frozen_attention(model), vector.apply(model):
            model.generate(**inputs)

    Each pass runs twice, first unsteered. A KV cache holds what is unsteered, so that texts are the
    same with and without one. Keys and values have no gradient.

    Args:
        model: a causal language model of transformers; as it was afterwards, also after an error.

    Raises:
        ValueError: attention of this model cannot be frozen: some blocks have none, or blocks share
            keys, keep a state, or do not ask the cache. In a pass: they do not ask it there, under
            gradient checkpointing.
    """
    twin = unhooked(model)
    if twin is model or not _can_be_frozen(twin):
        raise ValueError(
            f"attention of {type(model).__name__} cannot be frozen: expected one whose blocks all"
            " read keys and values of their own from a cache, and which is not offloaded"
        )
    holder, hook = holder_of_blocks(model), _Freezing(holder_of_blocks(twin))
    forget_compiled()
    # Those who count tokens come before it, and see the cache of the caller.
    first = holder.register_forward_pre_hook(hook.begin, with_kwargs=True)
    last = holder.register_forward_hook(hook.finish, prepend=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()


class _OfThisThread(threading.local):
    """What the pass of this thread was given as a cache, and what it got instead."""

    given: Any = None
    instead: Any = None

    def __reduce__(self) -> tuple:
        return _OfThisThread, ()


class _Freezing:
    """Runs each pass unsteered first, and gives the steered one those keys and values."""

    changes_passes = True  # sweeps refuse it

    def __init__(self, twin: nn.Module):
        self.twin, self._own = twin, _OfThisThread()

    @uncounted
    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a pass."""
        if is_suspended():
            self._own.instead = None
            return None
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = {**dict(zip(names, args)), **kwargs}
        cache, config = given.get("past_key_values"), getattr(module, "config", None)
        wanted = given.get("use_cache")
        if wanted is None:
            wanted = getattr(config, "use_cache", True)
        filled = DynamicCache(config=config) if cache is None else cache
        if not isinstance(filled, Cache) or not hasattr(filled, "layers"):
            raise ValueError(
                f"frozen attention fills a cache with layers, got a {type(filled).__name__}"
            )
        before = _as_it_is(filled)
        with torch.no_grad(), unsteered(), in_evaluation_mode(self.twin), _watched(filled) as read:
            self.twin(**{**given, "past_key_values": filled, "use_cache": True})
        self._own.instead = _answering(before, read)
        self._own.given = filled if wanted or cache is not None else None
        return (), {**given, "past_key_values": self._own.instead, "use_cache": True}

    @uncounted
    def finish(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After it: the cache is the caller's again."""
        instead, self._own.instead = self._own.instead, None
        if instead is None:
            return None
        if not instead.asked:
            raise ValueError(
                "attention was not frozen in this pass, which took the cache away from it, as"
                " gradient checkpointing does: expected a model in evaluation mode, or one after"
                " gradient_checkpointing_disable()"
            )
        if isinstance(output, tuple):
            return tuple(self._own.given if part is instead else part for part in output)
        output["past_key_values"] = self._own.given
        return output


def _as_it_is(cache: Any) -> Any:
    """A copy of a cache that shares its tensors; those that count are copied."""
    before = copy.copy(cache)
    before.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in before.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.numel() == 1:
                setattr(layer, name, value.clone())
    return before


@contextmanager
def _watched(cache: Any) -> Iterator[KeysAndValues]:
    """Note what a cache hands to attention while the block is open."""
    read: KeysAndValues = {}
    update = cache.update

    def noting(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        read[layer] = update(keys, values, layer, *args, **kwargs)
        return read[layer]

    cache.update = noting
    try:
        yield read
    finally:
        del cache.update


def _answering(before: Any, read: KeysAndValues) -> Any:
    """A cache that takes nothing in, and hands out what was read."""
    before.asked = False

    def answer(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        before.asked = True
        return read[layer]

    before.update = answer
    return before


@torch.no_grad()
def _can_be_frozen(twin: Any) -> bool:
    """Whether a pass that reads the keys and values of another one is that pass."""
    ids = torch.tensor([[1, 2, 3, 1]], device=input_device(twin))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    holder: Any = holder_of_blocks(twin)
    with unsteered(), in_evaluation_mode(twin):
        try:
            expected = twin(**inputs).logits
            cache: Any = DynamicCache(config=holder.config)
            before = _as_it_is(cache)
            with _watched(cache) as read:
                twin(**inputs, past_key_values=cache, use_cache=True)
            same = twin(**inputs, past_key_values=_answering(before, read), use_cache=True).logits
            none = {
                layer: tuple(torch.zeros_like(part) for part in both)
                for layer, both in read.items()
            }
            other = twin(**inputs, past_key_values=_answering(before, none), use_cache=True).logits
        except Exception:  # whatever a model says that has another kind of memory
            return False
    whole = len(read) == len(get_blocks(twin)[1])
    return whole and same_logits(same, expected) and not same_logits(other, expected)
