"""Watch passes: what blocks read and give, and whether two passes differ by more than rounding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from common.passes.padding import encode
from common.passes.recording import Location, recording
from common.passes.running import Steering, input_device
from common.places.blocks import get_blocks, get_hidden

PROMPTS = ("I think that dogs are", "The garden", "My old neighbour went to the house and said")
Logits = Callable[[Any, Mapping[str, Tensor]], Tensor]


class Pass(NamedTuple):
    """What a pass gave.

    Attributes:
        places: what block 0, 1, … read and what the last one gave, [batch, pos, d_model] each.
        logits: [batch, pos, vocab].
    """

    places: list[Tensor]
    logits: Tensor

    def moves(self, before: "Pass", place: int) -> Tensor:
        """Return the difference to another pass at a place, [batch, pos, d_model], fp32."""
        return self.places[place].float() - before.places[place].float()


def fail(found: str, expected: str, cause: str) -> NoReturn:
    """Raise AssertionError with what was found, what was expected, and why that usually happens."""
    raise AssertionError(f"{found}; expected {expected}. Usual cause: {cause}.")


def module_of(model: Any) -> nn.Module:
    """Return the torch module that holds the blocks, also of nnsight and TransformerBridge."""
    return getattr(model, "_module", getattr(model, "original_model", model))


def named(place: int) -> str:
    """Return what a place, counted as in `Pass`, is called."""
    return f"resid_post of layer {place - 1}" if place else "what block 0 reads"


def checked_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering | None,
    prompts: Sequence[str],
) -> BatchEncoding:
    """Return the prompts as a batch padded on the left, after a look at the arguments.

    Raises:
        ValueError: steering that is open already or not callable, a model in training mode, a
            tokenizer without a padding token, prompts without tokens.
    """
    opened = isinstance(steering, AbstractContextManager)
    if steering is not None and (opened or not callable(steering)):
        raise ValueError(
            "expected a callable that returns a context manager, as in `lambda: my_steer(model)`;"
            f" got {type(steering).__name__}"
        )
    if module_of(model).training:
        raise ValueError(
            "the model is in training mode, where dropout moves everything: call model.eval()"
        )
    if tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token"
        )
    return encode(tokenizer, prompts).to(input_device(module_of(model)))


@contextmanager
def watched(model: Any) -> Iterator[list[list[Tensor]]]:
    """Record at every place of `Pass`, after all hooks that are open, one tensor a pass."""
    blocks = get_blocks(module_of(model))[1]
    seen: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    places: dict[int, Location] = {place: (block, "input") for place, block in enumerate(blocks)}
    places[len(blocks)] = (blocks[-1], "output")

    def record(place: int, given: Any) -> None:
        seen[place].append(get_hidden(given).detach().clone())

    with recording(places, record):
        yield seen


def read(
    model: Any, inputs: Mapping[str, Tensor], logits: Logits, steering: Steering = nullcontext
) -> Pass:
    """Run one pass and return what it gave.

    Raises:
        ValueError: `logits` did not run the blocks of the model.
    """
    with steering(), watched(model) as seen:
        scores = logits(model, inputs)
    if not all(seen):
        raise ValueError("expected `logits` to run the model, and it did not run its blocks")
    return Pass([passes[-1] for passes in seen], scores)


def first_place(before: Pass, after: Pass, real: Tensor | None = None) -> int | None:
    """Return the first place at which two passes of one shape differ.

    Below it nothing differs, not even by rounding. `real` [batch, pos] says which tokens count.
    """
    for place in range(len(before.places)):
        moved = after.moves(before, place).ne(0).any(-1)
        if (moved if real is None else moved & real).any():
            return place
    return None


def rounding(hidden: Tensor) -> float:
    """Return by what part of its size a hidden state differs if it is computed in another order."""
    return max(4 * torch.finfo(hidden.dtype).eps, 1e-5)


def agree(moves: Tensor, others: Tensor, hidden: Tensor) -> bool:
    """Return whether two differences [..., d_model] are the same but for rounding.

    `hidden` are the hidden states that they were taken from.
    """
    size = hidden.float().abs() + others.abs()
    slack = 0.02 * others.abs().amax(-1, keepdim=True) + rounding(hidden) * (
        size + size.mean(-1, keepdim=True)
    )
    return bool(((moves - others).abs() <= slack).all())


def same_logits(scores: Tensor, others: Tensor) -> bool:
    """Return whether two logits are the same but for rounding."""
    slack = max(8 * torch.finfo(scores.dtype).eps, 1e-3)
    return bool((scores - others).abs().max() <= slack * others.abs().max())
