"""Contrast pairs from the data that users have: tables, data sets, files."""

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from common.passes.prompts import Prompt, is_prompt
from common.vectors.pairs import SteeringVectorTrainingSample

UTF_8 = "utf-8-sig"  # with or without the mark that Excel puts in front


def pairs_from(
    source: pd.DataFrame | Iterable[Mapping[str, Any]] | str | os.PathLike,
    positive: str = "positive",
    negative: str = "negative",
    *,
    prompt: str | None = None,
    chat: bool = False,
) -> list[SteeringVectorTrainingSample]:
    """Read contrast pairs from a table.

    The layout of contrastive activation addition (https://arxiv.org/abs/2312.06681), a question
    with an answer that matches the behaviour and one that does not, is

        pairs_from("refusal.json", "answer_matching_behavior",
                   "answer_not_matching_behavior", prompt="question")

    where an answer is " (A)": with `read_token_index=-2` its letter is read, as published.

    Args:
        source: a table of pandas, a data set of Hugging Face `datasets`, any iterable of mappings,
            or the path of a file in UTF-8: `.csv`, `.jsonl` (an object a line), `.json` (a list of
            objects).
        positive: the column of the positive side: texts, or messages for a chat model.
        negative: the column of the negative side.
        prompt: a column with what comes before both sides. A text is put in front as it is, with no
            blank between; after messages the side is the answer of the assistant.
        chat: make messages of a prompt that is a text: the user says it, the assistant answers.

    Returns:
        One sample for each row, for `train_steering_vector`.

    Raises:
        ValueError: no rows, a column that is missing, something that is no prompt, `chat` without a
            prompt, or another kind of file; of a `.csv`, a column that is there twice, a row with
            more or fewer fields than there are columns, or a field of over 131072 characters.
    """
    if chat and prompt is None:
        raise ValueError("expected the column of a prompt, which the user says in a chat")
    names, samples = (positive, negative, *([] if prompt is None else [prompt])), []
    for number, row in enumerate(_rows(source)):
        for name in names:
            if not isinstance(row, Mapping) or name not in row:
                found = ", ".join(map(str, row)) if isinstance(row, Mapping) else repr(row)
                raise ValueError(f"row {number}: expected a column {name!r}, got {found}")
            if not is_prompt(row[name]) or not row[name]:
                raise ValueError(
                    f"row {number}: expected a text or messages in {name!r}, got {row[name]!r}"
                )
        before = None if prompt is None else row[prompt]
        one, other = (_side(before, row[name], chat, number) for name in (positive, negative))
        samples.append(SteeringVectorTrainingSample(one, other))
    if not samples:
        raise ValueError("expected one pair or more, got none")
    return samples


def _rows(source: Any) -> Iterable[Any]:
    if isinstance(source, pd.DataFrame):
        return source.to_dict("records")
    if not isinstance(source, str | os.PathLike):
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise ValueError(f"expected a table, rows or a path, got {source!r}")
        return source
    path = Path(source)
    if path.suffix == ".csv":
        return _csv_rows(path)
    text = path.read_text(encoding=UTF_8) if path.suffix in (".json", ".jsonl") else ""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if path.suffix == ".json" and isinstance(found := json.loads(text), list):
        return found
    raise ValueError(f"expected a .csv, a .jsonl or a .json with a list, got {path}")


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, as texts.

    pandas takes surplus fields in front for an index, which would shift the columns.
    """
    with path.open(encoding=UTF_8, newline="") as file:
        reader = csv.DictReader(file)
        try:
            names, rows = list(reader.fieldnames or []), list(reader)
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from None
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"{path}: the column {twice[0]!r} is there twice")
    for number, row in enumerate(rows):
        if None in row or None in row.values():  # fields too many, and too few
            raise ValueError(
                f"row {number}: expected {len(names)} fields, {', '.join(names)}, got"
                f" {list(row.values())}; a text with a comma needs quotation marks around it"
            )
    return rows


def _side(before: Prompt | None, side: Prompt, chat: bool, number: int) -> Prompt:
    """One side of a pair, after what comes before it."""
    if before is None:
        return side
    if not isinstance(side, str):
        raise ValueError(f"row {number}: expected a text after a prompt, got {side!r}")
    if isinstance(before, str) and not chat:
        return before + side
    said = [{"role": "user", "content": before}] if isinstance(before, str) else list(before)
    return [*said, {"role": "assistant", "content": side}]
