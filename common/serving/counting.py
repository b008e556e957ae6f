"""The count law: in every step, tokens x layers that were steered equal those that were asked for.

The scheduler computes what is asked from the request, as it came; the layers count what they do. A
request that is not steered as asked must fail: unsteered text looks like any other text.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from common.serving.requests import Steering
from common.serving.slices import Run

KEPT = 10_000  # so many requests are remembered


def asked_counts(
    slices: Mapping[str, tuple[int, int]], steerings: Mapping[str, Steering]
) -> dict[str, int]:
    """Return by request how many tokens x layers a step has to steer.

    Args:
        slices: by request where its slice begins and how long it is.
        steerings: by request.
    """
    return {
        request: steerings[request].count(*slices[request])
        for request in slices
        if request in steerings
    }


def done_counts(runs: Iterable[Run], passes: Mapping[int, int]) -> dict[str, int]:
    """Return by request how many tokens x layers a step did steer.

    Args:
        runs: the rows that were steered.
        passes: by layer how often it added to its output. Once is right; a layer that added twice
            counts twice.
    """
    counts: dict[str, int] = {}
    for run in runs:
        done = run.length * sum(passes.get(layer, 0) for layer in run.steering.layers)
        counts[run.request] = counts.get(run.request, 0) + done
    return counts


def differences(asked: Mapping[str, int], done: Mapping[str, int] | None) -> dict[str, str]:
    """Return for each request of a step that was not steered as asked a sentence that says so.

    Args:
        asked: by request, for all those that have a steering.
        done: by request as the layers counted; None where they reported nothing.
    """
    if done is None:
        return {
            request: f"the workers did not report that they steered this request ({count} tokens x"
            " layers asked for)"
            for request, count in asked.items()
            if count
        }
    return {
        request: f"steered {done.get(request, 0)} tokens x layers of this request, and"
        f" {asked.get(request, 0)} were asked for"
        for request in {**asked, **done}
        if asked.get(request, 0) != done.get(request, 0)
    }


class Ledger:
    """How many tokens x layers of each request were steered so far, the last 10,000 requests.

    A request that is interrupted and computed again has its tokens steered again: that counts.
    """

    def __init__(self) -> None:
        self.counts: OrderedDict[str, int] = OrderedDict()

    def add(self, done: Mapping[str, int]) -> None:
        """Add what a step did."""
        for request, count in done.items():
            self.counts[request] = self.counts.get(request, 0) + count
        while len(self.counts) > KEPT:
            self.counts.popitem(last=False)
