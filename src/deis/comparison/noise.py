"""Noise to compare from, and other noise to fit plans to."""

from __future__ import annotations

from typing import Any

from ..arguments import is_torch_module
from ..backends import like
from ..draws import drawn
from ..model.weights import networks

FIT = 10**6
"""The number of the first noise that plans are fitted to: none that samples are drawn from."""


def noise_for(model: Any, num: int, sigma: float, seed: int) -> Any:
    """Return noise for a model that tells the shape of its samples, in its framework, and on the device of torch's weights.

    Raises
    ------
    ValueError
        Where the model does not tell.
    """
    shape = getattr(model, "shape", None)
    if shape is None or None in shape:
        raise ValueError(f"samples={num} is a number, and the model does not tell the shape of its samples; give the noise itself")
    found, x_T = next(networks(model), None), drawn(range(num), shape, sigma, seed)
    if found is not None and not is_torch_module(found):
        import jax

        return jax.numpy.asarray(x_T)
    import torch

    weight = None if found is None else next(found.parameters(), None)
    return torch.from_numpy(x_T) if weight is None else torch.from_numpy(x_T).to(weight.device, weight.dtype)


def fresh_noise(x_T: Any, num: int, sigma: float, seed: int) -> Any:
    """Return other noise of the kind of x_T, for fitting."""
    return like(drawn(range(FIT, FIT + num), tuple(x_T.shape[1:]), sigma, seed), x_T)
