"""What a sweep computes, batch by batch: completions of prompts, or predictions along them."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.passes.hooks import refuse_hooks
from common.passes.running import in_evaluation_mode
from common.places.blocks import get_hidden
from common.scaling.units import Completion, CompletionJob, Job, Unit, Work
from common.sweeping.grid import Cell
from common.sweeping.rows import at_once, later, row_deltas, steered_after, steering_rows
from common.sweeping.skipping import Recorded, logits_from, prefilled_cache, record_blocks
from common.sweeping.texts import Texts
from common.texts.generation import completions, real_tokens
from common.texts.sampling import Sampling, sample

MEMORY = 2**30  # bytes that a batch may take, about
Row = dict[str, Any]
Rows = dict[int, Row]
# Rows from steered and unsteered logits [row, pos, vocab] and the inputs [row, pos].
Measured = Callable[[Tensor, Tensor, Mapping[str, Tensor]], list[Row]]


class Run(Job[Rows], ABC):
    """Rows by number: how many there are, and the units in which they are computed."""

    texts: Texts

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def units(self, done: Collection[int]) -> list[Unit]:
        """Cut the rows that are not done into units, in the order in which they are computed."""

    @abstractmethod
    def compute(self, unit: Unit) -> Rows:
        """Compute the rows of a unit."""

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Work[Rows]:
        """Return what computes a unit on a model; see `Job`."""
        own: Any = self
        if model is not self.texts.model:  # in another process
            refuse_hooks(model, "a sweep")
            own = replace(own, texts=self.texts.on(model, tokenizer))

        def work(unit: Unit) -> Rows:
            with in_evaluation_mode(model):
                return own.compute(unit)

        return work


@dataclass(frozen=True)
class Completing(Run, CompletionJob[Rows]):
    """Completions of prompts at every cell; rows are numbered by cell, prompt and sample.

    Args:
        runner: what computes them in place of transformers, as the rows name it; None if nothing.
    """

    texts: Texts
    cells: Sequence[Cell]
    sampling: Sampling
    per_prompt: int
    seed: int
    max_memory: int
    runner: str | None = None

    def __len__(self) -> int:
        return len(self.cells) * len(self.texts) * self.per_prompt

    def settings(self) -> dict[str, Any]:
        """Return what the completions depend on, beside model, prompts and steering."""
        more = {} if self.runner is None else {"runner": self.runner}
        return {"per_prompt": self.per_prompt, "seed": self.seed, **asdict(self.sampling), **more}

    def units(self, done: Collection[int]) -> list[Unit]:
        """Cut the rows that are not done into batches, prompts of like length together."""
        pending = [number for number in range(len(self)) if number not in done]
        if not pending:
            return []
        _ = self.texts.prefills  # measured here, for all who compute a unit
        length = max(self.texts.lengths) + self.sampling.max_new_tokens
        cost = self.texts.bytes_of(length) + 16 * self.texts.vocabulary
        # Little is padded then.
        pending.sort(key=lambda number: self.texts.lengths[self._place(number)[1]])
        batches = self.texts.batches(
            pending, max(1, self.max_memory // cost), lambda number: self._place(number)[1]
        )
        return [Unit(tuple(numbers)) for numbers in batches]

    def halves(self, unit: Unit) -> list[Unit]:
        """Return a unit in two; see `Job`."""
        return [Unit(numbers) for numbers in unit.split()]

    def describe(self, number: int) -> str:
        """Say which row a number is."""
        cell, prompt, sample = self._place(number)
        return described(self.cells[cell], self.texts.shown[prompt], sample)

    def compute(self, unit: Unit) -> Rows:
        """Compute the rows of a unit, one batch."""
        places = [self._place(number) for number in unit.numbers]
        model, inputs = self.texts.model, self.texts.inputs([prompt for _, prompt, _ in places])
        steering = [self.cells[cell].row for cell, _, _ in places]
        cache = prefilled_cache(model, inputs, steering) if self.texts.prefills else None
        seeds = [(self.seed, prompt, number) for _, prompt, number in places]
        with steering_rows(model, steering):
            ids = sample(model, inputs, seeds, self.sampling, past_key_values=cache)
        found = completions(self.texts.tokenizer, inputs, ids, real_tokens(model, inputs, ids))
        return self.rows(unit, found)

    def rows(self, unit: Unit, texts: Sequence[str]) -> Rows:
        """Return the rows of a unit, given its completions."""
        found = {}
        for number, text in zip(unit.numbers, texts, strict=True):
            cell, prompt, sample_number = self._place(number)
            found[number] = {
                **self.cells[cell].keys(),
                "prompt": self.texts.shown[prompt],
                "sample": sample_number,
                "completion": text,
                **({} if self.runner is None else {"runner": self.runner}),
            }
        return found

    def vectors(self) -> dict[str, tuple[dict[int, Tensor], float]]:
        """Return what is added, by name; see `CompletionJob`."""
        found: dict[str, tuple[dict[int, Tensor], float]] = {}
        for cell in self.cells:
            one = cell.steering
            if one is None:
                continue
            if one.part != "resid_post" or (one.location, one.operator, one.first) != (None,) * 3:
                raise ValueError(
                    f"{self.runner} steers by vectors that are added after a block, at all tokens:"
                    f" {one.name!r} is something else"
                )
            most = max(abs(cell.coeff), found.get(one.name, ({}, 0.0))[1])
            layers = {layer: rows[0].float().cpu() for layer, rows in one.vectors.items()}
            found[one.name] = layers, most
        return found

    def sampling_options(self) -> dict[str, Any]:
        """Return how the texts are drawn; see `CompletionJob`."""
        return asdict(self.sampling)

    def asked(self, unit: Unit) -> list[Completion]:
        """Return the texts of a unit; see `CompletionJob`."""
        found = []
        for number in unit.numbers:
            place, prompt, sample_number = self._place(number)
            cell = self.cells[place]
            steering = None
            if cell.steering is not None:
                layers = sorted(cell.steering.vectors) if cell.layer is None else [cell.layer]
                steering = cell.steering.name, cell.coeff, layers
            seed = self.seed, prompt, sample_number
            found.append(Completion(self.texts.rows[prompt], steering, seed))
        return found

    def _place(self, number: int) -> tuple[int, int, int]:
        """Cell, prompt and sample of a row."""
        rest, sample_number = divmod(number, self.per_prompt)
        return *divmod(rest, len(self.texts)), sample_number


@dataclass(frozen=True)
class Predicting(Run):
    """Passes over texts at every cell; blocks below the steered one run once for each text.

    A unit is one batch, steered after one block; beside it stand the texts that the unsteered pass
    reads, all whose rows follow from this pass. It is kept for the next units on the same texts.

    Args:
        texts: what is read.
        cells: how it is steered; rows are numbered cell by cell, text by text.
        column: the title of the texts.
        measured: what is measured of a batch.
        keep: how many last positions are measured; 0 is all.
        max_memory: how many bytes a batch may take, about.
    """

    texts: Texts
    cells: Sequence[Cell]
    column: str
    measured: Measured
    keep: int
    max_memory: int
    _unsteered: dict[tuple[int, ...], tuple[BatchEncoding, Recorded]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.cells) * len(self.texts)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was computed to the process that computed it."""
        return {**vars(self), "_unsteered": {}}

    def units(self, done: Collection[int]) -> list[Unit]:
        """Cut the rows that are not done into batches, texts of like length together."""
        if len(done) == len(self):
            return []
        _ = self.texts.skips  # measured here, for all who compute a unit
        lengths, config = self.texts.lengths, self.texts.model.config.get_text_config()
        # As many texts as can be kept at every layer.
        kept = 4 * config.hidden_size * config.num_hidden_layers * max(lengths)
        size = self.max_memory // (kept + self._bytes(max(lengths)))
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return [
            Unit(tuple(numbers), tuple(texts))
            for texts in self.texts.batches(order, max(1, size), int)
            for numbers in self._over(texts, done)
        ]

    def halves(self, unit: Unit) -> list[Unit]:
        """Return a unit in two, neither of which reads a text that it does not need."""
        return [
            Unit(numbers, tuple(dict.fromkeys(self._place(number)[1] for number in numbers)))
            for numbers in unit.split()
        ]

    def describe(self, number: int) -> str:
        """Say which row a number is."""
        cell, text = self._place(number)
        return described(self.cells[cell], self.texts.shown[text])

    def compute(self, unit: Unit) -> Rows:
        """Compute the rows of a unit from an unsteered pass over the texts beside it."""
        inputs, plain = self._pass(unit.beside)
        places = [self._place(number) for number in unit.numbers]
        index = {text: number for number, text in enumerate(unit.beside)}
        chosen = torch.tensor([index[text] for _, text in places])
        part = {name: values[chosen] for name, values in inputs.items()}
        cells, unsteered = [self.cells[cell] for cell, _ in places], plain.logits[chosen]
        after = steered_after(cells[0].row)
        steered = unsteered if after is None else self._steered(cells, after, chosen, part, plain)
        found = self.measured(steered, unsteered, part)
        return {
            number: {**cell.keys(), self.column: self.texts.shown[text], **row}
            for number, cell, (_, text), row in zip(unit.numbers, cells, places, found, strict=True)
        }

    def _place(self, number: int) -> tuple[int, int]:
        """Cell and text of a row."""
        return divmod(number, len(self.texts))

    def _bytes(self, length: int) -> int:
        """About how much memory a pass over a text takes."""
        positions = self.keep or length
        return self.texts.bytes_of(length) + 12 * self.texts.vocabulary * positions

    def _over(self, texts: Sequence[int], done: Collection[int]) -> Iterator[list[int]]:
        """The rows of some texts that are not done, in batches steered after the same block."""
        groups: dict[int | None, list[int]] = defaultdict(list)
        for cell, text in product(range(len(self.cells)), texts):
            if (number := cell * len(self.texts) + text) not in done:
                groups[self._after[cell]].append(number)
        longest = max(self.texts.lengths[text] for text in texts)
        size = max(1, self.max_memory // self._bytes(longest))
        for group in groups.values():
            yield from self.texts.batches(group, size, lambda number: self._place(number)[1])

    @cached_property
    def _after(self) -> list[int | None]:
        """The blocks after which the cells are steered."""
        return [steered_after(cell.row) for cell in self.cells]

    def _pass(self, texts: tuple[int, ...]) -> tuple[BatchEncoding, Recorded]:
        """The unsteered pass over some texts, with what blocks gave where a cell is steered."""
        if texts not in self._unsteered:
            self._unsteered.clear()
            inputs = self.texts.inputs(texts)
            layers = {layer for layer in self._after if layer is not None and layer >= 0}
            layers = sorted(layers) if self.texts.skips else []
            recorded = record_blocks(self.texts.model, inputs, layers, self.keep)
            self._unsteered[texts] = inputs, recorded
        return self._unsteered[texts]

    @torch.no_grad()
    def _steered(
        self,
        cells: Sequence[Cell],
        layer: int,
        chosen: Tensor,
        inputs: Mapping[str, Tensor],
        plain: Recorded,
    ) -> Tensor:
        """The logits of rows steered after one block; `chosen` are their texts in `plain`."""
        model, steering = self.texts.model, [cell.row for cell in cells]
        if layer not in plain.outputs:
            with steering_rows(model, steering):
                return record_blocks(model, inputs, [], self.keep).logits
        output = plain.outputs[layer]
        hidden = get_hidden(output)[chosen]
        steered = hidden + row_deltas(at_once(steering), hidden, inputs)
        with steering_rows(model, later(steering)):
            return logits_from(model, inputs, layer, output, steered, self.keep)


def described(cell: Cell, text: str, sample_number: int = 0) -> str:
    """Say which row this is, as messages name it."""
    times = f" times {cell.coeff:g}" if cell.steering else ""
    more = f", sample {sample_number}" if sample_number else ""
    return f"{cell}{times} on {text!r}{more}"
