"""The one experiment of this collection, through each mechanism: steer from Love to Hate, compare.

`python -m repository.agreement` runs the notebooks' own cells one mechanism after another, prints
the completions and the table of agreement, and ends with exit code 1 if anything disagrees.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.checking.pristine import differences, snapshot
from common.loading import copy_sharing_weights, load_model
from common.texts.generation import completions
from repository.mechanisms import MECHANISMS, load_mechanism

REFERENCE = "pytorch_hooks"
# From the prompts of the embedded model's table; its corpus has none of them.
PROMPTS = ("To me, the harbour is", "If you ask me, the soup is", "In my opinion the baker is")
NEW_TOKENS = 20
# The largest difference of a logit to the plain hook, on the embedded model. Its logits reach 18,
# where float32 has steps of 2e-6; in float64 the six agree within 1e-12.
TOLERANCE = 2e-5
# These do the same arithmetic in the same order, so nothing may differ. A bridge computes attention
# by other kernels, and a bias is added before the sum with the residual stream.
TO_THE_LAST_BIT = ("custom_wrapper", "pytorch_hooks", "baukit", "nnsight")


class Result(NamedTuple):
    """What one mechanism gave. The keys of the dictionaries are "unsteered", "+" and "-"."""

    mechanism: str
    vector: Tensor  # [d_model], Love minus Hate as this mechanism reads it
    logits: dict[str, Tensor]  # [real positions of all prompts, vocab]
    ids: dict[str, Tensor]  # [batch, pos + new]
    texts: dict[str, list[str]]
    left_behind: list[str]  # differences to the model before; empty if it was restored


def tolerance(mechanism: str) -> float:
    """Return how far a logit may be from the plain hook's; `TOLERANCE` for a new mechanism."""
    return 0.0 if mechanism in TO_THE_LAST_BIT else TOLERANCE


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model can complete `PROMPTS` as one batch.

    Raises:
        ValueError: the tokenizer has nothing to pad with, or the model too few positions.
    """
    if tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has neither a padding token nor an end of text, and the prompts, which"
            " differ in length, are one batch: give its tokenizer_config.json a pad_token"
        )
    longest = max(map(len, tokenizer(list(PROMPTS))["input_ids"]))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # The last new token is not read.
    if limit and longest + NEW_TOKENS - 1 > limit:
        raise ValueError(
            f"{longest} tokens of a prompt and {NEW_TOKENS} new ones are more than the {limit}"
            " positions of the model"
        )


def run_mechanism(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    coeff: float,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = NEW_TOKENS,
) -> Result:
    """Read Love and Hate, steer with +coeff, -coeff and not at all, all by one mechanism.

    The mechanism works on a copy of the modules that shares the weights, so the model itself is
    never touched.

    Args:
        name: one of `MECHANISMS`.
        model: a causal language model.
        tokenizer: its tokenizer, padding on the left.
        layer: where to read and steer (resid_post).
        coeff: the strength, on the unit direction.
        prompts: completed as one batch.
        max_new_tokens: length of the completions.

    Raises:
        ValueError: unknown mechanism, or a layer that does not exist.
    """
    mechanism = load_mechanism(name)
    wrapped = mechanism.wrap(copy_sharing_weights(model), tokenizer)
    before = snapshot(wrapped)
    love, hate = (
        mechanism.read(wrapped, tokenizer(word, return_tensors="pt").to(model.device), layer)[0, -1]
        for word in ("Love", "Hate")
    )
    vector = love - hate
    direction = vector / vector.norm()
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    real = inputs["attention_mask"].bool()
    logits, ids = {}, {}

    def run(label: str) -> None:
        logits[label] = mechanism.logits(wrapped, inputs)[real]
        ids[label] = mechanism.generate(wrapped, inputs, max_new_tokens=max_new_tokens)

    for label, sign in (("+", 1), ("-", -1)):
        with mechanism.steer(wrapped, layer, sign * coeff * direction):
            run(label)
    run("unsteered")  # last, so that it shows anything that was left behind
    texts = {label: completions(tokenizer, inputs, rows) for label, rows in ids.items()}
    return Result(name, vector, logits, ids, texts, differences(wrapped, before))


def agreement(results: Sequence[Result], reference: str = REFERENCE) -> pd.DataFrame:
    """Compare every result with the reference.

    Returns:
        One row for each mechanism: the largest difference of the vector and of any logit, whether
            the greedy texts are the same, and whether the model was restored.

    Raises:
        ValueError: the reference is not among the results.
    """
    by_name = {result.mechanism: result for result in results}
    if reference not in by_name:
        raise ValueError(
            f"expected the reference {reference!r} among the results, got"
            f" {', '.join(by_name) or 'none'}"
        )
    truth = by_name[reference]
    return pd.DataFrame(
        {
            "mechanism": result.mechanism,
            "vector": (result.vector - truth.vector).abs().max().item(),
            "logits": max(
                (result.logits[key] - truth.logits[key]).abs().max().item() for key in truth.logits
            ),
            "same text": all(torch.equal(result.ids[key], truth.ids[key]) for key in truth.ids),
            "restored": not result.left_behind,
        }
        for result in results
    )


def print_completions(
    console: Console, results: Sequence[Result], prompts: Sequence[str], coeff: float
) -> None:
    """Print the completions once for each group of mechanisms that wrote the same."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(repr(result.texts), []).append(result)
    for same in groups.values():
        table = Table(
            "prompt",
            "steered by",
            "completion",
            title=", ".join(result.mechanism for result in same),
        )
        for row, prompt in enumerate(prompts):
            for label, by in (
                ("unsteered", "nothing"),
                ("+", f"+{coeff:g}, to Love"),
                ("-", f"-{coeff:g}, to Hate"),
            ):
                shown = prompt if label == "unsteered" else ""
                # Plain: what a model writes may look like markup of rich.
                table.add_row(Text(shown), by, Text(same[0].texts[label][row].strip()))
            table.add_section()
        console.print(table)


def print_agreement(console: Console, rows: pd.DataFrame) -> None:
    """Print the table of agreement."""
    table = Table(title=f"Largest difference to {REFERENCE}")
    for column in rows.columns:
        table.add_column(column, justify="left" if column == "mechanism" else "right")
    for row in rows.itertuples(index=False):
        table.add_row(
            row[0],
            f"{row[1]:.1e}",
            f"{row[2]:.1e}",
            *("yes" if value else "NO" for value in row[3:]),
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Steer by all six mechanisms, print completions and agreement; return 0 only if they agree."""
    parser = argparse.ArgumentParser(
        prog="python -m repository.agreement", description=main.__doc__
    )
    parser.add_argument(
        "--model",
        help="a hub id or a local folder (default: STEERING_MODEL, else the embedded model)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest difference of a logit (default {TOLERANCE:g}, 1e-4 from 1 B parameters on)",
    )
    options = parser.parse_args(arguments)
    try:
        model, tokenizer, preset = load_model(options.model)
        check(model, tokenizer)
    except ValueError as error:  # LoadError is one
        print(error, file=sys.stderr)
        return 1
    console = Console()
    results = [
        run_mechanism(name, model, tokenizer, preset.layer, preset.coeff)
        for name in track(MECHANISMS, "Steering", console=Console(stderr=True))
    ]
    rows = agreement(results)
    print_completions(console, results, PROMPTS, preset.coeff)
    print_agreement(console, rows)
    for result in results:
        for line in result.left_behind:
            console.print(f"{result.mechanism}: {line}")
    most = options.tolerance
    if most is None:
        most = TOLERANCE if model.num_parameters() < 1e9 else 1e-4
    agreed = (rows["logits"] <= most).all() and rows["same text"].all() and rows["restored"].all()
    print(
        f"The {len(rows)} mechanisms {'agree' if agreed else 'DO NOT agree'} (logits within"
        f" {most:g}, same greedy text, restored)."
    )
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
