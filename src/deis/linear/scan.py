"""The JAX executor of plans with matrices or frequencies: one `lax.scan` over the rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..machine import Row, advance
from ..model.predictions import Level, Predictor
from .plan import LinearPlan
from .space import Space, combine_of, flat_rows


def run_jax(plan: LinearPlan, predictor: Predictor, space: Space, x_T: Array, trajectory: bool) -> Array:
    """Run a plan on a JAX array, inside or outside of jit, vmap and grad; see `deis.sample_linear`."""
    dtype = space.backend.carry(x_T.dtype)
    batch = len(space.samples(x_T))
    combine = combine_of(plan, space.backend)
    rows = jax.tree.map(lambda *c: jnp.asarray(np.stack(c), dtype), *flat_rows(plan))

    def step(carry: tuple[Array, Array, tuple[Array, ...]], row: Row) -> tuple[Any, Array | None]:
        x, base, history = carry
        p = space.prediction(predictor, x, jnp.full(batch, row.t), Level(row.t, row.alpha, row.sigma))
        history = (p, *history)
        base, x = advance(row, base, history, combine)
        return (x, base, history[: plan.window - 1]), space.leave(x) if trajectory else None

    x = space.enter(x_T.astype(dtype))
    (x, _, _), states = lax.scan(step, (x, x, (jnp.zeros_like(x),) * (plan.window - 1)), rows)
    return space.leave(x) if states is None else jnp.concatenate([x_T.astype(dtype)[None], states])
