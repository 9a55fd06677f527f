"""Array frameworks, each one small record; a further one is one more file here, and its lines in `backend_of`."""

from __future__ import annotations

from typing import Any

from ..arrays import AnyArray, Array
from ..foreign import is_jax, is_torch
from .record import Backend


def backend_of(x: object) -> Backend:
    """Return the framework of an array, without loading any; NumPy's of what no other owns."""
    if is_torch(x):
        from . import torch

        return torch.BACKEND
    if is_jax(x):
        from . import jax

        return jax.BACKEND
    from . import numpy

    return numpy.BACKEND


def to_numpy(x: Any) -> Array:
    """Return an array of any framework in float64 on the host."""
    return backend_of(x).to_host(x)


def like(values: AnyArray, x: Any) -> Any:
    """Return an array of NumPy in the framework and dtype, and on the device, of another."""
    return backend_of(x).like(values, x)
