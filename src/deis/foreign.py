"""Functions of the user's, and arrays, that belong to torch or JAX; neither is imported unless it is loaded already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_torch(x: object) -> bool:
    """Tell whether x is a torch.Tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_jax(x: object) -> bool:
    """Tell whether x is a jax.Array or a tracer, without importing JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.Array)


def is_compiling() -> bool:
    """Tell whether torch.compile is tracing, which cannot follow NumPy."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def array_namespace(x: object) -> Any:
    """Return torch, jax.numpy or numpy: the module whose functions take x."""
    if is_torch(x):
        return sys.modules["torch"]
    return sys.modules["jax.numpy"] if is_jax(x) else np


def to_numpy(x: Any) -> NDArray[np.float64]:
    """Return an array of any framework in float64 on the host."""
    return np.asarray(x.detach().cpu().double() if is_torch(x) else x, dtype=np.float64)


def interp(x: Any, points: NDArray[np.float64], values: NDArray[np.float64]) -> Any:
    """Return the values between increasing points, linear in x and constant beyond them, in the framework and dtype of x."""
    if not is_torch(x):
        return array_namespace(x).interp(x, points, values)
    torch = sys.modules["torch"]
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    at, to = like(points, x), like(values, x)
    right = torch.searchsorted(at, x.detach().contiguous(), right=True).clamp(1, len(at) - 1)
    share = (x.clamp(at[0], at[-1]) - at[right - 1]) / (at[right] - at[right - 1])
    return torch.lerp(to[right - 1], to[right], share)


def like(x: NDArray[Any], other: Any) -> Any:
    """Return a NumPy array in the framework and dtype, and on the device, of another array."""
    if is_torch(other):
        return sys.modules["torch"].from_numpy(np.array(x, order="C")).to(other)
    return array_namespace(other).asarray(x, dtype=other.dtype)


def labels_like(labels: Any, x: Any) -> Any:
    """Return labels of any framework, or None, as a torch tensor on the device of x."""
    if labels is None or is_torch(labels):
        return labels
    return sys.modules["torch"].as_tensor(labels, device=x.device)


def no_grad(x: object) -> AbstractContextManager[Any]:
    """Return the context in which torch records no gradients; for others, one that does nothing."""
    return sys.modules["torch"].no_grad() if is_torch(x) else nullcontext()


def call_unchanged(fn: Callable[..., Any], names: str, *arrays: Any) -> Any:
    """Call a user's function on arrays that it must not change in place, as the caller goes on from them.

    torch counts the changes of a tensor, except of one made in inference mode and under torch.compile; there, and in NumPy, which
    counts none, the function is given copies. `names` says in an error what the arguments are.

    Raises
    ------
    ValueError
        Where torch counted a change.
    """
    lent = [_lent(x) for x in arrays]
    versions = [_version(x) for x in lent]
    result = fn(*lent)
    if versions != [_version(x) for x in lent]:
        raise ValueError(
            f"{names} was changed in place by the function that was given it, and the sampler goes on from it; begin the function "
            "with a copy, as x = x.clone(), or use operations without a trailing underscore"
        )
    return result


def _lent(x: Any) -> Any:
    if is_torch(x):
        return x.clone() if is_compiling() or x.is_inference() else x
    return x.copy() if isinstance(x, np.ndarray) else x


def _version(x: Any) -> int | None:
    return x._version if is_torch(x) and not (is_compiling() or x.is_inference()) else None


def call_in_float64(fn: Callable[[Any], Any], x: NDArray[np.float64], argument: str) -> NDArray[np.float64]:
    """Call a function written in NumPy, torch, jax.numpy or for Python floats on an array, in float64 throughout.

    Raises
    ------
    TypeError
        Where the function takes none of these, or returns float32 whatever it is given; it names `argument`.
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
        f"{argument} must map an array of shape {x.shape} to float64 of the same shape, and did so neither in NumPy, torch, "
        "JAX nor on single floats. " + "; ".join(errors)
    )


def _call_numpy(fn: Callable[[Any], Any], x: NDArray[np.float64]) -> NDArray[Any]:
    y = fn(x)
    if is_jax(y):
        raise TypeError("it returned a JAX array")
    return np.asarray(y.detach().cpu() if is_torch(y) else y)


def _call_torch(fn: Callable[[Any], Any], x: NDArray[np.float64]) -> NDArray[Any] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    with torch.no_grad():
        return np.asarray(torch.as_tensor(fn(torch.from_numpy(np.array(x)))).detach().cpu())


def _call_jax(fn: Callable[[Any], Any], x: NDArray[np.float64]) -> NDArray[Any] | None:
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    # A schedule may be built while a caller's function is being traced; its numbers are constants there.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return np.asarray(fn(jax.numpy.asarray(x)))


def _call_floats(fn: Callable[[Any], Any], x: NDArray[np.float64]) -> NDArray[Any]:
    return np.array([float(fn(float(value))) for value in x.ravel()], dtype=np.float64).reshape(x.shape)
