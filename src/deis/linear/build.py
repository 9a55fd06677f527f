"""Plans of matrix-valued SDEs: exponential Adams in t, of any order, with or without a corrector."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..arguments import array, number, one_of, shown, whole
from ..arrays import Array
from ..methods.layout import corrected
from ..quadrature import lagrange
from .algebra import Algebra
from .plan import PREDICTS, LinearPlan
from .sde import ROOTS, LinearSDE, check_sde

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(20)
AVAILABLE = (
    'of a linear SDE there are the methods "tab<q>", q = 0, 1, 2, ..., with corrector= and K=, on grids even in a power of t or at '
    "your own times ts=; iPNDM, single-step and stochastic methods, tau=, afs= and grids in rho need a scalar schedule and "
    "deis.make_plan"
)


def make_linear_plan(
    sde: LinearSDE,
    method: str = "tab2",
    num_step: int | None = None,
    ts_order: float = 2.0,
    *,
    ts: ArrayLike | None = None,
    K: str = "R",
    predicts: str | None = None,
    corrector: int | None = None,
    direction: str = "decode",
) -> LinearPlan:
    r"""Build a plan of exponential Adams from a linear SDE and a time grid (arXiv 2204.13902, eq. 14, with matrices).

    With p_i = eps at t_i and the Lagrange polynomials l_j in t through the newest predictions::

        x_{i+1} = Psi(t_{i+1}, t_i) x_i + sum_j C_ij p_{i-j}
        C_ij    = integral from t_i to t_{i+1} of Psi(t_{i+1}, s) 1/2 G_s G_s^T K_s^-T l_j(s) ds

    Parameters
    ----------
    sde : LinearSDE
    method : str
        "tab<q>", of degree q and order q + 1; the first steps use the predictions there are. "tab0" with K="R" is gDDIM's step.
    num_step : int, optional
        The number of steps, each of one evaluation; 10 where neither it nor ts is given.
    ts_order : float
        The times are even in t^(1/ts_order).
    ts : array of shape (num_step + 1,), optional
        Your own times instead, decreasing, or increasing to encode.
    K : {"R", "L"}
        The root of Sigma in whose eps the polynomials are; see `LinearSDE`.
    predicts : {"R", "L", "score"}, optional
        What the network returns: eps of this root, or the score; by default eps of K. Another than K is turned into K's within the
        table, at no cost.
    corrector : int, optional
        Integrate each step again, when its end has been evaluated, through that prediction and `corrector` earlier ones, at no
        further evaluation. The last step has none.
    direction : {"decode", "encode"}
        From noise to data, or on the same grid the other way.

    Raises
    ------
    TypeError
        If sde is no linear SDE.
    ValueError
        For an unknown method, K or direction, numbers out of range, or times that leave the SDE's; it says what there is.
    """
    check_sde(sde)
    degree = _degree(method)
    one_of("K", K, ROOTS, f"; {AVAILABLE}")
    told = one_of("predicts", K if predicts is None else predicts, PREDICTS)
    corrector = None if corrector is None else whole("corrector", corrector, 0)
    rising = one_of("direction", direction, ("decode", "encode")) == "encode"
    times, grid = _times(sde, num_step, ts_order, ts, rising)
    n, algebra = len(times) - 1, sde.algebra
    psi = sde.psi(times[1:], times[:-1])
    wanted = [(0, False), (degree, False)] + ([] if corrector is None else [(corrector, True)])
    constant, keep_p, *ahead = adams_blocks(sde, times, K, wanted)
    next_p = np.zeros_like(keep_p)
    if ahead:
        keep_p, next_p = corrected(psi, keep_p, ahead[0], algebra.times)
    roots = sde.K(times, K)
    to_eps, unit = _conversion(sde, times, roots, told, K)
    for j in range(keep_p.shape[1]):
        for weights in (keep_p, next_p):
            weights[j:, j] = algebra.times(weights[j:, j], to_eps[: n - j])
    label = f"{method} in {K}" + ("" if corrector is None else f" with corrector {corrector}")
    sigma = roots if K == "R" else _carried(algebra, psi, constant[:, 0], roots[0])
    return LinearPlan(times, sde.psi(times, 0.0), sigma, unit, psi, keep_p, next_p, sde.basis, told, label, grid, sde.name)


def adams_blocks(sde: LinearSDE, ts: Array, K: str, wanted: Sequence[tuple[int, bool]]) -> list[Array]:
    """Return for each (degree, ahead) wanted the weights C_ij, shape (n, W, *c), newest node first.

    The nodes of step i are t_i, t_{i-1}, ..., and with `ahead` t_{i+1}, t_i, ..., as many as the degree asks and there are.
    """
    n = len(ts) - 1
    out = [np.zeros((n, min(degree, n - 1 + int(ahead)) + 1, *sde.shape)) for degree, ahead in wanted]
    for i in range(n):
        s, rate = _integrand(sde, K, ts[i], ts[i + 1])
        for weights, (degree, ahead) in zip(out, wanted, strict=True):
            used = min(degree, i + int(ahead)) + 1
            basis = lagrange(s[None], ts[i + int(ahead) - np.arange(used)][None])[0]
            weights[i, :used] = np.tensordot(basis.T, rate, 1)
    return out


def _integrand(sde: LinearSDE, K: str, start: float, end: float) -> tuple[Array, Array]:
    """Return the Gauss-Legendre points of a step, in each panel of the SDE's path, and Psi 1/2 G G^T K^-T ds at them."""
    cuts = sde.path.cuts(min(start, end), max(start, end))
    half = np.diff(cuts)[:, None] / 2
    s = ((cuts[:-1] + cuts[1:])[:, None] / 2 + half * _POINTS).ravel()
    weights = (half * _WEIGHTS).ravel() * np.sign(end - start)
    algebra = sde.algebra
    rate = algebra.over(algebra.times(sde.psi(end, s), sde.path.values("half_noise", s)), sde.K(s, K))
    return s, weights.reshape(-1, *(1,) * len(sde.shape)) * rate


def _conversion(sde: LinearSDE, ts: Array, roots: Array, predicts: str, K: str) -> tuple[Array, Array]:
    """Return by which the network's output is to be multiplied for eps of K, and the output where that is 1, at each time."""
    algebra = sde.algebra
    if predicts == K:
        one = np.broadcast_to(algebra.one(sde.shape), roots.shape)
        return one, one
    # eps = -K^T score, for either root
    own = -algebra.transpose(algebra.inverse(sde.K(ts, predicts))) if predicts != "score" else algebra.one(sde.shape)
    to_eps = algebra.times(-algebra.transpose(roots), np.broadcast_to(own, roots.shape))
    return to_eps, algebra.inverse(to_eps)


def _carried(algebra: Algebra, psi: Array, constant: Array, start: Array) -> Array:
    """Return what becomes of a constant eps, from its entry at the start on."""
    states = [start]
    for step, weight in zip(psi, constant, strict=True):
        states.append(algebra.times(step, states[-1]) + weight)
    return np.stack(states)


def _degree(method: str) -> int:
    found = re.fullmatch(r"tab(\d{1,2})", method) if isinstance(method, str) else None
    if found is None:
        raise ValueError(f"method={shown(method)} is not among those for matrices; {AVAILABLE}")
    return int(found[1])


def _times(sde: LinearSDE, num_step: int | None, ts_order: float, ts: ArrayLike | None, rising: bool) -> tuple[Array, str]:
    if ts is None:
        steps = whole("num_step", 10 if num_step is None else num_step)
        power = number("ts_order", ts_order, above=0, most=100)
        root = np.array([sde.t_start, sde.t_end]) ** (1 / power)
        found = np.linspace(root[0], root[1], steps + 1) ** power
        found[0], found[-1] = sde.t_start, sde.t_end  # the powers may miss the ends by a rounding
        return (found[::-1].copy() if rising else found), f"t grid of power {power:g}"
    found = array("ts", ts)
    if found.ndim != 1 or len(found) < 2 or (num_step is not None and len(found) != whole("num_step", num_step) + 1):
        raise ValueError(f"ts must have shape (num_step + 1,) with at least one step, num_step={num_step!r}, and has {found.shape}")
    falls = np.diff(found) * (-1 if rising else 1)
    if not ((falls < 0).all() and found.min() >= sde.t_end and found.max() <= sde.t_start):
        raise ValueError(
            f"ts={shown(found.tolist())} must {'increase' if rising else 'decrease'} strictly within [{sde.t_end!r}, "
            f"{sde.t_start!r}], the times of {sde.name}"
        )
    return found, "custom grid"
