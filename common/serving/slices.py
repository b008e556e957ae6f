"""Which rows of a step are steered.

An engine that batches continuously hands its model one row for each token: in a step a request has
a slice of the rows, which is part of its prompt, all of it, or the token that it generated last.
Positions are absolute, so that prompts that come in chunks, cached prefixes, and requests that are
interrupted and computed again are steered in the same places.

Notation: `row` counts the rows of the step, `position` the tokens of a request.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from common.serving.requests import Steering


class Slice(NamedTuple):
    """The rows that a request has in a step."""

    request: str
    row: int
    position: int
    length: int


class Run(NamedTuple):
    """Rows that get the same steering: `length` of them from `row` on, the first at `position`."""

    request: str
    steering: Steering
    row: int
    position: int
    length: int


def slices_of_rows(
    requests: Sequence[str], lengths: Iterable[int], positions: Iterable[int]
) -> list[Slice]:
    """Return the slices of a step, as the worker lays them out.

    Args:
        requests: the ids, in the order of their rows.
        lengths: how many rows each has.
        positions: how many tokens of each were computed before, which is the position of its first
            row.
    """
    slices, row = [], 0
    for request, length, position in zip(requests, lengths, positions):
        slices.append(Slice(request, row, int(position), int(length)))
        row += int(length)
    return slices


def scheduled(output: Any) -> dict[str, tuple[int, int]]:
    """Return by request where its slice begins and how long it is, as the scheduler says.

    Args:
        output: a `SchedulerOutput` of vLLM: requests that are new in `scheduled_new_reqs`, all
            others in `scheduled_cached_reqs`.
    """
    old = output.scheduled_cached_reqs
    positions = dict(zip(old.req_ids, old.num_computed_tokens))
    positions |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    return {
        request: (positions[request], length)
        for request, length in output.num_scheduled_tokens.items()
    }


def steered_runs(slices: Iterable[Slice], steerings: Mapping[str, Steering]) -> list[Run]:
    """Return the rows of a step that are steered.

    Args:
        slices: those of the step.
        steerings: by request; requests that are not in it stay unsteered.
    """
    runs = []
    for request, row, position, length in slices:
        steering = steerings.get(request)
        if steering is None:
            continue
        selected = steering.selected(position, length)
        if selected:
            first = selected.start
            runs.append(Run(request, steering, row + first - position, first, len(selected)))
    return runs
