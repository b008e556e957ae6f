"""A vector learned by likelihood: positive texts become likely, negative ones unlikely if asked."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import finite_number
from common.learning.contrasts import logprobs_of, mean_over
from common.learning.descent import Descent, with_gradients
from common.learning.vector import VectorTask, learn_addition
from common.vectors.pairs import Sample
from common.vectors.steering_vector import SteeringVector

CERTAIN = -1e-6  # a log-probability this close to 0 counts as this, so that no loss is inf


@with_gradients
def learn_likelihood_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_samples: Sequence[Sample],
    layer: int,
    *,
    suppress: float = 0.0,
    descent: Descent | None = None,
    prepend_bos: bool | None = None,
    show_progress: bool = True,
) -> SteeringVector:
    """Learn the vector under which a frozen model finds the positive texts likely.

    It is added at every token while the texts are read, and gradient descent, from 0 on, lowers the
    loss of the tokens that count: those after which the two texts of a pair part. `suppress` makes
    the negative texts unlikely as well, by -log(1 - p) of their tokens, which has a floor where
    the log-probability itself has none.

    Sources: a vector with the loss of a language model is the supervised steering vector of AxBench
    (https://arxiv.org/abs/2501.17148); promoting and suppressing texts is from Dunefsky and Cohan
    (https://arxiv.org/abs/2502.18862), who do it on a single example, with bounds on the norm.

    Args:
        model: a causal language model; it stays frozen, and afterwards, also after an error, it is
            as it was.
        tokenizer: its tokenizer.
        training_samples: contrast pairs of whole texts, as samples or tuples; messages may end with
            the assistant's answer.
        layer: the block after which the vector is added.
        suppress: the weight of the negative texts.
        descent: how long and how fast; by default `Descent()`.
        prepend_bos: see `prompts.prompt_ids`.
        show_progress: show a bar that counts the steps, if they take long.

    Returns:
        The vector, at the length that it was learned with: `apply(multiplier=1)` is that strength.

    Raises:
        ValueError: before anything changes: pairs of which nothing counts, a text that is too long,
            no such layer, a model that is steered already, a negative `suppress`. Later: a loss
            that is not finite.
    """
    descent = descent or Descent()
    if finite_number(suppress, "suppress") < 0:
        raise ValueError(f"expected 0 or more as suppress, got {suppress!r}")
    task = VectorTask(model, tokenizer, training_samples, layer, prepend_bos)

    def loss_of(vector: Tensor, chosen: list[int], generator: torch.Generator) -> Tensor:
        return likelihood_loss(task, vector, chosen, suppress)

    title = "Learning by likelihood"
    vector, losses = learn_addition(task, loss_of, descent, title, show_progress)
    return task.result(vector, "likelihood", descent, losses, suppress=suppress)


def likelihood_loss(
    task: VectorTask, vector: Tensor, chosen: Sequence[int], suppress: float
) -> Tensor:
    """Return the loss of some pairs under a vector [d_model], a mean over the pairs, in nats."""
    positive, negative = task.contrasts.sides
    with task.steering(vector).apply(task.model):
        loss = -mean_over(*logprobs_of(task.model, positive, chosen)).mean()
        if suppress:
            logprobs, counted = logprobs_of(task.model, negative, chosen)
            unlikely = -torch.log(-torch.expm1(logprobs.clamp(max=CERTAIN)))
            loss = loss + suppress * mean_over(unlikely, counted).mean()
    return loss
