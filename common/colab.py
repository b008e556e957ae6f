"""Writes what a notebook needs on Colab: the badge that opens it there, and the first cell that fetches the project.

The address of the repository stands in one place, `common/data/repository.json`; `python -m common.colab owner/name`
sets it there and in all notebooks.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from common.mechanisms import ROOT
from common.notebooks import notebook_paths, store

PLACEHOLDER = "OWNER/NAME"
STORED = Path("common/data/repository.json")  # relative to the root
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
GITHUB = re.compile(r"(?:https://github\.com/|git@github\.com:|ssh://git@github\.com/)?([\w.-]+/[\w.-]+?)(?:\.git)?/?")

CELL = """\
# On Colab: fetch the project and what it requires. Anywhere else: nothing.
import importlib.util, os, subprocess, sys

if importlib.util.find_spec("google") and importlib.util.find_spec("google.colab"):
"""
FETCH = """\
    url, folder = {url}, {folder}
    if not os.path.isfile("common/mechanisms.py"):  # not in the project yet
        if not os.path.isdir(folder):
            subprocess.run(["git", "clone", "--quiet", "--depth", "1", url, folder], check=True)
        os.chdir(folder)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-r", "requirements.txt"], check=True)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())"""
UNKNOWN = """\
    raise RuntimeError("this copy does not know the address of its repository: run `make colab REPO=owner/name`")"""


def parse_repository(text: str) -> str:
    """Return owner/name from that form or from any address of a GitHub repository.

    Raises:
        ValueError: it is neither.
    """
    match = GITHUB.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no GitHub repository: expected owner/name or https://github.com/owner/name")
    return match[1]


def origin(folder: Path = ROOT) -> str:
    """Return owner/name of the remote `origin`.

    Raises:
        ValueError: there is no such remote, or it is not on GitHub.
    """
    command = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError("there is no remote `origin` to take the address from: give it, as in make colab REPO=owner/name")
    try:
        return parse_repository(result.stdout)
    except ValueError:
        raise ValueError("the remote `origin` is not on GitHub: give the address, as in make colab REPO=owner/name") from None


def stored_repository(folder: Path = ROOT) -> str:
    """Return the owner/name that is stored; `OWNER/NAME` as long as nobody has set it."""
    return json.loads((folder / STORED).read_text(encoding="utf-8"))["repo"]


def badge(repo: str, notebook: str) -> str:
    """Return the Markdown of the badge that opens a notebook (its name, without ending) on Colab."""
    url = f"https://colab.research.google.com/github/{repo}/blob/main/{notebook}.ipynb"
    return f"[![Open In Colab]({BADGE_IMAGE})]({url})"


def repository_url(repo: str) -> str:
    """Return what `git clone` takes for an owner/name."""
    return f"https://github.com/{repo}"


def colab_cell(repo_url: str) -> str:
    """Return the source of the first code cell.

    Args:
        repo_url: anything that `git clone` takes, a local path too. While it is the placeholder, the cell says on
            Colab that the address is not known.
    """
    if repo_url == repository_url(PLACEHOLDER):
        return CELL + UNKNOWN
    folder = re.split(r"[/\\:]", repo_url.rstrip("/\\").removesuffix(".git"))[-1]
    return CELL + FETCH.format(url=json.dumps(repo_url), folder=json.dumps(folder))


def mark(notebook: NotebookNode, name: str, repo: str) -> None:
    """Set badge and first code cell of a notebook, in place; whatever else it holds stays as it is.

    A cell tagged `badge` or `colab` is filled, and keeps id, count and outputs. Where there is none it is made: the
    badge at the top, the cell below the heading "Setup", or in front of the first code cell.

    Args:
        notebook: as read by nbformat.
        name: of the notebook, without ending.
        repo: owner/name.
    """
    cells = notebook.cells
    first = _find(cells, "badge")
    if first is None:
        cells.insert(0, new_markdown_cell(id="badge", metadata={"tags": ["badge"]}))
        first = 0
    cells[first].source = badge(repo, name)
    code = _find(cells, "colab")
    if code is None:
        setups = [i + 1 for i, cell in enumerate(cells) if cell.source.startswith("## Setup")]
        codes = [i for i, cell in enumerate(cells) if cell.cell_type == "code"]
        code = min(setups[:1] + codes[:1], default=len(cells))
        cells.insert(code, new_code_cell(id="colab", metadata={"tags": ["colab"]}))
    cells[code].source = colab_cell(repository_url(repo))


def _find(cells: list[NotebookNode], tag: str) -> int | None:
    return next((i for i, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])), None)


def write(repo: str, folder: Path = ROOT) -> list[Path]:
    """Store the address and mark every notebook of the root with it; return those that changed."""
    (folder / STORED).write_text(json.dumps({"repo": repo}) + "\n", encoding="utf-8")
    changed = []
    for path in notebook_paths(folder=folder):
        before, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
        mark(notebook, path.stem, repo)
        if notebook != before:
            store(notebook, path)
            changed.append(path)
    return changed


def main(arguments: Sequence[str] | None = None, folder: Path = ROOT) -> int:
    """Write the address of the repository, badge and Colab cell into all notebooks of the root."""
    parser = argparse.ArgumentParser(prog="python -m common.colab", description=main.__doc__)
    parser.add_argument("repo", nargs="?", help="owner/name on GitHub (default: that of the remote `origin`)")
    options = parser.parse_args(arguments)
    try:
        repo = parse_repository(options.repo) if options.repo else origin(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    changed = write(repo, folder)
    print(f"{repo}: {len(changed)} notebooks changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
