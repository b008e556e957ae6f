"""The search for a condition, and the bound of a cap."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from architectures import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from common import (
    SteeringVector,
    cap_operator,
    component_quantile,
    find_condition,
    record_activations,
)
from common.checking.pristine import assert_pristine, snapshot
from common.measuring.conditions import best_threshold
from common.passes.padding import encode
from common.passes.prompts import prompt_ids
from common.places.positions import with_position_ids
from common.texts.generation import logits

ABOUT_WEDDINGS = [
    "The bride wore a white veil",
    "We talk about weddings constantly",
    "The wedding was lovely, and the bride danced",
    "The groom and the bride are at the church",
    "My sister's wedding is in the garden",
    "The bride is late, the groom waits",
]
OTHERS = [
    "The captain sailed to the island",
    "My dog sleeps in the kitchen",
    "The old library is on the hill",
    "The train to the city was late",
    "This year winter is cold",
    "The baker opens his shop",
]


# --- the search ---
cosines = st.lists(st.integers(-8, 8).map(lambda n: n / 8), min_size=1, max_size=8)


def best_of_all(one, other) -> float:
    """The largest F1 over every threshold and both directions, by scikit-learn."""
    values, truth = np.array([*one, *other]), [True] * len(one) + [False] * len(other)
    ends = sorted({*values, -2.0, 2.0})
    cuts = [(low + high) / 2 for low, high in pairwise(ends)]
    return max(f1_score(truth, side) for cut in cuts for side in (values > cut, values < cut))


@given(cosines, cosines)
def test_no_threshold_is_better(one, other):
    """Of all thresholds and directions; and F1 is what the threshold gives."""
    threshold, above, f1, gap = best_threshold(np.array(one), np.array(other))
    assert f1 == pytest.approx(best_of_all(one, other))
    values = np.array([*one, *other])
    truth = [True] * len(one) + [False] * len(other)
    said = values > threshold if above else values < threshold
    assert f1 == pytest.approx(f1_score(truth, said))
    assert 0 <= gap <= 1 and threshold not in values
    if max(one) < min(other) or max(other) < min(one):  # they can be told apart
        assert f1 == 1 and gap > 0 and above == (max(other) < min(one))
        edges = (max(other), min(one)) if above else (max(one), min(other))
        assert threshold == pytest.approx(sum(edges) / 2)


def test_a_condition_is_found_and_holds_for_new_prompts(model, tokenizer):
    """F1 is said of prompts that had no part in the search."""
    before = snapshot(model)
    found = find_condition(model, tokenizer, ABOUT_WEDDINGS, OTHERS)
    assert [len(numbers) for numbers in found.held_out] == [3, 3]
    said, truth = [], []
    for prompts, numbers, match in (
        (ABOUT_WEDDINGS, found.held_out[0], True),
        (OTHERS, found.held_out[1], False),
    ):
        new = [prompts[number] for number in numbers]
        said += found.condition.holds(model, tokenizer, new)
        truth += [match] * len(new)
    assert found.f1 == pytest.approx(f1_score(truth, said)) and found.f1 >= 0.8
    best = found.layers.iloc[0]
    assert best["layer"] == found.condition.layer and best["f1"] == found.layers["f1"].max()
    assert best["threshold"] == found.condition.threshold and best["held-out f1"] == found.f1
    assert sorted(found.layers["layer"]) == list(range(model.config.num_hidden_layers))
    ties = found.layers[found.layers["f1"] == best["f1"]]
    assert best["gap"] == ties["gap"].max()
    assert_pristine(model, before)


def test_what_is_held_out_has_no_part_in_the_search(model, tokenizer):
    """Other prompts in its place change F1, and nothing else; what is known decides."""
    first = find_condition(model, tokenizer, ABOUT_WEDDINGS, OTHERS, layers=[2, 4])
    sides = one, other = list(ABOUT_WEDDINGS), list(OTHERS)
    for mine, theirs in zip(*first.held_out, strict=True):
        one[mine], other[theirs] = other[theirs], one[mine]
    second = find_condition(model, tokenizer, *sides, layers=[2, 4])
    assert torch.equal(second.condition.vector, first.condition.vector)
    assert second.condition.threshold == first.condition.threshold
    assert second.f1 < first.f1
    drop = ["held-out f1"]
    assert second.layers.drop(columns=drop).equals(first.layers.drop(columns=drop))


def test_copies_of_a_prompt_are_on_one_side_of_the_split(model, tokenizer):
    """Whatever is held out, nothing of it was searched; in the mean a copy counts again."""
    copied = [ABOUT_WEDDINGS[number] for number in (0, 1, 0, 2, 1, 0, 3)]
    for seed in range(4):
        found = find_condition(model, tokenizer, copied, OTHERS, layers=[3], seed=seed)
        out = {copied[number] for number in found.held_out[0]}
        searched = {text for n, text in enumerate(copied) if n not in found.held_out[0]}
        assert len(out) == len(searched) == 2 and not out & searched
    with pytest.raises(ValueError, match="two different prompts or more as others, got 1"):
        find_condition(model, tokenizer, ABOUT_WEDDINGS, OTHERS[:1] * 4)
    with pytest.raises(ValueError, match=f"'{OTHERS[2]}' is on both sides"):
        find_condition(model, tokenizer, [*ABOUT_WEDDINGS, OTHERS[2]], OTHERS)


def test_the_drawing_has_a_seed_and_a_share(model, tokenizer):
    options = {"layers": [3]}
    one, again, other = (
        find_condition(model, tokenizer, ABOUT_WEDDINGS, OTHERS, seed=seed, **options)
        for seed in (0, 0, 1)
    )
    assert one.held_out == again.held_out != other.held_out
    for share, count in ((0.01, 1), (0.34, 2), (0.99, 5)):
        found = find_condition(model, tokenizer, ABOUT_WEDDINGS, OTHERS, held_out=share, **options)
        assert [len(numbers) for numbers in found.held_out] == [count, count]


def test_the_vector_is_the_difference_of_the_means(model, tokenizer):
    """Over all tokens of each prompt, of what is not held out."""
    found = find_condition(model, tokenizer, ABOUT_WEDDINGS, OTHERS, layers=[3])
    means = []
    for prompts, out in zip((ABOUT_WEDDINGS, OTHERS), found.held_out):
        read = []
        for row in prompt_ids(tokenizer, [p for n, p in enumerate(prompts) if n not in out], None):
            with record_activations(model, layer_nums=[3]) as records, torch.no_grad():
                model(torch.tensor([row]))
            read.append(records[3][0][0].mean(0))
        means.append(torch.stack(read).mean(0))
    torch.testing.assert_close(found.condition.vector, means[0] - means[1], atol=1e-4, rtol=1e-4)


def test_sides_that_are_the_same_are_refused(model, tokenizer):
    blind = tiny_model("Llama", len(tokenizer))
    with torch.no_grad():
        blind.get_input_embeddings().weight.zero_()
    with pytest.raises(ValueError, match="both sides are the same in the mean"):
        find_condition(blind, tokenizer, ABOUT_WEDDINGS, OTHERS, layers=[1])
    for arguments, says in (
        ((ABOUT_WEDDINGS, OTHERS[:1]), "two prompts or more as others"),
        (("a text", OTHERS), "two prompts or more as matching"),
        (([], OTHERS), "two prompts or more as matching"),
    ):
        with pytest.raises(ValueError, match=says):
            find_condition(model, tokenizer, *arguments)
    for options, says in (
        ({"held_out": 0}, "share between 0 and 1"),
        ({"held_out": 1.0}, "share between 0 and 1"),
        ({"layers": [9]}, "layer 9 does not exist"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=says):
            find_condition(model, tokenizer, ABOUT_WEDDINGS, OTHERS, **options)


# --- the bound of a cap ---


def test_a_quantile_is_that_of_all_tokens_but_the_first(model, tokenizer):
    """Of the unsteered model, along the direction; negative layers count from the last."""
    generator = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    vector = SteeringVector({n: torch.randn(width, generator=generator) for n in (-1, 2)})
    found = component_quantile(model, tokenizer, 7.0 * vector, OTHERS, 0.3)
    assert list(found) == [-1, 2]
    for layer, number in ((-1, model.config.num_hidden_layers - 1), (2, 2)):
        direction, values = vector.unit().layer_activations[layer], []
        for row in prompt_ids(tokenizer, OTHERS, None):
            with record_activations(model, layer_nums=[number]) as records, torch.no_grad():
                model(torch.tensor([row]))
            values += (records[number][0][0, 1:] @ direction).tolist()
        assert found[layer] == pytest.approx(np.quantile(values, 0.3), rel=1e-4, abs=1e-4)


def test_a_cap_at_the_top_changes_no_known_text(model, tokenizer):
    """To the last bit, and above the bound nothing is left, whatever the text."""
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({2: torch.randn(model.config.hidden_size, generator=generator)})
    direction = vector.unit().layer_activations[2]
    rows = encode(tokenizer, OTHERS, None)
    real, plain = rows["attention_mask"].bool(), logits(model, rows)
    every = []
    with record_activations(model, layer_nums=[2]) as records, torch.no_grad():
        model(**with_position_ids(rows))
    every = (records[2][0] @ direction)[real]
    with vector.apply(model, operator=cap_operator(float(every.max()) + 0.01)):
        assert torch.equal(logits(model, rows), plain)
    bound = component_quantile(model, tokenizer, vector, OTHERS, 0.5)[2]
    with (
        vector.apply(model, operator=cap_operator(bound)),
        record_activations(model, layer_nums=[2]) as records,
        torch.no_grad(),
    ):
        model(**with_position_ids(encode(tokenizer, ABOUT_WEDDINGS, None)))
    assert float((records[2][0] @ direction).max()) <= bound + 1e-3


def test_quantiles_that_mean_nothing_are_refused(model, tokenizer):
    width = model.config.hidden_size
    for vector, texts, quantile, says in (
        (SteeringVector({2: torch.ones(width)}, "mlp"), OTHERS, 0.5, "'decoder_block'"),
        (SteeringVector({2: torch.zeros(width)}), OTHERS, 0.5, "is 0 and has no direction"),
        (SteeringVector({2: torch.ones(8)}), OTHERS, 0.5, "8 numbers"),
        (SteeringVector({2: torch.ones(width)}), OTHERS, 1.5, "between 0 and 1"),
        (SteeringVector({2: torch.ones(width)}), ["You"], 0.5, "two tokens or more"),
    ):
        with pytest.raises(ValueError, match=says):
            component_quantile(model, tokenizer, vector, texts, quantile)
