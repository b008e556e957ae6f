"""Prompts of different lengths in one batch, padded on the left."""

from collections.abc import Sequence

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from common.passes.prompts import Prompt, prompt_ids


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], prepend_bos: bool | None = True
) -> BatchEncoding:
    """Tokenize prompts, texts or messages, into one batch, padded on the left; the tokenizer needs no pad token.

    What stands in front is decided by the rule of `prompts.prompt_ids`: by default one BOS where
    the tokenizer has one.

    Raises:
        ValueError: a prompt without tokens, or what `prompt_ids` raises.
    """
    rows = prompt_ids(tokenizer, prompts, prepend_bos)
    if not all(rows):
        raise ValueError("expected prompts of one token or more, got an empty one")
    return left_padded(tokenizer, rows)


def left_padded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> BatchEncoding:
    """Put rows of token ids, each of one or more, into one batch."""
    pad = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    length = max(map(len, rows))
    ids = torch.tensor([[*[pad] * (length - len(row)), *row] for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return BatchEncoding({"input_ids": ids, "attention_mask": mask})
