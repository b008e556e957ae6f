"""Units of work on workers that die: each number comes once, and who kills is named."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from played import Workers

from common.scaling.dispatch import Dispatch, Done, Lost, LostRowsError
from common.scaling.units import Job, Unit, in_order, run_units


def cut(count: int, size: int) -> list[Unit]:
    numbers = range(count)
    return [Unit(tuple(numbers[start : start + size])) for start in range(0, count, size)]


def halves(unit: Unit) -> list[Unit]:
    return [Unit(numbers) for numbers in unit.split()]


def run(workers: Workers, units, size=2, reports=None):
    """All that comes, as (unit, numbers), and the numbers that were given up."""
    found, lost, message = [], [], ""
    report = (lambda *given: None) if reports is None else lambda *given: reports.append(given)
    dispatch = Dispatch(workers, size, halves, lambda number: f"row {number}", report)
    try:
        for unit, numbers in dispatch.run(units):
            assert list(unit.numbers) == numbers
            found += numbers
    except LostRowsError as error:
        lost, message = error.numbers, str(error)
    assert all(f"row {number} (killed)" in message for number in lost[:5])
    return found, lost


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 40),
    unit=st.integers(1, 16),
    size=st.integers(1, 4),
    risk=st.sampled_from([0.0, 0.2, 0.7]),
    late=st.booleans(),
    data=st.data(),
)
def test_each_number_comes_once_whatever_dies(seed, count, unit, size, risk, late, data):
    """Also where an answer comes when its worker was given up, and its unit done elsewhere."""
    deadly = data.draw(st.sets(st.integers(0, 39), max_size=3))
    # Units that lose their workers by chance could be taken for killers.
    workers = Workers(seed, deadly, risk, deaths=1 if deadly else 10, late=late)
    found, lost = run(workers, cut(count, unit), size)
    killers = {number for number in deadly if number < count}
    assert Counter(found + lost) == Counter(range(count))
    assert killers <= set(lost) and (risk or killers == set(lost))
    assert workers.most <= size and workers.deepest <= 2


@given(seed=st.integers(0, 10**6), size=st.integers(1, 4), deadly=st.integers(0, 63))
@example(seed=0, size=1, deadly=0)
def test_a_row_that_kills_is_named_and_all_others_come(seed, size, deadly):
    """After three workers by itself; before, the whole unit kills two and each half one."""
    workers = Workers(seed, [deadly])
    found, lost = run(workers, cut(64, 16), size)
    assert lost == [deadly] and sorted([*found, deadly]) == list(range(64))
    assert workers.kills[deadly] == 2 + 3 + 3  # of 16; of 8, 4 and 2; of 1


@pytest.mark.parametrize("count", [1, 5, 6])
def test_of_many_lost_rows_five_are_named(count):
    """And all are counted."""
    workers = Workers(deadly=range(count))
    dispatch = Dispatch(workers, 2, halves, lambda number: f"row {number};", lambda *given: None)
    with pytest.raises(LostRowsError) as error:
        list(dispatch.run(cut(count, 1)))
    said = str(error.value)
    assert said.startswith("one row killed" if count == 1 else f"{count} rows killed")
    assert said.count("row ") - (count == 1) == min(count, 5) and said.endswith("…") == (count > 5)
    assert sorted(error.value.numbers) == list(range(count))


def test_a_suspect_has_no_one_behind_it():
    """So that nobody else is blamed for the death of its worker."""
    workers, behind = Workers(3, [5]), []
    send = workers.send

    def noting(worker, unit):
        behind.extend(u for _, u in workers.queues[worker] if workers.kills and 5 in u.numbers)
        return send(worker, unit)

    workers.send = noting
    run(workers, cut(20, 2), 2)
    assert not behind


def test_workers_of_an_earlier_run_are_used():
    workers = Workers(ready=["old 1", "old 2"])
    found, _ = run(workers, cut(6, 1), 2)
    assert sorted(found) == list(range(6)) and workers.alive == {"old 1", "old 2"}
    assert workers.most == 0  # nobody new


def test_no_more_workers_than_there_is_work_for():
    workers = Workers()
    run(workers, cut(4, 2), 8)
    assert workers.most <= 2


def test_an_exception_ends_it_at_once():
    """It would come with any worker, so that nobody tries it again."""
    workers = Workers(raising=4)
    with pytest.raises(KeyError, match="a bug"):
        run(workers, cut(40, 2), 1)
    assert not workers.stopped


@pytest.mark.parametrize("unborn", [2, 3])
def test_workers_that_never_get_ready(unborn):
    """Two may die while they load; three in a row say that something is wrong."""
    workers = Workers(unborn=unborn)
    if unborn == 3:
        with pytest.raises(RuntimeError, match="while they loaded the model.*killed"):
            run(workers, cut(4, 2), 1)
    else:
        assert run(workers, cut(4, 2), 1) == ([0, 1, 2, 3], [])


class Told:
    """Workers 1, 2, … to whom happens, in turn, what a test says: by ticket, or None for all else.

    A ticket is a worker who gets ready, or a worker and its unit.
    """

    def __init__(self, *happens):
        self.happens = list(happens)
        self.started, self.stopped, self.sent = [], [], []

    def start(self):
        self.started.append(len(self.started) + 1)
        return self.started[-1], self.started[-1]

    def ready(self):
        return []

    def send(self, worker, unit):
        self.sent.append((worker, unit.numbers))
        return self.sent[-1]

    def stop(self, worker):
        self.stopped.append(worker)

    def wait(self, tickets):
        found = self.happens.pop(0)
        assert set(found) <= set(tickets), (found, tickets)
        return [
            (ticket, Done(list(ticket[1]) if isinstance(ticket, tuple) else None) if well else DEAD)
            for ticket, well in found.items()
        ]


DEAD = Lost("killed")
A, B, C = ((number,) for number in range(3))


def test_a_unit_that_lost_its_worker_goes_to_a_new_one_and_stands_behind_nobody():
    """Behind another unit it might die of that; and the lost worker is gone for certain."""
    pool = Told({1: True, 2: True}, {(1, A): False}, {3: True}, {(3, A): True}, {(2, B): True})
    assert sorted(run(pool, cut(2, 1), 2)[0]) == [0, 1]
    assert pool.sent == [(1, A), (2, B), (3, A)] and pool.stopped == [1]


def test_a_unit_behind_one_that_is_tried_again_waits():
    """Else it would be blamed, too."""
    pool = Told(
        {1: True}, {(1, A): False}, {2: True}, {(2, A): True}, {(2, B): True}, {(2, C): True}
    )
    assert run(pool, cut(3, 1), 1)[0] == [0, 1, 2]
    assert pool.sent == [(1, A), (1, B), (2, A), (2, B), (2, C)]


def test_who_is_still_loading_when_all_is_done_is_stopped():
    pool = Told({1: True}, {(1, A): True}, {(1, B): True})
    assert run(pool, cut(2, 1), 2)[0] == [0, 1]
    assert pool.started == [1, 2] and pool.stopped == [2]


def test_workers_that_are_lost_while_they_load_count_in_a_row():
    """One that got ready in between says that nothing is wrong; all that were lost are stopped."""
    pool = Told(
        {1: False},
        {2: False},
        {3: True},
        {(3, A): False},
        {4: False},
        {5: False},
        {6: True},
        {(6, A): True},
    )
    assert run(pool, cut(1, 1), 1) == ([0], [])
    assert pool.stopped == [1, 2, 3, 4, 5]


def test_what_is_reported():
    """The workers that are alive, and how many units lost theirs."""
    reports: list = []
    run(Workers(deadly=[1]), cut(8, 1), 2, reports)
    assert reports[-1][1] == 3 and max(alive for alive, _ in reports) == 2


class Nothing(Job):
    """A job that does nothing, in this process."""

    def on(self, model, tokenizer):
        return lambda unit: None

    def describe(self, number):
        return f"row {number}"


def test_the_bar_moves_on_by_the_rows_that_are_done():
    steps = []
    bar = SimpleNamespace(update=steps.append)
    assert len(list(run_units(None, None, None, Nothing(), cut(10, 4), bar))) == 3
    assert steps == [4, 4, 2]


@given(st.permutations(cut(20, 4)))
def test_in_order_they_are_as_they_were_cut(units):
    """Halves too."""
    came = [part for unit in units for part in reversed(halves(unit))]
    found = in_order((unit, None) for unit in came)
    numbers = [number for unit, _ in found for number in unit.numbers]
    assert numbers == list(range(20))
