"""Which position a token has, from the attention mask.

Notation: `attention_mask` is 1 at real tokens and 0 at padding, shape [batch, pos].
"""

from collections.abc import Mapping

from torch import Tensor


def position_ids(attention_mask: Tensor) -> Tensor:
    """Number the real tokens of every row from 0, so that padding on the left does not move them.

    A plain forward pass of GPT-2 numbers the columns instead: the first real token of a row with three padding tokens
    gets position 3, and its logits are off by several units. `model.generate` does this by itself.

    Args:
        attention_mask: [batch, pos], integer or bool.

    Returns:
        [batch, pos], int64. Padding gets position 0, which nothing attends to.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def with_position_ids(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the tokenizer gave, with `position_ids` [batch, pos] counted from the attention mask."""
    return {**inputs, "position_ids": position_ids(inputs["attention_mask"])}
