"""`Trace` and `TraceDict` for machines without baukit, with its arguments and its effects.

baukit (https://github.com/davidbau/baukit) is on no package index, and importing it needs
torchvision. Where it is installed, the notebook takes the real one (docs/installing.md says how to
install it). Names and behaviour follow its `nethook` module: the hook is registered when the object
is made, and removed when the `with` ends. Nothing else of that module is here. Two things differ:
an `edit_output` that cannot be called, or has `*args`, is refused before the pass and not in it,
and a `TraceDict` that does not find a layer leaves no hook on the others.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

# What `edit_output` gets, in this order where its own names are others.
GIVEN = ("output", "layer", "inputs")


class StopForward(Exception):
    """Raised after the traced layer to end the forward pass; `Trace` catches it."""


class Trace:
    """Keep, and if wanted change, the output of one module while the `with` is open.

    Args:
        module: the model, or the traced module itself if `layer` is None.
        layer: the dotted name of the traced module inside the model.
        retain_output: keep what the module returned, or what `edit_output` made of it, in
            `.output`.
        retain_input: keep what the module got in `.input`: its one positional argument, or a tuple
            of them.
        clone: keep copies, also of tensors in tuples, lists and dicts.
        detach: keep tensors that are not part of the graph; not where `retain_grad` is set.
        retain_grad: after `backward`, `.output.grad` is the gradient of what was kept (not of a
            clone).
        edit_output: what it returns replaces the output; if it returns None, PyTorch keeps the
            output as it was. Its arguments named `output`, `layer` (the name) and `inputs` (a
            tuple) get these; others get, in this order, what no name asked for, whether they have a
            default or not.
        stop: end the forward pass after this module.

    Raises:
        LookupError: the model has no module of that name.
        TypeError: `edit_output` is not a function, or takes what nobody gives; at the end of the
            `with`, if `stop` is set and the module did not run.
        AssertionError: during the pass, if what is to be copied is not a tensor, or a tuple, list
            or dict of tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str | None = None,
        retain_output: bool = True,
        retain_input: bool = False,
        clone: bool = False,
        detach: bool = False,
        retain_grad: bool = False,
        edit_output: Callable | None = None,
        stop: bool = False,
    ):
        self.layer, self.stop = layer, stop
        traced, edit = _find(module, layer), _by_name(edit_output)

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if edit:
                output = edit(output=output, layer=layer, inputs=args)
            if retain_input:
                self.input = _kept(args[0] if len(args) == 1 else args, clone, detach)
            if retain_output:
                self.output = _kept(output, clone, detach, retain_grad)
                if retain_grad:  # the model may go on in place, and must not change what is kept
                    output = _kept(self.output, clone=True)
            if stop:
                raise StopForward
            return output

        self.registered_hook = traced.register_forward_hook(hook)

    def close(self) -> None:
        """Remove the hook."""
        self.registered_hook.remove()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> bool:
        self.close()
        return _was_stopped(self.stop, kind)


class TraceDict(OrderedDict):
    """One `Trace` for each of several layers, by name.

    `stop` ends the forward pass after the last layer that is listed. The other arguments are
    those of `Trace`, for all layers, or as dicts for the layers that they name.

    Raises:
        LookupError: the model lacks one of the layers; no hook is registered then.
        TypeError: as for `Trace`.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[str],
        retain_output: bool | dict = True,
        retain_input: bool | dict = False,
        clone: bool | dict = False,
        detach: bool | dict = False,
        retain_grad: bool | dict = False,
        edit_output: Callable | dict | None = None,
        stop: bool = False,
    ):
        super().__init__()
        self.stop, names = stop, list(dict.fromkeys(layers))
        options = (retain_output, retain_input, clone, detach, retain_grad, edit_output)
        chosen = {
            name: [one.get(name) if isinstance(one, dict) else one for one in options]
            for name in names
        }
        for name in names:  # before any hook is registered
            _find(module, name)
            _by_name(chosen[name][-1])
        for name in names:
            self[name] = Trace(module, name, *chosen[name], stop=stop and name == names[-1])

    def close(self) -> None:
        """Remove all hooks."""
        for trace in reversed(self.values()):
            trace.close()

    def __enter__(self) -> "TraceDict":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> bool:
        self.close()
        return _was_stopped(self.stop, kind)


def _find(module: nn.Module, layer: str | None) -> nn.Module:
    """The module of that name; without a name the module itself."""
    known = {None: module, **dict(module.named_modules())}
    if layer not in known:
        raise LookupError(layer)
    return known[layer]


def _was_stopped(stop: bool, kind: type | None) -> bool:
    """Whether a `with` ends by `StopForward`; with `stop` it must, as in baukit."""
    if stop and kind is None:
        raise TypeError("stop=True: expected the layer to run inside the `with`, and it did not")
    return stop and issubclass(kind, StopForward)


def _kept(value: Any, clone: bool = False, detach: bool = False, retain_grad: bool = False) -> Any:
    """What is kept of a value: the object, or its tensors in containers of the same types."""
    if not (clone or detach or retain_grad):
        return value
    if isinstance(value, dict):
        return type(value)(
            {key: _kept(part, clone, detach, retain_grad) for key, part in value.items()}
        )
    if isinstance(value, list | tuple):
        return type(value)([_kept(part, clone, detach, retain_grad) for part in value])
    if not isinstance(value, Tensor):  # the error that baukit raises
        raise AssertionError(
            "clone, detach, retain_grad: expected tensors in tuples, lists and dicts, got a"
            f" {type(value).__name__}"
        )
    if retain_grad:
        value.requires_grad_().retain_grad()
    elif detach:
        value = value.detach()
    return value.clone() if clone else value


def _by_name(edit_output: Callable | None) -> Callable | None:
    """Return a function of output, layer and inputs that hands `edit_output` what it asks for.

    Raises:
        TypeError: a method, an object or a builtin, `*args`, or an argument for which nothing is
            left.
    """
    if not edit_output:
        return None
    if not inspect.isfunction(
        edit_output.func if isinstance(edit_output, partial) else edit_output
    ):
        raise TypeError(
            f"edit_output: expected a function, got a {type(edit_output).__name__}, which baukit"
            " cannot call"
        )
    spec = inspect.getfullargspec(edit_output)
    others = iter([name for name in GIVEN if name not in spec.args + spec.kwonlyargs])
    sources = {name: name if name in GIVEN else next(others, None) for name in spec.args}
    defaults = dict(zip(reversed(spec.args), reversed(spec.defaults or ()))) | (
        spec.kwonlydefaults or {}
    )
    lacking = [name for name, source in sources.items() if not source and name not in defaults]
    lacking += [name for name in spec.kwonlyargs if name not in {*GIVEN, *defaults}]
    if lacking or spec.varargs:
        wanted = ", ".join(lacking) or f"*{spec.varargs}"
        raise TypeError(
            "edit_output: expected a function of output, layer and inputs, got one that takes"
            f" {wanted} as well"
        )

    def edit(**given: Any) -> Any:
        values = [given[source] if source else defaults[name] for name, source in sources.items()]
        return edit_output(
            *values, **{name: given[name] for name in spec.kwonlyargs if name in given}
        )

    return edit
