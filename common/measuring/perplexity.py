"""What steering costs and gains on text that somebody else wrote: perplexity, on the topic of the steering and off it.

The table is that of the activation-addition post
(https://www.lesswrong.com/posts/5spBue2z2tw4JuDCx): steering towards a topic should make text on
the topic likelier and leave other text alone, and is compared with putting the topic into the
prompt.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtr, stdtrit
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.passes.prompts import prompt_ids
from common.passes.running import Steering, input_device
from common.progress import progress_bar
from common.texts.generation import logits
from common.vectors.activation_additions import ActivationAddition, apply_activation_additions

Condition = str | Sequence[ActivationAddition] | Steering
SplitMethod = Literal["sentence", "token"]


@dataclass
class CorpusStats:
    """How likely a model finds a corpus.

    Attributes:
        logprobs: one array for each piece (sentence or window), with the log-probability of every
            token that counts.
    """

    logprobs: list[np.ndarray]

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return sum(map(len, self.logprobs))

    @property
    def avg_logprob(self) -> float:
        """The mean log-probability of a token, in nats."""
        return float(np.concatenate(self.logprobs).mean())

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss of a token."""
        return math.exp(-self.avg_logprob)


def split_sentences(text: str) -> list[str]:
    """Cut a text after full stops, question and exclamation marks that a space follows; closing quotes stay with them."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"'\u2019\u201d)\]]*(?=\s)", text)]
    parts = [text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)])]
    return [part for part in parts if part]


def split_corpus(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | str,
    split_method: SplitMethod = "sentence",
    window: int = 32,
    stride: int = 32,
    prepend_bos: bool | None = True,
) -> tuple[list[list[int]], list[int]]:
    """Cut a corpus into pieces, each with BOS in front where the tokenizer has one.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        split_method: "sentence", or "token": the tokens of all texts in a row, an end of text
            between two, in windows.
        window: tokens in a window, without BOS.
        stride: how far the next window begins; where windows overlap, only what is new in each one
            counts.
        prepend_bos: see `prompts.prompt_ids`. Windows are tokens already, and get BOS or none: None
            is True where the tokenizer adds BOS by itself.

    Returns:
        The token ids of each piece, and how many positions in front of it do not count because an
        earlier window had them.

    Raises:
        ValueError: no text or something else, an unknown method, a stride that is not from 1 to
            window; what `prompt_ids` raises.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, str) for text in texts) or not any(text.strip() for text in texts):
        raise ValueError(f"expected texts, got {texts[:3]!r}")
    if split_method == "sentence":
        pieces = prompt_ids(
            tokenizer,
            [sentence for text in texts for sentence in split_sentences(text)],
            prepend_bos,
        )
        return pieces, [0] * len(pieces)
    if split_method != "token":
        raise ValueError(f"expected 'sentence' or 'token' as split_method, got {split_method!r}")
    if not 1 <= stride <= window:
        raise ValueError(
            f"expected a stride from 1 to the window of {window} tokens, got {stride!r}"
        )
    row: list[int] = []
    for text in texts:
        # Not verbose: it would warn of texts that are longer than the model, which are cut right
        # here.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        row += [tokenizer.eos_token_id] * bool(row) + ids[ids[:1] == [tokenizer.bos_token_id] :]
    front = [
        token
        for token in prompt_ids(tokenizer, [""], prepend_bos)[0][:1]
        if token == tokenizer.bos_token_id
    ]
    starts = [
        start
        for start in range(0, len(row), stride)
        if start == 0 or start + window - stride < len(row)
    ]
    pieces = [front + row[start : start + window] for start in starts]
    return pieces, [0 if start == 0 else len(front) + window - stride for start in starts]


def get_stats_over_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | str,
    condition: Condition | None = None,
    split_method: SplitMethod = "sentence",
    mask_len: int = 0,
    window: int = 32,
    stride: int = 32,
    batch_size: int = 32,
    show_progress: bool = False,
    prepend_bos: bool | None = True,
) -> CorpusStats:
    """Measure how likely a model finds a corpus, cut into pieces that are read one by one.

    The first token of a piece never counts: it is BOS, or, without BOS, what nothing predicts.

    Args:
        model: a causal language model; as it was afterwards.
        tokenizer: its tokenizer.
        texts: the corpus.
        condition: how the model is steered: activation additions; a callable that makes any other
            steering, for example `lambda: vector.apply(model)`; or a text, which is put in front of
            each piece (prompting), after its BOS, and does not count itself. None is the model as
            it is.
        split_method: see `split_corpus`.
        mask_len: positions of each piece in front that do not count, BOS (if any) being the first:
            the length of an addition. What is predicted at these positions is left out, as in the
            post, since vectors were added right there: the first token that counts is the one after
            the first token that follows them. Pieces that end before it drop out.
        window: see `split_corpus`.
        stride: likewise.
        batch_size: pieces in one pass.
        show_progress: show a bar.
        prepend_bos: see `prompts.prompt_ids`; by default one BOS where the tokenizer has one.

    Raises:
        ValueError: no texts, a piece that the model has no positions for, or that is shorter than
            an addition (then mask_len should be at least as long as this), or nothing that counts.
    """
    pieces, known = split_corpus(tokenizer, texts, split_method, window, stride, prepend_bos)
    prefix = prompt_ids(tokenizer, [condition], False)[0] if isinstance(condition, str) else []
    prefix = prefix[prefix[:1] == [tokenizer.bos_token_id] :]  # the piece brings BOS
    if isinstance(condition, str) and not prefix:
        raise ValueError("expected a text to prompt with, got an empty one")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and max(map(len, pieces)) + len(prefix) > limit:
        longest = max(map(len, pieces)) + len(prefix)
        raise ValueError(
            f"a piece of {longest} tokens is longer than the {limit} positions of the model: use"
            " split_method='token' and a short window"
        )
    # The first token, BOS or not, is predicted from nothing, so that it never counts.
    first = [max(mask_len + 1, seen) for seen in known]
    order = sorted(
        (index for index, piece in enumerate(pieces) if len(piece) > first[index]),
        key=lambda index: len(pieces[index]),
    )
    if not order:
        raise ValueError(f"no piece is longer than the {mask_len} positions that are masked")
    found: dict[int, np.ndarray] = {}
    with progress_bar(len(order), "Reading the corpus", "piece", show_progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [_put_in(prefix, pieces[index], tokenizer.bos_token_id) for index in batch]
            length = max(map(len, rows))
            # Padding on the right: it disturbs nothing in front of it, and needs no positions of
            # its own.
            ids = torch.tensor(
                [row + [row[0]] * (length - len(row)) for row in rows], device=input_device(model)
            )
            mask = torch.tensor(
                [[1] * len(row) + [0] * (length - len(row)) for row in rows],
                device=input_device(model),
            )
            with _steering(model, tokenizer, condition)():
                logprobs = (
                    logits(model, {"input_ids": ids, "attention_mask": mask})
                    .float()
                    .log_softmax(-1)
                )
            chosen = logprobs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].cpu().numpy()
            for row, index in enumerate(batch):
                found[index] = chosen[row, len(prefix) + first[index] - 1 : len(rows[row]) - 1]
            bar.update(len(batch))
    return CorpusStats([found[index] for index in sorted(found)])


def _put_in(prefix: list[int], piece: list[int], bos: int | None) -> list[int]:
    """A piece with a prefix in front, after BOS where the piece has one."""
    front = int(piece[:1] == [bos])
    return [*piece[:front], *prefix, *piece[front:]]


def _steering(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, condition: Condition | None
) -> Steering:
    """What makes the steering of a condition."""
    if callable(condition):
        return condition
    additions = () if condition is None or isinstance(condition, str) else condition
    return lambda: apply_activation_additions(model, tokenizer, additions)


def perplexity_ratios(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str] | str],
    conditions: Mapping[str, Condition],
    split_method: SplitMethod = "sentence",
    mask_len: int | None = None,
    window: int = 32,
    stride: int = 32,
    batch_size: int = 32,
    bootstrap: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
    prepend_bos: bool | None = True,
) -> pd.DataFrame:
    """Compare the perplexity of texts under some conditions with that of the model as it is, on the same tokens.

    Published for GPT2-XL, with " weddings" - "" at block input 16 times 1, by sentences: steering
    0.875 on the topic and 0.994 off it, prompting 0.890 and 1.132.

    Args:
        model: a causal language model; as it was afterwards.
        tokenizer: its tokenizer.
        texts: by label, for example "on topic" and "off topic".
        conditions: by name; see `get_stats_over_corpus`.
        mask_len: positions in front of each piece that do not count; by default the length of the
            longest addition.
        bootstrap: how often the pieces are drawn again for the interval.
        seed: of the drawing.

    The other arguments are those of `get_stats_over_corpus`.

    Returns:
        One row for each label and condition: `text`, `condition`, `ratio` (below 1: likelier than
            unsteered), `low` and
        `high` (its 95 % bootstrap interval over the pieces), `unsteered` (the perplexity itself),
        `tokens` and `pieces`. The interval is the expanded percentile one (Hesterberg 2015, "What
        Teachers Should Know About the Bootstrap"). In simulations it held the true ratio in 91 % of
        3000 cases with 5 pieces, 94 % with 8 and 94 % with 20; with gains that are strongly skewed
        in 86, 89 and 92 %. (The plain percentiles: 82, 88 and 92 %; skewed: 78, 83 and 89 %.)

    Raises:
        ValueError: no texts or no conditions, or what `get_stats_over_corpus` raises.
    """
    if (
        not isinstance(texts, Mapping)
        or not texts
        or not isinstance(conditions, Mapping)
        or not conditions
    ):
        raise ValueError("expected texts and conditions by name, got none")
    if mask_len is None:
        additions = [
            addition
            for how in conditions.values()
            if not isinstance(how, str) and not callable(how)
            for addition in how or ()
        ]
        mask_len = max((len(addition.token_ids(tokenizer)) for addition in additions), default=0)
    settings = {
        "split_method": split_method,
        "mask_len": mask_len,
        "window": window,
        "stride": stride,
        "batch_size": batch_size,
    }
    settings |= {"show_progress": show_progress, "prepend_bos": prepend_bos}
    rng, rows = np.random.default_rng(seed), []
    for label, corpus in texts.items():
        plain = get_stats_over_corpus(model, tokenizer, corpus, None, **settings)
        lengths = np.array([len(piece) for piece in plain.logprobs])
        draws = rng.integers(len(lengths), size=(bootstrap, len(lengths)))
        for name, condition in conditions.items():
            found = get_stats_over_corpus(model, tokenizer, corpus, condition, **settings)
            gains = np.array(
                [(one - other).sum() for one, other in zip(plain.logprobs, found.logprobs)]
            )
            low, high = _interval(gains, lengths, draws)
            rows.append(
                {
                    "text": label,
                    "condition": name,
                    "ratio": math.exp(gains.sum() / lengths.sum()),
                    "low": low,
                    "high": high,
                    "unsteered": plain.perplexity,
                    "tokens": plain.tokens,
                    "pieces": len(lengths),
                }
            )
    return pd.DataFrame(rows)


def _interval(gains: np.ndarray, lengths: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of a ratio of perplexities.

    It is wider than from 2.5 to 97.5 % of the draws, since few pieces spread less than what they
    are drawn from.

    Args:
        gains: how much more the unsteered model expects each piece, log-probabilities [piece].
        lengths: tokens of each piece, [piece].
        draws: numbers of pieces, drawn with replacement, [draw, piece].
    """
    pieces = len(lengths)
    if not len(draws):
        return math.nan, math.nan
    again = np.exp(gains[draws].sum(axis=1) / lengths[draws].sum(axis=1))
    tail = (
        ndtr(math.sqrt(pieces / (pieces - 1)) * stdtrit(pieces - 1, 0.025)) if pieces > 1 else 0.025
    )
    low, high = np.quantile(again, [tail, 1 - tail])
    return float(low), float(high)
