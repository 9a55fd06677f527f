"""The weights behind a function: the networks that it holds, and a digest of their numbers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np

from ..arguments import is_torch_module
from ..arrays import AnyArray
from ..backends import to_numpy

_DEPTH = 12  # of functions within functions; a guided Denoiser of a pipeline has nine
_PLAIN = (str, bytes, int, float, complex, type(None), type, np.ndarray, np.generic)


def networks(model: Any) -> Iterator[Any]:
    """Yield the torch and NNX modules that a function holds: in closures, partial arguments, attributes, and globals it names."""
    stack, seen = [(model, 0)], set[int]()
    while stack:
        value, depth = stack.pop()
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if is_torch_module(value) or _is_nnx(value):
            yield value
        elif depth < _DEPTH:
            stack += [(inner, depth + 1) for inner in reversed(_inside(value))]


def _inside(value: Any) -> list[Any]:
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        code = value.__code__
        cells = [found for cell in value.__closure__ or () for found in _content(cell)]
        named = [value.__globals__[name] for name in code.co_names if name in value.__globals__]
        return cells + [each for each in named if is_torch_module(each) or _is_nnx(each)]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if is_dataclass(value):
        return [getattr(value, field.name, None) for field in fields(value)]
    return list(getattr(value, "__dict__", {}).values())


def _content(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a name that was not given a value yet
        return []


def _is_nnx(value: object) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def weights_digest(model: Any) -> str:
    """Return a digest of the names and numbers of all weights that a model holds; empty where none are found."""
    found, total = False, hashlib.sha256()
    for network in networks(model):
        for name, values in _state(network):
            found = True
            total.update(f"{name} {values.dtype} {values.shape}".encode())
            total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest() if found else ""


def _state(network: Any) -> Iterator[tuple[str, AnyArray]]:
    if is_torch_module(network):
        for name, tensor in sorted(network.state_dict().items()):
            yield name, to_numpy(tensor) if hasattr(tensor, "detach") else np.asarray(str(tensor))
        return
    import jax
    from flax import nnx

    for path, values in jax.tree_util.tree_leaves_with_path(nnx.state(network)):
        if not jax.numpy.issubdtype(values.dtype, jax.dtypes.prng_key):
            yield jax.tree_util.keystr(path), to_numpy(values)
