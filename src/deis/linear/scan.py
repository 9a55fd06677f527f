"""The JAX executor of plans with matrices or frequencies: one `lax.scan` over the rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..machine import Row, advance
from .denoiser import Reader, level_of
from .plan import LinearPlan
from .space import combine_of, flat_rows


def run_jax(plan: LinearPlan, reader: Reader, x_T: Array, trajectory: bool) -> Array:
    """Run a plan on a JAX array, inside or outside of jit, vmap and grad; see `deis.sample_linear`."""
    space = reader.space
    dtype = space.backend.carry(x_T.dtype)
    batch = len(space.samples(x_T))
    combine = combine_of(plan, space.backend)
    rows, readings = (jax.tree.map(lambda *c: jnp.asarray(np.stack(c), dtype), *table) for table in (flat_rows(plan), reader.rows))

    def step(carry: tuple[Array, Array, tuple[Array, ...]], at: tuple[Row, Any]) -> tuple[Any, Array | None]:
        x, base, history = carry
        row, reading = at
        p = reader(reading, x, jnp.full(batch, level_of(reading).t))
        history = (p, *history)
        base, x = advance(row, base, history, combine)
        return (x, base, history[: plan.window - 1]), space.leave(x) if trajectory else None

    x = space.enter(x_T.astype(dtype))
    (x, _, _), states = lax.scan(step, (x, x, (jnp.zeros_like(x),) * (plan.window - 1)), (rows, readings))
    return space.leave(x) if states is None else jnp.concatenate([x_T.astype(dtype)[None], states])
