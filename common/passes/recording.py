"""Record what modules give and get during passes, by hooks that go when the block ends."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from common.passes.hooks import EndOfPass, uncompiled
from common.places.blocks import get_hidden

Key = TypeVar("Key", bound=Hashable)
Seen = TypeVar("Seen")
# A module and the side of it, as `sites.find_site` returns them.
Location = tuple[nn.Module, Literal["input", "output"]]


@contextmanager
def recording(places: Mapping[Key, Location], record: Callable[[Key, Any], None]) -> Iterator[None]:
    """Record what passes at some places while the block is open.

    The hooks run after the steering that is open around the block. What is compiled runs uncompiled
    meanwhile, since compiled code would not see them.

    Args:
        places: modules and the side on which each is watched, by any key.
        record: called with the key and, at an output, with all that the module gives
            (`get_hidden` finds the hidden states in it); at an input with the hidden states. It
            ends the pass by raising `EndOfPass`, which the caller suppresses.
    """

    def watch_input(key: Key) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            record(key, args[0] if args else kwargs["hidden_states"])

        return hook

    def watch_output(key: Key) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            record(key, output)

        return hook

    with ExitStack() as stack:
        for key, (module, side) in places.items():
            if side == "input":
                handle = module.register_forward_pre_hook(watch_input(key), with_kwargs=True)
            else:
                handle = module.register_forward_hook(watch_output(key))
            stack.callback(handle.remove)
        stack.enter_context(uncompiled())
        yield


def record_pass(
    run: Callable[[], Any], places: Mapping[Key, Location], keep: Callable[[Key, Tensor], Seen]
) -> dict[Key, Seen]:
    """Run one pass up to the last of some places, and return what is kept of each.

    Args:
        run: runs the model; what it returns is dropped.
        places: modules and the side on which each is watched, by any key.
        keep: what to keep of the hidden states [batch, pos, d_model] at a place.
    """
    found: dict[Key, Seen] = {}

    def record(key: Key, given: Any) -> None:
        found[key] = keep(key, get_hidden(given))
        if len(found) == len(places):
            raise EndOfPass

    with recording(places, record), suppress(EndOfPass):
        run()
    return found
