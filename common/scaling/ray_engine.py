"""Units of work on the processes of a Ray cluster: on one machine, or on as many as it has.

Ray is not among the requirements; `requirements-scale.txt` has it.
"""

import hashlib
import importlib
import logging
import os
import pickle
import platform
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import finite_number, integer
from common.identity import identity_of_model, identity_of_reading, identity_of_tokens
from common.loading import load_model
from common.scaling.dispatch import Dispatch, Done, Lost, Outcome, Raised
from common.scaling.units import Job, Runner, Unit, packed
from common.tensor_parallel import is_split

Result = TypeVar("Result")
Load = Callable[[], Any]  # gives a model, its tokenizer, and perhaps more
PACKAGES = "torch", "transformers", "tokenizers"
WAIT = 1.0  # seconds until the driver looks after everything else
WARN_AFTER = 60.0  # seconds without any worker
MEET = timedelta(hours=2)  # the slowest process of a group may read its weights so long
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
        workers: how many processes, or groups of processes.
        tensor_parallel: over how many processes, on one machine, each model is split. They compute
            every unit together, and are lost together; what is said of a worker's GPUs and CPUs
            holds for each of them. `load` has to split the model over its group, as
            `partial(load_model, name, tensor_parallel=True)` does.
        gpus_per_worker: how many GPUs each needs. Over several, `load` has to spread the model, as
            `partial(load_model, name, device="auto")` does.
        cpus_per_worker: how many CPUs each needs; also the threads of torch in it, so that the last
            bits do not depend on the machine's cores.
        load: called in every worker; returns the model and its tokenizer (`load_model` does). Hooks
            of the model here are not there: what steers it has to be an argument of the work.
        parts: a folder, or the address of one (s3://…, any of fsspec), that all workers reach.
            Activations that have to be kept pair by pair are written there, and not read again from
            the model when the same work is done again.
        runner: what computes in a worker; None for transformers. `VllmRunner` completes texts.
        options: more for `ray.init`, such as `runtime_env`.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: numbers that mean nothing, a `load` that cannot be called, something else as a
            runner, or one that is to be split over processes.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int = 2,
        tensor_parallel: int = 1,
        gpus_per_worker: float = 0,
        cpus_per_worker: int = 1,
        load: Load = load_model,
        parts: str | os.PathLike | None = None,
        runner: Runner | None = None,
        **options: Any,
    ):
        if runner is not None and not callable(getattr(runner, "start", None)):
            raise ValueError(f"expected None or VllmRunner() as runner, got {runner!r}")
        self.ray = _ray()
        self.address, self.workers = address, integer(workers, "workers", 1)
        self.processes = integer(tensor_parallel, "tensor_parallel", 1)
        self.cpus = integer(cpus_per_worker, "cpus_per_worker", 1)
        self.gpus = finite_number(gpus_per_worker, "gpus_per_worker")
        if self.gpus < 0:
            raise ValueError(f"expected gpus_per_worker of 0 or more, got {gpus_per_worker!r}")
        if not callable(load):
            raise ValueError(
                "expected a function without arguments as load, for example load_model, got"
                f" {load!r}"
            )
        if runner is not None and self.processes > 1:
            raise ValueError(
                f"{runner.name} runs in one process: expected tensor_parallel=1 beside it, got"
                f" {self.processes}"
            )
        self.load, self.options, self.runner = load, options, runner
        self.parts = None if parts is None else _address(os.fspath(parts))
        self._at_work = threading.Lock()
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
            ValueError: the work holds the model here, or cannot be sent; a worker has another
                model, or other versions.
            RuntimeError: workers are lost while they load; the engine is at work already.
            Exception: what the work raises, with the worker's traceback.
        """
        if self.runner is not None:
            self.runner.check(job)
        if not units:
            return
        sent = packed(job, model, self.ray.cloudpickle.Pickler)
        if not self._at_work.acquire(blocking=False):
            raise RuntimeError(
                "this engine is at work: wait until that is done, or give this work another engine"
            )

        def report(alive: int, lost: int) -> None:
            workers = "1 worker" if alive == 1 else f"{alive} workers"
            units = "1 unit lost" if lost == 1 else f"{lost} units lost"
            bar.set_postfix_str(f"{workers}, {units}", refresh=False)

        finished = False
        try:
            self._connect()
            pool = _RayPool(self, sent, identity_here(model, tokenizer, self.runner))
            dispatch = Dispatch(pool, self.workers, job.halves, job.describe, report)
            yield from cast(Iterator[tuple[Unit, Result]], dispatch.run(units))
            finished = True
        finally:
            if not finished:  # also where the caller stops: nothing goes on behind its back
                self.close()
            self._at_work.release()

    def workers_alive(self) -> list[int]:
        """Return the process ids of the workers that are ready; of each group the first."""
        return [loaded["pid"] for loaded in self._actors.values() if loaded]

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        for worker in list(self._actors):
            self.end(worker)
        if self._owns_cluster:
            self._owns_cluster = False
            self.ray.shutdown()

    def begin(self) -> tuple["_Group", list[Any]]:
        """Start a worker, and return it with the promises of what its processes have loaded."""
        # Ray would hide a loss, and try a row that kills its worker for ever.
        options: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
        options |= {"num_cpus": self.cpus, "num_gpus": self.gpus}
        make, count, placement = self.ray.remote(_Worker), self.processes, None
        if count == 1:
            actors = [make.options(**options).remote()]
        else:
            util, bundle = self.ray.util, {"CPU": self.cpus, "GPU": self.gpus}
            bundle = {name: number for name, number in bundle.items() if number}
            placement = util.placement_group([bundle] * count, strategy="STRICT_PACK")
            where = util.scheduling_strategies.PlacementGroupSchedulingStrategy
            actors = [
                make.options(**options, scheduling_strategy=where(placement, rank)).remote()
                for rank in range(count)
            ]
        worker, name = _Group(tuple(actors), placement), os.urandom(8).hex()
        self._actors[worker] = {}
        return worker, [
            actor.load.remote(self.load, self.cpus, _Seat(rank, count, name), self.runner)
            for rank, actor in enumerate(actors)
        ]

    def end(self, worker: "_Group") -> None:
        """Make sure that a worker is gone."""
        self._actors.pop(worker, None)
        for actor in worker.actors:
            with suppress(Exception):  # it is gone, or the cluster is
                self.ray.kill(actor)
        if worker.placement is not None:
            with suppress(Exception):
                self.ray.util.remove_placement_group(worker.placement)

    def _connect(self) -> None:
        """Start or join the cluster, quietly."""
        if self.ray.is_initialized():
            return
        self._actors.clear()
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self.address is None:
            quiet["num_cpus"] = max(self.workers * self.processes * self.cpus, os.cpu_count() or 1)
            quiet["include_dashboard"] = False
        # The processes of a cluster that begins here inherit the environment.
        path = os.pathsep.join([str(LIBRARY.parent), *filter(None, sys.path)])
        # Ray would run workers behind everything else on the machine (nice 15).
        with _environment(
            {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "PYTHONPATH": path}
        ):
            self.ray.init(address=self.address or "local", **{**quiet, **self.options})
        self._owns_cluster = True


@dataclass(frozen=True, eq=False)
class _Group:
    """A worker: a process, or all that hold one model, and the place that Ray keeps for them."""

    actors: tuple[Any, ...]
    placement: Any = None


class _Seat(NamedTuple):
    """Which process of a worker this is, of how many, and the name under which they meet."""

    rank: int
    count: int
    group: str


class _RayPool:
    """The workers of an engine, at one job; see `Pool`."""

    def __init__(self, engine: RayEngine, job: bytes, identity: Mapping[str, Any]):
        self.engine, self.ray, self.identity = engine, engine.ray, identity
        self.key, self.job = os.urandom(8).hex(), engine.ray.put(job)
        self.loading: dict[Any, Any] = {}
        # What the processes of a worker still promise, by the promise of the first, which is the
        # ticket; and what the first has given meanwhile.
        self.open: dict[Any, list[Any]] = {}
        self.results: dict[Any, Outcome] = {}
        self.since = time.monotonic()
        for loaded in engine._actors.values():
            check_identity(loaded, identity)

    def ready(self) -> list[Any]:
        return list(self.engine._actors)

    def start(self) -> tuple[Any, Any]:
        worker, promises = self.engine.begin()
        ticket = self._first(promises)
        self.loading[ticket] = worker
        return worker, ticket

    def send(self, worker: Any, unit: Unit) -> Any:
        # In a list, so that Ray does not bring the job along with every unit.
        return self._first(
            [actor.work.remote(self.key, [self.job], unit) for actor in worker.actors]
        )

    def _first(self, promises: Sequence[Any]) -> Any:
        self.open[promises[0]] = list(promises)
        return promises[0]

    def stop(self, worker: Any) -> None:
        self.engine.end(worker)

    def wait(self, tickets: Sequence[Any]) -> list[tuple[Any, Outcome]]:
        # What is over, or was given up, is in the way of nothing.
        self.open = {ticket: self.open[ticket] for ticket in tickets}
        of = {one: ticket for ticket, promises in self.open.items() for one in promises}
        if not self.ray.wait(list(of), num_returns=1, timeout=WAIT)[0]:
            self._warn()
            return []
        finished = []
        for one in self.ray.wait(list(of), num_returns=len(of), timeout=0)[0]:
            ticket, outcome = of[one], self._outcome(one)
            self.open[ticket].remove(one)
            if isinstance(outcome, Done) and one == ticket:
                self.results[ticket] = outcome
            # What went wrong in one process counts at once: the others may wait for it for ever.
            if not isinstance(outcome, Done):
                finished.append((ticket, outcome))
            elif not self.open[ticket]:
                finished.append((ticket, self.results.pop(ticket)))
        return finished

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
        worker = self.loading.pop(ticket)
        if isinstance(found, Done):
            check_identity(found.result, self.identity)
            self.engine._actors[worker] = found.result
        return found

    def _warn(self) -> None:
        """Say so once where no worker comes."""
        if len(self.loading) < len(self.engine._actors) or not self.since:
            return
        if time.monotonic() - self.since > WARN_AFTER:
            self.since = 0.0
            there, engine = self.ray.cluster_resources(), self.engine
            count = engine.processes
            where = " on one machine" if count > 1 else ""
            warnings.warn(
                f"no worker is ready after {WARN_AFTER:.0f} s: each needs"
                f" {count * engine.cpus} CPUs and {count * engine.gpus:g} GPUs{where}, and the"
                f" cluster has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}; still waiting",
                stacklevel=2,
            )


class _Worker:
    """What runs in a process of the cluster."""

    def load(self, load: Load, threads: int, seat: _Seat, runner: Runner | None) -> Outcome:
        """Load the model, and return what identifies it."""
        torch.set_num_threads(threads)
        self.first = seat.rank == 0
        return self._of_the_group(lambda: self._load(load, seat, runner))

    def work(self, key: str, job: list[Any], unit: Unit) -> Outcome:
        """Compute a unit of a job, whose reference is in `job`."""
        if key != getattr(self, "key", None):
            self.compute, self.key = self.on(pickle.loads(_ray().get(job[0]))), key
        return self._of_the_group(lambda: self.compute(unit))

    def _of_the_group(self, work: Callable[[], Any]) -> Outcome:
        """Do work; all processes of a group have its result, and the first one sends it."""
        found = _survived(work)
        return found if self.first or not isinstance(found, Done) else Done(None)

    def _load(self, load: Load, seat: _Seat, runner: Runner | None) -> dict[str, Any]:
        if seat.count > 1:
            _meet(seat)
        found = load()
        if not isinstance(found, tuple | list) or len(found) < 2:
            raise ValueError(
                "expected load to return a model and its tokenizer, as load_model does, got"
                f" {type(found).__name__}"
            )
        model, tokenizer = found[:2]
        if seat.count > 1 and not is_split(model):
            raise ValueError(
                f"load gave each of {seat.count} processes a whole model: expected one that is"
                " split over them, as partial(load_model, name, tensor_parallel=True) gives"
            )
        if runner is None:
            self.on = lambda job: job.on(model, tokenizer)
        else:
            self.on = runner.start(model, tokenizer).on
        return {**identity_here(model, tokenizer, runner), "pid": os.getpid()}


def _meet(seat: _Seat) -> None:
    """Join the other processes of a group, which are on this machine."""
    # Ray shows each process its own GPUs only, so that the first that it sees is its own.
    os.environ.update(RANK=str(seat.rank), LOCAL_RANK="0", WORLD_SIZE=str(seat.count))
    file = Path(tempfile.gettempdir(), f"steering-{seat.group}")
    torch.distributed.init_process_group(
        init_method=file.as_uri(), rank=seat.rank, world_size=seat.count, timeout=MEET
    )


def _survived(work: Callable[[], Any]) -> Outcome:
    """Do work; where memory or a GPU gave out, this process is no good for the next unit."""
    try:
        return Done(work())
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Lost(f"out of memory: {_first_line(error)}")
    except RuntimeError as error:
        # The last two: another process of the group is gone.
        signs = "can't allocate memory", "CUDA error", "gloo", "NCCL"
        if isinstance(error, torch.distributed.DistError) or any(s in str(error) for s in signs):
            return Lost(_first_line(error))
        raise


def identity_here(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, runner: Runner | None = None
) -> dict[str, Any]:
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
        "tokenizer": identity_of_reading(tokenizer),
        "ends": repr(getattr(model.generation_config, "eos_token_id", None)),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "runner": "transformers" if runner is None else runner.name,
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


def _address(parts: str) -> str:
    """A folder as workers find it, whose own folder may be another; an address as it is."""
    return parts if "://" in parts else os.path.abspath(os.path.expanduser(parts))


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
