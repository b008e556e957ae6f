"""How the activations of many prompts become one steering vector.

An aggregator takes the activations of the positive prompts and of the negative ones, each [prompt,
d_model], and returns a vector [d_model]. Row i of both belongs to contrast pair i, except for
`mean_centred_aggregator`, whose two sets need not match. All compute in float32 at least: in
bfloat16, differences of large activations would lose most of their digits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Aggregator = Callable[[Tensor, Tensor], Tensor]


def mean_aggregator() -> Aggregator:
    """Return an aggregator that takes the mean of the differences of the pairs, the default.

    With it a steering vector is what Contrastive Activation Addition computes
    (https://arxiv.org/abs/2312.06681).
    """

    def mean(positive: Tensor, negative: Tensor) -> Tensor:
        return _differences(positive, negative).mean(dim=0)

    mean.__name__ = "mean"
    return mean


def pca_aggregator() -> Aggregator:
    """Return an aggregator that takes the first principal component of the differences, of norm 1.

    The differences are not centred, so it is the line through 0 that lies closest to them. Of its
    two directions it takes the one along which the differences are positive on average, as in
    https://arxiv.org/abs/2310.01405.
    """

    def pca(positive: Tensor, negative: Tensor) -> Tensor:
        differences = _differences(positive, negative)
        # The smaller of the two Gram matrices has the same component, and takes seconds where an
        # SVD takes minutes.
        data = differences.double()
        if len(data) < data.shape[1]:
            vector = data.T @ torch.linalg.eigh(data @ data.T).eigenvectors[:, -1]
        else:
            vector = torch.linalg.eigh(data.T @ data).eigenvectors[:, -1]
        vector = functional.normalize(vector, dim=0)
        sign = -1.0 if (data @ vector).mean() < 0 else 1.0
        return (sign * vector).to(differences.dtype)

    pca.__name__ = "pca"
    return pca


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

    mean_centred.__name__ = "mean_centred"
    return mean_centred


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
