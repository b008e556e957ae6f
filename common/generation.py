"""Logits and completions of a Hugging Face causal language model, steered or not.

`inputs` is what the tokenizer returns: `input_ids` and `attention_mask`, [batch, pos], padded on the left.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from common.positions import with_position_ids


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run one forward pass and return the logits [batch, pos, vocab]; those of padding mean nothing."""
    return model(**with_position_ids(inputs)).logits


def generation_options(**options: Any) -> dict[str, Any]:
    """Fill in the options of `generate`: greedy unless told otherwise, 20 new tokens, and no top-k nobody asked for.

    Hugging Face keeps only the 50 likeliest tokens when it samples, unless `top_k=0`; the published settings of
    activation additions have no top-k.
    """
    options = {"max_new_tokens": 20, "do_sample": False, **options}
    if options["do_sample"]:
        options.setdefault("top_k", 0)
    return options


def generate(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Continue the prompts and return the token ids [batch, pos + new], prompt included.

    Args:
        model: a causal language model, as `load_model` returns it.
        inputs: what the tokenizer returned.
        options: for `model.generate`, on top of `generation_options`. To sample, call `torch.manual_seed` first.
    """
    return model.generate(**inputs, **generation_options(**options))


def completions(tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Tensor], ids: Tensor) -> list[str]:
    """Return the new text of every row: what comes after the prompt, up to the end of text.

    Args:
        tokenizer: the model's tokenizer.
        inputs: the prompts as given to `generate`, [batch, pos].
        ids: what `generate` returned, [batch, pos + new].
    """
    new = ids[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class FrequencyPenalty(LogitsProcessor):
    """Lower each token's logit by `penalty` for every time it occurred so far, prompt included.

    This is the `freq_penalty` of the activation-addition post (https://www.lesswrong.com/posts/5spBue2z2tw4JuDCx),
    as TransformerLens implements it. Hugging Face's `repetition_penalty` is another thing: it divides, and it counts
    a token once.
    """

    def __init__(self, penalty: float):
        if not isinstance(penalty, int | float) or penalty < 0:
            raise ValueError(f"expected a frequency penalty of 0 or more, got {penalty!r}")
        self.penalty = penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the penalised scores [batch, vocab]; `input_ids` is [batch, pos], padding included."""
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        return scores - self.penalty * counts
