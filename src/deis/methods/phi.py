"""The phi functions of exponential integrators."""

from __future__ import annotations

import math

import numpy as np

from ..arrays import Array

_TERMS = np.arange(1, 64)
_FAR = 12.0


def phi(k: int, z: Array) -> Array:
    """Return phi_0(z) = e^z, or phi_k(z) = integral of e^((1 - u) z) u^(k - 1) / (k - 1)! over u in [0, 1] (k > 0), to 1e-14 of it.

    Their closed forms (e^z - 1) / z, ... (Hochbruck & Ostermann, Acta Numerica 2010) cancel near 0. Where z is not large
    the series sum z^m / (m + k)! and, for z < 0, e^z sum (-z)^m / (m! (m + k) (k - 1)!) do not: their terms are positive. Beyond,
    the recurrence phi_k = (phi_(k-1) - 1 / (k - 1)!) / z does not either.
    """
    if k == 0:
        return np.exp(z)
    near = np.abs(np.where(np.abs(z) > _FAR, 0.0, z))[..., None]
    rising = 1 + np.cumprod(near / (_TERMS + k), axis=-1).sum(axis=-1)
    falling = 1 + (np.cumprod(near / _TERMS, axis=-1) * k / (_TERMS + k)).sum(axis=-1)
    value = np.where(z < 0, np.exp(np.minimum(z, 0.0)) * falling, rising) / math.factorial(k)
    far = np.abs(z) > _FAR
    if far.any():
        value[far] = (phi(k - 1, z[far]) - 1 / math.factorial(k - 1)) / z[far]
    return value
