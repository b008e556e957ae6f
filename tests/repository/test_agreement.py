"""The table of agreement, from results that are made up; and what the notebooks say of it."""

import io
import json
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

import repository.agreement
from common.loading import load_model
from embedded_model.prompts import TABLE_PROMPTS
from repository.agreement import (
    NEW_TOKENS,
    PROMPTS,
    REFERENCE,
    TO_THE_LAST_BIT,
    Result,
    agreement,
    check,
    print_completions,
    run_mechanism,
    tolerance,
)
from repository.mechanisms import MECHANISMS
from repository.shared import FOLDER

LABELS = ("unsteered", "+", "-")


def result(name: str, vector=0.0, logit=0.0, token=0, left_behind=()) -> Result:
    """A result; the numbers are added to what steering the other way gave."""
    logits = {label: torch.zeros(2, 3) for label in LABELS}
    ids = {label: torch.zeros(1, 4, dtype=torch.long) for label in LABELS}
    logits["-"][1, 2] += logit
    ids["-"][0, 3] += token
    texts = {label: [""] * len(PROMPTS) for label in LABELS}
    return Result(name, torch.tensor([0.0, vector]), logits, ids, texts, list(left_behind))


def test_each_kind_of_disagreement_is_in_its_column():
    """Differences count in both directions, at any label."""
    table = agreement(
        [
            result(REFERENCE),
            result("vector", vector=-0.5),
            result("logits", logit=-2.0),
            result("text", token=1),
            result("restored", left_behind=["a hook"]),
        ]
    ).set_index("mechanism")
    good = {"vector": 0.0, "logits": 0.0, "same text": True, "restored": True}
    found = {"vector": 0.5, "logits": 2.0, "text": False, "restored": False}
    assert table.loc[REFERENCE].to_dict() == good
    for name, value in found.items():
        column = "same text" if name == "text" else name
        assert table.loc[name].to_dict() == good | {column: value}
    with pytest.raises(ValueError, match="expected the reference 'other' among the results"):
        agreement([result(REFERENCE)], "other")


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_notebooks_ask_for_what_is_asked_here(name):
    """To the last bit in both places, or in neither."""
    said = tomllib.loads((FOLDER / "differences.toml").read_text(encoding="utf-8"))
    exact = (said["default"] | said[name])["tolerance"] == "0"
    assert exact == (name in TO_THE_LAST_BIT) == (tolerance(name) == 0)


def test_a_tolerance_of_zero_is_meant(monkeypatch):
    """`--tolerance 0` asks for equality to the last bit; it is not the default."""
    rows = [result(name, logit=1e-9 * (name != REFERENCE)) for name in MECHANISMS]
    found = iter(rows * 2)
    monkeypatch.setattr(repository.agreement, "run_mechanism", lambda *args: next(found))
    assert repository.agreement.main(["--model", "embedded"]) == 0
    assert repository.agreement.main(["--model", "embedded", "--tolerance", "0"]) == 1


def test_completions_are_printed_as_they_are():
    """What looks like markup of rich is text: it neither vanishes nor fails."""
    odd = "[red] and [/b]"
    one = result(REFERENCE)._replace(texts={label: [odd] for label in LABELS})
    console = Console(file=io.StringIO(), record=True, width=100)
    print_completions(console, [one], [odd], 1.0)
    assert console.export_text().count(odd) == 1 + len(LABELS)


def test_the_prompts_are_held_out():
    """What the notebooks show is nothing that the embedded model has read."""
    assert {*PROMPTS} < {*TABLE_PROMPTS}


@pytest.mark.parametrize("wrong", [{"token": 1}, {"left_behind": ["a hook"]}, {"logit": 1.0}])
def test_one_that_differs_is_enough(wrong, monkeypatch):
    """In the text, in what it leaves behind or in its logits: the command fails."""
    found = iter([result(name, **(wrong if name == MECHANISMS[-1] else {})) for name in MECHANISMS])
    monkeypatch.setattr(repository.agreement, "run_mechanism", lambda *args: next(found))
    assert repository.agreement.main(["--model", "embedded"]) == 1


def shrunk(folder: Path, tokenizer, positions: int, **settings: object) -> Path:
    """Write a tiny GPT-2 of random weights with so many positions, and settings of a tokenizer."""
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": len(tokenizer), **ends}
    GPT2LMHeadModel(GPT2Config(n_positions=positions, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    stored = {**json.loads(path.read_text(encoding="utf-8")), **settings}
    path.write_text(json.dumps(stored), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("positions", "settings", "said"),
    [
        (64, {"pad_token": None, "eos_token": None, "bos_token": None}, "neither a padding token"),
        (-1, {}, "tokens of a prompt and 20 new ones are more than the"),
    ],
)
def test_a_model_that_cannot_complete_the_prompts_is_refused(
    tmp_path, tokenizer, capsys, monkeypatch, positions, settings, said
):
    """In one line, before any mechanism runs; `positions` below 0 are so many too few."""
    if positions < 0:
        positions += max(map(len, tokenizer(list(PROMPTS))["input_ids"])) + NEW_TOKENS - 1
    monkeypatch.setattr(repository.agreement, "run_mechanism", lambda *_: pytest.fail("it ran"))
    folder = shrunk(tmp_path / "model", tokenizer, positions, **settings)
    capsys.readouterr()
    assert repository.agreement.main(["--model", str(folder)]) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_as_many_positions_as_are_read_are_enough(tmp_path, tokenizer):
    """The hook completes the prompts where one position fewer is refused."""
    longest = max(map(len, tokenizer(list(PROMPTS))["input_ids"]))
    folder = shrunk(tmp_path / "model", tokenizer, longest + NEW_TOKENS - 1)
    model, spelling, _ = load_model(str(folder))
    check(model, spelling)
    found = run_mechanism(REFERENCE, model, spelling, 1, 1.0)
    assert found.ids["+"].shape == (len(PROMPTS), longest + NEW_TOKENS)
