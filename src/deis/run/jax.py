"""The JAX executor: one `lax.scan` over the rows, so that compiling takes as long for a thousand steps as for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..machine import Row, advance, guessed
from ..model.predictions import Level, Predictor
from ..plan import Plan
from .options import Options, not_finite, observer


def run_jax(plan: Plan, predictor: Predictor, x_T: Array, options: Options) -> Array:
    """Run a plan on a JAX array, inside or outside of jit, vmap and grad; see `deis.sample`."""
    backend = predictor.backend
    dtype = backend.carry(x_T.dtype)
    observe = observer(plan, replace(options, trajectory=False), [])
    relay = None if observe is None else _Relay(observe)
    add_noise = backend.noise(options.rng, len(x_T)) if plan.stochastic else None
    predict = _predict(plan, predictor, options)

    def step(carry: tuple[Array, Array, tuple[Array, ...]], scanned: tuple[Array, Row, Array]) -> tuple[Any, dict[str, Array]]:
        (x, base, history), (i, row, factors) = carry, scanned
        p, finite = predict(x, row, factors)
        history = (p, *history)
        base, x = advance(row, base, history, backend.combine, add_noise and partial(add_noise, i=i))
        if relay is not None:
            jax.debug.callback(relay, i, x, ordered=True)
        kept = ({"finite": finite} if options.check_finite else {}) | ({"x": x} if options.trajectory else {})
        return (x, base, history[: plan.window - 1]), kept

    x = x_T.astype(dtype)
    start = (x, x, (jnp.zeros_like(x),) * (plan.window - 1))
    (x_0, _, _), out = lax.scan(step, start, _scanned(plan, options, dtype))
    if relay is not None:
        relay.finish(x_0)
    if options.check_finite:
        _raise_unless(out["finite"], plan)
    if options.trajectory:
        x_0 = jnp.concatenate([x[None], out["x"][np.flatnonzero(plan.accepts)]])
    return x_0.astype(x_T.dtype)


def _predict(plan: Plan, predictor: Predictor, options: Options) -> Callable[[Array, Row, Array], tuple[Array, Array]]:
    """Return the prediction of a row at x, and whether the model's output was finite."""
    same: Any = options.factors[0] if len(set(options.factors)) == 1 else None  # such as (0, 1), where the output is the prediction

    def called(x: Array, row: Row, factors: Array) -> tuple[Array, Array]:
        m = predictor.output(x, jnp.full(len(x), row.t), Level(row.t, row.alpha, row.sigma))
        return predictor.prediction(m, x, factors if same is None else same), jnp.isfinite(m).all()

    def without_call(x: Array, row: Row, factors: Array) -> tuple[Array, Array]:
        return guessed(row, x, predictor.backend.combine), jnp.array(True)

    if plan.calls.all():
        return called
    return lambda x, row, factors: lax.cond(row.calls, called, without_call, x, row, factors)


class _Relay:
    """Tells a listener on the host, and brings what it raises back to the caller, whom XLA would give an INTERNAL error or none.

    Under jit nobody waits for the run, and the error is left to JAX.
    """

    def __init__(self, observe: Callable[[int, Any], None]) -> None:
        self.observe = observe
        self.traced = False
        self.error: BaseException | None = None

    def __call__(self, i: Any, x: Any) -> None:
        if self.error is not None:
            return
        try:
            self.observe(int(i), x)
        except BaseException as error:
            if self.traced:
                raise
            self.error = error

    def finish(self, x_0: Array) -> None:
        """Wait for the run, and raise what the listener raised."""
        self.traced = isinstance(x_0, jax.core.Tracer)
        if not self.traced:
            jax.effects_barrier()
        if self.error is not None:
            raise self.error


def _scanned(plan: Plan, options: Options, dtype: Any) -> tuple[Array, Row, Array]:
    """Return the numbers of the rows, the rows as one of arrays, and the factors of their predictions: what the scan runs over."""
    n = len(plan.rows)
    columns = {name: jnp.asarray(getattr(plan, name)[:n], dtype) for name in Row._fields if name not in ("accepts", "calls", "t")}
    t = jnp.asarray(plan.t[:n], jnp.int32 if plan.discrete else dtype)
    row = Row(t=t, accepts=jnp.asarray(plan.accepts), calls=jnp.asarray(plan.calls), **columns)
    row = row if plan.stochastic else row._replace(keep_z=None)
    return jnp.arange(n), row, jnp.asarray(np.array(options.factors), dtype)


def _raise_unless(finite: Array, plan: Plan) -> None:
    if isinstance(finite, jax.core.Tracer):
        raise ValueError("check_finite=True cannot look at values under jit, vmap or grad; call it outside, or set jax_debug_nans")
    if not finite.all():
        raise not_finite(int(jnp.argmin(finite)), plan)
