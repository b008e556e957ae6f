"""What a trial of abilities works with: one mechanism on its own model, and what is true of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.loading import Loaded, copy_sharing_weights, load_model
from common.texts.generation import logits
from repository.mechanisms import Mechanism, load_mechanism

PROMPTS = ["I think dogs are ", "My neighbour", "The old library is on the"]
TOLERANCE = 1e-4  # logits; steering moves them by units
NEW = 6  # tokens


class Silently(Exception):
    """Something else happened than what was asked for, and no error said so."""


class Elsewhere(Exception):
    """An error in another process, as it was reported: "Type: message"."""


class Subject:
    """One mechanism on modules of its own, what it should do, and what is true of it.

    Attributes:
        plain: another copy of the model, which nobody touches but the reference.
        wrapped: what the mechanism works with.
        vector: [d_model], twice as long as the hidden states at `layer`, so that it changes
            whatever is written.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        prompts: Sequence[str] = PROMPTS,
    ):
        self.mechanism, self.model, self.tokenizer, self.layer = mechanism, model, tokenizer, layer
        self.inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
        self.real = self.inputs["attention_mask"].bool()
        self.plain = copy_sharing_weights(model)
        hidden = self._reference.read(self.plain, self.inputs, layer)[self.real]
        noise = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
        self.vector = (2 * noise / noise.norm() * hidden.norm(dim=-1).mean()).to(hidden)

    @cached_property
    def wrapped(self) -> Any:
        """What the mechanism's `wrap` made of a copy of the modules."""
        return self.mechanism.wrap(copy_sharing_weights(self.model), self.tokenizer)

    @property
    def module(self) -> PreTrainedModel:
        """The Hugging Face model inside, for code that does not know the mechanism."""
        return getattr(
            self.wrapped, "original_model", getattr(self.wrapped, "_module", self.wrapped)
        )

    @property
    def _reference(self) -> Mechanism:
        return load_mechanism("pytorch_hooks")

    def steer(self) -> AbstractContextManager:
        """Steer by the mechanism."""
        return self.mechanism.steer(self.wrapped, self.layer, self.vector)

    def intervene(self, change: Callable[[Tensor], Tensor]) -> AbstractContextManager:
        """Change hidden states by the mechanism.

        Raises:
            ValueError: it has no `intervene`.
        """
        if self.mechanism.intervene is None:
            raise ValueError(
                f"{self.mechanism.name} has no `intervene`: it adds one vector at every position"
            )
        return self.mechanism.intervene(self.wrapped, self.layer, change)

    def logits(self) -> Tensor:
        """Logits of the real tokens by the mechanism, as it is now."""
        return self.mechanism.logits(self.wrapped, self.inputs)[self.real]

    def generate(self, **options) -> Tensor:
        """Token ids by the mechanism, as it is now."""
        return self.mechanism.generate(self.wrapped, self.inputs, max_new_tokens=NEW, **options)

    def steered(self, what: Callable[[PreTrainedModel], Tensor]) -> Tensor:
        """What a plain hook gives, steered, on a copy that nobody else touches."""
        with self._reference.steer(self.plain, self.layer, self.vector):
            return what(self.plain)

    def steered_logits(self) -> Tensor:
        """The truth for `logits` while steered."""
        return self.steered(lambda model: logits(model, self.inputs)[self.real])

    def unsteered_logits(self) -> Tensor:
        """The truth for `logits` while nothing is steered."""
        return logits(self.plain, self.inputs)[self.real]


@cache
def embedded_model() -> Loaded:
    """The embedded model, loaded once."""
    return load_model("embedded", device="cpu")


def embedded_subject(mechanism: str) -> Subject:
    """A mechanism on the embedded model, at the layer of its preset."""
    model, tokenizer, preset = embedded_model()
    return Subject(load_mechanism(mechanism), model, tokenizer, preset.layer)


def expect(found: Tensor, expected: Tensor, silently: str) -> None:
    """Fail with what silently happened, unless ids are the same or numbers are close."""
    same = found.shape == expected.shape and (
        torch.allclose(found, expected, rtol=0, atol=TOLERANCE)
        if found.is_floating_point()
        else torch.equal(found, expected)
    )
    if not same:
        raise Silently(silently)


def expect_steered(
    subject: Subject, found: Tensor, silently: str = "steered otherwise than by the vector"
) -> None:
    """Fail unless logits [tokens, vocab] are the steered ones; say if they are unsteered."""
    if torch.allclose(found, subject.unsteered_logits(), rtol=0, atol=TOLERANCE):
        raise Silently("unsteered, and no error")
    expect(found, subject.steered_logits(), silently)
