"""Grids: how the tone of what a model writes depends on the coefficient, the prompt, and what steers it.

`python -m common.sweeps` draws the picture of the README.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.embedded import grammar
from common.generation import completions, generate
from common.mechanisms import ROOT, load_mechanism
from common.metrics import tone_shares
from common.models import LoadError, load_model

PICTURE = ROOT / "pictures" / "tone_over_coefficient.png"


def love_hate_directions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int, controls: int = 3
) -> dict[str, Tensor]:
    """Return the unit Love-Hate direction and random unit directions, each [d_model], by name."""
    read = load_mechanism("pytorch_hooks").read
    love, hate = (
        read(model, tokenizer(word, return_tensors="pt").to(model.device), layer)[0, -1] for word in ("Love", "Hate")
    )
    noise = torch.randn(controls, len(love), generator=torch.Generator().manual_seed(0)).to(love)
    directions = {"Love - Hate": love - hate} | {f"random {i + 1}": row for i, row in enumerate(noise)}
    return {name: vector / vector.norm() for name, vector in directions.items()}


def tone_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    directions: Mapping[str, Tensor],
    coeffs: Sequence[float],
    prompts: Sequence[str] = tuple(grammar.TABLE_PROMPTS),
    per_prompt: int = 5,
    max_new_tokens: int = 24,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Sample completions (top_p 0.9) for each direction and coefficient, and count their tone.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, padding on the left.
        layer: where to steer (resid_post).
        directions: unit directions [d_model] by name.
        coeffs: strengths, both signs.
        prompts: each is completed `per_prompt` times, all in one batch.
        per_prompt: completions of each prompt.
        max_new_tokens: length of a completion.
        seed: set again for each point, so that the points differ by the steering only.
        show_progress: show a bar.

    Returns:
        One row for each point: `direction`, `coeff`, `positive`, `negative`, `neither` (shares), `count`.
    """
    hooks = load_mechanism("pytorch_hooks")
    inputs = tokenizer(list(prompts) * per_prompt, return_tensors="pt", padding=True).to(model.device)
    points = [(name, coeff) for name in directions for coeff in coeffs]
    rows = []
    for name, coeff in track(points, "Sampling", console=Console(stderr=True), disable=not show_progress):
        torch.manual_seed(seed)
        with hooks.steer(model, layer, coeff * directions[name]):
            ids = hooks.generate(model, inputs, do_sample=True, top_p=0.9, max_new_tokens=max_new_tokens)
        texts = completions(tokenizer, inputs, ids)
        rows.append({"direction": name, "coeff": coeff, **tone_shares(texts), "count": len(texts)})
    return pd.DataFrame(rows)


def tone_by_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conditions: Mapping[str, AbstractContextManager],
    prompts: Sequence[str] = tuple(grammar.TABLE_PROMPTS),
    per_prompt: int = 20,
    max_new_tokens: int = 24,
    seed: int = 0,
) -> pd.DataFrame:
    """Sample completions (top_p 0.9) of each prompt under each condition, and take their mean tone.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, padding on the left.
        conditions: what is open while it generates, by name, for example `vector.apply(model)`; unsteered is added.
        prompts: each is completed `per_prompt` times, all in one batch.
        per_prompt: completions of each prompt.
        max_new_tokens: length of a completion.
        seed: set again for each condition, so that they differ by the steering only.

    Returns:
        [condition, prompt]: the share of positive minus that of negative completions, from -1 to 1.
    """
    inputs = tokenizer(list(prompts) * per_prompt, return_tensors="pt", padding=True).to(model.device)
    rows = {}
    for name, condition in {"unsteered": nullcontext(), **conditions}.items():
        torch.manual_seed(seed)
        with condition:
            ids = generate(model, inputs, do_sample=True, top_p=0.9, max_new_tokens=max_new_tokens)
        texts = completions(tokenizer, inputs, ids)
        shares = [tone_shares(texts[number :: len(prompts)]) for number in range(len(prompts))]
        rows[name] = [share["positive"] - share["negative"] for share in shares]
    return pd.DataFrame(rows, index=list(prompts)).T.rename_axis(index="condition", columns="prompt")


def moves(tones: pd.DataFrame) -> pd.DataFrame:
    """Say how far each condition moved the tone of what `tone_by_prompt` found.

    Returns:
        By condition: `moved` (mean over the prompts, from -2 to 2), `spread` (standard deviation over the prompts) and
        `wrong way` (the share of prompts that moved against the mean).
    """
    moved = tones.drop("unsteered") - tones.loc["unsteered"]
    mean = moved.mean(axis=1)
    wrong = moved.mul(mean.map(lambda value: -1 if value < 0 else 1), axis=0) < 0
    return pd.DataFrame({"moved": mean, "spread": moved.std(axis=1), "wrong way": wrong.mean(axis=1)})


def plot_moves(tones: pd.DataFrame, title: str = "") -> Figure:
    """Draw how far every prompt moved under each condition, and the mean as a bar.

    Args:
        tones: what `tone_by_prompt` returned.
        title: above the picture; say which model it shows.
    """
    moved = tones.drop("unsteered") - tones.loc["unsteered"]
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(moved) + 1.3), layout="constrained")
    axes.barh(moved.index, moved.mean(axis=1), color="0.85", height=0.6)
    for line, (_, row) in enumerate(moved.iterrows()):
        axes.plot(row, [line] * len(row), "o", color="tab:red", alpha=0.5, markersize=5, markeredgewidth=0)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set(xlabel="move of the tone (positive minus negative share); a dot is a prompt, the bar their mean", title=title)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def plot_tone_sweep(rows: pd.DataFrame, title: str = "") -> Figure:
    """Draw positive and negative share over the coefficient: Love-Hate in colour, random directions in grey.

    Args:
        rows: what `tone_sweep` returned.
        title: above the picture; say which model it shows.
    """
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    colours = {"positive": "tab:red", "negative": "tab:blue"}
    for name, group in rows.groupby("direction", sort=False):
        for tone, colour in colours.items():
            control = name.startswith("random")
            axes.plot(
                group["coeff"],
                100 * group[tone],
                color="0.6" if control else colour,
                linestyle="-" if tone == "positive" else "--",
                marker=None if control else "o",
                linewidth=1 if control else 2,
                label=None if control and name != "random 1" else f"{'random directions' if control else name}: {tone}",
            )
    axes.set(xlabel="coefficient on the unit direction", ylabel="share of completions (%)", ylim=(-3, 103), title=title)
    axes.axvline(0, color="0.85", linewidth=1, zorder=0)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw how tone depends on the coefficient, for the README."""
    parser = argparse.ArgumentParser(prog="python -m common.sweeps", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the PNG to write (default: the picture of the README)")
    options = parser.parse_args(arguments)
    try:
        model, tokenizer, preset = load_model()
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    coeffs = [round(preset.coeff * step / 4, 2) for step in range(-6, 7)]
    directions = love_hate_directions(model, tokenizer, preset.layer)
    rows = tone_sweep(model, tokenizer, preset.layer, directions, coeffs, per_prompt=25, show_progress=True)
    name = "embedded model" if "embedded" in model.name_or_path else model.name_or_path
    title = f"{name}, layer {preset.layer}, {rows['count'].iloc[0]} completions for each point"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot_tone_sweep(rows, title).savefig(options.out, dpi=120)
    print(rows.to_string(index=False, float_format="%.2f"))
    print("Picture:", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
