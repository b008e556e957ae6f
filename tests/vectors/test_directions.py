"""Random directions: at unit norm, the same for the same seed, in no favoured direction."""

import pytest
import torch

from common import random_directions


def test_unit_norm_and_shape():
    """[count, d_model], each row of length 1, in fp32."""
    found = random_directions(96, 5, seed=3)
    assert found.shape == (5, 96) and found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))


def test_the_seed_decides():
    """The same again, others with another seed, and torch's own generator is left alone."""
    state = torch.random.get_rng_state()
    one, again, other = (random_directions(96, 2, seed) for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_direction_is_favoured():
    """Their mean is short, and any two are nearly at right angles."""
    found = random_directions(512, 256)
    assert found.mean(0).norm() < 2 / 256**0.5
    cosines = (found @ found.T).fill_diagonal_(0)
    assert cosines.abs().max() < 0.25


def test_directions_are_even_on_the_circle():
    """Normalised draws from a square crowd at its corners: their mean fourth power is 0.357."""
    assert random_directions(2, 20_000).pow(4).mean().item() == pytest.approx(3 / 8, abs=0.006)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((0, 1, 0), "1 or more as d_model, got 0"),
        ((8, -1, 0), "0 or more as count, got -1"),
        ((8, 1, True), "0 or more as seed, got True"),
    ],
)
def test_what_is_not_a_number_of_directions_is_refused(arguments, says):
    """Each argument by its name."""
    with pytest.raises(ValueError, match=says):
        random_directions(*arguments)
