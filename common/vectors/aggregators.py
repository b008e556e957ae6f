"""How the activations of many prompts become one steering vector.

An aggregator takes the activations of the positive prompts and of the negative ones, each [prompt,
d_model], and returns a vector [d_model]. Row i of both belongs to contrast pair i, except for
`mean_centred_aggregator`, whose two sets need not match. All compute in float32 at least: in
bfloat16, differences of large activations would lose most of their digits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from common.passes.rounding import Spread, spread_of

Aggregator = Callable[[Tensor, Tensor], Tensor]
"""Makes one vector [d_model] of the positive and the negative activations, [pair, d_model] each."""


class Moments(NamedTuple):
    """Sums over contrast pairs of one layer, in float64 on the CPU; those of two lots add up.

    Attributes:
        spread: of the activations, with their number and sum.
        gram: the sum over the pairs of difference times difference, [d_model, d_model]; None where
            it was not asked for.
    """

    spread: Spread
    gram: Tensor | None

    def plus(self, other: "Moments") -> "Moments":
        """Return those of both lots together."""
        grams = None if self.gram is None or other.gram is None else self.gram + other.gram
        return Moments(self.spread.plus(other.spread), grams)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The means of the positive and of the negative activations, [d_model], in float64."""
        positive, negative = self.spread.sums
        return positive / self.spread.counts[0], negative / self.spread.counts[1]


def moments_of(positive: Tensor, negative: Tensor, gram: bool) -> Moments:
    """Return the sums over pairs of activations [pair, d_model], on the CPU."""
    positive, negative = positive.detach().cpu(), negative.detach().cpu()
    differences = _differences(positive, negative).double() if gram else None
    return Moments(
        spread_of(positive, negative), None if differences is None else differences.T @ differences
    )


class SummingAggregator:
    """An aggregator whose vector follows from sums over the pairs, wherever these are computed.

    Args:
        name: of the aggregator.
        of_activations: the aggregator; it may take sets that are no pairs.
        of_moments: gives the vector of sums, in float64.
        gram: whether it needs the Gram matrix.
    """

    def __init__(
        self,
        name: str,
        of_activations: Aggregator,
        of_moments: Callable[[Moments], Tensor],
        gram: bool = False,
    ):
        self.__name__ = name
        self.of_activations, self.gram = of_activations, gram
        self._of_moments = of_moments

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the vector [d_model] of activations, each [prompt, d_model]."""
        return self.of_activations(positive, negative)

    def of_moments(self, moments: Moments) -> Tensor:
        """Return the vector [d_model] of sums, in the dtype of an aggregator."""
        precise = torch.promote_types(moments.spread.dtype, torch.float32)
        return self._of_moments(moments).to(precise)


def mean_aggregator() -> Aggregator:
    """Return an aggregator that takes the mean of the differences of the pairs, the default.

    With it a steering vector is what Contrastive Activation Addition computes
    (https://arxiv.org/abs/2312.06681).
    """

    def mean(positive: Tensor, negative: Tensor) -> Tensor:
        return _differences(positive, negative).mean(dim=0)

    return SummingAggregator("mean", mean, _difference_of_means)


def pca_aggregator() -> Aggregator:
    """Return an aggregator that takes the first principal component of the differences, of norm 1.

    The differences are not centred, so it is the line through 0 that lies closest to them. Of its
    two directions it takes the one along which the differences are positive on average, as in
    https://arxiv.org/abs/2310.01405; where the average is 0, the one whose largest number is
    positive.
    """

    def pca(positive: Tensor, negative: Tensor) -> Tensor:
        differences = _differences(positive, negative)
        # The smaller of the two Gram matrices has the same component, and takes seconds where an
        # SVD takes minutes.
        data = differences.double()
        if len(data) < data.shape[1]:
            squares, vectors = torch.linalg.eigh(data @ data.T)
            vector = data.T @ vectors[:, -1]
        else:
            squares, vectors = torch.linalg.eigh(data.T @ data)
            vector = vectors[:, -1]
        return _upright(vector, data.mean(0), squares[-1] / len(data)).to(differences.dtype)

    def of_moments(moments: Moments) -> Tensor:
        squares, vectors = torch.linalg.eigh(cast(Tensor, moments.gram))
        square = squares[-1] / moments.spread.counts[0]
        return _upright(vectors[:, -1], _difference_of_means(moments), square)

    return SummingAggregator("pca", pca, of_moments, gram=True)


def logistic_aggregator(sklearn_kwargs: dict[str, Any] | None = None) -> Aggregator:
    """Return an aggregator that takes the weights of a logistic regression, scaled to norm 1.

    It tells the two sets apart. Each pair is centred on its own mean first, so that only what
    differs within a pair counts.

    Args:
        sklearn_kwargs: for `sklearn.linear_model.LogisticRegression`; `fit_intercept` is False
            unless given.
    """

    def logistic(positive: Tensor, negative: Tensor) -> Tensor:
        from sklearn.linear_model import LogisticRegression  # takes a second, and few need it

        half = _differences(positive, negative) / 2
        regression = LogisticRegression(**{"fit_intercept": False, **(sklearn_kwargs or {})})
        labels = [1] * len(half) + [-1] * len(half)
        regression.fit(torch.cat([half, -half]).cpu().numpy(), labels)
        weights = torch.as_tensor(regression.coef_[0], dtype=half.dtype, device=half.device)
        return functional.normalize(weights, dim=0)

    logistic.__name__ = "logistic"
    return logistic


def mean_centred_aggregator() -> Aggregator:
    """Return an aggregator that subtracts the mean of a background set from that of a target set.

    The target set takes the place of the positive prompts, the background that of the negative
    ones; they need not be of one size. Activations have a large common mean, which the background
    removes (https://arxiv.org/abs/2312.03813).
    """

    def mean_centred(target: Tensor, background: Tensor) -> Tensor:
        return _precise(target).mean(dim=0) - _precise(background).mean(dim=0)

    return SummingAggregator("mean_centred", mean_centred, _difference_of_means)


def _difference_of_means(moments: Moments) -> Tensor:
    positive, negative = moments.means
    return positive - negative


def _upright(vector: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """A line as a vector of norm 1, along which the mean of the differences is positive.

    `square` is the mean of the squares of the differences along it. Beside its root a mean may be
    0 but for rounding (every pair both ways), and rounding must not decide.
    """
    vector = functional.normalize(vector, dim=0)
    along = mean @ vector
    if along.abs() <= 1e-3 * square.sqrt():
        along = vector[vector.abs().argmax()]
    return -vector if along < 0 else vector


def _precise(activations: Tensor) -> Tensor:
    """Return the activations in float32, or in float64 where they are."""
    return activations.detach().to(torch.promote_types(activations.dtype, torch.float32))


def _differences(positive: Tensor, negative: Tensor) -> Tensor:
    """Return the differences of the pairs, [pair, d_model].

    Raises:
        ValueError: the two sets differ in shape.
    """
    if positive.shape != negative.shape:
        raise ValueError(
            f"expected pairs, got {list(positive.shape)} positive and {list(negative.shape)}"
            " negative activations"
        )
    return _precise(positive) - _precise(negative)
