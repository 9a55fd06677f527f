"""Noise to compare from, and random numbers: sample i depends on the seed and on i alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import AnyArray
from ..backends import like
from ..foreign import is_jax, is_torch
from .weights import networks

FIT = 10**6
"""The number of the first noise that plans are fitted to: none that samples are drawn from."""


def drawn(indices: range, shape: tuple[int, ...], sigma: float, seed: int) -> AnyArray:
    """Return the noise of the samples of these numbers, float32 of deviation sigma, as `deis sample` draws it."""
    streams = (np.random.default_rng((seed, i)) for i in indices)
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]) * np.float32(sigma)


def noise_for(model: Any, num: int, sigma: float, seed: int) -> Any:
    """Return noise for a model that tells the shape of its samples, in torch, on the device of its weights.

    Raises
    ------
    ValueError
        Where the model does not tell.
    """
    shape = getattr(model, "shape", None)
    if shape is None or None in shape:
        raise ValueError(f"samples={num} is a number, and the model does not tell the shape of its samples; give the noise itself")
    import torch

    found = next((net for net in networks(model) if isinstance(net, torch.nn.Module)), None)
    weight = None if found is None else next(found.parameters(), None)
    x_T = torch.from_numpy(drawn(range(num), shape, sigma, seed))
    return x_T if weight is None else x_T.to(weight.device, weight.dtype)


def fresh_noise(x_T: Any, num: int, sigma: float, seed: int) -> Any:
    """Return other noise of the kind of x_T, for fitting."""
    return like(drawn(range(FIT, FIT + num), tuple(x_T.shape[1:]), sigma, seed), x_T)


def streams(x_T: Any, seed: int, first: int, last: int) -> Any:
    """Return the random streams of the samples first ... last - 1 of a stochastic plan, in the framework of x_T."""
    if is_jax(x_T):
        import jax

        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.arange(first, last))
    if is_torch(x_T):
        import torch

        seeds = [int(np.random.SeedSequence((seed, i, 1)).generate_state(1)[0]) for i in range(first, last)]
        return [torch.Generator().manual_seed(each) for each in seeds]
    return [np.random.default_rng((seed, i, 1)) for i in range(first, last)]
