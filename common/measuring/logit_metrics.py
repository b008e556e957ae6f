"""Metrics of the next token, for `sweep_logits`: made of words, they become ids of one tokenizer.

Each takes steered and unsteered logits [row, vocab] and returns one number a row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.measuring.next_token import token_set

LogitMetric = Callable[[Tensor, Tensor], Any]


def token_logprob(token_ids: Sequence[int]) -> LogitMetric:
    """Return the log-probability of some tokens together, steered."""
    ids = torch.tensor(list(token_ids))
    return lambda steered, unsteered: steered.log_softmax(-1)[:, ids].logsumexp(-1)


def ab_metric(
    tokenizer: PreTrainedTokenizerBase, a: str | Sequence[str], b: str | Sequence[str]
) -> LogitMetric:
    """Return how much likelier one answer is than another: log p(a) - log p(b), steered.

    It is the logit difference of a choice between two letters, which contrastive activation
    addition (https://arxiv.org/abs/2312.06681) and its followers measure.

    Args:
        tokenizer: the model's tokenizer.
        a: the answer, or several that count as one: their probabilities are summed, and of each
            word those with and without a blank in front.
        b: the other answer.

    Raises:
        ValueError: something that is no word or not a single token, or a token that is both.
    """
    ids = [token_set(tokenizer, [words] if isinstance(words, str) else words) for words in (a, b)]
    if both := sorted({*ids[0]} & {*ids[1]}):
        raise ValueError(f"{tokenizer.decode(both[:1])!r} is an answer of both: {a!r} and {b!r}")
    of_a, of_b = map(token_logprob, ids)

    def difference(steered: Tensor, unsteered: Tensor) -> Tensor:
        return of_a(steered, unsteered) - of_b(steered, unsteered)

    difference.__name__ = f"log p({_or(a)}) - log p({_or(b)})"
    return difference


def _or(words: str | Sequence[str]) -> str:
    return words if isinstance(words, str) else " or ".join(words)


def mean_logprob(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> LogitMetric:
    """Return the mean log-probability of some answers, steered: all of them are to become likelier.

    Of each word, the probabilities with and without a blank in front are summed. One likely answer
    does not make up for the others, as it does in `token_logprob`.

    Raises:
        ValueError: no answers, or a word that is not a single token.
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"expected a list of answers, got {answers!r}")
    found = [token_logprob(token_set(tokenizer, [answer])) for answer in answers]

    def mean(steered: Tensor, unsteered: Tensor) -> Tensor:
        return torch.stack([logprob(steered, unsteered) for logprob in found]).mean(0)

    mean.__name__ = f"mean log p of {', '.join(answers)}"
    return mean
