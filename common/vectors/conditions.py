"""Conditions on a prompt: whom to steer, decided row by row, and kept for all that is generated.

This is the condition of conditional activation steering (CAST, Lee et al. 2024, "Programming
Refusal with Conditional Activation Steering", https://arxiv.org/abs/2409.05907): at some layer the
mean of the hidden states over all tokens of the prompt is compared with a condition vector, and
steering is switched on where their cosine lies on one side of a threshold.

Every prompt is read by itself, without padding and by the unsteered model, so that a decision does
not depend on the batch, on a cache, or on what else steers.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.arguments import finite_number, integer, truth
from common.passes.batching import unhooked
from common.passes.hooks import unsteered
from common.passes.prompts import Prompt, prompt_ids
from common.passes.recording import Location, record_pass
from common.passes.running import in_evaluation_mode, input_device
from common.places.blocks import text_config
from common.places.sites import get_layers
from common.vectors.operators import direction_of


class Rule(ABC):
    """Says which prompts are meant; rules are combined by `&`, `|` and `~`."""

    @property
    @abstractmethod
    def layers(self) -> set[int]:
        """After which blocks it reads the prompts."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Refuse a model that it does not fit.

        Raises:
            ValueError: a layer that is not there, or another width.
        """

    @abstractmethod
    def of_means(self, means: Mapping[int, Tensor]) -> Tensor:
        """Decide, [prompt], bool, from the mean hidden states by layer, [prompt, d_model]."""

    def holds(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        prepend_bos: bool | None = None,
    ) -> list[bool]:
        """Say of each prompt whether it is meant.

        Args:
            model: a causal language model; unchanged.
            tokenizer: its tokenizer.
            prompts: texts, or messages for a chat model.
            prepend_bos: see `prompt_ids`. What stands in front counts too.

        Raises:
            ValueError: a prompt without tokens, one whose hidden states hold nan or inf, or a model
                that the rule does not fit.
        """
        self.check(model)
        rows = prompt_ids(tokenizer, prompts, prepend_bos)
        return self.of_means(prompt_means(model, rows, self.layers)).tolist()

    def __and__(self, other: "Rule") -> "Rule":
        """Both hold."""
        return (
            _Combined(torch.logical_and, (self, other))
            if isinstance(other, Rule)
            else NotImplemented
        )

    def __or__(self, other: "Rule") -> "Rule":
        """One of them holds, or both."""
        return (
            _Combined(torch.logical_or, (self, other))
            if isinstance(other, Rule)
            else NotImplemented
        )

    def __invert__(self) -> "Rule":
        """It does not hold."""
        return _Combined(torch.logical_not, (self,))

    def __bool__(self) -> bool:
        """Refuse `and`, `or` and `not`, which would drop one of the rules without a word."""
        raise TypeError("a rule is not true or false by itself: combine rules with &, | and ~")


@dataclass(frozen=True, eq=False)
class Condition(Rule):
    """A prompt is meant if it lies on one side of a threshold.

    Conditions are combined by `&` (both), `|` (one or both) and `~` (not).

    Attributes:
        vector: what it is compared with, [d_model].
        layer: after which block.
        threshold: for the cosine of the mean hidden state of the prompt and the vector.
        above: whether it is meant above the threshold, or below it.
        absolute: compare the absolute value of the cosine. That is the similarity of the paper,
            between a hidden state and its projection on the vector, which does not tell the two
            ends of the vector apart.

    Raises:
        ValueError: something that is not a vector of finite numbers other than 0, a negative layer,
            a threshold that is not a finite number, `above` or `absolute` that are not True or
            False.
    """

    vector: Tensor
    layer: int
    threshold: float
    above: bool = True
    absolute: bool = False

    def __post_init__(self) -> None:
        vector = self.vector
        fits = isinstance(vector, Tensor) and vector.dim() == 1 and vector.is_floating_point()
        if not fits or not torch.isfinite(vector).all() or not vector.any():
            raise ValueError(
                f"expected a vector [d_model] other than 0, of finite numbers, got {vector!r}"
            )
        integer(self.layer, "layer")
        finite_number(self.threshold, "threshold")
        truth(self.above, "above")
        truth(self.absolute, "absolute")

    def __repr__(self) -> str:
        sign, cosine = ">" if self.above else "<", "|cosine|" if self.absolute else "cosine"
        return f"Condition({cosine} {sign} {self.threshold:.4g} after block {self.layer})"

    @property
    def layers(self) -> set[int]:
        """After which block it reads the prompts."""
        return {int(self.layer)}

    def check(self, model: nn.Module) -> None:
        """Refuse a model that it does not fit.

        Raises:
            ValueError: the layer is not there, or has another width.
        """
        get_layers(model, layers=[self.layer])
        if len(self.vector) != (d_model := text_config(model).hidden_size):
            raise ValueError(
                f"the condition has a vector of {len(self.vector)} numbers, and d_model of"
                f" {type(model).__name__} is {d_model}"
            )

    def similarity(self, means: Tensor) -> Tensor:
        """Return the similarity of mean hidden states [prompt, d_model], [prompt], in float64.

        Raises:
            ValueError: they hold nan or inf.
        """
        if not torch.isfinite(means).all():
            raise ValueError(
                f"the mean hidden states of a prompt after block {self.layer} hold nan or inf:"
                " nothing can be decided"
            )
        vector = self.vector.to(means.device).double()
        found = (direction_of(means.double()) * direction_of(vector)).sum(-1)
        return found.abs() if self.absolute else found

    def of_means(self, means: Mapping[int, Tensor]) -> Tensor:
        """Decide, [prompt], bool, from the mean hidden states by layer, [prompt, d_model]."""
        found = self.similarity(means[self.layer])
        return found > self.threshold if self.above else found < self.threshold


@dataclass(frozen=True, eq=False, repr=False)
class _Combined(Rule):
    """What several rules say, put together."""

    together: Callable[..., Tensor]
    parts: tuple[Rule, ...]

    def __repr__(self) -> str:
        signs = {torch.logical_and: " & ", torch.logical_or: " | "}
        inner = signs.get(self.together, "").join(map(repr, self.parts))
        return f"({inner})" if len(self.parts) > 1 else f"~{inner}"

    @property
    def layers(self) -> set[int]:
        """See `Rule`."""
        return set().union(*(part.layers for part in self.parts))

    def check(self, model: nn.Module) -> None:
        """See `Rule`."""
        for part in self.parts:
            part.check(model)

    def of_means(self, means: Mapping[int, Tensor]) -> Tensor:
        """See `Rule`."""
        return self.together(*(part.of_means(means) for part in self.parts))


def decider(rule: Rule, model: nn.Module) -> Callable[[list[list[int]]], Tensor]:
    """Return what decides for prompts, given as token ids, whether they are meant: [prompt], bool.

    Args:
        rule: a condition, or several.
        model: the model that reads them; hooks that it has, or gets, do not act.

    Raises:
        ValueError: it is no rule, or does not fit the model.
    """
    if not isinstance(rule, Rule):
        raise ValueError(f"expected a Condition, such as find_condition returns, got {rule!r}")
    rule.check(model)
    twin = unhooked(model)
    if twin is not model:
        _keep_its_configs(twin)
    return lambda rows: rule.of_means(prompt_means(twin, rows, rule.layers))


def _keep_its_configs(twin: nn.Module) -> None:
    """Give a copy configs of its own: drafts by `assistant_early_exit` change the model's.

    They say then that it has fewer blocks, which is true of the drafts and not of their prompt.
    """
    own: dict[int, Any] = {}
    for module in twin.modules():
        config = vars(module).get("config")
        if config is not None:
            module.config = own.setdefault(id(config), copy.copy(config))


@torch.no_grad()
def prompt_means(
    model: nn.Module, rows: Sequence[Sequence[int]], layers: Iterable[int]
) -> dict[int, Tensor]:
    """Return by layer the mean hidden states of prompts over their tokens, [prompt, d_model].

    They are those of the unsteered model, in float32 on the CPU.

    Args:
        model: a causal language model; unchanged.
        rows: the token ids of each prompt.
        layers: after which blocks.

    Raises:
        ValueError: a prompt without tokens.
    """
    if not all(len(row) for row in rows):
        raise ValueError("expected prompts of one token or more, got an empty one")
    found = read_alone(model, rows, layers, lambda hidden: hidden[0].float().mean(0).cpu())
    return {layer: torch.stack(means) for layer, means in found.items()}


@torch.no_grad()
def read_alone(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    layers: Iterable[int],
    keep: Callable[[Tensor], Tensor],
) -> dict[int, list[Tensor]]:
    """Read prompts one by one with the unsteered model, and keep something of each.

    Args:
        model: a causal language model; unchanged.
        rows: the token ids of each prompt.
        layers: after which blocks; a pass ends after the last of them.
        keep: what to keep of the hidden states [1, pos, d_model].

    Returns:
        By layer, what was kept of each prompt.
    """
    twin: Any = unhooked(model)
    modules = get_layers(twin, layers=sorted(layers))
    places: dict[int, Location] = {layer: (module, "output") for layer, module in modules.items()}
    found: dict[int, list[Tensor]] = {layer: [] for layer in modules}
    with unsteered(), in_evaluation_mode(twin):
        for row in rows:
            ids = torch.tensor([list(row)], device=input_device(twin))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            run = partial(twin, **inputs)
            read = record_pass(run, places, lambda _, hidden: keep(hidden))
            for layer, kept in read.items():
                found[layer].append(kept)
    return found
