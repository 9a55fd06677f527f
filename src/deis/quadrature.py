"""The one integral of the library: a polynomial through past predictions, integrated against the noise schedule.

For a step from time s to time t, with lambda = log rho, the weight of the prediction at node j is

    eps form :   alpha(t) * integral over [rho(s), rho(t)] of l_j(u) d(rho)
    data form:   sigma(t) * integral over [1/rho(s), 1/rho(t)] of l_j(u) d(1/rho)

(Zhang & Chen, arXiv 2204.13902, eq. 15, in these variables), where l_j are the Lagrange polynomials through the nodes in the
clock u. Where the step renews part of the noise, at the rate tau (arXiv 2309.05019, eq. 15), d(1/rho) becomes

    rho(t)^(tau^2) d(rho^-(1 + tau^2))

Gauss-Legendre quadrature in log rho, panel by panel, computes it to rounding from the values of the schedule alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from .arrays import Array, Indices
from .sde import Schedule

Clock = Callable[[Schedule, Array, Array], Array]
"""u(sde, t, log_rho), increasing in t."""
Form = Literal["eps", "data"]
Norm = Callable[[Array], Array]
"""c(t) > 0, the size of the predictions at time t."""

POINTS, WEIGHTS = np.polynomial.legendre.leggauss(32)
_PANEL = 3.0  # widest panel in log rho; wider ones lose digits at 32 points
_REACH = 40.0  # an integral that reaches rho = 0 or infinity is cut off here: e^-40 is below the rounding of the whole


def lagrange_integrals(
    sde: Schedule,
    clock: Clock,
    form: Form,
    node_t: Array,
    start: Array,
    end: Array,
    *,
    tau: float | Array = 0.0,
    norm: Norm | None = None,
) -> Array:
    """Integrate the Lagrange polynomials of each step's nodes over the step.

    Parameters
    ----------
    sde : Schedule
    clock : callable
        The variable u of the polynomials.
    form : {"eps", "data"}
    node_t : array of shape (steps, k)
        The times of the predictions, newest first.
    start, end : arrays of shape (steps,)
        The times s and t of each step: t < s towards the data, and t > s towards the noise.
    tau : float or array of shape (steps,)
        The rate at which the noise is renewed; only in the data form, and for steps towards the data.
    norm : callable, optional
        c(t): the polynomial goes through p_j / c(t_j), and is multiplied by c again (arXiv 2311.00157).

    Returns
    -------
    array of shape (steps, k)
        The weights C. Without norm each row sums to the weight of the constant: alpha(t) (rho(t) - rho(s)) in the eps form, and
        sigma(t) (1/rho(t) - 1/rho(s)) in the data form, or with tau alpha(t) (1 - (rho(t)/rho(s))^(1 + tau^2)).
    """
    power = np.ones(len(start)) if form == "eps" else np.broadcast_to(1 + np.square(tau), start.shape)
    from_, to = sde.log_rho(start), sde.log_rho(end)
    low, high = np.minimum(from_, to), np.maximum(from_, to)
    rises = to > from_
    if form == "eps":
        # At alpha = 0 the weight d(rho) concentrates at the end itself, and any far point can stand for it.
        high = np.minimum(high, np.maximum(low, 0.0) + 2 * _REACH)
        low = np.maximum(low, high - _REACH)
        scale = np.where(rises, sde.sigma(end), -sde.alpha(end) * np.exp(np.where(rises, 0.0, high)))
    else:  # likewise the weight d(1/rho) at sigma = 0
        low = np.maximum(low, np.minimum(high, 0.0) - 2 * _REACH)
        high = np.minimum(high, low + _REACH / power)
        scale = np.where(rises, -sde.sigma(end) * np.exp(-np.where(rises, low, 0.0)), sde.alpha(end))
    row, left, right = _panels(low, high, sde.kinks())
    half = (right - left)[:, None] / 2
    log_rho = (right + left)[:, None] / 2 + half * POINTS
    decay = high[row][:, None] - log_rho if form == "eps" else log_rho - low[row][:, None]
    rate = power[row][:, None]
    t = sde.t_of_log_rho(log_rho)
    basis = lagrange(clock(sde, t, log_rho), _node_clock(sde, clock, node_t)[row])
    if norm is not None:
        basis = basis * norm(t)[..., None] / norm(node_t)[row][:, None, :]
    panel = np.einsum("pq,pqj->pj", half * WEIGHTS * rate * np.exp(-rate * decay), basis)
    first = np.flatnonzero(np.diff(row, prepend=-1))
    return scale[:, None] * np.add.reduceat(panel, first, axis=0)


def _node_clock(sde: Schedule, clock: Clock, node_t: Array) -> Array:
    """Return u at the nodes, by way of log rho as at the quadrature points, so that the bias of the inverse cancels.

    It matters where nodes crowd: 1e-4 apart near t = 1 of the cosine schedule, a bias of 1e-16 in t is 1e-12 in the weights.
    """
    log_rho = sde.log_rho(node_t)
    finite = np.isfinite(log_rho)
    t = np.where(finite, sde.t_of_log_rho(np.where(finite, log_rho, 0.0)), node_t)
    return clock(sde, t, log_rho)


def _panels(low: Array, high: Array, kinks: Array) -> tuple[Indices, Array, Array]:
    """Cut the intervals [low_i, high_i] at the kinks and into panels of at most _PANEL; return the row and ends of each panel."""
    pieces = []
    for a, b in zip(low, high, strict=True):
        inside = kinks[np.searchsorted(kinks, a, side="right") : np.searchsorted(kinks, b, side="left")]
        cuts = np.concatenate([[a], inside, [b]])
        if len(inside) == 0:
            cuts = np.linspace(a, b, int(np.ceil((b - a) / _PANEL)) + 1)
        pieces.append(cuts)
    row = np.repeat(np.arange(len(low)), [len(cuts) - 1 for cuts in pieces])
    return row, np.concatenate([cuts[:-1] for cuts in pieces]), np.concatenate([cuts[1:] for cuts in pieces])


def lagrange(u: Array, node_u: Array) -> Array:
    """Evaluate the Lagrange polynomials of the nodes (rows, k) at u (rows, q); shape (rows, q, k)."""
    k = node_u.shape[1]
    basis = np.ones((*u.shape, k))
    for j in range(k):
        for m in range(k):
            if m != j:
                basis[..., j] *= (u - node_u[:, m : m + 1]) / (node_u[:, j : j + 1] - node_u[:, m : m + 1])
    return basis
