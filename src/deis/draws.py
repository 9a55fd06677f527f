"""Noise and random streams of numbered samples: sample i depends on the seed and on i alone, whatever the batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import AnyArray
from .foreign import is_jax, is_torch


def drawn(indices: range, shape: tuple[int, ...], sigma: float, seed: int) -> AnyArray:
    """Return the noise of the samples of these numbers, float32 of deviation sigma."""
    own = (np.random.default_rng((seed, i)) for i in indices)
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in own]) * np.float32(sigma)


def streams(x_T: Any, indices: range, seed: int) -> Any:
    """Return the random streams of the samples of these numbers, for a stochastic plan, in the framework of x_T."""
    if is_jax(x_T):
        import jax

        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.array(indices))
    if is_torch(x_T):
        import torch

        seeds = [int(np.random.SeedSequence((seed, i, 1)).generate_state(1)[0]) for i in indices]
        return [torch.Generator().manual_seed(each) for each in seeds]
    return [np.random.default_rng((seed, i, 1)) for i in indices]
