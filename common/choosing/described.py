"""Metrics as a job describes them."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from common.measuring.logit_metrics import ab_metric
from common.measuring.metrics import get_sentiment_metric
from common.measuring.tone import tone_sign

EXPECTED = (
    "expected as metric 'tone', {words = {good = 1, bad = -1}}, {answers = ['Yes', 'No']}, or"
    " 'file.py:function'"
)


class Described(NamedTuple):
    """A metric, and whether it is of the next token."""

    metric: Any
    next_token: bool


def metric_of(given: Any, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Described:
    """Return a metric that a job describes.

    Args:
        given: "tone" (positive or negative, by the words of the embedded model); {words = …}, what
            each counts; {answers = [a, b]}, log p(a) - log p(b) as the next token; or a function of
            texts in a Python file, which is run.
        folder: where files are looked for.
        tokenizer: for answers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none of these, or no such function.
    """
    if given == "tone":
        return Described(tone_sign, False)
    if isinstance(given, Mapping) and len(given) == 1:
        if isinstance(words := given.get("words"), Mapping):
            return Described(get_sentiment_metric(words), False)
        if isinstance(answers := given.get("answers"), list) and len(answers) == 2:
            return Described(ab_metric(tokenizer, *answers), True)
    if isinstance(given, str) and given.count(".py:") == 1:
        file, name = given.split(".py:")
        if not (path := folder / f"{file}.py").is_file():
            raise FileNotFoundError(f"no file {str(path)!r}, in which the metric should be")
        if not callable(found := runpy.run_path(str(path)).get(name)):
            raise ValueError(f"expected a function {name!r} in {str(path)!r}, got {found!r}")
        return Described(found, False)
    raise ValueError(f"{EXPECTED}, got {given!r}")
