"""A GGUF file of a GPT-2, run and read by nothing that wrote it: what llama.cpp does, in PyTorch.

Its computation is that of llama.cpp's src/models/gpt2.cpp, with an exact activation function.
"""

from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional


class GGUFModel:
    """The numbers and the tokenizer of a file.

    Attributes:
        weights: by their names in the file.
    """

    def __init__(self, path: Path):
        self.reader = gguf.GGUFReader(path)
        self.weights = {
            tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in self.reader.tensors
        }

    def field(self, key: str) -> Any:
        """Return an entry of the header, None if it is not there."""
        found = self.reader.get_field(key)
        return None if found is None else found.contents()

    def logits(self, ids: list[int]) -> Tensor:
        """Return the logits [pos, vocab] of a text."""
        heads, width = self.field("gpt2.attention.head_count"), self.field("gpt2.embedding_length")
        embedded = self.weights["token_embd.weight"][ids]
        hidden = embedded + self.weights["position_embd.weight"][: len(ids)]  # [pos, d_model]
        for block in range(self.field("gpt2.block_count")):
            read = self._linear(
                self._norm(hidden, f"blk.{block}.attn_norm"), f"blk.{block}.attn_qkv"
            )
            query, key, value = (
                part.view(len(ids), heads, -1).transpose(0, 1) for part in read.split(width, dim=-1)
            )
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            mixed = mixed.transpose(0, 1).reshape(len(ids), width)
            hidden = hidden + self._linear(mixed, f"blk.{block}.attn_output")
            inner = self._linear(self._norm(hidden, f"blk.{block}.ffn_norm"), f"blk.{block}.ffn_up")
            inner = functional.gelu(inner, approximate="tanh")
            hidden = hidden + self._linear(inner, f"blk.{block}.ffn_down")
        return self._norm(hidden, "output_norm") @ self.weights["output.weight"].T

    def _linear(self, hidden: Tensor, name: str) -> Tensor:
        return functional.linear(
            hidden, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        )

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        epsilon = self.field("gpt2.attention.layer_norm_epsilon")
        return functional.layer_norm(hidden, weight.shape, weight, bias, epsilon)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, special tokens read as such."""
        tokens = self.field("tokenizer.ggml.tokens")
        types = self.field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.add_special_tokens(
            [token for token, kind in zip(tokens, types) if kind == gguf.TokenType.CONTROL]
        )
        made.add_tokens(
            [token for token, kind in zip(tokens, types) if kind == gguf.TokenType.USER_DEFINED]
        )
        ids = made.encode(text, add_special_tokens=False).ids
        if self.field("tokenizer.ggml.add_bos_token"):
            ids = [self.field("tokenizer.ggml.bos_token_id"), *ids]
        if self.field("tokenizer.ggml.add_eos_token"):
            ids = [*ids, self.field("tokenizer.ggml.eos_token_id")]
        return ids
