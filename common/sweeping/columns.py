"""The columns that metrics add to a sweep: of completions, and of logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from common.measuring.metrics import Metric, measure
from common.sweeping.store import plain


class TextColumns:
    """Metrics of texts as columns; their titles are found by trying them on some texts.

    Args:
        metrics: by name; see `common.measuring.metrics`.
        trial: texts to try them on, as prompts and as completions.

    Raises:
        ValueError: a metric that does not give one number, truth value, text or None for each text.
    """

    def __init__(self, metrics: Mapping[str, Metric], trial: Sequence[str]):
        self.metrics = dict(metrics)
        self.titles = [title for title, _ in self._columns([(text, text) for text in trial])]

    def of(self, texts: Mapping[int, tuple[str, str]]) -> list[tuple[int, dict[str, Any]]]:
        """Return the metrics of numbered texts (prompt, completion), row by row.

        Raises:
            ValueError: a metric that gives something else than at its trial.
        """
        if not texts:
            return []
        columns = self._columns(list(texts.values()))
        if (found := [title for title, _ in columns]) != self.titles:
            raise ValueError(
                f"the metrics returned the columns {found}, and {self.titles} when they were tried"
                " on the prompts: expected the same"
            )
        rows = zip(*(values for _, values in columns)) if columns else ((),) * len(texts)
        return [(number, dict(zip(self.titles, row))) for number, row in zip(texts, rows)]

    def _columns(self, texts: list[tuple[str, str]]) -> list[tuple[str, list]]:
        return [
            column
            for name, metric in self.metrics.items()
            for column in _values(name, metric, texts)
        ]


def _values(name: str, metric: Metric, texts: list[tuple[str, str]]) -> list[tuple[str, list]]:
    """The columns of one metric, with their titles."""
    prompts, completions = [prompt for prompt, _ in texts], [text for _, text in texts]
    try:
        found = measure(metric, completions, name, prompts)
    except UnicodeEncodeError as error:  # pandas takes no half of a surrogate pair
        raise ValueError(
            f"the metric {name!r} of a text: expected a number or a text ({error})"
        ) from error
    columns = [
        (f"{name}_{column}" if column else name, list(values.to_numpy(dtype=object)))
        for column, values in found.items()
    ]
    for value in (value for _, values in columns for value in values):
        try:
            plain(value)
        except ValueError as error:
            raise ValueError(f"the metric {name!r} of a text: {error}") from None
    return columns


def numbers(values: Any, count: int, name: str) -> list[float]:
    """Return one number for each row, from what a metric of logits gave.

    Raises:
        ValueError: it gave something else.
    """
    try:
        found = np.asarray(values.tolist() if isinstance(values, Tensor) else values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"the metric {name!r} returned {values!r}: expected one number for each row"
        ) from None
    if found.shape != (count,):
        raise ValueError(
            f"the metric {name!r} returned values of shape {found.shape} for {count} rows: expected"
            " one number for each"
        )
    return found.tolist()
