"""How many activations become one vector, as laws and against plain formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.vectors.aggregators import (
    logistic_aggregator,
    mean_aggregator,
    mean_centred_aggregator,
    pca_aggregator,
)

AGGREGATORS = {
    "mean": mean_aggregator(),
    "pca": pca_aggregator(),
    "logistic": logistic_aggregator(),
    "mean_centred": mean_centred_aggregator(),
}
shapes = st.sampled_from([(2, 8), (5, 8), (8, 8), (40, 8)])


def draw(shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a large common mean; pairs differ along one direction and by noise."""
    generator = torch.Generator().manual_seed(seed)
    common = 5 * torch.randn(shape[1], generator=generator) + torch.randn(
        shape, generator=generator
    )
    direction = torch.nn.functional.normalize(torch.randn(shape[1], generator=generator), dim=0)
    noise = 0.05 * torch.randn(shape, generator=generator)
    return common + 2 * direction + noise, common


@pytest.mark.parametrize("name", AGGREGATORS)
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_turned_round_when_the_sides_are_swapped(name, shape, seed):
    """aggregator(b, a) = -aggregator(a, b)."""
    positive, negative = draw(shape, seed)
    torch.testing.assert_close(
        AGGREGATORS[name](negative, positive),
        -AGGREGATORS[name](positive, negative),
        atol=1e-4,
        rtol=1e-3,
    )


@pytest.mark.parametrize("name", AGGREGATORS)
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_finds_the_direction_of_the_differences(name, shape, seed):
    """All agree on pairs that differ along one direction, and name themselves."""
    positive, negative = draw(shape, seed)
    vector = AGGREGATORS[name](positive, negative)
    assert vector.shape == (8,) and vector.dtype == torch.float32
    mean = (positive - negative).mean(0)
    assert torch.cosine_similarity(vector, mean, dim=0) > 0.99
    assert AGGREGATORS[name].__name__ == name


@given(shape=shapes, seed=st.integers(0, 10**6))
def test_mean_is_the_mean_difference(shape, seed):
    """Mean of differences, and so the difference of the means."""
    positive, negative = draw(shape, seed)
    torch.testing.assert_close(mean_aggregator()(positive, negative), (positive - negative).mean(0))
    torch.testing.assert_close(
        mean_centred_aggregator()(positive, negative), positive.mean(0) - negative.mean(0)
    )


@given(shape=shapes, seed=st.integers(0, 10**6))
def test_pca_is_the_first_singular_vector(shape, seed):
    """Norm 1, along the first right singular vector, to the positive side; both Gram matrices."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (torch.randn(shape, generator=generator) for _ in range(2))
    vector = pca_aggregator()(positive, negative)
    differences = positive - negative
    first = torch.linalg.svd(differences.double(), full_matrices=False).Vh[0].float()
    assert vector.norm() == pytest.approx(1, abs=1e-5)
    assert abs(vector @ first) == pytest.approx(1, abs=1e-4)
    assert (differences @ vector).mean() >= -1e-5


def test_pca_of_differences_that_cancel_is_not_nan():
    """Where no sign is the right one, it still has norm 1."""
    differences = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert pca_aggregator()(differences, torch.zeros(2, 2)).norm() == pytest.approx(1)


def test_logistic_passes_its_options_on():
    """Norm 1 by default; where features differ in scale, a stronger penalty turns the direction."""
    positive, negative = draw((40, 8), 3)
    assert logistic_aggregator()(positive, negative).norm() == pytest.approx(1, abs=1e-5)
    weak, strong = (logistic_aggregator({"C": c})(positive, negative) for c in (100.0, 1e-4))
    assert not torch.allclose(weak, strong, atol=1e-3)


def test_mean_centred_takes_sets_of_any_size():
    """Two targets against seven of a background; the pairwise aggregators refuse that."""
    target, background = torch.randn(2, 8), torch.randn(7, 8)
    torch.testing.assert_close(
        mean_centred_aggregator()(target, background), target.mean(0) - background.mean(0)
    )
    for name in ("mean", "pca", "logistic"):
        with pytest.raises(
            ValueError, match=r"expected pairs, got \[2, 8\] positive and \[7, 8\] negative"
        ):
            AGGREGATORS[name](target, background)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_bfloat16_activations_are_subtracted_precisely(name):
    """Small differences of large activations: computed in float32, from what bfloat16 holds."""
    positive, negative = (acts.bfloat16() for acts in draw((40, 8), 5))
    found = AGGREGATORS[name](positive, negative)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, AGGREGATORS[name](positive.float(), negative.float()))
