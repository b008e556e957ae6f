"""The commands refuse at once what would fail after the hour of work, and spoil no file."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from common.embedded import FOLDER
from embedded_model import card, choose, evaluate, report, train


def command(module, monkeypatch, *arguments: object) -> None:
    """Run a command of the recipe."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a command that must be refused before it loads or trains anything; return why."""

    def work(*_):
        raise AssertionError("work began")

    for module, name in ((train, "train"), (evaluate, "load_model"), (choose, "load_model")):
        monkeypatch.setattr(module, name, work)

    def run(module, *arguments: object) -> str:
        with pytest.raises(SystemExit):
            command(module, monkeypatch, *arguments)
        return capsys.readouterr().err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def measured(tmp_path) -> Path:
    """A folder with a model, its preset and its evaluation."""
    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__*"))
    shutil.copy(card.HERE / "evaluation.json", folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_training_replaces_no_file_of_another_model(refused, tmp_path, name: str):
    """A sharded or half-written model is one too, though it has no model.safetensors."""
    (tmp_path / name).write_text("mine")
    assert "--force" in refused(train, "--out", tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


def test_training_refuses_what_would_fail_at_its_end(refused, tmp_path):
    """A place that cannot be written into, and a number of steps that trains nothing."""
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        assert str(tmp_path / place) in refused(train, "--out", tmp_path / place)
    for steps in (0, -1):
        assert "--steps" in refused(train, "--out", tmp_path / "new", "--steps", steps)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("module", "arguments", "lacks", "made_by"),
    [
        (choose, [], "model.safetensors", "train"),
        (choose, ["--keep"], "preset.json", "choose"),
        (evaluate, [], "model.safetensors", "train"),
        (evaluate, [], "training.json", "train"),
        (evaluate, [], "preset.json", "choose"),
    ],
)
def test_a_half_written_model_is_refused(refused, measured, module, arguments, lacks, made_by):
    """The message names the file, and the command that writes it."""
    (measured / lacks).unlink()
    said = refused(module, "--model", measured, *arguments)
    assert f"{measured} has no {lacks}: embedded_model.{made_by} writes it" in said


def test_a_preset_of_other_weights_is_refused(refused, measured):
    """After a new training the place has to be chosen anew before it is measured."""
    preset = json.loads((measured / "preset.json").read_text())
    (measured / "preset.json").write_text(json.dumps(preset | {"sha256": "0"}))
    assert "embedded_model.choose" in refused(evaluate, "--model", measured)


@pytest.mark.parametrize("place", ["missing/figures.json", "."])
def test_figures_that_could_not_be_written_are_not_measured(refused, measured, tmp_path, place):
    said = refused(evaluate, "--model", measured, "--out", tmp_path / place)
    assert str(tmp_path / place) in said


def test_a_readme_without_markers_is_left_alone(measured, monkeypatch, tmp_path, capsys):
    """It is not a card of this recipe; the figures are stored and printed all the same."""
    (measured / "README.md").write_text("mine")
    stored = json.loads((measured / "evaluation.json").read_text())
    (measured / "evaluation.json").unlink()
    monkeypatch.setattr(evaluate, "measure", lambda _: stored)
    command(evaluate, monkeypatch, "--model", measured)
    assert capsys.readouterr().out.strip() == report.markdown(stored).strip()
    assert json.loads((measured / "evaluation.json").read_text()) == stored
    assert (measured / "README.md").read_text() == "mine"


def test_figures_that_cannot_be_stored_are_printed(measured, monkeypatch, capsys):
    """A full disk after an hour of work takes none of it away."""
    stored = json.loads((measured / "evaluation.json").read_text())

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(evaluate, "measure", lambda _: stored)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        command(evaluate, monkeypatch, "--model", measured)
    assert capsys.readouterr().out.strip() == report.markdown(stored).strip()


@pytest.fixture
def own_card(monkeypatch, tmp_path) -> Path:
    """A folder that stands for that of the card, so that a comparison spoils no real one."""
    here = tmp_path / "card"
    here.mkdir()
    (here / "README.md").write_text("<!-- seeds -->\nold\n<!-- /seeds -->\n")
    monkeypatch.setattr(card, "HERE", here)
    return here


def test_only_different_models_that_were_measured_are_compared(refused, measured, own_card):
    """Anything else leaves the card as it is, and the message names the folder."""
    other = measured.with_name("other")
    shutil.copytree(measured, other)
    before = contents(own_card)
    assert "two" in refused(evaluate, "--compare", measured)
    assert "two" in refused(evaluate, "--compare", measured, measured.parent / "." / "model")
    (other / "evaluation.json").unlink()
    said = refused(evaluate, "--compare", measured, other)
    assert f"{other} has no evaluation.json: embedded_model.evaluate writes it" in said
    for old in ('{"table": {}}', '{"table"', "[]"):
        (other / "evaluation.json").write_text(old)
        assert str(other / "evaluation.json") in refused(evaluate, "--compare", measured, other)
    assert contents(own_card) == before


def test_figures_of_different_tables_are_not_set_side_by_side(refused, measured, own_card):
    """Twenty directions move less far than forty, and a row has one name."""
    other = measured.with_name("other")
    shutil.copytree(measured, other)
    stored = json.loads((other / "evaluation.json").read_text())
    stored["random_moves"] = stored["random_moves"][:20]
    (other / "evaluation.json").write_text(json.dumps(stored))
    assert "20 random directions" in refused(evaluate, "--compare", measured, other)
    assert contents(own_card).keys() == {"README.md"}


def test_a_comparison_is_printed_and_stored(measured, own_card, monkeypatch, capsys):
    other = measured.with_name("other")
    shutil.copytree(measured, other)
    command(evaluate, monkeypatch, "--compare", measured, other)
    stored = json.loads((measured / "evaluation.json").read_text())
    table = report.comparison([stored, stored])
    assert capsys.readouterr().out.strip() == table.strip()
    assert (own_card / "README.md").read_text() == f"<!-- seeds -->\n{table}<!-- /seeds -->\n"
    assert json.loads((own_card / "seeds.json").read_text()) == [stored, stored]
