"""The JAX executor of plans with matrices or frequencies: one `lax.scan` over the rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..machine import Row, advance
from ..run.jax import Relay, raise_unless_finite
from ..run.options import Options, observer
from .plan import LinearPlan
from .reader import Reader, level_of
from .space import combine_of, flat_rows


def run_jax(plan: LinearPlan, reader: Reader, x_T: Array, options: Options) -> Array:
    """Run a plan on a JAX array, inside or outside of jit, vmap and grad; see `deis.sample_linear`."""
    space = reader.space
    dtype = space.backend.carry(x_T.dtype)
    batch = len(space.samples(x_T))
    combine = combine_of(plan, space.backend)
    rows, readings = (jax.tree.map(lambda *c: jnp.asarray(np.stack(c), dtype), *table) for table in (flat_rows(plan), reader.rows))
    observe = observer(plan, replace(options, trajectory=False), [])
    relay = None if observe is None else Relay(observe)

    def step(carry: tuple[Array, Array, tuple[Array, ...]], scanned: tuple[Array, Row, Any]) -> tuple[Any, dict[str, Array]]:
        (x, base, history), (i, row, reading) = carry, scanned
        p = reader(reading, x, jnp.full(batch, level_of(reading).t))
        history = (p, *history)
        base, x = advance(row, base, history, combine)
        if relay is not None:
            jax.debug.callback(relay, i, space.leave(x), ordered=True)
        kept = ({"finite": jnp.isfinite(p).all()} if options.check_finite else {}) | ({"x": x} if options.trajectory else {})
        return (x, base, history[: plan.window - 1]), kept

    x = space.enter(x_T.astype(dtype))
    (x, _, _), out = lax.scan(step, (x, x, (jnp.zeros_like(x),) * (plan.window - 1)), (jnp.arange(plan.nfe), rows, readings))
    if relay is not None:
        relay.finish(x)
    if options.check_finite:
        raise_unless_finite(out["finite"], plan)
    if not options.trajectory:
        return space.leave(x)
    return jnp.concatenate([x_T.astype(dtype)[None], space.leave(out["x"][np.flatnonzero(plan.accepts)])])
