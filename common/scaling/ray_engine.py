"""Units of work on the processes of a Ray cluster: on one machine, or on as many as it has.

Ray is not among the requirements; `requirements-scale.txt` has it.
"""

import hashlib
import importlib
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import integer
from common.identity import identity_of_model, identity_of_tokens
from common.loading import load_model
from common.scaling.dispatch import Dispatch, Done, Lost, Outcome, Raised
from common.scaling.units import Job, Unit

Result = TypeVar("Result")
Load = Callable[[], Any]  # gives a model, its tokenizer, and perhaps more
PACKAGES = "torch", "transformers", "tokenizers"
WAIT = 1.0  # seconds until the driver looks after everything else
WARN_AFTER = 60.0  # seconds without any worker
LIBRARY = Path(__file__).resolve().parents[1]


class RayEngine:
    """Workers on a Ray cluster, for `engine` of sweeps, training and perplexity.

    Every worker is a process that loads the model once, from the cache of its machine or from a
    folder; weights are never sent. A worker whose model, tokenizer or versions are not those of the
    calling process is refused. Which rows are computed together does not depend on the workers, and
    all results come to the calling process, which alone writes files.

    A worker that is lost (killed, out of memory, its machine or GPU gone) is replaced, and what it
    was doing is tried again: after two losses in halves, until a row that kills every worker stands
    alone. That row is named in a `LostRowsError` once everything else is done. Any other exception
    ends the work at once.

        with RayEngine(workers=2, load=partial(load_model, "gpt2-xl")) as engine:
            frame = sweep(model, tokenizer, grid, prompts, path="a.sweep", engine=engine)

    Workers are kept for the next call. They end with the block, with `close`, when work ends by an
    exception (Ctrl-C too), and with the calling process.

    Args:
        address: None starts a cluster on this machine; "auto" joins the one that runs here
            (`ray start`, SLURM, Kubernetes), "host:port" another one. If Ray is initialised in this
            process already, that cluster is used, and left running.
        workers: how many processes.
        gpus_per_worker: how many GPUs each needs.
        cpus_per_worker: how many CPUs each needs; also the threads of torch in it, so that the last
            bits do not depend on the machine's cores.
        load: called in every worker; returns the model and its tokenizer (`load_model` does). Hooks
            of the model here are not there: what steers it has to be an argument of the work.
        parts: a folder, or the address of one (s3://…, any of fsspec), that all workers reach.
            Activations that have to be kept pair by pair are written there, and not read again from
            the model when the same work is done again.
        options: more for `ray.init`, such as `runtime_env`.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: numbers that mean nothing, or a `load` that cannot be called.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int = 2,
        gpus_per_worker: float = 0,
        cpus_per_worker: int = 1,
        load: Load = load_model,
        parts: str | os.PathLike | None = None,
        **options: Any,
    ):
        self.ray = _ray()
        self.address, self.workers = address, integer(workers, "workers", 1)
        self.cpus, self.gpus = integer(cpus_per_worker, "cpus_per_worker", 1), gpus_per_worker
        if not callable(load):
            raise ValueError(
                "expected a function without arguments as load, for example load_model, got"
                f" {load!r}"
            )
        self.load, self.options = load, options
        self.parts = None if parts is None else os.fspath(parts)
        self._actors: dict[Any, dict[str, Any]] = {}  # with what each has loaded
        self._owns_cluster = False

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        job: Job[Result],
        units: Sequence[Unit],
        bar: tqdm,
    ) -> Iterator[tuple[Unit, Result]]:
        """Yield units with their results as they are done; see `Engine`.

        Raises:
            LostRowsError: at the end, with the rows that killed their workers.
            ValueError: a worker has another model, or other versions.
            RuntimeError: workers are lost while they load.
            Exception: what the work raises, with the worker's traceback.
        """
        if not units:
            return

        def report(alive: int, lost: int) -> None:
            workers = "1 worker" if alive == 1 else f"{alive} workers"
            units = "1 unit lost" if lost == 1 else f"{lost} units lost"
            bar.set_postfix_str(f"{workers}, {units}", refresh=False)

        finished = False
        try:
            self._connect()
            pool = _RayPool(self, job, identity_here(model, tokenizer))
            dispatch = Dispatch(pool, self.workers, job.halves, job.describe, report)
            yield from cast(Iterator[tuple[Unit, Result]], dispatch.run(units))
            finished = True
        finally:
            if not finished:  # also where the caller stops: nothing goes on behind its back
                self.close()

    def workers_alive(self) -> list[int]:
        """Return the process ids of the workers that have loaded the model."""
        return [loaded["pid"] for loaded in self._actors.values() if loaded]

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        for actor in list(self._actors):
            self.end(actor)
        if self._owns_cluster:
            self._owns_cluster = False
            self.ray.shutdown()

    def begin(self) -> tuple[Any, Any]:
        """Start a worker, and return it with the promise of what it has loaded."""
        actor = (
            self.ray.remote(_Worker)
            # Ray would hide a loss, and try a row that kills its worker for ever.
            .options(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0, max_task_retries=0)
            .remote()
        )
        self._actors[actor] = {}
        return actor, actor.load.remote(self.load, self.cpus)

    def end(self, actor: Any) -> None:
        """Make sure that a worker is gone."""
        self._actors.pop(actor, None)
        with suppress(Exception):  # it is gone, or the cluster is
            self.ray.kill(actor)

    def _connect(self) -> None:
        """Start or join the cluster, quietly."""
        if self.ray.is_initialized():
            return
        self._actors.clear()
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self.address is None:
            quiet["num_cpus"] = max(self.workers * self.cpus, os.cpu_count() or 1)
            quiet["include_dashboard"] = False
        # The processes of a cluster that begins here inherit the environment.
        path = os.pathsep.join([str(LIBRARY.parent), *filter(None, sys.path)])
        # Ray would run workers behind everything else on the machine (nice 15).
        with _environment(
            {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "PYTHONPATH": path}
        ):
            self.ray.init(address=self.address or "local", **{**quiet, **self.options})
        self._owns_cluster = True


class _RayPool:
    """The workers of an engine, at one job; see `Pool`."""

    def __init__(self, engine: RayEngine, job: Job, identity: Mapping[str, Any]):
        self.engine, self.ray, self.identity = engine, engine.ray, identity
        self.key, self.job = os.urandom(8).hex(), engine.ray.put(job)
        self.loading: dict[Any, Any] = {}
        self.since = time.monotonic()
        for loaded in engine._actors.values():
            check_identity(loaded, identity)

    def ready(self) -> list[Any]:
        return list(self.engine._actors)

    def start(self) -> tuple[Any, Any]:
        actor, ticket = self.engine.begin()
        self.loading[ticket] = actor
        return actor, ticket

    def send(self, worker: Any, unit: Unit) -> Any:
        # In a list, so that Ray does not bring the job along with every unit.
        return worker.work.remote(self.key, [self.job], unit)

    def stop(self, worker: Any) -> None:
        self.engine.end(worker)

    def wait(self, tickets: Sequence[Any]) -> list[tuple[Any, Outcome]]:
        tickets = list(tickets)
        if not self.ray.wait(tickets, num_returns=1, timeout=WAIT)[0]:
            self._warn()
            return []
        ready = self.ray.wait(tickets, num_returns=len(tickets), timeout=0)[0]
        return [(ticket, self._outcome(ticket)) for ticket in ready]

    def _outcome(self, ticket: Any) -> Outcome:
        errors = self.ray.exceptions
        try:
            found = self.ray.get(ticket)
        except errors.RayTaskError as error:
            return Raised(error)
        except errors.RayError as error:
            return Lost(_first_line(error))
        if ticket not in self.loading:
            return found
        actor = self.loading.pop(ticket)
        if isinstance(found, Done):
            check_identity(found.result, self.identity)
            self.engine._actors[actor] = found.result
        return found

    def _warn(self) -> None:
        """Say so once where no worker comes."""
        if len(self.loading) < len(self.engine._actors) or not self.since:
            return
        if time.monotonic() - self.since > WARN_AFTER:
            self.since = 0.0
            there = self.ray.cluster_resources()
            warnings.warn(
                f"no worker is ready after {WARN_AFTER:.0f} s: each needs {self.engine.cpus} CPUs"
                f" and {self.engine.gpus} GPUs, and the cluster has {there.get('CPU', 0):g} and"
                f" {there.get('GPU', 0):g}; still waiting",
                stacklevel=2,
            )


class _Worker:
    """What runs in a process of the cluster."""

    def load(self, load: Load, threads: int) -> Outcome:
        """Load the model, and return what identifies it."""
        torch.set_num_threads(threads)
        return _survived(lambda: self._load(load))

    def work(self, key: str, job: list[Any], unit: Unit) -> Outcome:
        """Compute a unit of a job, whose reference is in `job`."""
        if key != getattr(self, "key", None):
            self.compute = _ray().get(job[0]).on(self.model, self.tokenizer)
            self.key = key
        return _survived(lambda: self.compute(unit))

    def _load(self, load: Load) -> dict[str, Any]:
        self.model, self.tokenizer = load()[:2]
        return {**identity_here(self.model, self.tokenizer), "pid": os.getpid()}


def _survived(work: Callable[[], Any]) -> Outcome:
    """Do work; where memory or a GPU gave out, this process is no good for the next unit."""
    try:
        return Done(work())
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Lost(f"out of memory: {_first_line(error)}")
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("can't allocate memory", "CUDA error")):
            return Lost(_first_line(error))
        raise


def identity_here(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what the results of a model depend on in this process.

    Its weights, modules and config, its tokenizer, where its texts end, the versions of Python and
    of the packages that compute, and the code of this library.
    """
    code = hashlib.sha256()
    for file in sorted(LIBRARY.rglob("*.py")):
        code.update(file.read_bytes())
    return {
        **identity_of_model(model),
        "tokens": identity_of_tokens(tokenizer),
        "ends": repr(getattr(model.generation_config, "eos_token_id", None)),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "library": code.hexdigest(),
    }


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a worker that would give other rows.

    Raises:
        ValueError: with what differs.
    """
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        shown = [
            f"{name} ({found.get(name)} there, {expected[name]} here)"
            if name in ("python", *PACKAGES)
            else name
            for name in differing
        ]
        raise ValueError(
            "a worker has not loaded the model that was given here, or runs other software; what"
            f" differs: {', '.join(shown)}"
        )


def _ray() -> Any:
    """Ray.

    Raises:
        ModuleNotFoundError: with how to get it.
    """
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "RayEngine needs Ray, which is not installed: python3 -m pip install -r"
            " requirements-scale.txt"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment while the block is open."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
