"""The benchmarks measure what they say: the same work on both sides, and ratios of what was timed. No times are compared here."""

import pytest
import torch

from benchmarks.extraction import bare_blocks
from benchmarks.shapes import WORDS, random_pairs, word_tokenizer
from benchmarks.sweep import Grid
from benchmarks.timing import interleaved, ratio
from common.steering_vector import SteeringVector


def test_bare_blocks_are_the_models(model):
    """What counts as the least that training can cost is what the model computes up to that layer, and no further."""
    ids, caught, passed = torch.tensor([[5, 6, 7], [8, 9, 10]]), [], []
    handles = [
        model.transformer.h[2].register_forward_hook(lambda m, args, out: caught.append(out)),
        model.transformer.h[3].register_forward_hook(lambda m, args, out: passed.append(out)),
    ]
    bare_blocks(model, [ids], 2)
    assert len(caught) == 1 and not passed
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(caught[0], caught[1])


def test_prompts_have_the_length_they_are_said_to_have():
    """16 pairs of 16 tokens, all different, the same every time."""
    pairs = random_pairs(16, 16)
    prompts = [prompt for pair in pairs for prompt in pair]
    assert len(set(prompts)) == 32 and pairs == random_pairs(16, 16)
    assert {len(ids) for ids in word_tokenizer()(prompts)["input_ids"]} == {16}
    assert word_tokenizer().decode(word_tokenizer()(WORDS[7])["input_ids"]) == WORDS[7]


def test_ways_take_turns():
    """Each way runs once more than it counts, in changing order, and may time itself."""
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 0.5}, 2, "test")
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert seconds["b"] == [0.5, 0.5] and len(seconds["a"]) == 2


def test_ratio_is_the_median_of_the_rounds():
    """Round by round, with quartiles around it."""
    assert ratio([2.0, 6.0, 4.0], [2.0, 2.0, 2.0])[0] == pytest.approx(2.0)
    assert ratio([1.0], [2.0]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("kind", ["completions", "logits"])
def test_three_ways_of_a_sweep_do_the_same(model, tokenizer, kind):
    """The same cells, and the same texts or divergences, whichever way they are computed."""
    vector = SteeringVector({layer: torch.randn(128, generator=torch.Generator().manual_seed(layer)) for layer in (1, 4)})
    grid = Grid(model, tokenizer, vector, [-2.0, 2.0], ["I think dogs are", "You"])
    for way in grid.ways(kind).values():
        way()
    own = grid.found["sweep"]
    assert len(own) == 8 and len({str(value) for value in own.values()}) > 4
    for way in ("each setting", "each prompt"):
        assert grid.found[way].keys() == own.keys()
        same = [own[key] == other if kind == "completions" else abs(own[key] - other) < 1e-4 for key, other in grid.found[way].items()]
        assert all(same)
