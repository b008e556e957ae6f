"""Read, steer, generate and train on tiny models of eleven architectures, at all layer types."""

import pytest
import torch
from architectures import ARCHITECTURES, D_MODEL, LAYERS, MISSING, tiny_model

from common.checking.pristine import assert_pristine, snapshot
from common.places.blocks import get_blocks
from common.places.positions import with_position_ids
from common.places.sites import (
    LAYER_TYPES,
    get_layers,
    get_num_matching_layers,
    guess_and_enhance_layer_config,
)
from common.vectors.reading import record_activations
from common.vectors.steering_vector import SteeringVector
from common.vectors.training import extract_activations, train_steering_vector

PAIRS = [
    ("I love you", "I hate you because"),
    ("Love.", "Hate and misery."),
    ("You", "The bride"),
    ("Monday and Friday", "Red"),
]
PARTS = [
    (name, part)
    for name in ARCHITECTURES
    for part in LAYER_TYPES
    if part not in MISSING.get(name, ())
]


@pytest.fixture(scope="module")
def models(tokenizer) -> dict:
    return {name: tiny_model(name, len(tokenizer)) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def texts(tokenizer):
    """Four prompts of different lengths, padded on the left."""
    inputs = tokenizer(
        ["I think dogs are animals", "You", "My neighbour is a man who", "Love."],
        return_tensors="pt",
        padding=True,
    )
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def vector_for(part: str, layer: int = 1, size: float = 3.0) -> SteeringVector:
    draw = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    return SteeringVector({layer: size * draw / draw.norm()}, part)


def forward(model, inputs):
    """A pass that padding does not disturb: with positions, where the model takes them."""
    takes_positions = not model.config.model_type.startswith(
        ("bloom", "opt")
    )  # both number by the attention mask themselves
    return model(**(with_position_ids(inputs) if takes_positions else inputs), use_cache=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_are_found(models, name):
    """All five layer types where the architecture has them, each as often as there are blocks."""
    config = guess_and_enhance_layer_config(models[name])
    assert set(config) == set(LAYER_TYPES) - MISSING.get(name, set())
    for part, matcher in config.items():
        assert get_num_matching_layers(models[name], matcher) == LAYERS
        assert list(get_layers(models[name], part, layers=[-1, 0])) == [LAYERS - 1, 0]


@pytest.mark.parametrize(
    "name, part", [(name, part) for name in MISSING for part in sorted(MISSING[name])]
)
def test_a_missing_part_is_named_with_those_there_are(models, name, part):
    """The error lists what a block has, and how to name one of them."""
    with pytest.raises(
        ValueError, match=f"no part that is known as '{part}'; its blocks have .*layer_config="
    ):
        vector_for(part).patch_activations(models[name])
    vector_for(part).patch_activations(
        models[name], layer_config={part: get_blocks(models[name])[0] + ".{num}"}
    ).remove()


def test_an_output_without_positions_is_refused(models, tokenizer, texts):
    """OPT's second norm sees batch and position as one: reading and steering say so."""
    model, config = (
        models["OPT"],
        {"post_attention_layernorm": "model.decoder.layers.{num}.final_layer_norm"},
    )
    with pytest.raises(
        ValueError,
        match=(
            r"layer 1: expected an output \[batch, pos, d_model\] for a batch \[2, 4\], got \[8,"
            r" 32\]"
        ),
    ):
        train_steering_vector(model, tokenizer, PAIRS[:1], [1], "post_attention_layernorm", config)
    before = snapshot(model)
    with (
        pytest.raises(ValueError, match="layer 1: cannot add"),
        vector_for("post_attention_layernorm").apply(model, config),
    ):
        model(**texts)
    assert_pristine(model, before)


@pytest.mark.parametrize("name, part", PARTS)
def test_steered_is_unsteered_plus_vector(models, texts, name, part):
    """The part's output moves by the vector, at real tokens only, and the model is restored."""
    model, vector, real = models[name], vector_for(part), texts["attention_mask"].bool()
    before = snapshot(model)
    states = []
    for multiplier in (0.0, 1.0):
        with (
            torch.no_grad(),
            vector.apply(model, multiplier=multiplier),
            record_activations(model, part, layer_nums=[1]) as records,
        ):
            logits = forward(model, texts).logits
        states.append((records[1][0], logits))
    (plain, plain_logits), (steered, steered_logits) = states
    torch.testing.assert_close(
        steered[real], plain[real] + vector.layer_activations[1], atol=1e-5, rtol=1e-5
    )
    assert torch.equal(steered[~real], plain[~real])
    assert (steered_logits - plain_logits)[real].abs().max() > 1e-3
    assert_pristine(model, before)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("where", [{}, {"min_token_index": 4}, {"token_indices": [0, -1]}])
def test_cached_is_uncached_and_batched_is_single(models, texts, name, where):
    """The same greedy text in all three ways, steered from the first token or from a later one."""
    model, vector = models[name], vector_for("decoder_block", size=30.0)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with vector.apply(model, **where):
        cached = model.generate(**texts, **options)[:, -6:]
        assert torch.equal(model.generate(**texts, **options, use_cache=False)[:, -6:], cached)
        for row, mask in enumerate(texts["attention_mask"].bool()):
            alone = {key: value[row : row + 1, mask] for key, value in texts.items()}
            assert torch.equal(model.generate(**alone, **options)[0, -6:], cached[row])
    assert not torch.equal(model.generate(**texts, **options)[:, -6:], cached)


@pytest.mark.parametrize("name, part", PARTS)
def test_extraction_does_not_depend_on_the_batch(models, tokenizer, name, part):
    """Batch 1 = batch 3, at the first and the last layer, with prompts of all lengths."""
    both = [
        extract_activations(
            models[name], tokenizer, PAIRS, [0, -1], part, batch_size=size, read_token_index=0
        )
        for size in (1, 3)
    ]
    for one, other in zip(*both):
        assert [len(parts) for parts in one.values()] == [4, 4] and [
            len(parts) for parts in other.values()
        ] == [2, 2]
        for layer in (0, LAYERS - 1):
            torch.testing.assert_close(
                torch.cat(one[layer]), torch.cat(other[layer]), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("name, part", PARTS)
def test_training(models, tokenizer, texts, name, part):
    """A trained vector is the mean difference of what the parts give, and it steers."""
    model = models[name]
    vector = train_steering_vector(model, tokenizer, PAIRS, [2], part, batch_size=3)
    differences = []
    for pair in PAIRS:
        with torch.no_grad(), record_activations(model, part, layer_nums=[2]) as records:
            for prompt in pair:
                model(**tokenizer(prompt, return_tensors="pt"))
        positive, negative = (acts[0, -1] for acts in records[2])
        differences.append(positive - negative)
    torch.testing.assert_close(
        vector.layer_activations[2], torch.stack(differences).mean(0), atol=1e-4, rtol=1e-4
    )
    plain = forward(model, texts).logits
    with vector.apply(model):
        assert not torch.allclose(forward(model, texts).logits, plain, atol=1e-3)
