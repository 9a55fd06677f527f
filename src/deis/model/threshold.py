"""Thresholding of the predicted data: the values of `deis.Denoiser(threshold=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arguments import number
from ..backends import backend_of


def static_threshold(limit: float = 1.0) -> Callable[[Any], Any]:
    """Return x_0 -> x_0 clipped to [-limit, limit].

    Raises
    ------
    ValueError
        Where limit is not positive.
    """
    limit = _limit(limit)
    return lambda x_0: x_0.clip(-limit, limit)


def _limit(limit: float) -> float:
    return number("limit", limit, above=0, hint="the data lie in [-limit, limit]")


def dynamic_threshold(quantile: float = 0.995, limit: float = 1.0, most: float | None = None) -> Callable[[Any], Any]:
    """Return the dynamic thresholding of Imagen (Saharia et al., arXiv 2205.11487, section 2.3), applied to each sample separately.

    With s the quantile of |x_0| over all dimensions of a sample, at least `limit` and at most `most`, x_0 is clipped to [-s, s]
    and multiplied by limit / s.

    Raises
    ------
    ValueError
        Where quantile lies outside [0, 1], limit is not positive, or most is less than limit.
    """
    quantile, limit = number("quantile", quantile, least=0, most=1), _limit(limit)
    most = None if most is None else number("most", most, least=limit, infinite=True, hint="it bounds what limit divides")

    def threshold(x_0: Any) -> Any:
        xp = backend_of(x_0).xp
        s = xp.quantile(abs(x_0).reshape(len(x_0), -1), quantile, 1).clip(limit, most)
        s = s.reshape(-1, *(1,) * (x_0.ndim - 1))
        return xp.minimum(xp.maximum(x_0, -s), s) * (limit / s)

    return threshold
