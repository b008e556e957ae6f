"""What it costs to train and to apply a steering vector, beside steering-vectors and beside the least it can cost.

    python -m benchmarks.extraction [--peer PYTHON] [--quick]

prints tables and writes `results/extraction.json` and `results/extraction.png`. PYTHON is the
interpreter of an environment with `peers.txt`; `make benchmark-extraction` makes one. The least is
the bare cost of the blocks that are
needed: embeddings and blocks run one after the other on the same batches, nothing read and nothing
recorded.
"""

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from benchmarks.shapes import random_gpt2, random_pairs, word_tokenizer
from benchmarks.timing import interleaved, machine, ratio
from common.loading import load_model
from common.places.blocks import get_hidden
from common.vectors.steering_vector import SteeringVector
from common.vectors.training import train_steering_vector
from embedded_model import grammar

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAIRS, TOKENS = 16, 16
# A batch of n is n pairs: ours computes their 2n prompts in one pass, the peer in two passes of n.
# shape, layers (None: all), batch size, what is asked for against the peer and against the least
CASES = [
    ("gpt2-xl", [5], 1, 12, 1.15),
    ("gpt2-xl", [5], 8, 9, 1.15),
    ("gpt2-small", [1], 1, 10, 1.3),
    ("gpt2-small", [1], 8, 8, 1.3),
    ("gpt2-small", None, 1, 1.3, None),
    ("gpt2-small", None, 8, 1.3, None),
]
STEERING_ROUNDS = 15


class Peer:
    """The peers in their own environment, waiting to be told what to time."""

    def __init__(self, python: str, folder: Path):
        self.vectors = folder / "vectors.safetensors"
        command = [python, str(HERE / "peer.py"), str(torch.get_num_threads())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._answer()

    def train(self, shape: str, layers: list[int] | None, batch_size: int) -> float:
        """Let it train once, and return its seconds."""
        case = {
            "shape": shape,
            "layers": layers,
            "batch_size": batch_size,
            "pairs": PAIRS,
            "tokens": TOKENS,
            "vectors": str(self.vectors),
        }
        return self.ask({"job": "training", **case})

    def ask(self, case: dict[str, Any]) -> Any:
        """Let it do one job (see `peer.py`), and return its answer."""
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the environment of the peers does not work: see its message above")
        return json.loads(line)

    def close(self) -> None:
        """Let it end."""
        self.process.stdin.close()
        self.process.wait()


@torch.no_grad()
def bare_blocks(model: PreTrainedModel, batches: list[torch.Tensor], last: int) -> None:
    """Run embeddings and blocks 0 to `last` on token ids [batch, pos], and nothing else."""
    core = model.transformer
    for ids in batches:
        hidden = core.wte(ids) + core.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in core.h[: last + 1]:
            hidden = get_hidden(block(hidden))


def compare_extraction(cases: list[tuple], peer: Peer | None, rounds: int) -> list[dict[str, Any]]:
    """Time training in every case: ours, the peer's, and the bare blocks."""
    rows = []
    tokenizer, pairs = word_tokenizer(), random_pairs(PAIRS, TOKENS)
    ids = torch.tensor(tokenizer([prompt for pair in pairs for prompt in pair])["input_ids"])
    model, built = None, ""
    for shape, layers, batch_size, asked_peer, asked_bare in cases:
        if shape != built:
            model = None  # the old one goes before the new one comes
            model, built = random_gpt2(shape), shape
        last = max(layers) if layers else model.config.n_layer - 1
        found: dict[str, SteeringVector] = {}

        def ours() -> None:
            found["ours"] = train_steering_vector(
                model, tokenizer, pairs, layers=layers, batch_size=batch_size
            )

        ways: dict[str, Callable] = {
            "ours": ours,
            "bare": lambda: bare_blocks(model, list(ids.split(2 * batch_size)), last),
        }
        if peer:
            ways["peer"] = lambda: peer.train(shape, layers, batch_size)
        seconds = interleaved(
            ways,
            rounds,
            f"{shape}, {'all layers' if layers is None else f'layer {last}'}, batch {batch_size}",
        )
        row = {
            "shape": shape,
            "layers": "all" if layers is None else last,
            "batch": batch_size,
            "ours, s": statistics.median(seconds["ours"]),
        }
        row["of the bare blocks"], *row["spread, bare"] = ratio(seconds["ours"], seconds["bare"])
        row["asked, bare"] = asked_bare
        if peer:
            row["faster than the peer"], *row["spread, peer"] = ratio(
                seconds["peer"], seconds["ours"]
            )
            row["asked, peer"] = asked_peer
            theirs = load_file(peer.vectors)
            row["largest difference"] = max(
                (vector - theirs[str(layer)]).abs().max().item()
                for layer, vector in found["ours"].layer_activations.items()
            )
        rows.append(row)
    return rows


def compare_steering(
    model: PreTrainedModel, name: str, layer: int, new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Time greedy generation with one vector at one layer against the same without."""
    d_model = model.config.get_text_config().hidden_size
    vector = SteeringVector(
        {layer: torch.randn(d_model, generator=torch.Generator().manual_seed(0))}
    )
    ids = torch.arange(10, 18)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def unsteered() -> None:
        model.generate(**inputs, **options)

    def steered() -> None:
        with vector.apply(model):
            model.generate(**inputs, **options)

    seconds = interleaved({"steered": steered, "unsteered": unsteered}, rounds, f"{name}, steering")
    median, *spread = ratio(seconds["steered"], seconds["unsteered"])
    return {
        "model": name,
        "layer": layer,
        "new tokens": new_tokens,
        "rounds": rounds,
        "of unsteered": median,
        "spread": spread,
    }


def many_pairs(count: int = 10_000) -> dict[str, Any]:
    """Train on many pairs of about 20 tokens with the embedded model; time and memory on top of what was there."""
    model, tokenizer, _ = load_model("embedded", device="cpu")
    source = grammar.documents(4242)
    prompts: dict[str, None] = {}
    while len(prompts) < 2 * count:
        prompts[" ".join(next(source).split()[:16])] = None
    texts = list(prompts)
    pairs = list(zip(texts[::2], texts[1::2]))
    mean = statistics.mean(len(ids) for ids in tokenizer(texts[:1000])["input_ids"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    train_steering_vector(
        model,
        tokenizer,
        pairs,
        batch_size=64,
        show_progress=True,
        tqdm_desc=f"{count} pairs, all layers",
    )
    seconds = time.perf_counter() - started
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return {
        "pairs": count,
        "tokens": round(mean, 1),
        "layers": "all",
        "seconds": seconds,
        "peak memory added, GiB": added,
    }


def report(results: dict[str, Any]) -> None:
    """Print the tables."""
    table = pd.DataFrame(results["extraction"])
    shown = [name for name in table.columns if not name.startswith("spread")]
    print(f"\nTraining from {PAIRS} pairs of {TOKENS} tokens; ratios are medians\n")
    print(table[shown].to_string(index=False, float_format=lambda x: f"{x:.3g}", na_rep=""))
    print("\nGenerating with one vector, against the same without\n")
    print(
        pd.DataFrame(results["steering"])
        .drop(columns="spread")
        .to_string(index=False, float_format=lambda x: f"{x:.3f}")
    )
    print("\nMany pairs, embedded model\n")
    print(
        pd.DataFrame([results["many pairs"]]).to_string(
            index=False, float_format=lambda x: f"{x:.2f}"
        )
    )
    print("\n" + ", ".join(f"{name} {value}" for name, value in results["machine"].items()))


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw how much faster than the peer each case is, and how far from the least."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = results["extraction"]
    layers = ["all layers" if row["layers"] == "all" else f"layer {row['layers']}" for row in rows]
    labels = [f"{row['shape']}, {where}, batch {row['batch']}" for row, where in zip(rows, layers)]
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 0.5 * len(rows) + 1.6), sharey=True, layout="constrained"
    )
    parts = [
        (
            "faster than the peer",
            "spread, peer",
            "asked, peer",
            "times as fast as steering-vectors",
        ),
        (
            "of the bare blocks",
            "spread, bare",
            "asked, bare",
            "times the bare cost of the needed blocks",
        ),
    ]
    for axis, (name, spread, asked, title) in zip(axes, parts):
        values = [row.get(name, float("nan")) for row in rows]
        low_high = [row.get(spread, (float("nan"),) * 2) for row in rows]
        errors = [
            [value - low for value, (low, _) in zip(values, low_high)],
            [high - value for value, (_, high) in zip(values, low_high)],
        ]
        axis.barh(labels, values, xerr=errors, color="#4878a8", ecolor="#333333", capsize=3)
        for place, (value, row) in enumerate(zip(values, rows)):
            axis.text(value / 2, place, f"{value:.3g}", va="center", ha="center", color="white")
            if row.get(asked):
                axis.plot(
                    [row[asked]] * 2, [place - 0.4, place + 0.4], color="#c0392b", linewidth=2
                )
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(
        "Training a steering vector: bars are medians with quartiles, red marks what was asked for",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description="Measure what training and applying a steering vector costs."
    )
    parser.add_argument(
        "--peer", help="Python of an environment with steering-vectors (benchmarks/peers.txt)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only the small shape, and fewer rounds; writes nothing",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each case of training")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.quick or case[0] != "gpt2-xl"]
    results: dict[str, Any] = {"machine": machine()}
    quick = options.quick
    # The embedded model is so small that it is faster with one thread. It comes first, since the
    # peak of memory is that of the whole process.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results["many pairs"] = many_pairs(1000 if quick else 10_000)
    embedded, _, preset = load_model("embedded", device="cpu")
    rounds = 3 if quick else 2 * STEERING_ROUNDS
    results["steering"] = [compare_steering(embedded, "embedded", preset.layer, 100, rounds)]
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(options.peer, Path(folder)) if options.peer else None
        if peer:
            results["peer"] = peer.versions
        results["extraction"] = compare_extraction(cases, peer, 3 if quick else options.rounds)
        if peer:
            peer.close()
    if not quick:
        results["steering"].append(
            compare_steering(random_gpt2("gpt2-xl"), "gpt2-xl shape", 5, 6, STEERING_ROUNDS)
        )
    report(results)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "extraction.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results, RESULTS / "extraction.png")
        print(f"written to {RESULTS.relative_to(HERE.parent)}/extraction.json and extraction.png")


if __name__ == "__main__":
    main()
