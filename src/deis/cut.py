"""Plans that begin or end in the middle of another: what image-to-image, inpainting and a second model need.

Two rules cover every plan. Rows that use no prediction from before the new start stay as they are. In the other rows each lost
prediction is replaced by the value, at its time, of the polynomial through the predictions made since, in the clock "vp_t", which
all schedules share. So the first row, which has one prediction, becomes a step of first order, the second one of second order,
and so on, as at the start of a method. For a method in this clock, the cut plan is the method itself on the remaining times. A
lost state, which two-step methods use, is replaced by the one that a step of first order leads back to.

A calibrated plan is fitted as a whole: its rows use all predictions, with weights that balance only along its own trajectory. So
its remainder is built anew by "auto" with as many evaluations, with a warning; benchmarks/cut.py measured both.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from .arguments import number
from .arrays import Array, Flags
from .grids import VP_START, vp_time
from .methods import make_plan
from .model.predictions import Level
from .plan import Plan
from .quadrature import lagrange
from .run import check_direction
from .sde import Schedule

_SAME = 1e-4  # relative, of noise levels that went through float32
_ROWS = ("keep_x", "keep_p", "keep_z", "next_x", "next_p", "accepts", "calls", "guess")


def cut_plan(plan: Plan, sde: Schedule, start: float | None = None, end: float | None = None) -> Plan:
    """Return the part of a plan between two times.

    Parameters
    ----------
    plan : Plan
    sde : Schedule
        The schedule that the plan was made for.
    start : float, optional
        The time of the state to begin with, such as ``alpha * x_0 + sigma * noise`` for image-to-image. Between two rows of the
        plan it replaces the one whose noise level is nearer, and the later rows stay. By default the plan's own start.
    end : float, optional
        Where to stop, one of `plan.ts`; by default the plan's own end.

    Returns
    -------
    Plan
        It begins with a step of first order, because there are no earlier predictions. A calibrated plan is replaced by "auto"
        with as many evaluations.

    Raises
    ------
    UserWarning
        If the plan is a calibrated one.
    ValueError
        If the plan leads to noise or was made for another schedule, start or end lies outside it, or end lies within one of its
        steps.
    """
    check_direction(plan, "decode")
    start, end = (t if t is None else number(name, t) for name, t in (("start", start), ("end", end)))
    if not plan.matches(sde):
        raise ValueError(f"plan {plan.method!r} was made for the schedule {plan.schedule!r}, and sde is {sde.name}; give its own")
    return between(plan, sde, start, end)


def between(plan: Plan, sde: Schedule, start: float | None, end: float | None) -> Plan:
    """Return the part of a plan between two times of a schedule that the plan is known to match; see `cut_plan`."""
    first, level = (0, None) if start is None else _nearest(plan, _level(sde, start))
    stop = len(plan.rows) if end is None else _row_of_end(plan, _level(sde, end))
    if (first, stop, level) == (0, len(plan.rows), None):
        return plan
    if plan.provenance and (first, level) != (0, None):
        left = int(plan.calls[first:stop].sum())
        here = sde.between(plan.t[first] if level is None else level.t, plan.t[stop])
        return _again(plan, make_plan(here, "auto", nfe=left))
    return _part(plan, first, stop, level)


def _level(sde: Schedule, t: float) -> Level:
    return Level(float(t), float(sde.alpha(t)), float(sde.sigma(t)))


def from_call(plan: Plan, sde: Schedule, call: int) -> Plan:
    """Return the part of a plan from its evaluation number `call` on, counted from 0; all later times stay as they are.

    If the next evaluation is at the same time, the first row alone could not use its own. The two then share their weights.

    Raises
    ------
    ValueError
        If there is no such evaluation, the plan ends at its time, or a later stage of its step lies before it.
    """
    rows = np.flatnonzero(plan.calls)
    if not 0 <= call < len(rows):
        raise ValueError(f"call={call!r} must lie in 0 ... {len(rows) - 1}, the evaluations of the plan {plan.method!r}")
    if call == 0:
        return plan
    if plan.provenance:
        return _again(plan, make_plan(sde, "auto", ts=np.append(plan.t[rows[call:]], plan.t[-1])))
    return _part(plan, int(rows[call]), len(plan.rows), None)


def from_row(plan: Plan, row: int) -> Plan:
    """Return the part of a plan from a row on that begins a step; all its noise levels stay as they are."""
    return _part(plan, row, len(plan.rows), None) if row else plan


def made_again(plan: Plan, sde: Schedule) -> Plan:
    """Return the plan that replaces a calibrated one that cannot be followed from end to end, and warn."""
    return _again(plan, make_plan(sde.between(plan.t[0], plan.t[-1]), "auto", nfe=plan.nfe))


def _again(plan: Plan, made: Plan) -> Plan:
    """Return the plan that replaces a calibrated one from its middle on, and warn."""
    warnings.warn(
        f"the plan {plan.method!r} was calibrated as a whole, from t={plan.t[0].item()!r}; from t={made.t[0].item()!r} on "
        f"{made.method!r} takes its place, with as many evaluations. Calibrate one for that start: "
        "deis.make_plan(sde.between(start), ...)",
        stacklevel=4,
    )
    return made


def _nearest(plan: Plan, level: Level) -> tuple[int, Level | None]:
    """Return the row that a noise level replaces, and the level, or None if it is the row's own."""
    rho = _rho(plan.alpha[:-1], plan.sigma[:-1])
    own = float(_rho(np.array(level.alpha), np.array(level.sigma)))
    if np.isclose(rho[0], own, _SAME, 0):  # the plan's own start, which may make no call
        return 0, None
    same = np.flatnonzero(plan.calls & np.isclose(rho, own, _SAME, 0))
    if len(same):  # of stages at one time take the last, so that no evaluation is wasted
        return int(same[-1]), None
    later = np.maximum.accumulate(plan.t[:0:-1])[::-1]  # the greatest time after each row
    able = np.flatnonzero(plan.calls & (later < level.t))
    if own > rho.max() or len(able) == 0:
        raise ValueError(
            f"start={level.t!r} lies outside the plan {plan.method!r}, which runs from t={plan.t[0].item()!r} to "
            f"{plan.t[-1].item()!r}; begin within it"
        )
    distance = np.abs(_clock(plan.alpha[able], plan.sigma[able]) - _clock(np.array(level.alpha), np.array(level.sigma)))
    return int(able[np.argmin(distance)]), level


def _row_of_end(plan: Plan, end: Level) -> int:
    """Return the number of rows up to a noise level, which must be that of a step's end."""
    own = _rho(np.array(end.alpha), np.array(end.sigma))
    rows = np.flatnonzero(plan.accepts & np.isclose(_rho(plan.alpha[1:], plan.sigma[1:]), own, _SAME, 1e-12))
    if len(rows) == 0:
        raise ValueError(
            f"end={end.t!r} ends no step of the plan {plan.method!r}, whose times are {plan.ts.tolist()}; use one of them"
        )
    return int(rows[0]) + 1


def _part(plan: Plan, first: int, stop: int, level: Level | None) -> Plan:
    """Return the rows first, ..., stop - 1, with the first of them at another noise level if one is given."""
    t, alpha, sigma = (getattr(plan, name)[: stop + 1].copy() for name in ("t", "alpha", "sigma"))
    if level is not None:
        t[first], alpha[first], sigma[first] = level
    _check_part(plan, first, t)
    rows = {name: getattr(plan, name)[first:stop].copy() for name in _ROWS}
    own, there = _clock(plan.alpha[:stop], plan.sigma[:stop]), _clock(alpha[:stop], sigma[:stop])
    _step_back(rows, plan, first)
    for name in ("keep_p", "next_p"):
        for i, weights in enumerate(rows[name]):
            rows[name][i] = _without_the_lost(weights, first + i, own, there, plan.calls, first, level is not None)
    _begin(rows, plan, first, level)
    if t[first] == t[first + 1] and plan.calls[first + 1]:
        _share(rows)
    t, alpha, sigma = t[first:], alpha[first:], sigma[first:]
    discrete = plan.discrete and bool(t[0] == np.rint(t[0]))
    return replace(plan, t=t, alpha=alpha, sigma=sigma, **rows, discrete=discrete, method=f"{plan.method} from t={t[0]:.4g}")


def _check_part(plan: Plan, first: int, t: Array) -> None:
    if first >= len(t) - 1:
        raise ValueError(f"the plan {plan.method!r} has no step left between start and end; give a start before end")
    end = t[first + 1 + int(np.argmax(plan.accepts[first:]))]  # of the step that it belongs to
    if not (t[first + 1 : -1] <= t[first]).all() or t[-1] == t[first] or (end == t[first] and not plan.accepts[first]):
        raise ValueError(
            f"the plan {plan.method!r} cannot begin with its row {first}, at t={t[first].item()!r}: a later row lies at "
            f"t={t[first + 1 :].max().item()!r}, or its step or the plan ends there; begin with one of its full steps"
        )


def _step_back(rows: dict[str, Any], plan: Plan, first: int) -> None:
    """Replace lost states, which two-step methods keep as predictions, by the step of first order back to them."""
    for i, weights in enumerate(rows["keep_p"]):
        row = first + i - np.arange(len(weights))  # of each prediction
        newest = np.argmax((row >= first) & plan.calls[row])
        here = Level(plan.t[first + i], plan.alpha[first + i], plan.sigma[first + i])
        for j in np.flatnonzero((row < first) & (plan.guess[row] == 1) & (weights != 0)):
            a, b = _first_order(plan, row[j], here)
            rows["keep_x"][i] += weights[j] * a
            weights[newest] += weights[j] * b
            weights[j] = 0.0


def _without_the_lost(weights: Array, i: int, own: Array, there: Array, calls: Flags, first: int, moved: bool) -> Array:
    """Return the weights of row i, newest prediction first, with lost predictions replaced by the polynomial through the others.

    own and there are the clocks of the predictions in the whole plan and in its part. A moved start replaces a lost prediction.
    """
    row = i - np.arange(len(weights))  # of each prediction
    lost = (row < first + moved) & (weights != 0)
    places = np.flatnonzero((row >= first) & calls[row])
    _, newest = np.unique(there[row[places]], return_index=True)  # of stages at one time
    nodes = places[np.sort(newest)]
    out = np.where(lost, 0.0, weights)
    out[nodes] += weights[lost] @ lagrange(own[row[lost]][None], there[row[nodes]][None])[0]
    return out


def _begin(rows: dict[str, Any], plan: Plan, first: int, level: Level | None) -> None:
    """Rewrite the first row, which gets the state x instead of base; at a moved start, the state of row i is a x + b p.

    In the whole plan the row before it gives x = next_x base + sum_j next_p[j] p_{i-1-j}.
    """
    a, b = (1.0, 0.0) if level is None else _first_order(plan, first, level)
    scale, stage = (1.0, 0.0) if first == 0 else (plan.next_x[first - 1], plan.next_p[first - 1].sum())
    rows["keep_p"][0, 0] += rows["keep_x"][0] * (b - stage) / scale
    rows["keep_x"][0] *= a / scale


def _first_order(plan: Plan, first: int, level: Level) -> tuple[float, float]:
    """Return a and b of the state a x + b p at a row, given x and p at a noise level: the step that is exact for constant p."""
    alpha, sigma = plan.alpha[first], plan.sigma[first]
    if plan.form == "eps":
        return alpha / level.alpha, sigma - alpha / level.alpha * level.sigma
    return sigma / level.sigma, alpha - sigma / level.sigma * level.alpha


def _share(rows: dict[str, Any]) -> None:
    """Give the first prediction half of the weights of the second, which is evaluated at the same state."""
    rows["accepts"][0] = False
    for name in ("keep_p", "next_p"):
        for i in range(1, min(len(rows[name]), rows[name].shape[1])):
            rows[name][i, i - 1 : i + 1] = rows[name][i, i - 1 : i + 1].sum() / 2


def _clock(alpha: Array, sigma: Array) -> Array:
    """Return the time of the linear VP schedule at the same noise level; alpha = 0 counts as the start of a "vp_t" grid."""
    with np.errstate(divide="ignore"):
        u = vp_time(np.log(sigma) - np.log(alpha))
    return np.where(np.isinf(u), VP_START, u)


def _rho(alpha: Array, sigma: Array) -> Array:
    with np.errstate(divide="ignore"):
        return sigma / alpha
