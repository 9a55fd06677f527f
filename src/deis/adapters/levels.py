"""The noise schedule of a network that was trained at whole times, with the data themselves as its last time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..sde import VPSDE

FLOAT32 = 2e-3
"""The relative tolerance of noise levels that were computed as sqrt(1 - abar) in float32."""


def with_data(alphas_cumprod: ArrayLike) -> VPSDE:
    """Return `VPSDE.discrete` with t = training time + 1, and t = 0 for the data, where alpha = 1 and sigma = 0.

    alphas_cumprod of 0, a terminal signal-to-noise ratio of 0, becomes 2^-24, as in diffusers: the eps form would have no meaning
    there.
    """
    return VPSDE.discrete(np.concatenate([[1.0], np.maximum(np.asarray(alphas_cumprod, dtype=np.float64), 2.0**-24)]))
