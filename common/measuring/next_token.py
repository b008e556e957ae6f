"""What steering does to the next-token probabilities of one prompt.

Effectiveness and disruption are those of the library of the activation-addition post
(https://github.com/montemac/activation_additions): steering should make tokens of its own kind
likelier (effectiveness), and leave the proportions among these, and among all others, as they were
(disruption, which is small when it does).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.passes.padding import encode
from common.passes.prompts import Prompt
from common.passes.running import Steering, input_device
from common.texts.generation import logits

TINY = 1e-12  # in place of a probability of 0 where a logarithm is taken


def next_token_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    steering: Steering | None = None,
    prepend_bos: bool | None = True,
) -> Tensor:
    """Return the probabilities of the next token after every token of a prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: the prompt, a text or messages.
        steering: makes what is open meanwhile, for example `lambda: vector.apply(model)`.
        prepend_bos: see `prompts.prompt_ids`; by default one BOS where the tokenizer has one. It is
            position 0 then.

    Returns:
        [pos, vocab], in fp32 on the CPU.

    Raises:
        ValueError: a prompt without tokens, or one that `prompt_ids` refuses.
    """
    inputs = encode(tokenizer, [prompt], prepend_bos).to(input_device(model))
    with steering() if steering else nullcontext():
        return logits(model, inputs)[0].float().softmax(-1).cpu()


def token_set(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Return the ids of words that are one token, each with and without a space in front.

    A token for whatever the tokenizer does not know, such as "<unk>", is not that of a word.

    Raises:
        ValueError: no list of words, none, an empty one, or a word that is not a single token in
            either form.
    """
    if (
        isinstance(words, str)
        or not isinstance(words, Iterable)
        or not words
        or not all(isinstance(word, str) and word.strip() for word in words)
    ):
        raise ValueError(f"expected a list of words, got {words!r}")
    found: list[int] = []
    for word in words:
        forms = [
            tokenizer(form, add_special_tokens=False)["input_ids"]
            for form in (word.strip(), " " + word.strip())
        ]
        single = [
            ids[0]
            for ids in forms
            if len(ids) == 1 and str(tokenizer.decode(ids)).strip().lower() == word.strip().lower()
        ]
        if not single:
            raise ValueError(
                f"{word!r} is not a single token of this tokenizer: it is"
                f" {tokenizer.tokenize(' ' + word.strip())}"
            )
        found += single
    return sorted(set(found))


def top_changed_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    steering: Steering,
    count: int = 10,
    by: Literal["kl", "probability", "logprob"] = "kl",
    min_probability: float = 1e-4,
    prepend_bos: bool | None = True,
) -> pd.DataFrame:
    """Show which next tokens after a prompt steering changed most.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: a text or messages.
        steering: makes what is open meanwhile.
        count: how many tokens.
        by: the share of the Kullback-Leibler divergence (the largest first), the difference of the
            probability, or of its logarithm (the largest absolute values first).
        min_probability: with `by="logprob"`, leave out tokens that are less likely than this in
            both.
        prepend_bos: see `prompts.prompt_ids`; by default one BOS where the tokenizer has one.

    Returns:
        `token`, `unsteered`, `steered` (probabilities), `logprob_change` and `kl` (both in nats).

    Raises:
        ValueError: an unknown order, or a count below 1.
    """
    orders = {"kl": "kl", "probability": "difference", "logprob": "logprob_change"}
    if by not in orders or isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"expected by as one of {', '.join(orders)} and a count of 1 or more, got {by!r} and"
            f" {count!r}"
        )
    before, after = (
        next_token_probs(model, tokenizer, prompt, how, prepend_bos)[-1] for how in (None, steering)
    )
    change = after.clamp(min=TINY).log() - before.clamp(min=TINY).log()
    frame = pd.DataFrame(
        {
            "unsteered": before,
            "steered": after,
            "logprob_change": change,
            "kl": after * change,
            "difference": after - before,
        }
    )
    if by == "logprob":
        frame = frame[frame[["unsteered", "steered"]].max(axis=1) >= min_probability]
    sizes = np.asarray(frame[orders[by]])
    order = np.argsort(-(sizes if by == "kl" else np.abs(sizes)), kind="stable")
    frame = frame.iloc[order[:count]].copy()
    frame.insert(0, "token", [tokenizer.decode([token]) for token in frame.index])
    return frame.drop(columns="difference").reset_index(drop=True)


def effectiveness_and_disruption(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    steering: Steering,
    aligned: Sequence[str] | Mapping[int, Sequence[str]],
    mask_len: int = 0,
    prepend_bos: bool | None = True,
) -> pd.DataFrame:
    """Measure, after every token of a prompt, what steering does to the next token.

    With P the unsteered and Q the steered probabilities, A the aligned tokens and B all others:
    effectiveness is `log Q(A) - log P(A)`, disruption
    `Q(A) KL(Q|A || P|A) + Q(B) KL(Q|B || P|B)`, where `|A` means given that the token is of A.
    `KL(Q || P)` is disruption plus what the shares of A and B alone explain.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: a text or messages.
        steering: makes what is open meanwhile.
        aligned: the words that steering should make likelier, for all positions or by position; see
            `token_set`.
        mask_len: positions in front that are left out, since vectors were added right there: the
            length of an addition.
        prepend_bos: see `prompts.prompt_ids`; by default one BOS where the tokenizer has one. It is
            position 0 then.

    Returns:
        By position: `token` (the last that is read), `effectiveness`, `disruption` and `kl`, in
        nats. Where no words are given, effectiveness is 0 and disruption is `kl`.

    Raises:
        ValueError: words that are not a single token, a position outside the prompt, or a mask_len
            that leaves no position.
    """
    before, after = (
        next_token_probs(model, tokenizer, prompt, how, prepend_bos) for how in (None, steering)
    )
    by_position = (
        dict(aligned)
        if isinstance(aligned, Mapping)
        else dict.fromkeys(range(len(before)), aligned)
    )
    if outside := [position for position in by_position if not 0 <= position < len(before)]:
        raise ValueError(
            f"position {outside[0]} lies outside the prompt, which has positions 0 to"
            f" {len(before) - 1}"
        )
    if not 0 <= mask_len < len(before):
        raise ValueError(
            f"expected a mask_len from 0 to {len(before) - 1} for a prompt of {len(before)} tokens,"
            f" got {mask_len!r}"
        )
    ids = encode(tokenizer, [prompt], prepend_bos)["input_ids"][0].tolist()
    rows = []
    for position in range(mask_len, len(before)):
        members = torch.zeros(before.shape[1], dtype=torch.bool)
        if words := by_position.get(position):
            members[token_set(tokenizer, words)] = True
        row = {"position": position, "token": tokenizer.decode([ids[position]])}
        rows.append(row | split_divergence(before[position], after[position], members))
    return pd.DataFrame(rows).set_index("position")


def split_divergence(unsteered: Tensor, steered: Tensor, members: Tensor) -> dict[str, float]:
    """Return `effectiveness`, `disruption` and `kl` of two distributions.

    See `effectiveness_and_disruption`.

    Args:
        unsteered: probabilities [vocab].
        steered: likewise.
        members: which tokens are aligned, [vocab], bool.
    """
    p, q = (
        probs / probs.sum()
        for probs in (unsteered.double().clamp(min=TINY), steered.double().clamp(min=TINY))
    )
    kl = (q * (q / p).log()).sum().item()
    if members.all() or not members.any():
        return {"effectiveness": 0.0, "disruption": kl, "kl": kl}
    shares = [(p[mask].sum(), q[mask].sum()) for mask in (members, ~members)]
    explained = sum((inside * (inside / outside).log()).item() for outside, inside in shares)
    return {
        "effectiveness": (shares[0][1] / shares[0][0]).log().item(),
        "disruption": kl - explained,
        "kl": kl,
    }
