"""What operators do to hidden states, as laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from common.vectors.operators import (
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    norm_preserving_addition_operator,
)

OPERATORS = [
    addition_operator(),
    ablation_operator(),
    ablation_then_addition_operator(),
    norm_preserving_addition_operator(),
]


def draw(seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    return hidden, scale * torch.randn(1, 1, 8, generator=generator, dtype=torch.float64)


seeds, scales = st.integers(0, 10**6), st.floats(0.01, 100)


@given(seeds, scales)
def test_addition_adds(seed, scale):
    """The delta of addition is the vector."""
    hidden, vector = draw(seed, scale)
    assert torch.equal(addition_operator()(hidden, vector), vector)


@given(seeds, scales)
def test_ablation_leaves_no_projection(seed, scale):
    """Nothing is left along the vector, the rest stays, and a second time changes nothing."""
    hidden, vector = draw(seed, scale)
    ablated = hidden + ablation_operator()(hidden, vector)
    direction = functional.normalize(vector, dim=-1)
    torch.testing.assert_close(
        (ablated * direction).sum(-1), torch.zeros(3, 5, dtype=torch.float64)
    )
    rest = hidden - (hidden * direction).sum(-1, keepdim=True) * direction
    torch.testing.assert_close(ablated, rest)
    torch.testing.assert_close(ablated + ablation_operator()(ablated, vector), ablated)


@given(seeds, scales)
def test_ablation_ignores_length_and_sign(seed, scale):
    """The direction alone decides."""
    hidden, vector = draw(seed)
    torch.testing.assert_close(
        ablation_operator()(hidden, -scale * vector), ablation_operator()(hidden, vector)
    )


@given(seeds, scales)
def test_ablation_then_addition_sets_the_projection(seed, scale):
    """The component along the vector becomes the vector, whatever it was."""
    hidden, vector = draw(seed, scale)
    changed = hidden + ablation_then_addition_operator()(hidden, vector)
    direction = functional.normalize(vector, dim=-1)
    along = (changed * direction).sum(-1, keepdim=True) * direction
    torch.testing.assert_close(along, vector.expand(3, 5, 8))


@given(seeds, scales)
def test_norm_preserving_addition_keeps_the_norm_and_turns(seed, scale):
    """The norm stays, and the direction is that of the sum."""
    hidden, vector = draw(seed, scale)
    changed = hidden + norm_preserving_addition_operator()(hidden, vector)
    torch.testing.assert_close(changed.norm(dim=-1), hidden.norm(dim=-1))
    torch.testing.assert_close(
        functional.normalize(changed, dim=-1), functional.normalize(hidden + vector, dim=-1)
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_vector_0_does_nothing(operator):
    """No operator makes nan of the vector 0, and none changes anything."""
    hidden, vector = draw(0, 0.0)
    torch.testing.assert_close(hidden + operator(hidden, vector), hidden)


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_and_positions_do_not_mix(operator):
    """What happens at one position depends on nothing else."""
    hidden, vector = draw(1)
    alone = operator(hidden[1:2, 2:3], vector).expand(1, 1, 8)
    torch.testing.assert_close(operator(hidden, vector).expand(3, 5, 8)[1:2, 2:3], alone)
