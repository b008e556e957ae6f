"""What is measured on texts, as columns of a table.

A metric is a callable that takes a list of texts and returns one value a text (a list, array or tensor), or a table with one
row a text.
`add_metric_cols` puts the results beside the texts. The names are those of the library of the activation-addition post
(https://github.com/montemac/activation_additions).

The tone is counted by the words of the embedded model's grammar. On that model this is nearly all there is; on another one
it misses most words that carry a tone, and shows a direction at best: there, give `get_sentiment_metric` a classifier.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import pandas as pd
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.embedded import grammar
from common.generation import left_padded, logits
from common.passes import input_device
from common.prompts import prompt_ids

NEGATIONS = {"not", "never", "hardly", "no"}
Metric = Callable[[list[str]], Any]
Steering = Callable[[], AbstractContextManager]


@cache
def lexicon() -> dict[str, int]:
    """Return every word that carries a tone, in lower case, with +1 (positive) or -1 (negative)."""
    return grammar.lexicon()


def tone(text: str) -> int:
    """Count positive minus negative words; a negation up to two words before turns a word round."""
    words = re.findall(r"[a-z]+", text.lower())
    score = 0
    for index, word in enumerate(words):
        turned = any(earlier in NEGATIONS for earlier in words[max(0, index - 2) : index])
        score += lexicon().get(word, 0) * (-1 if turned else 1)
    return score


def tone_sign(texts: Iterable[str]) -> list[int]:
    """Return 1 for each text that is more positive than negative, -1 for the reverse, else 0."""
    return [(score > 0) - (score < 0) for score in map(tone, texts)]


def tone_shares(texts: Iterable[str]) -> dict[str, float]:
    """Return which share of the texts is more positive than negative, more negative than positive, and neither.

    Raises:
        ValueError: there is no text.
    """
    signs = tone_sign(texts)
    if not signs:
        raise ValueError("expected at least one text, got none")
    return {name: signs.count(sign) / len(signs) for name, sign in (("positive", 1), ("negative", -1), ("neither", 0))}


def measure(metric: Metric, texts: Sequence[str], name: str = "metric") -> pd.DataFrame:
    """Apply a metric and return its columns; a single one is called "".

    Raises:
        ValueError: it does not return one value or row for each text.
    """
    found = metric(list(texts))
    if isinstance(found, Tensor):  # pandas would keep each value as a tensor
        found = found.tolist()
    if not isinstance(found, Iterable):
        raise ValueError(f"the metric {name!r} returned {found!r} for {len(texts)} texts: expected one value for each")
    frame = found.reset_index(drop=True) if isinstance(found, pd.DataFrame) else pd.DataFrame({"": list(found)})
    if len(frame) != len(texts):
        raise ValueError(f"the metric {name!r} returned {len(frame)} values for {len(texts)} texts: expected one for each")
    return frame


def add_metric_cols(
    data: pd.DataFrame,
    metrics: Mapping[str, Metric],
    cols_to_use: str | Sequence[str] = ("prompts", "completions"),
) -> pd.DataFrame:
    """Return a table with one or more columns for each metric added at the end; the table given is not changed.

    Args:
        data: for example completions.
        metrics: by name; a metric with one value a text becomes a column of that name, one with several `name_column` each.
        cols_to_use: the columns that hold the texts; those of several columns are joined. By default those of a sweep too,
            which are called `prompt` and `completion`.

    Raises:
        ValueError: no column of texts, one that is missing or would be there twice, or a metric returns another number of values.
    """
    if not isinstance(data, pd.DataFrame) or not isinstance(metrics, Mapping):
        raise ValueError(f"expected a table and metrics by name, got {type(data).__name__} and {metrics!r}")
    columns = [cols_to_use] if isinstance(cols_to_use, str) else list(cols_to_use)
    if columns == ["prompts", "completions"] and not {*columns} & {*data}:
        columns = [name if name in data else plural for name, plural in zip(("prompt", "completion"), columns)]
    if not columns:
        raise ValueError("expected one column of texts or more, got none")
    if missing := [column for column in columns if column not in data]:
        raise ValueError(f"no column {missing[0]!r}: the table has {', '.join(map(str, data.columns))}")
    texts = data[columns].agg("".join, axis=1).tolist() if len(data) else []
    result = data.copy()
    for name, metric in metrics.items():
        for column, values in measure(metric, texts, name).items():
            title = name if column == "" else f"{name}_{column}"
            if title in result:
                raise ValueError(f"there is a column {title!r} already: give the metric another name")
            result[title] = values.to_numpy()
    return result


def get_word_count_metric(words: Iterable[str], case_sensitive: bool = False) -> Metric:
    """Return a metric that counts how often any of some words stands in a text: whole words, in any case unless told otherwise.

    Raises:
        ValueError: no words, or something that is no word.
    """
    pattern = _whole_words([words] if isinstance(words, str) else list(words), case_sensitive)
    return lambda texts: [len(pattern.findall(text)) for text in texts]


def _whole_words(words: Sequence[str], case_sensitive: bool = False) -> re.Pattern:
    """A pattern that finds some words where they stand whole; where several begin, the longest."""
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"expected a list of words, got {words!r}")
    alternatives = "|".join(re.escape(word) for word in sorted({word.strip() for word in words}, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", 0 if case_sensitive else re.IGNORECASE)


def get_sentiment_metric(
    sentiment: Callable | Mapping[str, float] | None = None, positive_labels: Sequence[str] | None = None
) -> Metric:
    """Return a metric of the sentiment of a text.

    Args:
        sentiment: words with their weights, in any case; a pipeline of transformers for text classification; or a callable
            of one text. By default the tone, counted by the grammar's words.
        positive_labels: for a pipeline, which of its labels are positive: adds a column `is_positive`.

    A pipeline gives the columns `label` and `score` of the likeliest label, the others one value.

    Raises:
        ValueError: none of these, or no words.
    """
    if sentiment is None:
        sentiment = tone
    if isinstance(sentiment, Mapping):
        weights = {word.strip().lower(): weight for word, weight in sentiment.items()}
        pattern = _whole_words(list(weights), case_sensitive=True)
        return lambda texts: [sum(weights[word] for word in pattern.findall(text.lower())) for text in texts]
    if not callable(sentiment):
        raise ValueError(f"expected word weights, a pipeline or a callable, got {sentiment!r}")
    if not hasattr(sentiment, "task"):
        return lambda texts: [sentiment(text) for text in texts]

    positive = [positive_labels] if isinstance(positive_labels, str) else positive_labels

    def classify(texts: list[str]) -> pd.DataFrame:
        # A pipeline that was made with `top_k` gives a list of labels for each text.
        found = [max(row, key=lambda label: label["score"]) if isinstance(row, list) else row for row in sentiment(texts)]
        frame = pd.DataFrame(found, columns=["label", "score"])
        if positive is not None:
            frame["is_positive"] = frame["label"].isin(list(positive))
        return frame

    return classify


def get_loss_metric(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    agg_mode: Literal["mean", "sum", "max", "full"] = "mean",
    steering: Steering | None = None,
    batch_size: int = 32,
    prepend_bos: bool | None = True,
) -> Metric:
    """Return a metric of how unlikely a model finds a text: the loss of each token but BOS, in nats, aggregated.

    Without BOS nothing predicts the first token of a text, and it does not count.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        agg_mode: "mean", "sum" or "max" over the tokens, or "full": an array with all of them. Of a text of which no token
            counts the sum is 0, mean and max are NaN.
        steering: makes what is open meanwhile, for example `lambda: vector.apply(model)`.
        batch_size: texts in one pass.
        prepend_bos: see `prompts.prompt_ids`; by default one BOS where the tokenizer has one.

    Raises:
        ValueError: another mode; when it measures, a text that the model has no positions for, or that `prompt_ids`
            refuses.
    """
    modes = {"mean": Tensor.mean, "sum": Tensor.sum, "max": lambda row: row.max() if len(row) else row.mean()}
    if agg_mode != "full" and agg_mode not in modes:
        raise ValueError(f"expected 'mean', 'sum', 'max' or 'full' as agg_mode, got {agg_mode!r}")

    def losses(texts: list[str]) -> list:
        found = [-row for row in token_logprobs(model, tokenizer, texts, steering, batch_size, prepend_bos)]
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

    It gives three columns, means over the tokens that count, as in `get_loss_metric`: `logprob` (of the actual next token,
    steered), `logprob_change` (against unsteered) and `kl` (Kullback-Leibler divergence of the steered next-token
    distribution from the unsteered one, in nats).

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        steering: makes what is open meanwhile, for example `lambda: vector.apply(model)`.
        batch_size: texts in one pass.
        prepend_bos: see `prompts.prompt_ids`; by default one BOS where the tokenizer has one.

    Raises:
        ValueError: when it measures, a text that the model has no positions for, or that `prompt_ids` refuses.
    """

    def measured(texts: list[str]) -> pd.DataFrame:
        rows = []
        for inputs in _batches(model, tokenizer, texts, batch_size, prepend_bos):
            with steering():
                steered = logits(model, inputs).float().log_softmax(-1)
            plain = logits(model, inputs).float().log_softmax(-1)
            kl = kl_divergence(steered, plain)
            for index, (chosen, before) in enumerate(zip(_actual(steered, inputs), _actual(plain, inputs))):
                change = (chosen - before).mean().item()
                at = kl[index, :-1][inputs["attention_mask"][index, :-1].bool()]
                rows.append({"logprob": chosen.mean().item(), "logprob_change": change, "kl": at.mean().item()})
        return pd.DataFrame(rows, columns=["logprob", "logprob_change", "kl"])

    return measured


def kl_divergence(steered: Tensor, unsteered: Tensor) -> Tensor:
    """Return KL(steered || unsteered) in nats [...], from logits or log-probabilities [..., vocab]."""
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
    """Return the log-probability of every token of each text that has a token before it, BOS included.

    Returns:
        One tensor [pos] a text, in fp32 on the CPU; empty where a text has but one token or none.

    Raises:
        ValueError: a text that the model has no positions for, or that `prompt_ids` refuses.
    """
    found: list[Tensor] = []
    for inputs in _batches(model, tokenizer, texts, batch_size, prepend_bos):
        with steering() if steering else nullcontext():
            logprobs = logits(model, inputs).float().log_softmax(-1)  # in bf16 a log-probability has three digits
        found += _actual(logprobs, inputs)
    return found


def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int, prepend_bos: bool | None
) -> Iterator[BatchEncoding]:
    """The texts as inputs of the model, some at a time."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for start in range(0, len(texts), batch_size):
        rows = prompt_ids(tokenizer, texts[start : start + batch_size], prepend_bos)
        # An empty text without BOS: one token stands for it, which nothing predicts and which predicts nothing.
        inputs = left_padded(tokenizer, [row or [0] for row in rows]).to(input_device(model))
        if limit and inputs["input_ids"].shape[1] > limit:
            raise ValueError(f"a text of {inputs['input_ids'].shape[1]} tokens is longer than the {limit} positions of the model")
        yield inputs


def _actual(logprobs: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The log-probabilities of the tokens that are there, row by row."""
    chosen = logprobs[:, :-1].gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return [row[mask].cpu() for row, mask in zip(chosen, inputs["attention_mask"][:, :-1].bool())]
