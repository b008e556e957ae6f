"""Training from contrast pairs: the documented interface, its laws, and clear errors."""

import hashlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import common
from common import (
    SteeringVector,
    SteeringVectorTrainingSample,
    aggregate_activations,
    extract_activations,
    mean_aggregator,
    mean_centred_aggregator,
    pca_aggregator,
    read_activations,
    train_steering_vector,
)
from common.checking.pristine import assert_pristine, snapshot
from common.embedded import FOLDER

PAIRS = [
    ("I love you", "I hate you"),
    ("Love.", "Hate and misery."),
    ("I think dogs are charming", "I think dogs are vile"),
]
WORDS = ["I love you", "I hate you", "Love", "Misery is here", "You", "The bride"]


def test_vector_is_the_mean_difference(model, tokenizer):
    """At every layer, as read prompt by prompt; keys, type and metadata as documented."""
    vector = train_steering_vector(model, tokenizer, PAIRS)
    positive, negative = (
        read_activations(model, tokenizer, [pair[side] for pair in PAIRS]) for side in (0, 1)
    )
    assert isinstance(vector, SteeringVector) and vector.layer_type == "decoder_block"
    assert list(vector.layer_activations) == list(range(6))
    for layer, found in vector.layer_activations.items():
        torch.testing.assert_close(found, (positive[layer] - negative[layer]).mean(0))
    samples = [(*pair, None, None) for pair in PAIRS]
    assert vector.metadata == {
        "model": "embedded",
        "model_type": "gpt2",
        "pairs": "3",
        "aggregator": "mean",
        "pairs_sha256": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
    }


def test_what_is_given_is_used(model, tokenizer):
    """A BOS in front, and token 0 of a sample beside another default."""
    sample = SteeringVectorTrainingSample("I love you", "I hate you", 0, 1)
    found = train_steering_vector(model, tokenizer, [sample], [3], prepend_bos=True)
    options = {"layers": [3], "prepend_bos": True}
    positive, negative = (
        read_activations(model, tokenizer, [text], read_token_index=index, **options)[3][0]
        for text, index in ((sample.positive_str, 0), (sample.negative_str, 1))
    )
    torch.testing.assert_close(found.layer_activations[3], positive - negative)


def test_both_sides_have_the_same_layers():
    """Else one of them would be left out in silence."""
    one, two = {1: [torch.eye(2)]}, {1: [-torch.eye(2)], 2: [torch.eye(2)]}
    for given_layers in ((one, two), (two, one), ({}, {})):
        with pytest.raises(ValueError, match="expected the same layers twice"):
            aggregate_activations(*given_layers)


@given(
    pairs=st.lists(
        st.tuples(st.sampled_from(WORDS[::2]), st.sampled_from(WORDS[1::2])), min_size=1, max_size=5
    ),
    batch_size=st.integers(1, 4),
    layer=st.sampled_from([0, 4, -2]),
)
def test_laws(model, tokenizer, pairs, batch_size, layer):
    """Swapped pairs reverse it; order and batch size do not matter; a pair twice counts twice."""

    def train(given):
        found = train_steering_vector(model, tokenizer, given, [layer], batch_size=batch_size)
        return found.layer_activations[layer % 6]

    vector = train(pairs)
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(train([(b, a) for a, b in pairs]), -vector, **close)
    torch.testing.assert_close(train(pairs[::-1]), vector, **close)
    torch.testing.assert_close(train(pairs + pairs), vector, **close)
    singles = torch.stack([train([pair]) for pair in pairs])
    torch.testing.assert_close(vector, singles.mean(0), **close)


def test_samples_say_where_they_are_read(model, tokenizer):
    """A sample's own index wins over the common one, a number or callable; tuples may mix in."""
    samples = [
        SteeringVectorTrainingSample("I love you", "I hate you", read_positive_token_index=1),
        PAIRS[2],
    ]
    positive, negative = extract_activations(
        model, tokenizer, samples, [3], read_token_index=lambda prompt: 0
    )
    wanted = [
        read_activations(model, tokenizer, [prompt], [3], read_token_index=index)[3]
        for prompt, index in [
            ("I love you", 1),
            (PAIRS[2][0], 0),
            ("I hate you", 0),
            (PAIRS[2][1], 0),
        ]
    ]
    torch.testing.assert_close(torch.cat(positive[3]), torch.cat(wanted[:2]))
    torch.testing.assert_close(torch.cat(negative[3]), torch.cat(wanted[2:]))


def test_extraction_has_the_documented_form(model, tokenizer):
    """Two dicts from layer to a list of tensors, `batch_size` pairs each, in the order given."""
    positive, negative = extract_activations(
        model, tokenizer, PAIRS, [1, -1], batch_size=2, move_to_cpu=True
    )
    d_model = model.config.hidden_size
    for side in (positive, negative):
        assert list(side) == [1, 5]
        assert [list(part.shape) for part in side[5]] == [[2, d_model], [1, d_model]]
    vectors = aggregate_activations(positive, negative, mean_aggregator())
    torch.testing.assert_close(
        vectors, train_steering_vector(model, tokenizer, PAIRS, [1, 5]).layer_activations
    )


def test_a_callable_as_aggregator(model, tokenizer):
    """Any function of (pos, neg), as in the documentation; its name is remembered."""

    def norm_mean_aggregator(pos_activations, neg_activations):
        mean = torch.mean(pos_activations - neg_activations, dim=0)
        return mean / torch.norm(mean)

    vector = train_steering_vector(model, tokenizer, PAIRS, aggregator=norm_mean_aggregator)
    assert all(norm == pytest.approx(1, abs=1e-5) for norm in vector.norm().values())
    assert vector.metadata["aggregator"] == "norm_mean_aggregator"


def test_mean_centring_against_a_background(model, tokenizer):
    """Two target prompts against four of a background, by the functions that take activations."""
    target, background = (
        read_activations(model, tokenizer, texts, [2]) for texts in (WORDS[:2], WORDS[2:])
    )
    vectors = aggregate_activations(
        {2: [target[2]]}, {2: [background[2]]}, mean_centred_aggregator()
    )
    torch.testing.assert_close(vectors[2], target[2].mean(0) - background[2].mean(0))


def test_layer_config_as_template_and_callable(model, tokenizer):
    """A template, a callable of the number, or of the model and the number: the same vector."""
    wanted = train_steering_vector(model, tokenizer, PAIRS, [2], "mlp").layer_activations[2]
    for matcher in (
        "transformer.h.{num}.mlp",
        lambda num: f"transformer.h.{num}.mlp",
        lambda model, num: f"transformer.h.{num}.mlp",
    ):
        vector = train_steering_vector(
            model, tokenizer, PAIRS, [2], "mlp", layer_config={"mlp": matcher}
        )
        assert torch.equal(vector.layer_activations[2], wanted)
        with vector.apply(model, layer_config={"mlp": matcher}):
            pass
    inner = train_steering_vector(
        model, tokenizer, PAIRS, [2], "mlp", layer_config={"mlp": "transformer.h.{num}.mlp.c_fc"}
    )
    assert inner.layer_activations[2].shape == (4 * model.config.hidden_size,)
    with torch.no_grad(), inner.apply(model, layer_config={"mlp": "transformer.h.{num}.mlp.c_fc"}):
        model(**tokenizer("You", return_tensors="pt"))


@pytest.mark.parametrize(
    "samples, options, says",
    [
        ([], {}, "list of contrast pairs"),
        ("ab", {}, "list of contrast pairs"),
        ([("a", "b", "c")], {}, "pair 0: expected"),
        ([("You", "Love"), ("You", 3)], {}, "pair 1: expected two texts or lists of messages"),
        ([("You", "")], {}, "the prompt '' has 0 tokens"),
        (
            [SteeringVectorTrainingSample("You", "Love", 4)],
            {},
            "cannot read token 4 of 'You': it has 1 tokens",
        ),
        ([("You", "Love")], {"layers": [17]}, "layer 17 does not exist"),
        ([("You", "Love")], {"layer_type": "attn"}, "unknown layer_type 'attn'"),
        (
            [("You", "Love")],
            {"layer_type": "mlp", "layer_config": {"mlp": "transformer.h.mlp"}},
            "needs the placeholder {num}",
        ),
        (
            [("You", "Love")],
            {"layer_type": "mlp", "layer_config": {"mlp": "x.{num}"}},
            "no module of GPT2LMHeadModel matches 'x.{num}'",
        ),
        (
            [("You", "Love")],
            {"layer_type": "mlp", "layer_config": {"mlp": 3}},
            "a layer matcher is a template",
        ),
        ([("You", "Love")], {"batch_size": 0}, "integer of 1 or more as batch_size, got 0"),
        (
            [("You", "You")],
            {},
            "layer 0: the vector is 0, because the positive and the negative prompts do not differ",
        ),
        ([("Love is", "Hate is")], {"layer_type": "input_layernorm"}, "layer 0: the vector is 0"),
        (
            [("You", "Love")],
            {"aggregator": lambda p, n: p},
            r"expected a vector \[(\d+)\] from the aggregator, got \[1, \1\]",
        ),
        ([("You", "Love")], {"aggregator": lambda p, n: None}, "got NoneType"),
        (
            [("You", "Love")],
            {"aggregator": lambda p, n: p[0] / 0},
            "the aggregator gave nan or inf",
        ),
    ],
)
def test_bad_input_is_named(model, tokenizer, samples, options, says):
    """What was given and what fits; the model stays as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        train_steering_vector(model, tokenizer, samples, **options)
    assert_pristine(model, before)


def test_nan_in_the_activations_is_named(tokenizer):
    """A model that gives nan: the layer and the side are named."""
    model = tiny_model("GPT-2", len(tokenizer))
    with torch.no_grad():
        model.transformer.h[2].mlp.c_proj.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 2: the positive activations hold nan or inf"):
        train_steering_vector(model, tokenizer, PAIRS)


def test_all_documented_names_come_from_common():
    """`from common import …` gives every name of the documented interface; no other is needed."""
    names = [
        "train_steering_vector",
        "extract_activations",
        "aggregate_activations",
        "record_activations",
        "SteeringVectorTrainingSample",
        "SteeringVector",
        "SteeringPatchHandle",
        "mean_aggregator",
        "pca_aggregator",
        "logistic_aggregator",
        "addition_operator",
        "ablation_operator",
        "ablation_then_addition_operator",
        "get_num_matching_layers",
        "guess_and_enhance_layer_config",
        "Aggregator",
        "LayerType",
        "LayerMatcher",
        "ModelLayerConfig",
        "PatchDeltaOperator",
    ]
    assert all(getattr(common, name) is not None for name in names) and set(names) <= set(
        common.__all__
    ) <= set(dir(common))
    with pytest.raises(AttributeError, match="No common attribute train"):
        common.train


def test_a_documented_program_runs_with_only_its_import_changed(
    tmp_path, monkeypatch, capsys, model, tokenizer
):
    """The program runs, and trains what the functions here train."""
    source = Path(__file__).with_name("documented_program.py").read_text(encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(
        source.replace("from steering_vectors import", "from common import"), encoding="utf-8"
    )
    monkeypatch.setattr(sys, "argv", [str(program), str(FOLDER)])
    runpy.run_path(str(program), run_name="__main__")
    printed = capsys.readouterr().out
    samples = [
        ("I love the garden", "I hate the garden"),
        SteeringVectorTrainingSample("We adore you", "We despise you", 1, 1),
        ("The soup is delicious", "The soup is rotten"),
    ]
    norms = train_steering_vector(model, tokenizer, samples, layers=[1, 2, 5]).norm()
    assert printed.split()[1:] == [f"{layer}:{norm:.3f}" for layer, norm in norms.items()]


def test_training_by_pca_differs_from_the_mean(model, tokenizer):
    """Norm 1 at every layer, on the side of the differences."""
    mean, pca = (
        train_steering_vector(model, tokenizer, PAIRS, aggregator=a)
        for a in (mean_aggregator(), pca_aggregator())
    )
    assert all(norm == pytest.approx(1, abs=1e-5) for norm in pca.norm().values())
    assert all(cosine > 0 for cosine in mean.cosine_similarity(pca).values())
