"""Hooks of this library: where they stand among others, what they see of a pass, and how they are switched off for a while."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from common.blocks import get_blocks, get_hidden, with_hidden

_suspended: ContextVar[bool] = ContextVar("steering_is_suspended", default=False)


def forget_compiled() -> None:
    """Drop what `torch.compile` made, in this process: a compiled model is compiled again at its next pass.

    Code that was compiled while a module had no hook never looks again whether one came. That one went it does notice.
    """
    if torch._dynamo.convert_frame.input_codes.seen:
        torch.compiler.reset()


class EndOfPass(Exception):
    """Raised in a hook to end a forward pass behind the last place that is wanted; whoever ran the pass suppresses it."""


@contextmanager
def unsteered() -> Iterator[None]:
    """Switch off all steering of this library while the block is open, so that a model can be read as it is."""
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)


def is_suspended() -> bool:
    """Whether `unsteered` is open."""
    return _suspended.get()


class SteeringHook(ABC):
    """A hook that changes hidden states: as a forward hook what a module gives, as a pre-hook what it gets.

    Subclasses define `steer(hidden)`, which returns the steered hidden states, both [batch, pos, d_model].

    Attributes:
        home: the id of the module it was registered on. A deep copy of the module has a copy of the hook, which nobody takes
            off again; it is known by its home (`pristine.copied_steering`).
    """

    home: int | None = None

    @abstractmethod
    def steer(self, hidden: Tensor) -> Tensor:
        """Return the steered hidden states."""

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Steer what the module gives."""
        if is_suspended():
            return output
        return with_hidden(output, self.steer(get_hidden(output)))

    def on_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Steer what the module gets."""
        if is_suspended():
            return None
        if args:
            return (self.steer(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.steer(kwargs["hidden_states"])}


def hook_output(module: nn.Module, hook: SteeringHook) -> RemovableHandle:
    """Register a hook that runs behind the steering hooks that are there, and before all others.

    transformers collects `hidden_states` by hooks of its own, which have to see the steering.
    """
    handle, hook.home = module.register_forward_hook(hook.on_output), id(module)
    hooks = module._forward_hooks
    for key in reversed([key for key, other in hooks.items() if isinstance(getattr(other, "__self__", None), SteeringHook)]):
        hooks.move_to_end(key, last=False)
    forget_compiled()
    return handle


def hook_input(module: nn.Module, hook: SteeringHook) -> RemovableHandle:
    """Register a hook that changes what a module gets, behind the hooks that are there."""
    hook.home = id(module)
    forget_compiled()
    return module.register_forward_pre_hook(hook.on_input, with_kwargs=True)


def hook_passes(model: nn.Module, tracker: Callable) -> RemovableHandle:
    """Let a tracker see every pass of a model before its blocks run, unless steering is suspended."""

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not is_suspended():
            tracker(args, kwargs)

    forget_compiled()
    return holder_of_blocks(model).register_forward_pre_hook(note, with_kwargs=True)


def holder_of_blocks(model: nn.Module) -> nn.Module:
    """The module that gets the attention mask and hands it to the blocks; the model itself where there is no other."""
    try:
        path, _ = get_blocks(model)
    except ValueError:
        return model
    return model.get_submodule(path.rpartition(".")[0])
