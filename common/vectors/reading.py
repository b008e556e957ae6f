"""Read activations: of all passes while a block is open, or of one token of many prompts, fast."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.arguments import integer, is_integer
from common.passes.hooks import uncompiled
from common.passes.padding import pad_id, padded
from common.passes.prompts import Prompt, check_prompts, prompt_ids
from common.passes.recording import Location, record_pass, recording
from common.passes.running import in_evaluation_mode, input_device
from common.places.blocks import get_hidden, text_config
from common.places.sites import LayerType, ModelLayerConfig, get_layers
from common.progress import bar_options

ReadTokenIndex = int | Callable[[Prompt], int]
Row = tuple[int, ...]  # token ids


@contextmanager
def record_activations(
    model: nn.Module,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    clone_activations: bool = True,
    layer_nums: Sequence[int] | None = None,
) -> Iterator[dict[int, list[Tensor]]]:
    """Record what every forward pass gives at the layers of a type, while the block is open.

    That includes the steering that is open around the block: activations are taken where the next
    module reads them. A compiled model runs uncompiled meanwhile, since compiled code would not run
    the hooks.

    Args:
        model: a causal language model. It is not changed; the hooks go when the block ends, also
            after an exception.
        layer_type: which part of the blocks.
        layer_config: matchers for parts that are not found by themselves.
        clone_activations: False keeps the tensors of the model, with their gradients; True keeps
            detached copies.
        layer_nums: which layers, negative ones counted from the last; all by default.

    Yields:
        By layer number, one tensor [batch, pos, d_model] for each pass.

    Raises:
        ValueError: an unknown layer type or layer.
    """
    layers = get_layers(model, layer_type, layer_config, layer_nums)
    records: dict[int, list[Tensor]] = defaultdict(list)

    def record(layer: int, output: Any) -> None:
        hidden = get_hidden(output)
        records[layer].append(hidden.detach().clone() if clone_activations else hidden)

    with recording({layer: (module, "output") for layer, module in layers.items()}, record):
        yield records


@torch.no_grad()
def read_activations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    layers: Sequence[int] | None = None,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    read_token_index: ReadTokenIndex | Sequence[int] = -1,
    batch_size: int = 1,
    move_to_cpu: bool = False,
    show_progress: bool = False,
    tqdm_desc: str = "Reading activations",
    prepend_bos: bool | None = None,
) -> dict[int, Tensor]:
    """Read the activations of one token of each prompt.

    Of prompts that are the same up to the token that is read, only the first is computed: no token
    looks ahead, so their activations there are equal. Prompts of similar length share a batch, the
    pass ends after the last layer that is wanted, and only the tokens that are read are kept.
    Dropout is off, whatever the mode of the model; the mode comes back afterwards. A compiled model
    runs uncompiled.

    Args:
        model: a causal language model; unchanged afterwards.
        tokenizer: its tokenizer; unchanged, and it needs no pad token.
        prompts: texts of any lengths, or messages for a chat model, which the chat template ends
            where the answer begins.
        layers: which layers, negative ones counted from the last; all by default.
        layer_type: which part of the blocks.
        layer_config: matchers for parts that are not found by themselves.
        read_token_index: which token: a number for all (-1 is the last), a callable of the prompt,
            or a list.
        batch_size: prompts in one pass. The results depend on it by rounding only.
        move_to_cpu: keep the activations on the CPU, whatever the device of the model.
        show_progress: show a bar that counts the prompts that are computed.
        tqdm_desc: the label of the bar.
        prepend_bos: what comes before a text: by default what the tokenizer puts there; see
            `prompts.prompt_ids`.

    Returns:
        By layer number, [prompt, d_model] in the order of the prompts, in the dtype of the model.

    Raises:
        ValueError: no prompts, a prompt without tokens or with too many, a read index outside a
            prompt, a batch size below 1, an unknown layer type or layer; what `prompt_ids` raises.
    """
    modules = get_layers(model, layer_type, layer_config, layers)
    if not modules:
        raise ValueError("expected at least one layer, got an empty list")
    batch_size = integer(batch_size, "batch_size", least=1)
    plan = _plan(model, tokenizer, prompts, read_token_index, prepend_bos)
    places: dict[int, Location] = {layer: (module, "output") for layer, module in modules.items()}
    options = {"use_cache": False} if _accepts(model, "use_cache") else {}
    reads, slots = list(plan.reads.items()), dict[Row, int]()
    # One piece for each layer, made by the first batch: thousands of small ones between what a pass
    # frees would leave the memory in holes, ten times as large as they are.
    count, kept = sum(len(ends) for _, ends in reads), dict[int, Tensor]()
    bar = tqdm(
        total=len(reads), desc=tqdm_desc, unit="prompt", disable=not show_progress, **bar_options()
    )
    with in_evaluation_mode(model), uncompiled(), bar:
        for start in range(0, len(reads), batch_size):
            chunk = reads[start : start + batch_size]
            inputs = padded([row for row, _ in chunk], pad_id(tokenizer), side="right")
            wanted = [(index, end) for index, (_, ends) in enumerate(chunk) for end in ends]
            first = len(slots)
            for index, end in wanted:
                slots[chunk[index][0][: end + 1]] = len(slots)
            keep = _reader(inputs["input_ids"].shape, torch.tensor(wanted), move_to_cpu)
            inputs = inputs.to(input_device(model))
            found = record_pass(partial(model, **inputs, **options), places, keep)
            for layer, values in found.items():
                if layer not in kept:
                    kept[layer] = values.new_empty(count, *values.shape[1:])
                kept[layer][first : len(slots)] = values
            bar.update(len(chunk))
    order = torch.tensor([slots[read] for read in plan.wanted])
    return {layer: kept.pop(layer)[order] for layer in sorted(modules)}


def _reader(
    shape: torch.Size, wanted: Tensor, move_to_cpu: bool
) -> Callable[[int, Tensor], Tensor]:
    """Return what keeps the tokens `wanted` [n, 2], row and position, of a batch [batch, pos]."""

    def keep(layer: int, hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != shape:
            raise ValueError(
                f"layer {layer}: expected an output [batch, pos, d_model] for a batch"
                f" {list(shape)}, got {list(hidden.shape)}"
            )
        rows, positions = wanted.to(hidden.device).T
        read = hidden[rows, positions]
        return read.cpu() if move_to_cpu else read

    return keep


class _Plan(NamedTuple):
    """What is read.

    Attributes:
        reads: the distinct prompts as token ids, the longest first, with the positions to read.
        wanted: for each prompt its tokens up to the one that is read; another prompt that begins
            with them may be the one that is run.
    """

    reads: dict[Row, list[int]]
    wanted: list[Row]


def _plan(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    read_token_index: ReadTokenIndex | Sequence[int],
    prepend_bos: bool | None,
) -> _Plan:
    """Tokenize the prompts and find what has to be read, once each."""
    check_prompts(prompts)
    indices = _indices(prompts, read_token_index)
    limit = getattr(text_config(model), "max_position_embeddings", None)
    reads: dict[Row, list[int]] = defaultdict(list)
    wanted: list[Row] = []
    seen: set[Row] = set()
    for prompt, ids, index in zip(prompts, prompt_ids(tokenizer, prompts, prepend_bos), indices):
        row = tuple(ids)
        if not row or (limit and len(row) > limit):
            raise ValueError(
                f"the prompt {prompt!r} has {len(row)} tokens; expected 1 to"
                f" {limit or 'any number'}"
            )
        if not is_integer(index) or not -len(row) <= index < len(row):
            raise ValueError(
                f"cannot read token {index!r} of {prompt!r}: it has {len(row)} tokens, so expected"
                f" {-len(row)} to {len(row) - 1}"
            )
        position = int(index) % len(row)
        wanted.append(row[: position + 1])
        if wanted[-1] not in seen:  # no token looks ahead, so what comes after it does not matter
            seen.add(wanted[-1])
            reads[row].append(position)
    # The longest first: a batch that does not fit into memory fails at once, and the bar is never
    # too hopeful.
    return _Plan({row: reads[row] for row in sorted(reads, key=len, reverse=True)}, wanted)


def _indices(
    prompts: Sequence[Prompt], read_token_index: ReadTokenIndex | Sequence[int]
) -> list[int]:
    """Return which token of each prompt is read."""
    if callable(read_token_index):
        return [read_token_index(prompt) for prompt in prompts]
    if not isinstance(read_token_index, Iterable) or getattr(read_token_index, "ndim", 1) == 0:
        return [cast(int, read_token_index)] * len(prompts)
    indices = list(read_token_index)
    if len(indices) != len(prompts):
        raise ValueError(
            f"expected one read index for each of {len(prompts)} prompts, got {len(indices)}"
        )
    return indices


def _accepts(model: nn.Module, name: str) -> bool:
    """Say whether the forward pass takes an argument of this name."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
