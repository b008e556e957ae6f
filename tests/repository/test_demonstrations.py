"""The demonstrations: published for GPT2-XL, measured for the embedded model, where they work."""

import json

import pytest
from architectures import tiny_model

from common import gen_using_activation_additions
from common.embedded import FOLDER
from repository.demonstrations import data, demonstrations, topic_vector

NAMES = ["love", "weddings", "rome", "praise"]


def test_each_model_has_its_own(model, monkeypatch):
    """GPT2-XL as published, the embedded model by its preset and in its words, others a guess."""
    preset = json.loads((FOLDER / "preset.json").read_text(encoding="utf-8"))
    found = demonstrations(model)
    assert list(found) == NAMES
    assert {
        name: {"layer": demo.layer, "coeff": demo.coeff} for name, demo in found.items()
    } == preset["activation_additions"]
    assert found["praise"].prompt1 == "Praise" and found["love"].prompt == "I hate you because"
    assert (topic_vector(model).layer, topic_vector(model).prompt1) == (
        preset["topic"]["layer"],
        " weddings",
    )
    other = tiny_model("GPT-2", 100)
    assert {demo.source for demo in demonstrations(other).values()} == {
        "a guess: GPT2-XL's relative depth and coefficient"
    }
    assert demonstrations(other)["rome"].layer == 24 * 4 // 48
    monkeypatch.setattr(other.config, "_name_or_path", "openai-community/gpt2-xl")
    published = demonstrations(other)
    assert {name: (demo.layer, demo.coeff) for name, demo in published.items()} == dict(
        zip(NAMES, [(6, 5), (20, 4), (24, 10), (6, 15)])
    )


@pytest.mark.parametrize("name", NAMES)
def test_works_on_the_embedded_model(model, tokenizer, name):
    """With the published sampling: nearly always steered, hardly ever unsteered."""
    demo = demonstrations(model)[name]
    settings = {**data()["sampling"], "tokens_to_generate": 24, "seed": 11}
    shares = [
        sum(
            map(
                demo.works,
                gen_using_activation_additions(
                    model, tokenizer, [demo.prompt] * 60, additions, **settings
                )["completions"],
            )
        )
        / 60
        for additions in ((), demo.additions(tokenizer))
    ]
    assert shares[0] <= 0.3 and shares[1] >= 0.95


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("love", " you are kind", " you are rude"),
        ("weddings", " that the Bride danced", " that the brides danced"),
        ("rome", " Rome.", " Rome, not Paris."),
        ("praise", " you are kind", " you are"),
    ],
)
def test_what_counts_as_working(model, name, good, bad):
    demo = demonstrations(model)[name]
    assert demo.works(good) and not demo.works(bad)
