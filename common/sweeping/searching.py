"""Where growing curves meet a target, many at once: one pass measures all that are still open."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

FIRST = 2.0  # slope on logarithms before two points are known: a divergence grows with the square
GENTLE, STEEP = 0.25, 4.0  # slopes that a step outside the bracket believes
SMALL, LARGE = math.log(1.01), math.log(30.0)  # its shortest and longest step, on logarithms


@dataclass
class Search:
    """Looks for the positive `x` at which a curve is the target, on logarithms of both.

    It steps up or down until it has points on both sides, and then takes the secant between them
    (Illinois: an end that stays counts half as much each time, so that a curve that bends does not
    hold it for ever). The bracket only ever narrows. What is not a number counts as too much.

    Attributes:
        start: the first `x`.
        target: what the curve is to be there.
        tolerance: how far it may be from it, as a share of it.
        seen: what was measured, (x, value), in order.
    """

    start: float
    target: float
    tolerance: float
    seen: list[tuple[float, float]] = field(default_factory=list)
    _ends: dict[bool, tuple[float, float]] = field(default_factory=dict)  # by side: x, height
    _stayed: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})

    @property
    def done(self) -> bool:
        """Whether the last value is the target, within the tolerance."""
        return bool(self.seen) and abs(self.height(self.seen[-1][1])) <= math.log1p(self.tolerance)

    @property
    def bracket(self) -> tuple[float | None, float | None]:
        """The largest `x` that was too little, and the smallest that was too much."""
        low, high = (self._ends.get(above, (None,))[0] for above in (False, True))
        return low, high

    def height(self, value: float) -> float:
        """How far a value lies above the target, on logarithms."""
        if math.isnan(value):
            return math.inf
        return math.log(value / self.target) if value > 0 else -math.inf

    def note(self, x: float, value: float) -> None:
        """Take in what the curve is at `x`."""
        height, self.seen = self.height(value), [*self.seen, (x, value)]
        above = height > 0
        self._stayed = {above: 0, not above: self._stayed[not above] + 1}
        self._ends[above] = x, height

    def next(self) -> float:
        """Say where to measure next."""
        if not self.seen:
            return self.start
        if len(self._ends) < 2:
            return self._outward()
        (low, below), (high, over) = self._ends[False], self._ends[True]
        below /= 2 ** max(0, self._stayed[False] - 1)
        over /= 2 ** max(0, self._stayed[True] - 1)
        share = below / (below - over) if math.isfinite(below) and math.isfinite(over) else 0.5
        return low * (high / low) ** min(max(share, 0.01), 0.99)

    def _outward(self) -> float:
        """A step to the other side, by the slope of the last two points."""
        (here, height), slope = next(iter(self._ends.values())), FIRST
        if len(self.seen) > 1:
            before, value = self.seen[-2]
            rise = height - self.height(value)
            found = rise / math.log(here / before) if math.isfinite(rise) else math.nan
            slope = FIRST if math.isnan(found) else min(max(found, GENTLE), STEEP)
        step = min(max(abs(height) / slope, SMALL), LARGE)
        return here * math.exp(-math.copysign(step, height))


def search(
    measure: Callable[[Mapping[int, float]], Mapping[int, float]],
    starts: Sequence[float],
    target: float,
    tolerance: float,
    passes: int,
) -> list[Search]:
    """Look for a target on several curves, in a limited number of passes.

    Args:
        measure: takes the `x` of each curve that is still open, by its number, and returns the
            values: one pass.
        starts: the first `x` of each curve.
        target: what each is to be.
        tolerance: see `Search`.
        passes: how many passes at most.

    Returns:
        The searches; one that is not `done` did not get there.
    """
    searches = [Search(start, target, tolerance) for start in starts]
    for _ in range(passes):
        wanted = {number: one.next() for number, one in enumerate(searches) if not one.done}
        if not wanted:
            break
        for number, value in measure(wanted).items():
            searches[number].note(wanted[number], value)
    return searches
