"""Checks of arguments, and one way to say what is wrong with them: the argument, its value and the cure."""

from __future__ import annotations

import inspect
import math
import reprlib
import sys
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np

from .arrays import Array
from .foreign import is_compiling, is_jax, is_torch

_MOST = 10**6
_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


def shown(value: object) -> str:
    """Return the repr of a value for an error message, cut if it is long or deep; it never raises an error itself."""
    try:
        return _SHORT.repr(value)
    except Exception:  # an integer of thousands of digits, or a repr that fails
        return f"<{type(value).__name__}>"


def number(
    argument: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    infinite: bool = False,
    hint: str = "",
) -> float:
    """Return a real number as a Python float.

    Raises
    ------
    ValueError
        If it is not a number (bools and strings are not), NaN, infinite unless `infinite`, below `least`, above `most`, or not
        above `above`. The hint ends the message.
    """
    found = _real(value)
    if least <= found <= most and (found > above or above == -math.inf) and (infinite or math.isfinite(found)):
        return found
    bounds = [f"greater than {above:g}"] if above > -math.inf else []
    bounds += [f"at least {least:g}"] if least > -math.inf else []
    bounds += [f"at most {most:g}"] if most < math.inf else []
    kind = "a number" if infinite else "a finite number"
    text = " and ".join(bounds)
    raise ValueError(f"{argument}={shown(value)} must be {kind}{text and ', ' + text}{hint and ': ' + hint}")


def _real(value: Any) -> float:
    """Return a number, from Python, NumPy or a 0-dimensional array, as a float; NaN if it is not a number."""
    try:
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except Exception:  # no value under a trace or on the meta device; an integer too large for a float
        return math.nan


def whole(argument: str, value: Any, least: int = 1, most: int = _MOST) -> int:
    """Return a whole number as an int.

    Raises
    ------
    ValueError
        If it is not a whole number, below `least`, or above `most`: by default a million, more than a plan can have of anything.
    """
    found = _real(value)
    if not (found.is_integer() and least <= found <= most):
        limit = f" and at most {most}" if found > most else ""
        raise ValueError(f"{argument}={shown(value)} must be a whole number of at least {least}{limit}")
    return int(found)


def kind(argument: str, value: Any, wanted: type[Any] | tuple[type[Any], ...], what: str) -> None:
    """Check that a value is an instance of a class; `what` describes the class in the message.

    Raises
    ------
    TypeError
        If it is not one.
    """
    if not isinstance(value, wanted):
        raise TypeError(f"{argument} must be {what} and is {shown(value)}")


def flag(argument: str, value: Any) -> None:
    """Check that a value is True or False, or 1 or 0.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    if not (isinstance(value, bool | np.bool_ | int) and value in (0, 1)):
        raise ValueError(f"{argument}={shown(value)} must be True or False")


def one_of(argument: str, value: Any, known: Iterable[str], also: str = "") -> str:
    """Return a name.

    Raises
    ------
    ValueError
        If it is not one of the known names; the message lists them, and what else is accepted.
    """
    names = tuple(known)
    if not (isinstance(value, str) and value in names):
        raise ValueError(f"{argument}={shown(value)} is unknown; the known ones are {', '.join(map(repr, names))}{also}")
    return value


def function(argument: str, value: Any, *parameters: str) -> None:
    """Check that a value is a function that can be called with that many arguments.

    The check uses its signature, before any call: an error raised inside a user's function is left to the user.

    Raises
    ------
    TypeError
        If it is not a function, or its signature does not take the arguments.
    """
    wanted = f"{argument} must be a function of ({', '.join(parameters)})"
    if not callable(value):
        raise TypeError(f"{wanted}, and is {shown(value)}")
    if is_compiling():
        return
    try:
        signature = inspect.signature(_called(value), follow_wrapped=False)
    except (TypeError, ValueError):  # a builtin that has none
        if isinstance(value, type):
            raise TypeError(f"{wanted}, and is the class {shown(value)}") from None
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        raise TypeError(f"{wanted}, and {shown(value)} takes {signature}: {error}") from None


def _called(value: Any) -> Any:
    """Return the function that a callable object calls, if its own signature says nothing, as with a torch module."""
    forward = getattr(value, "forward", None)
    return forward if is_torch_module(value) and callable(forward) else value


def is_torch_module(value: object) -> bool:
    """Return whether a value is a torch.nn.Module, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def array(argument: str, value: Any, about: str = "") -> Array:
    """Return real numbers, of any framework and shape, as a new float64 array.

    Raises
    ------
    TypeError
        If they are not real numbers: strings, complex numbers, None, or rows of different lengths.
    """
    try:
        found = np.asarray(value.detach().cpu().double() if is_torch(value) and not value.is_complex() else value)
        numeric = found.dtype.kind in "iuf" or found.dtype.name in ("bfloat16", "float16")
        converted = np.array(found, dtype=np.float64) if numeric else None
    except Exception:  # rows of different lengths, or an object whose conversion fails
        converted = None
    if converted is None:
        raise TypeError(f"{argument} must be an array of real numbers{about and ', ' + about}, and is {shown(value)}")
    return converted


def check_state(argument: str, x: Any) -> None:
    """Check that a value is an array of a floating dtype with a batch axis.

    Raises
    ------
    TypeError
        If it is not an array of torch, JAX or NumPy, or not of a floating dtype.
    ValueError
        If it has no batch axis, or no samples.
    """
    if not (is_torch(x) or is_jax(x) or isinstance(x, np.ndarray)):
        raise TypeError(f"{argument} must be a torch.Tensor, a jax.Array or a numpy.ndarray, and is a {type(x).__name__}")
    if not is_floating(x):
        raise TypeError(f"{argument} has dtype {x.dtype}; give an array of a floating dtype")
    if x.ndim < 1:
        raise ValueError(f"{argument} has shape (); give it a batch axis, as in {argument}[None]")
    if 0 in x.shape:
        raise ValueError(f"{argument} has shape {tuple(x.shape)}, without a single number; give at least one sample")


def is_floating(x: Any) -> bool:
    """Return whether an array has a floating dtype."""
    if is_torch(x):
        return bool(x.is_floating_point())
    return bool((sys.modules["jax.numpy"] if is_jax(x) else np).issubdtype(x.dtype, np.floating))
