"""Checks of what goes into a model and what comes out: lengths, BOS, which tokens are sampled."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.checking.watching import fail
from common.passes.prompts import Prompt, is_prompt, prompt_ids


def assert_same_length(tokenizer: PreTrainedTokenizerBase, *prompts: Prompt) -> None:
    """Fail unless all prompts have as many tokens.

    Otherwise position i of one has no counterpart in the other.
    """
    if len(prompts) < 2 or not all(map(is_prompt, prompts)):
        raise ValueError(f"expected two texts or more, got {prompts!r}")
    tokens = [
        [tokenizer.decode([number]) for number in row] for row in prompt_ids(tokenizer, prompts)
    ]
    if len({len(row) for row in tokens}) > 1:
        fail(
            "; ".join(f"{len(row)} tokens {row}" for row in tokens),
            "as many in each",
            "words that are split differently: pad the shorter prompt (common.get_x_vector), or"
            " read the last token only",
        )


def assert_bos(
    tokenizer: PreTrainedTokenizerBase,
    *prompts: Prompt | Sequence[int] | Tensor | Mapping[str, Tensor],
) -> None:
    """Fail unless all prompts begin with one BOS, or all with none.

    It catches a vector read with BOS and a prompt run without one, and a second BOS before the
    first. A text is taken as your own `tokenizer(text)` gives it; where this library reads a text,
    there is no second BOS. Where the tokenizer has none, no prompt has one.

    Args:
        tokenizer: the model's tokenizer.
        prompts: texts, as this tokenizer encodes them; messages, as its chat template does; token
            ids [pos] without padding; or what a tokenizer returned, where the attention mask says
            what is padding.
    """
    rows = [row for prompt in prompts for row in _rows(tokenizer, prompt)]
    if not rows or not all(rows):
        raise ValueError(
            "expected prompts of one token or more, as texts, ids [pos], or with an attention mask"
        )
    bos = tokenizer.bos_token_id
    counts = [len(list(takewhile(lambda number: number == bos, row))) for row in rows]
    if max(counts) > 1 or len(set(counts)) > 1:
        cause = (
            "a text with its own BOS, and a tokenizer that puts another before it"
            if max(counts) > 1
            else (
                "TransformerLens puts BOS before a text and GPT-2's tokenizer does not: write it in"
                " all of them (common.encode)"
            )
        )
        fail(f"the prompts begin with {counts} BOS tokens", "one each, or none at all", cause)


def _rows(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[list[int]]:
    """The ids of what `assert_bos` takes, without padding; an empty row if they are not [pos]."""
    if isinstance(prompt, str):
        prompt = tokenizer(prompt)["input_ids"]
    elif is_prompt(prompt):
        prompt = prompt_ids(tokenizer, [prompt])[0]
    if isinstance(prompt, Mapping | BatchEncoding):
        ids, mask = (
            torch.atleast_2d(torch.as_tensor(prompt[name]))
            for name in ("input_ids", "attention_mask")
        )
        return [row[real].tolist() for row, real in zip(ids, mask.bool())]
    ids = torch.as_tensor(prompt)
    return [ids.tolist() if ids.dim() == 1 and not ids.is_floating_point() else []]


@torch.no_grad()
def assert_no_top_k(model: PreTrainedModel, **options: Any) -> None:
    """Fail if sampling with these options of `model.generate` never gives some of the tokens.

    One token is sampled, and those that could have been are counted; the random state is put back.
    top_p and min_p are left out: whoever gives them wants them.
    """
    options |= {
        "do_sample": True,
        "top_p": 1.0,
        "min_p": None,
        "max_new_tokens": 1,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    prompt = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    generate: Any = model.generate  # what it returns depends on the options
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        scores = generate(prompt, **options).scores[0]
    if (kept := int(torch.isfinite(scores).sum())) < scores.shape[-1]:
        fail(
            f"sampling chooses among {kept} of {scores.shape[-1]} tokens",
            "all of them",
            "top_k=50, which Hugging Face sets by itself: pass top_k=0 (common.generate does)",
        )
