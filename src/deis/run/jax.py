"""The JAX executor: one `lax.scan` over the rows, so that compiling takes as long for a thousand steps as for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..backends.record import AddNoise
from ..machine import Combine, Row, advance, advance_group, guessed
from ..model.predictions import Level, Predictor
from ..plan import Plan
from .options import Options, Stepped, not_finite, observer


def run_jax(plan: Plan, predictor: Predictor, x_T: Array, options: Options) -> Array:
    """Run a plan on a JAX array, inside or outside of jit, vmap and grad; see `deis.sample`."""
    backend = predictor.backend
    dtype = backend.carry(x_T.dtype)
    observe = observer(plan, replace(options, trajectory=False), [])
    relay = None if observe is None else Relay(observe)
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
    base = x if options.base is None else options.base.astype(dtype)
    start = (x, base, (jnp.zeros_like(x),) * (plan.window - 1))
    if options.parallel:
        (x_0, _, _), out = _scan_groups(plan, predictor, options, start, relay, add_noise)
    else:
        (x_0, _, _), out = lax.scan(step, start, _scanned(plan, options.factors, dtype))
    if relay is not None:
        relay.finish(x_0)
    if options.check_finite:
        raise_unless_finite(out["finite"], plan)
    if options.trajectory:
        x_0 = jnp.concatenate([x[None], out["x"][np.flatnonzero(plan.accepts)]])
    return x_0.astype(x_T.dtype)


Carry = tuple[Array, Array, tuple[Array, ...]]
"""x, base and the history."""


def _scan_groups(
    plan: Plan, predictor: Predictor, options: Options, carry: Carry, relay: Relay | None, add_noise: AddNoise | None
) -> tuple[Carry, dict[str, Array]]:
    """Run a plan group by group, with one call for each; consecutive groups with the same pattern of calls share one scan."""
    scanned, outs = _scanned(plan, options.factors, carry[0].dtype), []
    for calls, stretch in groupby(plan.groups, lambda group: tuple(plan.calls[group.start : group.stop].tolist())):
        groups = list(stretch)
        rows = slice(groups[0].start, groups[-1].stop)
        parts = jax.tree.map(partial(_parted, rows, len(calls)), scanned)
        carry, out = lax.scan(partial(_group, predictor, options, calls, relay, add_noise), carry, parts)
        outs.append(jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), out))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)


def _parted(rows: slice, size: int, v: Array) -> Array:
    return v[rows].reshape(-1, size, *v.shape[1:])


def _group(
    predictor: Predictor,
    options: Options,
    calls: tuple[bool, ...],
    relay: Relay | None,
    add_noise: AddNoise | None,
    carry: Carry,
    scanned: tuple[Array, Row, Array],
) -> tuple[Carry, dict[str, Array]]:
    """Advance by a group of rows."""
    (x, base, history), (i, columns, factors) = carry, scanned
    rows = [Row(*(None if v is None else v[k] for v in columns))._replace(calls=called) for k, called in enumerate(calls)]
    finite = [jnp.array(True)] * len(rows)

    def predict(numbers: list[int], states: list[Array]) -> list[Array]:
        called = [rows[k] for k in numbers]
        t, alpha, sigma = (
            jnp.stack([jnp.full(len(x), v) for v in values]) for values in zip(*(row[:3] for row in called), strict=True)
        )
        outputs = predictor.outputs(states, t, (t.astype(x.dtype), alpha, sigma), called)
        for k, m in zip(numbers, outputs, strict=True):
            finite[k] = jnp.isfinite(m).all()
        return [predictor.prediction(m, state, factors[k]) for k, m, state in zip(numbers, outputs, states, strict=True)]

    noise = add_noise and partial(add_noise, i=i[-1])  # only the last row adds noise
    unknown = jnp.zeros_like(x)
    base, after, history = advance_group(rows, predict, base, x, history, predictor.backend.combine, unknown, noise)
    if relay is not None:
        for k, state in enumerate(after):
            jax.debug.callback(relay, i[k], state, ordered=True)
    kept = {"finite": jnp.stack(finite)} if options.check_finite else {}
    return (after[-1], base, history), kept | ({"x": jnp.stack(after)} if options.trajectory else {})


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


def scan_rows(
    plan: Plan,
    factors: Sequence[Any],
    predict: Callable[[Any, Array, Row, Array], Any],
    combine: Combine[Any],
    x: Any,
) -> Any:
    """Run a plan without noise in one scan, like `deis.machine.run_rows`, on states that are trees of arrays for `combine`.

    `predict(x, t, row, factors)` returns the prediction of a row that calls the network, with t of shape (batch,).
    """
    first = jax.tree.leaves(x)[0]

    def called(x: Any, row: Row, factors: Array) -> Any:
        return predict(x, jnp.full(len(first), row.t), row, factors)

    def without_call(x: Any, row: Row, factors: Array) -> Any:
        return guessed(row, x, combine)

    def step(carry: Any, scanned: tuple[Array, Row, Array]) -> tuple[Any, None]:
        (x, base, history), (_, row, factors) = carry, scanned
        p = called(x, row, factors) if plan.calls.all() else lax.cond(row.calls, called, without_call, x, row, factors)
        history = (p, *history)
        base, x = advance(row, base, history, combine)
        return (x, base, history[: plan.window - 1]), None

    start = (x, x, (jax.tree.map(jnp.zeros_like, x),) * (plan.window - 1))
    (x, _, _), _ = lax.scan(step, start, _scanned(plan, factors, first.dtype))
    return x


class Relay:
    """Calls a listener on the host, and raises its errors in the caller; XLA would raise an INTERNAL error, or none.

    Under jit nothing waits for the run, and the error is left to JAX.
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


def _scanned(plan: Plan, factors: Sequence[Any], dtype: Any) -> tuple[Array, Row, Array]:
    """Return what the scan runs over: the row numbers, all rows as one row of arrays, and the factors of their predictions."""
    n = len(plan.rows)
    columns = {name: jnp.asarray(getattr(plan, name)[:n], dtype) for name in Row._fields if name not in ("accepts", "calls", "t")}
    t = jnp.asarray(plan.t[:n], jnp.int32 if plan.discrete else dtype)
    row = Row(t=t, accepts=jnp.asarray(plan.accepts), calls=jnp.asarray(plan.calls), **columns)
    row = row if plan.stochastic else row._replace(keep_z=None)
    return jnp.arange(n), row, jnp.asarray(np.array(factors), dtype)


def raise_unless_finite(finite: Array, plan: Stepped) -> None:
    """Raise ValueError if the model's output was not finite in a row, which it names; under jit nobody can look."""
    if isinstance(finite, jax.core.Tracer):
        raise ValueError("check_finite=True cannot look at values under jit, vmap or grad; call it outside, or set jax_debug_nans")
    if not finite.all():
        raise not_finite(int(jnp.argmin(finite)), plan)
