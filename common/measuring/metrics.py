"""What is measured on texts, as columns of a table.

A metric is a callable that takes a list of texts and returns one value a text (a list, array or
tensor), or a table with one row a text. One that needs two arguments gets prompts and completions,
as a judge does. A mapping for each text makes a column for each key, and what the pipelines of
transformers return is read likewise, so that a pipeline is a metric as it is.

`add_metric_cols` puts the results beside the texts. The names are those of the library of the
activation-addition post (https://github.com/montemac/activation_additions).

The tone is counted by the words of the embedded model's grammar. On that model this is nearly all
there is; on another one it misses most words that carry a tone, and shows a direction at best:
there, give `get_sentiment_metric` a classifier.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import pandas as pd
from torch import Tensor

from common.arguments import finite_number, takes_two
from common.measuring.tone import tone

Metric = Callable[[list[str]], Any] | Callable[[list[str], list[str]], Any]


def measure(
    metric: Metric, texts: Sequence[str], name: str = "metric", prompts: Sequence[str] | None = None
) -> pd.DataFrame:
    """Apply a metric and return its columns; a single one is called "".

    Args:
        metric: what is measured.
        texts: what it is measured on.
        name: of the metric, for messages.
        prompts: what the texts complete, for a metric that needs it.

    Raises:
        ValueError: it does not return one value or row for each text, or it needs prompts and there
            are none.
    """
    arguments = [list(texts)]
    if takes_two(metric):
        if prompts is None:
            raise ValueError(
                f"the metric {name!r} takes prompts and completions: expected both, got texts only"
            )
        arguments.insert(0, list(prompts))
    found = cast(Callable, metric)(*arguments)
    if isinstance(found, Tensor):  # pandas would keep each value as a tensor
        found = found.tolist()
    if not isinstance(found, Iterable):
        raise ValueError(
            f"the metric {name!r} returned {found!r} for {len(texts)} texts: expected one value for"
            " each"
        )
    frame = found.reset_index(drop=True) if isinstance(found, pd.DataFrame) else _table(list(found))
    if len(frame) != len(texts):
        raise ValueError(
            f"the metric {name!r} returned {len(frame)} values for {len(texts)} texts: expected one"
            " for each"
        )
    return frame


def _table(values: list) -> pd.DataFrame:
    """One column of values, or of mappings a column for each key."""
    records = [_record(value) for value in values]
    if records and all(isinstance(record, Mapping) for record in records):
        return pd.DataFrame(records)
    return pd.DataFrame({"": values})


def _record(value: Any) -> Any:
    """What a pipeline returns for a text as a mapping, if it has that form; else the value."""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        if len(value) == 1:  # a text that was written, the likeliest label
            return value[0]
        if all({"label", "score"} <= part.keys() for part in value):
            # They come in the order of their scores.
            return dict(sorted((str(part["label"]), part["score"]) for part in value))
    if isinstance(value, Mapping) and {"labels", "scores"} <= value.keys():  # zero-shot
        return dict(sorted(zip(value["labels"], value["scores"])))
    return value


def add_metric_cols(
    data: pd.DataFrame,
    metrics: Mapping[str, Metric],
    cols_to_use: str | Sequence[str] = ("prompts", "completions"),
) -> pd.DataFrame:
    """Return a copy of a table with one or more columns for each metric added at the end.

    Args:
        data: for example completions.
        metrics: by name; a metric with one value a text becomes a column of that name, one with
            several `name_column` each.
        cols_to_use: the columns that hold the texts; those of several columns are joined, unless
            there are two and the metric takes prompts and completions. By default those of a sweep
            too, which are called `prompt` and `completion`.

    Raises:
        ValueError: no column of texts, one that is missing or would be there twice, a metric that
            takes prompts and completions without two columns, or that returns another number of
            values.
    """
    if not isinstance(data, pd.DataFrame) or not isinstance(metrics, Mapping):
        raise ValueError(
            f"expected a table and metrics by name, got {type(data).__name__} and {metrics!r}"
        )
    columns = [cols_to_use] if isinstance(cols_to_use, str) else list(cols_to_use)
    if columns == ["prompts", "completions"] and not {*columns} & {*data}:
        columns = [
            name if name in data else plural
            for name, plural in zip(("prompt", "completion"), columns)
        ]
    if not columns:
        raise ValueError("expected one column of texts or more, got none")
    if missing := [column for column in columns if column not in data]:
        raise ValueError(
            f"no column {missing[0]!r}: the table has {', '.join(map(str, data.columns))}"
        )
    joined = data[columns].agg("".join, axis=1).tolist() if len(data) else []
    both = [data[column].tolist() for column in columns] if len(columns) == 2 else [None, joined]
    result = data.copy()
    for name, metric in metrics.items():
        prompts, texts = both if takes_two(metric) else (None, joined)
        for column, values in measure(metric, texts, name, prompts).items():
            title = name if column == "" else f"{name}_{column}"
            if title in result:
                raise ValueError(
                    f"there is a column {title!r} already: give the metric another name"
                )
            result[title] = values.to_numpy()
    return result


def get_word_count_metric(words: Iterable[str], case_sensitive: bool = False) -> Metric:
    """Return a metric that counts how often any of some words stands in a text, as a whole word.

    Raises:
        ValueError: no words, or something that is not a word.
    """
    pattern = _whole_words([words] if isinstance(words, str) else list(words), case_sensitive)
    return lambda texts: [len(pattern.findall(text)) for text in texts]


def _whole_words(words: Sequence[str], case_sensitive: bool = False) -> re.Pattern:
    """A pattern that finds some words where they stand whole; where several begin, the longest."""
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"expected a list of words, got {words!r}")
    alternatives = "|".join(
        re.escape(word) for word in sorted({word.strip() for word in words}, key=len, reverse=True)
    )
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", 0 if case_sensitive else re.IGNORECASE)


def get_sentiment_metric(
    sentiment: Callable | Mapping[str, float] | None = None,
    positive_labels: Sequence[str] | None = None,
) -> Metric:
    """Return a metric of the sentiment of a text.

    Args:
        sentiment: words with their weights, in any case; a pipeline of transformers for text
            classification; or a callable of one text. By default the tone, counted by the grammar's
            words.
        positive_labels: for a pipeline, which of its labels are positive: adds a column
            `is_positive`.

    A pipeline gives the columns `label` and `score` of the likeliest label, the others one value.

    Raises:
        ValueError: none of these, no words, or a weight that is no finite number.
    """
    if sentiment is None:
        sentiment = tone
    if isinstance(sentiment, Mapping):
        weights = {word.strip().lower(): weight for word, weight in sentiment.items()}
        for word, weight in weights.items():
            finite_number(weight, f"weight of {word!r}")
        pattern = _whole_words(list(weights), case_sensitive=True)
        return lambda texts: [
            sum(weights[word] for word in pattern.findall(text.lower())) for text in texts
        ]
    if not callable(sentiment):
        raise ValueError(f"expected word weights, a pipeline or a callable, got {sentiment!r}")
    if not hasattr(sentiment, "task"):
        return lambda texts: [sentiment(text) for text in texts]

    positive = [positive_labels] if isinstance(positive_labels, str) else positive_labels

    def classify(texts: list[str]) -> pd.DataFrame:
        # A pipeline that was made with `top_k` gives a list of labels for each text.
        found = [
            max(row, key=lambda label: label["score"]) if isinstance(row, list) else row
            for row in sentiment(texts)
        ]
        frame = pd.DataFrame(found, columns=["label", "score"])
        if positive is not None:
            frame["is_positive"] = frame["label"].isin(list(positive))
        return frame

    return classify
