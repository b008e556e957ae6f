"""A KV cache that is as long as it will be from the start."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """One layer of a KV cache that is as long as it will be from the start: a new token is written, and nothing copied."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [batch, head, pos, d_head], and return all."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        mine = not start or (
            bool(self.buffers) and self.keys.data_ptr() == self.buffers[0].data_ptr()
        )
        if (
            end > self.length or not mine
        ):  # no room left, or other rows were put in place, as beam search does
            return super().update(key_states, value_states, *args, **kwargs)
        if not start:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [
                new.new_empty(*new.shape[:2], self.length, new.shape[3])
                for new in (key_states, value_states)
            ]
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def write(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Replace what some rows [n] hold by keys and values [n, head, pos, d_head]; all positions."""
        self.keys[rows], self.values[rows] = keys, values


def reserved_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """Return a KV cache for texts of up to `length` tokens that does not copy itself at each new token.

    It pays for large batches of a small model. Layers of another kind (sliding windows) stay what
    they are.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [
        ReservedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
