"""What a sweep over layers, coefficients and prompts costs, beside separate runs.

    python -m benchmarks.sweep_costs [--quick]

prints tables and writes `results/sweep.json` and `results/sweep.png`. Three ways do the same:
`sweep` puts every (layer, coefficient, prompt) into one batch; "each setting" runs a batch of all
prompts for every layer and coefficient; "each prompt" runs every prompt alone, as one does with a
library that steers a model by one vector. The texts are compared as well.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.charts import Panel, plot_ratios
from benchmarks.shapes import random_gpt2, random_pairs, word_tokenizer
from benchmarks.stored import machine, machine_line, store
from benchmarks.timing import interleaved, ratio
from common.loading import load_model
from common.measuring.likelihood import kl_divergence
from common.passes.padding import encode
from common.sweeping.grid import Grid
from common.sweeping.sweep import sweep, sweep_logits
from common.texts.generation import completions, generate, logits
from common.texts.sampling import Sampling
from common.vectors.steering_vector import SteeringVector
from common.vectors.training import train_steering_vector
from embedded_model.prompts import SWEEP_PROMPTS, TABLE_PROMPTS

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
        "d_model": grid.model.config.n_embd,
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
    prompts = list(dict.fromkeys([*TABLE_PROMPTS, *SWEEP_PROMPTS]))[: 4 if quick else 20]
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
    print("\n" + machine_line(results))


def plot(results: dict[str, Any]) -> Figure:
    """Draw how much faster a sweep is."""
    rows = results["sweeps"]
    panels = [
        Panel(
            f"faster than {way}",
            f"spread, {way}",
            f"asked, {way}",
            f"times as fast as one run for {way}",
        )
        for way in ("each prompt", "each setting")
    ]
    labels = [f"{row['model']}, d_model {row['d_model']}, {row['kind']}" for row in rows]
    return plot_ratios(rows, labels, panels, "Sweeping")


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
        store(results, {"sweep": plot(results)}, "sweep")


if __name__ == "__main__":
    main()
