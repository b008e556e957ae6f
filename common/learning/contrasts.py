"""Contrast pairs as what a model learns from: two texts, of which the ends count.

No token looks ahead, so both texts of a pair get the same probabilities up to where they part. What
counts is each token from there on: of ("To me, tea is good.", "To me, tea is bad.") the last word
and the full stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.passes.padding import pad_id, padded
from common.passes.prompts import prompt_ids
from common.passes.running import input_device
from common.places.blocks import text_config
from common.texts.likelihood import chosen_logprobs
from common.vectors.pairs import Sample, SteeringVectorTrainingSample, samples_of


@dataclass(frozen=True)
class Side:
    """One side of contrast pairs, pair by pair.

    Attributes:
        rows: the token ids of each text.
        first: the first token of each that counts.
        pad: what to pad with.
    """

    rows: list[list[int]]
    first: list[int]
    pad: int

    def inputs(self, chosen: Sequence[int], device: torch.device) -> tuple[BatchEncoding, Tensor]:
        """Return some texts as a batch, padded on the right, and which tokens count [text, pos]."""
        inputs = padded([self.rows[number] for number in chosen], self.pad, side="right")
        inputs = inputs.to(device)
        positions = torch.arange(inputs["input_ids"].shape[1], device=device)
        first = torch.tensor([self.first[number] for number in chosen], device=device)
        return inputs, inputs["attention_mask"].bool() & (positions >= first[:, None])


@dataclass(frozen=True)
class Contrasts:
    """Contrast pairs in token ids: `sides` are the positive and the negative one."""

    samples: list[SteeringVectorTrainingSample]
    sides: tuple[Side, Side]

    def __len__(self) -> int:
        return len(self.samples)


def contrasts_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    training_samples: Sequence[Sample],
    prepend_bos: bool | None,
) -> Contrasts:
    """Tokenize contrast pairs, and find where the texts of each part.

    Args:
        model: the model that is to read them.
        tokenizer: its tokenizer.
        training_samples: samples, or tuples of two prompts; their read indices do not matter here.
        prepend_bos: see `prompts.prompt_ids`. Without a BOS nothing predicts the first token of a
            text, which then does not count.

    Raises:
        ValueError: no pairs, or something else; two texts of which nothing counts, since they are
            the same, or one begins with the other; a text that is too long for the model; what
            `prompt_ids` raises.
    """
    samples = samples_of(training_samples)
    sides = [
        prompt_ids(tokenizer, prompts, prepend_bos)
        for prompts in ([s.positive_str for s in samples], [s.negative_str for s in samples])
    ]
    limit = getattr(text_config(model), "max_position_embeddings", None)
    first = []
    for number, (sample, *rows) in enumerate(zip(samples, *sides)):
        parted = max(1, _shared(*rows))
        if parted >= min(map(len, rows)):
            raise ValueError(
                f"pair {number}: expected two texts with a token each that something predicts, from"
                f" where they part on, got {sample.positive_str!r} and {sample.negative_str!r}; put"
                " a prompt in front of both, or a BOS (prepend_bos=True)"
            )
        if limit and max(map(len, rows)) > limit:
            raise ValueError(
                f"pair {number}: a text of {max(map(len, rows))} tokens is longer than the {limit}"
                " positions of the model"
            )
        first.append(parted)
    positive, negative = (Side(rows, first, pad_id(tokenizer)) for rows in sides)
    return Contrasts(samples, (positive, negative))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from the front."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other)))


def logprobs_of(model: PreTrainedModel, side: Side, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the tokens of some texts, and which of them count.

    With gradients, where they are switched on.

    Returns:
        Both [text, pos - 1]; column i belongs to token i + 1. In fp32 and bool.
    """
    inputs, counted = side.inputs(chosen, input_device(model))
    # Padding is on the right, where no token sees it: positions need not be counted.
    logits = model(**inputs, use_cache=False).logits
    return chosen_logprobs(logits, inputs["input_ids"]), counted[:, 1:]


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of the values that count of each text, [text], of [text, pos]."""
    return values.masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1)


def sum_over(values: Tensor, counted: Tensor) -> Tensor:
    """Return the sum of the values that count of each text, [text], of [text, pos]."""
    return values.masked_fill(~counted, 0.0).sum(-1)
