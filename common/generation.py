"""Logits and completions of a Hugging Face causal language model, steered or not.

`inputs` is what the tokenizer returns: `input_ids` and `attention_mask`, [batch, pos], padded on the left.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BatchEncoding,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from common.hooking import prompts_of
from common.passes import evaluating, neutral_options, part_of, pass_inputs, run_parts, separate_parts
from common.progress import progress_bar
from common.prompts import Prompt, prompt_ids


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], prepend_bos: bool | None = True
) -> BatchEncoding:
    """Tokenize prompts, texts or messages, into one batch, padded on the left; the tokenizer needs no pad token.

    What stands in front is decided by the rule of `prompts.prompt_ids`: by default one BOS where the tokenizer has one.

    Raises:
        ValueError: a prompt without tokens, or what `prompt_ids` raises.
    """
    rows = prompt_ids(tokenizer, prompts, prepend_bos)
    if not all(rows):
        raise ValueError("expected prompts of one token or more, got an empty one")
    return left_padded(tokenizer, rows)


def left_padded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> BatchEncoding:
    """Put rows of token ids, each of one or more, into one batch."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    length = max(map(len, rows))
    ids = torch.tensor([[*[pad] * (length - len(row)), *row] for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return BatchEncoding({"input_ids": ids, "attention_mask": mask})


@torch.no_grad()
@evaluating
def logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run one forward pass and return the logits [batch, pos, vocab]; those of padding mean nothing.

    Each row gets what it gets alone: models that padding disturbs (Bart, RecurrentGemma) run each length by itself, RWKV each row.
    Dropout is off, whatever the mode of the model.
    """
    found = run_parts(separate_parts(model, inputs), lambda *part: model(**part_of(inputs, *part)).logits)
    return _in_place(inputs, found) if found else model(**pass_inputs(inputs)).logits


def _in_place(inputs: Mapping[str, Tensor], found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Put the logits of parts, (rows, columns, [n, pos, vocab]), where they belong in the batch; 0 at padding."""
    first = found[0][2]
    whole = first.new_zeros(*inputs["input_ids"].shape, first.shape[-1])
    for rows, columns, values in found:
        whole[rows[:, None], columns.nonzero()[:, 0]] = values
    return whole


def generation_options(**options: Any) -> dict[str, Any]:
    """Fill in the options of `generate`: greedy unless told otherwise, 20 new tokens, and no top-k nobody asked for.

    Hugging Face keeps only the 50 likeliest tokens when it samples, unless `top_k=0`; the published settings of
    activation additions have no top-k.
    """
    options = {"max_new_tokens": 20, "do_sample": False, **options}
    if options["do_sample"]:
        options.setdefault("top_k", 0)
    return options


@evaluating
def generate(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Continue the prompts and return the token ids [batch, pos + new], prompt included.

    This is transformers' own `generate`: what the options leave open is as `model.generation_config` says, and checkpoints
    bring settings along (a repetition penalty, tokens that are suppressed, beams). `sample` is free of them.

    Args:
        model: a causal language model, as `load_model` returns it.
        inputs: what the tokenizer returned.
        options: for `model.generate`, on top of `generation_options`. To sample, call `torch.manual_seed` first.

    Each row gets what it gets alone, and dropout is off; see `logits`.

    Raises:
        ValueError: the model cannot run these rows as one batch, and there are options that belong to the whole batch.
    """
    if not (parts := separate_parts(model, inputs)):
        return model.generate(**inputs, **generation_options(**options))
    _refuse_for_parts(model, options)
    found = run_parts(parts, lambda *part: generate(model, part_of(inputs, *part), **options))
    return _joined(inputs, found, _end_of_text(model, options))


WHOLE_BATCH = (
    "logits_processor", "past_key_values", "return_dict_in_generate", "num_return_sequences", "prefix_allowed_tokens_fn", "negative_prompt_ids",
    "negative_prompt_attention_mask",
)  # fmt: skip


def _refuse_for_parts(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Refuse options that know the rows of a batch, where these have to be run by themselves."""
    harmless = {"num_return_sequences": (None, 1), "return_dict_in_generate": (None, False), "logits_processor": (None, [])}
    if name := next((name for name in WHOLE_BATCH if options.get(name) not in harmless.get(name, (None,))), None):
        raise ValueError(f"in a batch, rows of {type(model).__name__} disturb each other: with {name} give one prompt at a time")


def _end_of_text(model: PreTrainedModel, options: Mapping[str, Any]) -> int | None:
    """The first token that ends a text under some options of `generate`, if there is one."""
    end = options.get("eos_token_id")
    end = model.generation_config.eos_token_id if end is None else end
    return end if end is None or isinstance(end, int) else next(iter(end), None)


def _joined(inputs: Mapping[str, Tensor], found: Sequence[tuple[Tensor, Tensor, Tensor]], end: int | None) -> Tensor:
    """Put texts of parts, (rows, columns, ids [n, pos + new]), after their padded prompts; those that ended early are padded."""
    prompts, new = inputs["input_ids"], [ids[:, int(columns.sum()) :] for _, columns, ids in found]
    fill = 0 if end is None else end
    whole = prompts.new_full((len(prompts), max(ids.shape[1] for ids in new)), fill)
    for (rows, _, _), ids in zip(found, new):
        whole[rows, : ids.shape[1]] = ids
    return torch.cat([prompts, whole], dim=1)


def completions(tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Tensor], ids: Tensor, real: Tensor | None = None) -> list[str]:
    """Return the new text of every row: what comes after the prompt, up to the end of text, without special tokens.

    Args:
        tokenizer: the model's tokenizer.
        inputs: the prompts as given to `generate`, [batch, pos].
        ids: what `generate` returned, [batch, pos + new].
        real: which of them belong to the texts (`real_tokens`): needed where what a text ends with is no special token of
            the tokenizer, since rows that ended early are filled up.
    """
    start = inputs["input_ids"].shape[1]
    new = ids[:, start:].tolist() if real is None else [row[kept].tolist() for row, kept in zip(ids[:, start:], real[:, start:])]
    return tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@torch.no_grad()
@evaluating
def text_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Run over prompts and what follows them, and return the logits [batch, pos + new, vocab].

    Steering that counts from the end of the prompt falls where it fell when the text was generated.

    Args:
        model: a causal language model.
        inputs: the prompts, as given to `generate`, [batch, pos].
        ids: prompts and what follows, [batch, pos + new].
    """
    given = inputs["attention_mask"]
    if parts := separate_parts(model, inputs):
        new = torch.ones_like(ids[0, given.shape[1] :], dtype=torch.bool)

        def of_part(rows: Tensor, columns: Tensor) -> Tensor:
            return text_logits(model, part_of(inputs, rows, columns), ids[rows][:, torch.cat([columns, new])])

        found = [(rows, torch.cat([columns, new]), values) for rows, columns, values in run_parts(parts, of_part)]
        return _in_place({"input_ids": ids}, found)
    mask = nn.functional.pad(given, (0, ids.shape[1] - given.shape[1]), value=1)
    with prompts_of(model, given):
        return model(**pass_inputs({"input_ids": ids, "attention_mask": mask}), use_cache=False).logits


def real_tokens(model: PreTrainedModel, inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Return which tokens belong to the texts, [batch, pos + new], bool: no padding, and nothing after the first end of text."""
    rest = ids[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else [], device=ids.device)
    is_end = torch.isin(rest, ends)
    return torch.cat([inputs["attention_mask"].bool(), is_end.long().cumsum(-1) - is_end.long() == 0], dim=1)


class ReservedLayer(DynamicLayer):
    """One layer of a KV cache that is as long as it will be from the start: a new token is written, and nothing copied."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [batch, head, pos, d_head], and return all."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        mine = not start or bool(self.buffers) and self.keys.data_ptr() == self.buffers[0].data_ptr()
        if end > self.length or not mine:  # no room left, or other rows were put in place, as beam search does
            return super().update(key_states, value_states, *args, **kwargs)
        if not start:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [new.new_empty(*new.shape[:2], self.length, new.shape[3]) for new in (key_states, value_states)]
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def write(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Replace what some rows [n] hold by keys and values [n, head, pos, d_head]; all positions."""
        self.keys[rows], self.values[rows] = keys, values


def reserved_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """Return a KV cache for texts of up to `length` tokens that does not copy itself at each new token.

    It pays for large batches of a small model. Layers of another kind (sliding windows) stay what they are.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [ReservedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


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


class TopP(LogitsProcessor):
    """Keep the likeliest tokens that together have at least the probability `top_p`, as `TopPLogitsWarper` of transformers.

    That one sorts the whole vocabulary at every step, which takes longer than a small model. Here only the likeliest tokens
    are sorted, as many as it takes.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [batch, vocab] with all other tokens at minus infinity; the likeliest one always stays."""
        probs = scores.softmax(-1)
        least, enough = self._least(probs.topk(min(32, probs.shape[1])).values)
        if not enough.all():
            least[~enough] = self._least(probs[~enough].sort(descending=True).values)[0]
        return scores.masked_fill(probs < least, -torch.inf)

    def _least(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest probability that is kept, [batch, 1], and whether these likeliest ones [batch, n] reach far enough."""
        total = best.cumsum(-1)
        kept = (total - best < self.top_p).sum(-1, keepdim=True).clamp(min=1)  # 0 only in a row of nan
        return best.gather(-1, kept - 1), total[:, -1] >= self.top_p


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling whose random numbers belong to each row, not to the batch.

    It adds Gumbel noise to the scores, and the largest sum is then a sample of their softmax. The noise of a row comes from
    the seed of that row alone: a prompt gets the same text in any batch, on any device, and rows with equal seeds (a prompt
    steered and unsteered) get equal noise. The global random state is neither read nor changed.

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
        noise = np.stack([generator.standard_exponential(scores.shape[1], dtype=np.float32) for generator in self._generators])
        gumbel = -torch.from_numpy(noise).clamp_(min=torch.finfo(torch.float32).tiny).log_()
        return scores + gumbel.to(scores)[self._rows.to(scores.device)]


class _PerRow(LogitsProcessor):
    """Lets a processor that counts tokens see each row without its padding, which is the end of text and no repetition."""

    def __init__(self, processor: LogitsProcessor, attention_mask: Tensor):
        self.processor, self.starts = processor, (attention_mask == 0).sum(-1).tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = zip(input_ids.split(1), scores.split(1), self.starts)
        return torch.cat([self.processor(ids[:, start:], row) for ids, row, start in rows])


class _Bar(LogitsProcessor):
    """Moves a bar on by one at each token."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.bar.update()
        return scores


def check_sampling(temperature: float, top_p: float, freq_penalty: float, repetition_penalty: float, max_new_tokens: int) -> None:
    """Refuse settings of `sample` that mean nothing.

    Raises:
        ValueError: a temperature or a frequency penalty below 0, a top_p outside (0, 1], a repetition penalty of 0 or less, no
            new tokens.
    """
    if not temperature >= 0 or not math.isfinite(temperature):
        raise ValueError(f"expected a temperature of 0 or more, got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"expected a top_p above 0 and at most 1, got {top_p!r}")
    if not repetition_penalty > 0:
        raise ValueError(f"expected a repetition penalty above 0 (1 is none), got {repetition_penalty!r}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"expected 1 or more new tokens, got {max_new_tokens!r}")
    FrequencyPenalty(freq_penalty)


# They act on the drawing of transformers, which `sample` does not use; "generation_config" would bring all of them.
_PASSED_OVER = {
    "generation_config", "do_sample", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
}  # fmt: skip


def sample(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    seeds: Sequence[int | Sequence[int]],
    *,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_p: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    show_progress: bool = False,
    **options: Any,
) -> Tensor:
    """Sample as in the activation-addition post: temperature, top_p, frequency penalty, and no top-k.

    The order is that of TransformerLens: repetition penalty, temperature, frequency penalty, top_p.

    Nothing but the arguments decides: of `model.generation_config` only the ids of its special tokens are used (a text ends
    where it says), whatever settings of sampling, beams or length the checkpoint came with.

    Args:
        model: a causal language model.
        inputs: what the tokenizer returned, [batch, pos], padded on the left.
        seeds: one for each row; see `SeededSampling`.
        max_new_tokens: length of the completions.
        temperature: 0 is greedy, whatever the seeds.
        top_p: the smallest set of tokens with at least this probability is sampled from.
        freq_penalty: see `FrequencyPenalty`.
        repetition_penalty: the logits of tokens that occurred are divided by it (multiplied where negative); 1 is none.
        show_progress: show a bar that counts tokens, where it takes more than five seconds.
        options: more of `model.generate`, one by one.

    Returns:
        Token ids [batch, pos + new], prompt included.

    Raises:
        ValueError: see `check_sampling`; another number of seeds than rows; an option for the drawing of transformers
            (`do_sample`, `top_k`, …) or a whole `generation_config`, which would mean nothing here.
    """
    check_sampling(temperature, top_p, freq_penalty, repetition_penalty, max_new_tokens)
    if len(seeds) != len(inputs["input_ids"]):
        raise ValueError(f"expected one seed for each of {len(inputs['input_ids'])} rows, got {len(seeds)}")
    if ignored := sorted(_PASSED_OVER & options.keys()):
        raise ValueError(f"`sample` draws by itself, and {', '.join(ignored)} would mean nothing: give its own arguments, or call `generate`")
    if parts := separate_parts(model, inputs):
        alone = partial(
            sample, model, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty, show_progress=show_progress, **options,
        )
        _refuse_for_parts(model, options)
        found = run_parts(parts, lambda *part: alone(part_of(inputs, *part), [seeds[row] for row in part[0].tolist()]))
        return _joined(inputs, found, _end_of_text(model, options))
    mask = inputs["attention_mask"]

    def counting(processor: LogitsProcessor) -> LogitsProcessor:
        return processor if bool(mask.all()) else _PerRow(processor, mask)

    processors = LogitsProcessorList(options.pop("logits_processor", ()))
    if repetition_penalty != 1:
        processors.append(counting(RepetitionPenaltyLogitsProcessor(float(repetition_penalty))))
    if temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if freq_penalty:
        processors.append(counting(FrequencyPenalty(freq_penalty)))
    if temperature:
        if top_p < 1:
            processors.append(TopP(top_p))
        processors.append(SeededSampling(seeds))
    with progress_bar(max_new_tokens, "Generating", "token", show_progress) as bar:
        processors.append(_Bar(bar))
        # Checkpoints name tokens to pad with that do not exist (-1), or that are words.
        own = {**neutral_options(), "pad_token_id": _end_of_text(model, options), "max_new_tokens": max_new_tokens, **options}
        return generate(model, inputs, logits_processor=processors, **own)
