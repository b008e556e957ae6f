"""What the losses for a vector share: where it acts, its scale, and what is noted with it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.learning.contrasts import Contrasts, contrasts_of
from common.learning.descent import Descent, Loss, descend, frozen
from common.passes.hooks import refuse_hooks, uncompiled
from common.passes.recording import record_pass
from common.passes.running import in_evaluation_mode, input_device
from common.places.blocks import get_block, text_config
from common.tensor_parallel import refuse_split
from common.vectors.pairs import Sample, hash_of_pairs
from common.vectors.steering_vector import SteeringVector, model_name

MEASURED = 64  # texts on which the scale of the hidden states is measured


class VectorTask:
    """A vector that is to be learned: what from, where, and in which units.

    Args:
        model, tokenizer, training_samples, prepend_bos: see `contrasts_of`.
        layer: the block after which it is added.

    Attributes:
        contrasts: the pairs.
        scale: what a number of a hidden state is typically, at this layer.

    Raises:
        ValueError: what `contrasts_of` raises; no such layer; a model that is steered already, or
            split over processes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        training_samples: Sequence[Sample],
        layer: int,
        prepend_bos: bool | None,
    ):
        block = get_block(model, layer)
        refuse_hooks(model, "learning a vector")
        refuse_split(model, "learning a vector")
        self.model, self.layer, self.block = model, layer, block
        self.contrasts: Contrasts = contrasts_of(model, tokenizer, training_samples, prepend_bos)
        self.d_model = text_config(model).hidden_size
        self.scale = self._scale()

    def learn(
        self, start: Tensor, loss_of: Loss, descent: Descent, title: str, show_progress: bool
    ) -> list[float]:
        """Let a loss fall by changing `start` [d_model], in place; the model stays as it is."""
        with in_evaluation_mode(self.model), frozen(self.model), uncompiled():
            start.requires_grad_(True)
            losses = descend(loss_of, [start], len(self.contrasts), descent, title, show_progress)
        start.requires_grad_(False)
        start.grad = None
        return losses

    def steering(self, vector: Tensor) -> SteeringVector:
        """Return a vector [d_model], with gradients, as what steers the layer."""
        return SteeringVector({self.layer: vector})

    def result(
        self, vector: Tensor, method: str, descent: Descent, losses: list[float], **more: Any
    ) -> SteeringVector:
        """Return what was learned, with where it comes from."""
        if not vector.any():
            raise ValueError("nothing was learned: the vector is 0")
        metadata = {
            "model": model_name(self.model),
            "model_type": text_config(self.model).model_type,
            "pairs": str(len(self.contrasts)),
            "pairs_sha256": hash_of_pairs(self.contrasts.samples),
            "method": method,
            "loss": f"{losses[0]:.6g} to {losses[-1]:.6g}",
            **{name: str(value) for name, value in (asdict(descent) | more).items()},
        }
        device = input_device(self.model)
        return SteeringVector({self.layer: vector.detach().to(device)}, metadata=metadata)

    @torch.no_grad()
    def _scale(self) -> float:
        """The median length of the hidden states, since a few tokens are far longer, by width."""
        chosen = range(min(MEASURED, len(self.contrasts)))
        inputs, _ = self.contrasts.sides[0].inputs(chosen, input_device(self.model))
        real = inputs["attention_mask"].bool()
        with in_evaluation_mode(self.model):
            found = record_pass(
                lambda: self.model(**inputs, use_cache=False),
                {0: (self.block, "output")},
                lambda _, hidden: hidden.float().norm(dim=-1)[real.to(hidden.device)].median(),
            )
        scale = found[0].item() / self.d_model**0.5
        if not 0 < scale < math.inf:
            raise ValueError(
                f"expected hidden states of finite length after block {self.layer}, got {scale}"
            )
        return scale


def learn_addition(
    task: VectorTask,
    loss_of: Callable[[Tensor, list[int], torch.Generator], Tensor],
    descent: Descent,
    title: str,
    show_progress: bool,
) -> tuple[Tensor, list[float]]:
    """Learn a vector from 0 on: `loss_of` takes it, [d_model], beside the numbers of pairs."""
    start = torch.zeros(task.d_model)
    losses = task.learn(
        start,
        lambda chosen, generator: loss_of(task.scale * start, chosen, generator),
        descent,
        title,
        show_progress,
    )
    return task.scale * start, losses
