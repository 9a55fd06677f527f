"""What networks predict, as linear functions of each other: eps, x0, v, score and flow."""

from __future__ import annotations

from collections.abc import Callable

from ..plan import Plan, Row

# predicts -> (k, a, b) of k m = a x_0 + b eps, at (alpha, sigma)
_OUTPUTS: dict[str, Callable[[float, float], tuple[float, float, float]]] = {
    "eps": lambda alpha, sigma: (1.0, 0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 1.0, 0.0),
    "v": lambda alpha, sigma: (1.0, -sigma, alpha),
    "score": lambda alpha, sigma: (-sigma, 0.0, 1.0),
    "flow": lambda alpha, sigma: (1.0, -1.0, 1.0),
}


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
    if predicts not in _OUTPUTS:
        raise ValueError(f"predicts={predicts!r} is unknown; the known ones are {', '.join(map(repr, _OUTPUTS))}")
    return tuple(_solve(row, plan.form, predicts) for row in plan.rows)


def _solve(row: Row, form: str, predicts: str) -> tuple[float, float]:
    alpha, sigma = row.alpha, row.sigma
    if predicts == ("eps" if form == "eps" else "x0"):
        return 0.0, 1.0
    # x = alpha x_0 + sigma eps and k m = a x_0 + b eps, solved for eps or x_0.
    k, a, b = _OUTPUTS[predicts](alpha, sigma)
    determinant = alpha * b - sigma * a
    if determinant == 0 or k == 0:
        raise ValueError(
            f"predicts={predicts!r} does not determine {'eps' if form == 'eps' else 'x_0'} at t={row.t!r}, where alpha={alpha!r} "
            f"and sigma={sigma!r}; start or end elsewhere, or use a network that predicts v or flow"
        )
    if form == "eps":
        return -a / determinant, k * alpha / determinant
    return b / determinant, -k * sigma / determinant
