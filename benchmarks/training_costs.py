"""What training and applying a vector costs, beside steering-vectors and the least possible.

    python -m benchmarks.training_costs [--peer PYTHON] [--quick]

prints tables and writes `results/extraction.json` and `results/extraction.png`. PYTHON is the
interpreter of an environment with `peers.txt`; `make benchmark-extraction` makes one. The least is
the bare cost of the needed blocks: embeddings and blocks run one after the other on the same
batches, and nothing is read or recorded.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import PreTrainedModel

from benchmarks.charts import Panel, plot_ratios
from benchmarks.peer_client import Peer
from benchmarks.shapes import random_gpt2, random_pairs, word_tokenizer
from benchmarks.stored import machine, machine_line, store
from benchmarks.timing import interleaved, ratio
from common.loading import load_model
from common.places.blocks import get_hidden
from common.vectors.steering_vector import SteeringVector
from common.vectors.training import train_steering_vector
from embedded_model import grammar

PAIRS, TOKENS = 16, 16


class Case(NamedTuple):
    """What is trained, and what was asked for: against the peer, and against the least.

    A batch of n is n pairs: ours computes 2n prompts in one pass, the peer in two passes of n.
    """

    shape: str
    layers: list[int] | None  # None: all
    batch_size: int
    asked_peer: float
    asked_bare: float | None


CASES = [
    Case("gpt2-xl", [5], 1, 12, 1.15),
    Case("gpt2-xl", [5], 8, 9, 1.15),
    Case("gpt2-small", [1], 1, 10, 1.3),
    Case("gpt2-small", [1], 8, 8, 1.3),
    Case("gpt2-small", None, 1, 1.3, None),
    Case("gpt2-small", None, 8, 1.3, None),
]
STEERING_ROUNDS = 15


@torch.no_grad()
def bare_blocks(model: PreTrainedModel, batches: list[torch.Tensor], last: int) -> None:
    """Run embeddings and blocks 0 to `last` on token ids [batch, pos], and nothing else."""
    core = model.transformer
    for ids in batches:
        hidden = core.wte(ids) + core.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in core.h[: last + 1]:
            hidden = get_hidden(block(hidden))


def compare_training(cases: list[Case], peer: Peer | None, rounds: int) -> list[dict[str, Any]]:
    """Time training in every case: ours, the peer's, and the bare blocks."""
    rows, model, built = [], None, ""
    for case in cases:
        if case.shape != built:
            model = None  # the old one goes before the new one comes
            model, built = random_gpt2(case.shape), case.shape
        rows.append(compare_case(case, model, peer, rounds))
    return rows


def compare_case(
    case: Case, model: PreTrainedModel, peer: Peer | None, rounds: int
) -> dict[str, Any]:
    """Time training in one case, and compare the vector with the peer's."""
    tokenizer, pairs = word_tokenizer(), random_pairs(PAIRS, TOKENS)
    ids = torch.tensor(tokenizer([prompt for pair in pairs for prompt in pair])["input_ids"])
    batches = list(ids.split(2 * case.batch_size))
    last = max(case.layers) if case.layers else model.config.n_layer - 1
    found: dict[str, SteeringVector] = {}

    def ours() -> None:
        found["ours"] = train_steering_vector(
            model, tokenizer, pairs, layers=case.layers, batch_size=case.batch_size
        )

    ways: dict[str, Callable] = {"ours": ours, "bare": lambda: bare_blocks(model, batches, last)}
    if peer:
        job = {"job": "training", "pairs": PAIRS, "tokens": TOKENS, "vectors": str(peer.vectors)}
        job |= {"shape": case.shape, "layers": case.layers, "batch_size": case.batch_size}
        ways["peer"] = lambda: peer.ask(job)  # its own seconds
    where = "all layers" if case.layers is None else f"layer {last}"
    seconds = interleaved(ways, rounds, f"{case.shape}, {where}, batch {case.batch_size}")
    row = {
        "shape": case.shape,
        "layers": "all" if case.layers is None else last,
        "batch": case.batch_size,
        "ours, s": statistics.median(seconds["ours"]),
    }
    row["of the bare blocks"], *row["spread, bare"] = ratio(seconds["ours"], seconds["bare"])
    row["asked, bare"] = case.asked_bare
    if peer:
        row["faster than the peer"], *row["spread, peer"] = ratio(seconds["peer"], seconds["ours"])
        row["asked, peer"] = case.asked_peer
        theirs = load_file(peer.vectors)
        row["largest difference"] = max(
            (vector - theirs[str(layer)]).abs().max().item()
            for layer, vector in found["ours"].layer_activations.items()
        )
    return row


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
        "d_model": d_model,
        "layer": layer,
        "new tokens": new_tokens,
        "rounds": rounds,
        "of unsteered": median,
        "spread": spread,
    }


def many_pairs(count: int = 10_000) -> dict[str, Any]:
    """Train on many pairs of about 20 tokens on the embedded model; measure time and memory."""
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
        "d_model": model.config.n_embd,
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
    print("\n" + machine_line(results))


def plot(results: dict[str, Any]) -> Figure:
    """Draw how much faster than the peer each case is, and how far from the least."""
    rows = results["extraction"]
    layers = ["all layers" if row["layers"] == "all" else f"layer {row['layers']}" for row in rows]
    labels = [f"{row['shape']}, {where}, batch {row['batch']}" for row, where in zip(rows, layers)]
    peer = "times as fast as steering-vectors"
    bare = "times the bare cost of the needed blocks"
    panels = [
        Panel("faster than the peer", "spread, peer", "asked, peer", peer),
        Panel("of the bare blocks", "spread, bare", "asked, bare", bare),
    ]
    return plot_ratios(rows, labels, panels, "Training a steering vector")


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
    cases = [case for case in CASES if not options.quick or case.shape != "gpt2-xl"]
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
        results["extraction"] = compare_training(cases, peer, 3 if quick else options.rounds)
        if peer:
            peer.close()
    if not quick:
        results["steering"].append(
            compare_steering(random_gpt2("gpt2-xl"), "gpt2-xl shape", 5, 6, STEERING_ROUNDS)
        )
    report(results)
    if not options.quick:
        store(results, {"extraction": plot(results)}, "extraction")


if __name__ == "__main__":
    main()
