"""Checks of what steering does to the tokens that are generated, with a KV cache and without."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from common.checking.watching import (
    PROMPTS,
    Logits,
    Pass,
    agree,
    checked_batch,
    fail,
    first_place,
    read,
    rounding,
    watched,
)
from common.passes.running import Steering
from common.texts import generation


def assert_steers_generated_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    prompts: Sequence[str] = PROMPTS[:1],
    new_tokens: int = 5,
    *,
    logits: Logits = generation.logits,
    generate: Callable = generation.generate,
) -> None:
    """Fail unless generated tokens are steered too, with a KV cache as without one.

    It catches a mask over the length of the pass: with a cache each new token is a pass of length
    1. Greedy; the last of the new tokens is never read and does not count. ValueError also if the
    text ends at once.
    """
    cached, uncached = _generated(model, tokenizer, steering, prompts, new_tokens, logits, generate)
    for way, found in (("with", cached), ("without", uncached)):
        if not found.new.all():
            cause = (
                "steering meant for the prompt only (then: assert_leaves_generated_tokens), or"
                " applied to the first pass only"
            )
            if uncached.new.all():
                cause = (
                    "a mask over the length of the pass, which with a cache is 1 at each new token:"
                    " count absolute positions"
                )
            fail(f"{way} a KV cache {found.counted()}", "all of them", cause)
    _assert_same(cached, uncached)


def assert_leaves_generated_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    prompts: Sequence[str] = PROMPTS[:1],
    new_tokens: int = 5,
    *,
    logits: Logits = generation.logits,
    generate: Callable = generation.generate,
) -> None:
    """Fail unless steering keeps to the prompt, with a KV cache as without one.

    Activation additions do, for example. It catches "the first token" or "the last token" of a
    pass, which with a cache is every new token. Steering inside a block, before its attention,
    moves later tokens through the attention, and fails here.
    """
    cached, uncached = _generated(model, tokenizer, steering, prompts, new_tokens, logits, generate)
    for way, found in (("with", cached), ("without", uncached)):
        if found.new.any():
            fail(
                f"{way} a KV cache {found.counted()}",
                "only the prompt",
                "positions counted within the pass: with a cache the first and the last token of a"
                " pass are the new one",
            )
    _assert_same(cached, uncached)


class _Generated(NamedTuple):
    """A steered text.

    Attributes:
        ids: [batch, pos].
        moves: how each token was moved where steering acts, [batch, pos - 1, d_model].
        hidden: the unsteered hidden states there.
        new: which of the new tokens moved, [batch, new - 1].
    """

    ids: Tensor
    moves: Tensor
    hidden: Tensor
    new: Tensor

    def counted(self) -> str:
        """Say how many of the new tokens moved."""
        return f"{int(self.new.sum())} of {self.new.numel()} generated tokens are steered"


@torch.no_grad()
def _generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    prompts: Sequence[str],
    new_tokens: int,
    logits: Logits,
    generate: Callable,
) -> list[_Generated]:
    """Generate steered, with and without a KV cache, and read the same texts unsteered."""
    batch = checked_batch(model, tokenizer, steering, prompts)
    length, real = batch["input_ids"].shape[1], batch["attention_mask"].bool()
    plain, steered = read(model, batch, logits), read(model, batch, logits, steering)
    place, texts = first_place(plain, steered, real), []
    for use_cache in (True, False):
        ids, places = _steered_text(model, batch, steering, new_tokens, use_cache, generate)
        if ids.shape[1] < length + 2:
            raise ValueError(
                f"the text ended at once after {list(prompts)}: expected prompts that the model"
                " continues"
            )
        mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, length:-1])], dim=1)
        before = read(model, {"input_ids": ids[:, :-1], "attention_mask": mask}, logits)
        after = Pass(places, before.logits)
        new = [_moved(before, after, number)[:, length:] for number in range(len(places))]
        if place is None:  # the prompt is not steered; perhaps what follows is
            place = next((number for number, moved in enumerate(new) if moved.any()), None)
        if place is None:
            fail(
                "neither prompt nor generated tokens are moved",
                "steering",
                "a hook on a module that does not run, or a vector of 0",
            )
        moves = after.moves(before, place) * mask[..., None]
        texts.append(_Generated(ids, moves, before.places[place], new[place]))
    return texts


def _steered_text(
    model: Any,
    batch: BatchEncoding,
    steering: Steering,
    new_tokens: int,
    use_cache: bool,
    generate: Callable,
) -> tuple[Tensor, list[Tensor]]:
    """Generate steered; return the ids [batch, pos] and all places, without the last token."""
    with steering(), watched(model) as seen:
        try:
            ids = generate(model, batch, max_new_tokens=new_tokens, use_cache=use_cache)
        except Exception as error:
            raise AssertionError(
                f"steered generation, use_cache={use_cache}, fails with {error!r}. Usual cause:"
                " token indices of the prompt, applied to a pass of length 1, as each new token is"
                " with a cache."
            ) from error
    # With a cache all passes together are the text; without one the last pass is.
    return ids, [
        passes[-1] if passes[-1].shape[1] == ids.shape[1] - 1 else torch.cat(passes, dim=1)
        for passes in seen
    ]


def _moved(before: Pass, after: Pass, place: int) -> Tensor:
    """Whether each token moves by more than rounding at a place, [batch, pos]; nan moves, too."""
    hidden = before.places[place]
    noise = rounding(hidden) * hidden.float().norm(dim=-1)
    return ~(after.moves(before, place).norm(dim=-1) <= noise)


def _assert_same(cached: _Generated, uncached: _Generated) -> None:
    """Fail if a cache changes how tokens are moved, as far as both texts are the same."""
    size = min(cached.ids.shape[1], uncached.ids.shape[1]) - 1
    same = (cached.ids[:, :size] == uncached.ids[:, :size]).long().cumprod(-1).bool()
    moves, others, hidden = (
        part[:, :size][same] for part in (cached.moves, uncached.moves, uncached.hidden)
    )
    if not agree(moves, others, hidden):
        fail(
            "tokens are moved otherwise with a KV cache than without",
            "the same",
            "what is added depends on the length of the pass",
        )
