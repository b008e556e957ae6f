"""What breaks a text for its reader at first sight, and whether it stays with its subject."""

import re
from collections.abc import Sequence

from embedded_model.subjects import KNOWN
from embedded_model.vocabulary import VOWEL_SOUND

# English says so: "I know that that is true", "she had had enough".
DOUBLED_RIGHTLY = {"that", "had"}
_FUNCTION_WORDS = (
    "a|an|the|and|or|but|because|of|to|in|on|at|by|for|with|from|than|as|is|are|was|were"
)
BREAKS = {
    "doubled word": re.compile(r"\b(\w+) \1\b", re.IGNORECASE),
    "lower case after a full stop": re.compile(r"[.!?] +[a-z]"),
    "double space": re.compile(r"  "),
    # An article at the very end is cut off, not broken.
    "dangling article": re.compile(
        rf"\b(?:an?|the)(?: ?[.,;:!?]| (?:{_FUNCTION_WORDS})\b)", re.IGNORECASE
    ),
    "a before a vowel": re.compile(rf"\b[Aa] (?:{VOWEL_SOUND})"),
    "an before a consonant": re.compile(rf"\b[Aa]n (?!{VOWEL_SOUND})[a-z]"),
}
_PRONOUNS = {
    "he": ("he", "him", "his"),
    "she": ("she", "her", "hers"),
    "it": ("it", "its"),
    "they": ("they", "them", "their"),
    "you": ("you", "your"),
}


def visible_breaks(text: str) -> list[str]:
    """Return which of `BREAKS` a text has, each once."""
    return [
        name
        for name, pattern in BREAKS.items()
        if any(
            name != "doubled word" or found[1].lower() not in DOUBLED_RIGHTLY
            for found in pattern.finditer(text)
        )
    ]


def has_break(texts: Sequence[str]) -> list[bool]:
    """Say which texts have a visible break: a metric for `sweep`, or of whole texts."""
    return [bool(visible_breaks(text)) for text in texts]


def stays_on(subject: str, completion: str) -> bool:
    """Say whether the next sentence is about a subject that was just announced.

    It is when it has the subject's pronoun, as the grammar gives it, or its noun.

    Args:
        subject: the name of one of the grammar's subjects, "my cousin".
        completion: what follows the announcement; its first sentence counts.
    """
    (pronoun,) = {known.pronoun for known in KNOWN if known.name == subject}
    first = re.split(r"(?<=[.!?])\s", completion.strip(), maxsplit=1)[0]
    words = re.findall(r"[a-z]+", first.lower())
    return any(word in words for word in (*_PRONOUNS[pronoun], subject.split()[-1]))
