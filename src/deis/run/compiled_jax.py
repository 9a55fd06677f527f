"""The loop of a plan in JAX as one executable, which takes the weights of its model as arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..backends.jax import BACKEND
from .loop import Loop


def capture_jax(loop: Loop, x: Array, inputs: Any, mode: str, donate: bool) -> Callable[..., Array]:
    """Return run(x_T, rng, inputs) -> x_0."""
    stochastic, batch, inputs = loop.plan.stochastic, len(x), jax.tree.map(jnp.asarray, inputs)
    program = loop if mode == "eager" else _compiled(loop, (x, _keys(jax.random.key(0), batch, stochastic), inputs), donate)

    def run(x_T: Array, rng: Any, given: Any) -> Array:
        if x_T.is_deleted():
            raise ValueError(
                "x_T was donated to an earlier call, whose result took its memory; give a new one, or compile with donate=False"
            )
        values = inputs if given is None else jax.tree.map(jnp.asarray, given)
        _check_inputs(values, inputs)
        return program(x_T, _keys(rng, batch, stochastic), values)

    return run


def _keys(rng: Any, batch: int, stochastic: bool) -> Array | None:
    return BACKEND.split(rng, batch) if stochastic else None


def _compiled(loop: Loop, example: tuple[Any, ...], donate: bool) -> Callable[..., Array]:
    # jit writes the arrays that a function closes over into the executable; as arguments they stay where they are.
    closed = jax.make_jaxpr(loop)(*example)
    weights = [jnp.asarray(value) for value in closed.consts]

    def whole(weights: list[Array], x: Array, keys: Any, inputs: Any) -> Array:
        (x_0,) = jax.core.eval_jaxpr(closed.jaxpr, weights, *jax.tree.leaves((x, keys, inputs)))
        return x_0

    executable = jax.jit(whole, donate_argnums=(1,) if donate else ()).lower(weights, *example).compile()
    return lambda *values: executable(weights, *values)


def _check_inputs(found: Any, own: Any) -> None:
    """Raise ValueError unless inputs have the structure, shapes and dtypes of those that were compiled for."""
    told = [str(jax.tree.map(jax.typeof, tree)) for tree in (found, own)]
    if told[0] != told[1]:
        raise ValueError(f"inputs are {told[0]}, and {told[1]} were compiled for; compile again for others")
