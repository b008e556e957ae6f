"""Which module of a block is read or steered: the five layer types, in a model of any architecture.

A `layer_type` names a part of a block: "decoder_block" (its output is resid_post), "self_attn",
"mlp", "input_layernorm" or "post_attention_layernorm" (the norm before the MLP). A `layer_config`
maps layer types to layer matchers, and a matcher turns a layer number into the path of a module: a
template such as "transformer.h.{num}.attn", or a callable. Names and meaning are those of the
steering-vectors library (https://steering-vectors.github.io/steering-vectors).

A `Site` is a place in a numbered block, as TransformerLens names it ("blocks.6.hook_resid_pre").
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal, NamedTuple, cast

from torch import nn

from common.arguments import is_integer, layer_list
from common.places.blocks import get_blocks
from common.tensor_parallel import is_split, refuse_parts

LayerType = Literal[
    "decoder_block", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"
]
"""A place in a block: its output, that of attention or MLP, or of the layer norm before either."""
LayerMatcher = str | Callable[[int], str] | Callable[[nn.Module, int], str]
"""The path of a module: a text with {num} for the layer, or a function of it that gives it."""
ModelLayerConfig = dict[LayerType, LayerMatcher]
"""Where to find each part of a block, for a model whose parts are not found by themselves."""

# What architectures call the parts of a block, the commonest name first.
PART_NAMES: dict[LayerType, tuple[str, ...]] = {
    "self_attn": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "input_layernorm": (
        "input_layernorm",
        "ln_1",
        "self_attn_layer_norm",
        "ln_attn",
        "attention_norm",
        "norm_1",
    ),
    "post_attention_layernorm": (
        "post_attention_layernorm",
        "ln_2",
        "ln_mlp",
        "ffn_norm",
        "norm_2",
    ),
}
LAYER_TYPES: tuple[LayerType, ...] = ("decoder_block", *PART_NAMES)


class Site(NamedTuple):
    """A place in block `layer`: `part` is "resid_pre", "resid_post" or a layer type."""

    layer: int
    part: str

    def __str__(self) -> str:
        """The name that TransformerLens has for it, where it has one."""
        return (
            _HOOK_NAMES[self.part].format(self.layer)
            if self.part in _HOOK_NAMES
            else f"{self.part} of block {self.layer}"
        )


_HOOK_NAMES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "self_attn": "blocks.{}.hook_attn_out",
    "mlp": "blocks.{}.hook_mlp_out",
}


def parse_site(act_name: int | str | tuple[int, str]) -> Site:
    """Read the name of a place.

    Args:
        act_name: a number l (resid_pre of block l), "blocks.{l}.hook_resid_pre",
            "...hook_resid_post", "...hook_attn_out", "...hook_mlp_out", or a pair (layer, part)
            with "resid_pre", "resid_post" or a layer type as part ("decoder_block" is resid_post).

    Raises:
        ValueError: none of these, or a negative layer.
    """
    layer: object = act_name
    part: object = "resid_pre"
    if isinstance(act_name, tuple) and len(act_name) == 2:
        layer, part = act_name
    elif isinstance(act_name, str):
        hooks = {hook.partition(".{}.")[2]: part for part, hook in _HOOK_NAMES.items()}
        match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", act_name)
        layer, part = (int(match[1]), hooks.get(match[2])) if match else (None, None)
    part = "resid_post" if part == "decoder_block" else part
    if not is_integer(layer) or layer < 0 or part not in ("resid_pre", "resid_post", *PART_NAMES):
        raise ValueError(
            f"unknown site {act_name!r}: expected a block number l (resid_pre of block l),"
            " 'blocks.{l}.hook_resid_pre', 'blocks.{l}.hook_resid_post', or a pair (layer,"
            " part) with 'resid_pre', 'resid_post' or a layer type as part"
        )
    return Site(int(layer), str(part))


def find_site(model: nn.Module, site: Site) -> tuple[nn.Module, Literal["input", "output"]]:
    """Return the module of a site, and which side of it: resid_pre is what the block before gives.

    Raises:
        ValueError: the model has no such layer, or no such part.
    """
    _, blocks = get_blocks(model)
    if site.layer >= len(blocks):
        raise ValueError(
            f"{site} does not exist: {type(model).__name__} has blocks 0 to {len(blocks) - 1}"
        )
    if site.part == "resid_pre":
        return (blocks[site.layer - 1], "output") if site.layer else (blocks[0], "input")
    if site.part == "resid_post":
        return blocks[site.layer], "output"
    part = cast(LayerType, site.part)
    return get_layers(model, part, layers=[site.layer])[site.layer], "output"


def guess_and_enhance_layer_config(
    model: nn.Module,
    layer_config: ModelLayerConfig | None = None,
    layer_type: LayerType | None = None,
) -> ModelLayerConfig:
    """Return a layer config with the missing matchers, as far as the model has such parts.

    Args:
        model: a causal language model.
        layer_config: matchers that are already known; they are kept.
        layer_type: fill in this one only; by default all five.

    Raises:
        ValueError: an unknown layer type, or blocks that cannot be found.
    """
    config: ModelLayerConfig = dict(layer_config or {})
    wanted = LAYER_TYPES if layer_type is None else (layer_type,)
    for name in wanted:
        if name in config:
            continue
        if name not in LAYER_TYPES:
            raise ValueError(
                f"unknown layer_type {name!r}: expected one of {', '.join(LAYER_TYPES)}, or a key"
                " of layer_config"
            )
        path, blocks = get_blocks(model)
        if name == "decoder_block":
            config[name] = f"{path}.{{num}}"
            continue
        # Blocks need not be alike: in hybrid models only some have attention.
        children = {child for block in blocks for child, _ in block.named_children()}
        part = next((part for part in PART_NAMES[name] if part in children), None)
        if part is not None:
            config[name] = f"{path}.{{num}}.{part}"
    return config


def get_num_matching_layers(model: nn.Module, layer_matcher: LayerMatcher) -> int:
    """Return how many layers of the model a matcher finds."""
    return len(_matching_layers(model, layer_matcher))


def get_layers(
    model: nn.Module,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    layers: Iterable[int] | None = None,
) -> dict[int, nn.Module]:
    """Find the modules of a layer type.

    Args:
        model: a causal language model.
        layer_type: which part of the blocks.
        layer_config: matchers for parts that are not found by themselves.
        layers: which layers, counted from 0; negative numbers count from the last. All by default.

    Returns:
        The modules by layer number (never negative), in the order of `layers`.

    Raises:
        ValueError: an unknown layer type, a part or a layer that the model does not have, a layer
            that is given twice, layers that are not a list, or, of a model that is split over
            processes, a module of which each process sees a part only.
    """
    layers = None if layers is None else layer_list(layers)
    config = guess_and_enhance_layer_config(model, layer_config, layer_type)
    if layer_type not in config:
        _, blocks = get_blocks(model)
        parts = ", ".join(name for name, _ in blocks[0].named_children())
        raise ValueError(
            f"{type(model).__name__} has no part that is known as {layer_type!r}; its blocks have"
            f" {parts}. Name the right one, as in layer_config={{{layer_type!r}:"
            f" '{get_blocks(model)[0]}.{{num}}.NAME'}}"
        )
    found = _matching_layers(model, config[layer_type])
    if not found:
        raise ValueError(
            f"no module of {type(model).__name__} matches {config[layer_type]!r}; its modules:"
            f" {_some_names(model)}"
        )
    if layers is None:
        return _whole_outputs(model, found)
    count = max(found) + 1
    numbers: list[int] = []
    for layer in layers:
        number = int(layer) + count * (layer < 0) if is_integer(layer) else None
        if number not in found:
            raise ValueError(
                f"layer {layer!r} does not exist: {type(model).__name__} has {len(found)} layers of"
                f" type {layer_type!r}, {next(iter(found.values()))} to {found[count - 1]}"
            )
        if number in numbers:
            raise ValueError(f"layer {number} is given twice: {layers}")
        numbers.append(number)
    return _whole_outputs(model, {number: found[number] for number in numbers})


def _whole_outputs(model: nn.Module, paths: Mapping[int, str]) -> dict[int, nn.Module]:
    """Return modules by layer number; of a split model only those whose output is whole."""
    modules = {number: model.get_submodule(path) for number, path in paths.items()}
    if is_split(model):
        path_of_blocks, blocks = get_blocks(model)
        for number, path in paths.items():
            if path.startswith(f"{path_of_blocks}."):
                block = path.removeprefix(f"{path_of_blocks}.").partition(".")[0]
                refuse_parts(blocks[int(block)], modules[number], path)
    return modules


def _matching_layers(model: nn.Module, layer_matcher: LayerMatcher) -> dict[int, str]:
    """Return the paths that a matcher finds, by layer number."""
    name_of = _callable(model, layer_matcher)
    names = {name for name, _ in model.named_modules()}
    try:
        count, holes = len(get_blocks(model)[1]), True
    except ValueError:
        count, holes = len(names), False
    found: dict[int, str] = {}
    for num in range(count):
        name = name_of(num)
        if name in names:
            found[num] = name
        elif not holes:
            break
    return found


def _callable(model: nn.Module, layer_matcher: LayerMatcher) -> Callable[[int], str]:
    """Return a matcher as a function of the layer number; callables may take the model as well."""
    if isinstance(layer_matcher, str):
        if "{num}" not in layer_matcher:
            raise ValueError(
                "a layer matcher needs the placeholder {num}, as in 'transformer.h.{num}'; got"
                f" {layer_matcher!r}"
            )
        return lambda num: layer_matcher.replace("{num}", str(num))
    if not callable(layer_matcher):
        raise ValueError(
            f"a layer matcher is a template with {{num}} or a callable, got {layer_matcher!r}"
        )
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        p
        for p in inspect.signature(layer_matcher).parameters.values()
        if p.kind in kinds and p.default is p.empty
    ]
    if len(needed) == 1:
        return cast(Callable[[int], str], layer_matcher)
    return partial(cast(Callable[[nn.Module, int], str], layer_matcher), model)


def _some_names(model: nn.Module) -> str:
    """Return the first names of a model's modules, for an error."""
    names = [name for name, _ in model.named_modules() if name]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
