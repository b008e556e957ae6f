"""What each mechanism can do beyond steering every position: a matrix of trials that were run.

    python -m benchmarks.abilities

runs all trials on the embedded model, prints the matrix and writes `results/abilities.json` and
`results/abilities.png`. The tests run the same trials and compare them with the file.
"""

import json
import re
import textwrap
import warnings
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

import pandas as pd
import torch
from rich.progress import track

from benchmarks.ability_matrix import RESULTS, load_matrix, matrix_table, plot_matrix, print_limits
from benchmarks.ability_subject import Elsewhere, Silently, Subject, embedded_subject
from benchmarks.ability_trials import TRIALS
from benchmarks.stored import machine
from repository.mechanisms import MECHANISMS

LONGEST = 300  # characters of an error


class Cell(NamedTuple):
    """What one trial of one mechanism gave: one of `ability_matrix.OUTCOMES`, and why."""

    mechanism: str
    ability: str
    outcome: str
    says: str


def attempt(trial: Callable[[Subject], None], subject: Subject) -> tuple[str, str]:
    """Run a trial and return "yes", "silently no" or "error", with what happened instead."""
    torch.manual_seed(0)
    try:
        trial(subject)
    except Silently as failure:
        return "silently no", str(failure)
    except Exception as error:  # whatever a library raises: that is the result
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        line = re.sub(r" ?\(<eval_[^)]*\)", "", line)  # a place in code that was generated
        line = re.sub(r" ?\(?/\S+", "", line)  # paths of this machine
        line = re.sub(r"\[\{.*\}\]", "[...]", line)  # a list of every weight
        return "error", textwrap.shorten(
            line if isinstance(error, Elsewhere) else f"{type(error).__name__}: {line}", LONGEST
        )
    return "yes", ""


def run_trial(ability: str, mechanism: str) -> Cell:
    """Try one ability of one mechanism, first with the notebook's functions, then with help.

    Raises:
        ValueError: an unknown ability.
    """
    if ability not in TRIALS:
        raise ValueError(f"unknown ability {ability!r}: expected one of {', '.join(TRIALS)}")
    entry = TRIALS[ability]
    outcome, says = attempt(entry.trial, embedded_subject(mechanism))
    if outcome != "yes" and (helped := entry.helps.get(mechanism)):
        also, why = attempt(helped, embedded_subject(mechanism))
        if also == "yes":
            return Cell(
                mechanism, ability, "few lines", f"{helped.__doc__.rstrip('.')} (otherwise: {says})"
            )
        return Cell(mechanism, ability, outcome, f"{says} (and with help: {why})")
    return Cell(mechanism, ability, outcome, says)


def main() -> None:
    """Run the command."""
    warnings.simplefilter("ignore")  # what libraries warn of belongs to the trials
    todo = [(ability, mechanism) for ability in TRIALS for mechanism in MECHANISMS]
    cells = pd.DataFrame([run_trial(*each) for each in track(todo, "Trials")])
    print(matrix_table(cells).to_string())
    for mechanism in MECHANISMS:
        print()
        print_limits(mechanism, cells)
    found = {
        "measured": date.today().isoformat(),
        "machine": machine("transformer-lens", "nnsight", "accelerate"),
        "cells": cells.to_dict("records"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "abilities.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot_matrix(load_matrix()).savefig(RESULTS / "abilities.png", dpi=120)
    print("written to benchmarks/results/abilities.json and abilities.png")


if __name__ == "__main__":
    main()
