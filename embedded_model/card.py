"""The model card: Markdown tables, and the places in the card that commands write."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.embedded import FOLDER

HERE = Path(__file__).resolve().parent


def records_of(model: Path) -> Path:
    """Return the folder of a model's card and evaluation: this one for the shipped model."""
    return HERE if model.resolve() == FOLDER else model


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown, with a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a file.

    Raises:
        ValueError: The file has no such markers.
    """
    old = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(
            f"expected the markers <!-- {name} --> and <!-- /{name} --> in {path}, found none"
        )
    new = pattern.sub(lambda match: match.group(1) + text + match.group(2), old)
    path.write_text(new, encoding="utf-8")
