"""The noise schedule of a network that was trained at integer timesteps, with the clean data as its last time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..sde import VPSDE

FLOAT32 = 2e-3
"""The relative tolerance of noise levels that were computed as sqrt(1 - abar) in float32."""


def with_data(alphas_cumprod: ArrayLike) -> VPSDE:
    """Return `VPSDE.discrete` with t = training time + 1, and t = 0 for the data, where alpha = 1 and sigma = 0."""
    return VPSDE.discrete(np.concatenate([[1.0], np.asarray(alphas_cumprod, dtype=np.float64)]))
