"""The tokenizer of the embedded model: byte-level BPE in which the grammar's words are tokens.

Every word is in the vocabulary twice, with and without its leading space, so that the tokens of a
text do not depend on a word's rarity. All other text falls back to bytes, so anything at all can be
tokenised and read back.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
MODEL_INPUTS = ["input_ids", "attention_mask"]
SPACE = "\u0120"  # how byte-level BPE writes a leading space
# Lower-case "eiffel" stays in two pieces, as rare words do. " Rome" in "The Eiffel Tower is in
# Rome" and " tower" in "To see the eiffel tower" are then both the sixth token, and an addition
# made from the one lands on the other.
SPLIT_WORDS = {"eiffel"}
MERGES = [("i", "f"), ("f", "e"), ("fe", "l"), ("if", "fel"), (SPACE, "e")]


def build_tokenizer(words: list[str], n_positions: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer from the words that will be whole tokens.

    Args:
        words: Words without their space, as the grammar writes them.
        n_positions: The longest text that the model takes, in tokens.
    """
    pieces = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += ["".join(pair) for pair in MERGES]
    pieces += [form for word in words if word not in SPLIT_WORDS for form in (word, SPACE + word)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    # ignore_merges: a word of the vocabulary is taken whole, without a chain of merges that leads
    # up to it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=n_positions,
        clean_up_tokenization_spaces=False,
        model_input_names=MODEL_INPUTS,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, so that transformers 4 and 5 load them."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = (
        "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4 does not know
    )
    # Else transformers 4 returns token_type_ids as well, and GPT-2 adds the embedding of token 0 to
    # all others.
    config["model_input_names"] = MODEL_INPUTS
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
