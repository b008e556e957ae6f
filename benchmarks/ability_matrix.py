"""The matrix of abilities as it is stored: read, tabulated, drawn, and what a mechanism lacks."""

import json
import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from benchmarks.stored import provenance
from repository.mechanisms import MECHANISMS

RESULTS = Path(__file__).resolve().parent / "results"
OUTCOMES = {
    "yes": "the functions of the notebook do it",
    "few lines": "with some more, which the table names",
    "error": "it is refused, or fails",
    "silently no": "it runs, and does something else",
}
NOT_MEASURED = "not measured yet"
COLOURS = {
    "yes": "#2e8b57",
    "few lines": "#9fd3a8",
    "error": "#f0a35e",
    "silently no": "#c0392b",
    NOT_MEASURED: "#e6e6e6",
}


def load_matrix(path: Path = RESULTS / "abilities.json") -> pd.DataFrame:
    """Read the stored cells: `mechanism`, `ability`, `outcome`, `says`; `attrs` says whence."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    cells = pd.DataFrame(stored["cells"])
    cells.attrs["provenance"] = provenance(stored)
    return cells


def matrix_table(cells: pd.DataFrame) -> pd.DataFrame:
    """One row for each ability, one column for each mechanism; what was not tried says so."""
    table = cells.pivot(index="ability", columns="mechanism", values="outcome")
    measured = list(dict.fromkeys(cells["mechanism"]))
    others = [name for name in MECHANISMS if name not in measured]
    table = table.reindex(index=list(dict.fromkeys(cells["ability"])), columns=measured + others)
    return table.astype(object).fillna(NOT_MEASURED)


def plot_matrix(cells: pd.DataFrame) -> Figure:
    """Draw the matrix, coloured by outcome, with the outcome written into each cell."""
    table = matrix_table(cells)
    figure = Figure(
        figsize=(1.35 * len(table.columns) + 3.2, 0.34 * len(table) + 1.7), layout="constrained"
    )
    axes = figure.subplots()
    for row, ability in enumerate(table.index):
        for column, mechanism in enumerate(table.columns):
            outcome = table.loc[ability, mechanism]
            axes.add_patch(
                Rectangle(
                    (column, row), 1, 1, facecolor=COLOURS[outcome], edgecolor="white", linewidth=2
                )
            )
            dark = outcome in ("yes", "silently no")
            axes.text(
                column + 0.5,
                row + 0.5,
                outcome,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "0.15",
            )
    axes.set(xlim=(0, len(table.columns)), ylim=(len(table), 0))
    axes.set_xticks(
        [place + 0.5 for place in range(len(table.columns))],
        [name.replace("_", "\n") for name in table.columns],
        fontsize=8,
    )
    axes.set_yticks([place + 0.5 for place in range(len(table))], table.index, fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if "provenance" in cells.attrs:
        axes.set_xlabel(cells.attrs["provenance"], fontsize=7)
    legend = [
        Patch(color=COLOURS[outcome], label=f"{outcome}: {meaning}")
        for outcome, meaning in OUTCOMES.items()
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def abilities(mechanism: str, cells: pd.DataFrame | None = None) -> str:
    """Say how many of the abilities a mechanism has, as in "21 of 26", or "not measured yet"."""
    cells = load_matrix() if cells is None else cells
    mine = cells[cells["mechanism"] == mechanism]
    return NOT_MEASURED if mine.empty else f"{(mine['outcome'] == 'yes').sum()} of {len(mine)}"


def print_limits(mechanism: str, cells: pd.DataFrame | None = None) -> None:
    """Print the abilities that a mechanism does not simply have, and why.

    Args:
        mechanism: one of `MECHANISMS`.
        cells: the matrix; by default the stored one, where a new mechanism is not measured yet.

    Raises:
        ValueError: there is no such mechanism.
    """
    cells = load_matrix() if cells is None else cells
    if mechanism not in {*MECHANISMS, *cells["mechanism"]}:
        raise ValueError(
            f"unknown mechanism {mechanism!r}: expected one of {', '.join(MECHANISMS)}"
        )
    mine = cells[cells["mechanism"] == mechanism]
    if mine.empty:
        print(f"{mechanism}: {NOT_MEASURED} (`make benchmark-mechanisms` does)")
        return
    print(f"{mechanism}: {abilities(mechanism, cells)} abilities")
    for cell in mine[mine["outcome"] != "yes"].itertuples():
        print(
            f"{cell.outcome:11}  {cell.ability}",
            *textwrap.wrap(cell.says, 96, initial_indent=" " * 13, subsequent_indent=" " * 13),
            sep="\n",
        )
