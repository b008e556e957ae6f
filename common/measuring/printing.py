"""Completions below each other, the words marked that carry a tone: for the eye of a reader."""

from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from common.measuring.tone import mark_tone

LEGEND = "▲ counts as positive, ▼ as negative; after a negation a word counts the other way."
NARROWEST = 20  # columns for the texts


def print_texts(
    prompts: Sequence[str], texts: Mapping[str, Sequence[str]], width: int = 100
) -> None:
    r"""Print each prompt and below it its completions, the words marked that carry a tone.

    Whatever a text holds, the lines stay in their columns: characters that are not seen, or that
    would break a line, are written as in a string of Python (`\n`, `\xa0`).

    Args:
        prompts: what was completed.
        texts: the completions, one of each prompt, by what was done.
        width: of the longest line, in columns.

    Raises:
        ValueError: there are more or fewer completions than prompts, one text is given instead of a
            list, or the width leaves less than 20 columns for the texts.
    """
    for what, given in {"prompts": prompts, **texts}.items():
        if isinstance(given, str):
            raise ValueError(f"expected a list of texts as {what!r}, got the text {given!r}")
    for label, several in texts.items():
        if len(several) != len(prompts):
            raise ValueError(
                f"expected one text of {label!r} for each of the {len(prompts)} prompts, got"
                f" {len(several)}"
            )
    labels = {label: _escaped(label) for label in texts}
    first = max(map(cell_len, labels.values()), default=0) + 4  # the column where the texts begin
    if width - first < NARROWEST:
        raise ValueError(f"expected a width of at least {first + NARROWEST}, got {width}")
    print(LEGEND)
    for number, prompt in enumerate(prompts):
        print()
        print(*_wrapped(repr(prompt), width), sep="\n")
        for label, several in texts.items():
            margin = f"  {labels[label]}"
            for line in _wrapped(_visible(mark_tone(several[number])), width - first):
                print(margin + " " * (first - cell_len(margin)) + line)
                margin = ""


def _escaped(text: str) -> str:
    """Write what is not seen as an escape, and the backslash too, so that nothing is ambiguous."""
    return "".join(
        sign if sign.isprintable() and sign != "\\" else repr(sign)[1:-1] for sign in text
    )


def _visible(text: str) -> str:
    """Write a text so that it is seen, even an empty one."""
    return _escaped(text).strip(" ") or "(nothing)"


def _wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines; a word that is too long is broken, a wide character counts two."""
    lines = Text(text).wrap(Console(width=width), width, overflow="fold")
    return [line.plain.rstrip() for line in lines]
