"""Gradient descent on something small beside a model that stays as it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from common.arguments import finite_number, integer
from common.progress import progress_bar

Loss = Callable[[list[int], torch.Generator], Tensor]


@dataclass(frozen=True)
class Descent:
    """How long something is learned, and how fast.

    AdamW takes the steps, and their size falls to 0 in a straight line. The pairs come in an order
    that the seed decides, all of them before one comes again.

    Attributes:
        steps: how many steps.
        batch_size: pairs in each step, at most all.
        learning_rate: the size of the first step, about. For a vector it is in units of the hidden
            states, so that it fits models of any scale: 0.05 moves each number of the vector by a
            twentieth of what a number of a hidden state is typically. For weights it is absolute.
        weight_decay: of AdamW.
        seed: of the order of the pairs, and of what else is drawn.

    Raises:
        ValueError: a number out of its range, or none at all.
    """

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 0.05
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        integer(self.steps, "steps", 1)
        integer(self.batch_size, "batch_size", 1)
        integer(self.seed, "seed")
        if finite_number(self.learning_rate, "learning_rate") <= 0:
            raise ValueError(f"expected a learning_rate above 0, got {self.learning_rate!r}")
        if finite_number(self.weight_decay, "weight_decay") < 0:
            raise ValueError(f"expected a weight_decay of 0 or more, got {self.weight_decay!r}")


def descend(
    loss_of: Loss,
    learned: Sequence[Tensor],
    count: int,
    descent: Descent,
    title: str,
    show_progress: bool,
) -> list[float]:
    """Change tensors, in place, so that a loss falls. No other tensor gets a gradient.

    Args:
        loss_of: of the pairs with some numbers; what it draws, it draws from the generator.
        learned: the tensors.
        count: how many pairs there are.
        descent: how.
        title: of the bar.
        show_progress: show a bar.

    Returns:
        The loss before each step.

    Raises:
        ValueError: the loss is nan or inf at some step: the steps are too long.
    """
    generator, losses = torch.Generator().manual_seed(descent.seed), []
    batches = _batches(count, min(descent.batch_size, count), generator)
    optimizer = torch.optim.AdamW(
        learned, lr=descent.learning_rate, weight_decay=descent.weight_decay
    )
    with progress_bar(descent.steps, title, "step", show_progress) as bar:
        for step in range(descent.steps):
            loss = loss_of(next(batches), generator)
            losses.append(loss.item())
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss is {losses[-1]} at step {step}, from {losses[0]:.4g} at the first:"
                    f" expected a learning_rate below {descent.learning_rate:g}"
                )
            for tensor, gradient in zip(learned, torch.autograd.grad(loss, learned)):
                tensor.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = descent.learning_rate * (1 - step / descent.steps)
            optimizer.step()
            bar.update()
    return losses


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Numbers of pairs without end: all in a new order, again and again, cut into batches."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def with_gradients(function: Callable) -> Callable:
    """Let a function compute gradients, whatever `no_grad` or `inference_mode` its caller is in."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return run


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let the weights of a model ask for no gradient; those that did do so again afterwards.

    Blocks below what is learned then need no graph.
    """
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in asking:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)
