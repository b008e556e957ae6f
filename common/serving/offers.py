"""The vectors and additions that an engine is started with: read, checked, and scaled.

The configuration is what a JSON file holds, under `steering` in vLLM's `additional_config`:

    {"vectors": {"love": "love.safetensors"}, "additions": {"wedding": "wedding.safetensors"},
     "max_coeff": 20}

Files are those of `SteeringVector.save` and `save_additions`: numbers and names, never code.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.arguments import finite_number
from common.serving.requests import Menu, Offer
from common.vectors import files
from common.vectors.activation_additions import ActivationAddition, addition_vectors
from common.vectors.steering_vector import SteeringVector

KEYS = ("vectors", "additions", "max_coeff")


class Served(NamedTuple):
    """A vector or an addition: what is known of it, and by layer its numbers [tokens, d_model].

    A vector has one row, which every token gets; an addition has one for each of its tokens.
    """

    offer: Offer
    rows: dict[int, Tensor]


def save_additions(
    path: str | PathLike,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    activation_additions: Sequence[ActivationAddition],
    overwrite: bool = False,
) -> None:
    """Write what activation additions add to the front of a prompt, for engines that serve.

    The prompts of the additions are read here; the engine adds the sum, times the coefficient that
    a request brings. Text that is served has to begin as the prompts do, with a BOS where they have
    one.

    Args:
        path: where to, for example "wedding.safetensors".
        model: a causal language model; unchanged.
        tokenizer: its tokenizer.
        activation_additions: what is added; at resid_pre from layer 1 on, or resid_post.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: there is a file, and `overwrite` is False; it is kept.
        ValueError: no addition; resid_pre 0 or a part of a block, where engines do not add; or what
            `addition_vectors` raises.
    """
    by_layer: dict[int, Tensor] = {}
    vectors = addition_vectors(model, tokenizer, activation_additions)
    if not vectors:
        raise ValueError("expected at least one ActivationAddition, got none")
    longest = max(count for _, count in vectors)
    for (site, count), vector in vectors.items():
        # resid_pre of a block is resid_post of the one before.
        layer = {"resid_pre": site.layer - 1, "resid_post": site.layer}.get(site.part, -1)
        if layer < 0:
            raise ValueError(
                f"engines add after a block, and {site} is not there: expected resid_pre from layer"
                " 1 on, or resid_post"
            )
        # Additions may differ in length; what is past the end of the shorter gets 0.
        padded = nn.functional.pad(vector.detach().float().cpu(), (0, 0, 0, longest - count))
        by_layer[layer] = by_layer[layer] + padded if layer in by_layer else padded
    files.write_additions(path, by_layer, overwrite)


def read_offers(
    config: Any, layers: int, d_model: int, dtype: torch.dtype
) -> tuple[Menu, dict[str, Served]]:
    """Read what an engine is started with.

    Args:
        config: the configuration, see above.
        layers: how many the model has.
        d_model: its width.
        dtype: in which it runs.

    Returns:
        What requests may ask for, and by name the vectors and additions, in float32.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something else than the configuration above, no limit of the coefficients, a
            name that is given twice, a file of another kind; a vector for another model.
    """
    vectors, additions, max_coeff = _checked(config)
    served = {name: _served(name, SteeringVector.load(path)) for name, path in vectors.items()}
    for name, path in additions.items():
        served[name] = _describe(files.read_additions(path), is_addition=True)
    for name, one in served.items():
        _check_fits(name, one, layers, d_model)
    offers = {name: one.offer for name, one in served.items()}
    return Menu(offers, max_coeff, torch.finfo(dtype).max), served


def _checked(config: Any) -> tuple[dict[str, str], dict[str, str], float]:
    """Return the paths of the vectors and of the additions by name, and the limit."""
    if not isinstance(config, Mapping) or set(config) - set(KEYS):
        raise ValueError(f"expected a mapping with {', '.join(KEYS)} as steering, got {config!r}")
    vectors, additions = config.get("vectors") or {}, config.get("additions") or {}
    for paths in (vectors, additions):
        if not isinstance(paths, Mapping) or not all(
            isinstance(text, str) and text for item in paths.items() for text in item
        ):
            raise ValueError(f"expected files by name in steering, got {paths!r}")
    if not vectors and not additions:
        raise ValueError("expected at least one file in steering, got none")
    if twice := sorted(set(vectors) & set(additions)):
        raise ValueError(f"{twice[0]!r} is the name of a vector and of an addition")
    if "max_coeff" not in config:
        raise ValueError("steering needs max_coeff, the largest coefficient that a request may ask")
    max_coeff = finite_number(config["max_coeff"], "max_coeff")
    if max_coeff <= 0:
        raise ValueError(f"expected a positive number as max_coeff, got {max_coeff:g}")
    return dict(vectors), dict(additions), max_coeff


def _served(name: str, vector: SteeringVector) -> Served:
    if vector.layer_type != "decoder_block":
        raise ValueError(
            f"{name!r} acts on {vector.layer_type!r}, and engines add after a block: expected"
            " 'decoder_block'"
        )
    return _describe(
        {layer: row[None] for layer, row in vector.layer_activations.items()}, is_addition=False
    )


def _describe(given: Mapping[int, Tensor], is_addition: bool) -> Served:
    """Return rows by layer, [tokens, d_model], with what is known of them."""
    rows = {layer: tensor.detach().float().contiguous() for layer, tensor in given.items()}
    digest = hashlib.sha256()
    for layer, tensor in sorted(rows.items()):
        digest.update(f"{layer}{list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    tokens = len(next(iter(rows.values()))) if is_addition else None
    largest = max(tensor.abs().max().item() for tensor in rows.values())
    return Served(Offer(tuple(sorted(rows)), tokens, largest, digest.hexdigest()), rows)


def _check_fits(name: str, served: Served, layers: int, d_model: int) -> None:
    for layer, rows in served.rows.items():
        if not 0 <= layer < layers:
            raise ValueError(
                f"{name!r} steers layer {layer}, and the model has layers 0 to {layers - 1}"
            )
        if rows.shape[-1] != d_model:
            raise ValueError(
                f"{name!r} has {rows.shape[-1]} numbers for layer {layer}, and d_model is {d_model}"
            )
        if not torch.isfinite(rows).all():
            raise ValueError(f"{name!r} has nan or inf for layer {layer}: expected finite numbers")


class ScaledRows:
    """The numbers times a coefficient, as the model adds them; the last ones used are kept.

    Args:
        served: by name.
        dtype: of the model's hidden states.
        device: of the model's hidden states.
        kept: how many are kept.
    """

    def __init__(
        self,
        served: Mapping[str, Served],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kept: int = 1024,
    ):
        self.served, self.dtype, self.device, self.kept = served, dtype, device, kept
        self.scaled: OrderedDict[tuple[str, float, int], Tensor] = OrderedDict()

    def get(self, name: str, coeff: float, layer: int) -> Tensor:
        """Return coeff times the numbers of a layer, [tokens, d_model], rounded once."""
        key = name, coeff, layer
        if key not in self.scaled:
            rows = self.served[name].rows[layer]
            self.scaled[key] = (coeff * rows).to(self.device, self.dtype)
            if len(self.scaled) > self.kept:
                self.scaled.popitem(last=False)
        self.scaled.move_to_end(key)
        return self.scaled[key]
