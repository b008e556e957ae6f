"""The six mechanisms as callables: the very cells that a reader reads, run from the notebooks.

Cells tagged `mechanism` define `wrap`, `read`, `steer`, `logits` and `generate`, and `intervene`
where the mechanism can do more than add (see CONTRIBUTING.md, "A seventh mechanism"). Tests,
benchmarks and comparison take them from here, so that nothing holds a second copy.
"""

import json
import linecache
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MECHANISMS = (
    "custom_wrapper",
    "pytorch_hooks",
    "transformer_lens",
    "baukit",
    "nnsight",
    "bias_editing",
)


class Mechanism(NamedTuple):
    """One way to steer. `wrapped` comes from `wrap`, `inputs` from the tokenizer."""

    name: str
    wrap: Callable  # (model, tokenizer) -> wrapped
    read: Callable  # (wrapped, inputs, layer) -> [batch, pos, d_model]
    steer: Callable  # (wrapped, layer, vector [d_model]) -> context manager
    logits: Callable  # (wrapped, inputs) -> [batch, pos, vocab]
    generate: Callable  # (wrapped, inputs, **options) -> [batch, pos + new]
    intervene: Callable | None = (
        None  # (wrapped, layer, change: hidden -> hidden) -> context manager
    )


def mechanism_cells(name: str, folder: Path = ROOT) -> list[str]:
    """Return the source of the tagged cells of one notebook, in order.

    Raises:
        ValueError: there is no such notebook, or it has no tagged cell.
    """
    path = folder / f"{name}.ipynb"
    if not path.is_file():
        raise ValueError(f"no notebook {name!r}: expected one of {', '.join(MECHANISMS)}")
    # Not by nbformat, whose import takes as long as that of torch.
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [
        "".join(cell["source"])
        for cell in notebook["cells"]
        if "mechanism" in cell["metadata"].get("tags", [])
    ]
    if not cells:
        raise ValueError(f"{path.name} has no cell tagged 'mechanism'")
    return cells


def run_cells(sources: list[str], name: str) -> dict:
    """Run the cells in a module of their own and return its namespace.

    Each cell is registered with `linecache` under its file name: nnsight reads the source of a
    traced block, and keeps what it compiled under that name, so the name must change with the
    source. The module is registered as well, because `torch.compile` looks up by name where a
    function comes from.
    """
    module = ModuleType(f"notebook_{name}")
    sys.modules[module.__name__] = module
    namespace = module.__dict__
    for number, source in enumerate(sources, 1):
        file_name = f"<{name}.ipynb, mechanism cell {number}, {zlib.crc32(source.encode()):08x}>"
        linecache.cache[file_name] = (
            len(source),
            None,
            source.splitlines(keepends=True),
            file_name,
        )
        exec(compile(source, file_name, "exec"), namespace)
    return namespace


def notebook_namespace(name: str, folder: Path = ROOT) -> dict:
    """Run the tagged cells of one notebook, once, and return all that they define."""
    return _run_once(name, folder)


@cache  # with and without the default it has to be one entry
def _run_once(name: str, folder: Path) -> dict:
    return run_cells(mechanism_cells(name, folder), name)


def load_mechanism(name: str, folder: Path = ROOT) -> Mechanism:
    """Run the tagged cells of one notebook; return its five functions, and `intervene` if any.

    Raises:
        ValueError: no such notebook, or its cells do not define all five.
    """
    namespace = notebook_namespace(name, folder)
    wanted = Mechanism._fields[1:6]
    missing = [function for function in wanted if not callable(namespace.get(function))]
    if missing:
        raise ValueError(
            f"the cells tagged 'mechanism' in {name}.ipynb do not define {', '.join(missing)}"
        )
    return Mechanism(
        name, *(namespace[function] for function in wanted), namespace.get("intervene")
    )
