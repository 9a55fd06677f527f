"""Runge-Kutta of linear SDEs: exponential in t with matrices, and rhoRK where a scalar rho exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from ..arrays import Array
from ..methods.runge_kutta import TABLEAUX, ButcherTableau
from .sde import LinearSDE
from .weights import Columns, integrand, through

Step = tuple[Array, Array, Array, Array]
"""The times of the s stages and psi, constant and weights (s, s, *c) by stage, oldest prediction first: to each next time."""


@dataclass(frozen=True)
class Nested:
    """An exponential Runge-Kutta method of interpolation: nodes, and the stages through which each integral's polynomial goes.

    Attributes
    ----------
    c : tuple of s numbers
        The nodes: stage k lies at t_i + c_k (t_{i+1} - t_i).
    through : tuple of s tuples
        The stages of the polynomial that leads to stage k + 1, or in the last to the step's end.
    """

    c: tuple[float, ...]
    through: tuple[tuple[int, ...], ...]


NESTED = {
    1: Nested((0.0,), ((0,),)),
    2: Nested((0.0, 1 / 2), ((0,), (0, 1))),
    3: Nested((0.0, 1 / 3, 2 / 3), ((0,), (0, 1), (0, 1, 2))),
    5: Nested((0.0, 1 / 6, 1 / 3, 1 / 2, 1.0), ((0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 2, 3, 4))),
}
r"""By the number of stages; of one, two, three and five the order is 1, 2, 3 and 4.

A polynomial through q stages errs by h^(q + 1), and by the error of each stage times its weight. Stage 1 lies on an Euler step, of
error h^2. Its weight is h in stage 2, which errs by h^3. It is h^2 in a state through (0, 1, 2), with nodes at 0, 1/3 and 2/3 of
the way: 0 and 2/3 are Radau's, whose two weights are exact for parabolas, so that nothing is left for the third while Psi, G and K
rest. Hence the end of order 3 errs by h^4, and so does stage 3 of order 4, and stage 4 through (0, 2, 3). In the end of order 4,
through Simpson's nodes 0, 1/2 and 1, the weight of stage 2 is h^2 for the same reason, and it errs by h^5.

Where Psi, G and K rest, these are the Butcher tableaux of the midpoint ("2midpoint"), of Heun ("3heun") and one of five stages.
Exponential methods of stiff order 4 need five, too (Hochbruck & Ostermann, doi 10.1137/040611434).
"""
STAGES = {"trk2": 2, "trk3": 3, "trk4": 5}


def exponential_columns(sde: LinearSDE, ts: Array, K: str, counts: Sequence[int]) -> Columns:
    """Return exponential Runge-Kutta in t on the times ts, with so many stages in each step."""

    def step(start: float, end: float, stages: int) -> Step:
        table = NESTED[stages]
        t = _between(start, end, table.c)
        weights = np.zeros((stages, stages, *sde.shape))
        constant = np.zeros((stages, *sde.shape))
        target = np.append(t[1:], end)
        for k, nodes in enumerate(table.through):
            s, rate = integrand(sde, K, start, target[k])
            weights[k, list(nodes)] = through(t[list(nodes)], s, rate)
            constant[k] = rate.sum(axis=0)
        return t, sde.psi(target, start), constant, weights

    return _laid_out(sde, ts, counts, step)


def rho_columns(sde: LinearSDE, ts: Array, counts: Sequence[int], tableau: ButcherTableau) -> Columns:
    """Return rhoRK of a tableau on the times ts, with so many stages in each step; see `rho_of` for when there is a rho.

    Raises
    ------
    ValueError
        If there is no scalar rho.
    """
    rho, M = rho_of(sde)
    tables = {len(TABLEAUX[name].b): TABLEAUX[name] for name in ("1euler", "2heun", "3kutta", "4rk")} | {len(tableau.b): tableau}

    def step(start: float, end: float, stages: int) -> Step:
        table = tables[stages]
        low, high = rho(start), rho(end)
        t = np.array([_time_of(rho, start, end, low, low + c * (high - low), c) for c in table.c.tolist()])
        target = np.append(t[1:], end)
        weights = (high - low) * np.vstack([table.a[1:], table.b])
        one = (...,) + (None,) * len(sde.shape)
        carried = sde.algebra.times(sde.psi(target, 0.0), M)  # of a prediction at rho, to the target
        constant = weights.sum(axis=1)[one] * carried
        return t, sde.psi(target, start), constant, weights[one] * carried[:, None]

    return _laid_out(sde, ts, counts, step)


def rho_of(sde: LinearSDE) -> tuple[Callable[[float], float], Array]:
    r"""Return rho(t) and M with d(Psi(0, t) x)/d rho = M eps, for eps of R, where there are any.

    Since d(Psi(0, t) R_t)/dt = Psi(0, t) 1/2 G_t G_t^T R_t^-T, Psi(0, t) R_t is what rho is of numbers, sigma/alpha.
    It is a scalar times M, up to a constant, if all blocks or frequencies run alike.

    Raises
    ------
    ValueError
        If it is not.
    """
    ts = np.concatenate([[panel.start, (panel.start + panel.end) / 2] for panel in sde.path.panels[1:]] + [[sde.t_start]])
    found = _matrix_rho(sde, ts)
    M = (found[-1] - found[0]) / np.abs(found[-1] - found[0]).max()
    size = float((M * M).sum())

    def rho(t: float) -> float:
        return float((_matrix_rho(sde, np.array([t]))[0] * M).sum()) / size

    along = (found * M).sum(axis=tuple(range(1, found.ndim))) / size
    off = found - found[0] - (along - along[0]).reshape(-1, *(1,) * M.ndim) * M
    if np.abs(off).max() > 1e-9 * np.abs(found).max():
        raise ValueError(
            f"rhoRK integrates in a scalar rho, and {sde.name} has none: Psi(0, t) R_t turns, or its entries grow at rates of "
            "their own; use 'trk2', 'trk3' or 'trk4'"
        )
    return rho, M


def _matrix_rho(sde: LinearSDE, t: Array) -> Array:
    return sde.algebra.times(sde.psi(0.0, t), sde.K(t))


def _time_of(rho: Callable[[float], float], start: float, end: float, low: float, wanted: float, c: float) -> float:
    """Return the time between two at which rho is as wanted, to the rounding of rho; at c = 0 and 1 exactly these ends."""
    if c in (0.0, 1.0):
        return end if c else start
    return float(brentq(lambda t: rho(t) - wanted, start, end, xtol=1e-300, rtol=4 * np.finfo(float).eps))


def _between(start: float, end: float, c: Sequence[float]) -> Array:
    return np.array([end if part == 1 else start + part * (end - start) for part in c])


def _laid_out(sde: LinearSDE, ts: Array, counts: Sequence[int], step: Callable[[float, float, int], Step]) -> Columns:
    """Lay steps out with a row for each stage; the last of a step accepts the state."""
    window, parts = max(counts), []
    for start, end, stages in zip(ts[:-1].tolist(), ts[1:].tolist(), counts, strict=True):
        t, psi, constant, weights = step(start, end, stages)
        newest = np.zeros((stages, window, *sde.shape))
        for k in range(stages):
            newest[k, : k + 1] = weights[k, k::-1]
        parts.append((t, psi, constant, newest, np.arange(stages) == stages - 1))
    t, psi, constant, weights, accepts = (np.concatenate(column) for column in zip(*parts, strict=True))
    last = accepts.reshape(-1, 1, *(1,) * len(sde.shape))
    return Columns(np.append(t, ts[-1]), psi, constant, np.where(last, weights, 0.0), np.where(last, 0.0, weights), accepts)
