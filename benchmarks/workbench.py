"""One model with the six mechanisms on it, timed, weighed and compared in turns."""

import copy
import json
import logging
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.logit_differences import pairwise
from benchmarks.shapes import random_gpt2
from benchmarks.timing import interleaved, peak_memory, seconds_of, summary
from benchmarks.training_costs import bare_blocks
from common import embedded
from common.loading import copy_sharing_weights, load_model
from common.texts.generation import generate, logits
from repository.mechanisms import MECHANISMS, Mechanism, load_mechanism

# The model as it is, in the form of a mechanism; what reading is compared with is the bare blocks.
UNSTEERED = Mechanism(
    "unsteered",
    lambda model, tokenizer: model,
    lambda model, inputs, layer: bare_blocks(model, [inputs["input_ids"]], layer),
    lambda model, layer, vector: nullcontext(model),
    logits,
    generate,
)
TIMES = ("wrap", "steer", "forward", "per token, batch 1", "per token, batch 8", "read")
XL = "gpt2-xl shape"


class Case(NamedTuple):
    """A model to measure on. One thread is fastest for the embedded one, which is so small."""

    name: str
    shape: str | dict[str, int] | None  # None: the embedded model
    dtype: torch.dtype
    layer: int
    new_tokens: int
    more_rounds: int = 1  # so many times the rounds, where they are short
    threads: int | None = None
    times: tuple[str, ...] = TIMES


def cases(device: str, quick: bool) -> list[Case]:
    """Return what is measured here: fp32 on the CPU, and bf16 where it has that; bf16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = json.loads((embedded.FOLDER / "preset.json").read_text(encoding="utf-8"))["layer"]
    found = [
        Case("embedded", None, dtype, layer, 16, 1 if quick else 4, 1),
        Case("gpt2-small shape", "gpt2-small", dtype, 1, 8),
    ]
    if not quick:
        found.append(Case(XL, "gpt2-xl", dtype, 5, 4))
    if not quick and device == "cpu" and _has_bf16():
        found.append(Case(f"{XL}, bf16", "gpt2-xl", torch.bfloat16, 5, 4, times=TIMES[2:5]))
    return found


def _has_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and any(
        flag in info.read_text(encoding="utf-8").split() for flag in ("avx512_bf16", "amx_bf16")
    )


class Workbench:
    """One model, what is run on it, and the six mechanisms, which all share its weights."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        model, self.tokenizer, _ = load_model(
            "embedded", device="cpu"
        )  # the others take its tokenizer, which writes nothing
        self.model = (random_gpt2(case.shape) if case.shape else model).to(device, case.dtype)
        self.mechanisms = {
            "unsteered": UNSTEERED,
            **{name: load_mechanism(name) for name in MECHANISMS},
        }
        self.wrapped = {
            name: mechanism.wrap(self.model, self.tokenizer)
            for name, mechanism in self.mechanisms.items()
        }
        hidden = load_mechanism("pytorch_hooks").read(self.model, self.inputs(1), case.layer)
        noise = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
        self.vector = (noise / noise.norm()).to(hidden) * hidden.norm(dim=-1).mean()
        self.bytes = sum(weight.nbytes for weight in self.model.parameters())

    def inputs(self, batch: int, tokens: int = 8, padding: bool = False) -> dict[str, Tensor]:
        """Return prompts [batch, tokens]; with padding, each row is one token shorter."""
        ids = torch.arange(10, 10 + batch * tokens, device=self.device).view(batch, tokens)
        mask = torch.ones_like(ids)
        if padding:
            mask = (
                torch.arange(tokens, device=self.device)
                >= torch.arange(batch, device=self.device)[:, None]
            ).long()
        return {"input_ids": ids, "attention_mask": mask}

    def steered(self, name: str) -> Any:
        """Return a context in which one mechanism steers."""
        return self.mechanisms[name].steer(self.wrapped[name], self.case.layer, self.vector)

    def work(self, name: str, kind: str) -> Callable[[], Any]:
        """Return what is timed of one mechanism, for one of `TIMES`."""
        mechanism, wrapped = self.mechanisms[name], self.wrapped[name]

        def switch() -> None:
            with self.steered(name):
                pass

        if kind in ("wrap", "steer") and name == "unsteered":
            kind = "forward"  # what these are compared with
        return {
            "wrap": lambda: mechanism.wrap(self.model, self.tokenizer),
            "steer": switch,
            "forward": lambda: mechanism.logits(wrapped, self.inputs(1)),
            "per token, batch 1": lambda: self.generate(name, 1),
            "per token, batch 8": lambda: self.generate(name, 8),
            "read": lambda: mechanism.read(wrapped, self.inputs(8, 16), self.case.layer),
        }[kind]

    def generate(self, name: str, batch: int, **options: Any) -> Tensor:
        """Generate exactly as many tokens as the case says, greedily."""
        options = {
            "max_new_tokens": self.case.new_tokens,
            "min_new_tokens": self.case.new_tokens,
            **options,
        }
        return self.mechanisms[name].generate(self.wrapped[name], self.inputs(batch), **options)

    def time(self, name: str, kind: str) -> float:
        """Time one mechanism once, without switching it on and off unless that is what is timed."""
        with nullcontext() if kind in ("wrap", "steer", "read") else self.steered(name):
            return seconds_of(self.work(name, kind), self.device)

    def times(self, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
        """Time all mechanisms in turn; return `summary` by mechanism and kind."""
        found: dict[str, dict] = {name: {} for name in self.mechanisms}
        for kind in self.case.times:
            ways = {
                name: lambda name=name, kind=kind: self.time(name, kind) for name in self.mechanisms
            }
            seconds = interleaved(ways, rounds * self.case.more_rounds, f"{self.case.name}, {kind}")
            tokens = self.case.new_tokens if kind.startswith("per token") else 1
            for name, row in found.items():
                row[kind] = summary(
                    [value / tokens for value in seconds[name]],
                    [value / tokens for value in seconds["unsteered"]],
                )
        return found

    def memory(
        self, name: str, model: PreTrainedModel | None = None, rounds: int = 3
    ) -> int | None:
        """Return the peak bytes of wrapping, steering and generating, on a copy if given."""

        def use() -> None:
            mechanism = self.mechanisms[name]
            wrapped = mechanism.wrap(
                self.model if model is None else copy.deepcopy(model), self.tokenizer
            )
            with mechanism.steer(wrapped, self.case.layer, self.vector):
                mechanism.generate(wrapped, self.inputs(1), max_new_tokens=4, min_new_tokens=4)

        found = [peak_memory(use, self.device) for _ in range(rounds)]
        return None if None in found else int(statistics.median(found))

    def memories(self) -> dict[str, float | None]:
        """Return what each mechanism adds to the unsteered peak, as a share of the model."""
        found = {name: self.memory(name) for name in self.mechanisms}
        free = (
            torch.cuda.mem_get_info()[0]
            if self.device == "cuda"
            else psutil.virtual_memory().available
        )
        if free > 1.5 * self.bytes:  # the naive way: what TransformerLens changes is a second model
            found["transformer_lens, deep copy"] = self.memory(
                "transformer_lens", self.model, rounds=1
            )
        plain = found.pop("unsteered")
        return {
            name: None if plain is None else (value - plain) / self.bytes
            for name, value in found.items()
        }

    def agreement(self) -> list[dict[str, Any]]:
        """Compare the steered logits of all mechanisms in pairs, on a batch with padding."""
        inputs, found = self.inputs(3, padding=True), {}
        for name in MECHANISMS:
            with self.steered(name):
                found[name] = self.mechanisms[name].logits(self.wrapped[name], inputs)[
                    inputs["attention_mask"].bool()
                ]
        return pairwise(found)

    def compiled(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Time compiled passes and tokens against the unsteered model, compiled as well."""
        torch._logging.set_logs(dynamo=logging.ERROR)  # that something is compiled again is no news
        return {name: self._compiled(name, rounds) for name in MECHANISMS}

    def _compiled(self, name: str, rounds: int) -> dict[str, Any]:
        """Time one mechanism; what it cannot do is told by the first line of its error."""
        torch._dynamo.reset()
        own, plain = copy.copy(self), copy_sharing_weights(self.model)
        own.wrapped = {
            "unsteered": plain,
            name: self.mechanisms[name].wrap(copy_sharing_weights(self.model), self.tokenizer),
        }
        row: dict[str, Any] = {}
        with self.steered(name), own.steered(name):
            # Dynamo does not look whether hooks came or went, so the model is compiled while it is
            # steered, and stays so.
            for model in (plain, getattr(own.wrapped[name], "_module", own.wrapped[name])):
                model.compile()
            options = {
                "cache_implementation": "static",
                "disable_compile": True,
            }  # it is compiled already, all of it
            works = {
                "forward": lambda way: own.work(way, "forward")(),
                "per token, batch 1": lambda way: own.generate(way, 1, **options),
            }
            for kind, work in works.items():
                try:
                    self._assert_steers(name, kind, work)
                    ways = {
                        way: lambda way=way, work=work: seconds_of(lambda: work(way), self.device)
                        for way in own.wrapped
                    }
                    seconds = interleaved(
                        ways, rounds, f"{self.case.name}, compiled, {name}, {kind}"
                    )
                    row[kind] = summary(seconds[name], seconds["unsteered"])

                except Exception as error:
                    row[kind] = {
                        "error": (
                            f"{type(error).__name__}:"
                            f" {next(iter(str(error).strip().splitlines()), '')}"
                        )
                    }
        return row

    def _assert_steers(self, name: str, kind: str, work: Callable[[str], Any]) -> None:
        """Refuse what was compiled without the steering."""
        found, plain = work(name), work("unsteered")
        if kind != "forward":
            if torch.equal(found, plain) and not torch.equal(self.generate(name, 1), plain):
                raise RuntimeError("compiled, it writes what the unsteered model writes")
            return
        expected = self.work(name, kind)()
        if (found - expected).abs().max() > 0.1 * (plain - expected).abs().max():
            raise RuntimeError("compiled, it does not steer")
