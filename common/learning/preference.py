"""BiPO: a vector learned from preferences, which turns them around when its sign is turned."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import finite_number
from common.learning.contrasts import logprobs_of, sum_over
from common.learning.descent import Descent, with_gradients
from common.learning.vector import VectorTask, learn_addition
from common.passes.running import in_evaluation_mode
from common.vectors.pairs import Sample
from common.vectors.steering_vector import SteeringVector


@with_gradients
def learn_bipo_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_samples: Sequence[Sample],
    layer: int,
    *,
    beta: float = 0.1,
    descent: Descent | None = None,
    prepend_bos: bool | None = None,
    show_progress: bool = True,
) -> SteeringVector:
    """Learn the vector that makes a frozen model prefer one text to the other, and reversed.

    For a pair a sign d is drawn, +1 or -1, and d times the vector is added at every token. How much
    that raises the log-likelihood of the positive text is T, and of the negative text O; the loss
    is -log sigmoid(d beta (T - O)). So the vector learns to work in both directions.

    Source: bi-directional preference optimization (Cao et al. 2024,
    https://arxiv.org/abs/2406.00045), with its loss, its start at 0 and its beta. Other than there,
    the sign is drawn for each pair instead of each batch, the steps are in units of the hidden
    states and fall in a straight line, and there is no weight decay unless `descent` has one.

    Args:
        model, tokenizer, training_samples, layer, prepend_bos, show_progress: as for
            `learn_likelihood_vector`.
        beta: how far the preference may move before more of it counts little: smaller is further.
        descent: how long and how fast; by default `Descent()`.

    Returns:
        The vector, at the length that it was learned with.

    Raises:
        ValueError: as `learn_likelihood_vector`; a beta that is not above 0.
    """
    descent = descent or Descent()
    if finite_number(beta, "beta") <= 0:
        raise ValueError(f"expected a beta above 0, got {beta!r}")
    task = VectorTask(model, tokenizer, training_samples, layer, prepend_bos)
    plain = unsteered_likelihoods(task, descent.batch_size)

    def loss_of(vector: Tensor, chosen: list[int], generator: torch.Generator) -> Tensor:
        signs = torch.randint(0, 2, (len(chosen),), generator=generator) * 2 - 1
        return bipo_loss(task, vector, chosen, signs.tolist(), plain, beta)

    vector, losses = learn_addition(task, loss_of, descent, "Learning preferences", show_progress)
    return task.result(vector, "bipo", descent, losses, beta=beta)


def bipo_loss(
    task: VectorTask,
    vector: Tensor,
    chosen: Sequence[int],
    signs: Sequence[int],
    plain: Tensor,
    beta: float,
) -> Tensor:
    """Return the loss of some pairs under a vector, a mean over the pairs.

    Args:
        task: what is learned from.
        vector: [d_model].
        chosen: the numbers of the pairs.
        signs: for each of them +1 or -1.
        plain: the unsteered log-likelihoods of both sides of all pairs, [2, pair].
        beta: see `learn_bipo_vector`.
    """
    with task.steering(vector).apply(task.model, multiplier=[float(sign) for sign in signs]):
        steered = [
            sum_over(*logprobs_of(task.model, side, chosen)) for side in task.contrasts.sides
        ]
    positive, negative = torch.stack(steered) - plain[:, list(chosen)]
    return preference_loss(positive, negative, torch.tensor(signs).to(positive), beta)


def preference_loss(positive: Tensor, negative: Tensor, signs: Tensor, beta: float) -> Tensor:
    """Return the mean of -log sigmoid(d beta (T - O)) over pairs, all [pair].

    Args:
        positive: T, how much the log-likelihood of the positive text grew under d times the vector.
        negative: O, the same of the negative text.
        signs: d, +1 or -1.
        beta: a number above 0.
    """
    return -logsigmoid(beta * signs * (positive - negative)).mean()


@torch.no_grad()
def unsteered_likelihoods(task: VectorTask, batch_size: int) -> Tensor:
    """Return the log-likelihoods of the tokens that count, unsteered, [2, pair]."""
    numbers = range(len(task.contrasts))
    starts = range(0, len(numbers), batch_size)
    with in_evaluation_mode(task.model):
        return torch.stack(
            [
                torch.cat(
                    [
                        sum_over(*logprobs_of(task.model, side, numbers[at : at + batch_size]))
                        for at in starts
                    ]
                )
                for side in task.contrasts.sides
            ]
        )
