"""What each mechanism can do besides steering every position: a matrix in which every cell is a trial that was run.

    python -m benchmarks.abilities

runs all trials on the embedded model, prints the matrix and writes `results/abilities.json` and `results/abilities.png`.
The tests run the same trials and compare them with the file.
"""

import json
import re
import textwrap
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from rich.progress import track

from benchmarks.ability_subject import Elsewhere, Silently, Subject, embedded_subject
from benchmarks.ability_trials import TRIALS
from benchmarks.timing import machine, provenance
from common.mechanisms import MECHANISMS

RESULTS = Path(__file__).resolve().parent / "results"
OUTCOMES = {
    "yes": "the functions of the notebook do it",
    "few lines": "with some more, which the table names",
    "error": "it is refused, or fails",
    "silently no": "it runs, and does something else",
}
COLOURS = {"yes": "#2e8b57", "few lines": "#9fd3a8", "error": "#f0a35e", "silently no": "#c0392b"}


class Cell(NamedTuple):
    """What one trial of one mechanism gave: one of `OUTCOMES`, and why."""

    mechanism: str
    ability: str
    outcome: str
    says: str


def attempt(trial: Callable[[Subject], None], subject: Subject) -> tuple[str, str]:
    """Run a trial: "yes", "silently no" with what happened instead, or "error" with the first line of the error."""
    torch.manual_seed(0)
    try:
        trial(subject)
    except Silently as failure:
        return "silently no", str(failure)
    except Exception as error:  # whatever a library raises: that is the result
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        line = re.sub(r" ?\(?(/|<eval_)\S+", "", line)  # paths of this machine, and numbers of generated code
        return "error", textwrap.shorten(line if isinstance(error, Elsewhere) else f"{type(error).__name__}: {line}", 160)
    return "yes", ""


def run_trial(ability: str, mechanism: str) -> Cell:
    """Try one ability of one mechanism: first with the notebook's functions, then with the lines that may help.

    Raises:
        ValueError: an unknown ability.
    """
    if ability not in TRIALS:
        raise ValueError(f"unknown ability {ability!r}: expected one of {', '.join(TRIALS)}")
    entry = TRIALS[ability]
    outcome, says = attempt(entry.trial, embedded_subject(mechanism))
    if outcome != "yes" and (helped := entry.helps.get(mechanism)):
        also, why = attempt(helped, embedded_subject(mechanism))
        if also == "yes":
            return Cell(mechanism, ability, "few lines", f"{helped.__doc__} (otherwise: {says})")
        return Cell(mechanism, ability, outcome, f"{says} (and with help: {why})")
    return Cell(mechanism, ability, outcome, says)


def load_matrix(path: Path = RESULTS / "abilities.json") -> pd.DataFrame:
    """Read the stored cells: columns `mechanism`, `ability`, `outcome`, `says`; `attrs` says when and where they were tried."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    cells = pd.DataFrame(stored["cells"])
    cells.attrs["provenance"] = provenance(stored)
    return cells


def matrix_table(cells: pd.DataFrame) -> pd.DataFrame:
    """One row for each ability, one column for each mechanism."""
    table = cells.pivot(index="ability", columns="mechanism", values="outcome")
    return table.loc[list(dict.fromkeys(cells["ability"])), list(dict.fromkeys(cells["mechanism"]))]


def plot_matrix(cells: pd.DataFrame) -> Figure:
    """Draw the matrix, coloured by outcome, with the outcome written into each cell."""
    table = matrix_table(cells)
    figure = Figure(figsize=(1.35 * len(table.columns) + 3.2, 0.34 * len(table) + 1.7), layout="constrained")
    axes = figure.subplots()
    for row, ability in enumerate(table.index):
        for column, mechanism in enumerate(table.columns):
            outcome = table.loc[ability, mechanism]
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=COLOURS[outcome], edgecolor="white", linewidth=2))
            dark = outcome in ("yes", "silently no")
            axes.text(column + 0.5, row + 0.5, outcome, ha="center", va="center", fontsize=8, color="white" if dark else "0.15")
    axes.set(xlim=(0, len(table.columns)), ylim=(len(table), 0))
    axes.set_xticks([place + 0.5 for place in range(len(table.columns))], [name.replace("_", "\n") for name in table.columns], fontsize=8)
    axes.set_yticks([place + 0.5 for place in range(len(table))], table.index, fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if "provenance" in cells.attrs:
        axes.set_xlabel(cells.attrs["provenance"], fontsize=7)
    legend = [Patch(color=COLOURS[outcome], label=f"{outcome}: {meaning}") for outcome, meaning in OUTCOMES.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def print_limits(mechanism: str, cells: pd.DataFrame | None = None) -> None:
    """Print the abilities that a mechanism does not simply have, and why; by default those that are stored.

    Raises:
        ValueError: there is no cell of such a mechanism.
    """
    cells = load_matrix() if cells is None else cells
    mine = cells[cells["mechanism"] == mechanism]
    if mine.empty:
        raise ValueError(f"unknown mechanism {mechanism!r}: expected one of {', '.join(cells['mechanism'].unique())}")
    print(f"{mechanism}: {(mine['outcome'] == 'yes').sum()} of {len(mine)} abilities")
    for cell in mine[mine["outcome"] != "yes"].itertuples():
        print(f"{cell.outcome:11}  {cell.ability}", *textwrap.wrap(cell.says, 105, initial_indent=" " * 17, subsequent_indent=" " * 17), sep="\n")


def main() -> None:
    """Run the command."""
    warnings.simplefilter("ignore")  # what libraries warn of belongs to the trials
    todo = [(ability, mechanism) for ability in TRIALS for mechanism in MECHANISMS]
    cells = pd.DataFrame([run_trial(*each) for each in track(todo, "Trials")])
    print(matrix_table(cells).to_string())
    for mechanism in MECHANISMS:
        print()
        print_limits(mechanism, cells)
    found = {"measured": date.today().isoformat(), "machine": machine("transformer-lens", "nnsight", "accelerate"), "cells": cells.to_dict("records")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "abilities.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot_matrix(load_matrix()).savefig(RESULTS / "abilities.png", dpi=120)
    print("written to benchmarks/results/abilities.json and abilities.png")


if __name__ == "__main__":
    main()
