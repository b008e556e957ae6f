"""Who does which unit, and what becomes of it when a worker is lost.

It is bookkeeping only: what a worker is, and how it is reached, is the business of a `Pool`.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from common.scaling.units import Unit

IN_FLIGHT = 2  # units at a worker: the next one is there when one is done
PATIENCE = 2  # workers that a unit may lose before it is halved
LAST_PATIENCE = 3  # workers that a single row may lose
FAILED_STARTS = 3  # workers in a row that may be lost before the first is ready

Worker = Hashable
Ticket = Hashable


class Done(NamedTuple):
    """A unit was computed, or a worker is ready (None)."""

    result: Any


class Lost(NamedTuple):
    """The worker is gone, or of no use any more."""

    reason: str


class Raised(NamedTuple):
    """The work raised an exception, as it would with any other worker."""

    error: BaseException


Outcome = Done | Lost | Raised
_ORDER = {Done: 0, Lost: 1, Raised: 2}


class Pool(Protocol):
    """Workers; each does its units in the order in which it gets them."""

    def start(self) -> tuple[Worker, Ticket]:
        """Start a worker; the ticket is done when it is ready."""
        ...

    def ready(self) -> Sequence[Worker]:
        """Return the workers that are ready from an earlier run."""
        ...

    def send(self, worker: Worker, unit: Unit) -> Ticket:
        """Give a unit to a worker."""
        ...

    def stop(self, worker: Worker) -> None:
        """Make sure that a worker is gone."""
        ...

    def wait(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Outcome]]:
        """Return what is finished, at least one, or nothing after a while."""
        ...


class LostRowsError(RuntimeError):
    """Some rows killed every worker that tried them; all others were computed.

    Attributes:
        numbers: of these rows.
    """

    def __init__(self, message: str, numbers: Sequence[int]):
        super().__init__(message)
        self.numbers = list(numbers)


class _Trial(NamedTuple):
    """A unit that is to be done, how many workers it has lost, and whether it may be why."""

    unit: Unit
    losses: int = 0
    suspect: bool = False


class Dispatch:
    """Gets units done by workers that may be lost at any moment.

    A unit goes to one worker at a time. When a worker is lost, the unit that it was at is tried
    again, from then on with nothing behind it in the queue of its worker. After two losses it is
    halved, and each half after one more. A single row is given up when it has lost three workers.

    Args:
        pool: the workers.
        size: how many of them there should be.
        halves: makes two units of one.
        describe: says what a number in a unit stands for.
        report: called with the workers that are alive and the units that were lost so far.
    """

    def __init__(
        self,
        pool: Pool,
        size: int,
        halves: Callable[[Unit], list[Unit]],
        describe: Callable[[int], str],
        report: Callable[[int, int], None],
    ):
        self.pool, self.size = pool, size
        self.halves, self.describe, self.report = halves, describe, report
        self.workers: set[Worker] = set()
        self.loading: dict[Ticket, Worker] = {}
        self.waiting: deque[_Trial] = deque()
        self.flying: dict[Ticket, tuple[Worker, _Trial]] = {}  # the oldest first
        self.given_up: list[tuple[int, str]] = []
        self.lost = self.failed_starts = 0

    def run(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Any]]:
        """Yield each unit with its result, in the order in which they are done.

        Raises:
            LostRowsError: at the end, with the rows that killed their workers.
            RuntimeError: no worker gets ready.
            Exception: what a unit raises, at once.
        """
        self.workers, self.waiting = set(self.pool.ready()), deque(map(_Trial, units))
        while self.waiting or self.flying:
            self._fill()
            self.report(len(self.workers), self.lost)
            outcomes = self.pool.wait([*self.flying, *self.loading])
            # What is done counts, even if its worker is lost by now.
            for ticket, outcome in sorted(outcomes, key=lambda one: _ORDER[type(one[1])]):
                # A late answer of a worker that was given up is in neither.
                if ticket in self.loading:
                    self._started(ticket, outcome)
                elif ticket in self.flying and isinstance(outcome, Done):
                    yield self.flying.pop(ticket)[1].unit, outcome.result
                elif ticket in self.flying:
                    self._bury(self.flying[ticket][0], _reason(outcome))
        for worker in self.loading.values():  # nobody waits for them
            self.pool.stop(worker)
        if self.given_up:
            raise self._error()

    def _fill(self) -> None:
        """Start workers where there are too few, and give them what they can take."""
        wanted = min(self.size, len(self.waiting) + len(self.flying))
        while len(self.workers) + len(self.loading) < wanted:
            worker, ticket = self.pool.start()
            self.loading[ticket] = worker
        queues: dict[Worker, list[_Trial]] = {worker: [] for worker in self.workers}
        for worker, trial in self.flying.values():
            queues[worker].append(trial)
        for depth in range(IN_FLIGHT):  # whoever has nothing to do comes first
            for worker, queue in queues.items():
                if not self.waiting:
                    return
                alone = any(trial.suspect for trial in [self.waiting[0], *queue])
                if len(queue) == depth and not (depth and alone):
                    queue.append(self.waiting.popleft())
                    self.flying[self.pool.send(worker, queue[-1].unit)] = worker, queue[-1]

    def _started(self, ticket: Ticket, outcome: Outcome) -> None:
        """Take a worker in that is ready, or note that it was lost before it was."""
        worker = self.loading.pop(ticket)
        if isinstance(outcome, Done):
            self.workers.add(worker)
            self.failed_starts = 0
            return
        self.pool.stop(worker)
        reason = _reason(outcome)
        self.failed_starts += 1
        if self.failed_starts == FAILED_STARTS:
            raise RuntimeError(
                f"{FAILED_STARTS} workers in a row were lost while they loaded the model, the last"
                f" because of: {reason}"
            )

    def _bury(self, worker: Worker, reason: str) -> None:
        """Take a worker off, and put what it had back; the unit that it was at has lost it."""
        self.pool.stop(worker)
        self.workers.discard(worker)
        self.lost += 1
        tickets = [ticket for ticket, (its, _) in self.flying.items() if its == worker]
        first, *others = [self.flying.pop(ticket)[1] for ticket in tickets]
        self.waiting.extendleft(reversed(others))
        self._try_again(first.unit, first.losses + 1, reason)

    def _try_again(self, unit: Unit, losses: int, reason: str) -> None:
        """Put back a unit that lost a worker, whole or in halves, unless it is a lost row."""
        if len(unit) == 1 and losses == LAST_PATIENCE:
            self.given_up.append((unit.numbers[0], reason))
        elif len(unit) > 1 and losses >= PATIENCE:
            for half in reversed(self.halves(unit)):
                # A half has lost workers already, as a part of the whole. A row has to do it alone.
                before = PATIENCE - 1 if len(half) > 1 else 0
                self.waiting.appendleft(_Trial(half, before, suspect=True))
        else:
            self.waiting.appendleft(_Trial(unit, losses, suspect=True))

    def _error(self) -> LostRowsError:
        rows = [f"{self.describe(number)} ({reason})" for number, reason in self.given_up]
        count = "one row" if len(rows) == 1 else f"{len(rows)} rows"
        return LostRowsError(
            f"{count} killed {LAST_PATIENCE} workers each; everything else is done:"
            f" {'; '.join(rows[:5])}{' …' if len(rows) > 5 else ''}",
            [number for number, _ in self.given_up],
        )


def _reason(outcome: Outcome) -> str:
    """Why a worker was lost.

    Raises:
        Exception: what the work raised.
    """
    if isinstance(outcome, Raised):
        raise outcome.error
    return outcome.reason if isinstance(outcome, Lost) else ""
