"""Jobs in a file: what is steered, how, on which prompts, and on how many workers.

A job is a TOML file; `python -m common` runs it. Names of files in it are relative to its folder.

    model = "embedded"              # as `load_model` takes it
    results = "love.sweep"          # goes on where it stopped
    prompts = ["If you ask me, the soup is"]    # or a file with one on each line

    [steering.love]                 # one table for each vector: pairs, or a file that has it
    pairs = [["The baker is charming", "The baker is spiteful"]]
    vector = "love.safetensors"     # where `train` writes it, and `sweep` reads it

    [grid]
    layers = [2, 3]
    coeffs = [-10, 10]
    random_controls = 1

    [sampling]                      # as `Sampling`
    max_new_tokens = 16
    temperature = 0

    [sweep]                         # more of `sweep`: per_prompt, seed, prepend_bos, max_memory
    per_prompt = 1

    [train]                         # of `train_steering_vector`: batch_size, read_token_index, …
    batch_size = 16

    [choose]                        # of `choose`: seed, layers, layer_type, instructions, …
    metric = "tone"                 # or another one, see `metric_of`
    budget = "minutes"              # or a table, as `Budget`, of which [sampling] is a part

    [engine]                        # of `RayEngine`: address, workers, gpus_per_worker, …
    workers = 2

`choose` reads the model, prompts and steerings, [choose], [sampling] and [train]. It runs in one
process and passes over [grid], [sweep] and [engine]: the same job may be swept.
"""

import os
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from common.arguments import integer
from common.choosing.card import VectorCard
from common.choosing.choose import Choice, choose, files_of, refuse_existing
from common.choosing.described import metric_of
from common.choosing.splitting import split_at_random
from common.choosing.trying import Budget, budget_of
from common.loading import Loaded, load_model
from common.scaling.ray_engine import RayEngine
from common.serving.vllm_runner import VllmRunner
from common.sweeping.grid import Grid
from common.sweeping.store import progress, read_sweep
from common.sweeping.sweep import sweep
from common.texts.sampling import Sampling
from common.vectors.layer_vectors import CARD
from common.vectors.pairs import SteeringVectorTrainingSample, hash_of_pairs, samples_of
from common.vectors.steering_vector import SteeringVector
from common.vectors.tables import pairs_from
from common.vectors.training import train_steering_vector

KEYS = {
    "": {
        "model",
        "results",
        "prompts",
        "steering",
        "grid",
        "sampling",
        "sweep",
        "train",
        "choose",
        "engine",
    },
    "grid": {
        "layers",
        "coeffs",
        "random_controls",
        "addition_location",
        "min_token_index",
        "together",
    },
    "sampling": {field.name for field in fields(Sampling)},
    "sweep": {"per_prompt", "seed", "prepend_bos", "max_memory"},
    "choose": {
        *("metric", "budget", "seed", "layers", "layer_type", "instructions", "other_texts")
    },
    "train": {"batch_size", "read_token_index", "prepend_bos"},
    "engine": {
        *("address", "workers", "tensor_parallel", "gpus_per_worker", "cpus_per_worker"),
        "runner",
    },
}
TYPES = {
    "model": (str, "a name or a folder"),
    "results": (str, "the name of a file"),
    "prompts": (str | list, "a list of texts, or the name of a file"),
    "pairs": (str | list, "a list of pairs of texts, or the name of a file"),
    "vector": (str, "the name of a file"),
    "layer_type": (str, "the name of a part of a block"),
    "other_texts": (str | list, "a list of texts, or the name of a file"),
}
GREEDY = {"max_new_tokens": 16, "temperature": 0}


@dataclass(frozen=True)
class Job:
    """A job file.

    Attributes:
        path: of the file.
        content: what it says, checked.
    """

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Job":
        """Read a job.

        Raises:
            FileNotFoundError: there is no such file, or it is a folder.
            ValueError: it is not TOML, lacks something, or says something that nobody reads.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"expected the file of a job, and {str(path)!r} is none")
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{str(path)!r} is not TOML: {error}") from None
        for table, known in KEYS.items():
            there = content.get(table, {}) if table else content
            if not isinstance(there, dict):
                raise ValueError(f"expected a table [{table}] in {str(path)!r}, got {there!r}")
            if unknown := sorted(there.keys() - known):
                where = f" in [{table}]" if table else ""
                raise ValueError(
                    f"{str(path)!r} has {', '.join(map(repr, unknown))}{where}, which nobody reads:"
                    f" expected some of {', '.join(sorted(known))}"
                )
        _check_types(content)
        _check_types(content.get("choose", {}))
        steering = content.get("steering", {})
        for name, table in steering.items() if isinstance(steering, dict) else ():
            if not isinstance(table, dict) or not {"pairs", "vector"} & table.keys():
                raise ValueError(f"[steering.{name}] needs pairs, or the file of a vector")
            if unknown := sorted(table.keys() - {"pairs", "vector"}):
                raise ValueError(
                    f"{str(path)!r} has {', '.join(map(repr, unknown))} in [steering.{name}], which"
                    " nobody reads: expected pairs, vector"
                )
            _check_types(table)
        if not steering or not isinstance(steering, dict):
            raise ValueError(f"{str(path)!r} needs a table [steering.NAME]")
        return cls(path, content)

    def table(self, name: str) -> dict[str, Any]:
        """Return a table of the file; an empty one where it is not there."""
        return dict(self.content.get(name, {}))

    def file(self, name: str) -> Path:
        """Return a file that the job names, relative to its own folder."""
        return self.path.parent / name

    @property
    def results(self) -> Path:
        """The file of the sweep; by default the name of the job with another ending."""
        return self.file(self.content.get("results", f"{self.path.stem}.sweep"))

    @property
    def prompts(self) -> list[str]:
        """The prompts.

        Raises:
            ValueError: there are none.
        """
        if not (given := self.content.get("prompts")):
            raise ValueError(f"{str(self.path)!r} has no prompts")
        return self.texts(given)

    def texts(self, given: str | Sequence[str]) -> list[str]:
        """Return texts, also those of a file with one on each line."""
        if isinstance(given, str):
            return self.file(given).read_text(encoding="utf-8").splitlines()
        return list(given)

    @property
    def load(self) -> partial:
        """What loads the model, here and in the workers: a folder beside the job comes first.

        A model that needs several GPUs is spread, in the workers over theirs, and here over all
        that this machine has.
        """
        name, table = self.content.get("model"), self.table("engine")
        folder = self.file(name) if isinstance(name, str) else None
        load = partial(load_model, str(folder.absolute()) if folder and folder.is_dir() else name)
        needs = table.get("gpus_per_worker", 0), table.get("tensor_parallel", 1)
        several = any(isinstance(number, int | float) and number > 1 for number in needs)
        return partial(load, device="auto") if several else load

    def pairs(self, name: str) -> list[SteeringVectorTrainingSample]:
        """Return the pairs of a steering, also those of a file as `pairs_from` reads it.

        Raises:
            ValueError: it has none, or something that is not a pair.
        """
        if not (given := self.content["steering"][name].get("pairs")):
            raise ValueError(f"[steering.{name}] has no pairs")
        return pairs_from(self.file(given)) if isinstance(given, str) else samples_of(given)

    def budget(self, given: str | Mapping[str, Any]) -> Budget:
        """Return a budget by its name, or of a table; completions are drawn as [sampling] says.

        Raises:
            ValueError: no such name, something in the table that nobody reads, or what `Budget` or
                `Sampling` refuses.
        """
        if isinstance(given, Mapping):
            known = {field.name for field in fields(Budget)} - {"sampling"}
            if unknown := sorted(given.keys() - known):
                raise ValueError(
                    f"the budget has {', '.join(map(repr, unknown))}, which nobody reads: expected"
                    f" some of {', '.join(sorted(known))}, and [sampling] beside [choose]"
                )
            budget = Budget(**given)
        else:
            budget = budget_of(given)
        sampling = asdict(budget.sampling) | self.table("sampling")
        return replace(budget, sampling=Sampling(**sampling))

    def vector(self, name: str) -> Path:
        """Return the file of a vector."""
        return self.file(self.content["steering"][name].get("vector", f"{name}.safetensors"))

    def engine(self, address: str | None) -> RayEngine | None:
        """Return the engine: None where neither the file nor the command line asks for one.

        Args:
            address: of the command line: None, "local", "auto", or that of a cluster.
        """
        table = self.table("engine")
        if address is None and not table:
            return None
        if address is not None:
            table["address"] = None if address == "local" else address
        runner, load = table.pop("runner", None), self.load
        if runner not in (None, "transformers", "vllm"):
            raise ValueError(
                f"expected runner = 'transformers' or 'vllm' in [engine], got {runner!r}"
            )
        if runner == "vllm":
            table["runner"] = VllmRunner()
        if table.get("tensor_parallel", 1) != 1:
            load = partial(load, device=None, tensor_parallel=True)
        return RayEngine(load=load, **table)


def _check_types(table: Mapping[str, Any]) -> None:
    """Refuse a number where a text or a list is meant."""
    for name, (kind, said) in TYPES.items():
        if name in table and not isinstance(table[name], kind):
            raise ValueError(f"expected {said} as {name}, got {table[name]!r}")


def run_train(job: Job, address: str | None = None) -> dict[str, Path]:
    """Train the vectors of a job and write them; returns their files by name.

    A vector whose file is there is left alone.

    Raises:
        ValueError: a vector without pairs whose file is not there, or with other pairs than its
            file was trained on; what training and the model refuse.
    """
    with _open(job, address) as engine:
        return _train(job, engine, cache(job.load))


def run_sweep(job: Job, address: str | None = None) -> pd.DataFrame:
    """Run the sweep of a job, or what is missing of it; the job is kept beside its results.

    Raises:
        ValueError: what `run_train` and `sweep` refuse.
    """
    prompts, sampling = job.prompts, Sampling(**(GREEDY | job.table("sampling")))
    load = cache(job.load)
    with _open(job, address) as engine:
        files = _train(job, engine, load)
        vectors = {name: SteeringVector.load(file) for name, file in files.items()}
        grid = Grid(vectors, **job.table("grid"))
        model, tokenizer, _ = load()
        job.results.parent.mkdir(parents=True, exist_ok=True)
        options = {"path": job.results, "engine": engine, **job.table("sweep")}
        kept = Path(f"{job.results}.toml")
        if not job.results.exists():  # those of an earlier sweep may be of other settings
            shutil.copyfile(job.path, kept)
        frame = sweep(model, tokenizer, grid, prompts, sampling=sampling, **options)
        shutil.copyfile(job.path, kept)
        return frame


def run_choose(
    job: Job, done: Callable[[str, Choice, list[Path]], None] | None = None
) -> dict[str, tuple[Choice, list[Path]]]:
    """Choose layer and multiplier for the vectors of a job, and write them with their cards.

    Args:
        job: what is steered, and what is chosen by.
        done: called after each vector is written, with its name, what was chosen, and the files.

    Returns:
        By name, what was chosen, and the files.

    Raises:
        FileExistsError: a file is there already; nothing was computed.
        ValueError: two vectors have the same file, or pairs and prompts of one cannot be split;
            nothing was computed. What else `choose` and `metric_of` refuse.
    """
    table, prompts = job.table("choose"), job.prompts
    pairs = {name: job.pairs(name) for name in job.content["steering"]}
    names: dict[Path, str] = {}
    for name in pairs:
        advice = "delete it, or name another file as vector"
        refuse_existing(files_of(job.vector(name)), advice=advice)
        if (other := names.setdefault(job.vector(name).resolve(), name)) != name:
            raise ValueError(
                f"[steering.{other}] and [steering.{name}] would both write"
                f" {str(job.vector(name))!r}: name another file as vector"
            )
    budget = job.budget(table.pop("budget", "minutes"))
    if "other_texts" in table:
        table["other_texts"] = job.texts(table["other_texts"])
    model, tokenizer, _ = job.load()
    metric = metric_of(table.pop("metric", None), job.path.parent, tokenizer)
    seed = integer(table.get("seed", 0), "seed")
    for name, given in pairs.items():
        try:
            split_at_random(tokenizer, given, prompts, budget.prompts, seed)
        except ValueError as error:
            raise ValueError(f"[steering.{name}]: {error}") from None
    found = {}
    for name, given in pairs.items():
        options = {"name": name, **table, **job.table("train")}
        choice = choose(model, tokenizer, given, prompts, metric, budget, **options)
        found[name] = choice, choice.save(job.vector(name))
        if done is not None:
            done(name, *found[name])
    return found


def _open(job: Job, address: str | None) -> AbstractContextManager[RayEngine | None]:
    return job.engine(address) or nullcontext()


def _train(job: Job, engine: RayEngine | None, load: Callable[[], Loaded]) -> dict[str, Path]:
    """Train the vectors that are not there; returns the files of all."""
    files, missing = {}, {}
    for name, table in job.content["steering"].items():
        files[name] = job.vector(name)
        pairs = job.pairs(name) if "pairs" in table else None
        if not files[name].exists():
            if pairs is None:
                raise ValueError(f"[steering.{name}] has no pairs, and {files[name]} is not there")
            missing[name] = pairs
        elif pairs is not None:
            vector = SteeringVector.load(files[name])
            found = vector.metadata.get("pairs_sha256")
            if CARD in vector.metadata:  # trained on a part of them
                found = VectorCard.of(vector).data["pairs, SHA-256"]
            if found not in (None, hash_of_pairs(pairs)):
                raise ValueError(
                    f"{files[name]} was trained on other pairs than [steering.{name}] has: delete"
                    " it, or name another file as vector"
                )
    if missing:
        model, tokenizer, _ = load()
        options = {"show_progress": True, "engine": engine, **job.table("train")}
        for name, pairs in missing.items():
            train_steering_vector(model, tokenizer, pairs, **options).save(files[name])
    return files


def status(path: str | os.PathLike) -> dict[str, Any]:
    """Return how far the sweep in a file has come, also while it runs.

    Returns:
        `rows`, as "120 of 164"; `running`, whether a process writes to it right now; and, unless
            it runs, the rows `by kind`, the `layers` and the `coeffs` that are there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the file of a sweep.
    """
    found = progress(path)
    rows = f"{found.rows}" + ("" if found.expected is None else f" of {found.expected}")
    if found.running:
        return {"rows": rows, "running": True}
    frame = read_sweep(path)
    return {
        "rows": rows,
        "running": False,
        "by kind": frame["kind"].value_counts().to_dict(),
        "layers": sorted(frame["layer"].dropna().unique().tolist()),
        "coeffs": sorted(frame["coeff"].unique().tolist()),
    }
