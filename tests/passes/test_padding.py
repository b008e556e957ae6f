"""Padding: rows of token ids in one batch, as the tokenizer pads where it has a pad token."""

import copy

import pytest
import torch
from odd_tokenizers import gpt2

from common.passes.padding import pad_id, padded

ROWS = [[5, 9, 3], [7], [4, 4, 8, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_as_the_tokenizer_pads_them(tokenizer, side):
    """Ids and mask, both int64."""
    wanted = tokenizer.pad({"input_ids": ROWS}, padding_side=side, return_tensors="pt")
    found = padded(ROWS, pad_id(tokenizer), side)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_a_pad_token_the_end_of_text_pads():
    """And 0 where there is none either."""
    tokenizer = gpt2()
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0


def test_pad_token_0_pads(tokenizer):
    """It is an id like others, and not the absence of one."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.convert_ids_to_tokens(0)
    other.eos_token = other.convert_ids_to_tokens(5)
    assert other.pad_token_id == 0 and pad_id(other) == 0
