"""The playground's JavaScript, in node, computes what the library computes with torch."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_reference import CONDITIONS, ODD_PROMPTS, PAIRS, REFUSED_PROMPTS, Case, answer

from common import SteeringVector, mark_tone, random_directions, tone_sign, train_steering_vector
from common.measuring.tone import tone_words
from repository.playground import project

pytestmark = pytest.mark.browser
PROGRAM = Path(__file__).with_name("cases.mjs")
TEXTS = [*ODD_PROMPTS, "It is not good. No bad word, never a truly good one! Hardly sad? GOOD"]
# Completions that are counted: (settings, the first, how many).
COUNTED = [
    (Case("To me, the harbour is", coeff=-15.6, layer=2, seed=2**32 - 4), 2, 5),
    (Case("I heard that the hotel is", "Joy", "Misery", 4, 12, randomSeed=9), 0, 2),
]
# A map of one cell with a vector of two layers, in short texts.
WITH_FILE = {"newTokens": 8, "mapCoeffs": [30]}
FILE_CASE = Case("To me, the harbour is", coeff=30, length=40, sampled=True, seed=5, randomSeed=8)
# (count, seed)
RANDOM = [(1, 0), (3, 7), (1, 2**32 - 1), (700, 1234)]


def file_vectors() -> dict[str, SteeringVector]:
    """Vectors that the page can read."""
    generator = torch.Generator().manual_seed(3)
    one, other = torch.randn(2, 256, generator=generator)
    return {
        "one": SteeringVector({3: one}, metadata={"model": "embedded"}),
        "two-layers": SteeringVector({1: one, 4: 3 * other}),
        "from-the-end": SteeringVector({-1: one}),
        "in-another-order": SteeringVector({1: one.half(), 2: one, 0: one.half()}),
        "half": SteeringVector({2: one.half()}),
        "brain": SteeringVector({2: one.bfloat16()}),
        "double": SteeringVector({0: one.double()}, metadata={"model": "gpt2-xl"}),
    }


def refused_files(folder: Path) -> dict[str, str]:
    """Write files that hold no vector for this model; by name a part of what is said of each."""
    one = torch.ones(256)
    vectors = {
        "another place": (SteeringVector({1: one}, "mlp"), "acts on mlp"),
        "too deep": (SteeringVector({6: one}), "steers layer 6; this model has layers 0 to 5"),
        "too wide": (SteeringVector({1: torch.ones(768)}), "768 numbers; this model has 256"),
        "nothing": (SteeringVector({1: 0 * one}), "a vector that is 0"),
        "endless": (SteeringVector({1: one * float("inf")}), "not finite in layer 1"),
        "too loud": (SteeringVector({1: 100 * one}), "a norm of 1600; this page steers up to 1000"),
        "twice": (SteeringVector({-1: one, 5: one}), "layer 5 twice"),
    }
    for name, (vector, _) in vectors.items():
        vector.save(folder / f"{name}.safetensors")
    whole = (folder / "too deep.safetensors").read_bytes()
    entry = {"dtype": "F32", "shape": [256], "data_offsets": [0, 1024]}
    files = {
        "cut off": (whole[:-5], "is not a complete safetensors file (layer.6 is cut off)"),
        "a beginning": (whole[:40], "is not a complete safetensors file (its header is cut off)"),
        "short": (b"abc", "it has less than 8 bytes"),
        "a text": (b"Love is not a tensor, and neither is hate.", "its header is cut off"),
        "another header": (b'\7\0\0\0\0\0\0\0{"a":5}', "its header is of another kind"),
        "later": (whole.replace(b'"format_version":"1"', b'"format_version":"2"'), "the format 2"),
        "something else": (whole.replace(b"steering_vector", b"other_vectors__"), "holds no"),
        "longer": (whole + bytes(4), "something follows its tensors"),
        "a gap": (_moved(whole, 1024), "its tensors overlap, or there are gaps"),
        "before": (_moved(whole, -8), "layer.6 begins inside the header"),
        "no type": (_header({"layer.1": entry | {"dtype": "toString"}}), "of the type toString"),
        "no metadata": (_header({"__metadata__": None, "layer.1": entry}), "holds no steering"),
        "numbers": (_header({"__metadata__": {"model": 5}}), "its header is of another kind"),
    }
    for name, (content, _) in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return {name: words for name, (_, words) in {**vectors, **files}.items()}


def _header(header: dict[str, Any], numbers: bytes = bytes(1024)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def _moved(whole: bytes, by: int) -> bytes:
    """A file with one tensor whose numbers are said to stand elsewhere."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    offsets = header["layer.6"]["data_offsets"]
    header["layer.6"]["data_offsets"] = [place + by for place in offsets]
    return _header(header, whole[end:] + bytes(max(by, 0)))


@pytest.fixture(scope="module")
def saves(model) -> list[Case]:
    """Cases whose vectors are saved: every layer, every pair."""
    layers = itertools.cycle(range(model.config.n_layer))
    return [Case("x", *pair, next(layers)) for pair in PAIRS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="module")
def found(cases, saves, folder) -> dict[str, Any]:
    """What node answers, with the logits [case, condition, vocab] of those that it answers."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node to run the page's modules in: apt-get install nodejs")
    refused = refused_files(folder)
    for name, vector in file_vectors().items():
        vector.save(folder / f"{name}.safetensors")
    given = {
        "cases": [case._asdict() for case in cases],
        "texts": TEXTS,
        "saves": [case._asdict() for case in saves],
        "loads": [f"{name}.safetensors" for name in (*file_vectors(), *refused)],
        "random": RANDOM,
        "counted": [
            {"settings": case._asdict(), "from": first, "count": count}
            for case, first, count in COUNTED
        ],
        "withFile": {
            "name": "two-layers.safetensors",
            "settings": FILE_CASE._asdict(),
            **WITH_FILE,
        },
    }
    for name, content in (("cases", given), ("project", project())):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    done = subprocess.run([node, PROGRAM, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    numbers = torch.from_numpy(np.fromfile(folder / "logits.bin", dtype=np.float32))
    return {**answers, "logits": numbers, "refused": refused}


def test_ids_and_texts_are_torchs(cases, answers, found):
    """For each of 200 cases: the ids, and three texts, whether the likeliest or sampled."""
    assert len(cases) == len(set(cases)) == 200
    assert sum(case.sampled for case in cases) > 40
    wrong = [
        (case, it, right)
        for case, right, it in zip(cases, answers, found["answers"], strict=True)
        if right and (it["ids"], it["texts"]) != (right.ids, right.texts)
    ]
    assert wrong == []


def test_the_page_refuses_what_the_library_refuses(cases, answers, found):
    for case, right, it in zip(cases, answers, found["answers"], strict=True):
        assert (right is None) == ("refused" in it) == (case.prompt in REFUSED_PROMPTS)
    told = [it["refused"] for it in found["answers"] if "refused" in it]
    assert told == [
        "The prompt is empty: write at least one letter.",
        "The prompt has 300 tokens, and the model reads at most 256: shorten it.",
        "The prompt has 361 tokens, and the model reads at most 256: shorten it.",
        "The prompt has half of a letter that takes two; write it again.",
    ]


def test_logits_are_near_torchs(answers, found):
    expected = torch.stack([right.logits for right in answers if right])
    logits = found["logits"].view_as(expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    # Steering shows: the test would notice a page that steers nothing.
    assert (expected[:, 0] - expected[:, 1]).abs().amax(-1).median() > 1


def test_the_next_tokens_are_torchs(tokenizer, answers, found):
    """The eight that are likeliest unsteered or steered, and their share under each condition."""
    for right, it in zip(answers, found["answers"], strict=True):
        if right is None:
            continue
        shares = right.logits.double().softmax(-1)
        highest, ids = shares[:2].amax(0).topk(8)
        shown = torch.tensor([token["probabilities"] for token in it["tokens"]])
        torch.testing.assert_close(shown[:, :2].amax(1).double(), highest, rtol=0, atol=1e-4)
        known = {tokenizer.decode([id]): shares[:, id] for id in ids.tolist()}
        for token in it["tokens"]:
            if token["token"] in known and "\ufffd" not in token["token"]:
                expected = known[token["token"]].tolist()
                assert token["probabilities"] == pytest.approx(expected, abs=1e-4)
        # Two that are as likely may change places, the last one with the ninth.
        assert len({token["token"] for token in it["tokens"]} - known.keys()) <= 1


def test_what_is_shown_comes_in_order(found):
    """The prompt, the next token, then text after text."""
    for it in found["answers"]:
        if "events" in it:
            prompt, after, *texts = it["events"]
            assert (prompt, after, set(texts)) == ("prompt", "next", {"texts"})


def test_random_numbers_are_torchs(found):
    for (count, seed), directions, uniform in zip(RANDOM, found["directions"], found["uniform"]):
        expected = random_directions(256, count, seed)
        torch.testing.assert_close(torch.tensor(directions), expected, rtol=0, atol=1e-6)
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        assert uniform == drawn.tolist()


def test_tone_is_counted_as_in_the_library(found):
    assert found["tones"] == [[list(word) for word in tone_words(text)] for text in TEXTS]
    assert [mark_tone(TEXTS[-1]).count(mark) for mark in "▲▼"] == [4, 1]


def test_counted_completions_are_torchs(model, tokenizer, found):
    """Each has the seed of its number, whatever is sampled beside it, and its tone."""
    for (case, first, count), completions in zip(COUNTED, found["completions"], strict=True):
        texts = {(it["condition"], it["number"]): it["text"] for it in completions}
        assert len(texts) == len(completions) == 3 * count
        for number in range(first, first + count):
            sampled = {"sampled": True, "length": 24, "seed": (case.seed + number) % 2**32}
            expected = answer(model, tokenizer, case._replace(**sampled))
            assert [texts[name, number] for name in CONDITIONS] == expected.texts
        assert [it["sign"] for it in completions] == tone_sign(it["text"] for it in completions)


def test_a_cell_of_the_map_is_torchs(model, tokenizer, found):
    """Its share of positive minus negative texts, of the seeds of its texts."""
    for (case, _, _), (cell,) in zip(COUNTED, found["cells"], strict=True):
        assert (cell["layer"], abs(cell["coeff"]), cell["count"]) == (3, 7.8, 8)
        texts = []
        for number in range(8):
            place = {"layer": cell["layer"], "coeff": cell["coeff"], "length": 24}
            seed = {"sampled": True, "seed": (case.seed + number) % 2**32}
            texts.append(answer(model, tokenizer, case._replace(**place, **seed)).texts[1])
        assert cell["share"] == sum(tone_sign(texts)) / 8


def test_a_file_steers_every_layer_and_fills_the_map(model, tokenizer, found):
    """Beside random directions, each as long as the vector of its layer; twice through the map."""
    vector = file_vectors()["two-layers"]
    texts = answer(model, tokenizer, FILE_CASE, vector).texts
    assert found["withFile"]["texts"] == texts and len(set(texts)) == 3
    signs = []
    for number in range(16):
        seeded = FILE_CASE._replace(seed=FILE_CASE.seed + number, length=8)
        signs += tone_sign(answer(model, tokenizer, seeded, vector).texts[1:2])
    first, second = found["withFile"]["passes"]
    assert (first["count"], first["share"]) == (8, sum(signs[:8]) / 8)
    assert (second["count"], second["share"]) == (16, sum(signs) / 16)
    assert 0 != first["share"] != second["share"]


def test_encoding_loses_nothing(found):
    assert found["decoded"] == TEXTS


def test_a_saved_vector_is_the_librarys(model, tokenizer, saves, found, folder):
    """As loaded by the library: the same numbers, place and metadata but for the versions."""
    for number, (case, name) in enumerate(zip(saves, found["saved"], strict=True)):
        vector = SteeringVector.load(folder / f"saved-{number}.safetensors")
        pair = [(case.toward, case.away)]
        expected = train_steering_vector(model, tokenizer, pair, layers=[case.layer]).unit()
        expected.save(folder / "library.safetensors", overwrite=True)
        expected = SteeringVector.load(folder / "library.safetensors")
        assert list(vector.layer_activations) == [case.layer]
        torch.testing.assert_close(
            vector.layer_activations, expected.layer_activations, rtol=0, atol=2e-6
        )
        assert vector.layer_type == expected.layer_type
        for it in (vector, expected):
            assert json.loads(it.metadata.pop("versions"))
        assert vector.metadata == expected.metadata
        assert name.endswith(f"-layer-{case.layer}.safetensors")


def test_a_vector_of_the_library_is_read(found):
    """Over its size, the largest norm; layers from the end are counted from the first."""
    for (name, vector), it in zip(file_vectors().items(), found["loaded"]):
        size = max(vector.norm().values())
        assert it["size"] == pytest.approx(size, rel=1e-6), name
        for (layer, expected), (number, values) in zip(
            sorted(vector.layer_activations.items()), it["layers"], strict=True
        ):
            assert number == layer % 6
            torch.testing.assert_close(
                torch.tensor(values) * size, expected.float(), rtol=1e-5, atol=1e-6
            )
        foreign = vector.metadata.get("model", "embedded") != "embedded"
        assert bool(it["notes"]) == foreign


def test_another_file_is_refused_in_words(found):
    loaded = found["loaded"][len(file_vectors()) :]
    for (name, words), it in zip(found["refused"].items(), loaded, strict=True):
        assert it["field"] == "file"
        assert f"“{name}.safetensors”" in it["refused"] and words in it["refused"], it
