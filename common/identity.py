"""What a stored row depends on, as a short text: weights of a model, tokens, code of a metric.

Two things of one identity give the same rows. What has no content to compare is refused by name.
"""

import dis
import functools
import hashlib
import json
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.tensor_parallel import whole

# Where a model came from, with which version it was written, and what saving it adds: none changes
# what it computes. The dtype is that of the weights.
NO_PART = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
_INSTALLED = [
    Path(sysconfig.get_path(name)).resolve()
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
]
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(...),
    range,
    slice,
    torch.dtype,
    torch.device,
    torch.Size,
)
_OPEN = dict, list, tuple


def identity_of_model(model: PreTrainedModel) -> dict[str, Any]:
    """Identify a model by all its parameters and persistent buffers, its modules and its config.

    All bytes are hashed (SHA-256), whatever the dtype, shared weights once: the 6.2 GB of GPT2-XL
    in float32 take about 4 seconds on one core. Weights that were offloaded are read from where
    they lie; those that are split over processes are put together, so each process has to ask.
    Of modules of other libraries (adapters) the attributes count, too: which one is switched on,
    and how strongly. What is set by hand on a module of torch or transformers, and is neither in
    its weights nor in the config (another `eps`, a hook), is not seen.

    Returns:
        `weights`, a hash; `modules`, a hash of their names, classes and switches; `config`, without
        paths and versions.

    Raises:
        ValueError: a weight that cannot be read, by its name.
    """
    config = {
        name: value for name, value in model.config.to_diff_dict().items() if name not in NO_PART
    }
    return {
        "weights": _hash_of_state(model),
        "modules": _short(
            [
                [name, type(module).__name__, _switches(module)]
                for name, module in model.named_modules()
            ]
        ),
        "config": json.loads(json.dumps(config, default=str, sort_keys=True)),
    }


def identity_of_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identify a tokenizer by what it writes for each token."""
    rows = [[token] for token in range(len(tokenizer))]
    return _short(
        tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def identity_of_reading(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identify a tokenizer by how it reads: its rules, what it puts around a text, its template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = [sorted(tokenizer.get_vocab().items()), repr(sorted(tokenizer.init_kwargs.items()))]
    else:
        rules = json.loads(backend.to_str())
        # A call sets them for itself; nobody here pads or cuts by the tokenizer.
        del rules["truncation"], rules["padding"]
    around = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    template = getattr(tokenizer, "chat_template", None)
    return _short([type(tokenizer).__name__, rules, around, template])


def hash_of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a hash of dtype, shape and all bytes of some tensors, wherever they are."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(content.numpy().data)
    return found.hexdigest()


def identity_of_metric(metric: Any, name: str) -> str:
    """Identify a callable by its code, constants, defaults, and all that it reaches.

    Numbers and tensors count; functions and classes of installed packages go by their names.

    Raises:
        ValueError: it reaches something that has no content to compare: a generator, a lock, an
            open file.
    """
    try:
        return _short(_Content().of(metric))
    except _Unknown as error:
        raise ValueError(
            f"the metric {name!r} reaches {error}, which cannot be told from another one: rows in a"
            " file could be of an older metric. Give a function of numbers, texts and tensors, or"
            " no path"
        ) from None


class _Unknown(Exception):
    """Something without content."""


def _short(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _switches(module: nn.Module) -> list:
    """The plain attributes of a module that is neither of torch nor of transformers."""
    if type(module).__module__.startswith(("torch.", "transformers.")):
        return []
    common = vars(nn.Module()).keys()
    own = {
        name: value
        for name, value in vars(module).items()
        if name not in common and not name.startswith(("_hf", "_is_hf"))
    }
    return [[name, repr(value)] for name, value in sorted(own.items()) if _is_plain(value)]


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, or made of such: its `repr` says all of it."""
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return (
        all(map(_is_plain, value))
        if isinstance(value, list | tuple)
        else isinstance(value, bool | int | float | str | None)
    )


def _hash_of_state(model: nn.Module) -> str:
    """A hash of the state of a module: names, dtypes, shapes, bytes."""
    found, known = [], {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} of the model is a {type(tensor).__name__}, not a tensor: give no path"
            )
        try:
            if id(tensor) not in known:  # shared weights have several names
                known[id(tensor)] = hash_of_tensors([whole(_loaded(model, name, tensor))])
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise ValueError(f"the weight {name} cannot be read ({error}): give no path") from None
        found.append([name, known[id(tensor)]])
    return _short(found)


def _loaded(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A weight, read from where accelerate has put it if it is not in its module."""
    if not tensor.is_meta:
        return tensor
    path, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        if (weights := getattr(one, "weights_map", None)) is not None:
            return weights[leaf]
    raise ValueError(
        f"the weight {name} is on no device, and where it was offloaded to is unknown: give no path"
    )


class _Content:
    """Reads what a value is made of, through functions, classes and objects, in circles too."""

    def __init__(self) -> None:
        self.open: list[int] = []
        self.known: dict[
            int, tuple[Any, str]
        ] = {}  # with the thing, so that no other one gets its id

    def of(self, thing: Any) -> Any:
        """Return the content of a value as JSON holds it: itself where it is short, else a hash."""
        if isinstance(thing, _PLAIN):
            return [type(thing).__name__, repr(thing)]
        if id(thing) in self.open:
            return ["circle", len(self.open) - self.open.index(id(thing))]
        if id(thing) not in self.known:
            self.open.append(id(thing))
            self.known[id(thing)] = thing, _short([type(thing).__name__, self._parts(thing)])
            self.open.pop()
        return self.known[id(thing)][1]

    def _parts(self, thing: Any) -> Any:
        # A dict, list or tuple of another class may hold more than its items: a default, a state,
        # methods.
        if not isinstance(thing, _OPEN) or type(thing) in _OPEN:
            for kinds, read in self._READERS:
                if isinstance(thing, kinds):
                    return read(self, thing)
        return self._object(thing)

    def _named(self, thing: Any) -> str:
        return (
            f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)}"
        )

    def _each(self, things: Iterable) -> list:
        return [self.of(thing) for thing in things]

    def _items(self, things: Mapping) -> list:
        return [[self.of(key), self.of(value)] for key, value in things.items()]

    def _code(self, code: types.CodeType) -> Any:
        called = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        return [
            code.co_code.hex(),
            code.co_exceptiontable.hex(),
            code.co_names,
            called,
            self._each(code.co_consts),
        ]

    def _function(self, function: types.FunctionType) -> Any:
        if _is_installed(function.__module__):
            return self._named(function)
        reached = {
            name: _global(function, name, imported)
            for name, imported in sorted(_names(function.__code__))
        }
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        return self._each(
            [function.__code__, function.__defaults__, function.__kwdefaults__, cells, reached]
        )

    def _builtin(self, function: Any) -> Any:
        holder = getattr(function, "__self__", None)
        return [
            self._named(function),
            None if isinstance(holder, types.ModuleType | type | None) else self.of(holder),
        ]

    def _module(self, module: types.ModuleType) -> Any:
        if _is_installed(module.__name__):
            return module.__name__
        if module.__file__ is None:  # a folder without code of its own
            raise _Unknown(repr(module))
        file = Path(module.__file__)
        files = sorted(file.parent.rglob("*.py")) if hasattr(module, "__path__") else [file]
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def _class(self, kind: type) -> Any:
        if _is_installed(kind.__module__):
            return self._named(kind)
        slots = types.GetSetDescriptorType, types.MemberDescriptorType
        own = {
            name: value
            for name, value in vars(kind).items()
            if (callable(value) or not name.startswith("__"))
            and not isinstance(value, slots)
            and name != "_abc_impl"
        }
        return [self._each(kind.__bases__), self._items(own)]

    def _object(self, thing: Any) -> Any:
        """What pickle would write, without pickle."""
        try:
            found = thing.__reduce_ex__(4)
        except Exception as error:
            raise _Unknown(f"{thing!r} ({error})") from None
        if isinstance(found, str):  # a name
            if hasattr(thing, "__wrapped__"):
                return self.of(thing.__wrapped__)
            if _is_installed(getattr(thing, "__module__", "__main__")):
                return found
            raise _Unknown(repr(thing))
        make, arguments, state, items, pairs = (*found, None, None, None)[:5]
        return self._each([make, arguments, state, list(items or ()), list(pairs or ())])

    _READERS: tuple[tuple[Any, Callable[..., Any]], ...] = (
        (types.CodeType, _code),
        (types.FunctionType, _function),
        (types.MethodType, lambda self, method: self._each([method.__func__, method.__self__])),
        (
            (
                types.BuiltinFunctionType,
                types.MethodDescriptorType,
                types.WrapperDescriptorType,
                np.ufunc,
            ),
            _builtin,
        ),
        (types.ModuleType, _module),
        (type, _class),
        ((staticmethod, classmethod), lambda self, method: self.of(method.__func__)),
        (property, lambda self, found: self._each([found.fget, found.fset])),
        (functools.cached_property, lambda self, found: self.of(found.func)),
        (Tensor, lambda self, tensor: hash_of_tensors([tensor])),
        (
            PreTrainedTokenizerBase,
            lambda self, tokenizer: [
                identity_of_tokens(tokenizer),
                sorted(tokenizer.get_vocab().items()),
            ],
        ),
        (re.Pattern, lambda self, pattern: [pattern.pattern, pattern.flags]),
        ((dict, types.MappingProxyType), _items),
        (
            (set, frozenset),
            lambda self, found: [
                self.of(type(found)),
                sorted(json.dumps(self.of(value)) for value in found),
            ],
        ),
        ((tuple, list), _each),
    )


def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package: its name then says enough."""
    found = sys.modules.get((module or "builtins").partition(".")[0])
    if found is None or getattr(found, "__name__", "") == "__main__":
        return False
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), None)
    return file is None or any(Path(file).resolve().is_relative_to(folder) for folder in _INSTALLED)


def _names(code: types.CodeType) -> set[tuple[str, bool]]:
    """The names that code looks up outside, inner functions too, and whether it imports them."""
    lookups = "LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"
    own = {
        (step.argval, step.opname == "IMPORT_NAME")
        for step in dis.get_instructions(code)
        if step.opname in lookups
    }
    return own.union(
        *(_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    )


def _global(function: types.FunctionType, name: str, imported: bool) -> Any:
    """What a name stands for; the name itself where it is one of Python's own, or not there yet."""
    return (sys.modules if imported else function.__globals__).get(name, name)
