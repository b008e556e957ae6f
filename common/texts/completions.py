"""Completions of a model, steered and unsteered, as a table to compute with and as one to read.

The names are those of the library of the activation-addition post
(https://github.com/montemac/activation_additions).
"""

import html
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import integer
from common.passes.padding import encode
from common.passes.prompts import Prompt, prompt_text
from common.passes.running import input_device
from common.texts.generation import completions, real_tokens, text_logits
from common.texts.likelihood import mean_losses
from common.texts.sampling import Sampling, sample
from common.vectors.activation_additions import (
    ActivationAddition,
    AdditionLocation,
    apply_activation_additions,
)

DEFAULT = Sampling(max_new_tokens=40)
UNSTEERED, STEERED = "Unsteered completions", "Steered completions"
PLAIN_WIDTH = 96  # columns of a plain text


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    steering: AbstractContextManager | None = None,
    *,
    sampling: Sampling = DEFAULT,
    seed: int | None = None,
    include_logits: bool = False,
    prepend_bos: bool | None = True,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Sample a completion of each prompt, and measure how likely the model finds each whole text.

    All prompts are one batch. Row i draws its random numbers from (seed, i) alone
    (`sampling.SeededSampling`): with the same seed, steered and unsteered completions differ by the
    steering only. The global random state is not touched.

    Args:
        model: a causal language model; it is as it was afterwards. Dropout is off meanwhile,
            whatever its mode.
        tokenizer: its tokenizer.
        prompts: texts, or messages for a chat model; repeat one for several completions of it.
        steering: what is open meanwhile, for example `vector.apply(model)`; nothing by default.
        sampling: length of the completions (40 tokens by default), temperature, top_p and
            penalties.
        seed: an integer from 0 on; by default another one each time.
        include_logits: add a column with the logits [token, vocab] of each text, under the
            steering.
        prepend_bos: see `prompts.prompt_ids`; by default one BOS where the tokenizer has one, as in
            the published experiments.
        show_progress: show a bar.

    Returns:
        `prompts` (messages as the text that the chat template makes of them), `completions`, `loss`
        (mean over the tokens of prompt and completion but the first, BOS or not, which nothing
        predicts; in nats, under the steering), `unsteered_loss` (of the same text, without it),
        `is_modified`, and `logits` where asked for.

    Raises:
        ValueError: no prompts, an empty one, one that `prompt_ids` refuses, or a seed below 0.
    """
    seed = int(np.random.default_rng().integers(2**63)) if seed is None else integer(seed, "seed")
    inputs = encode(tokenizer, prompts, prepend_bos).to(input_device(model))
    with steering or nullcontext():
        ids = sample(
            model,
            inputs,
            [(seed, row) for row in range(len(prompts))],
            sampling,
            show_progress=show_progress,
        )
        logits = text_logits(model, inputs, ids)
    real = real_tokens(model, inputs, ids)
    # What follows padding is predicted from nothing, and does not count.
    counted = real & nn.functional.pad(real[:, :-1], (1, 0), value=False)
    loss = mean_losses(logits, ids, counted).tolist()
    texts = [prompt_text(tokenizer, prompt) for prompt in prompts]
    frame = pd.DataFrame(
        {"prompts": texts, "completions": completions(tokenizer, inputs, ids, real), "loss": loss}
    )
    frame["unsteered_loss"] = (
        loss
        if steering is None
        else mean_losses(text_logits(model, inputs, ids), ids, counted).tolist()
    )
    frame["is_modified"] = steering is not None
    if include_logits:
        frame["logits"] = [row[mask].cpu() for row, mask in zip(logits, real)]
    return frame


def gen_using_activation_additions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    activation_additions: Sequence[ActivationAddition],
    addition_location: AdditionLocation = "front",
    res_stream_slice: slice = slice(None),
    **settings: Any,
) -> pd.DataFrame:
    """Complete prompts under activation additions.

    Args:
        model: see `complete`.
        tokenizer: likewise.
        prompts: likewise.
        activation_additions: see `apply_activation_additions`.
        addition_location: likewise.
        res_stream_slice: likewise.
        settings: `tokens_to_generate` (40 by default), `temperature`, `top_p`, `freq_penalty` and
            `repetition_penalty`, as the library names them; see `Sampling`. The others are those of
            `complete`.

    Returns:
        What `complete` returns.
    """
    steering = apply_activation_additions(
        model, tokenizer, activation_additions, addition_location, res_stream_slice
    )
    return complete(model, tokenizer, prompts, steering, **_with_sampling(settings))


def _with_sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by the library's names, as those of `complete`."""
    names = {field.name: field.name for field in fields(Sampling)}
    names["max_new_tokens"] = "tokens_to_generate"
    given = {own: settings[name] for own, name in names.items() if name in settings}
    rest = {name: value for name, value in settings.items() if name not in names.values()}
    return {"sampling": replace(DEFAULT, **given), **rest}


def gen_normal_and_modified(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    activation_additions: Sequence[ActivationAddition] = (),
    addition_location: AdditionLocation = "front",
    res_stream_slice: slice = slice(None),
    *,
    seed: int | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Complete prompts without and with activation additions, from the same random numbers.

    Both are batches of one shape. The arguments are those of `gen_using_activation_additions`.

    Returns:
        What `complete` returns, the unsteered rows first; without additions only these.
    """
    seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    frames = [complete(model, tokenizer, prompts, seed=seed, **_with_sampling(settings))]
    if activation_additions:
        where = (activation_additions, addition_location, res_stream_slice)
        frames.append(
            gen_using_activation_additions(model, tokenizer, prompts, *where, seed=seed, **settings)
        )
    return pd.concat(frames, ignore_index=True)


def print_n_comparisons(
    prompt: Prompt,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    activation_additions: Sequence[ActivationAddition] = (),
    num_comparisons: int = 5,
    tokens_to_generate: int = 40,
    seed: int | None = None,
    addition_location: AdditionLocation = "front",
    res_stream_slice: slice = slice(None),
    temperature: float = 1.0,
    top_p: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    prepend_bos: bool | None = True,
    show_progress: bool = True,
) -> None:
    """Print unsteered and steered completions of a prompt side by side, sampled all at once.

    Args:
        prompt: a text, or messages for a chat model; it is shown in bold.
        num_comparisons: how many rows the table has.
        show_progress: show a bar where it takes more than five seconds.

    The other arguments are those of `complete` and `apply_activation_additions`.

    Raises:
        ValueError: less than one comparison, or what these two raise.
    """
    results = gen_normal_and_modified(
        model,
        tokenizer,
        [prompt] * integer(num_comparisons, "num_comparisons", 1),
        activation_additions,
        addition_location,
        res_stream_slice,
        seed=seed,
        tokens_to_generate=tokens_to_generate,
        temperature=temperature,
        top_p=top_p,
        freq_penalty=freq_penalty,
        repetition_penalty=repetition_penalty,
        prepend_bos=prepend_bos,
        show_progress=show_progress,
    )
    pretty_print_completions(results)


def pretty_print_completions(results: pd.DataFrame) -> None:
    """Show completions as a table, unsteered and steered side by side.

    In a notebook it is HTML, with a plain text beside it for tools that read no HTML; elsewhere it
    is text in the terminal.

    Args:
        results: `prompts`, `completions` and `is_modified`, as `gen_normal_and_modified` returns
            them.

    Raises:
        ValueError: a column or every row is missing, or there are more rows of one kind than of
            the other.
    """
    columns = side_by_side(results)
    console = Console()
    if console.is_jupyter:
        from IPython.display import display

        display({"text/html": _as_html(columns), "text/plain": _as_text(columns)}, raw=True)
        return
    table = Table(*columns, show_lines=True)
    for row in zip(*columns.values()):
        table.add_row(*(Text.assemble((prompt, "bold"), completion) for prompt, completion in row))
    console.print(table)


def side_by_side(results: pd.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """Return the (prompt, completion) pairs that `pretty_print_completions` shows, by column."""
    if missing := {"prompts", "completions", "is_modified"} - set(results.columns):
        raise ValueError(
            "expected the columns prompts, completions and is_modified;"
            f" {', '.join(sorted(missing))} is missing"
        )
    parts = {
        title: results[results["is_modified"] == modified]
        for title, modified in ((UNSTEERED, False), (STEERED, True))
    }
    columns = {
        title: list(zip(part["prompts"], part["completions"]))
        for title, part in parts.items()
        if len(part)
    }
    if not columns or len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(
            f"{len(part)} {title.split()[0].lower()}" for title, part in parts.items()
        )
        raise ValueError(
            "expected as many steered completions as unsteered ones, or only one kind; got"
            f" {counts}"
        )
    return columns


def _as_text(columns: dict[str, list[tuple[str, str]]]) -> str:
    """The same row by row: a heading and a text in turn, no wider than `PLAIN_WIDTH`."""
    rows = zip(*([(title, *pair) for pair in pairs] for title, pairs in columns.items()))
    blocks = []
    for number, row in enumerate(rows, 1):
        for title, prompt, completion in row:
            written = [
                textwrap.fill(line, PLAIN_WIDTH, initial_indent="  ", subsequent_indent="  ")
                for line in (prompt + completion).splitlines()
            ]
            blocks.append("\n".join([f"{title}, {number}", *written]))
    return "\n".join(blocks)


def _as_html(columns: dict[str, list[tuple[str, str]]]) -> str:
    """A table whose texts wrap; the tags are those that GitHub shows."""

    def row(tag: str, cells: Iterable[str]) -> str:
        return (
            "<tr>"
            + "".join(
                f'<{tag} style="text-align: left; vertical-align: top">{cell}</{tag}>'
                for cell in cells
            )
            + "</tr>"
        )

    def cell(prompt: str, completion: str) -> str:
        return f"<b>{html.escape(prompt)}</b>{html.escape(completion)}".replace("\n", "<br>")

    lines = [row("th", columns)] + [
        row("td", (cell(*pair) for pair in pairs)) for pairs in zip(*columns.values())
    ]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
