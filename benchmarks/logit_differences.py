"""How far the six mechanisms agree: the largest difference of a logit between any two of them."""

import itertools
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

SMALLEST, LARGEST = 1e-7, 1e-3  # the ends of the scale of colours


def pairwise(found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return rows of `a`, `b` and `largest difference`, one for every pair of tensors."""
    pairs = itertools.combinations(found, 2)
    return [
        {
            "a": a,
            "b": b,
            "largest difference": (found[a].float() - found[b].float()).abs().max().item(),
        }
        for a, b in pairs
    ]


def plot_agreement(agreements: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw a square for each pair, coloured on a log scale; "0" is identical to the last bit.

    Args:
        agreements: what `pairwise` returned, by title.
    """
    # No larger than it is shown in a page, so that labels are read there.
    figure = Figure(figsize=(4 * len(agreements) + 1, 4.2), layout="constrained")
    colours = colormaps["YlOrRd"].with_extremes(
        under="#cfe8cf"
    )  # 0, which has no place on a log scale
    norm = LogNorm(SMALLEST, LARGEST)
    for axes, (title, pairs) in zip(
        figure.subplots(1, len(agreements), squeeze=False)[0], agreements.items()
    ):
        names = list(dict.fromkeys(name for pair in pairs for name in (pair["a"], pair["b"])))
        grid = [[float("nan")] * (len(names) - 1) for _ in names[1:]]
        for pair in pairs:
            row, column, value = (
                names.index(pair["b"]) - 1,
                names.index(pair["a"]),
                pair["largest difference"],
            )
            grid[row][column] = max(value, SMALLEST / 10)
            axes.text(
                column,
                row,
                f"{value:.0e}".replace("e-0", "e-") if value else "0",
                ha="center",
                va="center",
                fontsize=10,
            )
        shades = axes.imshow(grid, norm=norm, cmap=colours)
        written = [name.replace("_", " ") for name in names]
        slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(names) - 1), written[:-1], fontsize=10, **slanted)
        axes.set_yticks(range(len(names) - 1), written[1:], fontsize=10)
        axes.set_title(title, fontsize=11)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.colorbar(shades, ax=figure.axes, label="largest difference of a logit", shrink=0.8)
    return figure
