"""A GPT-2 with its tokenizer as a GGUF file, the format of llama.cpp.

A model whose bias holds a steering vector is written like any other: llama.cpp then needs no
control vector, and steers after block 0 too.
"""

import itertools
import json
import os
from typing import Any, NamedTuple, cast

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from common.passes.hooks import users_hooks
from common.vectors.files import write_whole
from common.vectors.steering_vector import model_name

# What llama.cpp computes for the architecture "gpt2"; a config that says otherwise is refused.
COMPUTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
# The same for its tokenizer "gpt2" with the pre-tokenizer "gpt-2", by the keys of tokenizer.json.
SPLITTER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
MERGER = {"type": ("BPE",), "dropout": (None,)}
MERGER |= dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), (None, ""))
MERGER |= dict.fromkeys(("byte_fallback", "ignore_merges"), (False,))
# Names at which llama.cpp's src/llama-vocab.cpp lets special tokens take the spaces beside them.
RENAMED = ("phi-3", "phi3", "modern-bert")


def save_model_gguf(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    overwrite: bool = False,
) -> None:
    """Write a GPT-2 and its tokenizer to a GGUF file that llama.cpp runs.

    All weights are written in float32, whatever their dtype. Steering that is in the weights (a
    bias) is written with them; steering by hooks is not in the weights, and refused.

    llama.cpp gives the ids of the tokenizer where it is told to read special tokens as such, as
    transformers does: `parse_special`, in llama-cpp-python `special=True`. Its logits differ by
    more than rounding, because on a CPU it looks the activation function up in a table of 16 bits.

    Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format; the names of
    tensors are those of the `gguf` package.

    Args:
        model: a `GPT2LMHeadModel`, on any device; it is not changed.
        tokenizer: its tokenizer, byte-level BPE like GPT-2's own.
        path: where to, for example "embedded.gguf".
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: there is a file, and `overwrite` is False; it is kept.
        ValueError: no GPT-2; one that computes what llama.cpp's does not, that has hooks, replaced
            modules, or weights that are quantised or offloaded; a tokenizer that is not byte-level
            BPE as GPT-2's, that has no end of text, or more tokens than the model.
    """
    weights = _weights(model)
    config = cast(GPT2Config, model.config)
    vocabulary = _vocabulary(tokenizer, config.vocab_size)

    def write(temporary: str) -> None:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
        writer.add_name(_name(model))
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        vocabulary.write(writer)
        for name, weight in weights.items():
            writer.add_tensor(name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(path, overwrite, write)


def _name(model: nn.Module) -> str:
    """Return the name of a model, unless llama.cpp would read special tokens otherwise for it."""
    name = model_name(model)
    return name if name and not any(part in name.lower() for part in RENAMED) else "GPT-2"


def _weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the weights in float32 by their names in GGUF, a matrix as [out, in].

    Raises:
        ValueError: see `save_model_gguf`.
    """
    checked = _checked(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, checked.config.n_layer)
    found = {}
    for name, weight in checked.state_dict().items():
        if weight.is_meta or not weight.is_floating_point() or weight.element_size() == 1:
            raise ValueError(f"{name} is quantised or offloaded: expected numbers in memory")
        weight = weight.float()
        if not torch.isfinite(weight).all():
            raise ValueError(f"expected finite weights, got nan or inf in {name}")
        if isinstance(checked.get_submodule(name.rpartition(".")[0]), Conv1D) and weight.dim() == 2:
            weight = weight.T  # Conv1D keeps [in, out]
        new = cast(str, names.get_name(name, try_suffixes=(".weight", ".bias")))
        found[new] = weight.cpu().contiguous().numpy()
    return found


def _checked(model: nn.Module) -> GPT2LMHeadModel:
    """Return a model whose weights say all that it computes, and that llama.cpp computes alike.

    Raises:
        ValueError: see `save_model_gguf`.
    """
    if not isinstance(model, GPT2LMHeadModel):
        raise ValueError(
            f"expected a GPT2LMHeadModel, got a {type(model).__name__}: llama.cpp's own"
            " convert_hf_to_gguf.py writes other models"
        )
    for entry, expected in COMPUTED.items():
        if (given := getattr(model.config, entry)) not in expected:
            raise ValueError(
                f"llama.cpp runs a GPT-2 with {entry}={expected[0]!r}; this one has {given!r}"
            )
    for path, module in model.named_modules():
        for hook in users_hooks(module):
            raise ValueError(
                f"{path or 'the model'} has a hook, {hook!r}, which no file holds: take it off, and"
                " steer by a control vector (SteeringVector.save_gguf) or by a bias"
                " (bias_editing.ipynb)"
            )
    with torch.device("meta"):
        plain = GPT2LMHeadModel(model.config).state_dict()
    shapes, expected = (
        {(name, tuple(weight.shape)) for name, weight in state.items()}
        for state in (model.state_dict(), plain)
    )
    if shapes != expected:
        name, shape = min(shapes ^ expected)
        raise ValueError(
            f"expected the weights of a GPT2LMHeadModel, but a module was replaced: see {name}"
            f" {list(shape)}"
        )
    return model


class _Vocabulary(NamedTuple):
    """What GGUF holds of a tokenizer.

    Attributes:
        tokens: by id; a byte is written as the letter that byte-level BPE has for it.
        types: of each token, a `gguf.TokenType`.
        merges: pairs of tokens with a space between, the most important first.
        ids: those of special tokens: "bos", "eos", "pad".
        adds: whether the tokenizer puts "bos" and "eos" around a text.
        template: of chats, where it has one.
    """

    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    ids: dict[str, int]
    adds: dict[str, bool]
    template: str | None

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add it to a file that is being written."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.ids["bos"])
        writer.add_eos_token_id(self.ids["eos"])
        writer.add_pad_token_id(self.ids["pad"])
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.template:
            writer.add_chat_template(self.template)


def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> _Vocabulary:
    """Return what GGUF holds of a tokenizer, for a model that has `size` tokens.

    Raises:
        ValueError: see `save_model_gguf`.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise ValueError(f"expected a fast tokenizer, got a {type(tokenizer).__name__}")
    parts = json.loads(backend.to_str())
    _check_parts(parts)
    if tokenizer.eos_token_id is None:
        raise ValueError("expected a tokenizer with an end of text: llama.cpp would take token 11")
    end = cast(int, tokenizer.eos_token_id)
    ids = {"eos": end}
    for name, number in {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id}.items():
        ids[name] = end if number is None else cast(int, number)
    added = {token["id"]: token for token in parts["added_tokens"]}
    texts = {number: text for text, number in parts["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts) >= size:
        raise ValueError(f"token {max(texts)} of the tokenizer is beyond the model's {size} tokens")
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    types |= {number: kinds[token["special"]] for number, token in added.items()}
    merges = parts["model"]["merges"]
    unused = "[PAD"
    while any(text.startswith(unused) for text in texts.values()):
        unused = f"[{unused}"
    return _Vocabulary(
        tokens=[texts.get(number, f"{unused}{number}]") for number in range(size)],
        types=[types.get(number, gguf.TokenType.UNUSED) for number in range(size)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        ids=ids,
        adds=_adds(tokenizer),
        template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
    )


def _check_parts(parts: dict[str, Any]) -> None:
    """Refuse a tokenizer, as the contents of its tokenizer.json, that llama.cpp does not have.

    Raises:
        ValueError: it says which part.
    """
    merger, splitter = parts["model"], {"use_regex": True, **(parts["pre_tokenizer"] or {})}
    for key, expected in MERGER.items():
        if (given := merger.get(key, expected[0])) not in expected:
            raise _other_tokenizer(key, given, expected[0])
    for key, value in SPLITTER.items():
        if splitter.get(key) != value:
            raise _other_tokenizer(f"pre-tokenizer {key}", splitter.get(key), value)
    if parts["normalizer"] is not None:
        raise _other_tokenizer("normalizer", parts["normalizer"]["type"], None)
    if missing := sorted(set(ByteLevel.alphabet()) - merger["vocab"].keys()):
        raise _other_tokenizer("the letters of some bytes", f"without {missing[0]!r}", "all 256")
    for token in parts["added_tokens"]:
        for key in ("single_word", "lstrip", "rstrip"):
            if token[key]:
                raise _other_tokenizer(f"{key} of {token['content']!r}", True, False)
    if overlap := _overlap(parts["added_tokens"]):
        raise _other_tokenizer("added tokens that overlap", overlap, None)


def _overlap(added: list[dict[str, Any]]) -> tuple[str, str] | None:
    """Return two added tokens of which a text may hold parts at once, or None.

    llama.cpp finds the longest one first; transformers those that are not normalised, as special
    ones are, and of these the leftmost.
    """
    for one, other in itertools.permutations(added, 2):
        left, right = one["content"], other["content"]
        shared = range(1, min(len(left), len(right)))
        is_row = len({*left, *right}) == 1  # of one letter, which both take from the left
        if not is_row and any(left.endswith(right[:size]) for size in shared):
            return left, right
        if right in left and one["normalized"] and not other["normalized"]:
            return left, right
    return None


def _other_tokenizer(part: str, given: object, expected: object) -> ValueError:
    return ValueError(
        f"expected a byte-level BPE tokenizer like GPT-2's, with {part}: {expected!r}; this one"
        f" has {given!r}, and llama.cpp would give other ids"
    )


def _adds(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Say whether a tokenizer puts BOS before a text, and its end after it, by trying."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            before, after = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
            if whole == [*before, *inside, *after]:
                return {"bos": bos, "eos": eos}
    raise ValueError(
        f"expected a tokenizer that adds BOS, the end of text or nothing to 'a', which is {inside};"
        f" this one gives {whole}"
    )
