"""The matrix of abilities is what the trials give, and the trials can fail."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks import ability_matrix
from benchmarks.abilities import attempt, run_trial
from benchmarks.ability_matrix import (
    NOT_MEASURED,
    OUTCOMES,
    abilities,
    load_matrix,
    matrix_table,
    plot_matrix,
    print_limits,
)
from benchmarks.ability_subject import Silently, Subject, embedded_model, expect
from benchmarks.ability_trials import TRIALS
from repository.mechanisms import MECHANISMS, load_mechanism

# Six processes each, which wait for `make scale`: `tests/scaling` has laws of split models, and
# bias_editing runs what it saved in a fresh process.
SLOW = {"saved, run in a fresh process", "two processes (tensor parallel)"}
ELSEWHERE = SLOW | {"saved, a Llama"}  # a mechanism is loaded by name in another process


def test_matrix_is_complete():
    """A cell for each ability and measured mechanism, and a reason where it is not a plain yes."""
    cells = load_matrix()
    measured = [name for name in MECHANISMS if abilities(name) != NOT_MEASURED]
    assert len(measured) >= 6
    assert list(zip(cells["ability"], cells["mechanism"])) == [
        (ability, name) for ability in TRIALS for name in measured
    ]
    assert set(cells["outcome"]) <= set(OUTCOMES)
    assert (cells["says"].astype(bool) == (cells["outcome"] != "yes")).all()
    assert matrix_table(cells).shape == (len(TRIALS), len(MECHANISMS))


def test_reasons_are_whole():
    """No sentence breaks off, and each bracket that opens is closed."""
    for says in load_matrix()["says"]:
        assert not says.endswith(("[...]", "...")), says
        assert all(says.count(left) == says.count(right) for left, right in ("()", "[]", "{}")), (
            says
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "ability", [pytest.param(name, marks=[pytest.mark.scale] * (name in SLOW)) for name in TRIALS]
)
def test_cells_are_what_the_trials_give(ability):
    """The outcomes that are stored are those of today."""
    cells = load_matrix()
    stored = cells[cells["ability"] == ability].set_index("mechanism")["outcome"].to_dict()
    assert {name: run_trial(ability, name).outcome for name in stored} == stored


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ability", sorted(TRIALS.keys() - ELSEWHERE))
def test_a_mechanism_that_does_nothing_has_no_ability(ability):
    """It raises no error and does not steer, so every trial says no."""
    hooks = load_mechanism("pytorch_hooks")
    idle = hooks._replace(
        name="idle", steer=lambda *_: nullcontext(), intervene=lambda *_: nullcontext()
    )
    model, tokenizer, preset = (
        embedded_model()
    )  # that of the trials: what transformers hooks onto a model that others used cannot be pickled
    outcome, says = attempt(TRIALS[ability].trial, Subject(idle, model, tokenizer, preset.layer))
    assert (outcome, bool(says)) == ("silently no", True)


def test_outcomes():
    """Done is yes, another result is no; an error is told by type and first line, without paths."""

    def fails(_):
        raise RuntimeError("\nnot at /a/b.py, sorry\nand more")

    def fails_in_generated_code(_):
        raise SyntaxError("invalid syntax", ("<eval_with_key.7>", 30, 1, "x", 30, 2))

    assert attempt(fails_in_generated_code, None) == ("error", "SyntaxError: invalid syntax")
    assert attempt(lambda _: None, None) == ("yes", "")
    assert attempt(lambda _: expect(torch.ones(2), torch.zeros(2), "moved"), None) == (
        "silently no",
        "moved",
    )
    assert attempt(fails, None) == ("error", "RuntimeError: not at sorry")
    with pytest.raises(Silently, match="cut"):
        expect(torch.ones(2), torch.ones(3), "cut")
    with pytest.raises(
        ValueError, match="unknown ability 'flying': expected one of all positions, "
    ):
        run_trial("flying", "baukit")


def test_limits_are_printed_with_their_reasons(capsys):
    """How many abilities there are, and each that is missing; an unknown mechanism is refused."""
    print_limits("bias_editing")
    lines = capsys.readouterr().out.splitlines()
    missing = load_matrix().query("mechanism == 'bias_editing' and outcome != 'yes'")
    assert lines[0] == f"bias_editing: {len(TRIALS) - len(missing)} of {len(TRIALS)} abilities"
    assert all(
        any(line.split("  ")[-1].strip() == ability for line in lines)
        for ability in missing["ability"]
    )


def test_what_is_not_measured_yet_says_so(monkeypatch, capsys):
    """A seventh mechanism has a grey column and a sentence; an unknown one is refused."""
    with pytest.raises(ValueError, match="unknown mechanism 'telepathy'"):
        print_limits("telepathy")
    monkeypatch.setattr(ability_matrix, "MECHANISMS", (*MECHANISMS, "telepathy"))
    print_limits("telepathy")
    assert capsys.readouterr().out.startswith("telepathy: not measured yet")
    assert abilities("telepathy") == NOT_MEASURED and abilities("baukit").endswith(" of 26")
    cells = load_matrix()
    assert set(matrix_table(cells)["telepathy"]) == {NOT_MEASURED}
    words = [text.get_text() for text in plot_matrix(cells).axes[0].texts]
    grey = {*MECHANISMS, "telepathy"} - set(cells["mechanism"])
    assert words.count(NOT_MEASURED) == len(TRIALS) * len(grey)


def test_picture_shows_every_cell():
    """As many words in the picture as there are cells."""
    words = [text.get_text() for text in plot_matrix(load_matrix()).axes[0].texts]
    assert sorted(words) == sorted(matrix_table(load_matrix()).to_numpy().ravel())
