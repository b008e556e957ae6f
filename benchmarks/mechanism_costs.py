"""What each mechanism costs in time, memory and lines, beside the unsteered model and two peers.

    python -m benchmarks.mechanism_costs [--peer PYTHON] [--quick] [--rounds N] [--device cpu|cuda]
    [--compile]

prints tables and writes `mechanisms.json` and three pictures (`mechanisms_agreement.png`, `_cost`,
`_profile`) into `results/`. PYTHON is the interpreter of an environment with `peers.txt`; `make
benchmark-mechanisms` makes one. Ratios are round by round against the plain Hugging Face call on
the same model, in the same process; the peers' against the unsteered model in theirs.
`comparison.ipynb` shows what is stored.
"""

import argparse
import ast
import datetime
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.charts import bars
from benchmarks.logit_differences import plot_agreement
from benchmarks.peer_client import Peer
from benchmarks.profiling import NAMES, find_py_spy, plot_profile, profile
from benchmarks.stored import load, machine, machine_line, provenance, store
from benchmarks.workbench import TIMES, XL, Case, Workbench, cases
from common import embedded
from repository.mechanisms import MECHANISMS, mechanism_cells

BY_HAND = (
    "custom_wrapper",
    "pytorch_hooks",
    "baukit",
    "bias_editing",
)  # what is asked of the time is asked of these
ASKED = {
    "forward": 1.02,
    "per token, batch 1": 1.02,
    "per token, batch 8": 1.02,
    "read": 1.1,
    "memory": 0.05,
}


def lines_of_code(name: str) -> int:
    """Count the lines of a notebook's mechanism cells; see `count_lines` for which count."""
    return sum(count_lines(source) for source in mechanism_cells(name))


def count_lines(source: str) -> int:
    """Count the lines of one cell that are neither blank nor comments nor (tried) imports."""

    def imports(node: ast.AST) -> bool:
        inner = (
            [*node.body, *(line for handler in node.handlers for line in handler.body)]
            if isinstance(node, ast.Try)
            else []
        )
        return isinstance(node, ast.Import | ast.ImportFrom) or (
            bool(inner) and all(map(imports, inner))
        )

    skipped = {
        number
        for node in ast.parse(source).body
        if imports(node)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(source.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#")
        for number, line in lines
        if number not in skipped
    )


def measure_costs(case: Case, device: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """Measure the six mechanisms on one model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    bench = Workbench(case, device)
    found = {
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": rounds * case.more_rounds,
        "layer": case.layer,
        "d_model": len(bench.vector),
        "new tokens": case.new_tokens,
        "bytes": bench.bytes,
        "vector": bench.vector.tolist(),
    }
    found["times"] = bench.times(rounds)
    if case.times == TIMES:
        found["memory"] = bench.memories()
        found["agreement"] = bench.agreement()
    if compiled:
        found["compiled"] = bench.compiled(rounds)
    torch.set_num_threads(threads)
    return found


def ask_peers(peer: Peer, case: Case, found: dict[str, Any], device: str) -> dict[str, Any]:
    """Let the peers steer the same model by the same vector, in their own environment."""
    job = {
        name: found[name]
        for name in ("dtype", "layer", "new tokens", "threads", "rounds", "vector")
    }
    where = (
        {"shape": case.shape}
        if case.shape
        else {"shape": "embedded", "folder": str(embedded.FOLDER)}
    )
    return peer.ask({"job": "cost", "name": case.name, "device": device, **where, **job})


def load_results() -> dict[str, Any]:
    """Return what the command stored."""
    return load("mechanisms")


def cost_table(results: dict[str, Any], model: str) -> pd.DataFrame:
    """Return the costs on one model, a row for each mechanism and peer.

    "wrap" and "steer" (switching on and off) count unsteered forward passes; "forward" and "per
    token" are ratios to the unsteered model, "read" to the bare blocks up to that layer; "memory"
    is what the peak gains, as a share of the model.
    """
    found = results["models"][model]
    rows = {}
    for name, times in {**found["times"], **found.get("peers", {})}.items():
        if name != "unsteered":
            rows[name] = {kind: times[kind]["median"] for kind in TIMES if kind in times}
            rows[name]["wrap, s"] = times.get("wrap", {}).get("seconds")
            rows[name]["memory"] = found.get("memory", {}).get(name)
            rows[name]["lines"] = results["lines"].get(name)
    table = pd.DataFrame.from_dict(rows, orient="index").convert_dtypes()
    return table[
        [
            name
            for name in ("wrap, s", *TIMES, "memory", "lines")
            if name in table and table[name].notna().any()
        ]
    ]


def compiled_table(results: dict[str, Any], model: str) -> pd.DataFrame:
    """Return the costs under `torch.compile`, as ratios to the compiled unsteered model."""
    compiled = results["models"][model]["compiled"]
    rows = {
        name: {kind: one.get("median", one.get("error")) for kind, one in row.items()}
        for name, row in compiled.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def asked(results: dict[str, Any]) -> pd.DataFrame:
    """Return what was asked and found, and whether it holds; at GPT2-XL's shape if measured."""
    model = XL if XL in results["models"] else list(results["models"])[-1]
    table, rows = cost_table(results, model), []
    for what, most in ASKED.items():
        for name in MECHANISMS if what in ("read", "memory") else BY_HAND:
            value = table[what].get(name) if what in table else None
            verdict = (
                "not measured" if pd.isna(value) else "holds" if value <= most else "does not hold"
            )
            rows.append(
                {
                    "model": model,
                    "what": what,
                    "mechanism": name,
                    "found": value,
                    "at most": most,
                    "": verdict,
                }
            )
    return pd.DataFrame(rows)


def plot_cost(results: dict[str, Any]) -> Figure:
    """Draw forward passes and tokens against the unsteered model, small and large."""
    measured = results["models"]
    models = ["embedded", XL if XL in measured else list(measured)[-1]]
    kinds = TIMES[2:5]
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.subplots(len(kinds), len(models), sharex="col", sharey=True)
    for (row, kind), (column, model) in itertools.product(enumerate(kinds), enumerate(models)):
        axis, peers = grid[row][column], measured[model].get("peers", {})
        found = {
            name: times[kind]
            for name, times in {**measured[model]["times"], **peers}.items()
            if name != "unsteered"
        }
        colors = ["#b9a36a" if name in peers else "#4878a8" for name in found]
        marks = [ASKED[kind] if name in BY_HAND and model == XL else None for name in found]
        spreads = [(one["low"], one["high"]) for one in found.values()]
        bars(
            axis,
            list(found),
            [one["median"] for one in found.values()],
            spreads,
            marks,
            colors,
            start=1,
            form=".3f",
        )
        axis.axvline(1, color="#333333", linewidth=0.8)
        axis.set_title(f"{kind} ({model}, d_model {measured[model]['d_model']})", fontsize=10)
    for column in range(len(models)):
        highest = max(axis.get_xlim()[1] for axis in grid[:, column])
        if highest > 2:
            grid[-1][column].set_xscale("log")
            ticks = [tick for tick in (1, 1.2, 1.5, 2, 3, 5, 10, 20) if tick < 1.3 * highest]
            grid[-1][column].set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False)
            grid[-1][column].minorticks_off()
        lowest = min([0.98, *(axis.get_xlim()[0] for axis in grid[:, column])])
        grid[-1][column].set_xlim(
            max(lowest, 0.7), highest * 1.25 if highest > 2 else highest + 0.15 * (highest - lowest)
        )
        grid[-1][column].set_xlabel("times as long as unsteered")
    title = (
        "The cost of steering: medians with quartiles; blue the six, brown the peers, red the most"
        " that was asked for"
    )
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(provenance(results), fontsize=7)
    return figure


def pictures(results: dict[str, Any]) -> dict[str, Figure]:
    """Return the pictures of results, by the names of their files."""
    agreements = {
        model: found["agreement"]
        for model, found in results["models"].items()
        if "agreement" in found
    }
    found = {
        "mechanisms_agreement": plot_agreement(agreements),
        "mechanisms_cost": plot_cost(results),
    }
    if "profile" in results:
        found["mechanisms_profile"] = plot_profile(results)
    return found


def report(results: dict[str, Any]) -> None:
    """Print the tables."""

    def show(title: str, table: pd.DataFrame, **options: Any) -> None:
        text = table.to_string(float_format=lambda x: f"{x:.3f}", na_rep="", **options)
        print(f"\n{title}\n\n{text}")

    for model, found in results["models"].items():
        of = f"{found['dtype']}, {found['threads']} threads, {found['rounds']} rounds"
        show(
            f"{model} ({of}): ratios to the unsteered model, reading to the bare blocks",
            cost_table(results, model),
        )
        if "compiled" in found:
            show(
                f"{model}, compiled: ratios to the unsteered model compiled as well",
                compiled_table(results, model),
            )
        if "agreement" in found:
            naive = found["memory"].get("transformer_lens, deep copy")
            if naive is not None:
                print(
                    "\nTransformerLens, given a deep copy of the model instead of its weights:"
                    f" {naive:.2f} of the model added"
                )
            worst = max(found["agreement"], key=lambda pair: pair["largest difference"])
            print(
                f"\nLargest difference of a logit: {worst['largest difference']:.2g} ({worst['a']}"
                f" and {worst['b']})"
            )
    if "profile" in results:
        rows = {
            name: {"milliseconds": row["milliseconds"], **row["packages"]}
            for name, row in results["profile"].items()
        }
        show(
            "One steered pass of the embedded model: milliseconds, and shares by whose code runs",
            pd.DataFrame(rows).T,
        )
    show("What was asked for", asked(results), index=False)
    print("\n" + machine_line(results))


def profiles(py_spy: str, seconds: float, times: dict[str, dict]) -> dict[str, Any]:
    """Profile every mechanism on the embedded model, beside the time of a pass without profiler."""
    found = {name: profile(py_spy, name, seconds) for name in NAMES}
    # By the ratio, which is what was measured in turn: the machine may have been faster or slower
    # for all of them.
    plain = 1000 * times["unsteered"]["forward"]["seconds"]
    return {
        name: {"milliseconds": plain * times[name]["forward"]["median"], **row}
        for name, row in found.items()
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure what each mechanism costs.")
    parser.add_argument(
        "--peer", help="Python of an environment with the peers (benchmarks/peers.txt)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="only the small models, and 3 rounds; writes nothing"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="with torch.compile, too (by default on a GPU)",
    )
    options = parser.parse_args()
    quick, device = options.quick, options.device
    rounds = 3 if quick else options.rounds
    compiled = device == "cuda" if options.compile is None else options.compile
    results: dict[str, Any] = {
        "measured": datetime.date.today().isoformat(),
        "machine": machine("transformer-lens", "nnsight"),
        "device": device,
        "rounds": rounds,
        "lines": {name: lines_of_code(name) for name in MECHANISMS},
        "models": {},
    }
    if device == "cuda":
        results["machine"]["GPU"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(options.peer, Path(folder)) if options.peer else None
        if peer:
            results["peers"] = peer.versions
        for case in cases(device, quick):
            # On the CPU a large model takes too long to compile.
            found = measure_costs(
                case, device, rounds, compiled and (device == "cuda" or case.shape != "gpt2-xl")
            )
            if peer and case.times == TIMES:
                found["peers"] = ask_peers(peer, case, found, device)
            del found["vector"]
            results["models"][case.name] = found
        if peer:
            peer.close()
    py_spy = find_py_spy(options.peer)
    if py_spy and device == "cpu":
        try:
            results["profile"] = profiles(
                py_spy, 3 if quick else 15, results["models"]["embedded"]["times"]
            )
        except RuntimeError as error:
            print(f"No profile: {error}")
    report(results)
    if not py_spy:
        print("No profile: py-spy is not there (benchmarks/peers.txt).")
    if not quick:
        store(results, pictures(results), "mechanisms")


if __name__ == "__main__":
    main()
