"""Slices and counts, on what a scheduler of vLLM handed out and its worker did.

`scheduler_states.json` was recorded by `python tests/serving/record_scheduler.py`, in the
environment of `make engines`: 14 requests in an engine with little room, so that prompts come in
chunks, some requests are interrupted and computed again, and two are aborted.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.serving import counting
from common.serving.counting import Ledger, asked_counts, differences, done_counts
from common.serving.requests import Steering
from common.serving.slices import scheduled, slices_of_rows, steered_runs

RECORDED = json.loads(Path(__file__).with_name("scheduler_states.json").read_text())
STEERINGS = {
    request: Steering.from_wire(wire) for request, wire in RECORDED["steerings"].items() if wire
}
STEPS = RECORDED["steps"]


def output_of(step: dict) -> SimpleNamespace:
    """What the scheduler handed out in a step, with the names that vLLM gives it."""
    return SimpleNamespace(
        num_scheduled_tokens=step["num_scheduled_tokens"],
        scheduled_new_reqs=[
            SimpleNamespace(req_id=request, num_computed_tokens=position)
            for request, position in step["new"].items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(step["cached"]), num_computed_tokens=list(step["cached"].values())
        ),
    )


def rows_of(step: dict) -> list:
    return slices_of_rows(step["rows"], step["lengths"], step["positions"])


def test_the_recording_holds_what_it_should():
    chunked = [s for s in STEPS for r, p in s["cached"].items() if s["num_scheduled_tokens"][r] > 1]
    resumed = [s for s in STEPS if s["resumed"]]
    mixed = [s for s in STEPS if 0 < len(set(s["rows"]) & set(STEERINGS)) < len(s["rows"])]
    finished = {request for step in STEPS for request in step["finished"]}
    assert chunked and resumed and mixed and len(finished) >= 12
    assert any(steering.end for steering in STEERINGS.values())


def test_scheduler_and_worker_agree_on_every_slice():
    for step in STEPS:
        rows = {request: (position, length) for request, _, position, length in rows_of(step)}
        assert rows == scheduled(output_of(step))


def test_rows_follow_each_other_and_positions_leave_no_gap():
    """A request that is interrupted begins again; otherwise it goes on where it was."""
    reached: dict[str, int] = {}
    for step in STEPS:
        row = 0
        for request, first, position, length in rows_of(step):
            assert first == row
            row += length
            assert position == reached.get(request, 0) or (
                request in step["resumed"] and position < reached[request]
            )
            reached[request] = position + length


def test_every_recorded_step_steered_what_was_asked():
    for step in STEPS:
        asked = asked_counts(scheduled(output_of(step)), STEERINGS)
        assert not differences(asked, step["done"])
        passes = dict.fromkeys({n for s in STEERINGS.values() for n in s.layers}, 1)
        done = done_counts(steered_runs(rows_of(step), STEERINGS), passes)
        assert done == step["done"]


@pytest.mark.parametrize(
    "mistake",
    [
        "a layer is silent",
        "a layer adds twice",
        "a request is lost",
        "an unsteered one is steered",
        "positions within the step",
    ],
)
def test_every_mistake_shows_in_some_step(mistake):
    found: set[str] = set()
    for step in STEPS:
        slices, steerings = rows_of(step), dict(STEERINGS)
        passes = dict.fromkeys({n for s in STEERINGS.values() for n in s.layers}, 1)
        if mistake == "a layer is silent":
            passes[1] = 0
        if mistake == "a layer adds twice":
            passes[1] = 2
        if mistake == "a request is lost":
            del steerings[next(iter(STEERINGS))]
        if mistake == "an unsteered one is steered":
            steerings |= {r: Steering("a", 1.0, (1,)) for r in step["rows"] if r not in STEERINGS}
        if mistake == "positions within the step":
            slices = [one._replace(position=0) for one in slices]
        done = done_counts(steered_runs(slices, steerings), passes)
        found |= set(differences(asked_counts(scheduled(output_of(step)), STEERINGS), done))
    assert found


def test_workers_that_report_nothing_are_found():
    assert differences({"a": 3, "b": 0}, None) == {
        "a": "the workers did not report that they steered this request (3 tokens x layers asked"
        " for)"
    }
    assert not differences({}, None) and not differences({"a": 0}, {})
    assert set(differences({"a": 3}, {"b": 1})) == {"a", "b"}


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9)), max_size=6))
def test_the_ledger_adds_up_steps(steps):
    ledger = Ledger()
    for step in steps:
        ledger.add(step)
    assert ledger.counts == {
        request: sum(step.get(request, 0) for step in steps)
        for request in {request for step in steps for request in step}
    }


def test_the_ledger_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(counting, "KEPT", 2)
    ledger = Ledger()
    for request in "abc":
        ledger.add({request: 1})
    assert list(ledger.counts) == ["b", "c"]
