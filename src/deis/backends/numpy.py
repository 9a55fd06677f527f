"""NumPy: the specification of the other frameworks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..arrays import AnyArray
from .record import AddNoise, Backend
from .streams import streams


def combine(c_x: Any, x: AnyArray, c_p: Sequence[Any] | AnyArray, history: Sequence[AnyArray]) -> AnyArray:
    """Return c_x x + sum_j c_p[j] history[j] without the terms of weight 0, in a new array unless it is one of them."""
    total = None
    for c, p in ((c_x, x), *zip(c_p, history, strict=False)):
        if c != 0:
            term = p if c == 1 else c * p
            total = term if total is None else total + term
    return np.zeros_like(x) if total is None else total


def _full(x: AnyArray, t: Sequence[float], dtype: Any, whole: bool) -> AnyArray:
    return np.repeat(np.array(t, dtype=np.int64 if whole else dtype)[:, None], len(x), axis=1)


def _noise(rng: Any, batch: int) -> AddNoise:
    generators = streams(rng, batch, np.random.Generator, lambda generator: generator.spawn(batch))

    def add_noise(keep_z: float, x: AnyArray, i: int = 0) -> AnyArray:
        return x + keep_z * np.stack([generator.standard_normal(x.shape[1:], dtype=x.dtype) for generator in generators])

    return add_noise


def _copied(p: AnyArray, m: AnyArray, always: bool) -> AnyArray:
    return p.copy() if always or np.may_share_memory(p, m) else p


BACKEND = Backend(
    xp=np,
    owns=lambda x: isinstance(x, np.ndarray),
    carry=lambda dtype: np.promote_types(dtype, np.float32),
    cast=lambda x, dtype: x.astype(dtype, copy=False),
    full=_full,
    to_host=lambda x: np.asarray(x, dtype=np.float64),
    like=lambda values, x: np.asarray(values, dtype=x.dtype),
    combine=combine,
    noise=_noise,
    copied=_copied,
    no_grad=nullcontext,
)
