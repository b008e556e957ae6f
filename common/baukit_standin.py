"""`Trace` and `TraceDict` for machines without baukit: the part of its interface that the notebook uses.

baukit (https://github.com/davidbau/baukit) is on no package index, and importing it needs torchvision. Where it is
installed, the notebook takes the real one; README.md says how to install it. The names and the behaviour follow its
`nethook` module: the hook is registered when the object is made, and removed when the `with` ends.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


class StopForward(Exception):
    """Raised after the traced layer to end the forward pass; `Trace` catches it."""


class Trace:
    """Keep, and if wanted change, the output of one module while the `with` is open.

    Args:
        module: the model, or the traced module itself if `layer` is None.
        layer: the dotted name of the traced module inside the model.
        retain_output: keep what the module returned in `.output`.
        edit_output: called with the output, and with the name of the layer if it takes a second argument; what it
            returns replaces the output. If it returns None, PyTorch keeps the output as it was.
        stop: end the forward pass after this module.

    Raises:
        LookupError: the model has no module of that name.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str | None = None,
        retain_output: bool = True,
        edit_output: Callable | None = None,
        stop: bool = False,
    ):
        self.layer, self.output, self.stop = layer, None, stop
        modules = {layer: module} if layer is None else dict(module.named_modules())
        if layer not in modules:
            raise LookupError(layer)

        def hook(traced: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
            if edit_output is not None:
                output = _call(edit_output, output, layer)
            if retain_output:
                self.output = output
            if stop:
                raise StopForward
            return output

        self.handle = modules[layer].register_forward_hook(hook)

    def close(self) -> None:
        """Remove the hook."""
        self.handle.remove()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> bool:
        self.close()
        return self.stop and kind is not None and issubclass(kind, StopForward)


class TraceDict(dict):
    """One `Trace` for each of several layers, by name; `stop` ends the forward pass after the last one listed."""

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[str],
        retain_output: bool = True,
        edit_output: Callable | None = None,
        stop: bool = False,
    ):
        super().__init__()
        self.stop = stop
        names, known = list(dict.fromkeys(layers)), dict(module.named_modules())
        for name in names:
            if name not in known:  # before any hook is registered
                raise LookupError(name)
        for name in names:
            self[name] = Trace(module, name, retain_output, edit_output, stop=stop and name == names[-1])

    def close(self) -> None:
        """Remove all hooks."""
        for trace in reversed(list(self.values())):
            trace.close()

    def __enter__(self) -> "TraceDict":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> bool:
        self.close()
        return self.stop and kind is not None and issubclass(kind, StopForward)


def _call(edit_output: Callable, output: Tensor | tuple, layer: str | None) -> Tensor | tuple | None:
    """Call with as many of (output, layer) as the function takes."""
    takes_layer = len(inspect.signature(edit_output).parameters) > 1
    return edit_output(output, layer) if takes_layer else edit_output(output)
