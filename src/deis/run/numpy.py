"""The NumPy executor: the specification of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..machine import run_rows
from ..model.predictions import checked_output, convert, evaluate
from ..plan import Plan
from .options import Options, not_finite, observer, streams

Array = NDArray[Any]


def run_numpy(plan: Plan, model: Callable[[Array, Array], Array], x_T: Array, options: Options) -> Array:
    """Run a plan on a NumPy array; see `deis.sample`."""
    carry = np.promote_types(x_T.dtype, np.float32)
    times = [np.full(len(x_T), row.t, dtype=np.int64 if plan.discrete else carry) for row in plan.rows]

    def predict(i: int, x: Array) -> Array:
        row = plan.rows[i]
        if not row.calls:
            return x * row.guess
        x_in = x.astype(x_T.dtype, copy=False)
        m = evaluate(model, x_in, times[i], row)
        checked_output("model(x, t)", m, x_in, row)
        if options.check_finite and not np.isfinite(m).all():
            raise not_finite(i, plan)
        p = convert(m.astype(carry, copy=False), x, options.factors[i], options.threshold)
        # m may lie in a buffer that the model writes again, and so may what a threshold returns.
        return p.copy() if options.threshold is not None or np.may_share_memory(p, m) else p

    keep = [x_T.astype(carry, copy=False)]
    noise = _add_noise(options.rng, len(x_T)) if plan.stochastic else None
    x = run_rows(plan, predict, combine, keep[0], observer(plan, options, keep), noise)
    return (np.stack(keep) if options.trajectory else x).astype(x_T.dtype)


def combine(c_x: float, x: Array, c_p: tuple[float, ...], history: tuple[Array, ...]) -> Array:
    """Return c_x x + sum_j c_p[j] history[j] in a new array, without the terms of weight 0."""
    total = None if c_x == 0 else x if c_x == 1 else c_x * x
    for c, p in zip(c_p, history, strict=False):
        if c != 0:
            term = p if c == 1 else c * p
            total = term if total is None else total + term
    return np.zeros_like(x) if total is None else total


def _add_noise(rng: object, batch: int) -> Callable[[float, Array], Array]:
    generators = streams(rng, batch, np.random.Generator, lambda generator: generator.spawn(batch))

    def add_noise(keep_z: float, x: Array) -> Array:
        z = [generator.standard_normal(x.shape[1:], dtype=x.dtype) for generator in generators]
        return x + keep_z * np.stack(z)

    return add_noise
