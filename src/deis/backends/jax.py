"""JAX: arrays never change, so that nothing is copied; and a key and the number of a row make its noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..foreign import is_jax
from .record import MODEL, AddNoise, Backend


def combine(c_x: Any, x: Array, c_p: Sequence[Any] | Array, history: Sequence[Array]) -> Array:
    """Return c_x x + sum_j c_p[j] history[j]; elementwise, so that no accelerator lowers the precision of a product."""
    total = c_x * x
    for j, p in enumerate(history[: len(c_p)]):
        total = total + c_p[j] * p
    return total


def _full(x: Array, t: Any, dtype: Any, whole: bool) -> Array:
    return jnp.repeat(jnp.asarray(t, dtype=jnp.int32 if whole else dtype)[:, None], len(x), axis=1)


def _vjp(f: Callable[..., Array], x: Array, *others: Any) -> tuple[Array, Callable[[Array], Array]]:
    m, pull = jax.vjp(lambda x: f(x, *others), x)
    return m, lambda u: pull(u.astype(m.dtype))[0]


def _noise(rng: Any, batch: int) -> AddNoise:
    keys = _keys(rng, batch)

    def add_noise(keep_z: Any, x: Array, i: Any = 0) -> Array:
        rows = jnp.broadcast_to(jnp.asarray(i), (batch,))
        return x + keep_z * jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype))(keys, rows)

    return add_noise


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


BACKEND = Backend(
    xp=jnp,
    owns=is_jax,
    carry=lambda dtype: jnp.promote_types(dtype, jnp.float32),
    cast=lambda x, dtype: x.astype(dtype),
    full=_full,
    to_host=lambda x: np.asarray(x, dtype=np.float64),
    like=lambda values, x: jnp.asarray(values, dtype=x.dtype),
    combine=combine,
    vjp=_vjp,
    prepared=lambda plan, dtype: (plan.rows, combine),
    caller=lambda: lambda model, x, t, names=MODEL: model(x, t),
    split=_keys,
    noise=_noise,
    copy=lambda x: x,
    copied=lambda p, m, always: p,
    no_grad=nullcontext,
    each=lambda f, z: jax.vmap(f)(z),
)
