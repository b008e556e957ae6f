"""What the benchmarks store in `results/`, and where it comes from."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"


def load(name: str) -> dict[str, Any]:
    """Return what a command stored under a name."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def store(results: dict[str, Any], pictures: "dict[str, Figure]", name: str) -> None:
    """Write results, and pictures by the names of their files, into `results/`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    for picture, figure in pictures.items():
        figure.savefig(RESULTS / f"{picture}.png", dpi=120)
    written = [f"{name}.json", *(f"{picture}.png" for picture in pictures)]
    print(f"written to benchmarks/results: {', '.join(written)}")


def store_part(
    part: str, results: dict[str, Any], pictures: "dict[str, Figure]", name: str
) -> None:
    """Write one part of results that several commands make; what the others stored stays."""
    others = load(name) if (RESULTS / f"{name}.json").exists() else {}
    store({**others, part: results}, pictures, name)


def machine(*packages: str) -> dict[str, str]:
    """Return where figures come from: processor, cores, threads, versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")),
                processor,
            )
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", *packages)},
    }


def machine_line(results: dict[str, Any]) -> str:
    """Return the `machine` of results in one line, as the commands print it."""
    return ", ".join(f"{name} {value}" for name, value in results["machine"].items())


def provenance(results: dict[str, Any]) -> str:
    """Say in one line when and where results were measured: their `measured` and `machine`."""
    there = dict(results["machine"])
    processor, cores = there.pop("processor"), there.pop("cores")
    versions = [
        f"{name} {number}" for name, number in there.items() if name not in ("threads", "python")
    ]
    return f"measured {results['measured']}, {processor}, {cores} cores; {', '.join(versions)}"
