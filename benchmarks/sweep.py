"""What a sweep over layers, coefficients and prompts costs, beside one run for each prompt and setting, and for each setting.

    python -m benchmarks.sweep [--quick]

prints tables and writes `results/sweep.json` and `results/sweep.png`. Three ways do the same:
`sweep` puts every (layer, coefficient, prompt) into one batch; "each setting" runs a batch of all
prompts for every layer and coefficient; "each prompt" runs every prompt alone, as one does with a
library that steers a model by one vector. The texts are compared as well.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.shapes import random_gpt2, random_pairs, word_tokenizer
from benchmarks.timing import interleaved, machine, ratio
from common.loading import load_model
from common.measuring.likelihood import kl_divergence
from common.passes.padding import encode
from common.sweeping.grid import Grid
from common.sweeping.sweep import sweep, sweep_logits
from common.texts.generation import completions, generate, logits
from common.texts.sampling import Sampling
from common.vectors.steering_vector import SteeringVector
from common.vectors.training import train_steering_vector
from embedded_model import grammar

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NEW_TOKENS = 16
COEFFS = [-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0]
# what is asked for on the embedded model: against each prompt, against each setting
ASKED = {"embedded": {"completions": (40, 3.5), "logits": (40, 4)}}

Key = tuple[int, float, str]


class Ways:
    """The same grid in three ways, for completions and for the next token."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vector: SteeringVector,
        coeffs: list[float],
        prompts: list[str],
    ):
        self.model, self.tokenizer, self.vector, self.coeffs, self.prompts = (
            model,
            tokenizer,
            vector,
            coeffs,
            prompts,
        )
        self.found: dict[str, dict[Key, Any]] = {}

    def ways(self, kind: str) -> dict[str, Callable[[], None]]:
        """The three ways of one kind, "completions" or "logits"."""
        own = self._sweep if kind == "completions" else self._sweep_logits
        one = self._complete if kind == "completions" else self._divergence
        return {
            "sweep": own,
            "each setting": lambda: self._each("each setting", one, [self.prompts]),
            "each prompt": lambda: self._each(
                "each prompt", one, [[prompt] for prompt in self.prompts]
            ),
        }

    def _sweep(self) -> None:
        rows = sweep(
            self.model,
            self.tokenizer,
            Grid({"v": self.vector}, coeffs=self.coeffs),
            self.prompts,
            sampling=Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0),
            show_progress=False,
        )
        self._keep(rows, "completion")

    def _sweep_logits(self) -> None:
        grid = Grid({"v": self.vector}, coeffs=self.coeffs)
        rows = sweep_logits(self.model, self.tokenizer, grid, self.prompts, show_progress=False)
        self._keep(rows, "kl")

    def _keep(self, rows: pd.DataFrame, column: str) -> None:
        rows = rows[rows["kind"] == "steering"]
        self.found["sweep"] = {
            (int(row.layer), row.coeff, row.prompt): getattr(row, column)
            for row in rows.itertuples()
        }

    def _each(self, name: str, one: Callable[[list[str]], list], batches: list[list[str]]) -> None:
        self.plain = [
            logits(self.model, encode(self.tokenizer, batch, False))[:, -1] for batch in batches
        ]
        found = self.found[name] = {}
        for layer, vector in self.vector.layer_activations.items():
            for coeff in self.coeffs:
                with SteeringVector({layer: vector}).apply(self.model, multiplier=coeff):
                    for number, batch in enumerate(batches):
                        self.number = number
                        found.update(
                            {
                                (layer, coeff, prompt): value
                                for prompt, value in zip(batch, one(batch), strict=True)
                            }
                        )

    def _complete(self, batch: list[str]) -> list[str]:
        inputs = encode(self.tokenizer, batch, False)
        return completions(
            self.tokenizer, inputs, generate(self.model, inputs, max_new_tokens=NEW_TOKENS)
        )

    def _divergence(self, batch: list[str]) -> list[float]:
        return kl_divergence(
            logits(self.model, encode(self.tokenizer, batch, False))[:, -1], self.plain[self.number]
        ).tolist()


def compare(name: str, grid: Ways, kind: str, rounds: int) -> dict[str, Any]:
    """Time one grid in the three ways, and compare what they found."""
    seconds = interleaved(grid.ways(kind), rounds, f"{name}, {kind}")
    own, others = (
        grid.found["sweep"],
        {way: grid.found[way] for way in ("each setting", "each prompt")},
    )
    row: dict[str, Any] = {
        "model": name,
        "kind": kind,
        "rows": len(own),
        "sweep, s": statistics.median(seconds["sweep"]),
    }
    asked = ASKED.get(name, {}).get(kind, (None, None))
    for way, bar in zip(("each prompt", "each setting"), asked):
        row[f"faster than {way}"], *row[f"spread, {way}"] = ratio(seconds[way], seconds["sweep"])
        row[f"asked, {way}"] = bar
    if kind == "completions":
        row["same texts"] = {
            way: sum(own[key] == other[key] for key in own) / len(own)
            for way, other in others.items()
        }
    else:
        row["largest difference"] = {
            way: max(abs(own[key] - other[key]) for key in own) for way, other in others.items()
        }
    return row


def embedded_grid(quick: bool) -> Ways:
    """All layers of the embedded model, 8 coefficients, 20 prompts."""
    model, tokenizer, _ = load_model("embedded", device="cpu")
    vector = train_steering_vector(model, tokenizer, [("Love", "Hate")]).unit()
    prompts = list(dict.fromkeys([*grammar.TABLE_PROMPTS, *grammar.SWEEP_PROMPTS]))[
        : 4 if quick else 20
    ]
    return Ways(model, tokenizer, vector, COEFFS[:2] if quick else COEFFS, prompts)


def small_grid(quick: bool) -> Ways:
    """Three layers of GPT-2-small's shape, 2 coefficients, 6 prompts of 8 tokens."""
    model, tokenizer = random_gpt2("gpt2-small"), word_tokenizer()
    noise = torch.randn(
        model.config.n_layer, model.config.n_embd, generator=torch.Generator().manual_seed(0)
    )
    vector = SteeringVector({layer: noise[layer] / noise[layer].norm() for layer in (2, 6, 10)})
    prompts = [prompt for pair in random_pairs(3, 8) for prompt in pair]
    return Ways(model, tokenizer, vector, [-2.0, 2.0], prompts[: 2 if quick else 6])


def report(results: dict[str, Any]) -> None:
    """Print the table."""
    table = pd.DataFrame(results["sweeps"])
    shown = [name for name in table.columns if not name.startswith(("spread", "same", "largest"))]
    print(
        "\nOne sweep against one run for each prompt and setting, and for each setting; ratios are"
        " medians\n"
    )
    print(table[shown].to_string(index=False, float_format=lambda x: f"{x:.3g}", na_rep=""))
    for row in results["sweeps"]:
        agreement = row.get("same texts") or row["largest difference"]
        what = "share of equal texts" if "same texts" in row else "largest difference of KL, nats"
        print(
            f"{row['model']}, {row['kind']}: {what}: "
            + ", ".join(f"{value:.2g} ({way})" for way, value in agreement.items())
        )
    print("\n" + ", ".join(f"{name} {value}" for name, value in results["machine"].items()))


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw how much faster a sweep is."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = results["sweeps"]
    labels = [f"{row['model']}, {row['kind']}" for row in rows]
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 0.5 * len(rows) + 1.6), sharey=True, layout="constrained"
    )
    for axis, way in zip(axes, ("each prompt", "each setting")):
        values = [row[f"faster than {way}"] for row in rows]
        spread = [row[f"spread, {way}"] for row in rows]
        errors = [
            [value - low for value, (low, _) in zip(values, spread)],
            [high - value for value, (_, high) in zip(values, spread)],
        ]
        axis.barh(labels, values, xerr=errors, color="#4878a8", ecolor="#333333", capsize=3)
        for place, (value, row) in enumerate(zip(values, rows)):
            axis.text(value / 2, place, f"{value:.3g}", va="center", ha="center", color="white")
            if row[f"asked, {way}"]:
                axis.plot(
                    [row[f"asked, {way}"]] * 2,
                    [place - 0.4, place + 0.4],
                    color="#c0392b",
                    linewidth=2,
                )
        axis.set_xlabel(f"times as fast as one run for {way}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(
        "Sweeping: bars are medians with quartiles, red marks what was asked for", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure what a sweep costs.")
    parser.add_argument(
        "--quick", action="store_true", help="tiny grids and one round; writes nothing"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each case")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    results: dict[str, Any] = {"machine": machine(), "new tokens": NEW_TOKENS, "rounds": rounds}
    grids = {
        "embedded": embedded_grid(options.quick),
        "gpt2-small shape": small_grid(options.quick),
    }
    results["sweeps"] = [
        compare(name, grid, kind, rounds)
        for name, grid in grids.items()
        for kind in ("completions", "logits")
    ]
    report(results)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "sweep.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results, RESULTS / "sweep.png")
        print(f"written to {RESULTS.relative_to(HERE.parent)}/sweep.json and sweep.png")


if __name__ == "__main__":
    main()
