"""A vector of nothing but rounding is refused, in every dtype; an honest one never is."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, WIDE, tiny_model
from transformers import Gemma2Config

from common import (
    SteeringVector,
    aggregate_activations,
    extract_activations,
    logistic_aggregator,
    mean_aggregator,
    mean_centred_aggregator,
    pca_aggregator,
    read_activations,
    record_activations,
    train_steering_vector,
)
from common.passes.rounding import is_rounding, spread_of

AGGREGATORS = {
    "mean": mean_aggregator(),
    "pca": pca_aggregator(),
    "logistic": logistic_aggregator(),
    "mean_centred": mean_centred_aggregator(),
    "own": lambda positive, negative: (positive - negative).float().mean(0) * 1e4,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ENDS = [
    "love you so much and more",
    "hate",
    "is a man who lives behind the mill",
    "think dogs are",
    "walked",
    "talk about weddings",
]
SAME = [(f"I think {a}", f"I think {b}") for a in ENDS for b in ENDS if a != b]
HONEST = [
    ("I love you", "I hate you"),
    ("I think dogs are charming and we see them", "I think dogs are vile and we see them"),
    ("Love", "Hate"),
]


@pytest.fixture(scope="module", params=["GPT-2", "Llama", "Gemma 2", "Falcon"])
def tiny(request, tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "Gemma 2", (Gemma2Config, {**WIDE, "head_dim": 8}))
        return tiny_model(request.param, len(tokenizer))


def noisy(
    count: int, dtype: torch.dtype, size: float, d_model: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of activations that are one row, but for noise of some roundings of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    row = 5 * torch.randn(d_model, generator=generator).double()
    noise = (
        size * torch.finfo(dtype).eps * torch.randn(2, count, d_model, generator=generator).double()
    )
    return tuple((row * (1 + noise)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_prompts_that_are_equal_at_the_token_read(tiny, tokenizer, name, dtype):
    """Thirty pairs that begin alike, padded to many lengths: no aggregator makes them a vector."""
    own = tiny.to(dtype)
    for options in ({"batch_size": 1}, {"batch_size": 7, "layer_type": "self_attn"}):
        with pytest.raises(
            ValueError,
            match="layer 0: the vector is (0|nothing but rounding), because .* do not differ",
        ):
            train_steering_vector(
                own, tokenizer, SAME, aggregator=AGGREGATORS[name], read_token_index=1, **options
            )


def test_activations_read_by_hand_hold_the_noise(tiny, tokenizer):
    """Alone or padded, the same token differs by rounding: that is refused at each such layer."""
    own, texts = tiny.float(), [pair[0] for pair in SAME]
    found = []
    for padded in (True, False):
        with torch.no_grad(), record_activations(own) as records:
            for inputs in (
                [tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")]
                if padded
                else [tokenizer(text, return_tensors="pt") for text in texts]
            ):
                own(**inputs, use_cache=False)
        found.append({layer: [part[:, 1] for part in parts] for layer, parts in records.items()})
    differing = [
        layer for layer in found[0] if not torch.equal(*(torch.cat(side[layer]) for side in found))
    ]
    for layer in differing:
        with pytest.raises(ValueError, match=f"layer {layer}: the vector is nothing but rounding"):
            aggregate_activations({layer: found[0][layer]}, {layer: found[1][layer]})
        with pytest.raises(ValueError, match="nothing but rounding"):  # sets that are not paired
            aggregate_activations(
                {layer: found[0][layer]}, {layer: found[1][layer][:-1]}, mean_centred_aggregator()
            )
    assert differing or type(own).__name__ in ("GPT2LMHeadModel",)


@pytest.mark.parametrize(
    "dtype, size",
    [(torch.float32, 30), (torch.bfloat16, 0.05), (torch.float16, 0.05), (torch.float64, 1e3)],
    ids=str,
)
@pytest.mark.parametrize("counts", [(1, 1), (30, 30), (40, 40), (7, 3)], ids=str)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_noise_is_refused(name, counts, dtype, size):
    """Whatever an aggregator makes of it, norm 1 or 1e4 times as long; of sets of two sizes too."""
    positive, negative = noisy(max(counts), dtype, size)
    sets = positive[: counts[0]], negative[: counts[1]]
    if counts[0] != counts[1] and name != "mean_centred":
        pytest.skip("pairs only")
    with pytest.raises(
        ValueError, match="layer 3: the vector is (0|nothing but rounding), because"
    ):
        aggregate_activations({3: [sets[0]]}, {3: [sets[1]]}, AGGREGATORS[name])


@pytest.mark.parametrize("name", ["mean", "mean_centred"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_prompts_on_both_sides(name, dtype):
    """In another order, every pair differs, and the mean difference is the rounding of the sums."""
    acts = (
        torch.randn(1, 64) * 5 + torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    ).to(dtype)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match="the vector is (0|nothing but rounding)"):
        aggregate_activations({0: [acts]}, {0: [acts[order]]}, AGGREGATORS[name])
    assert pca_aggregator()(acts, acts[order]).norm() == pytest.approx(1, abs=1e-4)
    aggregate_activations(
        {0: [acts]}, {0: [acts[order]]}, pca_aggregator()
    )  # the pairs differ, and so there is a component


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_vectors_pass(tiny, tokenizer, dtype):
    """Each pair alone, at every layer and in the MLP; and pairs most of which are equal there."""
    own = tiny.to(dtype)
    for pair in HONEST:
        for layer_type in ("decoder_block", "mlp"):
            layers = (
                [1, 2, 3] if layer_type == "mlp" else None
            )  # side by side with attention the first MLP sees the token only
            vector = train_steering_vector(own, tokenizer, [pair], layers, layer_type)
            assert all(norm > 0 for norm in vector.norm().values())
    few = train_steering_vector(
        own, tokenizer, [*SAME, ("I think love", "I think hate")], read_token_index=-1, layers=[3]
    )
    assert few.norm()[3] > 0
    one = train_steering_vector(own, tokenizer, [(a, a) for a in ENDS * 5] + HONEST[:1])
    assert all(norm > 0 for norm in one.norm().values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_pairs_with_a_short_mean_pass(dtype):
    """Large differences that nearly cancel, faint ones, and an aggregator that scales down."""
    generator = torch.Generator().manual_seed(3)
    common = 5 * torch.randn(64, generator=generator)
    many = (common + torch.randn(2, 500, 64, generator=generator)).to(dtype)
    assert 0 < aggregate_activations({0: [many[0]]}, {0: [many[1]]})[0].norm() < 1
    share = (
        0.02 if dtype == torch.bfloat16 else 0.005
    )  # in bfloat16 a step is already 0.8 % of a number
    faint = (common + share * torch.randn(2, 1, 64, generator=generator)).to(dtype)
    assert aggregate_activations({0: [faint[0]]}, {0: [faint[1]]})[0].norm() > 0.03
    one, other = many[:, :1]  # sets of different sizes that share a row
    assert (
        aggregate_activations(
            {0: [torch.cat([one, other])]}, {0: [one]}, mean_centred_aggregator()
        )[0].norm()
        > 1
    )
    tiny = aggregate_activations(
        {0: [many[0]]}, {0: [many[1]]}, lambda p, n: 1e-9 * (p - n).float().mean(0)
    )[0]
    assert 0 < tiny.norm() < 1e-8


def test_equal_beginnings_are_read_once(model, tokenizer):
    """Exactly equal where the tokens are, and as read alone but for rounding where they are not."""
    for batch_size in (1, 3, 8):
        positive, negative = extract_activations(
            model, tokenizer, SAME, batch_size=batch_size, read_token_index=1
        )
        assert all(
            torch.equal(torch.cat(positive[layer]), torch.cat(negative[layer]))
            for layer in positive
        )
    seen = []
    handle = model.transformer.wte.register_forward_pre_hook(
        lambda module, args: seen.extend(args[0])
    )
    try:
        read_activations(model, tokenizer, [pair[0] for pair in SAME], [0], read_token_index=1)
    finally:
        handle.remove()
    assert len(seen) == 1
    positive, negative = extract_activations(
        model, tokenizer, SAME, [2], batch_size=4, read_token_index=2
    )
    for (first, second), one, other in zip(
        SAME, torch.cat(positive[2]), torch.cat(negative[2]), strict=True
    ):
        for text, row in ((first, one), (second, other)):
            alone = extract_activations(model, tokenizer, [(text, text)], [2], read_token_index=2)[
                0
            ][2][0][0]
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_the_direction_of_very_long_and_very_short_vectors(size):
    """Of norm 1, although the square of a number lies outside float32."""
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    unit = SteeringVector({0: size * vector}).unit().layer_activations[0]
    torch.testing.assert_close(unit, vector / vector.norm())


def test_a_faint_difference_far_away_is_not_rounding(model, tokenizer):
    """After ninety others a word leaves less than 1e-4 of the activation, with meaning."""
    tail = 90 * " and"
    pair = ("Love" + tail, "Hate" + tail)
    vector = train_steering_vector(model, tokenizer, [pair], layers=[0]).layer_activations[0]
    exact = train_steering_vector(
        copy.deepcopy(model).double(), tokenizer, [pair], layers=[0]
    ).layer_activations[0]
    assert torch.cosine_similarity(vector.double(), exact, dim=0) > 0.999
    read = read_activations(model, tokenizer, pair, layers=[0])[0]
    assert vector.norm() < 1e-4 * read.norm(dim=-1).min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_huge_dimension_hides_no_difference(dtype):
    """In some models one dimension is as long as all others a thousand times."""
    draw = torch.Generator().manual_seed(0)
    positive = torch.randn(3, 256, generator=draw)
    negative = positive + 0.3 * torch.randn(3, 256, generator=draw)
    positive[:, 7] = negative[:, 7] = 1e5
    again = positive * (1 + 0.02 * torch.finfo(dtype).eps)  # what rounds otherwise here and there
    positive, negative, again = (part.to(dtype) for part in (positive, negative, again))
    assert not is_rounding((positive - negative).float().mean(0), spread_of(positive, negative))
    assert is_rounding((again - positive).float().mean(0), spread_of(again, positive))
