"""Where steering acts: the transformer blocks of a Hugging Face causal language model.

Notation: `hidden` is the residual stream after block `layer` (resid_post of `layer` = resid_pre of
`layer + 1`), shape [batch, pos, d_model]. Layers count from 0.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from common.arguments import finite_product, is_integer


def text_config(model: nn.Module) -> PretrainedConfig:
    """Return the config of a model's language part, where images or sound have one of their own."""
    config = cast(PretrainedConfig, model.config)
    return config.get_text_config()


def get_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the transformer blocks of a model of any architecture.

    Args:
        model: a Hugging Face causal language model.

    Returns:
        The path of the list, for example `"transformer.h"`, and the list itself.

    Raises:
        ValueError: the model has no list of modules that is as long as its config says, or more
            than one; it is not a causal language model, or its blocks give something other than
            one residual stream [batch, pos, d_model].
    """
    _refuse_other_models(model)
    count = text_config(model).num_hidden_layers
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    # A list inside another one belongs to a block: the experts of a mixture, say.
    found = {
        name: blocks
        for name, blocks in found.items()
        if not any(name.startswith(f"{o}.") for o in found)
    }
    if len(found) != 1:
        raise ValueError(
            f"expected one list of {count} blocks in {type(model).__name__}, found"
            f" {sorted(found) or 'none'}"
        )
    return next(iter(found.items()))


# What blocks give where it is not [batch, pos, d_model], by the entry of the config that says so.
OTHER_STREAMS = {
    "altup_num_inputs": "several copies of the residual stream (AltUp)",
    "hc_mult": "several copies of the residual stream (hyper-connections)",
    "ngram": "one stream for each token of an n-gram",
    "mem_len": "positions in front of the batch",
    "prompt_types": "a prompt of their own in front of the tokens",
}


def _refuse_other_models(model: nn.Module) -> None:
    """Refuse what is not a causal language model, and blocks that give no single stream.

    Raises:
        ValueError: it names the model and the reason.
    """
    config, name = text_config(model), type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} has an encoder and a decoder: expected a causal language model, the decoder"
            " alone"
        )
    if (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and getattr(config, "is_decoder", None) is False
    ):
        raise ValueError(
            f"{name} reads in both directions (is_decoder=False): expected a causal language model"
        )
    for entry, what in OTHER_STREAMS.items():
        if getattr(config, entry, None) is not None:
            raise ValueError(
                f"blocks of {name} give {what} ({entry} in its config): expected hidden states"
                " [batch, pos, d_model]"
            )


def get_block(model: nn.Module, layer: int) -> nn.Module:
    """Return block `layer`, counted from 0; its output is resid_post of `layer`.

    Raises:
        ValueError: there is no such layer. Negative numbers are refused: in `hidden_states`, -1
            means something else (the state after the final layer norm).
    """
    _, blocks = get_blocks(model)
    if not is_integer(layer) or not 0 <= layer < len(blocks):
        raise ValueError(
            f"layer {layer!r} does not exist: expected an integer from 0 to {len(blocks) - 1}"
        )
    return blocks[layer]


def block_path(model: nn.Module, layer: int) -> str:
    """Return the dotted name of block `layer` inside the model, for example `"transformer.h.5"`."""
    get_block(model, layer)
    return f"{get_blocks(model)[0]}.{layer}"


def get_hidden(output: Tensor | tuple | list) -> Tensor:
    """Return the hidden states [batch, pos, d_model] in a block's output.

    Blocks return a tuple in transformers 4 and the bare tensor in transformers 5 (GPT-1 a list).
    Indexing the tensor with `[0]` would silently pick the first row of the batch.

    Raises:
        ValueError: the output is neither a tensor nor a tuple that begins with one.
    """
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"expected a tensor, or a tuple that begins with one, got {type(hidden).__name__}"
        )
    return hidden


def with_hidden(output: Tensor | tuple | list, hidden: Tensor) -> Tensor | tuple | list:
    """Return a block's output with other hidden states [batch, pos, d_model], in its own form."""
    if not isinstance(output, tuple | list):
        return hidden
    return type(output)([hidden, *output[1:]])


def stream_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype in which a module computes: that of its weights that are not quantised.

    Quantised weights (int8, fp8, packed) take one byte each or are integers.
    """
    dtypes = (
        weight.dtype
        for weight in module.parameters()
        if weight.is_floating_point() and weight.element_size() > 1
    )
    return next(dtypes, torch.float32)


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate brings a module's inputs, if it was told one."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):  # several hooks in one
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    return None


def computing_device(block: nn.Module) -> torch.device | None:
    """Return the device on which a block computes: that of accelerate, else that of its weights.

    Weights that accelerate offloads are on "meta" until the block computes.
    """
    told = (execution_device(part) for part in block.modules())
    if (device := next((device for device in told if device is not None), None)) is not None:
        return device
    devices = (weight.device for weight in block.parameters())
    return next((device for device in devices if device.type != "meta"), None)


def check_vector(model: nn.Module, layer: int, vector: Tensor) -> Tensor:
    """Return a steering vector as block `layer` needs it, or refuse it before anything changes.

    Args:
        model: a Hugging Face causal language model.
        layer: the block after which the vector is added.
        vector: [d_model], floating point, finite.

    Returns:
        The vector [d_model], in the dtype (`stream_dtype`) of the block's weights and on the device
        where the block computes; on its own device where nobody knows that.

    Raises:
        ValueError: no such layer; not a floating-point tensor; a shape other than [d_model];
            numbers that are not finite, also in that dtype.
    """
    block = get_block(model, layer)
    d_model = text_config(model).hidden_size
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        given = f"{vector.dtype} tensor" if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"expected a floating-point tensor as steering vector, got a {given}")
    if vector.shape != (d_model,):
        raise ValueError(
            f"expected a steering vector of shape [{d_model}] (d_model), got {list(vector.shape)}"
        )
    if not torch.isfinite(vector).all():
        raise ValueError("expected a steering vector of finite numbers, got one with nan or inf")
    vector = finite_product(1.0, vector, stream_dtype(block), "the steering vector")
    return vector.to(computing_device(block) or vector.device)
