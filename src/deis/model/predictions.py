"""What networks predict, as linear functions of each other: eps, x0, v, score and flow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..plan import Plan

Array = NDArray[np.float64]

PREDICTS = ("eps", "x0", "v", "score", "flow")


def conversion(plan: Plan, predicts: str) -> tuple[tuple[float, float], ...]:
    """Return, for each row, (c_x, c_m) with p = c_x x + c_m m: the network's output m turned into the plan's form.

    With x = alpha x_0 + sigma eps a network may predict eps; x0; v = alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512);
    the score -eps/sigma; or the velocity of flow matching, eps - x_0.

    Raises
    ------
    ValueError
        For an unknown `predicts`, and where the output does not determine p: eps says nothing of x_0 at alpha = 0, and x0
        nothing of eps at sigma = 0.
    """
    if predicts not in PREDICTS:
        raise ValueError(f"predicts={predicts!r} is unknown; the known ones are {', '.join(map(repr, PREDICTS))}")
    alpha, sigma = plan.alpha[:-1], plan.sigma[:-1]
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    # m = a x_0 + b eps
    a, b = {
        "eps": (zero, one),
        "x0": (one, zero),
        "v": (-sigma, alpha),
        "score": (zero, -1 / np.where(sigma > 0, sigma, np.inf)),
        "flow": (-one, one),
    }[predicts]
    # Solve the two equations for eps or x_0.
    determinant = alpha * b - sigma * a
    if (determinant == 0).any():
        i = int(np.argmax(determinant == 0))
        raise ValueError(
            f"predicts={predicts!r} does not determine {'eps' if plan.form == 'eps' else 'x_0'} at t={plan.t[i]!r}, where "
            f"alpha={alpha[i]!r} and sigma={sigma[i]!r}; start or end elsewhere, or use a network that predicts v or flow"
        )
    c_x, c_m = (-a / determinant, alpha / determinant) if plan.form == "eps" else (b / determinant, -sigma / determinant)
    return tuple(zip((c_x + 0.0).tolist(), c_m.tolist(), strict=True))
