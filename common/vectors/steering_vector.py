"""A steering vector: one vector for each of some layers. Apply it, compute with it, keep it."""

import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from common.arguments import finite_number, finite_product, function_of_two
from common.passes.hooks import PassHandle, SteeringHook, holder_of_blocks, hook_output, hook_passes
from common.places.blocks import stream_dtype, text_config
from common.places.positions import PositionTracker, TokenSelection
from common.places.sites import LAYER_TYPES, ModelLayerConfig, get_layers
from common.vectors import files
from common.vectors.layer_vectors import LayerVectors
from common.vectors.operators import PatchDeltaOperator


@dataclass
class SteeringPatchHandle:
    """What `patch_activations` returns: `remove()` takes the steering off the model again."""

    model_hooks: list[RemovableHandle | PassHandle]

    def remove(self) -> None:
        """Take the steering off; a second call does nothing."""
        for hook in self.model_hooks:
            hook.remove()


@dataclass(eq=False)
class SteeringVector(LayerVectors):
    """Vectors that steer a model, one for each of some layers.

    The interface is that of the steering-vectors library
    (https://steering-vectors.github.io/steering-vectors), with saving, loading and the arithmetic
    of `LayerVectors` added.

    Attributes:
        layer_activations: by layer number (negative ones count from the last layer), a vector
            [d_model].
        layer_type: which part of the blocks it is added to; "decoder_block" is resid_post.
        metadata: where it comes from: the model's name and type, the pairs, the aggregator, the
            versions.

    Raises:
        ValueError: no layers, or something that is not a vector of floating-point numbers.
    """

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
        """Steer a model until the returned handle is removed. THE MODEL IS CHANGED: it gets hooks.

        `apply` does the same for a block. Meanwhile every forward pass of the model is steered,
        generation with and without a cache alike; padding never is. Vectors opened one after the
        other act in that order, before anything else that hooks into the layer, so that
        `hidden_states` show them.

        - Under gradient checkpointing keep the steering until the backward pass is done, since that
          computes the blocks again.
        - A compiled model is compiled again when it next runs, and so is whatever else
          `torch.compile` made in this process: compiled code would not notice that steering began.
          With `fullgraph=True` torch raises an error.
        - A deep copy of the model that is made meanwhile stays steered for ever: copy it before.
          `pristine.assert_pristine` finds such a copy.

        Args:
            model: a causal language model.
            layer_config: matchers for parts that are not found by themselves.
            operator: what is added, as a function of the hidden states and the vector; the vector
                itself by default.
            multiplier: multiplies the vector first.
            min_token_index: steer this token and all later ones.
            token_indices: steer only these; see `positions.TokenSelection`. Positions are absolute,
                in the text as it grows, and padding does not count. In `generate` the prompt is
                what it is given, whatever the passes (a prompt in chunks, guesses of prompt lookup
                or an assistant, no cache); in passes by hand, all that a pass reads without the
                cache of an earlier one.

        Raises:
            ValueError: before anything is changed: an unknown layer type or layer, a vector of the
                wrong width or with nan or inf, also after multiplication and in the dtype of the
                model, an operator that is not a function of two tensors, both min_token_index and
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
        """Steer a model while the block is open; afterwards, also after an error, it is as it was.

        Arguments, errors, and what holds for copies of the model and compiled models are those of
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

    # --- files ---

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the vector to a safetensors file, with its metadata.

        Args:
            path: where to, for example "love.safetensors".
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: there is a file, and `overwrite` is False; it is kept.
        """
        files.write_safetensors(path, self._contents(), overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SteeringVector":
        """Read a vector that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut off, is not a safetensors file, holds no steering vector, or
                has a later format.
        """
        return cls(*files.read_safetensors(path))

    def save_gguf(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the vector as a control vector that llama.cpp and repeng read.

        "direction.N" is the vector of our layer N: it is added after block N, counted from 0, in
        float32. llama.cpp adds it at every position, and nothing after block 0. A layer that the
        model does not have is ignored there without a word.

        Source: `common_control_vector_load` in llama.cpp's common/common.cpp.

        Args:
            path: where to, for example "love.gguf".
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: there is a file, and `overwrite` is False; it is kept.
            ValueError: another layer type than "decoder_block", layer 0, negative layers, vectors
                of several widths or not finite in float32, or no "model_type" in the metadata.
        """
        files.write_gguf(path, self._contents(), overwrite)

    @classmethod
    def load_gguf(cls, path: str | os.PathLike) -> "SteeringVector":
        """Read a control vector of llama.cpp or repeng.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut off, is not a GGUF file, or holds no control vector.
        """
        return cls(*files.read_gguf(path))

    def llama_cpp_command(
        self,
        path: str | os.PathLike,
        multiplier: float = 1.0,
        model: str | os.PathLike = "model.gguf",
        program: str = "llama-server",
    ) -> str:
        """Return the command that runs a program of llama.cpp with this vector.

        The vector steers all requests of the process alike, at every position. For another
        multiplier start the program again.

        Args:
            path: the file that `save_gguf` wrote. Nothing is read or written here, so it may lie on
                another machine.
            multiplier: as in `apply`.
            model: the GGUF file of the model.
            program: llama-server, llama-completion, or a path to one.

        Raises:
            ValueError: what `save_gguf` refuses; a multiplier that is not finite, or outside of
                float32, or with which the vector leaves it; a path with a colon, comma or quotation
                mark, at which llama.cpp splits the argument.
        """
        files.check_control_vector(self._contents())
        multiplier = finite_number(multiplier, "multiplier")
        limits = torch.finfo(torch.float32)
        if multiplier and not limits.tiny <= abs(multiplier) <= limits.max:
            raise ValueError(
                f"llama.cpp reads the multiplier in float32, which has no {multiplier}"
            )
        for layer, vector in self.layer_activations.items():
            finite_product(
                multiplier, vector.detach(), torch.float32, f"the vector of layer {layer}"
            )
        name = os.fspath(path)
        if found := [sign for sign in ':,"' if sign in name]:
            raise ValueError(
                f"llama.cpp splits its argument at {found[0]!r}: expected a path without it, got"
                f" {name!r}"
            )
        arguments = [program, "--model", os.fspath(model)]
        return shlex.join([*arguments, "--control-vector-scaled", f"{name}:{multiplier!r}"])

    def _contents(self) -> files.Contents:
        return files.Contents(self.layer_activations, self.layer_type, self.metadata)


def model_name(model: nn.Module) -> str:
    """Return the name that a vector keeps of its model: the hub id, or the folder's own name."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return Path(name).resolve().name if name and Path(name).exists() else name


class _VectorHook(SteeringHook):
    """Adds a vector to hidden states. It moves the vector to their device and dtype only once."""

    def __init__(
        self,
        vector: Tensor,
        multiplier: float,
        operator: PatchDeltaOperator | None,
        tracker: PositionTracker,
        layer: int,
    ):
        self.vector, self.multiplier, self.operator = vector, multiplier, operator
        self.tracker, self.layer = tracker, layer
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
