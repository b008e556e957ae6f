"""Small tokenizers that differ in how a prompt begins, of the classes of real models."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

TEXTS = [
    (
        "I think that they are the old garden. You love her; my neighbour hates Monday and the red"
        " bride."
    ),
    (
        "The quick brown fox jumps over the lazy dog: what is this? system user assistant INST"
        " /INST [ ]"
    ),
]
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _bpe(
    specials: list[str], pre: pre_tokenizers.PreTokenizer, alphabet: Sequence[str] = ()
) -> tuple[dict, list]:
    """Vocabulary and merges, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=list(alphabet),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    found = json.loads(tokenizer.to_str())["model"]
    return found["vocab"], [tuple(merge) for merge in found["merges"]]


def _byte_level(specials: list[str]) -> tuple[dict, list]:
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _bpe(specials, pre, sorted(pre_tokenizers.ByteLevel.alphabet()))


def llama() -> PreTrainedTokenizerBase:
    """Adds BOS; only the first word of a string gets a space; no pad token; chats with BOS."""
    vocab, merges = _bpe(["<unk>", "<s>", "</s>"], pre_tokenizers.Metaspace(prepend_scheme="first"))
    return LlamaTokenizer(vocab, merges, add_bos_token=True, chat_template=MISTRAL_CHAT)


def gemma() -> PreTrainedTokenizerBase:
    """Adds BOS; spaces become "▁" and none is put in front."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab, merges = _bpe(specials, pre_tokenizers.Metaspace(prepend_scheme="never"))
    return GemmaTokenizer(vocab, merges, add_bos_token=True)


def llama3() -> PreTrainedTokenizerBase:
    """Byte-level, with BOS from the post-processor; no pad token; its chat text has BOS."""
    bos, eos = specials = ["<|begin_of_text|>", "<|end_of_text|>"]
    vocab, merges = _byte_level(specials)
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(specials)
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token=eos,
        chat_template="{{ bos_token }}" + CHATML,
    )


def qwen() -> PreTrainedTokenizerBase:
    """Byte-level, without BOS; its chat text has none either."""
    vocab, merges = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = Qwen2Tokenizer(vocab, merges, chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def gpt2() -> PreTrainedTokenizerBase:
    """Byte-level, with a BOS that it does not add, and that also ends a text and pads."""
    end = "<|endoftext|>"
    vocab, merges = _byte_level([end])
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([end])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=end, eos_token=end, pad_token=end
    )


KINDS = {"Llama": llama, "Gemma": gemma, "Llama 3": llama3, "Qwen": qwen, "GPT-2": gpt2}
CHAT = ("Llama", "Llama 3", "Qwen")
