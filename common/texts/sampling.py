"""Sampling as in the activation-addition post, with random numbers of its own for each row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from common.arguments import finite_number, integer
from common.passes.batching import neutral_options, part_of, run_parts, separate_parts
from common.progress import progress_bar
from common.texts.generation import end_of_text, generate, joined, refuse_for_parts


class FrequencyPenalty(LogitsProcessor):
    """Lower each token's logit by `penalty` for every time it occurred so far, prompt included.

    This is the `freq_penalty` of the activation-addition post
    (https://www.lesswrong.com/posts/5spBue2z2tw4JuDCx), as TransformerLens implements it. Hugging
    Face's `repetition_penalty` is another thing: it divides, and it counts a token once.
    """

    def __init__(self, penalty: float):
        if not isinstance(penalty, int | float) or penalty < 0:
            raise ValueError(f"expected a frequency penalty of 0 or more, got {penalty!r}")
        self.penalty = penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the penalised scores [batch, vocab]; `input_ids` [batch, pos] has its padding."""
        counts = torch.zeros_like(scores).scatter_add_(
            1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype)
        )
        return scores - self.penalty * counts


class TopP(LogitsProcessor):
    """Keep the likeliest tokens that together have at least the probability `top_p`.

    `TopPLogitsWarper` of transformers keeps the same ones, but sorts the whole vocabulary at every
    step, which takes longer than a small model. Here only the likeliest tokens are sorted, as many
    as it takes.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [batch, vocab] with all others at -inf; the likeliest one always stays."""
        probs = scores.softmax(-1)
        least, enough = self._least(probs.topk(min(32, probs.shape[1])).values)
        if not enough.all():
            least[~enough] = self._least(probs[~enough].sort(descending=True).values)[0]
        return scores.masked_fill(probs < least, -torch.inf)

    def _least(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """The least probability kept, [batch, 1], and whether those in `best` suffice."""
        total = best.cumsum(-1)
        # It would be 0 only in a row of nan.
        kept = (total - best < self.top_p).sum(-1, keepdim=True).clamp(min=1)
        return best.gather(-1, kept - 1), total[:, -1] >= self.top_p


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling whose random numbers belong to each row of a batch.

    It adds Gumbel noise to the scores, and the largest sum is then a sample of their softmax. The
    noise of a row comes from the seed of that row alone: a prompt gets the same text in any batch,
    on any device, and rows with equal seeds (a prompt steered and unsteered) get equal noise. The
    global random state is neither read nor changed.

    Args:
        seeds: for each row, one or several integers from 0 on.
    """

    def __init__(self, seeds: Sequence[int | Sequence[int]]):
        keys = [(seed,) if isinstance(seed, int) else tuple(seed) for seed in seeds]
        generators = {key: np.random.default_rng(key) for key in dict.fromkeys(keys)}
        numbers = {key: number for number, key in enumerate(generators)}
        self._generators = list(generators.values())
        self._rows = torch.tensor([numbers[key] for key in keys])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [batch, vocab] whose largest entry is the sampled token."""
        noise = np.stack(
            [
                generator.standard_exponential(scores.shape[1], dtype=np.float32)
                for generator in self._generators
            ]
        )
        gumbel = -torch.from_numpy(noise).clamp_(min=torch.finfo(torch.float32).tiny).log_()
        return scores + gumbel.to(scores)[self._rows.to(scores.device)]


class PerRow(LogitsProcessor):
    """Lets a processor that counts tokens see each row without its padding.

    Padding is often the end of text, and no repetition of it.
    """

    def __init__(self, processor: Callable[..., Tensor], attention_mask: Tensor):
        self.processor, self.starts = processor, (attention_mask == 0).sum(-1).tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the processed scores [batch, vocab]; `input_ids` is [batch, pos]."""
        rows = zip(input_ids.split(1), scores.split(1), self.starts)
        return torch.cat([self.processor(ids[:, start:], row) for ids, row, start in rows])


class _Bar(LogitsProcessor):
    """Moves a bar on by one at each token."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.bar.update()
        return scores


@dataclass(frozen=True)
class Sampling:
    """How texts are sampled: length, temperature, top_p and penalties, and no top-k.

    It is the sampling of the activation-addition post, in the order of TransformerLens: repetition
    penalty, temperature, frequency penalty, top_p.

    Attributes:
        max_new_tokens: length of the completions.
        temperature: 0 is greedy, whatever the seeds.
        top_p: the smallest set of tokens with at least this probability is sampled from.
        freq_penalty: see `FrequencyPenalty`.
        repetition_penalty: the logits of tokens that occurred are divided by it (multiplied where
            negative); 1 is none.

    Raises:
        ValueError: something that is no number, no new tokens, a temperature or a frequency penalty
            below 0, a top_p outside (0, 1], a repetition penalty of 0 or less.
    """

    max_new_tokens: int = 20
    temperature: float = 1.0
    top_p: float = 1.0
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "max_new_tokens", integer(self.max_new_tokens, "max_new_tokens", 1)
        )
        for name in ("temperature", "top_p", "repetition_penalty"):
            finite_number(getattr(self, name), name)
        if not self.temperature >= 0:
            raise ValueError(f"expected a temperature of 0 or more, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"expected a top_p above 0 and at most 1, got {self.top_p!r}")
        if not self.repetition_penalty > 0:
            raise ValueError(
                "expected a repetition penalty above 0 (1 is none), got"
                f" {self.repetition_penalty!r}"
            )
        FrequencyPenalty(self.freq_penalty)

    def processors(
        self, attention_mask: Tensor, seeds: Sequence[int | Sequence[int]]
    ) -> Iterator[LogitsProcessor]:
        """Yield what turns the greedy decoding of a batch into this sampling.

        Args:
            attention_mask: of the prompts, [batch, pos]; tokens are counted without the padding.
            seeds: one for each row; see `SeededSampling`.
        """

        def counting(processor: LogitsProcessor) -> LogitsProcessor:
            return processor if bool(attention_mask.all()) else PerRow(processor, attention_mask)

        if self.repetition_penalty != 1:
            yield counting(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature not in (0, 1):
            yield TemperatureLogitsWarper(float(self.temperature))
        if self.freq_penalty:
            yield counting(FrequencyPenalty(self.freq_penalty))
        if self.temperature and self.top_p < 1:
            yield TopP(self.top_p)
        if self.temperature:
            yield SeededSampling(seeds)


# They act on the drawing of transformers, which `sample` does not use; "generation_config" would
# bring all of them.
PASSED_OVER = {
    "generation_config",
    "do_sample",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
}


def sample(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    seeds: Sequence[int | Sequence[int]],
    sampling: Sampling = Sampling(),
    *,
    show_progress: bool = False,
    **options: Any,
) -> Tensor:
    """Sample a continuation of each prompt with random numbers of its own.

    Nothing but the arguments decides: of `model.generation_config` only the ids of its special
    tokens are used (a text ends where it says), whatever settings of sampling, beams or length the
    checkpoint came with.

    Args:
        model: a causal language model.
        inputs: what the tokenizer returned, [batch, pos], padded on the left.
        seeds: one for each row; see `SeededSampling`.
        sampling: length, temperature, top_p and penalties.
        show_progress: show a bar that counts tokens, where it takes more than five seconds.
        options: more of `model.generate`, one by one.

    Returns:
        Token ids [batch, pos + new], prompt included.

    Raises:
        ValueError: another number of seeds than rows; a setting of `Sampling` as an option; an
            option for the drawing of transformers (`do_sample`, `top_k`, …) or a whole
            `generation_config`, which would mean nothing here.
    """
    if len(seeds) != len(inputs["input_ids"]):
        raise ValueError(
            f"expected one seed for each of {len(inputs['input_ids'])} rows, got {len(seeds)}"
        )
    if stray := sorted({field.name for field in fields(Sampling)} & options.keys()):
        raise ValueError(
            f"expected {', '.join(stray)} inside `sampling`, as in"
            f" sample(model, inputs, seeds, Sampling({stray[0]}={options[stray[0]]!r}))"
        )
    if ignored := sorted(PASSED_OVER & options.keys()):
        raise ValueError(
            f"`sample` draws by itself, and {', '.join(ignored)} would mean nothing: set"
            " `sampling`, or call `generate`"
        )
    if parts := separate_parts(model, inputs):
        refuse_for_parts(model, options)
        found = run_parts(
            parts,
            lambda rows, columns: sample(
                model,
                part_of(inputs, rows, columns),
                [seeds[row] for row in rows.tolist()],
                sampling,
                show_progress=show_progress,
                **options,
            ),
        )
        return joined(inputs, found, end_of_text(model, options))
    processors = LogitsProcessorList(options.pop("logits_processor", ()))
    processors += sampling.processors(inputs["attention_mask"], seeds)
    length = sampling.max_new_tokens
    with progress_bar(length, "Generating", "token", show_progress) as bar:
        processors.append(_Bar(bar))
        # Checkpoints name tokens to pad with that do not exist (-1), or that are words.
        pad = end_of_text(model, options)
        own = {**neutral_options(), "pad_token_id": pad, "max_new_tokens": length, **options}
        return generate(model, inputs, logits_processor=processors, **own)
