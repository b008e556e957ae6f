"""Sweeps: what steering does over layers, coefficients and prompts, many settings in one batch.

Every (layer, coefficient, prompt) is a row of a batch and is steered by its own vector; rows are
independent, so this gives what one run for each setting gives. `sweep` writes completions,
`sweep_logits` looks at the next token only, and `sweep_perplexity` at texts; the latter two compute
the blocks below the steered one once for each prompt. What they find is judged in `effects`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from numbers import Integral
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import finite_number, finite_product, layer_list
from common.measuring.likelihood import kl_divergence
from common.measuring.metrics import Metric, measure
from common.passes.batching import Batching, batching
from common.passes.hooks import LIBRARY_HOOKS
from common.passes.padding import encode
from common.passes.prompts import Prompt, prompt_ids, prompt_text
from common.passes.running import evaluating, input_device
from common.places.blocks import get_blocks, get_hidden, stream_dtype
from common.places.positions import TokenSpan
from common.places.sites import Site, get_layers
from common.progress import progress_bar
from common.sweeping.identity import (
    hash_of_tensors,
    identity_of_metric,
    identity_of_model,
    identity_of_tokens,
)
from common.sweeping.rows import (
    RowSteering,
    can_prefill,
    can_skip_blocks,
    logits_from,
    prefilled_cache,
    record_blocks,
    row_deltas,
    steered_behind,
    steering_rows,
)
from common.sweeping.store import SweepStore, plain, typed
from common.texts.generation import completions, real_tokens
from common.texts.sampling import Sampling, sample
from common.vectors.activation_additions import ActivationAddition, AdditionLocation, read_sites
from common.vectors.steering_vector import SteeringVector

Swept = SteeringVector | Sequence[ActivationAddition]
LogitMetric = Callable[[Tensor, Tensor], Any]
KEYS = ("steering", "kind", "layer", "coeff")
MEMORY = 2**30  # bytes that a batch may take, about


@dataclass
class _Steering:
    """Something that is swept: by layer, the vectors [count, d_model] that coefficient 1 adds.

    `content` says what they are made of, as JSON can hold it: activations differ in the last bits
    from machine to machine.
    """

    name: str
    kind: Literal["steering", "control", "random"]
    part: str
    vectors: dict[int, Tensor]
    location: AdditionLocation | None
    content: Any

    def row(self, layer: int, coeff: float) -> RowSteering:
        """What is added to a row of this layer and coefficient."""
        vectors = self.vectors[
            layer
        ]  # in 16 bit the product may lie outside their dtype, and inside that of the model
        return RowSteering(
            Site(layer, self.part),
            coeff * vectors.to(torch.promote_types(vectors.dtype, torch.float32)),
            self.location,
        )

    def random(self, number: int) -> "_Steering":
        """A random one: at every layer and token another direction, of the same length."""
        found = {}
        for layer, vectors in self.vectors.items():
            generator = torch.Generator().manual_seed(1000 * number + layer)
            noise = torch.randn(vectors.shape, generator=generator)
            length = vectors.float().cpu().norm(dim=-1, keepdim=True)
            found[layer] = (noise / noise.norm(dim=-1, keepdim=True) * length).to(vectors)
        return _Steering(
            f"{self.name}, random {number + 1}",
            "random",
            self.part,
            found,
            self.location,
            [self.content, number],
        )


@dataclass
class _Cell:
    """One point of the grid; `steering` None is the unsteered model."""

    steering: _Steering | None
    layer: int | None = None
    coeff: float = 0.0

    def keys(self) -> dict[str, Any]:
        """Its part of a row."""
        if self.steering is None:
            return dict(zip(KEYS, ("unsteered", "unsteered", None, 0.0)))
        return dict(zip(KEYS, (self.steering.name, self.steering.kind, self.layer, self.coeff)))

    @cached_property
    def row(self) -> RowSteering | None:
        """How a row of it is steered."""
        return None if self.steering is None else self.steering.row(self.layer, self.coeff)


@evaluating
def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Mapping[str, Swept],
    layers: Sequence[int] | None,
    coeffs: Sequence[float],
    prompts: Sequence[Prompt],
    metrics: Mapping[str, Metric] | None = None,
    *,
    controls: Mapping[str, Swept] | None = None,
    random_controls: int = 0,
    max_new_tokens: int = 16,
    per_prompt: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    addition_location: AdditionLocation = "front",
    prepend_bos: bool | None = None,
    path: str | os.PathLike | None = None,
    max_memory: int = MEMORY,
    show_progress: bool = True,
) -> pd.DataFrame:
    """Complete prompts at every layer and coefficient, unsteered beside them, and measure the completions.

    Each row is what a run of its prompt alone would give, on any architecture: which rows may share
    a batch, and whether a cache may be filled for all of them at once, is measured on the model
    first (`passes`, `row_steering`).

    Args:
        model: a causal language model, offloaded ones included; as it was afterwards and after any
            exception. Dropout is off meanwhile, whatever its mode.
        tokenizer: its tokenizer.
        steering: by name, steering vectors (added to resid_post of `layer` at all tokens; they need
            all `layers`), or activation additions, for example of `get_x_vector` with coefficient 1
            (added to resid_pre of `layer`, or resid_post if their names say so, at the tokens of
            the prompt; the layer in their names does not matter).
        layers: which layers; None takes those of the vectors, or all for additions.
        coeffs: what the vectors are multiplied by.
        prompts: texts, or messages for a chat model.
        metrics: by name, of the completions; see `metrics`. A value is a number, a truth value, a
            text, or None.
        controls: more steering, of kind "control" in the result: unrelated pairs, say.
        random_controls: so many random directions for each steering, with the same norm at each
            layer and token.
        max_new_tokens: length of the completions.
        per_prompt: completions of each prompt; more than one need a temperature.
        temperature: 0 is greedy; see `generation.sample` for this and the other settings of
            sampling.
        seed: completion n of a prompt gets the same random numbers at every layer and coefficient.
        addition_location: see `apply_activation_additions`.
        prepend_bos: see `prompts.prompt_ids`. By default what the tokenizer does by itself, as in
            training; where there are activation additions, which begin with BOS, one BOS if the
            tokenizer has one.
        path: a file (SQLite) to write to as it goes. A sweep that was stopped goes on where it was,
            and one that is finished is read from it; no completion is written twice. Metrics are
            taken anew from the completions in the file, at every call: they may be others than
            before, and one that fails costs no completion. Whether it is the same sweep is told by
            the whole weights, which takes 4 seconds for GPT2-XL; see `identity_of_model`.
        max_memory: how many bytes a batch may take, about.
        show_progress: show a bar where it takes more than five seconds.

    Returns:
        One row for each completion: `steering`, `kind` ("steering", "control", "random" or
            "unsteered"), `layer`, `coeff`,
        `prompt` (of messages the text that the chat template makes), `sample`, `completion`, and
        the metrics.

    Raises:
        ValueError: before work starts: nothing to sweep over, a layer that the model or a vector
            does not have, a prompt that is empty, shorter than an addition or longer than the
            model, a metric that does not give one value a text, settings that mean nothing, a model
            whose blocks have hooks, or a file of other settings. Later: a metric that gives
            something else than at its trial on the prompts.
        OSError: there is no room for the file. What was written before stays readable, and the same
            call goes on there.
    """
    metrics = dict(metrics or {})
    sampling = Sampling(max_new_tokens, temperature, top_p, freq_penalty, repetition_penalty)
    _at_least(1, per_prompt=per_prompt, max_memory=max_memory)
    _at_least(0, seed=seed)
    if per_prompt > 1 and not temperature:
        raise ValueError(
            f"{per_prompt} completions of each prompt need a temperature above 0: greedy ones are"
            " all the same"
        )
    cells = _grid(
        model, tokenizer, steering, layers, coeffs, controls, random_controls, addition_location
    )
    bos = _bos(cells, prepend_bos)
    lengths = _lengths(model, tokenizer, prompts, bos, cells, max_new_tokens)
    texts_of = [prompt_text(tokenizer, prompt) for prompt in prompts]
    titles = [
        column for name, metric in metrics.items() for column in _titles(name, metric, texts_of)
    ]
    settings = path is not None and {
        "what": "completions",
        **_identity(model, tokenizer, cells, prompts, bos),
        "max_new_tokens": max_new_tokens,
        "per_prompt": per_prompt,
        "temperature": temperature,
        "top_p": top_p,
        "freq_penalty": freq_penalty,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "ends": _list(model.generation_config.eos_token_id),
        "tokens": identity_of_tokens(tokenizer),
    }
    plan = [
        (cell, prompt, number)
        for cell in cells
        for prompt in range(len(prompts))
        for number in range(per_prompt)
    ]
    cost = (
        _bytes_of_a_text(model, max(lengths) + max_new_tokens)
        + 16 * model.get_output_embeddings().weight.shape[0]
    )
    store = SweepStore(path, settings or {}, [*KEYS, "prompt", "sample", "completion"], titles)
    try:
        store.set_metrics(_measured(metrics, titles, store.column("completion")))
        pending = sorted(set(range(len(plan))) - store.done())
        together, shared = "any", False
        if pending:
            together, samples = _samples(model, tokenizer, prompts, lengths, bos)
            shared = can_prefill(model, samples)
        with progress_bar(
            len(plan), "Completing", "row", show_progress, len(plan) - len(pending)
        ) as bar:
            # Prompts of like length together, so that little is padded.
            pending.sort(key=lambda number: lengths[plan[number][1]])
            for batch in _chunks(
                pending,
                max(1, max_memory // cost),
                together,
                lambda number: lengths[plan[number][1]],
            ):
                rows = [plan[number] for number in batch]
                inputs = encode(tokenizer, [prompts[prompt] for _, prompt, _ in rows], bos).to(
                    input_device(model)
                )
                steering_of = [cell.row for cell, _, _ in rows]
                length = inputs["input_ids"].shape[1] + max_new_tokens
                cache = prefilled_cache(model, inputs, steering_of, length) if shared else None
                with steering_rows(model, steering_of):
                    ids = sample(
                        model,
                        inputs,
                        [(seed, prompt, number) for _, prompt, number in rows],
                        sampling,
                        past_key_values=cache,
                    )
                texts = completions(tokenizer, inputs, ids, real_tokens(model, inputs, ids))
                store.add(
                    (
                        number,
                        {
                            **cell.keys(),
                            "prompt": texts_of[prompt],
                            "sample": index,
                            "completion": text,
                        },
                    )
                    for number, (cell, prompt, index), text in zip(batch, rows, texts, strict=True)
                )
                store.add_metrics(_measured(metrics, titles, dict(zip(batch, texts))))
                bar.update(len(batch))
        return typed(store.frame())
    finally:
        store.close()


@evaluating
def sweep_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Mapping[str, Swept],
    layers: Sequence[int] | None,
    coeffs: Sequence[float],
    prompts: Sequence[Prompt],
    metrics: Mapping[str, LogitMetric] | None = None,
    *,
    controls: Mapping[str, Swept] | None = None,
    random_controls: int = 0,
    addition_location: AdditionLocation = "front",
    prepend_bos: bool | None = None,
    path: str | os.PathLike | None = None,
    max_memory: int = MEMORY,
    show_progress: bool = True,
) -> pd.DataFrame:
    """Measure the prediction of the next token after prompts at every layer and coefficient, unsteered beside it.

    Args:
        metrics: by name; each takes steered and unsteered logits [row, vocab] in float32 and
            returns one number a row. By default `kl`, the divergence from unsteered; see also
            `token_logprob`. Its numbers are kept as float. Logits are not: a file knows a metric by
            its code and all that it reaches, and a changed one needs another file.

    The other arguments and errors are those of `sweep`.

    Raises:
        ValueError: with a path, also a metric that cannot be told from another one (it reads from
            an open file, say).

    Returns:
        One row for each prompt, layer and coefficient: `steering`, `kind`, `layer`, `coeff`,
            `prompt`, and the metrics.
    """
    metrics = dict(metrics or {"kl": kl_divergence})
    _at_least(1, max_memory=max_memory)
    cells = _grid(
        model, tokenizer, steering, layers, coeffs, controls, random_controls, addition_location
    )
    bos = _bos(cells, prepend_bos)
    lengths = _lengths(model, tokenizer, prompts, bos, cells)
    trial = torch.zeros(
        2, model.get_output_embeddings().weight.shape[0], device=input_device(model)
    )
    for name, metric in metrics.items():
        _numbers(metric(trial, trial), 2, name)
    settings = path is not None and {
        "what": "logits",
        **_identity(model, tokenizer, cells, prompts, bos),
        "metrics": {name: identity_of_metric(metric, name) for name, metric in metrics.items()},
    }

    def measured(
        steered: Tensor, plain: Tensor, inputs: Mapping[str, Tensor]
    ) -> list[dict[str, Any]]:
        last = (
            steered[:, -1].float(),
            plain[:, -1].float(),
        )  # in bf16 a log-probability has three digits
        values = {
            name: _numbers(metric(*last), len(steered), name) for name, metric in metrics.items()
        }
        return [dict(zip(values, row)) for row in zip(*values.values())]

    run = _PassSweep(model, tokenizer, cells, prompts, lengths, bos, True, max_memory)
    return run.run(
        SweepStore(path, settings or {}, [*KEYS, "prompt", *metrics]),
        "prompt",
        measured,
        "Predicting",
        show_progress,
    )


@evaluating
def sweep_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Mapping[str, Swept],
    layers: Sequence[int] | None,
    coeffs: Sequence[float],
    texts: Sequence[Prompt],
    *,
    controls: Mapping[str, Swept] | None = None,
    random_controls: int = 0,
    mask_len: int = 0,
    addition_location: AdditionLocation = "front",
    prepend_bos: bool | None = True,
    path: str | os.PathLike | None = None,
    max_memory: int = MEMORY,
    show_progress: bool = True,
) -> pd.DataFrame:
    """Measure how likely the model finds texts at every layer and coefficient.

    BOS stands in front of them where the tokenizer has one (`prepend_bos`, see
    `prompts.prompt_ids`). Without BOS nothing predicts the first token of a text, and it does not
    count.

    Args:
        texts: sentences, say; off the topic of the steering, to see what it costs.
        mask_len: positions in front at which no prediction counts, BOS being the first if there is
            one: the length of an addition.

    The other arguments and errors are those of `sweep`.

    Returns:
        One row for each text, layer and coefficient: `steering`, `kind`, `layer`, `coeff`, `text`,
            `loss`, `unsteered_loss`
        (means over the tokens that count, in nats) and `tokens`. `effects.perplexity_ratio_by_cell`
        makes ratios of them.
    """
    _at_least(1, max_memory=max_memory)
    _at_least(0, mask_len=mask_len)
    cells = _grid(
        model, tokenizer, steering, layers, coeffs, controls, random_controls, addition_location
    )
    first, lengths = mask_len + 1, _lengths(model, tokenizer, texts, prepend_bos, cells)
    if min(lengths) <= first:
        short = texts[lengths.index(min(lengths))]
        raise ValueError(
            f"the first {first} tokens of a text do not count, a BOS included, and {short!r} has"
            f" only {min(lengths)}"
        )
    settings = path is not None and {
        "what": "perplexity",
        **_identity(model, tokenizer, cells, texts, prepend_bos),
        "mask_len": mask_len,
    }

    def measured(
        steered: Tensor, plain: Tensor, inputs: Mapping[str, Tensor]
    ) -> list[dict[str, Any]]:
        positions = inputs["attention_mask"].cumsum(-1) - 1
        counted = (inputs["attention_mask"].bool() & (positions >= first))[:, 1:]
        tokens = counted.sum(-1)
        loss, before = (
            (
                torch.nn.functional.cross_entropy(
                    part[:, :-1].transpose(1, 2).float(),
                    inputs["input_ids"][:, 1:],
                    reduction="none",
                )
                * counted
            ).sum(-1)
            / tokens
            for part in (steered, plain)
        )
        return [
            dict(zip(("loss", "unsteered_loss", "tokens"), row))
            for row in zip(loss.tolist(), before.tolist(), tokens.tolist())
        ]

    run = _PassSweep(model, tokenizer, cells, texts, lengths, prepend_bos, False, max_memory)
    columns = [*KEYS, "text", "loss", "unsteered_loss", "tokens"]
    return run.run(
        SweepStore(path, settings or {}, columns), "text", measured, "Reading", show_progress
    )


def token_logprob(token_ids: Sequence[int]) -> LogitMetric:
    """Return a metric for `sweep_logits`: the log of the steered probability of some tokens together, in nats."""
    ids = torch.tensor(list(token_ids))
    return lambda steered, unsteered: steered.log_softmax(-1)[:, ids].logsumexp(-1)


class _PassSweep:
    """Forward passes over texts at every cell, with the blocks below the steered one computed once for each text."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cells: list[_Cell],
        texts: Sequence[Prompt],
        lengths: list[int],
        bos: bool | None,
        last_only: bool,
        max_memory: int,
    ):
        self.shown = [prompt_text(tokenizer, text) for text in texts]
        self.model, self.tokenizer, self.cells, self.texts, self.bos, self.last_only = (
            model,
            tokenizer,
            cells,
            list(texts),
            bos,
            last_only,
        )
        self.lengths, self.max_memory = lengths, max_memory

    def run(
        self,
        store: SweepStore,
        column: str,
        measured: Callable[[Tensor, Tensor, Mapping[str, Tensor]], list[dict[str, Any]]],
        title: str,
        show_progress: bool,
    ) -> pd.DataFrame:
        """Compute the rows that are not in the store, and return all."""
        try:
            done, total = store.done(), len(self.cells) * len(self.texts)
            with progress_bar(total, title, "row", show_progress, len(done)) as bar:
                if len(done) < total:
                    self.together, samples = _samples(
                        self.model, self.tokenizer, self.texts, self.lengths, self.bos
                    )
                    self.skips = can_skip_blocks(self.model, samples)
                for texts in self._parts() if len(done) < total else ():
                    missing = {
                        cell: [text for text in texts if self._number(cell, text) not in done]
                        for cell in range(len(self.cells))
                    }
                    for cell_rows, steered, unsteered, inputs in self._passes(
                        texts, {cell: rows for cell, rows in missing.items() if rows}
                    ):
                        values = measured(steered, unsteered, inputs)
                        store.add(
                            (
                                self._number(cell, text),
                                {**self.cells[cell].keys(), column: self.shown[text], **row},
                            )
                            for (cell, text), row in zip(cell_rows, values, strict=True)
                        )
                        bar.update(len(cell_rows))
            return typed(store.frame())
        finally:
            store.close()

    def _number(self, cell: int, text: int) -> int:
        return cell * len(self.texts) + text

    def _bytes(self, length: int) -> int:
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        return _bytes_of_a_text(self.model, length) + 12 * vocabulary * (
            1 if self.last_only else length
        )

    def _parts(self) -> Iterator[list[int]]:
        """Texts of like length, as many as can be kept at every layer."""
        lengths = self.lengths
        config = self.model.config.get_text_config()
        kept = 4 * config.hidden_size * config.num_hidden_layers * max(lengths) + self._bytes(
            max(lengths)
        )
        order = sorted(range(len(lengths)), key=lambda text: lengths[text])
        yield from _chunks(
            order, max(1, self.max_memory // kept), self.together, lambda text: lengths[text]
        )

    def _passes(self, texts: list[int], missing: dict[int, list[int]]) -> Iterator[tuple]:
        """For these texts, the missing rows in batches: (cell, text) of each, steered and plain logits, and the inputs."""
        if not missing:
            return
        inputs = encode(self.tokenizer, [self.texts[text] for text in texts], self.bos).to(
            input_device(self.model)
        )
        place = {text: index for index, text in enumerate(texts)}
        groups: dict[int | None, list[tuple[int, int]]] = {}
        for cell, rows in missing.items():
            groups.setdefault(steered_behind(self.cells[cell].row), []).extend(
                (cell, text) for text in rows
            )
        layers = sorted(
            layer for layer in groups if layer is not None and layer >= 0 and self.skips
        )
        plain = record_blocks(self.model, inputs, layers, self.last_only)
        size = max(1, self.max_memory // self._bytes(inputs["input_ids"].shape[1]))
        for layer, group in groups.items():
            for rows in _chunks(group, size, self.together, lambda row: self.lengths[row[1]]):
                index = torch.tensor([place[text] for _, text in rows], device=plain.logits.device)
                part = {name: values[index.to(values.device)] for name, values in inputs.items()}
                before = plain.logits[index]
                yield (
                    rows,
                    (
                        before
                        if layer is None
                        else self._steered(rows, layer, index, part, plain.outputs)
                    ),
                    before,
                    part,
                )

    @torch.no_grad()
    def _steered(
        self,
        rows: list[tuple[int, int]],
        layer: int,
        index: Tensor,
        inputs: dict[str, Tensor],
        outputs: Mapping[int, Any],
    ) -> Tensor:
        """The logits of rows that are steered after one block."""
        steering = [self.cells[cell].row for cell, _ in rows]
        if layer < 0 or not self.skips:
            with steering_rows(self.model, steering):
                return record_blocks(self.model, inputs, [], self.last_only).logits
        hidden = get_hidden(outputs[layer])
        hidden = hidden[index.to(hidden.device)]
        return logits_from(
            self.model,
            inputs,
            layer,
            outputs[layer],
            hidden + row_deltas(steering, hidden, inputs),
            self.last_only,
        )


def _grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Mapping[str, Swept],
    layers: Sequence[int] | None,
    coeffs: Sequence[float],
    controls: Mapping[str, Swept] | None,
    random_controls: int,
    location: AdditionLocation,
) -> list[_Cell]:
    """The unsteered model and every point of the grid."""
    _refuse_hooks(model)
    if not isinstance(steering, Mapping) or not steering:
        raise ValueError(
            f"expected steering by name, for example {{'Love - Hate': vector}}, got {steering!r}"
        )
    if (
        isinstance(random_controls, bool)
        or not isinstance(random_controls, int)
        or random_controls < 0
    ):
        raise ValueError(f"expected a number of random controls from 0 on, got {random_controls!r}")
    if not isinstance(controls or {}, Mapping):
        raise ValueError(f"expected controls by name, got {controls!r}")
    if layers is not None:
        count, layers = len(get_blocks(model)[1]), layer_list(layers)
        if not len(layers) or any(
            isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < count
            for layer in layers
        ):
            raise ValueError(f"expected layers from 0 to {count - 1}, got {list(layers)}")
        layers = [int(layer) for layer in layers]
        if twice := [layer for layer in layers if layers.count(layer) > 1]:
            raise ValueError(f"layer {twice[0]} is given twice: {layers}")
    if isinstance(coeffs, str) or not isinstance(coeffs, Iterable):
        raise ValueError(f"expected a list of numbers as coeffs, got {coeffs!r}")
    coeffs = [finite_number(coeff, "coefficient") for coeff in coeffs]
    if not coeffs or len(set(coeffs)) < len(coeffs):
        raise ValueError(f"expected different finite coefficients, got {coeffs}")
    TokenSpan(0, location)
    everything = [
        _resolve(model, tokenizer, name, what, "steering", layers, location)
        for name, what in steering.items()
    ]
    randoms = [one.random(number) for one in everything for number in range(random_controls)]
    everything += [
        _resolve(model, tokenizer, name, what, "control", layers, location)
        for name, what in (controls or {}).items()
    ]
    everything += randoms
    for one, layer in ((one, layer) for one in everything for layer in one.vectors):
        finite_product(
            max(coeffs, key=abs), one.vectors[layer], model.dtype, f"{one.name!r} at layer {layer}"
        )
    names = [one.name for one in everything]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"{twice[0]!r} is the name of two of what is swept, controls and random controls"
            " included"
        )
    return [
        _Cell(None),
        *(
            _Cell(one, layer, coeff)
            for one in everything
            for layer in one.vectors
            for coeff in coeffs
        ),
    ]


def _refuse_hooks(model: PreTrainedModel) -> None:
    """Refuse a model that is steered already, or looked into: a hook on a block would act twice."""
    for number, block in enumerate(get_blocks(model)[1]):
        for hook in (*block._forward_hooks.values(), *block._forward_pre_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith(LIBRARY_HOOKS):
                raise ValueError(
                    f"block {number} has a hook, {hook!r}: a sweep starts from the model as it is,"
                    " take the hook off first"
                )


def _resolve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    what: Swept,
    kind: str,
    layers: Sequence[int] | None,
    location: AdditionLocation,
) -> _Steering:
    """What is swept, read at the layers that are wanted."""
    d_model = model.config.get_text_config().hidden_size
    if isinstance(what, SteeringVector):
        if what.layer_type != "decoder_block":
            raise ValueError(
                f"{name!r} acts on {what.layer_type!r}: a sweep takes vectors of 'decoder_block',"
                " the residual stream"
            )
        try:
            own = dict(
                zip(
                    get_layers(model, layers=list(what.layer_activations)),
                    what.layer_activations.values(),
                )
            )
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        wanted = sorted(own) if layers is None else list(layers)
        if missing := [layer for layer in wanted if layer not in own]:
            raise ValueError(
                f"{name!r} has no vector for layer {missing[0]}: it has layers {sorted(own)}"
            )
        for layer in wanted:
            if len(own[layer]) != d_model:
                raise ValueError(
                    f"{name!r} has {len(own[layer])} numbers at layer {layer}, and d_model is"
                    f" {d_model}"
                )
            if not torch.isfinite(own[layer]).all():
                raise ValueError(
                    f"expected finite numbers, got nan or inf in {name!r} at layer {layer}"
                )
        vectors = {layer: own[layer].detach()[None].to(input_device(model)) for layer in wanted}
        return _Steering(name, kind, "resid_post", vectors, None, hash_of_tensors(vectors.values()))
    additions = list(what) if isinstance(what, Sequence) and not isinstance(what, str) else []
    if not additions or not all(isinstance(addition, ActivationAddition) for addition in additions):
        raise ValueError(
            f"expected a SteeringVector or ActivationAdditions for {name!r}, got {what!r}"
        )
    parts = {addition.site.part for addition in additions}
    if len(parts) > 1 or not parts <= {"resid_pre", "resid_post"}:
        raise ValueError(
            f"expected additions of {name!r} at resid_pre, or at resid_post, got"
            f" {', '.join(sorted(parts))}"
        )
    (part,), wanted = (
        parts,
        list(range(len(get_blocks(model)[1]))) if layers is None else list(layers),
    )
    rows = [addition.token_ids(tokenizer) for addition in additions]
    read, vectors = read_sites(model, rows, [Site(layer, part) for layer in wanted]), {}
    for layer in wanted:
        total = torch.zeros(
            max(map(len, rows)), d_model, dtype=stream_dtype(model), device=input_device(model)
        )
        for addition, row in zip(additions, rows):
            start = TokenSpan(len(row), location).offsets(
                torch.zeros(1, 1, dtype=torch.long), torch.tensor([len(total)])
            )
            total[-int(start) : len(row) - int(start)] += (
                addition.coeff * read[tuple(row), Site(layer, part)]
            )
        vectors[layer] = total
    return _Steering(
        name,
        kind,
        part,
        vectors,
        location,
        [[addition.coeff, row] for addition, row in zip(additions, rows)],
    )


def _identity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cells: list[_Cell],
    prompts: Sequence[Prompt],
    bos: bool | None,
) -> dict[str, Any]:
    """What decides the rows, beside the settings of each sweep."""
    steered = [(cell.steering, cell.layer, cell.coeff) for cell in cells if cell.steering]
    found = {one.name: [one.kind, one.part, one.location, one.content] for one, _, _ in steered}
    grid = [[one.name, layer, coeff] for one, layer, coeff in steered]
    return {
        **identity_of_model(model),
        "steering": found,
        "layers and coeffs": grid,
        "prompts": [
            (prompt_text(tokenizer, prompt), ids)
            for prompt, ids in zip(prompts, prompt_ids(tokenizer, prompts, bos))
        ],
    }


def _list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else sorted({ids} if isinstance(ids, int) else set(ids))


def _bos(cells: list[_Cell], prepend_bos: bool | None) -> bool | None:
    """What stands in front of the prompts: one BOS where additions have one, else the tokenizer's own way."""
    return (
        True
        if prepend_bos is None and any(cell.steering and cell.steering.location for cell in cells)
        else prepend_bos
    )


def _lengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    bos: bool | None,
    cells: Sequence[_Cell] = (),
    new_tokens: int = 1,
) -> list[int]:
    """How many tokens each prompt has; refuses prompts that are too short for an addition, or too long for the model."""
    lengths = encode(tokenizer, prompts, bos)["attention_mask"].sum(-1).tolist()
    needed = max(
        (
            len(vectors)
            for cell in cells
            if cell.steering and cell.steering.location
            for vectors in cell.steering.vectors.values()
        ),
        default=0,
    )
    if min(lengths) < needed:
        short = prompts[lengths.index(min(lengths))]
        raise ValueError(
            f"the addition has {needed} tokens and the prompt {short!r} only {min(lengths)}:"
            " expected one that is as long"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and max(lengths) + new_tokens - 1 > limit:  # the last new token is not read
        raise ValueError(
            f"{max(lengths)} tokens of a prompt and {new_tokens} new ones are more than the {limit}"
            " positions of the model"
        )
    return lengths


def _titles(name: str, metric: Metric, prompts: Sequence[str]) -> list[str]:
    """The columns of a metric, found by trying it on the prompts."""
    return [title for title, _ in _values(name, metric, list(prompts))]


def _measured(
    metrics: Mapping[str, Metric], titles: list[str], texts: Mapping[int, str]
) -> list[tuple[int, dict[str, Any]]]:
    """The metrics of numbered texts, row by row."""
    if not texts:
        return []
    columns = [
        column
        for name, metric in metrics.items()
        for column in _values(name, metric, list(texts.values()))
    ]
    if (found := [title for title, _ in columns]) != titles:
        raise ValueError(
            f"the metrics returned the columns {found}, and {titles} when they were tried on the"
            " prompts: expected the same"
        )
    return [
        (number, {title: values[index] for title, values in columns})
        for index, number in enumerate(texts)
    ]


def _values(name: str, metric: Metric, texts: list[str]) -> list[tuple[str, list]]:
    """The columns of a metric with their titles."""
    try:
        found = measure(metric, texts, name)
    except UnicodeEncodeError as error:  # pandas takes no half characters
        raise ValueError(
            f"the metric {name!r} of a text: expected a number or a text ({error})"
        ) from error
    columns = [
        (f"{name}_{column}" if column else name, list(values.to_numpy(dtype=object)))
        for column, values in found.items()
    ]
    try:
        for _, values in columns:
            list(map(plain, values))
    except ValueError as error:
        raise ValueError(f"the metric {name!r} of a text: {error}") from None
    return columns


def _numbers(values: Any, count: int, name: str) -> list[float]:
    """One number a row, from what a metric of logits returned."""
    try:
        found = np.asarray(values.tolist() if isinstance(values, Tensor) else values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"the metric {name!r} returned {values!r}: expected one number for each row"
        ) from None
    if found.shape != (count,):
        raise ValueError(
            f"the metric {name!r} returned values of shape {found.shape} for {count} rows: expected"
            " one number for each"
        )
    return found.tolist()


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"expected an integer of {least} or more as {name}, got {value!r}")


def _bytes_of_a_text(model: PreTrainedModel, length: int) -> int:
    """About how much memory a text takes while it runs through the model: its cache, and what a block holds."""
    config, size = model.config.get_text_config(), next(model.parameters()).element_size()
    return size * length * config.hidden_size * (2 * config.num_hidden_layers + 12)


def _samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    lengths: list[int],
    bos: bool,
) -> tuple[Batching, BatchEncoding]:
    """Which prompts may share a batch, and the longest and the shortest one to try the model on; the longest alone if these may not."""
    both = [prompts[lengths.index(wanted(lengths))] for wanted in (max, min)]
    inputs = encode(tokenizer, both, bos).to(input_device(model))
    together = batching(model, inputs)
    return together, (
        inputs if together == "any" else encode(tokenizer, both[:1], bos).to(input_device(model))
    )


def _chunks(
    items: list, size: int, together: Batching, length_of: Callable[[Any], int]
) -> Iterator[list]:
    """Items in chunks of up to `size`, in their order, of those that may share a batch."""
    size = 1 if together == "alone" else size
    for _, group in groupby(items, length_of if together == "equal" else lambda item: None):
        found = list(group)
        for start in range(0, len(found), size):
            yield found[start : start + size]
