"""Where a steered forward pass of the embedded model spends its time, by whose code runs.

    python -m benchmarks.profiling NAME [SECONDS]

runs steered passes of one mechanism (or "unsteered") until the time is over. `profile` lets py-spy
look at that process many times a second, C++ included. The passes are not slowed down by
bookkeeping as under cProfile, which makes every Python call look dearer than it is; how long a pass
takes is measured elsewhere, without py-spy.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.stored import provenance
from common.loading import load_model
from common.texts.generation import logits
from repository.mechanisms import MECHANISMS, ROOT, load_mechanism

NAMES = ("unsteered", *MECHANISMS)
KERNELS, OWN, OTHER = "torch, C++", "notebook and common", "Python and other libraries"
COLORS = {
    KERNELS: "#9aa5b1",
    "torch, Python": "#d0d5db",
    "transformers": "#e3c36b",
    "transformer_lens": "#4878a8",
    "nnsight": "#5a9367",
    OWN: "#c0392b",
    OTHER: "#8064a2",
}
FRAME = re.compile(
    r"(.+) \((.+?)(?::(\d+))?\)"
)  # Python frames have a line, and so may some of C++
PYTHON_FILE = re.compile(r"\.py$|^<|mechanism cell")


def loop(name: str, seconds: float) -> None:
    """Run forward passes of 8 tokens for some seconds, steered by one mechanism."""
    torch.set_num_threads(1)
    model, tokenizer, preset = load_model("embedded", device="cpu")
    ids = torch.arange(10, 18)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "unsteered":
        return passes(lambda: logits(model, inputs), seconds)
    mechanism = load_mechanism(name)
    wrapped = mechanism.wrap(model, tokenizer)
    with mechanism.steer(
        wrapped,
        preset.layer,
        torch.randn(model.config.n_embd, generator=torch.Generator().manual_seed(0)),
    ):
        mechanism.logits(wrapped, inputs)  # what happens only once is no part of the picture
        passes(lambda: mechanism.logits(wrapped, inputs), seconds)


def passes(once: Any, seconds: float) -> None:
    """Repeat something until the time is over. What the profile counts is below this function."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        once()


def package_of(path: str) -> str:
    """Say whose code a file of Python is."""
    package = re.search(r"site-packages[/\\](\w+)", path)
    if package:
        name = package[1]
        return "torch, Python" if name == "torch" else name if name in COLORS else OTHER
    return OWN if ".ipynb" in path or path.startswith(str(ROOT)) else OTHER


def owner_of(stack: list[str]) -> tuple[str, str] | None:
    """Say whose code a sample is, and which function.

    It belongs to the innermost Python frame, except where that one has called into torch's C++.

    Args:
        stack: frames as py-spy writes them, "function (file:line)", outermost first.

    Returns:
        The owner and the innermost Python function; None for what is outside of `passes`.
    """
    frames = [match.groups() for frame in stack if (match := FRAME.fullmatch(frame))]
    python = [
        place for place, (_, path, line) in enumerate(frames) if line and PYTHON_FILE.search(path)
    ]
    if not any(frames[place][0] == "passes" for place in python):
        return None
    function, path, _ = frames[python[-1]]
    beyond = any(
        "libtorch" in frame_path or "libc10" in frame_path
        for _, frame_path, _ in frames[python[-1] + 1 :]
    )
    return (KERNELS if beyond else package_of(path)), function


def shares(samples: Iterable[str]) -> dict[str, Any]:
    """Add up samples, lines of "frame;frame;… count".

    Returns:
        `"packages"`: the share of each owner; `"functions"`: of each owner but C++ the six
        functions with the largest shares of their own; `"samples"`: how many there were.
    """
    packages: Counter[str] = Counter()
    functions: Counter[tuple[str, str]] = Counter()
    for line in samples:
        stack, count = line.rsplit(" ", 1)
        found = owner_of(stack.split(";"))
        if found:
            packages[found[0]] += int(count)
            functions[found] += int(count)
    total = packages.total()
    top = {
        owner: {
            name: round(count / total, 4)
            for (whose, name), count in functions.most_common()
            if whose == owner
        }
        for owner in packages
        if owner != KERNELS
    }
    return {
        "samples": total,
        "packages": {owner: packages[owner] / total for owner in COLORS if packages[owner]},
        "functions": {owner: dict(list(found.items())[:6]) for owner, found in top.items()},
    }


def find_py_spy(peer: str | None) -> str | None:
    """Return py-spy, from the environment of the peers or from the path."""
    beside = Path(peer).parent / "py-spy" if peer else None
    return str(beside) if beside and beside.exists() else shutil.which("py-spy")


def profile(py_spy: str, name: str, seconds: float) -> dict[str, Any]:
    """Sample a process that runs one mechanism, and return `shares`.

    Raises:
        RuntimeError: py-spy may not look into processes here, or not into C++; with what it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "samples"
        command = [
            py_spy,
            "record",
            "--native",
            "--full-filenames",
            "--rate",
            "100",
            "--format",
            "raw",
            "--output",
            str(raw),
            "--",
        ]
        command += [sys.executable, "-m", "benchmarks.profiling", name, str(seconds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode or not raw.exists():
            raise RuntimeError(f"py-spy cannot look here: {done.stderr.strip().splitlines()[-1:]}")
        return shares(raw.read_text(encoding="utf-8").splitlines())


def plot_profile(results: dict[str, Any]) -> Figure:
    """Draw the milliseconds of one steered forward pass, by whose code runs.

    Args:
        results: what `mechanism_costs.load_results` returns.
    """
    rows = results["profile"]
    figure = Figure(figsize=(10, 0.5 * len(rows) + 1.9), layout="constrained")
    axis = figure.subplots()
    left = dict.fromkeys(rows, 0.0)
    for owner, color in COLORS.items():
        widths = [row["packages"].get(owner, 0.0) * row["milliseconds"] for row in rows.values()]
        if any(widths):
            axis.barh(list(rows), widths, left=list(left.values()), color=color, label=owner)
        left = {name: start + width for (name, start), width in zip(left.items(), widths)}
    for place, row in enumerate(rows.values()):
        axis.annotate(
            f"{row['milliseconds']:.3g} ms",
            (row["milliseconds"], place),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    width = results["models"]["embedded"]["d_model"]
    axis.set_xlabel(
        f"milliseconds of one forward pass, 8 tokens, embedded model (d_model {width}), 1 thread"
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, frameon=False)
    figure.supxlabel(provenance(results), fontsize=7)
    figure.suptitle(
        "Whose code runs: total without a profiler, split by samples of py-spy", fontsize=10
    )
    return figure


if __name__ == "__main__":
    loop(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 5.0)
