"""Is this model as it was? A detector for what steering can leave behind.

`snapshot` notes every module, hook and parameter; `assert_pristine` fails on any hook, wrapper,
replaced `forward`, changed parameter or nnsight edit that was not there before. Parameters are
noted as a hash of their bytes, so that a snapshot of a large model takes seconds and almost no
memory; of a model that is split over processes each sees its own part. It also fails on a model
that was copied while it was steered: the copy's steering ends with no block, whatever a snapshot
says that was taken of the copy.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.passes.hooks import LIBRARY_HOOKS, SteeringHook
from common.tensor_parallel import own_part

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot(NamedTuple):
    """What a model looked like: a description of every part, by its path."""

    modules: dict[str, tuple]
    hooks: dict[str, tuple]
    parameters: dict[str, tuple]
    edits: dict[str, int]


def snapshot(model: Any) -> Snapshot:
    """Note the state of a model. Nothing is changed.

    Args:
        model: a torch module, a TransformerBridge, or an nnsight model.

    Raises:
        ValueError: the object is none of these.
    """
    module = getattr(model, "_module", model)
    if not isinstance(module, nn.Module):
        raise ValueError(
            "expected a torch module or what a mechanism's wrap returned, got"
            f" {type(model).__name__}"
        )
    named = list(module.named_modules(remove_duplicate=False))
    return Snapshot(
        modules={path: _describe(part) for path, part in named},
        hooks={path: hooks for path, part in named if (hooks := tuple(_hooks(part)))},
        parameters={name: (id(tensor), *_fingerprint(tensor)) for name, tensor in _tensors(module)},
        edits={path: count for path, count in _edits(model) if count},
    )


def differences(model: Any, before: Snapshot) -> list[str]:
    """Say in plain words how a model differs from a snapshot, and what steering was copied with it.

    The list is empty if the model is as it was.
    """
    now = snapshot(model)
    sayings = {
        "modules": "module {path} was added, removed, replaced or given another method or mode",
        "hooks": "hooks on {path} changed",
        "parameters": "parameter {path} changed",
        "edits": "nnsight edits on {path} changed",
    }
    return [
        sayings[field].format(path=path or "the model itself")
        for field in Snapshot._fields
        for path in sorted(getattr(before, field).keys() | getattr(now, field).keys())
        if getattr(before, field).get(path) != getattr(now, field).get(path)
    ] + [
        f"{path} was copied while it was steered, and stays steered: copy the model outside `apply`"
        for path in copied_steering(model)
    ]


def copied_steering(model: Any) -> list[str]:
    """Return the paths of the modules that hold a copy of a steering hook of this library.

    `copy.deepcopy` inside `apply` copies the hooks too. Nothing takes those of the copy off.
    """
    module = getattr(model, "_module", model)
    return sorted(
        {
            path
            for path, part in module.named_modules(remove_duplicate=False)
            for kind in HOOKS
            for hook in getattr(part, kind).values()
            if isinstance(steering := getattr(hook, "__self__", None), SteeringHook)
            and steering.home != id(part)
        }
    )


def assert_pristine(model: Any, before: Snapshot) -> None:
    """Fail if the model is not as it was.

    Raises:
        AssertionError: with one line for each difference, and for each module whose steering was
            copied with the model.
    """
    found = differences(model, before)
    if found:
        raise AssertionError("the model is not as it was:\n" + "\n".join(found))


def _describe(part: nn.Module) -> tuple:
    """Identity, class, mode, and the methods (`forward`, say) that were set on the instance."""
    own = (
        name
        for name, value in vars(part).items()
        if callable(value) and callable(getattr(type(part), name, None))
    )
    return (
        id(part),
        type(part),
        part.training,
        *((name, id(vars(part)[name])) for name in sorted(own)),
    )


def _hooks(part: nn.Module) -> Iterator[tuple]:
    """Every hook of a module, except those that a library installs on itself."""
    for kind in HOOKS:
        for key, hook in getattr(part, kind).items():
            if not (getattr(hook, "__module__", None) or "").startswith(LIBRARY_HOOKS):
                yield kind, key, id(hook)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _fingerprint(tensor: Tensor) -> tuple:
    """Shape, dtype, device, whether it is trained, and a hash of the bytes."""
    contents = own_part(tensor).detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    digest = hashlib.blake2b(contents.data, digest_size=16).hexdigest()
    return tuple(tensor.shape), tensor.dtype, str(tensor.device), tensor.requires_grad, digest


def _edits(model: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """The number of edits stored on an nnsight model and on each of its children."""
    if isinstance(getattr(model, "_edits", None), list):
        yield getattr(model, "path", path), len(model._edits)
        for child in model._children:
            yield from _edits(child)
