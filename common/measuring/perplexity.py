"""What steering costs and gains on text that somebody else wrote, on its topic and off it.

The table is that of the activation-addition post
(https://www.lesswrong.com/posts/5spBue2z2tw4JuDCx): steering towards a topic should make text on
the topic likelier and leave other text alone, and is compared with putting the topic into the
prompt.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import ndtr, stdtrit
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import integer, takes_one
from common.passes.hooks import check_engine
from common.passes.padding import padded
from common.passes.prompts import prompt_ids
from common.passes.running import Steering, input_device
from common.progress import progress_bar
from common.scaling.units import Engine, Job, Unit, Work, run_units
from common.texts.generation import logits
from common.texts.likelihood import chosen_logprobs
from common.vectors.activation_additions import ActivationAddition, apply_activation_additions

SteeringOf = Callable[[PreTrainedModel], AbstractContextManager]
SteeredBy = str | Sequence[ActivationAddition] | Steering | SteeringOf
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
    """Cut a text after the marks that end sentences where a space follows; quotes stay closed."""
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
    condition: SteeredBy | None = None,
    split_method: SplitMethod = "sentence",
    mask_len: int = 0,
    window: int = 32,
    stride: int = 32,
    batch_size: int = 32,
    show_progress: bool = False,
    prepend_bos: bool | None = True,
    engine: Engine | None = None,
) -> CorpusStats:
    """Measure how likely a model finds a corpus, cut into pieces that are read one by one.

    The first token of a piece never counts: it is BOS, or, without BOS, what nothing predicts.

    Args:
        model: a causal language model; as it was afterwards.
        tokenizer: its tokenizer.
        texts: the corpus.
        condition: how the model is steered: activation additions; a callable that makes any other
            steering, for example `lambda model: vector.apply(model)`, or one without an argument,
            `lambda: vector.apply(model)`; or a text, which is put in front of each piece
            (prompting), after its BOS, and does not count itself. None is the model as it is.
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
        engine: workers that read the pieces (`RayEngine`); without it, this process. A callable
            then takes the model, which is another one there.

    Raises:
        ValueError: no texts, a piece that the model has no positions for, or that is shorter than
            an addition (then mask_len should be at least as long as this), nothing that counts, a
            negative `mask_len` or a `batch_size` below 1; with an engine, a callable that does not
            take the model.
    """
    return _stats(
        model,
        tokenizer,
        [(texts, condition)],
        engine,
        split_method=split_method,
        mask_len=mask_len,
        window=window,
        stride=stride,
        batch_size=batch_size,
        show_progress=show_progress,
        prepend_bos=prepend_bos,
    )[0]


def _stats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    readings: Sequence[tuple[Sequence[str] | str, SteeredBy | None]],
    engine: Engine | None,
    *,
    mask_len: int,
    batch_size: int = 32,
    show_progress: bool = False,
    prepend_bos: bool | None = True,
    **cut: Any,
) -> list[CorpusStats]:
    """Read corpora, each under a condition; `cut` are more arguments of `split_corpus`."""
    mask_len = integer(mask_len, "mask_len")
    check_engine(engine, model)
    corpora = [
        _corpus(
            model,
            tokenizer,
            split_corpus(tokenizer, texts, prepend_bos=prepend_bos, **cut),
            condition,
            mask_len,
        )
        for texts, condition in readings
    ]
    job = _Reading(corpora)
    units = job.units(integer(batch_size, "batch_size", 1))
    if engine is not None:
        for _, condition in readings:
            if callable(condition) and not takes_one(condition):
                raise ValueError(
                    "with an engine the model is another one: expected a condition that takes it,"
                    f" such as `lambda model: vector.apply(model)`, got {condition!r}"
                )
    found: list[dict[int, np.ndarray]] = [{} for _ in corpora]
    with (
        progress_bar(sum(map(len, units)), "Reading the corpus", "piece", show_progress) as bar,
        closing(run_units(engine, model, tokenizer, job, units, bar)) as results,
    ):
        for unit, logprobs in results:
            found[unit.beside[0]].update(zip(unit.numbers, logprobs))
    return [CorpusStats([pieces[number] for number in sorted(pieces)]) for pieces in found]


class _Corpus(NamedTuple):
    """Pieces as they are read under a condition.

    Attributes:
        rows: the token ids of each.
        first: for each, the first token that counts.
        condition: how the model is steered.
    """

    rows: list[list[int]]
    first: list[int]
    condition: SteeredBy | None

    @property
    def order(self) -> list[int]:
        """The pieces in which something counts, the shortest first."""
        counted = [number for number, row in enumerate(self.rows) if len(row) > self.first[number]]
        return sorted(counted, key=lambda number: len(self.rows[number]))


def _corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pieces: tuple[list[list[int]], list[int]],
    condition: SteeredBy | None,
    mask_len: int,
) -> _Corpus:
    """Put pieces (`split_corpus`) as they are read under a condition."""
    bos, prefix = tokenizer.bos_token_id, _prefix(tokenizer, condition)
    rows = [_put_in(prefix, piece, bos) for piece in pieces[0]]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and (longest := max(map(len, rows))) > limit:
        raise ValueError(
            f"a piece of {longest} tokens is longer than the {limit} positions of the model: use"
            " split_method='token' and a short window"
        )
    # The first token, BOS or not, is predicted from nothing, so that it never counts.
    first = [len(prefix) + max(mask_len + 1, seen) for seen in pieces[1]]
    corpus = _Corpus(rows, first, condition)
    if not corpus.order:
        raise ValueError(f"no piece is longer than the {mask_len} positions that are masked")
    return corpus


@dataclass(frozen=True)
class _Reading(Job[list[np.ndarray]]):
    """Reads pieces; those of all corpora are numbered in a row, and a unit is of one corpus."""

    corpora: Sequence[_Corpus]

    def units(self, batch_size: int) -> list[Unit]:
        """Cut the pieces into batches, those of like length together."""
        units = []
        for which, corpus in enumerate(self.corpora):
            start = self._start(which)
            order = [start + number for number in corpus.order]
            units += [
                Unit(tuple(order[at : at + batch_size]), (which,))
                for at in range(0, len(order), batch_size)
            ]
        return units

    def on(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Work[list[np.ndarray]]:
        """Return what reads a batch: the log-probabilities that count, piece by piece."""

        def work(unit: Unit) -> list[np.ndarray]:
            rows, first, condition = self.corpora[unit.beside[0]]
            start = self._start(unit.beside[0])
            numbers = [number - start for number in unit.numbers]
            inputs = padded([rows[number] for number in numbers], side="right")
            inputs = inputs.to(input_device(model))
            with _steering(model, tokenizer, condition)():
                scores = logits(model, inputs)
            logprobs = chosen_logprobs(scores, inputs["input_ids"]).cpu().numpy()
            return [
                row[first[number] - 1 : len(rows[number]) - 1].copy()
                for number, row in zip(numbers, logprobs)
            ]

        return work

    def describe(self, number: int) -> str:
        """Say which piece a number is."""
        which = bisect_right([self._start(at) for at in range(len(self.corpora))], number) - 1
        return f"piece {number - self._start(which)} of corpus {which}"

    def _start(self, which: int) -> int:
        """The number of the first piece of a corpus."""
        return sum(len(corpus.rows) for corpus in self.corpora[:which])


def _prefix(tokenizer: PreTrainedTokenizerBase, condition: SteeredBy | None) -> list[int]:
    """The tokens of a text to prompt with, without BOS; none for another condition."""
    if not isinstance(condition, str):
        return []
    ids = prompt_ids(tokenizer, [condition], False)[0]
    ids = ids[ids[:1] == [tokenizer.bos_token_id] :]  # the piece brings BOS
    if not ids:
        raise ValueError("expected a text to prompt with, got an empty one")
    return ids


def _put_in(prefix: list[int], piece: list[int], bos: Any) -> list[int]:
    """A piece with a prefix in front, after BOS where the piece has one."""
    front = int(piece[:1] == [bos])
    return [*piece[:front], *prefix, *piece[front:]]


def _steering(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, condition: SteeredBy | None
) -> Steering:
    """What makes the steering of a condition."""
    if callable(condition):
        of_model = cast(SteeringOf, condition)
        return partial(of_model, model) if takes_one(condition) else cast(Steering, condition)
    additions = () if condition is None or isinstance(condition, str) else condition
    return lambda: apply_activation_additions(model, tokenizer, additions)


def perplexity_ratios(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str] | str],
    conditions: Mapping[str, SteeredBy],
    *,
    mask_len: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    engine: Engine | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Compare the perplexity of texts, steered in several ways, with that of the model as it is.

    Published for GPT2-XL, with " weddings" - "" at block input 16 times 1, by sentences: steering
    0.875 on the topic and 0.994 off it, prompting 0.890 and 1.132.

    Args:
        model: a causal language model; as it was afterwards.
        tokenizer: its tokenizer.
        texts: by label, for example "on topic" and "off topic".
        conditions: by name; see `get_stats_over_corpus`.
        mask_len: positions at the start of each piece that do not count; by default the length of
            the longest addition, so that all conditions are measured on the same tokens.
        bootstrap: how often the pieces are drawn again for the interval; 0 for no interval.
        seed: of the drawing.
        engine: workers that read all texts under all conditions; see `get_stats_over_corpus`.
        settings: how the texts are cut and read: `split_method`, `window`, `stride`, `batch_size`,
            `prepend_bos` and `show_progress` of `get_stats_over_corpus`.

    Returns:
        One row for each label and condition: `text`, `condition`, `ratio` (below 1: likelier than
        unsteered), `low` and `high` (its 95 % interval, see `ratio_intervals`), `unsteered` (the
        perplexity itself), `tokens` and `pieces`.

    Raises:
        ValueError: no texts or no conditions, or what `get_stats_over_corpus` raises.
    """
    for given in (texts, conditions):
        if not isinstance(given, Mapping) or not given:
            raise ValueError(f"expected texts and conditions by name, got {given!r}")
    settings["mask_len"] = _longest(tokenizer, conditions) if mask_len is None else mask_len
    rng, tables = np.random.default_rng(seed), []
    ways = [None, *conditions.values()]
    readings = [(corpus, way) for corpus in texts.values() for way in ways]
    results = iter(_stats(model, tokenizer, readings, engine, **settings))
    for label in texts:
        plain = next(results)
        lengths = np.array([len(piece) for piece in plain.logprobs])
        gains = []
        for _ in conditions:
            pieces = zip(plain.logprobs, next(results).logprobs)
            gains.append([(before - after).sum() for before, after in pieces])
        by_piece = np.array(gains, dtype=float)  # [condition, piece]
        low, high = ratio_intervals(by_piece, lengths, bootstrap, rng)
        columns = {
            "text": label,
            "condition": list(conditions),
            "ratio": np.exp(by_piece.sum(axis=1) / lengths.sum()),
            "low": low,
            "high": high,
            "unsteered": plain.perplexity,
            "tokens": plain.tokens,
            "pieces": len(lengths),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _longest(tokenizer: PreTrainedTokenizerBase, conditions: Mapping[str, SteeredBy]) -> int:
    """The length of the longest activation addition, in tokens."""
    additions = [
        addition
        for how in conditions.values()
        if not isinstance(how, str) and not callable(how)
        for addition in how or ()
    ]
    return max((len(addition.token_ids(tokenizer)) for addition in additions), default=0)


def ratio_intervals(
    gains: np.ndarray, lengths: np.ndarray, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the 95 % bootstrap interval over the pieces of some perplexity ratios.

    It is the expanded percentile interval (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap"), which is wider than from 2.5 to 97.5 % of the draws, since few pieces spread less
    than what they are drawn from. In simulations it held the true ratio in 91 % of 3000 cases with
    5 pieces, 94 % with 8 and 94 % with 20; with gains that are strongly skewed in 86, 89 and 92 %.
    (The plain percentiles: 82, 88 and 92 %; skewed: 78, 83 and 89 %.)

    Args:
        gains: how much likelier the unsteered model finds each piece, log-probabilities
            [condition, piece].
        lengths: tokens of each piece, [piece].
        draws: how often the pieces are drawn again, the same ones for all conditions.
        rng: what they are drawn with.

    Returns:
        The lower and the upper ends, [condition]; NaN without draws, the ratio itself with one
        piece.
    """

    def ratio(gains: np.ndarray, lengths: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.exp(gains.sum(axis=axis) / lengths.sum(axis=axis))

    pieces = len(lengths)
    if not draws or pieces == 1:
        ends = ratio(gains, lengths) if draws else np.full(len(gains), math.nan)
        return ends, ends
    tail = ndtr(math.sqrt(pieces / (pieces - 1)) * stdtrit(pieces - 1, 0.025))
    found = stats.bootstrap(
        (gains, lengths[None]),
        ratio,
        n_resamples=draws,
        paired=True,
        axis=-1,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=rng,
    )
    return found.confidence_interval.low, found.confidence_interval.high
