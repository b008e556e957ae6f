"""Is a vector better than random? Chosen on one half, judged on another, as its controls are.

Whoever takes the best of many settings finds an effect, of a random direction too. So every control
has the same choice among the same settings as the vector, by the same rule, on the same prompts.
What each chose is then measured on prompts that nobody chose on, and there the vector has to beat
its controls. If it were one of them, each would be as likely to come first: the share of those that
are as good is a p-value, whatever the metric, and however many settings were tried.

Labels are checked apart. Pairs whose sides are swapped at random still give a vector with a part of
the true one, turned one way or the other by chance, and it may steer well. But it tells the sides
of further pairs apart only by chance, which a binomial test sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.05  # of each test; all have to pass, so that together they let less through
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Judged:
    """One question to a vector, and its answer.

    Attributes:
        question: what was asked.
        found: what was seen, in a sentence.
        p: how likely that, or more, is by chance; None where it could not be asked.
        passed: whether it speaks for the vector; None where it could not be asked.
    """

    question: str
    found: str
    p: float | None
    passed: bool | None


def gentlest_of_the_best(tried: pd.DataFrame) -> pd.DataFrame:
    """Choose a setting for every steering: the gentlest whose effect cannot be told from the best.

    Args:
        tried: `steering`, `layer`, `target_kl`, `effect`, `error` (of the effect), and more columns
            that are kept; a setting without an effect is never chosen.

    Returns:
        One row for each steering that has an effect somewhere: of its settings whose effect is
        within one standard error of the largest, the one of the lowest divergence, and of these
        that of the largest effect.
    """
    rows = []
    for _, group in tried.dropna(subset="effect").groupby("steering", sort=False):
        cells = group.to_dict("records")
        best = max(cells, key=itemgetter("effect"))
        near = best["effect"] - np.nan_to_num(best["error"])
        cells = [cell for cell in cells if cell["effect"] >= near]
        gentlest = min(cell["target_kl"] for cell in cells)
        rows.append(
            max((cell for cell in cells if cell["target_kl"] == gentlest), key=itemgetter("effect"))
        )
    return pd.DataFrame(rows, columns=tried.columns)


def shown(value: float) -> str:
    """Return a number in units of a metric: two decimals, or as many as show it at all."""
    if not value or 0.05 <= abs(value) < 1e6:
        return f"{value + 0.0:.2f}"
    return f"{value:.2g}"


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Return a mean and its 95 % interval, Student's t; NaN where it has none."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if not len(known):
        return np.nan, np.nan, np.nan
    mean, wide = float(known.mean()), np.nan
    if len(known) > 1:
        t = stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1)
        wide = float(t * known.std(ddof=1) / len(known) ** 0.5)
    return mean, mean - wide, mean + wide


def beats(effect: float, others: Sequence[float], what: str) -> Judged:
    """Ask whether an effect is larger than those of its controls.

    The p-value is (1 + those as large) / (1 + all), which is exact where the vector is one of them
    under another name. A control without a value counts as large.

    Args:
        effect: of the vector.
        others: of the controls, each at the setting that it chose.
        what: the controls, as the sentence names them.
    """
    as_large = sum(not other < effect for other in others)  # NaN is not below anything
    p = (1 + as_large) / (1 + len(others))
    found = f"{as_large} of {len(others)} {what} do as much"
    return Judged(f"Does it do more than {what}?", found, p, p <= LEVEL)


def moves_the_right_way(low: float, high: float) -> Judged:
    """Ask whether the interval of the effect lies above 0.

    Args:
        low: where the interval begins.
        high: where it ends.
    """
    passed = low > 0
    found = f"the interval of the effect begins at {shown(low)}"
    if high < 0:
        found = f"it lowers the metric (the interval ends at {shown(high)}): are the sides swapped?"
    return Judged("Does it move the metric the right way?", found, None, bool(passed))


def tells_apart(projections: Sequence[float], least: int) -> Judged:
    """Ask whether a vector tells the sides of pairs apart that it was not trained on.

    Args:
        projections: the difference of each pair along the vector.
        least: how many pairs the user needs for this question, as the sentence says.
    """
    question = "Does it tell the sides of other pairs apart?"
    count, right = len(projections), sum(value > 0 for value in projections)
    if not count:
        return Judged(
            question,
            f"too few pairs of different texts to ask: expected {least} or more",
            None,
            None,
        )
    p = float(stats.binomtest(right, count, 0.5, "greater").pvalue)
    found = f"it tells {right} of {count} pairs apart that were kept back"
    if p > LEVEL:
        found += ", as one of random labels might"
    return Judged(question, found, p, p <= LEVEL)
