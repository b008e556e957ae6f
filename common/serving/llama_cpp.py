"""Steering a model that llama-cpp-python runs, by the control vector of llama.cpp."""

import ctypes
import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from common.arguments import finite_number, finite_product, integer
from common.vectors.files import Contents, check_control_vector
from common.vectors.steering_vector import SteeringVector

# Kinds of models whose graphs in llama.cpp's src/models do without `build_cvec`: a vector would be
# taken, and never added.
WITHOUT = (
    *("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert"),
    *("neo-bert", "eurobert", "plamo2", "wavtokenizer-dec"),
)
_steered: weakref.WeakSet = weakref.WeakSet()


@contextmanager
def steer_llama_cpp(llama: Any, vector: SteeringVector, multiplier: float = 1.0) -> Iterator[None]:
    """Steer a model of llama-cpp-python while the block is open, as `SteeringVector.apply` does.

    The vector is added at every position of every text. When the block begins and when it ends,
    the model forgets what it has read: llama-cpp-python keeps the keys and values of the last text,
    and would go on from steered ones afterwards. Read a text that was begun inside to its end
    there. A cache that is set inside is taken off at the end.

    Source: `llama_set_adapter_cvec` in llama.cpp's include/llama.h.

    Args:
        llama: a `llama_cpp.Llama`.
        vector: of the residual stream, from layer 1 on.
        multiplier: multiplies the vector first.

    Raises:
        ValueError: before anything is changed: no `Llama`, or one that is closed; what
            `control_vector` refuses; a model to which llama.cpp adds no vectors, that is steered
            already, or that has a cache of texts, which would come back steered.
        ModuleNotFoundError: llama-cpp-python is not installed.
    """
    engine = importlib.import_module("llama_cpp")
    if not isinstance(llama, engine.Llama):
        raise ValueError(f"expected a llama_cpp.Llama, got a {type(llama).__name__}")
    if llama.ctx is None:
        raise ValueError("the model is closed")
    if (kind := llama.metadata.get("general.architecture")) in WITHOUT:
        raise ValueError(f"llama.cpp adds no control vectors to {kind!r}, and says nothing")
    blocks, d_model = engine.llama_model_n_layer(llama.model), llama.n_embd()
    rows = control_vector(vector, multiplier, blocks, d_model)
    if llama in _steered:
        raise ValueError("the model is steered already: add the vectors up, and steer by the sum")
    if llama.cache is not None:
        raise ValueError(
            "the model has a cache, from which steered texts would come back: take it off by"
            " llama.set_cache(None)"
        )

    def give(pointer: Any, last: int) -> None:
        llama.reset()
        if engine.llama_set_adapter_cvec(llama.ctx, pointer, rows.size, d_model, 1, last):
            raise RuntimeError("llama.cpp refused the control vector")

    _steered.add(llama)
    try:
        give(rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), blocks - 1)
        yield
    finally:
        _steered.discard(llama)
        if llama.ctx is not None:
            give(None, -1)
        llama.set_cache(None)


def control_vector(
    vector: SteeringVector, multiplier: float, blocks: int, d_model: int
) -> np.ndarray:
    """Return a vector as llama.cpp wants it in memory.

    It is as long as the model has layers, so that nothing is left of an earlier vector: llama.cpp
    keeps the rows that a shorter one does not reach.

    Args:
        vector: of the residual stream, from layer 1 on.
        multiplier: multiplies the vector first.
        blocks: how many the model has.
        d_model: its width.

    Returns:
        [blocks - 1, d_model] in float32; row i is our layer i + 1, and 0 where the vector has none.

    Raises:
        ValueError: another layer type than "decoder_block"; layer 0, a negative layer or one that
            the model does not have; another width; numbers that are not finite in float32, also
            after multiplication.
    """
    layers = vector.layer_activations
    check_control_vector(Contents(layers, vector.layer_type, vector.metadata))
    blocks, multiplier = integer(blocks, "blocks", least=1), finite_number(multiplier, "multiplier")
    if max(layers) >= blocks:
        raise ValueError(
            f"layer {max(layers)} does not exist: the model has {blocks} blocks, so expected"
            f" layers from 1 to {blocks - 1}"
        )
    rows = np.zeros((blocks - 1, d_model), dtype=np.float32)
    for layer, one in layers.items():
        if len(one) != d_model:
            raise ValueError(
                f"the vector of layer {layer} has {len(one)} numbers, and d_model is {d_model}"
            )
        product = finite_product(
            multiplier, one.detach().cpu(), torch.float32, f"the vector of layer {layer}"
        )
        rows[layer - 1] = product.numpy()
    return rows
