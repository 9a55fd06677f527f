"""ER-SDE-Solver: Taylor's polynomial of x_0 in rho, under a reverse diffusion that is known by its noise scale function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arguments import array, function, whole
from ..arrays import Array
from ..plan import Plan
from ..quadrature import POINTS, WEIGHTS
from ..sde import Schedule
from .clocks import CLOCKS
from .layout import Builder, multistep_plan
from .step import rises, step_degrees

Scaler = Callable[[Array], Array]
"""P(rho): x / (alpha P) is what a step keeps, so that rho is that of the probability flow, rho^2 that of the reverse diffusion."""


def scale_5(rho: Array) -> Array:
    """Return ER-SDE-5, rho (e^(rho^0.3) + 10)."""
    with np.errstate(over="ignore"):
        return rho * (np.exp(rho**0.3) + 10)


def er_sde(stages: int = 3, scaler: Scaler = scale_5) -> Builder:
    """Return the ER-SDE-Solver (Cui et al., arXiv 2309.06169, algorithms 1 to 3), in rho for every schedule.

    With P the scaler, r = P_t / P_s and x_0', x_0'' backward differences in rho of the predictions,

        x_t / alpha_t = r x_s / alpha_s + (1 - r) x_0 + A_1 x_0' + A_2 x_0'' + sqrt(rho_t^2 - (r rho_s)^2) z
        A_k = integral over [rho_t, rho_s] of (rho - rho_s)^(k-1) (P_t / P - 1) d(rho).

    The integrals are exact; ComfyUI has them as sums of 200 points, and is 1/200 of the differences off.

    Parameters
    ----------
    stages : {1, 2, 3}
        The number of predictions; its order is 1, 2 and again 2, as x_0' is of first order.
    scaler : callable
        P(rho), an array of rho > 0; P(rho) / rho must not fall.

    Raises
    ------
    ValueError
        Where stages is not 1, 2 or 3; and, when a plan is built, where P / rho falls.
    """
    if whole("stages", stages) > 3:
        raise ValueError(f"stages={stages!r} must be 1, 2 or 3")
    function("scaler", scaler, "rho")
    name = f"er_sde(stages={stages})" if scaler is scale_5 else f"er_sde(stages={stages}, custom scaler)"

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        if rises(ts):
            raise ValueError(f"{name!r} adds noise, and from data to noise the way is deterministic; use a method such as 'tab3'")
        alpha, sigma, rho = sde.alpha(ts), sde.sigma(ts), sde.rho(ts)
        scale = _scale(scaler, rho)
        shrink = scale[1:] / scale[:-1]
        psi = sigma[1:] / sigma[:-1] * shrink
        degrees = step_degrees(sde, ts, stages - 1, CLOCKS["log_rho"], "data")
        c_p = np.zeros((len(psi), degrees.max() + 1))
        c_p[:, 0] = alpha[1:] - psi * alpha[:-1]
        for i, degree in enumerate(degrees.tolist()):
            for k, difference in enumerate(_differences(rho[i - degree : i + 1][::-1]), 1):
                c_p[i, : degree + 1] += alpha[i + 1] * _integral(scaler, rho[i], rho[i + 1], k) * difference
        return multistep_plan(sde, ts, "data", psi, c_p, name, grid, keep_z=sigma[1:] * np.sqrt((1 - shrink) * (1 + shrink)))

    return build


def _scale(scaler: Scaler, rho: Array) -> Array:
    """Return P / rho at the levels of a grid, infinite and 0 at its infinite and zero ends."""
    inside = np.isfinite(rho) & (rho > 0)
    scale = np.where(rho > 0, np.inf, 0.0)
    scale[inside] = array("the result of scaler(rho)", scaler(rho[inside])) / rho[inside]
    if not ((scale[inside] > 0).all() and (np.diff(scale) <= 0).all()):
        raise ValueError(f"scaler(rho) / rho must be positive and not fall with rho: at rho={rho.tolist()} it is {scale.tolist()}")
    return scale


def _differences(rho: Array) -> list[Array]:
    """Return the weights, newest first, of x_0' and x_0'' by backward differences, as far as the nodes go."""
    if len(rho) == 1:
        return []
    first = -np.diff(np.eye(len(rho)), axis=0) / -np.diff(rho)[:, None]
    return [first[0]] + [2 * (first[0] - first[1]) / (rho[0] - rho[2]) for _ in rho[2:]]


def _integral(scaler: Scaler, start: float, end: float, k: int) -> float:
    """Return A_k, by Gauss-Legendre in log rho, panel by panel."""
    width = np.log(start / end)
    half = width / np.ceil(width) / 2
    log_rho = np.log(end) + half * (2 * np.arange(np.ceil(width))[:, None] + 1 + POINTS)
    rho = np.exp(log_rho)
    integrand = (rho - start) ** (k - 1) * (scaler(np.array([end])) / scaler(rho) - 1) * rho
    return float(half * (integrand * WEIGHTS).sum())
