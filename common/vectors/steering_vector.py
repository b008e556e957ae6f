"""A steering vector: one vector for each of some layers. Apply it, compute with it, keep it."""

import os
import shlex
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from common.arguments import finite_number, finite_product, function_of_two
from common.passes.hooks import PassHandle, SteeringHook, holder_of_blocks, hook_output, hook_passes
from common.places.blocks import stream_dtype, text_config
from common.places.positions import PositionTracker, TokenSelection, of_rows
from common.places.sites import LAYER_TYPES, ModelLayerConfig, get_layers
from common.vectors import files, hub
from common.vectors.conditions import Rule, decider
from common.vectors.layer_vectors import LayerVectors
from common.vectors.operators import PatchDeltaOperator

Multiplier = float | Sequence[float] | Tensor


@dataclass
class SteeringPatchHandle:
    """What `patch_activations` returns: `remove()` takes the steering off the model again."""

    model_hooks: list[RemovableHandle | PassHandle]

    def remove(self) -> None:
        """Take the steering off; a second call does nothing."""
        for hook in self.model_hooks:
            hook.remove()


@dataclass(eq=False, repr=False)
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
        multiplier: Multiplier = 1.0,
        min_token_index: int | None = None,
        token_indices: list[int] | slice | Tensor | None = None,
        condition: Rule | None = None,
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
            multiplier: multiplies the vector first. A list, or a tensor [batch], has one for each
                row of the batch; in `generate` for each prompt, whose rows
                (`num_return_sequences`, `num_beams`) are alike, or without beams for each row. A
                row with 0 is left as it is, to the last bit, whatever the operator. `steer_rows`
                gives each row a vector of its own.
            min_token_index: steer this token and all later ones.
            token_indices: steer only these; see `positions.TokenSelection`. Positions are absolute,
                in the text as it grows, and padding does not count. In `generate` the prompt is
                what it is given, whatever the passes (a prompt in chunks, guesses of prompt lookup
                or an assistant, no cache); in passes by hand, all that a pass reads without the
                cache of an earlier one.
            condition: steer only rows whose prompt fulfils it; the others are left as they are, to
                the last bit. It is decided once, on the prompt as the unsteered model reads it,
                whatever else steers, and holds for all that is generated, also for the text that
                guides it (`guidance_scale`). See `find_condition`.

        Raises:
            ValueError: before anything is changed: an unknown layer type or layer, a vector of the
                wrong width or with nan or inf, also after multiplication and in the dtype of the
                model, an operator that is not a function of two tensors, both min_token_index and
                token_indices or something wrong in them, multipliers that are not numbers, a
                condition of another width. Later: a batch that has another number of rows, and of
                prompts, than there are multipliers; where positions are not known: of
                `generate_batch` and other packed rows, if they count from the end or belong to
                rows; of a pass by hand with a state that nobody counted (RWKV); of guidance without
                a cache; with a condition, of a prompt whose token ids are not known, or whose
                hidden states hold nan or inf.

        Warns:
            UserWarning: the vector was made for a model of another name.
        """
        factors = _multipliers(multiplier)
        selection = TokenSelection(
            min_token_index,
            token_indices,
            None if condition is None else decider(condition, model),
            by_row=isinstance(factors, Tensor),
        )
        largest = float(factors.abs().max()) if isinstance(factors, Tensor) else factors
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
                largest, vector.detach(), stream_dtype(model), f"the vector of layer {layer}"
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
                    hook_output(module, _VectorHook(vector, factors, operator, tracker, layer))
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
        multiplier: Multiplier = 1.0,
        min_token_index: int | None = None,
        token_indices: list[int] | slice | Tensor | None = None,
        condition: Rule | None = None,
    ) -> Iterator[None]:
        """Steer a model while the block is open; afterwards, also after an error, it is as it was.

        Arguments, errors, and what holds for copies of the model and compiled models are those of
        `patch_activations`.
        """
        handle = self.patch_activations(
            model, layer_config, operator, multiplier, min_token_index, token_indices, condition
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

    def save_folder(
        self, path: str | os.PathLike, card: str | None = None, overwrite: bool = False
    ) -> None:
        """Write the vector to a folder with a card, as the Hugging Face Hub keeps it.

        Args:
            path: the folder; it is made.
            card: what the card (README.md) says, in Markdown; by default what is known from the
                vector. What machines read stands above it.
            overwrite: replace a vector and a card that are there; other files stay.

        Raises:
            FileExistsError: one of them is there, and `overwrite` is False; both are kept.
        """
        contents = self._contents()
        name = Path(path).resolve().name
        hub.write_folder(path, contents, card or hub.default_card(contents, name), overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        card: str | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a steering vector",
    ) -> str:
        """Upload the vector with a card to the Hugging Face Hub.

        Args:
            repo_id: "owner/name"; the repository is made where there is none. A vector that is
                there becomes an earlier version.
            card: as in `save_folder`. Without it a card that is there stays.
            private: make a new repository private.
            token: of the Hub; by default the one of `hf auth login`.
            commit_message: what the Hub notes beside the new version.

        Returns:
            The address of the new version.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses, or knows no such token.
        """
        return hub.push_folder(
            repo_id, self._contents(), card, private=private, token=token, message=commit_message
        )

    @classmethod
    def from_hub(
        cls,
        name: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "SteeringVector":
        """Read a vector that `push_to_hub` uploaded, or `save_folder` wrote.

        Args:
            name: "owner/name" on the Hugging Face Hub, or a folder.
            revision: a branch, tag or commit on the Hub; the newest by default.
            token: of the Hub, for what is private.

        Raises:
            FileNotFoundError: the folder holds no vector.
            huggingface_hub.errors.HfHubHTTPError: the Hub has no such repository or file, or cannot
                be reached and the vector is not in the cache.
            ValueError: a revision of a folder, and what `load` raises.
        """
        return cls(*hub.read_folder(name, revision, token))

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


@contextmanager
def steer_rows(
    model: nn.Module,
    rows: Sequence[SteeringVector | None],
    multiplier: float | Sequence[float] = 1.0,
    **settings: Any,
) -> Iterator[None]:
    """Steer each row of a batch by a vector of its own while the block is open.

    Rows do not notice each other: each gets what `apply` of its vector gives it, and one without a
    vector is left as it is, to the last bit.

    Args:
        model: a causal language model; as it was afterwards and after any exception.
        rows: for each row of the batches that the model reads, in `generate` for each prompt, a
            vector, or None.
        multiplier: for all rows, or for each.
        settings: more arguments of `SteeringVector.apply`, which hold for all rows.

    Raises:
        ValueError: something that is no vector, another number of multipliers than of rows, and all
            errors of `apply`.
    """
    given = [*rows] if isinstance(rows, Iterable) else []
    if not given or not all(row is None or isinstance(row, SteeringVector) for row in given):
        raise ValueError(f"expected a SteeringVector or None for each row, got {rows!r}")
    factors = _multipliers(multiplier)
    each = factors.tolist() if isinstance(factors, Tensor) else [factors] * len(given)
    if len(each) != len(given):
        raise ValueError(f"expected {len(given)} multipliers, one for each row, got {len(each)}")
    vectors = {id(vector): vector for vector in given if vector is not None}
    with ExitStack() as stack:
        for vector in vectors.values():
            own = [factor * (row is vector) for row, factor in zip(given, each)]
            stack.enter_context(vector.apply(model, multiplier=own, **settings))
        yield


def model_name(model: nn.Module) -> str:
    """Return the name that a vector keeps of its model: the hub id, or the folder's own name."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return Path(name).resolve().name if name and Path(name).exists() else name


def _multipliers(multiplier: Multiplier) -> float | Tensor:
    """Return a number, or one for each row, [row], in float64.

    Raises:
        ValueError: something else, no rows, or a number that is not finite.
    """
    given: Any = multiplier
    if isinstance(multiplier, Tensor) and multiplier.dim():
        given = multiplier.tolist()
    if isinstance(multiplier, np.ndarray) and not multiplier.ndim:
        given = multiplier.item()
    if isinstance(multiplier, Mapping):
        raise ValueError(
            f"expected a number for each row, in their order, as multiplier, got {multiplier!r}"
        )
    if isinstance(given, Real | str | Tensor) or not isinstance(given, Iterable):
        return finite_number(given, "multiplier")
    numbers = [finite_number(number, "multiplier of a row") for number in given]
    if not numbers:
        raise ValueError(f"expected a number for each row as multiplier, got {multiplier!r}")
    return torch.tensor(numbers, dtype=torch.float64)


class _VectorHook(SteeringHook):
    """Adds a vector to hidden states. It moves the vector to their device and dtype only once.

    The multiplier is a number, or [row]: then rows with 0 are left alone.
    """

    def __init__(
        self,
        vector: Tensor,
        multiplier: float | Tensor,
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
        mask = self.tracker.mask
        mask = None if mask is None else mask.to(hidden.device)
        if isinstance(self.multiplier, Tensor):
            vector = of_rows(vector, len(hidden), "the multiplier")
            meant = of_rows(self.multiplier != 0, len(hidden), "the multiplier")[:, None, None]
            mask = meant.to(hidden.device) if mask is None else mask & meant.to(hidden.device)
        delta = vector if self.operator is None else self.operator(hidden, vector).to(hidden.dtype)
        steered = hidden + delta
        if steered.shape != hidden.shape:
            raise ValueError(
                f"layer {self.layer}: cannot add {list(delta.shape)} to hidden states"
                f" {list(hidden.shape)}"
            )
        return steered if mask is None else torch.where(mask, steered, hidden)

    def _move(self, hidden: Tensor) -> Tensor:
        if len(self.vector) != hidden.shape[-1]:
            raise ValueError(
                f"layer {self.layer}: the vector has {len(self.vector)} numbers, the hidden states"
                f" {hidden.shape[-1]}"
            )
        # A vector in 16 bit times the multiplier may lie outside its dtype, and inside that of the
        # model.
        vector = self.vector.to(torch.promote_types(self.vector.dtype, torch.float32))
        factor = self.multiplier
        if isinstance(factor, Tensor):
            factor = factor.to(vector)[:, None, None]
        moved = (factor * vector.view(1, 1, -1)).to(hidden)
        # A vector that is being learned belongs to the graph of one pass only.
        self.moved = None if self.vector.requires_grad else moved
        return moved
