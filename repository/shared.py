"""The cells that the six mechanism notebooks share: written once, in `repository/shared_cells`.

A shared cell is tagged `shared-NAME`; its text is `NAME.md` or `NAME.py`. `<<word>>` in it stands
for what differs between the notebooks, see `differences.toml`. `python -m repository.notebooks`
writes the cells into the notebooks before it runs them; a test fails where they differ.
"""

import json
import re
import tomllib
from pathlib import Path

from nbformat import NotebookNode

from repository.mechanisms import ROOT

FOLDER = Path(__file__).resolve().parent / "shared_cells"
ABILITIES = ROOT / "benchmarks" / "results" / "abilities.json"
TAG = "shared-"
PLACEHOLDER = re.compile(r"<<(\w+)>>")
NOT_MEASURED = (
    "Its abilities are not measured yet: `make benchmark-mechanisms` does it, and"
    " [comparison](comparison.ipynb) shows those of the others."
)


def shared_name(cell: NotebookNode) -> str | None:
    """Return the name of the shared cell that a cell is tagged as, or None."""
    tags = [tag for tag in cell.metadata.get("tags", []) if tag.startswith(TAG)]
    return tags[0].removeprefix(TAG) if tags else None


def shared_source(cell: str, kind: str, notebook: str, folder: Path = FOLDER) -> str:
    """Return the text of a shared cell for one notebook.

    Args:
        cell: its name, such as `vector`.
        kind: `code` or `markdown`.
        notebook: the name of the mechanism.
        folder: holds the texts and `differences.toml`.

    Raises:
        ValueError: there is no such cell, or nothing says what a `<<word>>` in it stands for.
    """
    path = folder / f"{cell}.{'py' if kind == 'code' else 'md'}"
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in folder.glob("*.[mp][dy]")))
        raise ValueError(f"no shared cell {path.name!r}: expected one of {known}")
    stored = tomllib.loads((folder / "differences.toml").read_text(encoding="utf-8"))
    values = stored["default"] | stored.get(notebook, {})

    def value(found: re.Match) -> str:
        word = found[1]
        if word == "limits":
            return limits(notebook)
        if word in ("prompts", "opening"):  # those of `make run`; the last one opens a notebook
            from repository.agreement import PROMPTS  # loads torch, and few need it

            written = [json.dumps(prompt, ensure_ascii=False) for prompt in PROMPTS]
            return "\n".join(f"    {one}," for one in written) if word == "prompts" else written[-1]
        if word == "published":
            from repository.published import published_markdown

            return published_markdown(*values["sites"])
        if word not in values:
            raise ValueError(f"{path.name} asks for <<{word}>>: differences.toml does not say it")
        return values[word]

    return PLACEHOLDER.sub(value, path.read_text(encoding="utf-8").strip())


def differing_cells(notebook: NotebookNode, name: str) -> list[str]:
    """Name the shared cells of a notebook that are not what the source says; empty if all are."""
    return [
        f"{shared_name(cell)} ({cell.cell_type})"
        for cell in notebook.cells
        if shared_name(cell) and cell.source != _source(cell, name)
    ]


def write_shared(notebook: NotebookNode, name: str) -> list[str]:
    """Write the shared cells into a notebook, in place; return the names of those that changed."""
    changed = differing_cells(notebook, name)
    for cell in notebook.cells:
        if shared_name(cell):
            cell.source = _source(cell, name)
    return changed


def _source(cell: NotebookNode, name: str) -> str:
    return shared_source(shared_name(cell), cell.cell_type, name)


def limits(mechanism: str, path: Path = ABILITIES) -> str:
    """Say which measured abilities a mechanism has and lacks, or that none is measured."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    mine = [cell for cell in cells if cell["mechanism"] == mechanism]
    if not mine:
        return NOT_MEASURED

    def those(outcome: str) -> str:
        return "; ".join(cell["ability"] for cell in mine if cell["outcome"] == outcome)

    able = sum(cell["outcome"] == "yes" for cell in mine)
    said = [
        f"Of the {len(mine)} abilities in the matrix of [comparison](comparison.ipynb) it has"
        f" {able}; that notebook has the reasons for the rest."
    ]
    for outcome, words in (
        ("few lines", "These need a few more lines"),
        ("error", "These are refused or fail"),
        ("silently no", "These **run, and silently do something else**"),
    ):
        if names := those(outcome):
            said.append(f"{words}: {names}.")
    return " ".join(said)
