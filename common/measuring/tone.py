"""The tone of texts: how many more positive words than negative ones they have.

It is counted by the words of the embedded model's grammar (`embedded/lexicon.json`). On that model
this is nearly all there is; on another one it misses most words that carry a tone, and shows a
direction at best.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.embedded import FOLDER
from common.passes.padding import encode
from common.passes.prompts import Prompt, prompt_text
from common.passes.running import input_device
from common.texts.generation import completions, generate

NEGATIONS = {"not", "never", "hardly", "no"}


@cache
def lexicon() -> dict[str, int]:
    """Return every word that carries a tone, in lower case, with +1 (positive) or -1 (negative)."""
    return json.loads((FOLDER / "lexicon.json").read_text(encoding="utf-8"))


def tone_words(text: str) -> list[tuple[int, int]]:
    """Return where each word that carries a tone begins, and what it counts: +1 or -1.

    A negation up to two words before, in the same sentence, reverses a word.
    """
    counted = []
    for sentence in re.finditer("[^.!?]+", text):
        found = re.finditer("[A-Za-z]+", sentence[0])
        words = [(sentence.start() + word.start(), word[0].lower()) for word in found]
        for index, (start, word) in enumerate(words):
            if value := lexicon().get(word):
                before = [earlier for _, earlier in words[max(0, index - 2) : index]]
                counted.append((start, value if NEGATIONS.isdisjoint(before) else -value))
    return counted


def tone(text: str) -> int:
    """Count positive minus negative words, as `tone_words` counts them."""
    return sum(value for _, value in tone_words(text))


def mark_tone(text: str) -> str:
    """Write ▲ before each word that `tone` counts as positive, ▼ before each negative one."""
    marked, end = "", 0
    for start, value in tone_words(text):
        marked, end = marked + text[end:start] + ("▲" if value > 0 else "▼"), start
    return marked + text[end:]


def tone_sign(texts: Iterable[str]) -> list[int]:
    """Return 1 for each text that is more positive than negative, -1 for the reverse, else 0.

    Raises:
        ValueError: a single text, whose letters would be counted.
    """
    if isinstance(texts, str):
        raise ValueError(f"expected a list of texts, got the text {texts!r}")
    return [(score > 0) - (score < 0) for score in map(tone, texts)]


def tone_shares(texts: Iterable[str]) -> dict[str, float]:
    """Return the shares of the texts that are more positive, more negative, and neither.

    Raises:
        ValueError: there is no text.
    """
    signs = tone_sign(texts)
    if not signs:
        raise ValueError("expected at least one text, got none")
    return {
        name: signs.count(sign) / len(signs)
        for name, sign in (("positive", 1), ("negative", -1), ("neither", 0))
    }


def tone_by_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conditions: Mapping[str, AbstractContextManager],
    prompts: Sequence[Prompt],
    per_prompt: int = 20,
    max_new_tokens: int = 24,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """Sample completions (top_p 0.9) of each prompt under each condition, and take their mean tone.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        conditions: what is open while it generates, by name, for example `vector.apply(model)`;
            unsteered is added.
        prompts: each is completed `per_prompt` times, all in one batch.
        per_prompt: completions of each prompt.
        max_new_tokens: length of a completion.
        seed: set again for each condition, so that they differ by the steering only.
        prepend_bos: what stands in front of a text: by default what the tokenizer puts there; see
            `prompts.prompt_ids`.

    Returns:
        [condition, prompt]: the share of positive minus that of negative completions, from -1 to 1.
    """
    inputs = encode(tokenizer, list(prompts) * per_prompt, prepend_bos).to(input_device(model))
    rows = {}
    for name, condition in {"unsteered": nullcontext(), **conditions}.items():
        torch.manual_seed(seed)
        with condition:
            ids = generate(model, inputs, do_sample=True, top_p=0.9, max_new_tokens=max_new_tokens)
        texts = completions(tokenizer, inputs, ids)
        shares = [tone_shares(texts[number :: len(prompts)]) for number in range(len(prompts))]
        rows[name] = [share["positive"] - share["negative"] for share in shares]
    return pd.DataFrame(
        rows, index=[prompt_text(tokenizer, prompt) for prompt in prompts]
    ).T.rename_axis(index="condition", columns="prompt")


def moves(tones: pd.DataFrame) -> pd.DataFrame:
    """Say how far each condition moved the tone of what `tone_by_prompt` found.

    Returns:
        By condition: `moved` (mean over the prompts, from -2 to 2), `spread` (standard deviation
        over the prompts) and `wrong way` (the share of prompts that moved against the mean).
    """
    moved = tones.drop("unsteered") - tones.loc["unsteered"]
    mean = moved.mean(axis=1)
    wrong = moved.mul(mean.map(lambda value: -1 if value < 0 else 1), axis=0) < 0
    return pd.DataFrame(
        {"moved": mean, "spread": moved.std(axis=1), "wrong way": wrong.mean(axis=1)}
    )
