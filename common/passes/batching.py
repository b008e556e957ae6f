"""Which rows may share a batch, so that each gets what it gets alone.

Most models take padding on the left well, once positions are counted from the attention mask. Some
do not: the decoders of Bart and its kin number the columns, and in RWKV and RecurrentGemma the
padding enters the recurrent state. Which rows may share a batch is measured on the model, once, and
not looked up in a list of names.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from common.passes.hooks import WATCHED, unsteered
from common.passes.running import in_evaluation_mode, pass_inputs
from common.places.positions import reading_part

Batching = Literal["any", "equal", "alone"]
PROBE, PADDING = 8, 3  # tokens of the row that tries batches out, and padding before it
_batching: WeakKeyDictionary[nn.Module, Batching] = WeakKeyDictionary()


def unhooked(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares all but hooks and modes: hooks of the model miss it.

    A model that is offloaded, or holds modules of other libraries, is returned itself: accelerate
    and TransformerLens tie modules together in ways of their own.
    """
    known = ("torch.", "transformers.", "accelerate.")
    if any(
        hasattr(module, "_hf_hook") or not type(module).__module__.startswith(known)
        for module in model.modules()
    ):
        return model
    clones: dict[nn.Module, nn.Module] = {}

    def clone(module: nn.Module) -> nn.Module:
        if module not in clones:
            twin = clones[module] = copy.copy(module)
            twin._modules = {
                name: child if child is None else clone(child)
                for name, child in module._modules.items()
            }
            twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
            for name in WATCHED:  # they belong to the original
                vars(twin).pop(name, None)
        return clones[module]

    # Not the compiled one: it would be compiled for these shapes.
    return clone(getattr(model, "_orig_mod", model))


@torch.no_grad()
def same_logits(found: Tensor, expected: Tensor) -> bool:
    """Say whether logits [..., vocab] of two passes differ by rounding only.

    Rounding is about 1e-6 of them in fp32, and up to 2e-2 in bf16.
    """
    precise = expected.dtype in (torch.float32, torch.float64)
    found, expected = (
        part - part.mean(-1, keepdim=True)
        for part in (found.float(), expected.to(found.device).float())
    )
    return bool((found - expected).norm() <= (1e-4 if precise else 3e-2) * expected.norm())


# What a checkpoint says about tokens and not about sampling.
_OF_THE_CHECKPOINT = {
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "transformers_version",
}
# What has to have a value; for all other settings None means none.
_NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "use_cache": True,
    "return_dict_in_generate": False,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}


def neutral_options() -> dict[str, Any]:
    """Return every setting of `generate`, as if no checkpoint had said anything.

    They are to be keyword arguments: what a `GenerationConfig` leaves open, transformers takes from
    the model's own.
    """
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    return {name: _NEUTRAL.get(name) for name in names - _OF_THE_CHECKPOINT}


def first_logits(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Return the logits of the first two tokens that a model generates, [batch, 2, vocab]."""
    options |= {
        "max_new_tokens": 2,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    generate = cast(Callable, model.generate)
    found = generate(**inputs, **neutral_options() | options)
    return torch.stack(found.logits, dim=1)


@torch.no_grad()
def batching(model: nn.Module, inputs: Mapping[str, Tensor]) -> Batching:
    """Return which rows may share a batch, in a pass and in generation.

    It is measured once for each model, on the beginning of the longest row. Hooks on the model do
    not notice, unless it is offloaded or holds modules of other libraries. A model that refuses
    these trials (because a module takes batches of one shape only, say) gets its batches whole.

    Args:
        model: a causal language model; unchanged.
        inputs: a batch, [batch, pos].

    Returns:
        "any" rows, padded on the left; those of "equal" length; or every row by itself, "alone".
    """
    if model not in _batching:
        try:
            _batching[model] = _measured_batching(unhooked(model), inputs)
        except Exception:  # whatever an unknown module raises; the pass itself will raise it again
            return "any"
    return _batching[model]


def _measured_batching(model: nn.Module, inputs: Mapping[str, Tensor]) -> Batching:
    mask = inputs["attention_mask"].bool()
    longest = mask.sum(-1).argmax()
    row = inputs["input_ids"][longest, mask[longest]][:PROBE]
    count, other = len(row), row.flip(0).repeat(1 + PADDING)
    pad = row[:1] if bool(mask.all()) else inputs["input_ids"][~mask][:1]
    ids = torch.stack([torch.cat([pad.expand(PADDING), row]), other[: count + PADDING]])
    padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded["attention_mask"][0, :PADDING] = 0
    equal = {
        "input_ids": torch.stack([row, other[:count]]),
        "attention_mask": torch.ones_like(ids)[:, :count],
    }
    alone = {name: values[:1] for name, values in equal.items()}
    with unsteered(), in_evaluation_mode(model):
        expected, text = model(**alone).logits[0], first_logits(model, alone)[0]
        if same_logits(model(**pass_inputs(padded)).logits[0, PADDING:], expected) and same_logits(
            first_logits(model, padded)[0], text
        ):
            return "any"
        # transformers 5.23 generates with RWKV as if all rows of a batch had the state of one.
        return "equal" if same_logits(first_logits(model, equal)[0], text) else "alone"


def separate_parts(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the parts in which a batch has to run; none where it can run whole.

    Returns:
        For each part its rows [n], and which columns hold their tokens, [pos], bool.
    """
    mask = inputs["attention_mask"].bool()
    if (len(mask) == 1 and bool(mask.all())) or (how := batching(model, inputs)) == "any":
        return []
    if how == "alone":
        return [
            (torch.tensor([number], device=mask.device), columns)
            for number, columns in enumerate(mask)
        ]
    kept, part = mask.unique(dim=0, return_inverse=True)
    parts = [((part == number).nonzero()[:, 0], columns) for number, columns in enumerate(kept)]
    return [] if bool(mask.all()) else parts


def part_of(inputs: Mapping[str, Tensor], rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """Return some rows of a batch without their padding, as `separate_parts` names them."""
    return {name: values[rows][:, columns] for name, values in inputs.items()}


def run_parts(
    parts: Sequence[tuple[Tensor, Tensor]], run: Callable[[Tensor, Tensor], Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run a batch in its parts (`separate_parts`), each steered as its rows of the batch are.

    Returns:
        For each part its rows, its columns, and what `run` of both gives.
    """
    total, found = sum(len(rows) for rows, _ in parts), []
    for rows, columns in parts:
        with reading_part(rows, total):
            found.append((rows, columns, run(rows, columns)))
    return found
