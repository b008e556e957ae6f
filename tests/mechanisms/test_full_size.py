"""The six agree at the size of GPT2-XL, with random weights and the real GPT-2 tokenizer.

`make full-size` runs this; it needs 16 GB of memory and some minutes, so `make test` leaves it out.
"""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerBase

from benchmarks.shapes import random_gpt2
from common.checking.pristine import assert_pristine, snapshot
from common.loading import preset_for
from common.passes.padding import encode
from common.vectors.activation_additions import (
    addition_vectors,
    apply_activation_additions,
    with_bos,
)
from common.vectors.reading import record_activations
from common.vectors.training import train_steering_vector
from repository import agreement as love_hate
from repository.demonstrations import demonstrations
from repository.mechanisms import MECHANISMS, ROOT

pytestmark = pytest.mark.full_size

TOKENIZER = ROOT.parent / "shared" / "gpt2_tokenizer"
TOLERANCE = 1e-4  # of a logit; 48 blocks add up more rounding than the embedded model's few


@pytest.fixture(scope="module")
def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    if not Path(TOKENIZER).is_dir():
        pytest.skip(
            f"the files of the GPT-2 tokenizer are not in {TOKENIZER.relative_to(ROOT.parent)}"
            " beside the project"
        )
    tokenizer = GPT2Tokenizer.from_pretrained(TOKENIZER, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def gpt2_xl() -> GPT2LMHeadModel:
    """GPT2-XL from its config, in fp32, with random weights from a seed."""
    return random_gpt2("gpt2-xl")


def test_shape_is_gpt2_xls(gpt2_xl):
    """48 blocks of width 1600 and 1.56 billion parameters."""
    assert len(gpt2_xl.transformer.h) == 48 and gpt2_xl.num_parameters() == 1_557_611_200


def test_contrast_words(gpt2_tokenizer):
    """One token for "Love" and two for "Hate", so both are read at their last token."""
    assert [len(gpt2_tokenizer(word)["input_ids"]) for word in ("Love", "Hate")] == [1, 2]


def test_six_mechanisms_agree_at_full_size(gpt2_xl, gpt2_tokenizer):
    """At the published settings: logits within 1e-4, the same greedy ids, the model restored."""
    layer, coeff, _ = preset_for("gpt2-xl", 48)
    results = [
        love_hate.run_mechanism(name, gpt2_xl, gpt2_tokenizer, layer, coeff, max_new_tokens=8)
        for name in MECHANISMS
    ]
    rows = love_hate.agreement(results)
    print(rows.to_string())
    assert (rows[["vector", "logits"]] <= TOLERANCE).all(axis=None)
    assert rows[["same text", "restored"]].all(axis=None)
    logits = results[0].logits
    for sign in ("+", "-"):
        assert (logits[sign] - logits["unsteered"]).abs().max() > 100 * TOLERANCE, (
            "steering did nothing"
        )


def test_vectors_at_full_size(gpt2_xl, gpt2_tokenizer):
    """Training equals single passes; steered = unsteered + vector; cached = uncached; restored."""
    pairs = [
        ("I love you", "I hate you"),
        ("What a wonderful morning!", "What an awful day"),
        ("Love", "Hate"),
    ]
    vector = train_steering_vector(gpt2_xl, gpt2_tokenizer, pairs, layers=[5], batch_size=4)
    before = snapshot(gpt2_xl)
    differences = []
    for pair in pairs:
        with torch.no_grad(), record_activations(gpt2_xl, layer_nums=[5]) as records:
            for prompt in pair:
                gpt2_xl(**gpt2_tokenizer(prompt, return_tensors="pt"))
        differences.append(records[5][0][0, -1] - records[5][1][0, -1])
    torch.testing.assert_close(
        vector.layer_activations[5], torch.stack(differences).mean(0), atol=1e-4, rtol=1e-4
    )
    inputs = gpt2_tokenizer(["I think dogs are", "You"], return_tensors="pt", padding=True)
    states = []
    for multiplier in (0.0, 10.0):
        with (
            torch.no_grad(),
            vector.apply(gpt2_xl, multiplier=multiplier, min_token_index=1),
            record_activations(gpt2_xl, layer_nums=[5]) as records,
        ):
            gpt2_xl(**inputs)
        states.append(records[5][0])
    moved = states[1] - states[0]
    expected = torch.zeros_like(moved)
    expected[0, 1:] = (
        10 * vector.layer_activations[5]
    )  # the second row has one token, which is not steered
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)
    with vector.apply(gpt2_xl, multiplier=10.0, min_token_index=3):
        options = {"max_new_tokens": 4, "do_sample": False}
        cached, uncached = (
            gpt2_xl.generate(**inputs, **options, use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached, uncached)
    assert_pristine(gpt2_xl, before)


def test_published_demonstrations_line_up(gpt2_xl, gpt2_tokenizer, monkeypatch):
    """A space is one token, and each pair, padded alike, is no longer than its prompt."""
    monkeypatch.setattr(gpt2_xl.config, "_name_or_path", "gpt2-xl")
    for demo in demonstrations(gpt2_xl).values():
        assert demo.source == "published"
        rows = [addition.token_ids(gpt2_tokenizer) for addition in demo.additions(gpt2_tokenizer)]
        assert len(rows[0]) == len(rows[1]) <= len(with_bos(gpt2_tokenizer, demo.prompt))
        text = [gpt2_tokenizer.decode(row[1:]) for row in rows]
        assert [part.rstrip(" ") for part in text] == [demo.prompt1, demo.prompt2] and rows[0][
            0
        ] == gpt2_tokenizer.bos_token_id
    assert demo.name == "praise" and (demo.layer, demo.coeff) == (6, 15)


def test_additions_at_full_size(gpt2_xl, gpt2_tokenizer, monkeypatch):
    """The weddings of the post: what is added in a padded batch; cached = uncached; restored."""
    monkeypatch.setattr(gpt2_xl.config, "_name_or_path", "gpt2-xl")
    demo, before = demonstrations(gpt2_xl)["weddings"], snapshot(gpt2_xl)
    additions = demo.additions(gpt2_tokenizer)
    inputs = encode(
        gpt2_tokenizer, [demo.prompt, "My mother went to the old library on Monday and said"]
    )
    (((site, count), vectors),) = addition_vectors(gpt2_xl, gpt2_tokenizer, additions).items()
    states = []
    for context in (nullcontext(), apply_activation_additions(gpt2_xl, gpt2_tokenizer, additions)):
        with (
            torch.no_grad(),
            context,
            record_activations(gpt2_xl, layer_nums=[site.layer - 1]) as records,
        ):
            gpt2_xl(**inputs)
        states.append(records[site.layer - 1][0])
    moved = states[1] - states[0]
    expected = torch.zeros_like(moved)
    for row, mask in enumerate(inputs["attention_mask"]):
        first = int((mask == 0).sum())
        expected[row, first : first + count] = vectors
    torch.testing.assert_close(moved, expected, atol=1e-3, rtol=1e-4)
    with apply_activation_additions(gpt2_xl, gpt2_tokenizer, additions):
        options = {"max_new_tokens": 4, "do_sample": False}
        cached, uncached = (
            gpt2_xl.generate(**inputs, **options, use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached, uncached)
    assert_pristine(gpt2_xl, before)
