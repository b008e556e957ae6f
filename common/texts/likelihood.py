"""How likely a model finds the tokens of a text: one computation for all that measure it."""

from torch import Tensor


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probability of every token but the first, given those before it, in nats.

    It is computed in fp32: in bf16 a log-probability has three digits.

    Args:
        logits: [batch, pos, vocab].
        ids: the tokens that are there, [batch, pos].

    Returns:
        [batch, pos - 1]; column i belongs to token i + 1.
    """
    logprobs = logits[:, :-1].float().log_softmax(-1)  # [batch, pos - 1, vocab]
    return logprobs.gather(-1, ids[:, 1:, None])[..., 0]


def mean_losses(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Return the mean loss of each text, [batch], in nats; NaN where no token counts.

    Args:
        logits: [batch, pos, vocab].
        ids: [batch, pos].
        counted: which tokens count, [batch, pos], bool; the first never does.
    """
    losses = -chosen_logprobs(logits, ids).masked_fill(~counted[:, 1:], 0.0)
    return losses.sum(-1) / counted[:, 1:].sum(-1)
