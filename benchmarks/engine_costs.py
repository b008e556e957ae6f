"""What steering costs in vLLM and llama.cpp: tokens per second, steered and not.

    python -m benchmarks.engine_costs [--quick]

in the environment of `make engines`. Every round writes the same number of tokens for 64 prompts at
once, in turn: by vLLM as it comes (eager, as steering needs it), by vLLM that was started with 64
vectors while nobody asks for them, and with 1, 8 and 64 different ones in the batch; by `generate`
of transformers, unsteered and steered by one; and by llama.cpp, which takes one prompt at a time
and therefore the first eight only. Ratios are of one round. The prefix cache is off, since it would
hold the prompts of the round before. It prints a table and writes the part "costs" of
`results/engines.json`, and `results/engines_cost.png`. Where there is a GPU, vLLM and transformers
run there, in bf16.

An engine has several processes, and what else a machine does falls on one way and not on the next:
on two cores that were busy part of the time, steering seemed to make vLLM five times as fast. So
the share of the processors that other programs took is measured as well, and above a twentieth
nothing is written.
"""

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from benchmarks.charts import Panel, plot_ratios
from benchmarks.shapes import random_gpt2
from benchmarks.stored import machine, machine_line, store_part
from benchmarks.timing import interleaved, seconds_of, summary
from common.loading import load_model
from common.serving.gguf_model import save_model_gguf
from common.serving.llama_cpp import steer_llama_cpp
from common.serving.requests import steering_args
from common.serving.vllm_plugin import vllm_package
from common.vectors.steering_vector import SteeringVector

PROMPTS, PROMPT_TOKENS, DISTINCT = 64, 16, (1, 8, 64)
SINGLE = 8  # prompts of an engine that takes them one by one
BUSY = 0.05  # the share of the processors that other programs may take
PLAIN, IDLE, TRANSFORMERS = "vLLM", "vLLM, started with vectors", "transformers"
LLAMA_CPP = "llama.cpp"


class Case(NamedTuple):
    """A model: its shape, how much is written, and what steering may cost."""

    name: str
    shape: str | None  # None: the embedded model
    layer: int
    new_tokens: int
    asked: float


CASES = [Case("embedded", None, 2, 48, 1.10), Case("gpt2-small shape", "gpt2-small", 6, 16, 1.03)]


def steered(number: int) -> str:
    """The name of the way in which so many vectors are in the batch."""
    return f"vLLM, {number} distinct vector{'s' * (number > 1)}"


class Engines:
    """A model in vLLM, plain and started with vectors, in llama.cpp, and in transformers.

    Args:
        case: the model.
        device: "cpu" or "cuda".
    """

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        embedded, tokenizer, _ = load_model("embedded", device="cpu")
        model = random_gpt2(case.shape) if case.shape else embedded
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model.save_pretrained(folder / "model")
            self.vectors = _vectors(model, case.layer)
            for number, vector in enumerate(self.vectors):
                vector.save(folder / f"v{number}.safetensors")
            paths = {f"v{n}": f"{folder / f'v{n}.safetensors'}" for n in range(len(self.vectors))}
            steering = {"vectors": paths, "max_coeff": 10}
            save_model_gguf(model, tokenizer, folder / "model.gguf")
            self.llama = _llama(folder / "model.gguf")
            self.plain = _engine(folder / "model", dtype, {})
            self.steering = _engine(folder / "model", dtype, {"steering": steering})
        self.model = model.to(device, dtype)  # pyright: ignore[reportArgumentType]
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size - 1
        self.ids = torch.randint(1, vocabulary, (PROMPTS, PROMPT_TOKENS), generator=generator)

    def ways(self) -> dict[str, Callable[[], float]]:
        """Everything that is timed; each function returns its seconds."""
        ways = {
            PLAIN: lambda: self._vllm(self.plain, 0),
            IDLE: lambda: self._vllm(self.steering, 0),
            **{steered(n): lambda n=n: self._vllm(self.steering, n) for n in DISTINCT},
            TRANSFORMERS: lambda: self._transformers(None),
            f"{TRANSFORMERS}, steered": lambda: self._transformers(self.vectors[0]),
            LLAMA_CPP: lambda: self._llama_cpp(None),
            f"{LLAMA_CPP}, steered": lambda: self._llama_cpp(self.vectors[0]),
        }
        return ways

    def _vllm(self, llm: Any, distinct: int) -> float:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0,
                max_tokens=self.case.new_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=steering_args(f"v{number % distinct}", 3.0) if distinct else None,
            )
            for number in range(PROMPTS)
        ]
        prompts = [{"prompt_token_ids": row} for row in self.ids.tolist()]
        outputs: list[Any] = []
        seconds = seconds_of(lambda: outputs.extend(llm.generate(prompts, params, use_tqdm=False)))
        written = sum(len(one.outputs[0].token_ids) for one in outputs)
        if written != PROMPTS * self.case.new_tokens:
            raise RuntimeError(f"expected all texts at full length, got {written} tokens")
        return seconds

    def _transformers(self, vector: SteeringVector | None) -> float:
        ids = self.ids.to(self.device)
        options = {"max_new_tokens": self.case.new_tokens, "min_new_tokens": self.case.new_tokens}
        around = nullcontext() if vector is None else vector.apply(self.model, multiplier=3.0)
        with around, torch.no_grad():
            return seconds_of(
                lambda: self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, **options
                ),
                self.device,
            )

    def _llama_cpp(self, vector: SteeringVector | None) -> float:
        def write() -> None:
            for ids in self.ids[:SINGLE].tolist():
                self.llama.reset()
                tokens = self.llama.generate(ids, temp=0.0, repeat_penalty=1.0)
                for _ in range(self.case.new_tokens):
                    next(tokens)

        around = nullcontext() if vector is None else steer_llama_cpp(self.llama, vector, 3.0)
        with around:
            return seconds_of(write)

    def close(self) -> None:
        """End the processes of the engines."""
        for llm in (self.plain, self.steering):
            llm.llm_engine.engine_core.shutdown()


def _vectors(model: PreTrainedModel, layer: int) -> list[SteeringVector]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(DISTINCT), model.config.hidden_size, generator=generator)
    return [SteeringVector({layer: row / row.norm()}) for row in rows]


def _llama(path: Path) -> Any:
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    return Llama(f"{path}", n_ctx=128, n_threads=threads, n_threads_batch=threads, verbose=False)


def _engine(folder: Path, dtype: torch.dtype, additional_config: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        dtype=dtype,
        enforce_eager=True,
        async_scheduling=False,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=PROMPTS,
        gpu_memory_utilization=0.2,
        additional_config=additional_config,
    )


def _processor_seconds() -> tuple[float, float]:
    """Return what all programs of this machine used so far, and what this one and its own did."""
    times = psutil.cpu_times()
    everything = sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0)
    me = psutil.Process()
    mine = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return everything, sum(one.user + one.system for one in mine)


def _others(before: tuple[float, float], after: tuple[float, float], seconds: float) -> float:
    """Return the share of the processors that other programs took in so many seconds."""
    everything, mine = (late - early for early, late in zip(before, after))
    return max(0.0, everything - mine) / (seconds * (os.cpu_count() or 1))


def measure(case: Case, device: str, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Return a row for each way, and the share of the processors that other programs took.

    A row has tokens per second and the ratio to the same, unsteered.
    """
    engines = Engines(case, device)
    try:
        before, begun = _processor_seconds(), time.perf_counter()
        seconds = interleaved(engines.ways(), rounds, case.name)
        others = _others(before, _processor_seconds(), time.perf_counter() - begun)
    finally:
        engines.close()
    rows = []
    for way, times in seconds.items():
        below = next(one for one in (TRANSFORMERS, LLAMA_CPP, PLAIN) if way.startswith(one))
        prompts = SINGLE if below == LLAMA_CPP else PROMPTS
        found = summary(times, seconds[below])
        rows.append(
            {
                "model": case.name,
                "way": way,
                "tokens per second": prompts * case.new_tokens / found["seconds"],
                "times": found["median"],
                "spread": (found["low"], found["high"]),
                "compared with": below,
                "asked": case.asked if "distinct" in way else None,
            }
        )
    return rows, others


def cost_table(results: dict[str, Any]) -> pd.DataFrame:
    """Return the stored costs: how many times as long as the same, unsteered."""
    rows = [row for row in results["rows"] if row["way"] != row["compared with"]]
    return pd.DataFrame(
        {
            "model": [row["model"] for row in rows],
            "way": [row["way"] for row in rows],
            "times unsteered": [row["times"] for row in rows],
            "quartiles": ["{:.2f}–{:.2f}".format(*row["spread"]) for row in rows],
            "asked": [row["asked"] for row in rows],
        }
    )


def times_written(results: dict[str, Any], engine: str) -> str:
    """Return how many times as long steered texts take, as pages write it: "1.00 to 1.05 times".

    Args:
        results: the stored costs.
        engine: the way whose unsteered time they are compared with.
    """
    times = [
        row["times"]
        for row in results["rows"]
        if row["compared with"] == engine and row["way"] not in (engine, IDLE)
    ]
    low, high = f"{min(times):.2f}", f"{max(times):.2f}"
    return f"{low} times" if low == high else f"{low} to {high} times"


def report(results: dict[str, Any]) -> None:
    """Print the table."""
    print(f"\n{PROMPTS} prompts of {PROMPT_TOKENS} tokens at once; times as long, medians\n")
    print(f"{'model':<18}{'way':<30}{'tokens/s':>10}{'times':>8}   quartiles      asked")
    for row in results["rows"]:
        low, high = row["spread"]
        asked = f"{row['asked']:.2f}" if row["asked"] else ""
        print(
            f"{row['model']:<18}{row['way']:<30}{row['tokens per second']:>10.0f}"
            f"{row['times']:>8.3f}   {low:.3f}–{high:.3f}    {asked}"
        )
    share = results["other programs"]
    print(f"\nother programs took {share:.0%} of the processors; {machine_line(results)}")


def plot(results: dict[str, Any]) -> Figure:
    """Draw how much longer it takes."""
    rows = [row for row in results["rows"] if row["way"] != row["compared with"]]
    labels = [f"{row['model']}, {row['way']}" for row in rows]
    panel = Panel("times", "spread", "asked", "times as long as the same, unsteered")
    return plot_ratios(rows, labels, [panel], "Steering while serving")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure what steering costs in engines.")
    parser.add_argument("--quick", action="store_true", help="one round, embedded; writes nothing")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each case")
    options = parser.parse_args()
    # Two engines share the machine, and both keep a process of their own.
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    rounds = 1 if options.quick else options.rounds
    results: dict[str, Any] = {
        "measured": datetime.date.today().isoformat(),
        "machine": machine(vllm_package(), "llama-cpp-python"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "rounds": rounds,
    }
    cases = CASES[:1] if options.quick else CASES
    measured = [measure(case, device, rounds) for case in cases]
    results["rows"] = [row for rows, _ in measured for row in rows]
    results["other programs"] = max(others for _, others in measured)
    report(results)
    if results["other programs"] > BUSY:
        print(
            f"Other programs took more than {BUSY:.0%} of the processors: these figures mean"
            " nothing, and nothing is written. Run this again when the machine is free."
        )
    elif not options.quick:
        store_part("costs", results, {"engines_cost": plot(results)}, "engines")


if __name__ == "__main__":
    main()
