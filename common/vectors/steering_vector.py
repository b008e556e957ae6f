"""A steering vector: one vector for each of some layers; apply it, save it, load it, compute with it."""

import importlib.metadata
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import gguf
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from common.arguments import finite_number, finite_product, function_of_two, is_integer
from common.passes.hooks import PassHandle, SteeringHook, holder_of_blocks, hook_output, hook_passes
from common.places.blocks import stream_dtype, text_config
from common.places.positions import PositionTracker, TokenSelection
from common.places.sites import LAYER_TYPES, LayerType, ModelLayerConfig, get_layers
from common.vectors.operators import PatchDeltaOperator

FORMAT_VERSION = "1"
_GGUF_ARCHITECTURE = "controlvector"


@dataclass
class SteeringPatchHandle:
    """What `patch_activations` returns: `remove()` takes the steering off the model again."""

    model_hooks: list[RemovableHandle | PassHandle]

    def remove(self) -> None:
        """Take the steering off; a second call does nothing."""
        for hook in self.model_hooks:
            hook.remove()


@dataclass(eq=False)
class SteeringVector:
    """Vectors that steer a model, one for each of some layers.

    The interface is that of the steering-vectors library
    (https://steering-vectors.github.io/steering-vectors), with saving, loading and arithmetic
    added.

    Attributes:
        layer_activations: by layer number (negative ones count from the last layer), a vector
            [d_model].
        layer_type: which part of the blocks it is added to; "decoder_block" is resid_post.
        metadata: where it comes from: the model's name and type, the pairs, the aggregator, the
            versions.

    Raises:
        ValueError: no layers, or something that is no vector of floating-point numbers.
    """

    layer_activations: dict[int, Tensor]
    layer_type: LayerType = "decoder_block"
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.layer_activations, dict) or not self.layer_activations:
            raise ValueError(
                f"expected a dict from layer number to vector, got {self.layer_activations!r}"
            )
        for layer, vector in self.layer_activations.items():
            if not is_integer(layer):
                raise ValueError(f"expected layer numbers as keys, got {layer!r}")
            if (
                not isinstance(vector, Tensor)
                or not vector.is_floating_point()
                or vector.dim() != 1
            ):
                given = (
                    f"a {vector.dtype} tensor {list(vector.shape)}"
                    if isinstance(vector, Tensor)
                    else repr(vector)
                )
                raise ValueError(
                    f"expected a floating-point vector [d_model] for layer {layer}, got {given}"
                )
        self.layer_activations = {
            int(layer): vector for layer, vector in self.layer_activations.items()
        }

    # --- applying ---

    def patch_activations(
        self,
        model: nn.Module,
        layer_config: ModelLayerConfig | None = None,
        operator: PatchDeltaOperator | None = None,
        multiplier: float = 1.0,
        min_token_index: int | None = None,
        token_indices: list[int] | slice | Tensor | None = None,
    ) -> SteeringPatchHandle:
        """Steer a model until the handle that this returns is removed. THE MODEL IS CHANGED: it gets hooks.

        `apply` does the same for a block. While it lasts, every forward pass of the model is
        steered, generation with and without a cache alike. Padding is never steered. Vectors opened
        one after the other act in that order, before anything else that hooks into the layer, so
        that `hidden_states` show them. Under gradient checkpointing keep the steering until the
        backward pass is done, since that computes the blocks again. A compiled model is compiled
        again when it next runs, and so is whatever else `torch.compile` made in this process, since
        compiled code would not notice that steering began; with `fullgraph=True` it raises an error
        of torch. A deep copy of the model that
        is made meanwhile stays steered for ever: make it before (`pristine.assert_pristine` finds
            such a copy).

        Args:
            model: a causal language model.
            layer_config: matchers for parts that are not found by themselves.
            operator: what is added, as a function of the hidden states and the vector; the vector
                itself by default.
            multiplier: the vector is multiplied by it first.
            min_token_index: steer this token and all later ones.
            token_indices: steer only these; see `positions.TokenSelection`. Positions are absolute,
                in the text as it grows, and padding does not count. In `generate` the prompt is
                what it is given, whatever the passes (a prompt in chunks, guesses of prompt lookup
                or an assistant, no cache); in passes by hand, all that a pass reads without the
                cache of an earlier one.

        Raises:
            ValueError: before anything is changed: an unknown layer type or layer, a vector of the
                wrong width or with nan or inf, also after multiplication and in the dtype of the
                model, an operator that is no function of two tensors, both min_token_index and
                token_indices or something wrong in them. Later, where positions are not known: of
                `generate_batch` and other packed rows, if they count from the end or belong to
                rows; of a pass by hand with a state that nobody counted (RWKV); of guidance without
                a cache.

        Warns:
            UserWarning: the vector was made for a model of another name.
        """
        selection = TokenSelection(min_token_index, token_indices)
        multiplier = finite_number(multiplier, "multiplier")
        if operator is not None:
            function_of_two(operator, "operator", "addition_operator()")
        found = get_layers(model, self.layer_type, layer_config, list(self.layer_activations))
        if self.layer_type in LAYER_TYPES and self.layer_type not in (layer_config or {}):
            self._check_width(model)
        for layer, vector in self.layer_activations.items():
            if not torch.isfinite(vector).all():
                raise ValueError(
                    f"expected finite numbers, got nan or inf in the vector of layer {layer}"
                )
            finite_product(
                multiplier, vector.detach(), stream_dtype(model), f"the vector of layer {layer}"
            )
        self._warn_of_another_model(model)
        tracker = PositionTracker(holder_of_blocks(model), selection)
        handle = SteeringPatchHandle([])
        try:
            handle.model_hooks.append(hook_passes(model, tracker))
            for (layer, module), vector in zip(
                found.items(), self.layer_activations.values(), strict=True
            ):
                handle.model_hooks.append(
                    hook_output(module, _VectorHook(vector, multiplier, operator, tracker, layer))
                )
        except BaseException:
            handle.remove()
            raise
        return handle

    patch = patch_activations

    @contextmanager
    def apply(
        self,
        model: nn.Module,
        layer_config: ModelLayerConfig | None = None,
        operator: PatchDeltaOperator | None = None,
        multiplier: float = 1.0,
        min_token_index: int | None = None,
        token_indices: list[int] | slice | Tensor | None = None,
    ) -> Iterator[None]:
        """Steer a model while the block is open; afterwards, and after an exception, it is as it was.

        Do not copy the model in the block: a deep copy of it stays steered for ever
            (`pristine.assert_pristine` finds that).
        A compiled model is compiled again when it next runs. Arguments and errors are those of
        `patch_activations`.
        """
        handle = self.patch_activations(
            model, layer_config, operator, multiplier, min_token_index, token_indices
        )
        try:
            yield
        finally:
            handle.remove()

    def _check_width(self, model: nn.Module) -> None:
        d_model = text_config(model).hidden_size
        for layer, vector in self.layer_activations.items():
            if len(vector) != d_model:
                raise ValueError(
                    f"the vector of layer {layer} has {len(vector)} numbers, and d_model of"
                    f" {type(model).__name__} is {d_model}"
                )

    def _warn_of_another_model(self, model: nn.Module) -> None:
        mine, given = self.metadata.get("model"), model_name(model)
        if mine and given and mine != given:
            warnings.warn(
                f"this vector was made for {mine!r} and is applied to {given!r}", stacklevel=4
            )

    # --- arithmetic ---

    def to(self, *args: Any, **kwargs: Any) -> "SteeringVector":
        """Return the vector on another device or in another dtype; arguments as for `torch.Tensor.to`."""
        return self._map(lambda vector: vector.to(*args, **kwargs))

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """Add layer by layer; a layer that only one of them has is taken as it is.

        Raises:
            ValueError: another layer type, or another width.
        """
        if not isinstance(other, SteeringVector):
            return NotImplemented
        self._check_alike(other)
        summed = dict(self.layer_activations)
        for layer, vector in other.layer_activations.items():
            mine = summed.get(layer)
            summed[layer] = vector if mine is None else mine + vector.to(mine.device)
        return replace(self, layer_activations=summed, metadata=self._common_metadata(other))

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        """Subtract layer by layer; as `self + (-other)`."""
        return self + (-other) if isinstance(other, SteeringVector) else NotImplemented

    def __mul__(self, factor: float) -> "SteeringVector":
        """Multiply every vector by a number."""
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        return self._map(lambda vector: float(factor) * vector)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SteeringVector":
        """Divide every vector by a number other than 0."""
        if isinstance(divisor, bool) or not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0:
            raise ValueError("cannot divide a steering vector by 0")
        return self._map(lambda vector: vector / float(divisor))

    def __neg__(self) -> "SteeringVector":
        """Turn every vector round."""
        return self._map(lambda vector: -vector)

    def norm(self) -> dict[int, float]:
        """Return the length of the vector of every layer."""
        # In float32 the square of 1e20 is inf, and that of 1e-25 is 0.
        return {
            layer: vector.detach().cpu().double().norm().item()
            for layer, vector in self.layer_activations.items()
        }

    def unit(self) -> "SteeringVector":
        """Return the direction: every vector scaled to norm 1.

        Raises:
            ValueError: the vector of a layer is 0, or has nan or inf.
        """
        if endless := [layer for layer, norm in self.norm().items() if not math.isfinite(norm)]:
            raise ValueError(
                f"expected finite numbers, got nan or inf in the vector of layer {endless[0]}"
            )
        if zero := [layer for layer, norm in self.norm().items() if norm == 0]:
            raise ValueError(f"the vector of layer {zero[0]} is 0 and has no direction")
        return self._map(
            lambda vector: functional.normalize((vector / vector.abs().max()).float(), dim=0).to(
                vector.dtype
            )
        )

    def cosine_similarity(self, other: "SteeringVector") -> dict[int, float]:
        """Return the cosine of the angle between two vectors, for every layer that both have.

        Raises:
            ValueError: another layer type or width, no layer in common, a vector that is 0.
        """
        self._check_alike(other)
        shared = [layer for layer in self.layer_activations if layer in other.layer_activations]
        if not shared:
            raise ValueError(
                f"no layer in common: {sorted(self.layer_activations)} and"
                f" {sorted(other.layer_activations)}"
            )
        mine, others = self.unit(), other.unit()
        parts = [
            (
                mine.layer_activations[layer].cpu().float(),
                others.layer_activations[layer].cpu().float(),
            )
            for layer in shared
        ]
        return {layer: float(a @ b) for layer, (a, b) in zip(shared, parts)}

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SteeringVector":
        return replace(
            self,
            layer_activations={
                layer: change(vector) for layer, vector in self.layer_activations.items()
            },
        )

    def _check_alike(self, other: "SteeringVector") -> None:
        if self.layer_type != other.layer_type:
            raise ValueError(
                f"the vectors act in different places: {self.layer_type!r} and {other.layer_type!r}"
            )
        widths = {
            len(vector) for part in (self, other) for vector in part.layer_activations.values()
        }
        if len(widths) > 1:
            raise ValueError(f"the vectors have different widths: {sorted(widths)}")

    def _common_metadata(self, other: "SteeringVector") -> dict[str, str]:
        """What is true of a sum: the entries in which both agree."""
        return {
            name: value
            for name, value in self.metadata.items()
            if other.metadata.get(name) == value
        }

    # --- files ---

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the vector to a safetensors file, with its metadata.

        The file is complete or not there: it is written beside its place and moved.

        Args:
            path: where to, for example "love.safetensors".
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: there is a file, and `overwrite` is False; it is kept.
        """
        tensors = {
            f"layer.{layer}": vector.detach().cpu().contiguous().clone()
            for layer, vector in self.layer_activations.items()
        }
        width = len(next(iter(self.layer_activations.values())))
        metadata = {**self.metadata, "format": "steering_vector", "format_version": FORMAT_VERSION}
        metadata |= {"layer_type": self.layer_type, "d_model": str(width), **_versions()}
        _write(path, overwrite, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SteeringVector":
        """Read a vector that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut off, no safetensors file, no steering vector, or of a later
                format.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {os.fspath(path)!r}")
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{os.fspath(path)!r} is no complete safetensors file ({error})"
            ) from None
        named = bool(tensors) and all(_layer_of(name, "layer.") is not None for name in tensors)
        if (
            metadata.pop("format", None) != "steering_vector"
            or "layer_type" not in metadata
            or not named
        ):
            raise ValueError(
                f"{os.fspath(path)!r} is a safetensors file, but holds no steering vector"
            )
        if (version := metadata.pop("format_version", None)) != FORMAT_VERSION:
            raise ValueError(
                f"{os.fspath(path)!r} has format {version!r}; this version reads {FORMAT_VERSION!r}"
            )
        layer_type = metadata.pop("layer_type")
        metadata.pop("d_model", None)
        layers = {_layer_of(name, "layer."): tensor for name, tensor in tensors.items()}
        return cls(dict(sorted(layers.items())), layer_type, metadata)

    def save_gguf(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the vector as a control vector that llama.cpp and repeng read.

        There "direction.N" is added after block N, counted from 0, in float32; block 0 cannot be
        steered.

        Args:
            path: where to, for example "love.gguf".
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: there is a file, and `overwrite` is False; it is kept.
            ValueError: another layer type than "decoder_block", layer 0, negative layers, or no
                "model_type" in the metadata.
        """
        if self.layer_type != "decoder_block":
            raise ValueError(
                f"a control vector acts on 'decoder_block', this one on {self.layer_type!r}"
            )
        if refused := [layer for layer in self.layer_activations if layer < 1]:
            raise ValueError(f"a control vector has layers from 1 on, this one has {refused[0]}")
        if "model_type" not in self.metadata:
            raise ValueError(
                "a control vector names its kind of model: set metadata['model_type'], for example"
                " to 'gpt2'"
            )

        def write(temporary: str) -> None:
            writer = gguf.GGUFWriter(temporary, _GGUF_ARCHITECTURE)
            writer.add_string(f"{_GGUF_ARCHITECTURE}.model_hint", self.metadata["model_type"])
            writer.add_uint32(f"{_GGUF_ARCHITECTURE}.layer_count", len(self.layer_activations))
            for layer, vector in self.layer_activations.items():
                writer.add_tensor(f"direction.{layer}", vector.detach().float().cpu().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

        _write(path, overwrite, write)

    @classmethod
    def load_gguf(cls, path: str | os.PathLike) -> "SteeringVector":
        """Read a control vector of llama.cpp or repeng.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut off, no GGUF file, or holds no control vector.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {os.fspath(path)!r}")
        try:
            reader = gguf.GGUFReader(path)
            names = {
                name: reader.get_field(name)
                for name in ("general.architecture", f"{_GGUF_ARCHITECTURE}.model_hint")
            }
            architecture, hint = (
                value.contents() if value is not None else None for value in names.values()
            )
            vectors = {
                tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors
            }
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise ValueError(f"{os.fspath(path)!r} is no complete GGUF file ({error})") from None
        layers = {
            layer: vector
            for name, vector in vectors.items()
            if (layer := _layer_of(name, "direction.")) is not None
        }
        if architecture != _GGUF_ARCHITECTURE or not layers:
            raise ValueError(
                f"{os.fspath(path)!r} is a GGUF file of {architecture!r}, and holds no control"
                " vector"
            )
        return cls(
            dict(sorted(layers.items())), "decoder_block", {"model_type": hint} if hint else {}
        )


def model_name(model: nn.Module) -> str:
    """Return the name of a model as a vector remembers it: the hub id, or the last part of a local folder."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return Path(name).resolve().name if name and Path(name).exists() else name


class _VectorHook(SteeringHook):
    """Adds a vector to hidden states. It moves the vector to where they are once, not at every pass."""

    def __init__(
        self,
        vector: Tensor,
        multiplier: float,
        operator: PatchDeltaOperator | None,
        tracker: PositionTracker,
        layer: int,
    ):
        self.vector, self.multiplier, self.operator, self.tracker, self.layer = (
            vector,
            multiplier,
            operator,
            tracker,
            layer,
        )
        self.moved: Tensor | None = None

    def steer(self, hidden: Tensor) -> Tensor:
        vector = self.moved
        if vector is None or vector.dtype != hidden.dtype or vector.device != hidden.device:
            vector = self._move(hidden)
        delta = vector if self.operator is None else self.operator(hidden, vector).to(hidden.dtype)
        steered = hidden + delta
        if steered.shape != hidden.shape:
            raise ValueError(
                f"layer {self.layer}: cannot add {list(delta.shape)} to hidden states"
                f" {list(hidden.shape)}"
            )
        mask = self.tracker.mask
        return steered if mask is None else torch.where(mask.to(hidden.device), steered, hidden)

    def _move(self, hidden: Tensor) -> Tensor:
        if len(self.vector) != hidden.shape[-1]:
            raise ValueError(
                f"layer {self.layer}: the vector has {len(self.vector)} numbers, the hidden states"
                f" {hidden.shape[-1]}"
            )
        # A vector in 16 bit times the multiplier may lie outside its dtype, and inside that of the
        # model.
        vector = self.vector.to(torch.promote_types(self.vector.dtype, torch.float32))
        moved = (self.multiplier * vector).to(hidden).view(1, 1, -1)
        # A vector that is being learned belongs to the graph of one pass only.
        self.moved = None if self.vector.requires_grad else moved
        return moved


def _write(path: str | os.PathLike, overwrite: bool, write: Callable[[str], None]) -> None:
    """Write a file beside its place and move it there."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{str(path)!r} is there already; give another name, or overwrite=True"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _versions() -> dict[str, str]:
    """The versions that a file names."""
    return {
        "versions": json.dumps(
            {
                name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "safetensors")
            }
        )
    }


def _layer_of(name: str, prefix: str) -> int | None:
    """The number after a prefix, or None."""
    number = name.removeprefix(prefix)
    return int(number) if name.startswith(prefix) and number.lstrip("-").isdigit() else None
