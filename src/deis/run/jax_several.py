"""A plan for each sample in JAX: one `lax.scan` over rounds, in which a sample that has nothing to do stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..machine import Row, advance, guessed
from ..model.predictions import Levels, Predictor
from ..plan import Plan
from .jax import Carry
from .options import not_finite
from .plans import KEEP_Z, numbers_of, rounds_of, row_of


def run_jax_several(plans: Sequence[Plan], predictor: Predictor, predicts: str, x_T: Array, rng: Any, check_finite: bool) -> Array:
    """Run a plan for each sample, inside or outside of jit, vmap and grad; each round evaluates the whole batch."""
    backend, window = predictor.backend, max(plan.window for plan in plans)
    dtype, stochastic = backend.carry(x_T.dtype), any(plan.stochastic for plan in plans)
    rows, moves, calls = rounds_of(plans)
    add_noise = backend.noise(rng, len(x_T)) if stochastic else None
    combine = backend.combine

    def predicted(x: Array, row: Row, factors: Any, t: Array) -> tuple[Array, Array]:
        m = predictor.output(x, t, Levels(row.t, row.alpha, row.sigma))
        return predictor.prediction(m, x, factors), jnp.isfinite(m).reshape(len(m), -1).all(axis=1)

    def without_call(x: Array, row: Row, factors: Any, t: Array) -> tuple[Array, Array]:
        return guessed(row, x, combine), jnp.ones(len(x), dtype=bool)

    def step(carry: Carry, scanned: tuple[Array, ...]) -> tuple[Carry, Array]:
        (x, base, history), (numbers, i, moves, t, called) = carry, scanned
        shape = (-1, *(1,) * (x.ndim - 1))
        row, factors = row_of(numbers.reshape(len(numbers), *numbers.shape[1:], *shape[1:]), window)
        row = row if stochastic else row._replace(keep_z=None)
        if calls.all():
            p, finite = predicted(x, row, factors, t)
        else:
            p, finite = lax.cond(called, predicted, without_call, x, row, factors, t)
        noised = None if add_noise is None else lambda keep_z, base: add_noise(keep_z, base, i=i)
        new_base, new_x = advance(row, base, (p, *history), combine, noised)
        mask = moves.reshape(shape)
        past = tuple(jnp.where(mask, new, old) for new, old in zip((p, *history), history, strict=False))
        return (jnp.where(mask, new_x, x), jnp.where(mask, new_base, base), past), finite | ~moves

    x = x_T.astype(dtype)
    (x_0, _, _), finite = lax.scan(
        step, (x, x, (jnp.zeros_like(x),) * (window - 1)), _scanned(plans, predictor, predicts, rows, moves, calls, dtype)
    )
    if check_finite:
        _raise_unless(finite, plans, rows)
    return x_0.astype(x_T.dtype)


def _scanned(
    plans: Sequence[Plan], predictor: Predictor, predicts: str, rows: Any, moves: Any, calls: Any, dtype: Any
) -> tuple[Array, ...]:
    """Return what the scan runs over: the numbers of each round, shape (columns, batch), the rows, which samples move, t, calls."""
    of = (predicts, predictor.threshold is not None, max(plan.window for plan in plans))
    numbers = np.stack([plan.once(numbers_of, *of)[rows[:, b]] for b, plan in enumerate(plans)], axis=2)
    numbers[:, KEEP_Z] *= moves
    whole = all(plan.discrete for plan in plans)
    t = jnp.asarray(numbers[:, 0], jnp.int32 if whole else dtype)
    return jnp.asarray(numbers, dtype), jnp.asarray(rows), jnp.asarray(moves), t, jnp.asarray(calls)


def _raise_unless(finite: Array, plans: Sequence[Plan], rows: Any) -> None:
    if isinstance(finite, jax.core.Tracer):
        raise ValueError("check_finite=True cannot look at values under jit, vmap or grad; call it outside, or set jax_debug_nans")
    if not finite.all():
        place, sample = (int(i) for i in np.argwhere(~np.asarray(finite))[0])
        raise not_finite(int(rows[place, sample]), plans[sample], sample)
