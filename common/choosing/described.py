"""Metrics as a job describes them."""

import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.measuring.logit_metrics import ab_metric
from common.measuring.metrics import get_sentiment_metric
from common.measuring.tone import tone_sign

EXPECTED = (
    "expected as metric 'tone', {words = {good = 1, bad = -1}}, {answers = ['Yes', 'No']}, or"
    " 'file.py:function'"
)


def metric_of(given: Any, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Callable:
    """Return a metric that a job describes.

    Args:
        given: "tone" (positive or negative, by the words of the embedded model); {words = …}, what
            each counts; {answers = [a, b]}, log p(a) - log p(b) as the next token; or a function of
            texts, or of logits, in a Python file, which is run.
        folder: where files are looked for.
        tokenizer: for answers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none of these, or no such function.
    """
    if given == "tone":
        return tone_sign
    if isinstance(given, Mapping) and len(given) == 1:
        if isinstance(words := given.get("words"), Mapping):
            return get_sentiment_metric(words)
        if isinstance(answers := given.get("answers"), list) and len(answers) == 2:
            return ab_metric(tokenizer, *answers)
    if isinstance(given, str) and given.count(".py:") == 1:
        file, name = given.split(".py:")
        if not (path := folder / f"{file}.py").is_file():
            raise FileNotFoundError(f"no file {str(path)!r}, in which the metric should be")
        if not callable(found := runpy.run_path(str(path)).get(name)):
            raise ValueError(f"expected a function {name!r} in {str(path)!r}, got {found!r}")
        return found
    raise ValueError(f"{EXPECTED}, got {given!r}")
