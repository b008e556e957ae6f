"""Contrastive weight steering: the difference of two fine-tunes, added to the weights for a while.

Source: "Steering Language Models with Weight Arithmetic" (Fierro and Roger 2025,
https://arxiv.org/abs/2511.05408).
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import finite_number
from common.learning.contrasts import Side, contrasts_of, logprobs_of, mean_over
from common.learning.descent import Descent, descend, with_gradients
from common.passes.hooks import refuse_hooks, uncompiled
from common.passes.running import in_evaluation_mode
from common.places.blocks import text_config
from common.tensor_parallel import refuse_split
from common.vectors.files import write_whole
from common.vectors.pairs import Sample, hash_of_pairs
from common.vectors.steering_vector import model_name

FINE_TUNE = Descent(steps=100, learning_rate=3e-4)
FORMAT = "weight_steering"


@dataclass(eq=False, repr=False)
class WeightSteering:
    """A direction in the space of weights.

    Attributes:
        differences: by the name of a parameter, as `model.named_parameters()` has it, a tensor of
            its shape: what fine-tuning on positive texts made of it, minus what fine-tuning on
            negative ones did. Those that did not move are left out.
        metadata: where it comes from.
    """

    differences: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Say on one line how much there is, and what it was made for."""
        numbers = sum(tensor.numel() for tensor in self.differences.values())
        model = f", made for {self.metadata['model']!r}" if self.metadata.get("model") else ""
        return (
            f"WeightSteering({len(self.differences)} parameters, {numbers:,} numbers,"
            f" length={self.norm():.3g}{model})"
        )

    def norm(self) -> float:
        """Return the length of all differences together."""
        return sum(float(t.double().norm()) ** 2 for t in self.differences.values()) ** 0.5

    @contextmanager
    def apply(self, model: nn.Module, multiplier: float = 1.0) -> Iterator[None]:
        """Add the differences to the weights while the block is open. THE MODEL IS CHANGED.

        Afterwards, also after an error, every parameter has the very memory back that it had
        before: nothing is computed backwards. Meanwhile the changed parameters take their memory
        twice. What is written into them inside the block is lost with it.

        Args:
            model: the model it was made for, or another one with the same parameters.
            multiplier: multiplies the differences; 0 changes nothing.

        Raises:
            ValueError: before anything changes: a parameter that the model does not have, or has
                in another shape, on no device, or quantised; a multiplier that is not finite, or
                that leads out of the dtype of the model.
        """
        multiplier = finite_number(multiplier, "multiplier")
        changed = self._changed(model, multiplier) if multiplier else {}
        before = {weight: weight.data for weight in changed}
        try:
            for weight, data in changed.items():
                weight.data = data
            yield
        finally:
            for weight, data in before.items():
                weight.data = data

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the differences to a safetensors file, with their metadata.

        Args:
            path: where to.
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: there is a file, and `overwrite` is False; it is kept.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.differences.items()}
        metadata = self.metadata | {"format": FORMAT}
        write_whole(path, overwrite, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "WeightSteering":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"{os.fspath(path)} is no safetensors file: {error}") from None
        if metadata.pop("format", None) != FORMAT:
            raise ValueError(f"{os.fspath(path)} holds no weight steering")
        return cls(tensors, metadata)

    def _changed(self, model: nn.Module, multiplier: float) -> dict[nn.Parameter, Tensor]:
        """The parameters that change, and what they change to."""
        refuse_split(model, "weight steering")
        named, changed = dict(model.named_parameters()), {}
        for name, difference in self.differences.items():
            weight = named.get(name)
            if weight is None or weight.shape != difference.shape:
                given = "none" if weight is None else f"one {list(weight.shape)}"
                raise ValueError(
                    f"expected a parameter {name} {list(difference.shape)}, and"
                    f" {type(model).__name__} has {given}"
                )
            if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
                raise ValueError(f"the parameter {name} is quantised or offloaded: load it whole")
            moved = weight.data.float() + multiplier * difference.to(weight.device).float()
            data = moved.to(weight.dtype)
            if not torch.isfinite(data).all():
                raise ValueError(
                    f"with a multiplier of {multiplier:g} the parameter {name} leaves"
                    f" {str(weight.dtype).removeprefix('torch.')}"
                )
            changed[weight] = data
        return changed


@with_gradients
def learn_weight_steering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_samples: Sequence[Sample],
    *,
    descent: Descent = FINE_TUNE,
    prepend_bos: bool | None = None,
    show_progress: bool = True,
) -> WeightSteering:
    """Learn a direction of the weights: fine-tuned on positive texts, minus on negative ones.

    Two copies of the model in fp32, one after the other, learn the tokens that count, with the same
    batches; all weights learn, where the paper trains adapters (LoRA). The model itself is never
    touched.

    Args:
        model: a causal language model; unchanged.
        tokenizer: its tokenizer.
        training_samples: contrast pairs of whole texts, as samples or tuples.
        descent: how long and how fast; the learning rate is absolute.
        prepend_bos: see `prompts.prompt_ids`.
        show_progress: show a bar for each of the two, if they take long.

    Returns:
        The direction, in fp32 on the CPU; `apply(multiplier=1)` adds the whole difference.

    Raises:
        ValueError: before anything is computed: pairs of which nothing counts, a text that is too
            long, a model that is steered already, split over processes, quantised or offloaded.
            Later: a loss that is not finite.
    """
    refuse_hooks(model, "learning weights")
    refuse_split(model, "learning weights")
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(f"the parameter {name} is quantised or offloaded: load it whole")
    contrasts = contrasts_of(model, tokenizer, training_samples, prepend_bos)
    ends, tuned = [], {}
    for side, name in zip(contrasts.sides, ("positive", "negative")):
        tuned[name], losses = _fine_tuned(model, side, descent, name, show_progress)
        ends.append(f"{losses[0]:.6g} to {losses[-1]:.6g}")
    differences = {
        name: weight - tuned["negative"][name] for name, weight in tuned["positive"].items()
    }
    metadata = {
        "model": model_name(model),
        "model_type": text_config(model).model_type,
        "pairs": str(len(contrasts)),
        "pairs_sha256": hash_of_pairs(contrasts.samples),
        "loss": "; ".join(ends),
        **{name: str(value) for name, value in asdict(descent).items()},
    }
    return WeightSteering({n: t for n, t in differences.items() if t.any()}, metadata)


def _fine_tuned(
    model: PreTrainedModel, side: Side, descent: Descent, name: str, show_progress: bool
) -> tuple[dict[str, Tensor], list[float]]:
    """The weights of a copy that learned one side, in fp32 on the CPU, and its losses."""
    learner = copy.deepcopy(model).float()
    weights = dict(learner.named_parameters())

    def loss_of(chosen: list[int], generator: torch.Generator) -> Tensor:
        return -mean_over(*logprobs_of(learner, side, chosen)).mean()

    with in_evaluation_mode(learner), uncompiled():
        for weight in weights.values():
            weight.requires_grad_(True)
        used = _used(learner, side, weights)
        title = f"Fine-tuning on {name} texts"
        losses = descend(loss_of, used, len(side.rows), descent, title, show_progress)
    return {name: weight.detach().cpu() for name, weight in weights.items()}, losses


def _used(model: PreTrainedModel, side: Side, weights: dict[str, nn.Parameter]) -> list[Tensor]:
    """The weights that take part in a loss; some models have others (a head for pictures)."""
    loss = mean_over(*logprobs_of(model, side, [0])).sum()
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return [weight for weight, one in zip(weights.values(), found) if one is not None]
