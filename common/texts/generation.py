"""Logits and completions of a Hugging Face causal language model, steered or not.

`inputs` is what the tokenizer returns: `input_ids` and `attention_mask`, [batch, pos], padded on
the left.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.passes.batching import part_of, run_parts, separate_parts
from common.passes.hooks import prompts_of
from common.passes.running import evaluating, pass_inputs


@torch.no_grad()
@evaluating
def logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run one forward pass and return the logits, [batch, pos, vocab].

    Those of padding mean nothing. Each row gets what it gets alone: models that padding disturbs
    (Bart, RecurrentGemma) run each length by itself, RWKV each row. Dropout is off, whatever the
    mode of the model.
    """
    found = run_parts(
        separate_parts(model, inputs), lambda *part: model(**part_of(inputs, *part)).logits
    )
    return _in_place(inputs, found) if found else model(**pass_inputs(inputs)).logits


def _in_place(
    inputs: Mapping[str, Tensor], found: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """Put the logits of parts, (rows, columns, [n, pos, vocab]), into their batch; 0 at padding."""
    first = found[0][2]
    whole = first.new_zeros(*inputs["input_ids"].shape, first.shape[-1])
    for rows, columns, values in found:
        whole[rows[:, None], columns.nonzero()[:, 0]] = values
    return whole


def generation_options(**options: Any) -> dict[str, Any]:
    """Fill in the options of `generate`: greedy, 20 new tokens, and no top-k nobody asked for.

    Hugging Face keeps only the 50 likeliest tokens when it samples, unless `top_k=0`; the published
    settings of activation additions have no top-k.
    """
    options = {"max_new_tokens": 20, "do_sample": False, **options}
    if options["do_sample"]:
        options.setdefault("top_k", 0)
    return options


@evaluating
def generate(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Continue the prompts and return the token ids [batch, pos + new], prompt included.

    This is transformers' own `generate`: what the options leave open is as
    `model.generation_config` says, and checkpoints bring settings along (a repetition penalty,
    tokens that are suppressed, beams). `sample` is free of them.

    Args:
        model: a causal language model, as `load_model` returns it.
        inputs: what the tokenizer returned.
        options: for `model.generate`, on top of `generation_options`. To sample, call
            `torch.manual_seed` first.

    Each row gets what it gets alone, and dropout is off; see `logits`.

    Raises:
        ValueError: the model cannot run these rows as one batch, and there are options that belong
            to the whole batch.
    """
    if not (parts := separate_parts(model, inputs)):
        own: Any = model.generate
        return own(**inputs, **generation_options(**options))
    refuse_for_parts(model, options)
    found = run_parts(parts, lambda *part: generate(model, part_of(inputs, *part), **options))
    return joined(inputs, found, end_of_text(model, options))


WHOLE_BATCH = (
    "logits_processor",
    "past_key_values",
    "return_dict_in_generate",
    "num_return_sequences",
    "prefix_allowed_tokens_fn",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)


def refuse_for_parts(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Refuse options that know the rows of a batch, where these have to be run by themselves."""
    harmless = {
        "num_return_sequences": (None, 1),
        "return_dict_in_generate": (None, False),
        "logits_processor": (None, []),
    }
    if name := next(
        (name for name in WHOLE_BATCH if options.get(name) not in harmless.get(name, (None,))), None
    ):
        raise ValueError(
            f"in a batch, rows of {type(model).__name__} disturb each other: with {name} give one"
            " prompt at a time"
        )


def end_of_text(model: PreTrainedModel, options: Mapping[str, Any]) -> int | None:
    """The first token that ends a text under some options of `generate`, if there is one."""
    end = options.get("eos_token_id")
    end = model.generation_config.eos_token_id if end is None else end
    return end if end is None or isinstance(end, int) else next(iter(end), None)


def joined(
    inputs: Mapping[str, Tensor], found: Sequence[tuple[Tensor, Tensor, Tensor]], end: int | None
) -> Tensor:
    """Put texts of parts, (rows, columns, ids [n, pos + new]), after their padded prompts.

    Those that ended early are padded.
    """
    prompts, new = inputs["input_ids"], [ids[:, int(columns.sum()) :] for _, columns, ids in found]
    fill = 0 if end is None else end
    whole = prompts.new_full((len(prompts), max(ids.shape[1] for ids in new)), fill)
    for (rows, _, _), ids in zip(found, new):
        whole[rows, : ids.shape[1]] = ids
    return torch.cat([prompts, whole], dim=1)


def completions(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    ids: Tensor,
    real: Tensor | None = None,
) -> list[str]:
    """Return the new text of every row: from the prompt to the end of text, no special tokens.

    Args:
        tokenizer: the model's tokenizer.
        inputs: the prompts as given to `generate`, [batch, pos].
        ids: what `generate` returned, [batch, pos + new].
        real: which of them belong to the texts (`real_tokens`): needed where what a text ends with
            is not a special token of the tokenizer, since rows that ended early are filled up.
    """
    start = inputs["input_ids"].shape[1]
    new = (
        ids[:, start:].tolist()
        if real is None
        else [row[kept].tolist() for row, kept in zip(ids[:, start:], real[:, start:])]
    )
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
            return text_logits(
                model, part_of(inputs, rows, columns), ids[rows][:, torch.cat([columns, new])]
            )

        found = [
            (rows, torch.cat([columns, new]), values)
            for rows, columns, values in run_parts(parts, of_part)
        ]
        return _in_place({"input_ids": ids}, found)
    mask = nn.functional.pad(given, (0, ids.shape[1] - given.shape[1]), value=1)
    with prompts_of(model, given):
        return model(
            **pass_inputs({"input_ids": ids, "attention_mask": mask}), use_cache=False
        ).logits


def real_tokens(model: PreTrainedModel, inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Return which tokens belong to the texts, [batch, pos + new], bool.

    Padding does not, and nothing after the first end of text.
    """
    rest = ids[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(
        (
            model.generation_config.eos_token_id
            if model.generation_config.eos_token_id is not None
            else []
        ),
        device=ids.device,
    )
    is_end = torch.isin(rest, ends)
    return torch.cat(
        [inputs["attention_mask"].bool(), is_end.long().cumsum(-1) - is_end.long() == 0], dim=1
    )
