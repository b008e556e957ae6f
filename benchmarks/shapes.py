"""Models of known shapes with random weights, and prompts: cost does not depend on what is learned.

It imports nothing from this project, since the peers run it in their own environment.
"""

import random
import zlib

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SHAPES = {
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
    "gpt2-small": {"n_layer": 12, "n_embd": 768, "n_head": 12},
}
WORDS = [f"w{number}" for number in range(1000)]


def random_gpt2(shape: str | dict[str, int]) -> GPT2LMHeadModel:
    """Build a GPT-2 from its config, in fp32 on the CPU, with random weights from a seed.

    It is made in place, without a second copy, and is the same in every version of transformers.

    Args:
        shape: a name in `SHAPES`, or the settings of a config.
    """
    config = GPT2Config(**SHAPES[shape] if isinstance(shape, str) else shape)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if weight.ndim == 2:
                weight.normal_(std=0.02, generator=generator)
            else:  # a bias, or the scale of a layer norm
                weight.fill_(float(name.endswith("weight")))
        for (
            name,
            buffer,
        ) in model.named_buffers():  # transformers 4 keeps the causal mask as a buffer
            if name.endswith(".bias"):
                size = buffer.shape[-1]
                buffer.copy_(torch.tril(torch.ones(size, size, dtype=buffer.dtype)).view_as(buffer))
    model.generation_config.pad_token_id = config.eos_token_id
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for which each word of `WORDS` is one token, so lengths are known."""
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: index for index, word in enumerate([*WORDS, "[PAD]"])}, unk_token="[PAD]"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Without the names of its inputs, transformers 4 adds token types, which GPT-2 adds to its
    # embeddings.
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[PAD]", model_input_names=inputs
    )


def random_pairs(count: int, tokens: int) -> list[tuple[str, str]]:
    """Return contrast pairs of random words, all prompts different and of the same length."""
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(WORDS, k=tokens)) for _ in range(2 * count)]
    return list(zip(prompts[::2], prompts[1::2]))
