"""ReFT-r1: one direction that detects a concept and, as strongly as it was detected, writes it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import finite_number, integer
from common.learning.contrasts import Side, logprobs_of, mean_over
from common.learning.descent import Descent, with_gradients
from common.learning.vector import VectorTask
from common.passes.hooks import refuse_hooks
from common.passes.padding import pad_id, padded
from common.passes.prompts import Prompt, prompt_ids
from common.passes.recording import record_pass
from common.passes.running import in_evaluation_mode, input_device
from common.places.blocks import check_vector, get_block
from common.vectors.directions import random_directions
from common.vectors.pairs import Sample
from common.vectors.steering_vector import SteeringVector

BATCH = 32  # texts in one pass of `detect_concept`


@with_gradients
def learn_reft_r1(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_samples: Sequence[Sample],
    layer: int,
    *,
    top_k: int = 1,
    sparsity: float = 0.01,
    descent: Descent | None = None,
    prepend_bos: bool | None = None,
    show_progress: bool = True,
) -> SteeringVector:
    """Learn one direction w of norm 1 that both detects a concept in hidden states and writes it.

    What a token has of the concept is ReLU(h · w). While a positive text is read, the mean of its
    `top_k` largest is added along w at every token, and the loss is that of a language model: w has
    to fire where the concept is, so that writing it helps. What fires outside of the top k, and
    anything on a negative text, costs `sparsity` each, a weight that grows from 0 in a straight
    line.

    Source: ReFT-r1 of AxBench (Wu et al. 2025, https://arxiv.org/abs/2501.17148; `lsreft.py` of
    https://github.com/stanfordnlp/axbench). Taken over: the ReLU, the mean of the top k, the loss
    with its growing L1 term, the norm of 1, no bias, no detection at the first token. Other than
    there, the norm is held by normalising w where it is used instead of after each step; the
    negative texts take the place of texts without the concept, and nothing is written on them; what
    fires is measured in units of the hidden states; and detection at the first token is left out
    in learning, too.

    Args:
        model, tokenizer, training_samples, layer, prepend_bos, show_progress: as for
            `learn_likelihood_vector`.
        top_k: how many tokens of a text make up what is written; fewer where a text is shorter.
        sparsity: the weight of the L1 term at the end.
        descent: how long and how fast; by default `Descent()`. Its seed also draws the first w.

    Returns:
        w times the largest mean of a positive text, as AxBench steers: at `multiplier=1` the
        concept is written as strongly as it was ever detected. `detect_concept` detects by it.

    Raises:
        ValueError: as `learn_likelihood_vector`; a `top_k` below 1, a negative `sparsity`; a
            direction that never fires on a positive text: another seed begins elsewhere.
    """
    descent, top_k = descent or Descent(), integer(top_k, "top_k", 1)
    if finite_number(sparsity, "sparsity") < 0:
        raise ValueError(f"expected 0 or more as sparsity, got {sparsity!r}")
    task = VectorTask(model, tokenizer, training_samples, layer, prepend_bos)
    start = random_directions(task.d_model, seed=descent.seed)[0] * task.d_model**0.5
    seen = 0

    def loss_of(chosen: list[int], generator: torch.Generator) -> Tensor:
        nonlocal seen
        weight, seen = sparsity * seen / descent.steps, seen + 1
        return rank_one_loss(task, normalize(start, dim=0), chosen, top_k, weight)

    losses = task.learn(start, loss_of, descent, "Learning a direction", show_progress)
    direction = normalize(start, dim=0)
    found = _detected(task.model, task.block, direction, task.contrasts.sides[0], top_k)
    if not found.max() > 0:
        raise ValueError(
            "the direction fires on none of the positive texts: try another seed or more steps"
        )
    more = {"top_k": top_k, "sparsity": sparsity}
    return task.result(found.max().cpu() * direction, "reft_r1", descent, losses, **more)


def rank_one_loss(
    task: VectorTask, direction: Tensor, chosen: Sequence[int], top_k: int, sparsity: float
) -> Tensor:
    """Return the loss of some pairs, a mean over the pairs.

    Args:
        task: what is learned from.
        direction: w, [d_model], of norm 1.
        chosen: the numbers of the pairs.
        top_k: how many tokens of a positive text count in what is written.
        sparsity: the weight of what fires beside them, in units of the hidden states.
    """
    positive, negative = task.contrasts.sides
    device, fired = input_device(task.model), list[Latents]()
    mask = positive.inputs(chosen, device)[0]["attention_mask"]

    def written(hidden: Tensor, vector: Tensor) -> Tensor:
        fired.append(latents(hidden, vector.flatten(), mask, top_k))
        return fired[-1].mean[:, None, None] * vector

    with task.steering(direction).apply(task.model, operator=written):
        losses = -mean_over(*logprobs_of(task.model, positive, chosen))
    beside = fired[0].beside
    if sparsity:
        beside = beside + _fired_in_all(task, direction, negative.inputs(chosen, device)[0])
    return (losses + sparsity / task.scale * beside.to(losses)).mean()


def _fired_in_all(task: VectorTask, direction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The sum of what fires in each text, [text]; no block after the layer is run."""

    def keep(_: int, hidden: Tensor) -> Tensor:
        found = latents(hidden, direction.to(hidden.device), inputs["attention_mask"], 1)
        return found.mean + found.beside

    run = partial(task.model, **inputs, use_cache=False)
    return record_pass(run, {0: (task.block, "output")}, keep)[0]


class Latents(NamedTuple):
    """What texts have of a direction: `mean` of the top k, and the sum `beside` them, [text]."""

    mean: Tensor
    beside: Tensor


def latents(hidden: Tensor, direction: Tensor, mask: Tensor, top_k: int) -> Latents:
    """Return what fires along a direction [d_model].

    The first token of a text is left out, whose hidden states are far longer than others' in many
    models; and so is padding.

    Args:
        hidden: [text, pos, d_model].
        direction: of norm 1.
        mask: which tokens are there, [text, pos].
        top_k: how many count in the mean; all of a text that has fewer.
    """
    real = mask.bool().to(hidden.device)
    real = real & (real.long().cumsum(-1) > 1)
    fired = torch.relu(hidden.float() @ direction.float()).masked_fill(~real, 0.0)
    counts = real.sum(-1).clamp(min=1, max=top_k)
    top = fired.topk(min(top_k, fired.shape[-1]), dim=-1).values.sum(-1)
    return Latents(top / counts, fired.sum(-1) - top)


def detect_concept(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    texts: Sequence[Prompt],
    *,
    top_k: int = 1,
    prepend_bos: bool | None = None,
) -> Tensor:
    """Say how much of a concept texts have: the mean of the `top_k` largest ReLU(h · w) of each.

    w is the direction of the vector. It is what ReFT-r1 detects by, and works with any vector of
    one layer.

    Args:
        model: a causal language model, unsteered; unchanged.
        tokenizer: its tokenizer.
        vector: of one layer, after a block.
        texts: what is read. The first token of each does not count.
        top_k: how many tokens of a text count.
        prepend_bos: see `prompts.prompt_ids`.

    Returns:
        [text], in fp32 on the CPU; 0 where nothing fires, and for a text of one token.

    Raises:
        ValueError: a vector of several layers, or of a part of a block, or one that is 0; a model
            that is steered; no texts; what `prompt_ids` raises.
    """
    if len(vector.layers) != 1 or vector.layer_type != "decoder_block":
        raise ValueError(f"expected a vector after one block, got {vector!r}")
    top_k = integer(top_k, "top_k", 1)
    refuse_hooks(model, "detecting a concept")
    (layer,), (direction,) = vector.layers, vector.unit().layer_activations.values()
    check_vector(model, layer, direction)
    rows = prompt_ids(tokenizer, texts, prepend_bos)
    if not all(rows):
        raise ValueError("expected texts of one token or more, got an empty one")
    side = Side(rows, [0] * len(rows), pad_id(tokenizer))
    return _detected(model, get_block(model, layer), direction, side, top_k).cpu()


@torch.no_grad()
def _detected(
    model: PreTrainedModel, block: nn.Module, direction: Tensor, side: Side, top_k: int
) -> Tensor:
    """The mean of the top k of each text, [text]."""
    found = []
    for start in range(0, len(side.rows), BATCH):
        inputs = padded(side.rows[start : start + BATCH], side.pad, side="right")
        inputs = inputs.to(input_device(model))

        def keep(_: int, hidden: Tensor, mask: Tensor = inputs["attention_mask"]) -> Tensor:
            return latents(hidden, direction.to(hidden.device), mask, top_k).mean

        with in_evaluation_mode(model):
            run = partial(model, **inputs, use_cache=False)
            found.append(record_pass(run, {0: (block, "output")}, keep)[0])
    return torch.cat(found)
