"""Prompts of different lengths in one batch."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedTokenizerBase

from common.passes.prompts import Prompt, prompt_ids


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], prepend_bos: bool | None = True
) -> BatchEncoding:
    """Tokenize prompts, texts or messages, into one batch, padded on the left.

    The tokenizer needs no pad token. `prompts.prompt_ids` decides what comes first: by default one
    BOS where the tokenizer has one.

    Returns:
        `input_ids` and `attention_mask`, both [batch, pos], int64.

    Raises:
        ValueError: a prompt without tokens, or what `prompt_ids` raises.
    """
    rows = prompt_ids(tokenizer, prompts, prepend_bos)
    if not all(rows):
        raise ValueError("expected prompts of one token or more, got an empty one")
    return padded(rows, pad_id(tokenizer))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what to pad with: the pad token, else the end of text, else 0."""
    pad = tokenizer.pad_token_id
    return cast(int, pad if pad is not None else tokenizer.eos_token_id or 0)


def padded(
    rows: Sequence[Sequence[int]], pad: int = 0, side: Literal["left", "right"] = "left"
) -> BatchEncoding:
    """Put rows of token ids, each of one or more, into one batch.

    `tokenizer.pad` does the same where the tokenizer has a pad token; GPT-2's has none. On the
    right, padding needs no positions of its own: no token sees what comes after it.

    Returns:
        `input_ids` and `attention_mask`, both [batch, pos], int64.
    """

    def batch(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(sequences, True, value, side)

    ids = [torch.tensor(row) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return BatchEncoding({"input_ids": batch(ids, pad), "attention_mask": batch(mask, 0)})
