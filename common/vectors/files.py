"""Steering vectors in files: safetensors of our own, and the control vectors of llama.cpp in GGUF.

A file is complete or not there: it is written beside its place and moved.
"""

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import gguf
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.places.sites import LayerType

FORMAT_VERSION = "1"
_ARCHITECTURE = "controlvector"
_MODEL_HINT = f"{_ARCHITECTURE}.model_hint"


class Contents(NamedTuple):
    """What a file holds: what `SteeringVector` takes."""

    layer_activations: dict[int, Tensor]
    layer_type: LayerType
    metadata: dict[str, str]


def write_safetensors(path: str | os.PathLike, contents: Contents, overwrite: bool = False) -> None:
    """Write a steering vector to a safetensors file; see `SteeringVector.save`."""
    tensors = {
        f"layer.{layer}": vector.detach().cpu().contiguous().clone()
        for layer, vector in contents.layer_activations.items()
    }
    packages = ("torch", "transformers", "safetensors")
    metadata = contents.metadata | {
        "format": "steering_vector",
        "format_version": FORMAT_VERSION,
        "layer_type": contents.layer_type,
        "d_model": str(len(next(iter(tensors.values())))),
        "versions": json.dumps({name: importlib.metadata.version(name) for name in packages}),
    }
    write_whole(path, overwrite, lambda temporary: save_file(tensors, temporary, metadata))


def read_safetensors(path: str | os.PathLike) -> Contents:
    """Read what `write_safetensors` wrote; see `SteeringVector.load`."""
    name = _existing(path)
    metadata, tensors = _safetensors(path, name)
    layers = _by_layer(tensors, "layer.")
    is_ours = metadata.pop("format", None) == "steering_vector" and "layer_type" in metadata
    if not is_ours or not layers or len(layers) < len(tensors):
        raise ValueError(f"{name} is a safetensors file, but holds no steering vector")
    _check_version(name, metadata.pop("format_version", None))
    layer_type = cast(LayerType, metadata.pop("layer_type"))
    metadata.pop("d_model", None)
    return Contents(layers, layer_type, metadata)


def write_additions(
    path: str | os.PathLike, rows: Mapping[int, Tensor], overwrite: bool = False
) -> None:
    """Write by layer what is added to the first tokens of a prompt, [tokens, d_model]."""
    metadata = {"format": "activation_addition", "format_version": FORMAT_VERSION}
    tensors = {f"layer.{layer}": tensor.contiguous().clone() for layer, tensor in rows.items()}
    write_whole(path, overwrite, lambda temporary: save_file(tensors, temporary, metadata))


def read_additions(path: str | os.PathLike) -> dict[int, Tensor]:
    """Read what `write_additions` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, holds something else, or has a later format.
    """
    name = _existing(path)
    metadata, tensors = _safetensors(path, name)
    layers = _by_layer(tensors, "layer.")
    lengths = {len(tensor) if tensor.dim() == 2 else 0 for tensor in layers.values()}
    is_one = metadata.get("format") == "activation_addition" and len(lengths) == 1
    if not is_one or 0 in lengths or len(layers) < len(tensors):
        raise ValueError(f"{name} is a safetensors file, but holds no activation addition")
    _check_version(name, metadata.get("format_version"))
    return layers


def write_gguf(path: str | os.PathLike, contents: Contents, overwrite: bool = False) -> None:
    """Write a control vector; see `SteeringVector.save_gguf`."""
    layers, _, metadata = contents
    check_control_vector(contents)
    if "model_type" not in metadata:
        raise ValueError(
            "a control vector names its kind of model: set metadata['model_type'], for example"
            " to 'gpt2'"
        )

    def write(temporary: str) -> None:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(_MODEL_HINT, metadata["model_type"])
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(layers))
        for layer, vector in layers.items():
            writer.add_tensor(f"direction.{layer}", vector.detach().float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(path, overwrite, write)


def check_control_vector(contents: Contents) -> None:
    """Refuse what llama.cpp cannot add: it adds float32 vectors after block 1 and later ones.

    Raises:
        ValueError: another layer type than "decoder_block", layer 0, negative layers, vectors of
            several widths, or with numbers that are not finite in float32.
    """
    layers, layer_type, _ = contents
    if layer_type != "decoder_block":
        raise ValueError(f"a control vector acts on 'decoder_block', this one on {layer_type!r}")
    if min(layers) < 0:
        raise ValueError(
            f"a control vector has layers from 1 on, this one has {min(layers)}: count from the"
            " first layer, not from the last"
        )
    if 0 in layers:
        rest = sorted(layers.keys() - {0})
        keep = f"keep the others with vector.select({rest}), or " if rest else ""
        raise ValueError(
            "llama.cpp adds nothing after block 0, so a control vector has layers from 1 on, and"
            f" this one has 0: {keep}add it to a bias (bias_editing.ipynb) and write that GPT-2 by"
            " save_model_gguf"
        )
    widths = sorted({len(vector) for vector in layers.values()})
    if len(widths) > 1:
        raise ValueError(f"a control vector has one width, this one has {widths}")
    for layer, vector in layers.items():
        if not torch.isfinite(vector.float()).all():
            raise ValueError(
                f"expected numbers that are finite in float32, got others in the vector of layer"
                f" {layer}"
            )


def read_gguf(path: str | os.PathLike) -> Contents:
    """Read a control vector of llama.cpp or repeng; see `SteeringVector.load_gguf`."""
    name = _existing(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = [reader.get_field(key) for key in ("general.architecture", _MODEL_HINT)]
        architecture, hint = (None if field is None else field.contents() for field in fields)
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{name} is not a complete GGUF file ({error})") from None
    layers = _by_layer(tensors, "direction.")
    if architecture != _ARCHITECTURE or not layers:
        raise ValueError(f"{name} is a GGUF file of {architecture!r}, and holds no control vector")
    return Contents(layers, "decoder_block", {"model_type": hint} if hint else {})


def _existing(path: str | os.PathLike) -> str:
    """Return the name of a file for messages.

    Raises:
        FileNotFoundError: there is no such file.
    """
    name = repr(os.fspath(path))
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {name}")
    return name


def _safetensors(path: str | os.PathLike, name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            return metadata, {key: file.get_tensor(key) for key in list(file.keys())}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{name} is not a complete safetensors file ({error})") from None


def _check_version(name: str, version: str | None) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(f"{name} has format {version!r}; this version reads {FORMAT_VERSION!r}")


def _by_layer(tensors: Mapping[str, Tensor], prefix: str) -> dict[int, Tensor]:
    """Return the tensors whose name is a prefix and a layer number, in the order of the layers."""
    numbers = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    layers = {
        int(number): tensors[name]
        for name, number in numbers.items()
        if number.lstrip("-").isdigit()
    }
    return dict(sorted(layers.items()))


def write_whole(path: str | os.PathLike, overwrite: bool, write: Callable[[str], None]) -> None:
    """Write a file beside its place and move it there, so that it is complete or not there.

    Args:
        path: where to; its folder is made.
        overwrite: replace a file that is there.
        write: writes the file under the name that it is given.

    Raises:
        FileExistsError: there is a file, and `overwrite` is False; it is kept.
    """
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
