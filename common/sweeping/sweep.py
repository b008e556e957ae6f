"""Sweeps: what steering does over layers, coefficients and prompts, many settings in one batch.

Every (layer, coefficient, prompt) is a row of a batch and is steered by its own vector; rows are
independent, so this gives what one run for each setting gives. `sweep` writes completions,
`sweep_logits` looks at the next token only, and `sweep_perplexity` at texts; the latter two compute
the blocks below the steered one once for each prompt. What they find is judged in `effects`.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import integer
from common.identity import identity_of_metric, identity_of_model, identity_of_tokens
from common.measuring.likelihood import kl_divergence
from common.measuring.logit_metrics import LogitMetric
from common.measuring.metrics import Metric
from common.passes.hooks import check_engine, refuse_hooks
from common.passes.prompts import Prompt
from common.passes.running import evaluating, input_device
from common.progress import progress_bar
from common.scaling.units import Engine, run_units
from common.sweeping.columns import TextColumns, numbers
from common.sweeping.grid import KEYS, Cell, Grid
from common.sweeping.runs import MEMORY, Completing, Predicting, Row, Run
from common.sweeping.store import SweepStore, typed
from common.sweeping.texts import Texts
from common.tensor_parallel import is_split
from common.texts.likelihood import mean_losses
from common.texts.sampling import Sampling

GREEDY = Sampling(max_new_tokens=16, temperature=0.0)


@evaluating
def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    prompts: Sequence[Prompt],
    metrics: Mapping[str, Metric] | None = None,
    *,
    sampling: Sampling = GREEDY,
    per_prompt: int = 1,
    seed: int = 0,
    prepend_bos: bool | None = None,
    path: str | os.PathLike | None = None,
    max_memory: int = MEMORY,
    show_progress: bool = True,
    engine: Engine | None = None,
) -> pd.DataFrame:
    """Complete prompts at every point of a grid, and unsteered, and measure the completions.

    Each row is what a run of its prompt alone would give, on any architecture: which rows may share
    a batch, and whether a cache may be filled for all of them at once, is measured on the model
    first.

    Args:
        model: a causal language model, offloaded ones included; as it was afterwards and after any
            exception. Dropout is off meanwhile, whatever its mode.
        tokenizer: its tokenizer.
        grid: what steers it, at which layers, how strongly.
        prompts: texts, or messages for a chat model.
        metrics: by name, of the completions, or of prompts and completions: pipelines of
            transformers are metrics as they are, see `common.measuring.metrics`. A value is a
            number, a truth value, a text, or None.
        sampling: how the completions are drawn and how long they are; greedy by default.
        per_prompt: completions of each prompt; more than one need a temperature.
        seed: completion n of a prompt gets the same random numbers at every layer and coefficient.
        prepend_bos: see `prompt_ids`. By default what the tokenizer does by itself, as in training;
            where there are activation additions, which begin with BOS, one BOS if the tokenizer has
            one.
        path: a file (SQLite) to write to as it goes. A sweep that was stopped goes on where it was,
            and one that is finished is read from it; no completion is written twice. Metrics are
            taken anew from the completions in the file, at every call: they may be others than
            before, and one that fails costs no completion. The whole weights tell whether it is the
            same sweep, which takes 4 seconds for GPT2-XL.
        max_memory: how many bytes a batch may take, about.
        show_progress: show a bar where it takes more than five seconds.
        engine: workers that compute the rows (`RayEngine`); without it, this process. It gives the
            same rows. Metrics of completions are computed here, and only this process writes the
            file. `max_memory` decides how large the units are that go to workers, and so how many.

    Returns:
        One row for each completion: `steering`, `kind` ("steering", "control", "random" or
            "unsteered"), `layer`, `coeff`, `prompt` (of messages the text that the chat template
            makes), `sample`, `completion`, the `runner` where an engine has one, and the metrics.

    Raises:
        ValueError: before work starts: a layer that the model or a vector does not have, a prompt
            that is empty, shorter than an addition or longer than the model, a metric that does not
            give one value a text, settings that mean nothing, a model whose blocks have hooks, or a
            file of other settings. Later: a metric that gives something else than at its trial on
            the prompts.
        OSError: there is no room for the file. What was written before stays readable, and the same
            call goes on there.
        LostRowsError: with an engine, rows that killed their workers; all others are in the file.
    """
    seed, per_prompt = integer(seed, "seed"), integer(per_prompt, "per_prompt", 1)
    if per_prompt > 1 and not sampling.temperature:
        raise ValueError(
            f"{per_prompt} completions of each prompt need a temperature above 0: greedy ones are"
            " all the same"
        )
    cells, texts = _prepared(
        model, tokenizer, grid, prompts, grid.bos(prepend_bos), engine, sampling.max_new_tokens
    )
    max_memory = integer(max_memory, "max_memory", 1)
    runner = engine.runner if engine else None
    run = Completing(
        texts, cells, sampling, per_prompt, seed, max_memory, runner.name if runner else None
    )
    if runner:
        runner.check(run)
    columns = TextColumns(metrics or {}, texts.shown)
    settings = (
        {}
        if path is None
        else {
            "what": "completions",
            **_identity(texts, cells),
            **run.settings(),
            "ends": _list(model.generation_config.eos_token_id),
            "tokens": identity_of_tokens(tokenizer),
        }
    )
    titles = [*KEYS, "prompt", "sample", "completion", *(["runner"] if runner else [])]
    store = SweepStore(path, settings, titles, columns.titles)
    return _table(store, run, "Completing", show_progress, engine, columns)


@evaluating
def sweep_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    prompts: Sequence[Prompt],
    metrics: Mapping[str, LogitMetric] | None = None,
    *,
    prepend_bos: bool | None = None,
    path: str | os.PathLike | None = None,
    max_memory: int = MEMORY,
    show_progress: bool = True,
    engine: Engine | None = None,
) -> pd.DataFrame:
    """Measure the prediction of the next token after prompts at every point of a grid.

    Args:
        model, tokenizer, grid, prompts, prepend_bos, path, max_memory, show_progress, engine: see
            `sweep`. With an engine the workers compute the metrics.
        metrics: by name; each takes steered and unsteered logits [row, vocab] in float32 and
            returns one number a row. By default `kl`, the divergence from unsteered; see also
            `ab_metric`, `mean_logprob` and `token_logprob`. Its numbers are kept as float. Logits
            are not: a file knows a metric by its code and all that it reaches, and a changed one
            needs another file.

    Raises:
        ValueError: as `sweep`; with a path, also a metric that cannot be told from another one (it
            reads from an open file, say).

    Returns:
        One row for each prompt, layer and coefficient, and unsteered: `steering`, `kind`, `layer`,
            `coeff`, `prompt`, and the metrics.
    """
    metrics = dict(metrics or {"kl": kl_divergence})
    cells, texts = _prepared(model, tokenizer, grid, prompts, grid.bos(prepend_bos), engine)
    trial = torch.zeros(2, texts.vocabulary, device=input_device(model))
    for name, metric in metrics.items():
        numbers(metric(trial, trial), 2, name)
    settings = (
        {}
        if path is None
        else {
            "what": "logits",
            **_identity(texts, cells),
            "metrics": {name: identity_of_metric(metric, name) for name, metric in metrics.items()},
        }
    )

    def measured(steered: Tensor, plain: Tensor, inputs: Mapping[str, Tensor]) -> list[Row]:
        # In bf16 a log-probability has three digits.
        last = steered[:, -1].float(), plain[:, -1].float()
        values = [numbers(metric(*last), len(steered), name) for name, metric in metrics.items()]
        return [dict(zip(metrics, row)) for row in zip(*values)]

    max_memory = integer(max_memory, "max_memory", 1)
    run = Predicting(texts, cells, "prompt", measured, 1, max_memory)
    store = SweepStore(path, settings, [*KEYS, "prompt", *metrics])
    return _table(store, run, "Predicting", show_progress, engine)


@evaluating
def sweep_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    texts: Sequence[Prompt],
    *,
    mask_len: int = 0,
    prepend_bos: bool | None = True,
    path: str | os.PathLike | None = None,
    max_memory: int = MEMORY,
    show_progress: bool = True,
    engine: Engine | None = None,
) -> pd.DataFrame:
    """Measure how likely the model finds texts at every point of a grid.

    BOS stands in front of them where the tokenizer has one (`prepend_bos`, see `prompt_ids`).
    Without BOS nothing predicts the first token of a text, and it does not count.

    Args:
        model, tokenizer, grid, prepend_bos, path, max_memory, show_progress, engine: see `sweep`.
        texts: sentences, say; off the topic of the steering, to see what it costs.
        mask_len: positions in front at which no prediction counts, BOS being the first if there is
            one: the length of an addition.

    Raises:
        ValueError: as `sweep`; a text of which no token counts.

    Returns:
        One row for each text, layer and coefficient, and unsteered: `steering`, `kind`, `layer`,
            `coeff`, `text`, `loss`, `unsteered_loss` (means over the tokens that count, in nats)
            and `tokens`. `perplexity_ratio_by_cell` makes ratios of them.
    """
    mask_len = integer(mask_len, "mask_len")
    first = mask_len + 1
    cells, read = _prepared(model, tokenizer, grid, texts, prepend_bos, engine)
    if (shortest := min(read.lengths)) <= first:
        short = read.prompts[read.lengths.index(shortest)]
        raise ValueError(
            f"the first {first} tokens of a text do not count, a BOS included, and {short!r} has"
            f" only {shortest}"
        )
    settings = (
        {}
        if path is None
        else {"what": "perplexity", **_identity(read, cells), "mask_len": mask_len}
    )
    max_memory = integer(max_memory, "max_memory", 1)
    run = Predicting(read, cells, "text", partial(_losses, first), 0, max_memory)
    store = SweepStore(path, settings, [*KEYS, "text", "loss", "unsteered_loss", "tokens"])
    return _table(store, run, "Reading", show_progress, engine)


def _prepared(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    prompts: Sequence[Prompt],
    bos: bool | None,
    engine: Engine | None,
    new_tokens: int = 1,
) -> tuple[list[Cell], Texts]:
    """The points of the grid and the prompts, once it is clear that they fit together."""
    refuse_hooks(model, "a sweep")
    check_engine(engine, model)
    cells, texts = grid.cells(model, tokenizer), Texts(model, tokenizer, prompts, bos)
    texts.check(cells, new_tokens)
    return cells, texts


def _identity(texts: Texts, cells: Sequence[Cell]) -> dict[str, Any]:
    """What decides the rows of every sweep that is kept in a file.

    Raises:
        ValueError: the model is split over processes, all of which would write the file.
    """
    if is_split(texts.model):
        raise ValueError(
            "the model is split over processes, each of which would write to path: leave it out, or"
            " sweep with RayEngine(tensor_parallel=…), whose calling process alone writes"
        )
    steered = [(cell.steering, cell.layer, cell.coeff) for cell in cells if cell.steering]
    one = steered[0][0]
    # Nothing is said of what is plain addition: files of earlier versions are read again.
    how: dict[str, Any] = {} if one.first is None else {"min_token_index": one.first}
    if one.operator is not None:
        how["operator"] = identity_of_metric(one.operator, "operator")
    return {
        **how,
        **identity_of_model(texts.model),
        "steering": {
            one.name: [one.kind, one.part, one.location, one.content] for one, *_ in steered
        },
        "layers and coeffs": [
            [one.name, sorted(one.vectors) if layer is None else layer, coeff]
            for one, layer, coeff in steered
        ],
        "prompts": texts.identity(),
    }


def _table(
    store: SweepStore,
    run: Run,
    title: str,
    show_progress: bool,
    engine: Engine | None,
    columns: TextColumns | None = None,
) -> pd.DataFrame:
    """Compute the rows that the store does not have, measure completions, and return all rows."""
    with closing(store):
        store.expect(len(run))
        if columns:
            prompts = store.column("prompt")
            written = store.column("completion").items()
            store.set_metrics(columns.of({n: (prompts[n], text) for n, text in written}))
        done = store.done()
        units, model, tokenizer = run.units(done), run.texts.model, run.texts.tokenizer
        with (
            progress_bar(len(run), title, "row", show_progress, len(done)) as bar,
            closing(run_units(engine, model, tokenizer, run, units, bar)) as found,
        ):
            for _, rows in found:
                store.add(rows.items())
                if columns:
                    texts = {n: (row["prompt"], row["completion"]) for n, row in rows.items()}
                    store.add_metrics(columns.of(texts))
        return typed(store.frame())


def _losses(first: int, steered: Tensor, plain: Tensor, inputs: Mapping[str, Tensor]) -> list[Row]:
    """The mean loss of each text over its tokens from position `first` on, in nats."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    counted = mask.bool() & (mask.cumsum(-1) - 1 >= first)
    losses = [mean_losses(logits, ids, counted).tolist() for logits in (steered, plain)]
    rows = zip(*losses, counted.sum(-1).tolist())
    return [dict(zip(("loss", "unsteered_loss", "tokens"), row)) for row in rows]


def _list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else sorted({ids} if isinstance(ids, int) else set(ids))
