"""Writes the badge that opens a notebook on Colab, and its first cell, which goes to the project.

The address of the repository stands in one place, `repository/data/repository.json`. It is null
until it is known, and until then there is no badge. `python -m repository.colab owner/name` sets it
there and in all notebooks; on GitHub a workflow does.

Before the cell asks the reader for the address it asks Colab, for one second, which notebook is
open: one that was opened from GitHub has its repository in its path. That interface is documented
nowhere, its address has moved before (googlecolab/colabtools, issue 3207), and it was tried against
a server that the tests make, not on Colab.
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

from repository.mechanisms import ROOT
from repository.notebooks import normalise, notebook_paths, store

STORED = Path("repository/data/repository.json")  # relative to the root
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
GITHUB = re.compile(
    r"(?:https://github\.com/|git@github\.com:|ssh://git@github\.com/)?([\w.-]+/[\w.-]+?)(?:\.git)?/?"
)

CELL = r"""
import contextlib, glob, importlib.util, os, re, sys, subprocess as sp
on_colab = all(map(importlib.util.find_spec, ("google", "google.colab")))

def ask_colab(server="$(hostname):9000"):  # for one second: see repository/colab.py
    curl = f"curl -sm1 --noproxy '*' {server}/api/sessions"
    answer = sp.getoutput(curl, errors="replace").replace("%2F", "/")
    return "".join(re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)/blob/", answer)[:1])

def folders(repo=os.environ.get("STEERING_REPO") or <repo>):
    yield from ["../" * up or "." for up in range(20)] + [*filter(None, sys.path)]
    if on_colab:  # uploaded, on Drive, or else cloned
        yield from glob.glob("/content/*/") + glob.glob("/content/drive/MyDrive/*/")
        with contextlib.suppress(EOFError, NotImplementedError, IndexError):  # no reply
            repo = repo or ask_colab() or input("Its GitHub owner/name: ").split()[0]
            url = repo if ":" in repo else os.path.join("https://github.com", repo)
            sp.run(["git", "clone", "-q", "--depth=1", url, "/content/steering"])
        yield "/content/steering"
    raise RuntimeError("no project here: os.chdir() to it, on Colab set STEERING_REPO")

os.chdir(next(f for f in folders() if os.path.isfile(f"{f}/repository/mechanisms.py")))
sys.path[:0] = {os.getcwd()} - {*sys.path}
if on_colab:
    sp.check_call([sys.executable, *"-m pip install -qr requirements.txt".split()])
""".strip()


def parse_repository(text: str) -> str:
    """Return owner/name from that form or from any address of a GitHub repository.

    Raises:
        ValueError: it is neither.
    """
    match = GITHUB.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a GitHub repository: expected owner/name or"
            " https://github.com/owner/name"
        )
    return match[1]


def origin(folder: Path = ROOT) -> str:
    """Return owner/name of the remote `origin`.

    Raises:
        ValueError: there is no such remote, or it is not on GitHub.
    """
    command = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(
            "there is no remote `origin` to take the address from: give it, as in make colab"
            " REPO=owner/name"
        )
    try:
        return parse_repository(result.stdout)
    except ValueError:
        raise ValueError(
            "the remote `origin` is not on GitHub: give the address, as in make colab"
            " REPO=owner/name"
        ) from None


def stored_repository(folder: Path = ROOT) -> str | None:
    """Return the owner/name that is stored; None as long as nobody has set it."""
    return json.loads((folder / STORED).read_text(encoding="utf-8"))["repo"]


def badge(repo: str, path: str) -> str:
    """Return the Markdown of the badge that opens a notebook (its path from the root) on Colab."""
    url = f"https://colab.research.google.com/github/{repo}/blob/main/{path}"
    return f"[![Open In Colab]({BADGE_IMAGE})]({url})"


def colab_cell(repo: str | None) -> str:
    """Return the source of the first code cell, which goes to the project and prints nothing.

    It looks in the working directory, above it, and along `sys.path`. On Colab it also looks among
    what was uploaded or is on Drive; else it clones the environment variable `STEERING_REPO`
    (owner/name or what `git clone` takes), the address given here, what Colab says, or what the
    reader answers. There it installs the requirements.

    Args:
        repo: owner/name, or None where it is not known.
    """
    return CELL.replace("<repo>", json.dumps(repo or ""))


def mark(notebook: NotebookNode, path: str, repo: str | None) -> None:
    """Set badge, first code cell and metadata of a notebook, in place, and nothing else.

    A cell tagged `badge` or `colab` is filled, and keeps id, count and outputs. Where there is none
    it is made: the badge at the top, the cell below the heading "Setup", or in front of the first
    code cell.

    Args:
        notebook: as read by nbformat.
        path: of the notebook, from the root.
        repo: owner/name, or None where it is not known: then there is no badge, and one that is
            there goes.
    """
    cells = notebook.cells
    first = _find(cells, "badge")
    if repo is None and first is not None:
        del cells[first]
    elif repo is not None:
        if first is None:
            cells.insert(0, new_markdown_cell(id="badge", metadata={"tags": ["badge"]}))
            first = 0
        cells[first].source = badge(repo, path)
    code = _find(cells, "colab")
    if code is None:
        setups = [i + 1 for i, cell in enumerate(cells) if cell.source.startswith("## Setup")]
        codes = [i for i, cell in enumerate(cells) if cell.cell_type == "code"]
        code = min(setups[:1] + codes[:1], default=len(cells))
        cells.insert(code, new_code_cell(id="colab", metadata={"tags": ["colab"]}))
    cells[code].source = colab_cell(repo)
    normalise(notebook)


def _find(cells: list[NotebookNode], tag: str) -> int | None:
    return next((i for i, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])), None)


def write(repo: str | None, folder: Path = ROOT) -> list[Path]:
    """Store the address and mark every notebook of the root with it; return those that changed."""
    (folder / STORED).write_text(json.dumps({"repo": repo}) + "\n", encoding="utf-8")
    changed = []
    for path in notebook_paths(folder=folder):
        before, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
        mark(notebook, path.relative_to(folder).as_posix(), repo)
        if notebook != before:
            store(notebook, path)
            changed.append(path)
    return changed


def main(arguments: Sequence[str] | None = None, folder: Path = ROOT) -> int:
    """Write badge, first cell and metadata into all notebooks, with the repository's address."""
    parser = argparse.ArgumentParser(prog="python -m repository.colab", description=main.__doc__)
    parser.add_argument(
        "repo",
        nargs="?",
        help="owner/name on GitHub (default: the remote `origin`, else what is stored)",
    )
    options = parser.parse_args(arguments)
    try:
        repo = parse_repository(options.repo) if options.repo else origin(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        if options.repo:
            return 1
        repo = stored_repository(folder)
    changed = write(repo, folder)
    print(f"{repo or 'address unknown, so no badge'}: {len(changed)} notebooks changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
