"""How strong: the multiplier at which steering changes predictions by a given amount.

A coefficient says little: what 10 does depends on the length of the vector, the layer and the
model. So strength is measured as a divergence, in nats: KL(steered || unsteered) of the next token,
at each token of what the unsteered model writes greedily after some prompts; of all these the 95th
percentile. Small multipliers change the text little, and the divergence grows with their square:
KL is c² v' F v / 2 to second order, F being the Fisher information of the predictions.

The idea is that of steering-lite (https://github.com/wassname/steering-lite), where the steered
model writes the text. Here the text is the same at every strength: no token flips, so that the
divergence has no jumps, and whatever it reaches it reaches somewhere.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import finite_number, integer
from common.measuring.likelihood import kl_divergence
from common.passes.hooks import refuse_hooks
from common.passes.prompts import Prompt
from common.passes.recording import Location, record_pass
from common.passes.running import Steering, evaluating, pass_inputs
from common.places.positions import reading_part
from common.places.sites import find_site, get_layers
from common.sweeping.grid import KEYS, Cell, Grid
from common.sweeping.rows import RowSteering
from common.sweeping.runs import MEMORY, Predicting, Row
from common.sweeping.searching import Search, search
from common.sweeping.store import typed
from common.sweeping.texts import Texts
from common.texts.generation import real_tokens, text_logits
from common.texts.sampling import Sampling, sample
from common.vectors.steering_vector import SteeringVector

QUANTILE = 0.95
PASSES = 12
SHARE = 0.1  # of the length of the hidden states: how long what is added is in the first pass

Strength = Callable[[float], AbstractContextManager]  # makes steering of some multiplier


@evaluating
@torch.no_grad()
def steering_kl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int = 20,
    prepend_bos: bool | None = None,
) -> float:
    """Measure how far steering moves the predictions of a model.

    Args:
        model: a causal language model; as it was afterwards.
        tokenizer: its tokenizer.
        steering: makes what is open meanwhile, for example `lambda: vector.apply(model)`. Rows
            of their own (a list of multipliers, `steer_rows`) are the prompts, in this order.
        prompts: texts, or messages for a chat model; what the model is used for, or neutral ones.
        new_tokens: so many tokens after each prompt, fewer where a text ends before. The first is
            predicted at the last token of the prompt.
        prepend_bos: see `prompt_ids`.

    Returns:
        The 95th percentile of KL(steered || unsteered) over these tokens of all prompts, in nats;
        NaN where the steered model gives no numbers.

    Raises:
        ValueError: a model that is steered already, a prompt that is empty or too long for the
            model, no new tokens.
    """
    return _Written(model, tokenizer, prompts, new_tokens, prepend_bos).kl(steering)


@evaluating
@torch.no_grad()
def prompting_kl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompted: Sequence[Prompt],
    prompts: Sequence[Prompt],
    *,
    new_tokens: int = 20,
    prepend_bos: bool | None = None,
) -> float:
    """Measure how far other prompts move the predictions of a model: prompting as a steering.

    It is the divergence of `steering_kl`, on the same text: what the model writes after the plain
    prompts is read once more after the others. A steering that is calibrated to it is as strong as
    the prompting.

    Args:
        model, tokenizer, prompts, new_tokens, prepend_bos: see `steering_kl`.
        prompted: what takes the place of each prompt: the prompt with an instruction in front, say,
            or its messages with another system prompt.

    Returns:
        The 95th percentile of KL(prompted || plain) over the tokens after all prompts, in nats.

    Raises:
        ValueError: another number of `prompted` than of prompts, one that is empty or too long for
            the model, and what `steering_kl` raises.
    """
    if isinstance(prompted, str) or len(prompted) != len(prompts):
        raise ValueError(
            f"expected a list of {len(prompts)} prompts, one in place of each, got {prompted!r}"
        )
    instead = Texts(model, tokenizer, prompted, prepend_bos)
    instead.check((), integer(new_tokens, "new_tokens", 1))
    written = _Written(model, tokenizer, prompts, new_tokens, prepend_bos)
    return written.kl_of_prompts(instead)


@evaluating
@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector | Strength,
    prompts: Sequence[Prompt],
    target_kl: float = 1.0,
    *,
    new_tokens: int = 20,
    tolerance: float = 0.01,
    prepend_bos: bool | None = None,
) -> float:
    """Find the multiplier at which steering moves the predictions of a model by `target_kl` nats.

    `steering_kl` says what is measured. Two steerings at the same divergence are equally strong:
    compare what they do there. The search brackets the target and then takes secants on logarithms,
    in at most 12 passes over the text. For the other direction calibrate `-vector`: it is another
    number.

    Args:
        model, tokenizer, prompts, new_tokens, prepend_bos: see `steering_kl`.
        vector: added at all tokens and at all its layers together, as `vector.apply` does; or what
            makes steering of a multiplier, such as
            `lambda multiplier: vector.apply(model, multiplier=multiplier, operator=…)`. Then the
            search begins with 1.
        target_kl: in nats. At 1 the text is changed clearly, and still a text, most of the time.
        tolerance: how far the divergence may be from the target, as a share of it.

    Returns:
        The multiplier, above 0.

    Raises:
        ValueError: no multiplier reaches the target, or the divergence jumps over it (as 16-bit
            numbers do, for a small tolerance); a target or a tolerance that is not above 0; a
            vector that is 0, or that does not fit the model; what `steering_kl` raises.
    """
    target_kl, tolerance = _positive(target_kl, "target_kl"), _positive(tolerance, "tolerance")
    text = _Written(model, tokenizer, prompts, new_tokens, prepend_bos)
    start = 1.0
    if isinstance(vector, SteeringVector):
        start = _first_multiplier(text, vector)
        steered: Strength = partial(_applied, vector, model)
    else:
        steered = vector

    def measure(wanted: Mapping[int, float]) -> dict[int, float]:
        return {number: text.kl(partial(steered, x)) for number, x in wanted.items()}

    (found,) = search(measure, [start], target_kl, tolerance, PASSES)
    _refuse_unreached({"the steering": found})
    return found.seen[-1][0]


@evaluating
@torch.no_grad()
def calibrate_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    prompts: Sequence[Prompt],
    target_kl: float = 1.0,
    *,
    new_tokens: int = 20,
    tolerance: float = 0.01,
    prepend_bos: bool | None = None,
    max_memory: int = MEMORY,
) -> pd.DataFrame:
    """Find for everything in a grid, at each layer by itself, the coefficient of a divergence.

    As `calibrate`, for all of it at once: in each of the 12 passes at most, every point of the grid
    that is not there yet is a row for each prompt.

    Args:
        model, tokenizer, prompts, target_kl, new_tokens, tolerance, prepend_bos: see `calibrate`.
        grid: what is added, at which layers. Of its coefficients only the signs count: with
            `coeffs=(-1, 1)` both directions are calibrated.
        max_memory: how many bytes a batch may take, about.

    Returns:
        `steering`, `kind`, `layer`, `coeff` (what to multiply by) and `kl` (what it gives).

    Raises:
        ValueError: as `calibrate`; a coefficient of 0, two of one sign; no memory; additions
            anywhere but at the front of the prompt.
    """
    target_kl, tolerance = _positive(target_kl, "target_kl"), _positive(tolerance, "tolerance")
    max_memory = integer(max_memory, "max_memory", 1)
    signs = [math.copysign(1.0, coeff) for coeff in grid.coeffs]
    if 0 in grid.coeffs or len(set(signs)) < len(signs):
        raise ValueError(
            "expected one coefficient for each direction, such as (-1, 1), of which only the sign"
            f" counts, got {list(grid.coeffs)}"
        )
    cells, text = _grid_text(model, tokenizer, grid, prompts, new_tokens, prepend_bos)
    given = [replace(cell, coeff=math.copysign(1.0, cell.coeff)) for cell in cells if cell.steering]

    def measure(wanted: Mapping[int, float]) -> dict[int, float]:
        scaled = [_times(given[number], x) for number, x in wanted.items()]
        return dict(zip(wanted, text.kl_of_cells(scaled, max_memory), strict=True))

    starts = _first_coefficients(text, given)
    searches = search(measure, starts, target_kl, tolerance, PASSES)
    _refuse_unreached(dict(zip(map(str, given), searches)))
    found = [one.seen[-1] for one in searches]
    return typed(
        pd.DataFrame(
            [{**_times(cell, x).keys(), "kl": kl} for cell, (x, kl) in zip(given, found)],
            columns=[*KEYS, "kl"],
        )
    )


@evaluating
@torch.no_grad()
def kl_by_cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int = 20,
    prepend_bos: bool | None = None,
    max_memory: int = MEMORY,
) -> pd.DataFrame:
    """Measure how far each point of a grid moves the predictions of a model.

    `with_kl` puts it beside the rows of a sweep, or its effects: what steering does can then be
    compared at equal divergence instead of equal coefficients.

    Args:
        model, tokenizer, prompts, new_tokens, prepend_bos: see `steering_kl`.
        grid: what steers it, at which layers, how strongly.
        max_memory: how many bytes a batch may take, about.

    Returns:
        `steering`, `kind`, `layer`, `coeff` and `kl` (see `steering_kl`), unsteered first.

    Raises:
        ValueError: as `sweep`; additions anywhere but at the front of the prompt.
    """
    cells, text = _grid_text(model, tokenizer, grid, prompts, new_tokens, prepend_bos)
    kls = text.kl_of_cells(cells, integer(max_memory, "max_memory", 1))
    return typed(pd.DataFrame([{**cell.keys(), "kl": kl} for cell, kl in zip(cells, kls)]))


class _Batch(NamedTuple):
    """Prompts, [batch, pos], and what is written after them.

    `numbers` [batch], which prompts they are; `ids` [batch, pos + new]; `real` [batch, new], which
    tokens count; `plain`, the unsteered logits that predict them, [batch, new, vocab].
    """

    numbers: list[int]
    inputs: BatchEncoding
    ids: Tensor
    real: Tensor
    plain: Tensor


class _Written:
    """Prompts with what the unsteered model writes after them, greedily, and predicts there."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        new_tokens: int,
        bos: bool | None,
        cells: Sequence[Cell] = (),
    ):
        new_tokens = integer(new_tokens, "new_tokens", 1)
        refuse_hooks(model, "measuring the divergence")
        prompted = Texts(model, tokenizer, prompts, bos)
        prompted.check(cells, new_tokens)
        self.model, self.batches = model, []
        written: dict[int, list[int]] = {}
        for numbers in _by_length(prompted, new_tokens):
            inputs = prompted.inputs(numbers)
            batch = _write(model, numbers, inputs, new_tokens)
            self.batches.append(batch)
            new = batch.ids[:, inputs["input_ids"].shape[1] :]
            written |= {n: ids[kept].tolist() for n, ids, kept in zip(numbers, new, batch.real)}
        self.counts = [len(written[number]) for number in range(len(prompted))]
        # The last token is predicted and never read.
        following = [written[number][:-1] for number in range(len(prompted))]
        self.texts = Texts(model, tokenizer, prompts, bos, following)

    def kl(self, steering: Steering) -> float:
        """The divergence under a steering."""
        found, total = [], len(self.texts)
        for batch in self.batches:
            # Prompts of like length share a batch, whatever their order.
            with steering(), reading_part(torch.tensor(batch.numbers), total):
                steered = _predictions(self.model, batch.inputs, batch.ids)
            found.append(kl_divergence(steered, batch.plain)[batch.real].cpu().numpy())
        return _percentile(found)

    def kl_of_prompts(self, instead: Texts) -> float:
        """The divergence with other prompts in front of the same text."""
        found = []
        for numbers, inputs, ids, real, plain in self.batches:
            new, own = ids[:, inputs["input_ids"].shape[1] :], instead.inputs(numbers)
            whole = torch.cat([own["input_ids"], new], dim=1)
            prompted = _predictions(self.model, own, whole)
            found.append(kl_divergence(prompted, plain)[real].cpu().numpy())
        return _percentile(found)

    def kl_of_cells(self, cells: Sequence[Cell], max_memory: int) -> list[float]:
        """The divergence at points of a grid; each prompt at each point is a row."""
        keep, count = max(self.counts), len(self.texts)

        def measured(steered: Tensor, plain: Tensor, inputs: Mapping[str, Tensor]) -> list[Row]:
            last = steered[:, -keep:].float(), plain[:, -keep:].float()
            return [{"kl": row} for row in kl_divergence(*last).cpu().numpy()]

        run, rows = Predicting(self.texts, cells, "text", measured, keep, max_memory), {}
        work = run.on(self.model, self.texts.tokenizer)
        for unit in run.units(()):
            rows |= {number: row["kl"] for number, row in work(unit).items()}
        return [
            _percentile([rows[cell * count + n][-self.counts[n] :] for n in range(count)])
            for cell in range(len(cells))
        ]

    def norms(self, places: Mapping[int, Location]) -> dict[int, float]:
        """The median length of the hidden states at some places: a few tokens are far longer."""
        inputs = pass_inputs(self.texts.samples)
        return record_pass(
            lambda: self.model(**inputs),
            places,
            lambda _, hidden: hidden.float().norm(dim=-1).median().item(),
        )


def _by_length(texts: Texts, new_tokens: int) -> Iterator[list[int]]:
    """Prompts by their numbers, those of like length together, as many as memory holds."""
    longest = max(texts.lengths) + new_tokens
    size = MEMORY // (texts.bytes_of(longest) + 12 * texts.vocabulary * new_tokens)
    order = sorted(range(len(texts)), key=texts.lengths.__getitem__)
    return texts.batches(order, max(1, size), int)


def _write(
    model: PreTrainedModel, numbers: list[int], inputs: BatchEncoding, new_tokens: int
) -> _Batch:
    greedy, start = Sampling(max_new_tokens=new_tokens, temperature=0.0), inputs["input_ids"].shape
    ids = sample(model, inputs, [0] * start[0], greedy)
    real = real_tokens(model, inputs, ids)[:, start[1] :]
    return _Batch(numbers, inputs, ids, real, _predictions(model, inputs, ids))


def _predictions(model: PreTrainedModel, inputs: BatchEncoding, ids: Tensor) -> Tensor:
    """The logits that predict what follows the prompts, [batch, new, vocab], in fp32."""
    first = inputs["input_ids"].shape[1] - 1
    return text_logits(model, inputs, ids[:, :-1])[:, first:].float()


def _percentile(kls: Sequence[np.ndarray]) -> float:
    return float(np.quantile(np.concatenate(kls).astype(float), QUANTILE))


def _applied(
    vector: SteeringVector, model: PreTrainedModel, multiplier: float
) -> AbstractContextManager:
    return vector.apply(model, multiplier=multiplier)


def _grid_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    prompts: Sequence[Prompt],
    new_tokens: int,
    prepend_bos: bool | None,
) -> tuple[list[Cell], _Written]:
    """The points of a grid, and the text on which they are measured."""
    refuse_hooks(model, "measuring the divergence")
    cells = grid.cells(model, tokenizer)
    for cell in cells:
        if cell.steering and cell.steering.location not in (None, "front"):
            raise ValueError(
                "the divergence is measured on prompts and what follows them: expected additions at"
                f" the front of the prompt, got addition_location={cell.steering.location!r}"
            )
        if cell.steering and (cell.steering.first or 0) < 0:
            raise ValueError(
                "the divergence is measured on prompts and what follows them: expected a"
                f" min_token_index counted from the front, got {cell.steering.first}"
            )
    bos = grid.bos(prepend_bos)
    return cells, _Written(model, tokenizer, prompts, new_tokens, bos, cells)


def _first_multiplier(text: _Written, vector: SteeringVector) -> float:
    """The multiplier of the first pass: a share of the hidden states, so that it is not too far."""
    modules = get_layers(text.model, vector.layer_type, None, list(vector.layer_activations))
    norms = text.norms({layer: (module, "output") for layer, module in modules.items()})
    lengths = dict(zip(modules, vector.norm().values(), strict=True))
    return min(_share(norms[layer], lengths[layer]) for layer in norms) / len(norms)


def _first_coefficients(text: _Written, cells: Sequence[Cell]) -> list[float]:
    """Likewise for each point of a grid."""
    steps = [(cell.row, *cell.row.more) for cell in cells if cell.row]
    sites = list(dict.fromkeys(step.site for row in steps for step in row))
    norms = text.norms({n: find_site(text.model, site) for n, site in enumerate(sites)})
    norm_of = {site: norms[number] for number, site in enumerate(sites)}

    def share(step: RowSteering) -> float:
        return _share(norm_of[step.site], step.vectors.float().norm(dim=-1).max().item())

    return [min(map(share, row)) / len(row) for row in steps]


def _times(cell: Cell, x: float) -> Cell:
    return replace(cell, coeff=cell.coeff * x)


def _share(norm: float, length: float) -> float:
    if not length:
        raise ValueError("a vector is 0: no multiplier of it does anything")
    return SHARE * norm / length


def _positive(value: float, name: str) -> float:
    found = finite_number(value, name)
    if found <= 0:
        raise ValueError(f"expected a {name} above 0, got {value!r}")
    return found


def _refuse_unreached(searches: Mapping[str, Search]) -> None:
    """Say what was found instead, of the first that did not get there."""
    lost = {name: one for name, one in searches.items() if not one.done}
    for name, one in lost.items():
        more = f" (and {len(lost) - 1} more like it)" if len(lost) > 1 else ""
        what = (
            f"no multiplier was found in {PASSES} passes at which {name} gives a KL of"
            f" {one.target:g}"
        )
        kls, (low, high) = dict(one.seen), one.bracket
        if high is None:
            x, kl = max(one.seen, key=itemgetter(1))
            raise ValueError(f"{what}: the largest that was found is {kl:.3g}, at {x:.3g}{more}")
        if low is None:
            raise ValueError(f"{what}: it is {kls[high]:.3g} even at {high:.3g}{more}")
        raise ValueError(
            f"{what}: it jumps from {kls[low]:.3g} at {low:.6g} to {kls[high]:.3g} at {high:.6g};"
            f" a larger tolerance may do{more}"
        )
