"""What a sweep computes, batch by batch: completions of prompts, or predictions along them."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from common.places.blocks import get_hidden
from common.sweeping.grid import Cell
from common.sweeping.rows import row_deltas, steered_after, steering_rows
from common.sweeping.skipping import (
    Recorded,
    can_prefill,
    can_skip_blocks,
    logits_from,
    prefilled_cache,
    record_blocks,
)
from common.sweeping.texts import Texts
from common.texts.generation import completions, real_tokens
from common.texts.sampling import Sampling, sample

MEMORY = 2**30  # bytes that a batch may take, about
Row = dict[str, Any]
# Rows from steered and unsteered logits [row, pos, vocab] and the inputs [row, pos].
Measured = Callable[[Tensor, Tensor, Mapping[str, Tensor]], list[Row]]


class Run(Protocol):
    """Rows by number: how many there are, and those that are not done yet, in batches."""

    def __len__(self) -> int: ...

    def batches(self, done: set[int]) -> Iterator[dict[int, Row]]:
        """Compute the rows that are not done."""
        ...


@dataclass(frozen=True)
class Completing:
    """Completions of prompts at every cell; rows are numbered by cell, prompt and sample."""

    texts: Texts
    cells: Sequence[Cell]
    sampling: Sampling
    per_prompt: int
    seed: int
    max_memory: int

    def __len__(self) -> int:
        return len(self.cells) * len(self.texts) * self.per_prompt

    def settings(self) -> dict[str, Any]:
        """Return what the completions depend on, beside model, prompts and steering."""
        return {"per_prompt": self.per_prompt, "seed": self.seed, **asdict(self.sampling)}

    def batches(self, done: set[int]) -> Iterator[dict[int, Row]]:
        """Compute the rows that are not done."""
        plan = list(product(self.cells, range(len(self.texts)), range(self.per_prompt)))
        pending = sorted(set(range(len(plan))) - done)
        if not pending:
            return
        shared, new = (
            can_prefill(self.texts.model, self.texts.samples),
            self.sampling.max_new_tokens,
        )
        cost = self.texts.bytes_of(max(self.texts.lengths) + new) + 16 * self.texts.vocabulary
        # Prompts of like length together, so that little is padded.
        pending.sort(key=lambda number: self.texts.lengths[plan[number][1]])
        for numbers in self.texts.batches(
            pending, max(1, self.max_memory // cost), lambda number: plan[number][1]
        ):
            yield dict(zip(numbers, self._rows([plan[number] for number in numbers], shared)))

    def _rows(self, rows: Sequence[tuple[Cell, int, int]], shared: bool) -> list[Row]:
        """Rows of (cell, prompt, sample); `shared`: prompts may be read once for all their rows."""
        model, inputs = self.texts.model, self.texts.inputs([prompt for _, prompt, _ in rows])
        steering = [cell.row for cell, _, _ in rows]
        cache = prefilled_cache(model, inputs, steering) if shared else None
        seeds = [(self.seed, prompt, number) for _, prompt, number in rows]
        with steering_rows(model, steering):
            ids = sample(model, inputs, seeds, self.sampling, past_key_values=cache)
        found = completions(self.texts.tokenizer, inputs, ids, real_tokens(model, inputs, ids))
        return [
            {
                **cell.keys(),
                "prompt": self.texts.shown[prompt],
                "sample": number,
                "completion": text,
            }
            for (cell, prompt, number), text in zip(rows, found, strict=True)
        ]


@dataclass(frozen=True)
class Predicting:
    """Passes over texts at every cell; blocks below the steered one run once for each text.

    Args:
        texts: what is read.
        cells: how it is steered; rows are numbered cell by cell, text by text.
        column: the title of the texts.
        measured: what is measured of a batch.
        last_only: whether the logits of the last position will do.
        max_memory: how many bytes a batch may take, about.
    """

    texts: Texts
    cells: Sequence[Cell]
    column: str
    measured: Measured
    last_only: bool
    max_memory: int

    def __len__(self) -> int:
        return len(self.cells) * len(self.texts)

    def batches(self, done: set[int]) -> Iterator[dict[int, Row]]:
        """Compute the rows that are not done."""
        if len(done) == len(self):
            return
        lengths, config = self.texts.lengths, self.texts.model.config.get_text_config()
        skips = can_skip_blocks(self.texts.model, self.texts.samples)
        # Texts of like length together, as many as can be kept at every layer.
        kept = 4 * config.hidden_size * config.num_hidden_layers * max(lengths)
        size = self.max_memory // (kept + self._bytes(max(lengths)))
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for texts in self.texts.batches(order, max(1, size), int):
            pending = [
                (cell, text)
                for cell, text in product(range(len(self.cells)), texts)
                if self._number(cell, text) not in done
            ]
            if pending:
                yield from self._over(texts, pending, skips)

    def _number(self, cell: int, text: int) -> int:
        return cell * len(self.texts) + text

    def _bytes(self, length: int) -> int:
        """About how much memory a pass over a text takes."""
        positions = 1 if self.last_only else length
        return self.texts.bytes_of(length) + 12 * self.texts.vocabulary * positions

    def _over(
        self, texts: Sequence[int], pending: Sequence[tuple[int, int]], skips: bool
    ) -> Iterator[dict[int, Row]]:
        """Compute pending rows (cell, text) of some texts after one unsteered pass over these."""
        inputs = self.texts.inputs(texts)
        groups: dict[int | None, list[tuple[int, int]]] = defaultdict(list)
        for cell, text in pending:
            groups[steered_after(self.cells[cell].row)].append((cell, text))
        layers = [layer for layer in groups if layer is not None and layer >= 0] if skips else []
        plain = record_blocks(self.texts.model, inputs, sorted(layers), self.last_only)
        place = {text: index for index, text in enumerate(texts)}
        size = max(1, self.max_memory // self._bytes(inputs["input_ids"].shape[1]))
        for layer, group in groups.items():
            for rows in self.texts.batches(group, size, itemgetter(1)):
                chosen = torch.tensor([place[text] for _, text in rows])
                part = {name: values[chosen] for name, values in inputs.items()}
                cells, unsteered = [self.cells[cell] for cell, _ in rows], plain.logits[chosen]
                steered = (
                    unsteered if layer is None else self._steered(cells, layer, chosen, part, plain)
                )
                found = self.measured(steered, unsteered, part)
                yield {
                    self._number(cell, text): {
                        **self.cells[cell].keys(),
                        self.column: self.texts.shown[text],
                        **row,
                    }
                    for (cell, text), row in zip(rows, found, strict=True)
                }

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
                return record_blocks(model, inputs, [], self.last_only).logits
        output = plain.outputs[layer]
        hidden = get_hidden(output)[chosen]
        steered = hidden + row_deltas(steering, hidden, inputs)
        return logits_from(model, inputs, layer, output, steered, self.last_only)
