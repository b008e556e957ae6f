"""Writes the playground: one HTML file in which the embedded model is steered in a browser.

    python -m repository.playground [--out FILE]

The page (`site/playground`) is plain JavaScript. It is not translated, only put together: the
modules one after the other, the weights and the tokenizer as they are shipped, and what the library
and the grammar know, so that the page has no copy of it.
"""

import argparse
import ast
import base64
import inspect
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.colors import to_hex

from common.embedded import FOLDER
from common.measuring.tone import NEGATIONS, lexicon, tone_by_prompt
from common.plots import REVERSED, STEERED, UNSTEERED
from embedded_model import grammar, prompts, subjects, vocabulary

SOURCES = Path(__file__).resolve().parent.parent / "site" / "playground"
PAGE = SOURCES / "index.html"
TEMPLATE = "page.html"
TOP_P = 0.9  # as `tone_by_prompt` samples
FIRST_PROMPT = "In my opinion the baker is"  # one of the README's, neutral as long as none steers
_IMPORT = re.compile(r'^import [^;]*? from "\./([\w.]+)";\n', re.MULTILINE)
_DEFINED = re.compile(r"^(?:async )?(?:class|const|function\*?|let) (\w+)", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=async|class|const|function)", re.MULTILINE)


@cache
def taught_words(documents: int = 40_000) -> tuple[str, ...]:
    """Return the words that the grammar teaches, in lower case.

    They are those in its documents that also stand in its sources: the nouns that it makes up do
    not, and mean nothing.

    Args:
        documents: how many are read.
    """
    sources = " ".join(
        node.value
        for module in (grammar, subjects, vocabulary)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    named = words(sources)
    for nouns in subjects.NOUNS.values():
        named |= {word for noun in nouns.split() for word in subjects.plural_of(noun)}
    written = itertools.islice(grammar.documents(0), documents)
    return tuple(sorted(named & set().union(*map(words, written))))


def words(text: str) -> set[str]:
    """Return the words of a text, in lower case."""
    return {word.lower() for word in re.findall("[A-Za-z]+", text)}


def project() -> dict[str, Any]:
    """Collect what the page needs to know of the library, the model and its grammar."""
    preset = _stored("preset")
    signature = inspect.signature(tone_by_prompt).parameters
    return {
        "config": _stored("config"),
        "preset": {name: preset[name] for name in ("layer", "coeff")},
        "mapCoeffs": [round(preset["coeff"] * step / 2, 2) for step in range(-3, 4)],
        "topP": TOP_P,
        "newTokens": signature["max_new_tokens"].default,
        "lexicon": lexicon(),
        "negations": sorted(NEGATIONS),
        "taught": taught_words(),
        "prompts": [FIRST_PROMPT, *prompts.SHOWN_PROMPTS],
        "pairs": {
            "Words": prompts.VISITOR_WORDS,
            "Sentences": prompts.VISITOR_SENTENCES,
            "Controls without a tone": vocabulary.PAIRS,
        },
    }


def colours() -> str:
    """Return the colours of the library's pictures as variables of CSS."""
    named = {"love": STEERED, "hate": REVERSED, "unsteered": UNSTEERED}
    lines = "".join(f"  --{name}: {to_hex(colour)};\n" for name, colour in named.items())
    return f":root {{\n{lines}}}\n"


def bundle(name: str) -> str:
    """Put a module of JavaScript and all that it imports into one text, each once.

    Raises:
        ValueError: two of the modules give something the same name.
    """
    text = "".join(_modules(name, []))
    counts = Counter(_DEFINED.findall(text))
    if twice := sorted(defined for defined, count in counts.items() if count > 1):
        raise ValueError(f"expected every name once in {name} and what it imports, got {twice}")
    return text


def _modules(name: str, seen: list[str]) -> Iterator[str]:
    if name in seen:
        return
    seen.append(name)
    text = (SOURCES / name).read_text(encoding="utf-8")
    for imported in _IMPORT.findall(text):
        yield from _modules(imported, seen)
    yield f"// {name}\n{_EXPORT.sub('', _IMPORT.sub('', text))}\n"


def page() -> str:
    """Return the whole page.

    Raises:
        ValueError: the template has a slot that nothing fills, or a part would end its element.
    """
    weights = (FOLDER / "model.safetensors").read_bytes()
    parts = {
        "style": colours() + (SOURCES / "style.css").read_text(encoding="utf-8"),
        "page": bundle("page.js"),
        "worker": bundle("worker.js"),
        "project": _embedded_json(project()),
        "tokenizer": _embedded_json(_stored("tokenizer")),
        "weights": base64.b64encode(weights).decode("ascii"),
    }
    if ending := [name for name, part in parts.items() if re.search("</(?:script|style)", part)]:
        raise ValueError(f"expected no end of a script or style inside {ending}")
    template = (SOURCES / TEMPLATE).read_text(encoding="utf-8")
    slots = re.findall(r"<!-- (\w+) -->", template)
    if sorted(slots) != sorted(parts):
        raise ValueError(f"expected the slots {sorted(parts)} once each, got {sorted(slots)}")
    return re.sub(r"<!-- (\w+) -->", lambda slot: parts[slot[1]], template)


def _stored(name: str) -> Any:
    """Return what a file of the embedded model holds."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _embedded_json(value: Any) -> str:
    """Write JSON so that it may stand inside an element of HTML."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the playground into one HTML file that works from disk."""
    parser = argparse.ArgumentParser(
        prog="python -m repository.playground", description=main.__doc__
    )
    parser.add_argument(
        "--out", type=Path, default=PAGE, help="the HTML file (default: site/playground/index.html)"
    )
    options = parser.parse_args(arguments)
    text = page()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
