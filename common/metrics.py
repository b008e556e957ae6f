"""What is measured on a text: its tone, by the words of the embedded model's grammar.

The lexicon holds the words that this grammar uses for love and hate. On the embedded model that is nearly all there is;
on another model it misses most words that carry a tone, and shows a direction at best.
"""

import re
from collections.abc import Iterable
from functools import cache

from common.embedded import grammar

NEGATIONS = {"not", "never", "hardly", "no"}


@cache
def lexicon() -> dict[str, int]:
    """Return every word that carries a tone, in lower case, with +1 (positive) or -1 (negative)."""
    return grammar.lexicon()


def tone(text: str) -> int:
    """Count positive minus negative words; a negation up to two words before turns a word round."""
    words = re.findall(r"[a-z]+", text.lower())
    score = 0
    for index, word in enumerate(words):
        turned = any(earlier in NEGATIONS for earlier in words[max(0, index - 2) : index])
        score += lexicon().get(word, 0) * (-1 if turned else 1)
    return score


def tone_shares(texts: Iterable[str]) -> dict[str, float]:
    """Return which share of the texts is more positive than negative, more negative than positive, and neither.

    Raises:
        ValueError: there is no text.
    """
    tones = [tone(text) for text in texts]
    if not tones:
        raise ValueError("expected at least one text, got none")
    return {
        "positive": sum(t > 0 for t in tones) / len(tones),
        "negative": sum(t < 0 for t in tones) / len(tones),
        "neither": sum(t == 0 for t in tones) / len(tones),
    }
