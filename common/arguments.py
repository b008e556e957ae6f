"""Checks of arguments: each returns the argument as it is used, or says what was expected."""

import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor


def is_integer(value: object) -> TypeGuard[int]:
    """Say whether a value is an integer; those of numpy are, and True is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def integer(value: object, name: str, least: int | None = 0) -> int:
    """Return an integer, one of numpy included, as an int.

    Args:
        value: what was given.
        name: the argument, as the message names it.
        least: the smallest that is allowed; None allows every integer.

    Raises:
        ValueError: a bool, a float, a text; or an integer below `least`.
    """
    if is_integer(value) and (least is None or value >= least):
        return int(value)
    of = "" if least is None else f" of {least} or more"
    raise ValueError(f"expected an integer{of} as {name}, got {value!r}")


def finite_number(value: object, name: str) -> float:
    """Return a number, one of numpy included, as a float.

    Raises:
        ValueError: a bool, a text, a tensor; nan, inf, or an integer too large for a float.
    """
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"expected a finite number as {name}, got {value!r}")


def truth(value: object, name: str) -> bool:
    """Return True or False, those of numpy included, as a bool.

    Raises:
        ValueError: something else, such as a text, which Python would take for True.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(f"expected True or False as {name}, got {value!r}")


def layer_list(layers: Iterable[int]) -> list:
    """Return the layers as a list; each is checked by those who know the model.

    Raises:
        ValueError: a single number, or a text.
    """
    if (
        isinstance(layers, str)
        or not isinstance(layers, Iterable)
        or getattr(layers, "ndim", 1) != 1
    ):
        raise ValueError(
            f"expected a list of layer numbers as layers, got {layers!r}: a single layer is a list"
            " too, as in [3]"
        )
    return list(layers)


def function_of_two(function: Any, name: str, example: str) -> Callable:
    """Return a function that takes two arguments.

    Raises:
        ValueError: something else, such as the factory of such a function that was not called.
    """
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError) as error:
        # Some built-in callables have no signature: ValueError.
        if not callable(function) or isinstance(error, TypeError):
            raise ValueError(
                f"expected a function of two tensors as {name}, for example {example}, got"
                f" {function!r}"
            ) from None
    return function


def takes_one(function: Callable) -> bool:
    """Say whether a function needs an argument, and one will do."""
    return _needs(function, 1)


def takes_two(function: Callable) -> bool:
    """Say whether a function needs two arguments, and two will do."""
    return _needs(function, 2)


def first_name(function: Callable) -> str | None:
    """Return the name of the first argument of a function, if it has one."""
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except (TypeError, ValueError):  # some built-in callables have none
        return None


def _needs(function: Callable, count: int) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have none
        return False
    return not _binds(signature, *[None] * (count - 1)) and _binds(signature, *[None] * count)


def _binds(signature: inspect.Signature, *arguments: Any) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def finite_product(factor: float, vector: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Return factor times vector in `dtype`.

    Raises:
        ValueError: one of its numbers lies outside `dtype`.
    """
    product = (factor * vector.to(torch.promote_types(vector.dtype, torch.float32))).to(dtype)
    if not torch.isfinite(product).all():
        largest = abs(factor) * vector.detach().abs().max().item()
        limit, name = torch.finfo(dtype).max, str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{what} holds {largest:.3g} after multiplication by {factor:g}: {name}, in which the"
            f" model runs, ends at {limit:.3g}"
        )
    return product
