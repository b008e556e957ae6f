"""Draws where in a block each of the six mechanisms acts: `python -m repository.pictures`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from repository.mechanisms import ROOT

PICTURE = ROOT / "pictures" / "where_the_six_act.png"
STREAM, RED = "#34618d", "#c0392b"
LEVEL = 0.0  # of the residual stream in the picture


def _box(axes: Axes, x: float, y: float, width: float, text: str, colour: str = "#eef2f7") -> None:
    """Draw a named part of the block, centred at (x, y)."""
    size = 0.62
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - size / 2),
            width,
            size,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=colour,
            edgecolor="0.35",
            zorder=3,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=10, zorder=4)


def _arrow(axes: Axes, start: tuple, end: tuple, colour: str = "0.35", width: float = 1.2) -> None:
    """Draw an arrow from one place to another."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style, zorder=2)


def _branch(axes: Axes, leaves: float, parts: Sequence[tuple[str, float]], joins: float) -> None:
    """Draw a branch that leaves the stream, goes through parts, and is added back."""
    height, x = 1.6, leaves
    axes.plot([leaves, leaves], [LEVEL, height], color="0.35", linewidth=1.2)
    for text, width in parts:
        _arrow(axes, (x, height), (x + 0.45, height))
        x += 0.45 + width / 2
        _box(axes, x, height, width, text)
        x += width / 2
    axes.plot([x, joins], [height, height], color="0.35", linewidth=1.2)
    _arrow(axes, (joins, height), (joins, LEVEL + 0.2))
    axes.add_patch(
        Circle((joins, LEVEL), 0.2, facecolor="white", edgecolor=STREAM, linewidth=2, zorder=4)
    )
    axes.text(joins, LEVEL - 0.015, "+", ha="center", va="center", fontsize=13, zorder=5)


def _note(axes: Axes, x: float, y: float, lines: Sequence[tuple[str, str]], target: float) -> None:
    """Write names, what is done under each, and an arrow straight to the height `target`."""
    up = y > target  # the text stands above what it points at
    for number, (name, what) in enumerate(lines):
        top = y - 0.95 * number
        axes.text(x, top, name, fontsize=10, weight="bold", color=RED, ha="center", va="top")
        axes.text(x, top - 0.4, what, fontsize=9, ha="center", va="top")
    _arrow(axes, (x, y - 0.9 if up else y + 0.12), (x, target), RED, 1.4)


def plot_where() -> Figure:
    """Draw a block of GPT-2 with the place and the means of each of the six mechanisms."""
    figure, axes = plt.subplots(figsize=(9.6, 5.4), layout="constrained")
    axes.add_patch(
        Rectangle((0.9, -0.75), 11.5, 3.05, facecolor="none", edgecolor="0.5", linestyle="--")
    )
    axes.text(1.0, -0.66, "block: transformer.h[layer]", fontsize=9, color="0.35", va="bottom")
    _arrow(axes, (-0.9, LEVEL), (15.6, LEVEL), STREAM, 3)
    axes.text(-0.9, 0.15, "resid_pre", fontsize=10, color=STREAM)
    axes.text(13.4, 0.15, "resid_post", fontsize=10, color=STREAM)
    axes.text(15.6, -0.2, "next block", fontsize=9, color="0.35", ha="right", va="top")
    _branch(axes, 1.5, [("ln_1", 0.8), ("c_attn", 1.1), ("attention", 1.4)], 6.5)
    _branch(axes, 7.0, [("ln_2", 0.8), ("c_fc, GELU", 1.55), ("c_proj", 1.0)], 12.0)
    _note(
        axes, 3.75, 3.5, [("bias_editing, second edit", "c_attn.bias + vW: attention only")], 1.93
    )
    _note(axes, 11.2, 3.5, [("bias_editing", "mlp.c_proj.bias + v: before the sum")], 1.93)
    _note(axes, 3.75, -1.5, [("custom_wrapper", "another module in the block's place")], -0.76)
    at_the_output = [
        ("pytorch_hooks", "a hook returns output + v"),
        ("baukit", "Trace(…, edit_output=…)"),
        ("transformer_lens", "hook_resid_post, by name"),
        ("nnsight", "assign to .output in a trace"),
    ]
    _note(axes, 12.9, -1.5, at_the_output, LEVEL - 0.06)
    explained = (
        "Red: where each of the six adds v, and how.\nAfter the block all six give resid_post + v;"
        " the second edit is another site."
    )
    axes.text(-0.9, -4.2, explained, fontsize=10, color="0.25", va="top", linespacing=1.5)
    axes.set(xlim=(-1.1, 15.8), ylim=(-5.4, 3.7), aspect="equal")
    axes.axis("off")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw where in a block each of the six acts."""
    parser = argparse.ArgumentParser(prog="python -m repository.pictures", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the PNG to write")
    options = parser.parse_args(arguments)
    plt.switch_backend("agg")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot_where().savefig(options.out, dpi=120)
    print("Picture:", options.out)


if __name__ == "__main__":
    main()
