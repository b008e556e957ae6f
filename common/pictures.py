"""Pictures that several notebooks draw."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure


def token_strip(rows: Sequence[Sequence[str]], marked: Sequence[Sequence[int]], labels: Sequence[str], title: str = "") -> Figure:
    """Draw texts as strips of tokens, the marked ones in colour.

    Args:
        rows: the tokens of each text; a space in front of a token is shown as it is written, with a dot.
        marked: the positions to colour in each text.
        labels: what stands in front of each strip.
        title: above the picture.

    Raises:
        ValueError: the three have different lengths, or a position lies outside its text.
    """
    if not len(rows) == len(marked) == len(labels):
        raise ValueError(f"expected as many rows as marks and labels, got {len(rows)}, {len(marked)} and {len(labels)}")
    for row, positions in zip(rows, marked):
        if any(not 0 <= position < len(row) for position in positions):
            raise ValueError(f"expected positions from 0 to {len(row) - 1}, got {list(positions)}")
    figure, axes = plt.subplots(figsize=(11, 0.45 * len(rows) + 0.5), layout="constrained")
    width = 0.0
    for line, (row, positions) in enumerate(zip(rows, marked)):
        left = 0.0
        for position, token in enumerate(row):
            # A fixed width for each character, so that the strips of two texts can be compared.
            size = 0.6 + 0.42 * len(token)
            colour = "tab:red" if position in positions else "0.92"
            axes.barh(line, size, left=left, height=0.72, color=colour, edgecolor="white")
            axes.text(left + size / 2, line, token.replace(" ", "·"), ha="center", va="center", fontsize=8, family="monospace",
                      color="white" if position in positions else "0.25")
            left += size
        width = max(width, left)
    axes.set(xlim=(0, width), yticks=range(len(rows)), title=title)
    axes.set_yticklabels(labels, fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return figure


def plot_line_up(frame: pd.DataFrame, title: str = "") -> Figure:
    """Draw how large an addition is at each token of a prompt, beside what the prompt itself has there.

    Args:
        frame: what `activation_additions.line_up` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = plt.subplots(figsize=(0.95 * len(frame) + 1.5, 3.6), layout="constrained")
    places = range(len(frame))
    axes.bar([place - 0.2 for place in places], frame["residual"], width=0.4, color="0.75", label="residual stream of the prompt")
    axes.bar([place + 0.2 for place in places], frame["steering"], width=0.4, color="tab:red", label="addition")
    for place, row in zip(places, frame.itertuples()):
        if row.steering:
            axes.annotate(f"{row.ratio:.1f}×", (place + 0.2, row.steering), ha="center", va="bottom", fontsize=8)
    added = [column for column in frame.columns if column not in ("prompt", "steering", "residual", "ratio")]
    names = [["prompt", *added], *([row[column] for column in ("prompt", *added)] for _, row in frame.iterrows())]
    labels = ["\n".join(text.replace(" ", "·").replace("<|endoftext|>", "BOS") or "–" for text in name) for name in names]
    axes.set_xticks([-0.9, *places], labels, fontsize=8, family="monospace")
    axes.tick_params(length=0)
    axes.set(ylabel="norm", title=title, xlim=(-1.2, len(frame) - 0.4))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
