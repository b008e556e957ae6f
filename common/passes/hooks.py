"""The hooks of this library: their order among others, what they see, how to switch them off."""

import functools
import inspect
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationMixin

from common.places.blocks import get_blocks, get_hidden, with_hidden
from common.places.positions import PACKED, PositionTracker, Text, being_generated, generating
from common.scaling.units import Engine

# Hooks that a library installs on itself at the first forward pass and keeps: transformers to
# collect hidden states, the bridge of TransformerLens to catch the input of a layer norm. Hooks
# that a user adds come from other modules.
LIBRARY_HOOKS = ("transformers.", "transformer_lens.model_bridge.")

_changing = threading.Lock()
_suspended: ContextVar[bool] = ContextVar("steering_is_suspended", default=False)


def forget_compiled() -> None:
    """Drop what `torch.compile` made in this process, so that the next pass compiles again.

    Code that was compiled while a module had no hook never checks whether one came. It does notice
    that one went.
    """
    if torch._dynamo.convert_frame.input_codes.seen:
        torch.compiler.reset()


_eager = ExitStack()  # what is undone when the last block of `uncompiled` ends
_uncompiled = 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules uncompiled while the block is open: compiled code sees no new hooks.

    torch has one stance for all threads, so it comes back when the last block ends, in any thread.
    """
    global _uncompiled
    with _changing:
        if not _uncompiled:
            _eager.enter_context(torch.compiler.set_stance("force_eager"))
        _uncompiled += 1
    try:
        yield
    finally:
        with _changing:
            _uncompiled -= 1
            if not _uncompiled:
                _eager.close()


def users_hooks(module: nn.Module) -> list[Callable]:
    """Return the forward hooks on a module that no library put there: steering is among them."""
    return [
        hook
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not (getattr(hook, "__module__", None) or "").startswith(LIBRARY_HOOKS)
    ]


def refuse_hooks(model: nn.Module, what: str) -> None:
    """Refuse a model that is steered already, or looked into: a hook on a block would act twice.

    Args:
        model: a causal language model.
        what: what starts from the model as it is, as the message names it.

    Raises:
        ValueError: a block of it has a hook that no library put there, or its attention is frozen.
    """
    for hook in holder_of_blocks(model)._forward_pre_hooks.values():
        if getattr(getattr(hook, "__self__", None), "changes_passes", False):
            raise ValueError(f"attention of the model is frozen: {what} starts from it as it is")
    for number, block in enumerate(get_blocks(model)[1]):
        for hook in users_hooks(block):
            raise ValueError(
                f"block {number} has a hook, {hook!r}: {what} starts from the model as it is, take"
                " the hook off first"
            )


def check_engine(engine: Engine | None, model: nn.Module) -> None:
    """Refuse a model whose hooks an engine's workers would lack, wherever they are in it.

    Args:
        engine: None is this process, where all hooks act.
        model: a causal language model.

    Raises:
        ValueError: a module of it has a hook that no library put there; or what is no engine.
    """
    if engine is None:
        return
    if isinstance(engine, type) or not hasattr(engine, "run"):
        raise ValueError(f"expected an engine, such as RayEngine(workers=2), got {engine!r}")
    for name, module in model.named_modules():
        for hook in users_hooks(module):
            where = f"the module {name}" if name else "the model"
            raise ValueError(
                f"{where} has a hook, {hook!r}, which the workers of an engine do not have: take"
                " it off first"
            )


class EndOfPass(Exception):
    """Raised in a hook to end a pass after the last place that is wanted; its caller catches it."""


@contextmanager
def unsteered() -> Iterator[None]:
    """Switch off all steering of this library while the block is open, to read the model itself."""
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)


def is_suspended() -> bool:
    """Say whether `unsteered` is open."""
    return _suspended.get()


class SteeringHook(ABC):
    """A hook that changes hidden states: what a module gives, or as a pre-hook what it gets.

    Subclasses define `steer(hidden)`.

    Attributes:
        home: the id of the module it was registered on. A deep copy of the module has a copy of the
            hook, which nothing removes; `pristine.copied_steering` knows it by its home.
    """

    home: int | None = None

    @abstractmethod
    def steer(self, hidden: Tensor) -> Tensor:
        """Return the steered hidden states, [batch, pos, d_model] like `hidden`."""

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
    """Register a hook that runs after the steering hooks that are there, and before all others.

    transformers collects `hidden_states` by hooks of its own, which have to see the steering.
    """
    handle, hook.home = module.register_forward_hook(hook.on_output), id(module)
    hooks = cast(OrderedDict[int, Callable], module._forward_hooks)
    steering = [
        key
        for key, other in hooks.items()
        if isinstance(getattr(other, "__self__", None), SteeringHook)
    ]
    for key in reversed(steering):
        hooks.move_to_end(key, last=False)
    forget_compiled()
    return handle


def hook_input(module: nn.Module, hook: SteeringHook) -> RemovableHandle:
    """Register a hook that changes what a module gets, after the hooks that are there."""
    hook.home = id(module)
    forget_compiled()
    return module.register_forward_pre_hook(hook.on_input, with_kwargs=True)


class PassHandle:
    """What `hook_passes` returns: `remove()` takes everything off the model again."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def remove(self) -> None:
        """Take it off; a second call does nothing."""
        self.stack.close()


def hook_passes(model: nn.Module, tracker: PositionTracker) -> PassHandle:
    """Let a tracker see every pass of a model before its blocks run, unless steering is suspended.

    Where positions matter, `generate` is watched too, since only there it is known what the prompt
    is: until the handle is removed, the methods of `WATCHED` are set on the model itself.
    """
    forget_compiled()
    holder, handle = holder_of_blocks(model), PassHandle()
    hook = _PassHook(tracker)
    try:
        # Before those that give a pass other arguments (`frozen_attention`).
        first = holder.register_forward_pre_hook(hook.begin, with_kwargs=True, prepend=True)
        handle.stack.callback(first.remove)
        if tracker.selection.everything:
            return handle
        handle.stack.callback(holder.register_forward_hook(hook.finish).remove)
        if model is not holder:
            handle.stack.callback(
                model.register_forward_pre_hook(hook.note_mask, with_kwargs=True).remove
            )
        for owner in model.modules():
            if isinstance(owner, GenerationMixin) and any(
                part is holder for part in owner.modules()
            ):
                for name, instead in WATCHED.items():
                    if instead is not _refuse_to_pack or tracker.selection.needs_rows:
                        handle.stack.enter_context(_watching(owner, name, instead, holder))
    except BaseException:
        handle.remove()
        raise
    return handle


@contextmanager
def prompts_of(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Say what the prompts are, by their attention mask [batch, pos], where passes read more."""
    with generating(holder_of_blocks(model), Text.of(mask)):
        yield


_Method = TypeVar("_Method", bound=Callable)


def uncounted(method: _Method) -> _Method:
    """Keep a method out of compiled graphs: counting is not a part of them."""
    return cast(_Method, torch.compiler.disable(cast(Any, method)))


class _PassHook:
    """Hands passes on to a tracker. A deep copy of the model gets a tracker of its own."""

    def __init__(self, tracker: PositionTracker):
        self.tracker = tracker

    @uncounted
    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a pass."""
        if not is_suspended():
            self.tracker(args, kwargs)

    @uncounted
    def note_mask(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a pass of the whole model."""
        if not is_suspended():
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            self.tracker.note_mask({**dict(zip(names, args)), **kwargs}.get("attention_mask"))

    @uncounted
    def finish(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After it."""
        if not is_suspended():
            self.tracker.finish(output)


class _Watched:
    """Takes the place of one of a model's methods, and calls `instead` with itself."""

    __wrapped__: Callable  # the method

    def __init__(self, model: nn.Module, name: str, instead: Callable, holder: nn.Module):
        self.model, self.instead, self.holder, self.users = model, instead, holder, 0
        self.before = vars(model).get(name)
        method = getattr(model, name) if self.before is None else self.before
        functools.update_wrapper(self, method)  # for those who look at the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.instead(self, *args, **kwargs)


@contextmanager
def _watching(model: nn.Module, name: str, instead: Callable, holder: nn.Module) -> Iterator[None]:
    """Watch a method of one model. The block that closes last puts back what was there."""
    with _changing:
        watched = vars(model).get(name)
        if not isinstance(watched, _Watched):
            watched = vars(model)[name] = _Watched(model, name, instead, holder)
        watched.users += 1
    try:
        yield
    finally:
        with _changing:
            watched.users -= 1
            if not watched.users and vars(model).get(name) is watched:
                del vars(model)[name]
                if watched.before is not None:
                    vars(model)[name] = watched.before


def _generate(watched: _Watched, *args: Any, **kwargs: Any) -> Any:
    """Generate with the prompts known.

    Drafts that a model writes for itself (`assistant_early_exit`) have the prompts of their text.
    """
    mask, outer = kwargs.get("attention_mask"), being_generated(watched.holder)
    settings = kwargs.get("generation_config") or watched.model.generation_config
    text = Text.of(mask) if isinstance(mask, Tensor) and mask.dim() == 2 else Text()
    if outer is not None and getattr(settings, "is_assistant", False):
        text = Text(outer.lengths, outer.mask, ids=outer.ids, decided=outer.decided)
    scale = kwargs.get("guidance_scale", getattr(settings, "guidance_scale", None))
    text.guided = scale not in (None, 1)
    text.beams = (kwargs.get("num_beams", getattr(settings, "num_beams", None)) or 1) > 1
    if text.guided and kwargs.get("use_cache", getattr(settings, "use_cache", None)) is False:
        raise ValueError(
            f"guidance_scale={scale} reads two texts in turn, told apart by their caches: generate"
            " with use_cache=True"
        )
    with generating(watched.holder, text):
        return watched.__wrapped__(*args, **kwargs)


def _expand(watched: _Watched, *args: Any, **kwargs: Any) -> Any:
    """Note the prompts of a `generate`, and its padding where transformers found it."""
    text = being_generated(watched.holder)
    if text is not None and text.ids is None:
        text.ids = kwargs.get("input_ids")
    if text is not None and text.lengths is None:
        mask, entries = (kwargs.get(name) for name in ("attention_mask", "inputs_embeds"))
        entries = kwargs["input_ids"] if entries is None else entries
        mask = torch.ones(entries.shape[:2], dtype=torch.long) if mask is None else mask
        text.mask, text.lengths = mask, mask.long().sum(-1)
    return watched.__wrapped__(*args, **kwargs)


def _refuse_to_pack(watched: _Watched, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(PACKED)


WATCHED: dict[str, Callable] = {
    "generate": _generate,
    "_expand_inputs_for_generation": _expand,
    "init_continuous_batching": _refuse_to_pack,
}


def holder_of_blocks(model: nn.Module) -> nn.Module:
    """Return the module that gets token ids and attention mask for the blocks, or else the model.

    BERT's blocks are in an encoder that gets neither, but hidden states and a mask that is made for
    the attention.
    """
    try:
        path, _ = get_blocks(model)
    except ValueError:
        return model
    above = path.rpartition(".")[0]
    while above and not {"input_ids", "inputs_embeds"} & set(
        inspect.signature(type(model.get_submodule(above)).forward).parameters
    ):
        above = above.rpartition(".")[0]
    return model.get_submodule(above)
