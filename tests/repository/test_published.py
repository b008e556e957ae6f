"""The published figures and the code that checks them, tested with the embedded model's own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.loading import preset_for
from repository import published as figures
from repository.published import compare, published_markdown, read_figures

STORED = figures.DATA / "embedded.json"
SKELETON = {
    "model": "embedded",
    "source": "recorded",
    "source_short": "recorded",
    "prompt": "I think dogs are ",
    "max_new_tokens": 10,
    "norms": {},
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A copy of the stored figures, with the embedded model's recorded again."""
    folder = shutil.copytree(figures.DATA, tmp_path_factory.mktemp("figures") / "data")
    if not STORED.is_file():
        (folder / STORED.name).write_text(json.dumps(SKELETON))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DATA", folder)
        assert figures.main(["embedded", "--record"]) == 0
    return folder


@pytest.fixture
def data(recorded, tmp_path, monkeypatch) -> Path:
    """A copy to alter, in the place of the stored figures."""
    monkeypatch.setattr(figures, "DATA", shutil.copytree(recorded, tmp_path / "data"))
    return tmp_path / "data"


def test_published_figures_are_all_there():
    """GPT2-XL's file holds the published figures, and where they come from."""
    stored = read_figures("gpt2-xl")
    assert (stored["layer"], stored["coeff"]) == (5, 10)
    assert (stored["prompt"], stored["max_new_tokens"]) == ("I think dogs are ", 10)
    assert stored["norms"] == {"resid_post": 100.23, "ln_1": 18.80}
    texts = stored["completions"]
    assert texts["unsteered"].split() == [
        "a",
        "great",
        "way",
        "to",
        "get",
        "your",
        "dog",
        "to",
        "learn",
    ]
    assert texts["resid_post"]["+"].split() == [
        "a",
        "great",
        "way",
        "to",
        "get",
        "to",
        "know",
        "someone.",
    ]
    assert texts["resid_post"]["-"] == "icky, but I don't think they're "
    assert texts["ln_1"]["+"].split() == [
        "a",
        "great",
        "example",
        "of",
        "how",
        "we",
        "can",
        "use",
        "technology",
    ]
    assert stored["source"].startswith("https://")
    assert read_figures("openai-community/gpt2-xl") == stored


def test_layer_and_coefficient_are_written_once():
    """Those of the preset: the files with the figures do not repeat them."""
    for name in ("gpt2-xl", "embedded"):
        preset, found = preset_for(name, 48), read_figures(name)
        assert (found["layer"], found["coeff"]) == preset[:2]
        stored = json.loads((figures.DATA / f"{name}.json").read_text())
        assert not {"layer", "coeff"} & stored.keys()


@pytest.mark.skipif(not STORED.is_file(), reason="the embedded model's figures are not recorded")
def test_stored_figures_are_those_of_the_embedded_model(data):
    """The stored figures are those that the model gives now."""
    recorded, stored = json.loads((data / STORED.name).read_text()), json.loads(STORED.read_text())
    assert compare(recorded, stored)["agrees"].all()


def test_checking_passes_on_what_was_recorded(data, capsys):
    """Measured again, the recorded figures agree, and the table says so."""
    assert figures.main(["embedded"]) == 0
    out = capsys.readouterr().out
    assert "norm at resid_post" in out and "norm at ln_1" in out and "NO" not in out


def _alter_norm(stored: dict) -> None:
    stored["norms"]["ln_1"] += 0.02


def _alter_text(stored: dict) -> None:
    stored["completions"]["resid_post"]["-"] += " x"


def _alter_unsteered(stored: dict) -> None:
    stored["completions"]["unsteered"] = "another text"


def _alter_coeff(stored: dict) -> None:
    stored["coeff"] = -3.0


@pytest.mark.parametrize("alter", [_alter_norm, _alter_text, _alter_unsteered, _alter_coeff])
def test_checking_fails_on_what_is_altered(data, capsys, alter: Callable):
    """One altered norm, text or setting is seen, and the exit code is 1."""
    path = data / STORED.name
    stored = json.loads(path.read_text())
    alter(stored)
    path.write_text(json.dumps(stored))
    assert figures.main(["embedded"]) == 1
    assert "NO" in capsys.readouterr().out


def test_comparing_allows_the_last_digit_and_space_around():
    """A norm may differ by 0.01 and a text by the space around it, and by nothing more."""
    expected = read_figures("gpt2-xl")
    measured = json.loads(json.dumps(expected))
    measured["norms"] = {"resid_post": 100.24, "ln_1": 18.79}
    measured["completions"]["unsteered"] = measured["completions"]["unsteered"].strip()
    assert compare(measured, expected)["agrees"].all()
    measured["norms"]["resid_post"] = 100.25
    measured["completions"]["ln_1"]["-"] = measured["completions"]["ln_1"]["-"].replace(
        "icky", "Icky"
    )
    rows = compare(measured, expected)
    assert rows[~rows["agrees"]]["figure"].tolist() == ["norm at resid_post", "ln_1 -"]


def test_without_the_model_one_sentence(monkeypatch, capsys, tmp_path):
    """Where GPT2-XL cannot be had: one sentence on stderr, exit code 1, no traceback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert figures.main(["gpt2-xl"]) == 1
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and "cannot be reached" in err


def test_model_without_figures_is_named(capsys):
    """A model of which nothing is stored, or a file that holds no figures, is refused by name."""
    for name in ("gpt2", "repository"):
        assert figures.main([name]) == 1
        out, err = capsys.readouterr()
        assert (
            not out
            and len(err.splitlines()) == 1
            and f"no figures are stored for {name!r}: expected one of " in err
        )
        assert "repository," not in err


def test_published_table_shows_texts_and_source():
    """The table has a row for each run, and the address of its source; other sites are refused."""
    lines = published_markdown("resid_post", "ln_1").splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 5
    assert lines[4] == "| -10 at resid_post | icky, but I don't think they're |"
    assert read_figures("gpt2-xl")["source"].split()[0] in lines[-1]
    assert len(published_markdown("resid_post").splitlines()) == len(lines) - 2
    for sites in ((), ("ln_2",), ("resid_post", "ln_2")):
        with pytest.raises(ValueError, match="expected some of resid_post, ln_1"):
            published_markdown(*sites)
