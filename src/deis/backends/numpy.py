"""NumPy: the specification of the other frameworks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..arrays import AnyArray
from ..machine import Combine, Row, Sum, terms, with_sums
from .record import MODEL, AddNoise, Backend
from .streams import streams


def combine(c_x: Any, x: AnyArray, c_p: Sequence[Any] | AnyArray, history: Sequence[AnyArray]) -> AnyArray:
    """Return c_x x + sum_j c_p[j] history[j] without the terms of weight 0, in a new array unless it is one of them."""
    return add_up(terms(c_x, c_p[: len(history)]), x, c_p, history)


def add_up(total: Sum, x: AnyArray, c_p: Any, history: Sequence[AnyArray]) -> AnyArray:
    """Return a sum of states, in the memory of its first term where that is a product."""
    states, y, own = (x, *history), None, False
    for c, j in total:
        term = states[j] if c is None else states[j] * c
        if y is None:
            y, own = term, c is not None
        elif own:
            y += term
        else:
            y, own = y + term, True
    return np.zeros_like(x) if y is None else y


def _prepared(plan: Any, dtype: Any) -> tuple[Sequence[Row], Combine[AnyArray]]:
    # NumPy multiplies by an array of no dimension and of the states' dtype in half the time that a Python number takes.
    return with_sums(plan.rows, lambda c: np.array(c, dtype)), add_up


def _full(x: AnyArray, t: Sequence[float], dtype: Any, whole: bool) -> AnyArray:
    return np.array(t, dtype=np.int64 if whole else dtype)[:, None].repeat(len(x), axis=1)


def _split(rng: Any, batch: int) -> list[np.random.Generator]:
    return streams(rng, batch, np.random.Generator, lambda generator: generator.spawn(batch))


def _noise(rng: Any, batch: int) -> AddNoise:
    generators = _split(rng, batch)

    def add_noise(keep_z: float, x: AnyArray, i: int = 0) -> AnyArray:
        return x + keep_z * np.stack([generator.standard_normal(x.shape[1:], dtype=x.dtype) for generator in generators])

    return add_noise


def _call(model: Callable[[AnyArray, AnyArray], Any], x: AnyArray, t: AnyArray, names: str = MODEL) -> Any:
    return model(x.copy(), t.copy())  # NumPy does not count the changes of an array


def _copied(p: AnyArray, m: AnyArray, always: bool) -> AnyArray:
    return p.copy() if always or p is m or np.may_share_memory(p, m) else p


BACKEND = Backend(
    xp=np,
    owns=lambda x: isinstance(x, np.ndarray),
    carry=lambda dtype: np.promote_types(dtype, np.float32),
    cast=lambda x, dtype: x.astype(dtype, copy=False),
    full=_full,
    to_host=lambda x: np.asarray(x, dtype=np.float64),
    like=lambda values, x: np.asarray(values, dtype=x.dtype),
    combine=combine,
    vjp=None,
    prepared=_prepared,
    caller=lambda: _call,
    split=_split,
    noise=_noise,
    copy=np.ndarray.copy,
    copied=_copied,
    no_grad=nullcontext,
    each=lambda f, z: np.stack([f(v) for v in z]),
)
