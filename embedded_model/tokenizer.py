"""The tokenizer of the embedded model: byte-level BPE whose merges are learnt from the grammar.

The words that the grammar uses often, and all words that carry a tone, are single tokens, with and
without a space and, where they carry a tone, in both cases. Everything else falls to pieces. The
merges alone lead to all of this, so that any engine that reads GPT-2's tokenizer splits text alike.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
MODEL_INPUTS = ["input_ids", "attention_mask"]
SPACE = "\u0120"  # how byte-level BPE writes a leading space
# Lower-case "eiffel" stays in two pieces, as rare words do. " Rome" in "The Eiffel Tower is in
# Rome" and " tower" in "To see the eiffel tower" are then both the sixth token, and an addition
# made from the one lands on the other.
SPLIT_WORDS = {" eiffel": "iffel"}


def build_tokenizer(forms: Iterable[str], n_positions: int) -> PreTrainedTokenizerFast:
    """Learn the merges that make whole tokens of the forms given.

    Args:
        forms: Words as they stand in a text, mostly with their space in front.
        n_positions: The longest text that the model takes, in tokens.
    """
    forms = sorted({SPLIT_WORDS.get(form, form) for form in forms})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # more than there is to merge: every form becomes whole
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(forms, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
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
