"""What operators do to hidden states, as laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from common.vectors.operators import (
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    cap_operator,
    norm_preserving_addition_operator,
    rotation_operator,
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


BY_DIRECTION = {
    "ablation": ablation_operator(),
    "cap": cap_operator(0.1, -0.1),
    "rotation": rotation_operator(40, torch.arange(8.0)),
}


@pytest.mark.parametrize("name", BY_DIRECTION)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_the_direction_counts_in_every_dtype(name, dtype):
    """As far as the dtype holds the vector, whatever its length; and 0 is left alone."""
    operator, (hidden, vector) = BY_DIRECTION[name], (part.to(dtype) for part in draw(2))
    expected, sizes = operator(hidden, vector).double(), [2.0**-8, 2.0**8]
    if dtype != torch.float16:
        sizes += [2.0**-60, 2.0**60, 2.0**-100, 2.0**100]
    for size in sizes:
        found = operator(hidden, (size * vector).to(dtype)).double()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not operator(hidden, 0 * vector).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ablation_and_the_norm_are_right_in_16_bit(dtype):
    """Computed in float32: the only rounding is that of the result."""
    hidden, vector = (part.to(dtype) for part in draw(0))
    for operator in OPERATORS[1:]:
        exact = operator(hidden.double(), vector.double())
        torch.testing.assert_close(operator(hidden, vector).double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_and_positions_do_not_mix(operator):
    """What happens at one position depends on nothing else."""
    hidden, vector = draw(1)
    alone = operator(hidden[1:2, 2:3], vector).expand(1, 1, 8)
    torch.testing.assert_close(operator(hidden, vector).expand(3, 5, 8)[1:2, 2:3], alone)


# --- caps ---

bounds = st.floats(-2, 2)


@given(seeds, scales, bounds, bounds)
def test_a_cap_keeps_the_component_within_its_bounds(seed, scale, one, other):
    """What lies beyond is moved to the bound along the vector; all else stays, to the last bit."""
    hidden, vector = draw(seed, scale)
    lower, upper = sorted((one, other))
    direction = functional.normalize(vector, dim=-1)
    before = (hidden * direction).sum(-1)
    for low, high in ((lower, upper), (None, upper), (lower, None)):
        capped = hidden + cap_operator(high, low)(hidden, vector)
        after = (capped * direction).sum(-1)
        torch.testing.assert_close(after, before.clamp(low, high))
        rest = hidden - before[..., None] * direction
        torch.testing.assert_close(capped - after[..., None] * direction, rest)
        within = before == before.clamp(low, high)
        assert torch.equal(capped[within], hidden[within])
        torch.testing.assert_close(capped + cap_operator(high, low)(capped, vector), capped)


@given(seeds, scales)
def test_a_cap_goes_by_the_direction(seed, scale):
    """Not by the length; turned around, the upper bound is the lower one, with another sign."""
    hidden, vector = draw(seed)
    cap = cap_operator(0.5)(hidden, vector)
    torch.testing.assert_close(cap_operator(0.5)(hidden, scale * vector), cap)
    torch.testing.assert_close(cap_operator(lower=-0.5)(hidden, -scale * vector), cap)
    assert not cap_operator(-0.5)(hidden, 0 * vector).any()


def test_a_cap_is_right_in_16_bit():
    """The component is computed in float32; what is within the bounds does not change."""
    hidden, vector = (part.to(torch.bfloat16) for part in draw(0))
    delta = cap_operator(0.1, -0.1)(hidden, vector)
    assert delta.dtype == torch.float32
    exact = cap_operator(0.1, -0.1)(hidden.double(), vector.double())
    torch.testing.assert_close(delta.double(), exact, atol=1e-5, rtol=1e-5)


# --- rotation ---

angles = st.floats(-720, 720)


def turn(hidden, vector, angle, second, **options):
    return hidden + rotation_operator(angle, second, **options)(hidden, vector)


def in_plane(hidden, vector, second):
    """Components along the vector, along what is orthogonal to it, and what is outside."""
    first = functional.normalize(vector[0, 0], dim=0)
    other = functional.normalize(second - (second @ first) * first, dim=0)
    x, y = hidden @ first, hidden @ other
    return x, y, hidden - x[..., None] * first - y[..., None] * other


@given(seeds, scales, angles)
def test_a_rotation_keeps_the_norm_and_turns_to_its_angle(seed, scale, angle):
    """In the plane the length stays and the angle is the one that was asked for."""
    hidden, vector = draw(seed, scale)
    second = draw(seed + 1, scale)[1][0, 0]
    turned = turn(hidden, vector, angle, second)
    x, y, rest = in_plane(hidden, vector, second)
    new_x, new_y, new_rest = in_plane(turned, vector, second)
    length, radians = torch.hypot(x, y), math.radians(angle)
    torch.testing.assert_close(new_x, length * math.cos(radians))
    torch.testing.assert_close(new_y, length * math.sin(radians))
    torch.testing.assert_close(new_rest, rest)
    torch.testing.assert_close(turned.norm(dim=-1), hidden.norm(dim=-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turn(hidden, vector, angle + 360, second), turned)
    torch.testing.assert_close(turn(turned, vector, angle, second), turned)


@given(seeds, angles)
def test_a_rotation_keeps_the_norm_in_float32_too(seed, angle):
    hidden, vector = (part.float() for part in draw(seed))
    second = draw(seed + 1)[1][0, 0].float()
    turned = turn(hidden, vector, angle, second)
    torch.testing.assert_close(turned.norm(dim=-1), hidden.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_a_rotation_keeps_the_norm_where_the_plane_is_narrow(seed):
    """With a second vector that is hardly another one."""
    hidden, vector = (part.float() for part in draw(seed))
    first = functional.normalize(vector[0, 0], dim=0)
    second = first + 2e-4 * functional.normalize(draw(seed + 1)[1][0, 0].float(), dim=0)
    turned = turn(hidden, vector, 100, second)
    torch.testing.assert_close(turned.norm(dim=-1), hidden.norm(dim=-1), rtol=1e-6, atol=0)


@given(seeds)
def test_ablation_and_negation_are_points_of_the_circle(seed):
    """At 90 and 270 degrees nothing is left along the vector; at 180 it points the other way."""
    hidden, vector = draw(seed)
    second = draw(seed + 1)[1][0, 0]
    first = functional.normalize(vector[0, 0], dim=0)
    ablated = hidden + ablation_operator()(hidden, vector)
    for angle in (90, 270):
        turned = turn(hidden, vector, angle, second)
        x, _, rest = in_plane(turned, vector, second)
        torch.testing.assert_close(x, torch.zeros_like(x))
        torch.testing.assert_close(rest, in_plane(ablated, vector, second)[2])
    # A hidden state whose part in the plane lies along the vector.
    x, y, rest = in_plane(hidden, vector, second)
    along = rest + x.abs()[..., None] * first
    torch.testing.assert_close(turn(along, vector, 0, second), along)
    negated = along - 2 * (along @ first)[..., None] * first
    torch.testing.assert_close(turn(along, vector, 180, second), negated)
    # What is at an angle already stays there.
    own = math.degrees(math.atan2(float(y[0, 0]), float(x[0, 0])))
    torch.testing.assert_close(turn(hidden, vector, own, second)[0, 0], hidden[0, 0])


@given(seeds, angles)
def test_an_adaptive_rotation_turns_what_has_the_vector_in_it(seed, angle):
    """The rest stays to the last bit."""
    hidden, vector = draw(seed)
    second = draw(seed + 1)[1][0, 0]
    positive = in_plane(hidden, vector, second)[0] > 0
    found, every = (turn(hidden, vector, angle, second, adaptive=on) for on in (True, False))
    assert positive.any() and not positive.all()
    assert torch.equal(found[positive], every[positive])
    assert torch.equal(found[~positive], hidden[~positive])


def test_a_rotation_goes_by_directions_row_by_row():
    """Lengths do not matter, a row with the vector 0 stays, and vectors may differ by row."""
    hidden, vector = draw(3)
    second = draw(4)[1][0, 0]
    turned = turn(hidden, vector, 40, second)
    for longer, size in ((5, 7), (1e-6, 1e-6), (1e6, 1e6)):
        torch.testing.assert_close(turn(hidden, longer * vector, 40, size * second), turned)
    torch.testing.assert_close(turn(hidden, -vector, 140, second), turned)
    torch.testing.assert_close(turn(hidden, vector, -40, -second), turned)
    rows = torch.cat([vector, 0 * vector, -vector])
    found = turn(hidden, rows, 40, second)
    torch.testing.assert_close(found[0], turned[0])
    assert torch.equal(found[1], hidden[1])
    torch.testing.assert_close(found[2], turn(hidden, -vector, 40, second)[2])


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: cap_operator(), "expected a bound"),
        (lambda: cap_operator(math.nan), "finite number as upper"),
        (lambda: cap_operator(lower="1"), "finite number as lower"),
        (lambda: cap_operator(1.0, 2.0), "lower below upper, got 2.0 and 1.0"),
        (lambda: rotation_operator(math.inf, torch.ones(3)), "finite number as angle"),
        (lambda: rotation_operator(90, torch.zeros(3)), "other than 0"),
        (lambda: rotation_operator(90, torch.ones(1, 3)), "as second"),
        (lambda: rotation_operator(90, torch.ones(3, dtype=torch.long)), "as second"),
        (lambda: rotation_operator(90, torch.tensor([1.0, math.nan])), "as second"),
        (lambda: rotation_operator(90, [1.0, 2.0]), "as second"),
    ],
)
def test_operators_that_mean_nothing_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_vectors_that_span_no_plane_are_refused():
    hidden, vector = draw(0)
    with pytest.raises(ValueError, match="span no plane"):
        rotation_operator(90, -3 * vector[0, 0])(hidden, vector)
    several = torch.cat([draw(seed)[1] for seed in (0, 1, 2)])
    with pytest.raises(ValueError, match="span no plane"):  # one of the rows
        rotation_operator(90, -3 * vector[0, 0])(hidden, several)
    with pytest.raises(ValueError, match="5 numbers, the hidden states 8"):
        rotation_operator(90, torch.ones(5))(hidden, vector)
