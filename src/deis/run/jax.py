"""The JAX executor: one `lax.scan` over the rows, so that compiling takes as long for a thousand steps as for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..plan import Plan
from .options import Options, check_batch, check_output, not_finite, observer


def run_jax(plan: Plan, model: Callable[[Array, Array], Array], x_T: Array, options: Options) -> Array:
    """Run a plan on a JAX array, inside or outside of jit, vmap and grad; see `deis.sample`."""
    check_batch(x_T, jnp.issubdtype(x_T.dtype, jnp.floating))
    carry_dtype = jnp.promote_types(x_T.dtype, jnp.float32)
    convert = np.array(options.convert)
    converts = (convert != [0, 1]).any()
    observe = observer(plan, Options((), False, options.callback, options.progress, False), [])

    def step(carry: tuple[Array, Array, tuple[Array, ...]], row: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        x, base, history = carry
        x_in = x.astype(x_T.dtype)
        m = model(x_in, jnp.full(len(x_T), row["t"]))
        check_output(m, Array, x_in, 0, plan)  # the scan traces the model once, for all rows
        out = {"finite": jnp.isfinite(m).all()} if options.check_finite else {}
        p = m.astype(carry_dtype)
        history = (combine(row["convert"][0], x, row["convert"][1:], (p,)) if converts else p, *history)
        base = combine(row["keep_x"], base, row["keep_p"], history)
        x = combine(row["next_x"], base, row["next_p"], history)
        if observe is not None:
            jax.debug.callback(lambda i, x: observe(int(i), x), row["i"], x, ordered=True)
        return (x, base, history[: plan.window - 1]), out | ({"x": x} if options.trajectory else {})

    x = x_T.astype(carry_dtype)
    start = (x, x, (jnp.zeros_like(x),) * (plan.window - 1))
    (x_0, _, _), out = lax.scan(step, start, _rows(plan, convert, carry_dtype))
    if options.check_finite:
        _raise_unless(out["finite"], plan)
    if options.trajectory:
        accepts = np.flatnonzero([row.accepts for row in plan.rows])
        x_0 = jnp.concatenate([x[None], out["x"][accepts]])
    return x_0.astype(x_T.dtype)


def combine(c_x: Array, x: Array, c_p: Array, history: tuple[Array, ...]) -> Array:
    """Return c_x x + sum_j c_p[j] history[j]; elementwise, so that no accelerator lowers the precision of a product."""
    total = c_x * x
    for j, p in enumerate(history):
        total = total + c_p[j] * p
    return total


def _rows(plan: Plan, convert: np.ndarray, dtype: Any) -> dict[str, Array]:
    tables = {"keep_x": plan.keep_x, "keep_p": plan.keep_p, "next_x": plan.next_x, "next_p": plan.next_p, "convert": convert}
    rows = {name: jnp.asarray(table, dtype=dtype) for name, table in tables.items()}
    rows["t"] = jnp.asarray(plan.t[:-1], dtype=jnp.int32 if plan.discrete else dtype)
    rows["i"] = jnp.arange(plan.nfe)
    return rows


def _raise_unless(finite: Array, plan: Plan) -> None:
    if isinstance(finite, jax.core.Tracer):
        raise ValueError("check_finite=True cannot look at values under jit, vmap or grad; call it outside, or set jax_debug_nans")
    if not finite.all():
        raise not_finite(int(jnp.argmin(finite)), plan)
