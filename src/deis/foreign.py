"""Functions of the user's, and arrays, that belong to torch or JAX; neither is imported unless it is loaded already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import AnyArray, Array


def is_torch(x: object) -> bool:
    """Return whether x is a torch.Tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_jax(x: object) -> bool:
    """Return whether x is a jax.Array or a tracer, without importing JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.Array)


def is_traced(x: object) -> bool:
    """Return whether the values of x cannot be looked at, because JAX or torch.compile is tracing."""
    jax = sys.modules.get("jax")
    return (jax is not None and isinstance(x, jax.core.Tracer)) or is_compiling()


def is_compiling() -> bool:
    """Return whether torch.compile is tracing, which cannot follow NumPy."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def call_in_float64(fn: Callable[[Any], Any], x: Array, argument: str) -> Array:
    """Call a function written in NumPy, torch, jax.numpy or for Python floats on an array, in float64 throughout.

    Raises
    ------
    TypeError
        If the function takes none of these, or always returns float32; the message names `argument`.
    """
    errors = []
    for call in (_call_numpy, _call_torch, _call_jax, _call_floats):
        try:
            y = call(fn, x)
        except Exception as error:
            errors.append(f"{call.__name__[6:]}: {type(error).__name__}: {error}")
            continue
        if y is not None and y.dtype == np.float64 and y.shape == x.shape:
            return y
        errors.append(f"{call.__name__[6:]}: " + ("not loaded" if y is None else f"returned {y.dtype} of shape {y.shape}"))
    raise TypeError(
        f"{argument} must map an array of shape {x.shape} to float64 of the same shape, and did not do so in NumPy, torch, JAX "
        "or on single floats. " + "; ".join(errors)
    )


def _call_numpy(fn: Callable[[Any], Any], x: Array) -> AnyArray:
    y = fn(x)
    if is_jax(y):
        raise TypeError("it returned a JAX array")
    return np.asarray(y.detach().cpu() if is_torch(y) else y)


def _call_torch(fn: Callable[[Any], Any], x: Array) -> AnyArray | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    with torch.no_grad():
        return np.asarray(torch.as_tensor(fn(torch.from_numpy(np.array(x)))).detach().cpu())


def _call_jax(fn: Callable[[Any], Any], x: Array) -> AnyArray | None:
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    # A schedule may be built while a caller's function is being traced; its numbers are constants there.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return np.asarray(fn(jax.numpy.asarray(x)))


def _call_floats(fn: Callable[[Any], Any], x: Array) -> AnyArray:
    return np.array([float(fn(float(value))) for value in x.ravel()], dtype=np.float64).reshape(x.shape)
