"""Work in units: cut once, before anybody knows who does it, here or on an engine's workers."""

import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Result = TypeVar("Result")


@dataclass(frozen=True)
class Unit:
    """What is computed together.

    Attributes:
        numbers: of rows, pairs or pieces; a job says which.
        beside: what is read in the same pass and gives no row of its own.
    """

    numbers: tuple[int, ...]
    beside: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def split(self) -> list[tuple[int, ...]]:
        """Return the numbers in two halves."""
        middle = len(self) // 2
        return [self.numbers[:middle], self.numbers[middle:]]


Work = Callable[[Unit], Result]


class Job(ABC, Generic[Result]):
    """What is done with each unit. It can be pickled, and takes no model along."""

    @abstractmethod
    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Work[Result]:
        """Return what computes a unit on a model, here or in another process."""

    @abstractmethod
    def describe(self, number: int) -> str:
        """Say what a number in a unit stands for."""

    def halves(self, unit: Unit) -> list[Unit]:
        """Return a unit in two, in the order of its numbers."""
        return [Unit(numbers, unit.beside) for numbers in unit.split()]


class Completion(NamedTuple):
    """A text that is asked for.

    Attributes:
        prompt: its token ids.
        steering: the name of a vector, what it is multiplied by, and the layers after which it is
            added; None for an unsteered text.
        seed: of its random numbers.
    """

    prompt: list[int]
    steering: tuple[str, float, list[int]] | None
    seed: tuple[int, ...]


class CompletionJob(Job[Result]):
    """A job that can be done by whatever completes texts, and steers them."""

    @abstractmethod
    def vectors(self) -> dict[str, tuple[dict[int, Tensor], float]]:
        """Return by name the vectors [d_model] of each layer, and the largest multiplier.

        Raises:
            ValueError: something else than a vector after a block is added, or not at all tokens.
        """

    @abstractmethod
    def sampling_options(self) -> dict[str, Any]:
        """Return how texts are drawn, as the fields of `Sampling`."""

    @abstractmethod
    def asked(self, unit: Unit) -> list[Completion]:
        """Return the texts of a unit."""

    @abstractmethod
    def rows(self, unit: Unit, texts: Sequence[str]) -> Result:
        """Return the result of a unit, given its texts."""


class Runner(Protocol):
    """What computes the units of an engine's worker in place of transformers.

    Attributes:
        name: with its version, as tables show it.
    """

    name: str

    def check(self, job: Job) -> None:
        """Refuse a job that it cannot do."""
        ...

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Return what has a method `on`, like that of a job, in a process that loaded a model."""
        ...


def packed(job: Job, model: PreTrainedModel, pickler: Any) -> bytes:
    """Return a job as bytes for another process.

    Args:
        job: what is done.
        model: that of this process.
        pickler: a class like `pickle.Pickler` that also takes functions by their content
            (cloudpickle's).

    Raises:
        ValueError: the job reaches the model here, or a part of it: a worker would get a copy, and
            whatever is done to the copy means nothing to the worker's own model. Or it reaches
            something that no other process can have, such as an open file.
    """
    own = {id(module) for module in model.modules()}

    class Packing(pickler):
        def persistent_id(self, thing: Any) -> None:
            if id(thing) in own:
                raise ValueError(
                    "with an engine the model is another one: expected functions that take it, such"
                    " as `lambda model: vector.apply(model)`, got one that holds the"
                    f" {type(thing).__name__} of this process"
                )

    found = io.BytesIO()
    try:
        Packing(found).dump(job)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ValueError(f"the work cannot go to the workers of an engine: {error}") from error
    return found.getvalue()


class Engine(Protocol):
    """What computes units elsewhere.

    Attributes:
        parts: where results are kept that are too large to be sent; None if nowhere.
        runner: what computes in place of transformers; None if nothing.
    """

    parts: str | None
    runner: Runner | None

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        job: Job[Result],
        units: Sequence[Unit],
        bar: tqdm,
    ) -> Iterator[tuple[Unit, Result]]:
        """Yield units with their results, in any order, a unit perhaps in parts.

        Each number comes once. Where some cannot be computed, the others come first.
        """
        ...


def run_units(
    engine: Engine | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: Job[Result],
    units: Sequence[Unit],
    bar: tqdm,
) -> Generator[tuple[Unit, Result], None, None]:
    """Compute units, in this process or on an engine; a unit may come in parts, in any order.

    Args:
        engine: None for this process.
        model: a causal language model. An engine has its own, and compares it with this one.
        tokenizer: its tokenizer.
        job: what is done.
        units: the work.
        bar: moved on by the length of each unit.
    """
    if engine is None:
        work = job.on(model, tokenizer)
        found: Any = ((unit, work(unit)) for unit in units)
    else:
        found = engine.run(model, tokenizer, job, units, bar)
    with closing(found):  # an engine stops its workers where the caller stops
        for unit, result in found:
            yield unit, result
            bar.update(len(unit))


def in_order(found: Iterator[tuple[Unit, Result]], first: int = 0) -> Iterator[tuple[Unit, Result]]:
    """Yield units of consecutive numbers in the order of these, however they come."""
    waiting: dict[int, tuple[Unit, Result]] = {}
    for unit, result in found:
        waiting[unit.numbers[0]] = unit, result
        while first in waiting:
            ready = waiting.pop(first)
            first += len(ready[0])
            yield ready
