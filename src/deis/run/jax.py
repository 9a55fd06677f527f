"""The JAX executor: one `lax.scan` over the rows, so that compiling takes as long for a thousand steps as for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..model.predictions import Level, checked_output, convert, evaluate
from ..plan import Plan
from .options import Options, not_finite, observer


def run_jax(plan: Plan, model: Callable[[Array, Array], Array], x_T: Array, options: Options) -> Array:
    """Run a plan on a JAX array, inside or outside of jit, vmap and grad; see `deis.sample`."""
    carry_dtype = jnp.promote_types(x_T.dtype, jnp.float32)
    observe = observer(plan, replace(options, trajectory=False), [])
    relay = None if observe is None else _Relay(observe)
    keys = _keys(options.rng, len(x_T)) if plan.stochastic else None
    same = len(set(options.factors)) == 1  # such as (0, 1), where the output is the prediction

    def call(x: Array, row: dict[str, Array]) -> tuple[Array, Array]:
        x_in = x.astype(x_T.dtype)
        level = Level(row["t"], row["alpha"], row["sigma"])
        m = evaluate(model, x_in, jnp.full(len(x_T), row["t"]), level)
        checked_output("model(x, t)", m, x_in, plan.rows[0])  # the scan traces the model once, for all rows
        factors: Any = options.factors[0] if same else row["factors"]
        p = convert(m.astype(carry_dtype), x, factors, options.threshold)
        return p, jnp.isfinite(m).all()

    def step(carry: tuple[Array, Array, tuple[Array, ...]], row: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        x, base, history = carry
        if plan.calls.all():
            p, finite = call(x, row)
        else:
            p, finite = lax.cond(row["calls"], call, lambda x, row: (row["guess"] * x, jnp.array(True)), x, row)
        out = {"finite": finite} if options.check_finite else {}
        history = (p, *history)
        base = combine(row["keep_x"], base, row["keep_p"], history)
        if keys is not None:
            base = base + row["keep_z"] * _noise(keys, row["i"], x)
        x = combine(row["next_x"], base, row["next_p"], history)
        if relay is not None:
            jax.debug.callback(relay, row["i"], x, ordered=True)
        return (x, base, history[: plan.window - 1]), out | ({"x": x} if options.trajectory else {})

    x = x_T.astype(carry_dtype)
    start = (x, x, (jnp.zeros_like(x),) * (plan.window - 1))
    rows = _rows(plan, carry_dtype) | {"factors": jnp.asarray(np.array(options.factors), dtype=carry_dtype)}
    (x_0, _, _), out = lax.scan(step, start, rows)
    if relay is not None:
        relay.finish(x_0)
    if options.check_finite:
        _raise_unless(out["finite"], plan)
    if options.trajectory:
        x_0 = jnp.concatenate([x[None], out["x"][np.flatnonzero(plan.accepts)]])
    return x_0.astype(x_T.dtype)


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


def combine(c_x: Array, x: Array, c_p: Array, history: tuple[Array, ...]) -> Array:
    """Return c_x x + sum_j c_p[j] history[j]; elementwise, so that no accelerator lowers the precision of a product."""
    total = c_x * x
    for j, p in enumerate(history):
        total = total + c_p[j] * p
    return total


def _rows(plan: Plan, dtype: Any) -> dict[str, Array]:
    names = ("alpha", "sigma", "keep_x", "keep_p", "keep_z", "next_x", "next_p", "guess")
    rows = {name: jnp.asarray(getattr(plan, name)[: len(plan.rows)], dtype=dtype) for name in names}
    rows["t"] = jnp.asarray(plan.t[:-1], dtype=jnp.int32 if plan.discrete else dtype)
    rows["calls"] = jnp.asarray(plan.calls)
    rows["i"] = jnp.arange(len(plan.rows))
    return rows


def _keys(rng: Any, batch: int) -> Array:
    """Return one key a sample, from an array of them or from one key and the sample's number."""
    is_key = isinstance(rng, Array) and (jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.dtype == jnp.uint32)
    if not is_key:
        raise TypeError(f"rng must be a key, as jax.random.key(0), or an array of one key a sample, for this x_T, and is {rng!r}")
    keys = rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(rng)
    if keys.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(keys, i))(jnp.arange(batch))
    if keys.shape != (batch,):
        raise ValueError(f"rng must have one key a sample: its shape is {keys.shape} for {batch} samples")
    return keys


def _noise(keys: Array, i: Array, x: Array) -> Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype))(keys)


def _raise_unless(finite: Array, plan: Plan) -> None:
    if isinstance(finite, jax.core.Tracer):
        raise ValueError("check_finite=True cannot look at values under jit, vmap or grad; call it outside, or set jax_debug_nans")
    if not finite.all():
        raise not_finite(int(jnp.argmin(finite)), plan)
