"""Plans of matrix-valued SDEs: exponential Adams and Runge-Kutta in t, and rhoRK where a scalar rho exists."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..arguments import array, number, one_of, shown, whole
from ..arrays import Array
from ..methods.layout import corrected
from ..methods.runge_kutta import TABLEAUX
from ..methods.singlestep import split_budget
from .plan import PREDICTS, LinearPlan
from .runge_kutta import NESTED, STAGES, exponential_columns, rho_columns
from .sde import ROOTS, LinearSDE, check_sde
from .weights import Columns, integrand, through

AVAILABLE = (
    'of a linear SDE there are the methods "tab<q>", q = 0, 1, 2, ..., with corrector=, "trk2", "trk3" and "trk4", and where a '
    'scalar rho exists "rhork_<tableau>", with K=, on grids even in a power of t or at your own times ts=; iPNDM, stochastic '
    "methods, tau=, afs= and grids in rho need a scalar schedule and deis.make_plan"
)


def make_linear_plan(
    sde: LinearSDE,
    method: str = "tab2",
    num_step: int | None = None,
    ts_order: float = 2.0,
    *,
    nfe: int | None = None,
    ts: ArrayLike | None = None,
    K: str = "R",
    predicts: str | None = None,
    corrector: int | None = None,
    direction: str = "decode",
) -> LinearPlan:
    r"""Build a plan of exponential Adams or Runge-Kutta from a linear SDE and a time grid (arXiv 2204.13902, with matrices).

    Every method puts a polynomial in t through predictions p_j = eps at t_j, with the Lagrange polynomials l_j, and integrates it
    exactly, from the step's start to t (eq. 14)::

        x(t) = Psi(t, t_i) x_i + sum_j C_j p_j
        C_j  = integral from t_i to t of Psi(t, s) 1/2 G_s G_s^T K_s^-T l_j(s) ds

    Parameters
    ----------
    sde : LinearSDE
    method : str
        "tab<q>", exponential Adams of degree q and order q + 1, through p_i, p_{i-1}, ...; the first steps use the predictions
        there are. "tab0" with K="R" is gDDIM's step.

        "trk2", "trk3" and "trk4", exponential Runge-Kutta in t of that order: 2, 3 and 5 evaluations a step, and polynomials
        through stages of the same step (`deis.linear.runge_kutta.NESTED`). What "trk2" does in t, "res_2s" does in log rho.

        "rhork_<tableau>", rhoRK of a name in `deis.TABLEAUX`, with K="R" and where a scalar rho exists: all blocks or frequencies
        run alike, as in one block. Of one block it is the scalar plan.
    num_step : int, optional
        The number of steps; 10 where neither it, nfe nor ts is given.
    ts_order : float
        The times are even in t^(1/ts_order).
    nfe : int, optional
        Instead of num_step: the exact number of evaluations. If the stages do not divide it, the plan ends with cheaper steps.
    ts : array of shape (num_step + 1,), optional
        Your own times instead, decreasing, or increasing to encode.
    K : {"R", "L"}
        The root of Sigma in whose eps the polynomials are; see `LinearSDE`.
    predicts : {"R", "L", "score"}, optional
        What the network returns: eps of this root, or the score; by default eps of K. Another than K is turned into K's within the
        table, at no cost.
    corrector : int, optional
        Of "tab<q>": integrate each step again, when its end has been evaluated, through that prediction and `corrector` earlier
        ones, at no further evaluation. The last step has none.
    direction : {"decode", "encode"}
        From noise to data, or on the same grid the other way.

    Raises
    ------
    TypeError
        If sde is no linear SDE.
    ValueError
        For an unknown method, K or direction, numbers out of range, or times that leave the SDE's; it says what there is. For rhoRK
        where there is no scalar rho.
    """
    check_sde(sde)
    one_of("K", K, ROOTS, f"; {AVAILABLE}")
    told = one_of("predicts", K if predicts is None else predicts, PREDICTS)
    corrector = None if corrector is None else whole("corrector", corrector, 0)
    rising = one_of("direction", direction, ("decode", "encode")) == "encode"
    family = _family(method, K, corrector)
    counts = None if nfe is None else split_budget(family, whole("nfe", nfe))
    times, grid = _times(sde, _steps(num_step, counts), ts_order, ts, rising)
    counts = counts or [max(family)] * (len(times) - 1)
    label = f"{method} in {K}" + ("" if corrector is None else f" with corrector {corrector}")
    return _plan_of(sde, _columns(sde, method, times, K, counts, corrector), K, told, label, grid)


def _columns(sde: LinearSDE, method: str, times: Array, K: str, counts: Sequence[int], corrector: int | None) -> Columns:
    if method in STAGES:
        return exponential_columns(sde, times, K, counts)
    if method.startswith("rhork_"):
        return rho_columns(sde, times, counts, TABLEAUX[method.removeprefix("rhork_")])
    return _adams(sde, times, K, int(method.removeprefix("tab")), corrector)


def _adams(sde: LinearSDE, times: Array, K: str, degree: int, corrector: int | None) -> Columns:
    """Return exponential Adams on the times, of this degree, and with a corrector where it is given."""
    psi = sde.psi(times[1:], times[:-1])
    wanted = [(0, False), (degree, False)] + ([] if corrector is None else [(corrector, True)])
    constant, keep_p, *ahead = adams_blocks(sde, times, K, wanted)
    next_p = np.zeros_like(keep_p)
    if ahead:
        keep_p, next_p = corrected(psi, keep_p, ahead[0], sde.algebra.times)
    return Columns(times, psi, constant[:, 0], keep_p, next_p, np.ones(len(psi), dtype=bool))


def _plan_of(sde: LinearSDE, columns: Columns, K: str, told: str, label: str, grid: str) -> LinearPlan:
    """Return the plan of columns for eps of K, for a network that predicts what is told."""
    algebra, n, t = sde.algebra, len(columns.psi), columns.t
    roots = sde.K(t, K)
    to_eps, unit = _conversion(sde, t, roots, told, K)
    keep_p, next_p = columns.keep_p.copy(), columns.next_p.copy()
    for j in range(keep_p.shape[1]):
        for weights in (keep_p, next_p):
            weights[j:, j] = algebra.times(weights[j:, j], to_eps[: n - j])
    sigma = roots if K == "R" else columns.of_eps(algebra, roots[0])
    one = np.broadcast_to(algebra.one(sde.shape), columns.psi.shape)
    last = columns.accepts.reshape(-1, *(1,) * len(sde.shape))
    keep_x, next_x = np.where(last, columns.psi, one), np.where(last, one, columns.psi)
    texts = (sde.basis, told, label, grid, sde.name)
    return LinearPlan(t, sde.psi(t, 0.0), sigma, unit, keep_x, keep_p, next_p, *texts, next_x, columns.accepts)


def adams_blocks(sde: LinearSDE, ts: Array, K: str, wanted: Sequence[tuple[int, bool]]) -> list[Array]:
    """Return for each (degree, ahead) wanted the weights C_ij, shape (n, W, *c), newest node first.

    The nodes of step i are t_i, t_{i-1}, ..., and with `ahead` t_{i+1}, t_i, ..., as many as the degree asks and there are.
    """
    n = len(ts) - 1
    out = [np.zeros((n, min(degree, n - 1 + int(ahead)) + 1, *sde.shape)) for degree, ahead in wanted]
    for i in range(n):
        s, rate = integrand(sde, K, ts[i], ts[i + 1])
        for weights, (degree, ahead) in zip(out, wanted, strict=True):
            used = min(degree, i + int(ahead)) + 1
            weights[i, :used] = through(ts[i + int(ahead) - np.arange(used)], s, rate)
    return out


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


def _family(method: str, K: str, corrector: int | None) -> list[int]:
    """Return how many stages a step of a method can have, the most of them its own."""
    found = method if isinstance(method, str) else ""
    if re.fullmatch(r"tab\d{1,2}", found):
        return [1]
    if found not in STAGES and found.removeprefix("rhork_") not in (TABLEAUX if found.startswith("rhork_") else ()):
        raise ValueError(f"method={shown(method)} is not among those for matrices; {AVAILABLE}")
    if corrector is not None:
        raise ValueError(f"corrector={corrector!r} is of 'tab<q>', and {method!r} has stages instead; leave it out")
    if found in STAGES:
        return [size for size in NESTED if size <= STAGES[found]]
    if K != "R":
        raise ValueError(f"K={K!r} has no rho, and {method!r} integrates in it: use K='R', with predicts={K!r} for such a network")
    own = len(TABLEAUX[found.removeprefix("rhork_")].b)
    return sorted({min(size, own) for size in (1, 2, 3, 4)} | {own})


def _steps(num_step: int | None, counts: Sequence[int] | None) -> int | None:
    """Return the number of steps that are asked for, if any."""
    steps = None if num_step is None else whole("num_step", num_step)
    if counts is None or steps in (None, len(counts)):
        return steps if counts is None else len(counts)
    raise ValueError(f"num_step={num_step!r} contradicts nfe, which asks for {len(counts)} steps; leave one of them out")


def _times(sde: LinearSDE, num_step: int | None, ts_order: float, ts: ArrayLike | None, rising: bool) -> tuple[Array, str]:
    if ts is None:
        steps = 10 if num_step is None else num_step
        power = number("ts_order", ts_order, above=0, most=100)
        root = np.array([sde.t_start, sde.t_end]) ** (1 / power)
        found = np.linspace(root[0], root[1], steps + 1) ** power
        found[0], found[-1] = sde.t_start, sde.t_end  # the powers may miss the ends by a rounding
        return (found[::-1].copy() if rising else found), f"t grid of power {power:g}"
    found = array("ts", ts)
    if found.ndim != 1 or len(found) < 2 or (num_step is not None and len(found) != num_step + 1):
        raise ValueError(f"ts must have shape (num_step + 1,) with at least one step, num_step={num_step!r}, and has {found.shape}")
    falls = np.diff(found) * (-1 if rising else 1)
    if not ((falls < 0).all() and found.min() >= sde.t_end and found.max() <= sde.t_start):
        raise ValueError(
            f"ts={shown(found.tolist())} must {'increase' if rising else 'decrease'} strictly within [{sde.t_end!r}, "
            f"{sde.t_start!r}], the times of {sde.name}"
        )
    return found, "custom grid"
