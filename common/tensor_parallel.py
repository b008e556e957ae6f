"""Models whose weights are split over several processes: tensor parallelism of transformers.

Every process holds a part of each large matrix, and all run every pass together. What a block, its
attention, its MLP and its norms give is whole in every process, and the same; what lies between
the two matrices of an attention or MLP is in parts.

Source: Megatron-LM (https://arxiv.org/abs/1909.08053); `transformers.distributed.tensor_parallel`.
"""

import importlib
import os
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.distributed
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PretrainedConfig

NEEDED = "5.19"  # the version of transformers from which on plans and meshes are what they are here


def is_part(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, of which each process may hold a part only."""
    return hasattr(tensor, "full_tensor")


def is_split(module: nn.Module) -> bool:
    """Whether weights of a module are split over processes."""
    return any(map(is_part, module.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one process would have it. Every process has to ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def of_the_first(model: nn.Module, ask: Callable[[], Any]) -> Any:
    """Return what the first process of a split model answers; of a whole model the only one.

    An exception of the first is raised in all.
    """
    if not is_split(model):
        return ask()
    told: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            told[0] = ask()
        except Exception as error:
            told[1] = error
    torch.distributed.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def bias_beside(weight: Tensor, bias: Tensor) -> Tensor:
    """Return a bias as the layer of a weight needs it, also where that is split over processes.

    Where the rows of the weight are split, each process gets its part of the bias. Where the
    columns are, each gets all of it, and transformers adds it once, to the sum over the processes.

    Args:
        weight: of a linear layer, [out, in].
        bias: [out], the same in every process.
    """
    if not is_part(weight) or is_part(bias):
        return bias
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, split = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    found = DTensor.from_local(bias, mesh, [Replicate()] * len(split), run_check=False)
    return found.redistribute(placements=[one if one == Shard(0) else Replicate() for one in split])


def refuse_split(model: nn.Module, library: str) -> None:
    """Refuse a split model for a library that takes each process's part for the whole.

    Raises:
        ValueError: the model is split over processes.
    """
    if is_split(model):
        raise ValueError(
            f"{library} knows nothing of models that are split over processes, and would take this"
            " process's part of a weight or of an attention for the whole: load the model whole, or"
            " steer another way"
        )


def refuse_parts(block: nn.Module, module: nn.Module, path: str) -> None:
    """Refuse a module of a block of which this process sees a part only.

    Args:
        block: the block, whose weights may be split.
        module: the block, or a module in it.
        path: the name of the module, for the error.

    Raises:
        ValueError: what the module gives is in parts.
    """
    sums = any(_by_columns(weight) for weight in module.parameters(recurse=False))
    if module is block or sums or not is_split(block):
        return
    direct = module in block.children()
    if not direct or any(is_part(weight) for weight in module.parameters(recurse=False)):
        raise ValueError(
            f"{path} gives this process a part only, since the model is split over several:"
            " expected the block, its attention, its MLP or a norm, or the layer that such a part"
            " ends with (o_proj, down_proj)"
        )


def _by_columns(weight: Tensor) -> bool:
    """Whether a weight [out, in] is split by its columns, so that the layer's output is summed."""
    return is_part(weight) and any(
        one.is_shard(weight.dim() - 1) and weight.dim() > 1
        for one in weight.placements  # type: ignore[attr-defined]
    )


def own_forwards(copied: nn.Module) -> None:
    """Let the modules of a copied model compute with their own weights. THE COPY IS CHANGED.

    transformers puts a function in the place of `forward` of a split module, and the function
    remembers the module for which it was made: that of a copy would compute with the original's,
    so that a bias of the copy would do nothing, without a word.

    nnsight 0.8 looks for a function where transformers 5.19 had it. From now on it finds it there.

    Raises:
        ValueError: a module is split in a way that the plan of the model does not name.
    """
    mesh = next((part.device_mesh for part in copied.parameters() if is_part(part)), None)  # type: ignore[attr-defined]
    if mesh is None:
        return
    styles = importlib.import_module("transformers.distributed.tensor_parallel")
    if not hasattr(styles, "_get_parameter_plan"):
        moved = importlib.import_module("transformers.distributed.parallel_utils")
        styles._get_parameter_plan = moved._get_parameter_plan  # type: ignore[attr-defined]
    plan: Any = getattr(copied, "tp_plan", None) or {}
    for name, module in copied.named_modules():
        if not isinstance(vars(module).get("forward"), FunctionType):
            continue
        style = plan.get(styles.replace_layer_number_by_wildcard(name))
        if style is None:
            raise ValueError(
                f"cannot copy {type(copied).__name__}: {name or 'the model'} has a `forward` of its"
                " own that the plan by which the model is split does not explain"
            )
        del module.forward
        styles.ALL_PARALLEL_STYLES[style].install_forward(module, mesh)


def processes_for(config: PretrainedConfig) -> int:
    """Return over how many processes a model is to be split: `WORLD_SIZE`, which torchrun sets.

    Raises:
        ValueError: this process is alone; transformers is too old, or has no plan for the
            architecture; the heads are no multiple of the processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        raise ValueError(
            "this process is alone; start it as one of a group, as `torchrun --nproc-per-node 2"
            " program.py` or RayEngine(tensor_parallel=2) does"
        )
    if Version(transformers.__version__).release < Version(NEEDED).release:
        raise ValueError(
            f"that needs transformers {NEEDED}, and {transformers.__version__} is here"
        )
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ValueError(
            f"transformers has no plan for {text.model_type}; device='auto' spreads any model over"
            " the devices of one process, block by block"
        )
    for entry in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(text, entry, None)
        if isinstance(number, int) and number % count:
            raise ValueError(
                f"{count} processes cannot share {entry}={number}; take a divisor of it"
            )
    return count
