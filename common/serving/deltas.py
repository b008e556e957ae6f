"""What is added to the rows of a step, for each layer [rows, d_model].

Every layer adds one matrix, however many vectors a step has: the rows of all of them lie in a table
whose last row is 0, and each row of the step takes one of the table. A step of a token per request,
in which nothing changed, takes the matrices of the step before.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.serving.offers import ScaledRows
from common.serving.slices import Run


class Deltas:
    """Makes and keeps the matrices of a step.

    Args:
        rows: the numbers, by name, coefficient and layer.
    """

    def __init__(self, rows: ScaledRows):
        self.rows = rows
        self.key: tuple | None = None
        self.by_layer: dict[int, Tensor] = {}

    def of_step(self, runs: Sequence[Run], rows: int) -> dict[int, Tensor]:
        """Return by layer what is added, [rows, d_model]; only layers that are steered.

        Args:
            runs: the rows that are steered.
            rows: how many the step has.
        """
        key = (rows, *(_what_matters(run) for run in runs))
        if key != self.key:
            layers = sorted({layer for run in runs for layer in run.steering.layers})
            self.by_layer = {layer: self._of_layer(layer, runs, rows) for layer in layers}
            self.key = key
        return self.by_layer

    def _of_layer(self, layer: int, runs: Sequence[Run], rows: int) -> Tensor:
        table: list[Tensor] = []
        first: dict[tuple[str, float], int] = {}
        size = 0
        chosen = np.full(rows, -1)  # the last row of the table
        for run in runs:
            steering = run.steering
            if layer not in steering.layers:
                continue
            what = steering.name, steering.coeff
            if what not in first:
                table.append(self.rows.get(*what, layer))
                first[what] = size
                size += len(table[-1])
            place = slice(run.row, run.row + run.length)
            if steering.end is None:
                chosen[place] = first[what]
            else:
                chosen[place] = first[what] + np.arange(run.position, run.position + run.length)
        zero = torch.zeros_like(table[0][:1])
        return torch.cat([*table, zero])[torch.from_numpy(chosen).to(zero.device)]


def _what_matters(run: Run) -> tuple:
    """Return what the matrices depend on: of a vector not the position."""
    steering = run.steering
    position = None if steering.end is None else run.position
    return steering.name, steering.coeff, steering.layers, run.row, run.length, position


def add_to_output(output: Tensor | tuple, delta: Tensor) -> Tensor | tuple:
    """Return the output of a layer with a matrix added to its residual stream.

    Layers of GPT-2 return the stream, [rows, d_model]. Those of Llama, Qwen and Gemma return
    (hidden, residual), whose sum is the stream: the next norm adds them. What is added to one of
    them is added to the sum.

    Args:
        output: of a decoder layer of vLLM. It may have more rows than the step, which are padding.
        delta: [rows, d_model].

    Raises:
        ValueError: neither a tensor nor a pair of tensors [rows, d_model] with rows for all of
            delta.
    """
    parts: list = list(output) if isinstance(output, tuple) else [output]
    if not 1 <= len(parts) <= 2 or not all(
        isinstance(part, Tensor)
        and part.dim() == 2
        and part.shape[1] == delta.shape[1]
        and len(part) >= len(delta)
        for part in parts
    ):
        given = [list(part.shape) if isinstance(part, Tensor) else part for part in parts]
        raise ValueError(
            f"expected the stream or (hidden, residual) of shape {list(delta.shape)}, got {given}"
        )
    if len(parts[0]) > len(delta):
        delta = functional.pad(delta, (0, 0, 0, len(parts[0]) - len(delta)))
    steered = parts[0] + delta
    return (steered, *parts[1:]) if isinstance(output, tuple) else steered
