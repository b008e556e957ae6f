"""Units of work on workers that die: each number comes once, and who kills is named."""

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from played import Workers

from common.scaling.dispatch import Dispatch, LostRowsError
from common.scaling.units import Unit, in_order


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


def test_what_is_reported():
    """The workers that are alive, and how many units lost theirs."""
    reports: list = []
    run(Workers(deadly=[1]), cut(8, 1), 2, reports)
    assert reports[-1][1] == 3 and max(alive for alive, _ in reports) == 2


@given(st.permutations(cut(20, 4)))
def test_in_order_they_are_as_they_were_cut(units):
    """Halves too."""
    came = [part for unit in units for part in reversed(halves(unit))]
    found = in_order((unit, None) for unit in came)
    numbers = [number for unit, _ in found for number in unit.numbers]
    assert numbers == list(range(20))
