"""The model card: Markdown tables, and the places in the card that commands write."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.embedded import FOLDER

HERE = Path(__file__).resolve().parent
WRITTEN_BY = {
    "model.safetensors": "train",
    "training.json": "train",
    "preset.json": "choose",
    "evaluation.json": "evaluate",
}


def records_of(model: Path) -> Path:
    """Return the folder of a model's card and evaluation: this one for the shipped model."""
    return HERE if model.resolve() == FOLDER else model


def need(folder: Path, *names: str) -> None:
    """Check that the commands before have written their files into a folder.

    Raises:
        ValueError: one of them is not there.
    """
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: embedded_model.{WRITTEN_BY[name]} writes it")


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of the weights in a folder."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown, with a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)


def has_place(path: Path, name: str) -> bool:
    """Say whether a file is there and has the markers of `write_between`."""
    return path.is_file() and bool(_between(name).search(path.read_text(encoding="utf-8")))


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a file.

    Raises:
        ValueError: The file has no such markers.
    """
    old, pattern = path.read_text(encoding="utf-8"), _between(name)
    if not pattern.search(old):
        raise ValueError(
            f"expected the markers <!-- {name} --> and <!-- /{name} --> in {path}, found none"
        )
    new = pattern.sub(lambda match: match.group(1) + text + match.group(2), old)
    path.write_text(new, encoding="utf-8")
