"""How likely a model finds texts: losses and log-probabilities of their tokens, steered or not."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import pandas as pd
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.measuring.metrics import Metric
from common.passes.padding import pad_id, padded
from common.passes.prompts import prompt_ids
from common.passes.running import Steering, input_device
from common.texts.generation import logits
from common.texts.likelihood import chosen_logprobs


def get_loss_metric(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    agg_mode: Literal["mean", "sum", "max", "full"] = "mean",
    steering: Steering | None = None,
    batch_size: int = 32,
    prepend_bos: bool | None = True,
) -> Metric:
    """Return a metric of how unlikely a model finds a text: the loss of its tokens, aggregated.

    Losses are in nats. BOS does not count, and without BOS nothing predicts the first token of a
    text, which then does not count either.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        agg_mode: "mean", "sum" or "max" over the tokens, or "full": an array with all of them. Of a
            text of which no token counts the sum is 0, mean and max are NaN.
        steering: makes what is open meanwhile, for example `lambda: vector.apply(model)`.
        batch_size: texts in one pass.
        prepend_bos: see `prompts.prompt_ids`; by default one BOS where the tokenizer has one.

    Raises:
        ValueError: another mode; when it measures, a text that the model has no positions for, or
            that `prompt_ids` refuses.
    """
    modes = {
        "mean": Tensor.mean,
        "sum": Tensor.sum,
        "max": lambda row: row.max() if len(row) else row.mean(),
    }
    if agg_mode != "full" and agg_mode not in modes:
        raise ValueError(f"expected 'mean', 'sum', 'max' or 'full' as agg_mode, got {agg_mode!r}")

    def losses(texts: list[str]) -> list:
        found = [
            -row
            for row in token_logprobs(model, tokenizer, texts, steering, batch_size, prepend_bos)
        ]
        return [row.numpy() if agg_mode == "full" else modes[agg_mode](row).item() for row in found]

    return losses


def get_logprob_metric(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    batch_size: int = 32,
    prepend_bos: bool | None = True,
) -> Metric:
    """Return a metric of what steering does to the predictions along a text.

    It gives three columns, means over the tokens that count, as in `get_loss_metric`: `logprob` (of
    the actual next token, steered), `logprob_change` (against unsteered) and `kl` (Kullback-Leibler
    divergence of the steered next-token distribution from the unsteered one, in nats).

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        steering: makes what is open meanwhile, for example `lambda: vector.apply(model)`.
        batch_size: texts in one pass.
        prepend_bos: see `prompts.prompt_ids`; by default one BOS where the tokenizer has one.

    Raises:
        ValueError: when it measures, a text that the model has no positions for, or that
            `prompt_ids` refuses.
    """

    def measured(texts: list[str]) -> pd.DataFrame:
        rows = []
        for inputs in _batches(model, tokenizer, texts, batch_size, prepend_bos):
            with steering():
                steered = logits(model, inputs)
            plain = logits(model, inputs)
            after, before = (
                chosen_logprobs(part, inputs["input_ids"]) for part in (steered, plain)
            )
            kl = kl_divergence(steered.float(), plain.float())[:, :-1]
            found = torch.stack([after, after - before, kl], dim=-1)  # [batch, pos - 1, column]
            rows += [row.mean(0).tolist() for row in _after_a_token(found, inputs)]
        return pd.DataFrame(rows, columns=["logprob", "logprob_change", "kl"])

    return measured


def kl_divergence(steered: Tensor, unsteered: Tensor) -> Tensor:
    """Return KL(steered || unsteered), [...], in nats, from logits or logprobs [..., vocab]."""
    steered, unsteered = steered.log_softmax(-1), unsteered.log_softmax(-1)
    return (steered.exp() * (steered - unsteered)).sum(-1).clamp(min=0)


def token_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    steering: Steering | None = None,
    batch_size: int = 32,
    prepend_bos: bool | None = True,
) -> list[Tensor]:
    """Return the log-probabilities of the tokens of each text that have a token before them.

    BOS counts as one.

    Returns:
        One tensor [pos - 1] a text, in fp32 on the CPU; empty where a text has one token or none.

    Raises:
        ValueError: a text that the model has no positions for, or that `prompt_ids` refuses.
    """
    found: list[Tensor] = []
    for inputs in _batches(model, tokenizer, texts, batch_size, prepend_bos):
        with steering() if steering else nullcontext():
            logprobs = chosen_logprobs(logits(model, inputs), inputs["input_ids"])
        found += _after_a_token(logprobs, inputs)
    return found


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int,
    prepend_bos: bool | None,
) -> Iterator[BatchEncoding]:
    """The texts as inputs of the model, some at a time."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for start in range(0, len(texts), batch_size):
        rows = prompt_ids(tokenizer, texts[start : start + batch_size], prepend_bos)
        # An empty text without BOS: one token stands for it, which nothing predicts and which
        # predicts nothing.
        inputs = padded([row or [0] for row in rows], pad_id(tokenizer)).to(input_device(model))
        if limit and inputs["input_ids"].shape[1] > limit:
            raise ValueError(
                f"a text of {inputs['input_ids'].shape[1]} tokens is longer than the {limit}"
                " positions of the model"
            )
        yield inputs


def _after_a_token(values: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The values [batch, pos - 1, …] of the tokens that have one before them, row by row."""
    return [row[mask].cpu() for row, mask in zip(values, inputs["attention_mask"][:, :-1].bool())]
