"""Runs the notebooks of the root and of guides/ and stores what they print; finds what is wrong.

`python -m repository.notebooks [names]` writes the shared cells (repository/shared_cells) into each
one and executes it from top to bottom in a fresh kernel. A
notebook that fails, writes to stderr or shows a widget is left as it was. What is stored is the
same after every run: no timing, no widget state.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from jupyter_client.kernelspec import NoSuchKernel
from nbformat import NotebookNode
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from repository.mechanisms import MECHANISMS, ROOT
from repository.shared import write_shared

# What JupyterLab writes as soon as a notebook is opened; the version is that of the Python the
# outputs were made with.
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
    "version": "3.11.7",
}
IGNORED = "nbval-ignore-output"
FEWEST_COMPARED = 5
TIMEOUT = 900  # seconds for one cell; GPT2-XL on a slow machine needs some
WIDGET = "application/vnd.jupyter.widget-view+json"
# Cell metadata that says when or where a cell ran, or how somebody's editor showed it.
VOLATILE = ("execution", "ExecuteTime", "executionInfo", "outputId", "collapsed", "scrolled")
PICTURES = ROOT / "repository" / "data" / "pictures.json"  # what is known of each stored picture
FEWEST_COLOURS = 8  # of a picture that shows something
WIDEST_CODE, WIDEST_PRINT = 88, 100  # columns: readers have narrow windows
PATH = re.compile(r"(?<![\w.:/])(?:/(?:home|root|tmp|usr|opt|var|mnt|content|Users)/|[A-Z]:\\)\S*")
# What another machine or another run would print differently; a compared cell must not hold it.
PRIVATE = {
    "a path": PATH,
    "a device": re.compile(r"\b(?:cpu|cuda|mps|NVIDIA|GeForce|Tesla)\b"),
    "a time": re.compile(
        r"\d\.\d+ ?s\b|\b\d+ (?:s|sec|seconds)\b|\d"
        r" ?(?:ms|µs)\b|\b\d{1,2}:\d{2}\b|\b\d{4}-\d{2}-\d{2}\b"
    ),
    "a version": re.compile(r"(?<![\w.])\d+\.\d+\.\d+(?![\w.])"),
    "an address in memory": re.compile(r"0x[0-9a-f]{6,}"),
}


def notebook_paths(names: Sequence[str] = (), folder: Path = ROOT) -> list[Path]:
    """Return the notebooks of a folder and its guides/, the six first, or those that are named.

    Raises:
        ValueError: there is no notebook of that name.
    """
    found = {
        path.stem: path
        for place in (".", "guides")
        for path in sorted(folder.joinpath(place).glob("*.ipynb"))
    }
    wanted = [name.removesuffix(".ipynb") for name in names]
    wanted = wanted or [name for name in MECHANISMS if name in found] + [
        name for name in found if name not in MECHANISMS
    ]
    for name in wanted:
        if name not in found:
            raise ValueError(
                f"no notebook {name!r}: expected one of"
                f" {', '.join(found) or '(the folder has none)'}"
            )
    return [found[name] for name in wanted]


def clean_environment(environment: MutableMapping[str, str]) -> None:
    """Change an environment so that what a notebook prints does not depend on whose machine it is.

    The stored outputs are those of the embedded model, which needs no network: without this a
    reader's own `STEERING_MODEL`, or a hub that answers slowly, would decide what is printed.
    """
    environment.pop("STEERING_MODEL", None)
    environment["HF_HUB_OFFLINE"] = "1"
    # The embedded model is too small to gain from a second thread, and on a busy machine loses a
    # lot by it; with one, sums are added up in the same order whatever the number of cores.
    environment.setdefault("OMP_NUM_THREADS", "1")
    # Bars come on stderr, and only on a slow machine; a reader has them, a stored notebook does
    # not.
    environment["TQDM_DISABLE"] = "1"


def execute(path: Path, on_cell: Callable[..., None] | None = None) -> NotebookNode:
    """Run a notebook, its shared cells as they are in the source; the file stays as it is.

    Args:
        path: of the notebook; it runs in its folder.
        on_cell: called after each executed cell.

    Returns:
        The notebook with its shared cells and its new outputs, normalised.

    Raises:
        ValueError: a cell is tagged as a shared one that does not exist.
        nbclient.exceptions.CellExecutionError: a cell raised an error.
        nbclient.exceptions.CellTimeoutError: a cell took longer than `TIMEOUT`.
    """
    notebook = nbformat.read(path, as_version=4)
    write_shared(notebook, path.stem)
    for cell in _code_cells(notebook):
        # An empty cell is skipped, and would keep what it had.
        cell.execution_count, cell.outputs = None, []
    environment = dict(os.environ)
    clean_environment(environment)
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name=KERNELSPEC["name"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,  # how often a stream is flushed differs between runs
        on_cell_executed=on_cell,
        extra_arguments=["--IPKernelApp.log_level=40"],  # no warnings of the kernel about itself
    )
    client.execute(env=environment)
    normalise(notebook)
    return notebook


def normalise(notebook: NotebookNode) -> None:
    """Remove from a notebook, in place, what would differ after another run or in another editor.

    What is left is what JupyterLab writes, so that opening a notebook there changes nothing. With
    another Python than the one in `LANGUAGE` it would change the version; `make lab` keeps it, see
    `before_saving`.
    """
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": LANGUAGE})
    _drop_empty_outputs(notebook)
    for number, cell in enumerate(notebook.cells):
        cell.setdefault(
            "id", f"cell-{number}"
        )  # from format 4.5 on, cells have ids; keep those there are
        for key in VOLATILE:
            cell.metadata.pop(key, None)


def before_saving(model: dict, path: str, contents_manager: Any) -> None:
    """Undo what opening a notebook in JupyterLab, and bars, changed; `make lab` sets this hook.

    The version of Python stays the stored one where nothing else of `language_info` differs, and
    empty outputs go. Arguments are those of `ContentsManager.pre_save_hook`; the content of `model`
    is changed in place.
    """
    if model["type"] != "notebook":
        return
    _drop_empty_outputs(model["content"])
    file = Path(contents_manager.root_dir, path)
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))["metadata"].get("language_info", {})
        new = model["content"]["metadata"].get("language_info", {})
        if new | {"version": None} == stored | {"version": None} and "version" in stored:
            new["version"] = stored["version"]


def _drop_empty_outputs(notebook: dict) -> None:
    """Remove the outputs with nothing in them, which bars leave behind."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if output.get("data") != {}]


def store(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook as every tool of this project does; if interrupted, the old file stays."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        nbformat.write(notebook, unfinished)  # indent 1, sorted keys, a newline at the end
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def failures(notebook: NotebookNode) -> list[str]:
    """List why outputs must not be stored: errors, stderr, widgets. Empty if they may."""
    found = ["the notebook holds the state of a widget"] if "widgets" in notebook.metadata else []
    for number, cell in _numbered(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number} ends in {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"cell {number} writes to stderr: {output.text.strip()[:200]!r}")
            if WIDGET in output.get("data", {}):
                found.append(f"cell {number} shows a widget")
    return found


def problems(notebook: NotebookNode) -> list[str]:
    """List what a stored notebook of this project must not have; empty if it is as it should be.

    These are errors, stderr and widgets; counts that are not 1 to N; another kernelspec than
    `python3`; fewer than five cells that nbval compares; cells that nbval is told to ignore, other
    than one that loads the model; comment markers of nbval; and, in a compared output, a path,
    device, time, version or address.
    """
    found = failures(notebook)
    code = list(_code_cells(notebook))
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"the counts are {counts}: expected 1 to {len(code)} in order")
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != KERNELSPEC["name"]:
        found.append(f"the kernelspec is {kernel!r}: expected {KERNELSPEC['name']!r}")
    compared = sum(is_compared(cell) and bool(cell.outputs) for cell in code)
    if compared < FEWEST_COMPARED:
        found.append(
            f"{compared} cells have outputs that nbval compares: expected at least"
            f" {FEWEST_COMPARED}"
        )
    ignored = 0
    for number, cell in _numbered(notebook):
        tags = _tags(cell)
        ignored += IGNORED in tags
        if IGNORED in tags and (ignored > 1 or "load_model(" not in cell.source):
            found.append(
                f"cell {number} is tagged {IGNORED}: expected on the one cell that loads the model"
            )
        for tag in sorted(tags - {IGNORED}):
            if tag.startswith("nbval-") or tag == "raises-exception":
                found.append(f"cell {number} is tagged {tag}")
        if re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE_)", cell.source):
            found.append(f"cell {number} has a comment marker of nbval: expected a tag")
        kinds = PRIVATE if is_compared(cell) else {"a path": PATH}
        for text in _texts(cell):
            found += [
                f"cell {number} prints {kind}: {hit[0]!r}"
                for kind, it in kinds.items()
                if (hit := it.search(text))
            ]
    return found


def too_wide(notebook: NotebookNode) -> list[str]:
    """List lines of code over `WIDEST_CODE` columns and printed ones over `WIDEST_PRINT`.

    The first cell, which is the same everywhere, and the one that loads the model are left out.
    """
    found = []
    for number, cell in _numbered(notebook):
        if "colab" in _tags(cell) or not is_compared(cell):
            continue
        for line in cell.source.splitlines():
            if len(line) > WIDEST_CODE:
                found.append(f"cell {number} has {len(line)} columns of code: {line.strip()}")
        for text in _plain_texts(cell):
            for line in text.splitlines():
                if len(line) > WIDEST_PRINT:
                    found.append(f"cell {number} prints {len(line)} columns: {line.strip()}")
    return found


def known_pictures(notebook: NotebookNode) -> dict[str, dict]:
    """Decode every stored PNG; return its size, number of colours and SHA-256 by cell and place.

    Raises:
        OSError: one is not a picture.
    """
    found = {}
    for cell in _code_cells(notebook):
        pictures = [
            output.data["image/png"]
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        for place, text in enumerate(pictures, 1):
            data = base64.b64decode(text)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                colours = image.convert("RGB").getcolors(maxcolors=2**24)
                found[f"{cell.id}, {place}"] = {
                    "size": list(image.size),
                    "colours": len(colours),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
    return found


def note_pictures(paths: Sequence[Path], table: Path = PICTURES) -> None:
    """Write into the table what is stored in some notebooks; what it says of others stays."""
    noted = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
    for path in paths:
        noted.pop(path.stem, None)
        if pictures := known_pictures(nbformat.read(path, as_version=4)):
            noted[path.stem] = pictures
    text = json.dumps(noted, indent=1, sort_keys=True) + "\n"
    table.write_text(text, encoding="utf-8")


def is_compared(cell: NotebookNode) -> bool:
    """Say whether nbval compares the outputs of a code cell; it skips a cell without a count."""
    return cell.execution_count is not None and IGNORED not in _tags(cell)


def _code_cells(notebook: NotebookNode) -> Iterator[NotebookNode]:
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def _numbered(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Number the code cells from 1, as the counts of a notebook do."""
    return enumerate(_code_cells(notebook), 1)


def _tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def _plain_texts(cell: NotebookNode) -> Iterator[str]:
    """Give what a cell printed and a reader sees as it is; a table's cells wrap."""
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            yield output.text
        elif "text/html" not in data:
            yield data.get("text/plain", "")


def _texts(cell: NotebookNode) -> Iterator[str]:
    """Give every text that a cell printed."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        yield from (
            data for kind, data in output.get("data", {}).items() if kind.startswith("text/")
        )


def _shorten(error: Exception) -> str:
    """Say what went wrong in one line; nbclient's text is the whole cell and its traceback."""
    if isinstance(error, nbclient.exceptions.CellExecutionError):
        return f"{error.ename}: {error.evalue}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main(arguments: Sequence[str] | None = None, folder: Path = ROOT) -> int:
    """Execute notebooks and store their outputs; return 0 only if all is well with all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m repository.notebooks", description=main.__doc__
    )
    parser.add_argument("names", nargs="*", help="of notebooks (default: all)")
    parser.add_argument(
        "--pictures", action="store_true", help="only note size and hash of the stored pictures"
    )
    options = parser.parse_args(arguments)
    try:
        paths = notebook_paths(options.names, folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.pictures:
        note_pictures(paths)
        return 0
    complaints = 0
    with Progress(console=Console(stderr=True)) as progress:
        for path in paths:
            cells = sum(1 for _ in _code_cells(nbformat.read(path, as_version=4)))
            task = progress.add_task(path.stem, total=cells)
            try:
                notebook = execute(path, lambda task=task, **_: progress.advance(task))
                found = failures(notebook)
            except (
                nbclient.exceptions.CellControlSignal,
                nbclient.exceptions.DeadKernelError,
                NoSuchKernel,
                ValueError,
            ) as error:
                found = [_shorten(error)]
            if found:
                found = [f"not stored: {line}" for line in found]
            else:
                store(notebook, path)
                if folder == ROOT:
                    note_pictures([path])
                found = [f"stored, but {line}" for line in problems(notebook) + too_wide(notebook)]
            complaints += len(found)
            for line in found:
                progress.console.print(
                    f"{path.name}: {line}", markup=False, highlight=False, soft_wrap=True
                )
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
