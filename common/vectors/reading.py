"""Read activations: of every forward pass while a block is open, or of one token of each of many prompts, fast."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.arguments import integer, is_integer
from common.passes.hooks import EndOfPass, uncompiled
from common.passes.prompts import Prompt, check_prompts, prompt_ids
from common.passes.running import in_evaluation_mode, input_device
from common.places.blocks import get_hidden
from common.places.sites import LayerType, ModelLayerConfig, get_layers
from common.progress import bar_options

ReadTokenIndex = int | Callable[[Prompt], int]


@contextmanager
def record_activations(
    model: nn.Module,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    clone_activations: bool = True,
    layer_nums: Sequence[int] | None = None,
) -> Iterator[dict[int, list[Tensor]]]:
    """Record what every forward pass gives at the layers of a type, while the block is open.

    What is recorded includes the steering that is open around it: activations are taken where the
    next module reads them. What is compiled runs uncompiled meanwhile, since compiled code would
    not see that somebody looks.

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

    def recorder(layer: int) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = get_hidden(output)
            records[layer].append(hidden.detach().clone() if clone_activations else hidden)

        return hook

    with _hooks({module: recorder(layer) for layer, module in layers.items()}):
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

    A prompt that occurs more than once is computed once, and of prompts that are the same up to the
    token that is read only
    the first is: no token looks ahead, so their activations there are equal, to the last bit.
    Prompts of like length share a batch, the pass ends after the last layer that is wanted, and
    only the tokens that are read are kept. Dropout is off while it reads, whatever the mode of the
    model; the mode is put back afterwards. A compiled model runs uncompiled.

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
        batch_size: prompts in one pass. The results do not depend on it but for rounding.
        move_to_cpu: keep the activations on the CPU, whatever the device of the model.
        show_progress: show a bar that counts the prompts that are computed.
        tqdm_desc: what stands in front of the bar.
        prepend_bos: what stands in front of a text: by default what the tokenizer puts there; see
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
    rows, reads = _plan(model, tokenizer, prompts, read_token_index, prepend_bos)
    kept = {layer: _Kept(len(reads.slots), move_to_cpu) for layer in modules}
    last = max(modules)
    batch: dict[str, Any] = {}
    device = input_device(model)

    def reader(layer: int) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = get_hidden(output)
            if hidden.shape[:2] != batch["shape"]:
                expected, given = list(batch["shape"]), list(hidden.shape)
                raise ValueError(
                    f"layer {layer}: expected an output [batch, pos, d_model] for a batch"
                    f" {expected}, got {given}"
                )
            index, position = (batch[name].to(hidden.device) for name in ("rows", "positions"))
            kept[layer].store(batch["slots"], hidden[index, position])
            if layer == last:
                raise EndOfPass

        return hook

    pad = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    options = {"use_cache": False} if _accepts(model, "use_cache") else {}
    bar = tqdm(
        total=len(rows), desc=tqdm_desc, unit="prompt", disable=not show_progress, **bar_options()
    )
    with (
        in_evaluation_mode(model),
        _hooks({module: reader(layer) for layer, module in modules.items()}),
        bar,
    ):
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            # Padding on the right changes no position: what stands in front of it does not see it.
            length = max(map(len, chunk))
            ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in chunk])
            attention_mask = torch.tensor(
                [[1] * len(row) + [0] * (length - len(row)) for row in chunk]
            )
            wanted = [
                (index, position, slot)
                for index, row in enumerate(chunk)
                for position, slot in reads.of(row)
            ]
            batch["rows"], batch["positions"], batch["slots"] = torch.tensor(wanted).T
            batch["shape"] = ids.shape
            try:
                model(input_ids=ids.to(device), attention_mask=attention_mask.to(device), **options)
            except EndOfPass:
                pass
            bar.update(len(chunk))
    order = torch.tensor(reads.order)
    return {
        layer: found.values[order.to(found.values.device)] for layer, found in sorted(kept.items())
    }


class _Kept:
    """The activations that were read at one layer, each in its slot."""

    def __init__(self, count: int, move_to_cpu: bool):
        self.count, self.move_to_cpu = count, move_to_cpu
        self.values: Tensor = torch.empty(0)

    def store(self, slots: Tensor, values: Tensor) -> None:
        """Put values [n, d_model] into slots [n]."""
        if self.move_to_cpu:
            values = values.cpu()
        if not self.values.numel():
            self.values = values.new_empty(self.count, values.shape[-1])
        self.values[slots.to(values.device)] = values


class _Reads:
    """Which tokens are read: every sequence of tokens once, in a slot of its own, at its last one."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, ...], int] = {}
        self.order: list[int] = []
        self._by_row: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)

    def add(self, row: tuple[int, ...], position: int) -> None:
        """Read this position of this prompt, or of an earlier one that is the same up to there: nothing looks ahead."""
        seen = row[: position + 1]
        if seen not in self.slots:
            slot = self.slots[seen] = len(self.slots)
            self._by_row[row].append((position, slot))
        self.order.append(self.slots[seen])

    def of(self, row: tuple[int, ...]) -> list[tuple[int, int]]:
        """The positions and slots of a prompt."""
        return self._by_row[row]

    def rows(self) -> list[tuple[int, ...]]:
        """The prompts of which something is read."""
        return list(self._by_row)


def _plan(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    read_token_index: ReadTokenIndex | Sequence[int],
    prepend_bos: bool | None,
) -> tuple[list[tuple[int, ...]], _Reads]:
    """The distinct prompts as token ids, the longest first, and what is read of each."""
    check_prompts(prompts)
    if callable(read_token_index):
        indices = [read_token_index(prompt) for prompt in prompts]
    elif not isinstance(read_token_index, Iterable) or getattr(read_token_index, "ndim", 1) == 0:
        indices = [read_token_index] * len(prompts)
    else:
        indices = list(read_token_index)
        if len(indices) != len(prompts):
            raise ValueError(
                f"expected one read index for each of {len(prompts)} prompts, got {len(indices)}"
            )
    rows = [tuple(row) for row in prompt_ids(tokenizer, prompts, prepend_bos)]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    reads = _Reads()
    for prompt, row, index in zip(prompts, rows, indices):
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
        reads.add(row, int(index) % len(row))
    # The longest first: a batch that does not fit into memory fails at once, and the bar is never
    # too hopeful.
    return sorted(reads.rows(), key=len, reverse=True), reads


@contextmanager
def _hooks(by_module: dict[nn.Module, Callable]) -> Iterator[None]:
    """Forward hooks that go when the block ends. What is compiled runs as it is meanwhile: it would not see them."""
    handles = []
    try:
        for module, hook in by_module.items():
            handles.append(module.register_forward_hook(hook))
        with uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _accepts(model: nn.Module, name: str) -> bool:
    """Whether the forward pass takes an argument of this name."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
