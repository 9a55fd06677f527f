"""Time grids: float64 arrays of num_step + 1 times, from a schedule's start down to its end; encoding runs them backwards."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .arguments import array, number, one_of, whole
from .arrays import Array, Flags
from .sde import VPSDE, Schedule, check_schedule

DEFAULT_ORDER = {"t": 2.0, "rho": 7.0, "log": 1.0, "vp_t": 2.0}
PHASES = tuple(DEFAULT_ORDER)
_VP = VPSDE.linear()
VP_START = 1.0
"""A "vp_t" grid that starts at alpha = 0 is laid out as if it started where the linear VP schedule does, at rho = 152."""


def vp_time(log_rho: Array) -> Array:
    """Return the time at which VPSDE.linear(0.1, 20) has this log rho, infinite where rho is: a time common to all schedules."""
    infinite = np.isposinf(log_rho)
    return np.where(infinite, np.inf, _VP.t_of_log_rho(np.where(infinite, 0.0, log_rho)))


def make_grid(schedule: Schedule, num_step: int, ts_phase: str = "t", ts_order: float | None = None) -> Array:
    """Return num_step + 1 decreasing times from `schedule.t_start` to `schedule.t_end`.

    Parameters
    ----------
    num_step : int
        The number of steps, at least 1.
    ts_phase : {"t", "rho", "log", "vp_t"}
        The quantity that is spaced evenly. "t": t^(1/ts_order), before the shift of a `FlowMatching` that has one. "rho":
        rho^(1/ts_order), where ts_order=7 is the grid of Karras et al. (arXiv 2206.00364, eq. 5). "log": log rho, where ts_order
        has no meaning. "vp_t": t^(1/ts_order) of the linear VP schedule at the same rho, which gives the same grid of noise
        levels for every schedule.
    ts_order : float, optional
        The power, greater than 0; by default 2 for t and vp_t, and 7 for rho.

    Returns
    -------
    ndarray of shape (num_step + 1,)
        For a discrete schedule, integers with distinct noise levels: the grid is rounded, and times that round to the same
        integer are moved apart. Only the ends of a part of such a schedule may be non-integers; they stay as they are.

    Raises
    ------
    ValueError
        If there is less than one step, ts_phase is unknown, ts_order is not positive, the quantity is infinite at an end of the
        schedule, or a discrete schedule has too few times for the steps.
    """
    ts = continuous_grid(schedule, num_step, ts_phase, ts_order)
    return ts if schedule.num_times is None else distinct_times(ts, schedule)


def continuous_grid(sde: Schedule, num_step: int, ts_phase: str = "t", ts_order: float | None = None) -> Array:
    """Return the grid of `make_grid` before it is rounded to distinct integers for a discrete schedule."""
    check_schedule(sde)
    num_step = whole("num_step", num_step)
    one_of("ts_phase", ts_phase, PHASES)
    ts_order = DEFAULT_ORDER[ts_phase] if ts_order is None else number("ts_order", ts_order, above=0)
    with np.errstate(all="ignore"):
        ts = _spaced(sde, num_step, ts_phase, np.float64(ts_order))
    if not (np.isfinite(ts).all() and (np.diff(ts) < 0).all()):
        raise ValueError(
            f"ts_order={ts_order!r} with ts_phase={ts_phase!r} and num_step={num_step!r} gives times that do not decrease in "
            "float64; give a ts_order nearer to 1, or fewer steps"
        )
    return ts


def _spaced(sde: Schedule, num_step: int, ts_phase: str, ts_order: float) -> Array:
    start, end = sde.t_start, sde.t_end
    if ts_phase == "vp_t":
        high, low = vp_time(sde.log_rho(np.array([start, end])))
        high = max(VP_START, 2 * low) if np.isinf(high) else high
        root = np.array([high, low]) ** (1 / ts_order)
        ts = sde.t_of_log_rho(_VP.log_rho(np.linspace(root[0], root[1], num_step + 1)[1:-1] ** ts_order))
        return np.concatenate([[start], ts, [end]])
    if ts_phase == "t":
        if end < 0:
            raise ValueError(f"ts_phase='t' takes roots of t, and the end time is {end!r}; use ts_phase='log'")
        root = sde.even_of_t([start, end]) ** (1 / ts_order)
        ts = sde.t_of_even(np.linspace(root[0], root[1], num_step + 1) ** ts_order)
    else:
        log_rho = sde.log_rho(np.array([start, end]))
        _refuse_infinite(log_rho, ts_phase, sde)
        if ts_phase == "log":
            ts = sde.t_of_log_rho(np.linspace(log_rho[0], log_rho[1], num_step + 1))
        else:
            root = np.exp(log_rho / ts_order)
            ts = sde.t_of_rho(np.linspace(root[0], root[1], num_step + 1) ** ts_order)
    ts[0], ts[-1] = start, end  # the powers and inverses above may miss the ends by a rounding
    return ts


def has_grid(sde: Schedule, ts_phase: str) -> bool:
    """Return whether a quantity is finite at the ends of a schedule, so that a grid can be even in it."""
    log_rho = sde.log_rho(np.array([sde.t_start, sde.t_end]))
    return ts_phase in ("t", "vp_t") or not _infinite(log_rho, ts_phase).any()


def _infinite(log_rho: Array, ts_phase: str) -> Flags:
    """Return where the quantity of a "rho" or "log" grid is infinite."""
    return np.isposinf(log_rho) | (np.isneginf(log_rho) & (ts_phase == "log"))


def custom_grid(sde: Schedule, ts: ArrayLike | None = None, sigmas: ArrayLike | None = None, rising: bool = False) -> Array:
    """Return the user's own times, or the times of the user's own noise levels sigma/alpha, checked.

    Raises
    ------
    ValueError
        If both or neither are given. If they are not at least two numbers at which the schedule is defined, strictly decreasing
        or, with `rising`, increasing.
    """
    if (ts is None) == (sigmas is None):
        raise ValueError("give either ts (times) or sigmas (noise levels sigma/alpha), not both")
    argument, given = ("ts", ts) if sigmas is None else ("sigmas", sigmas)
    values = array(argument, given)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{argument} must have shape (num_step + 1,) with at least one step, and has shape {values.shape}")
    values = values[::-1] if rising else values
    if not np.isfinite(values).all() or not (np.diff(values) < 0).all():
        wanted = "increase strictly, from data to noise" if rising else "decrease strictly, from noise to data"
        raise ValueError(f"{argument} must be finite and {wanted}, and is {np.asarray(given).tolist()}")
    if sigmas is not None and values[-1] < 0:
        raise ValueError(f"sigmas must be at least 0, and the least is {values[-1]!r}")
    times = values if sigmas is None else sde.t_of_rho(values)
    last = np.inf if sde.num_times is None else sde.num_times - 1
    with np.errstate(all="ignore"):
        falling = np.diff(sde.log_rho(np.clip(times, 0, last))) < 0
    if not (falling.all() and times[0] <= last and times[-1] >= 0):
        raise ValueError(
            f"{argument}={values.tolist()} leaves the schedule {sde.name}, whose times lie in [0, {last}], or repeats one of "
            "its noise levels; leave such times out"
        )
    return times[::-1].copy() if rising else times


def _refuse_infinite(log_rho: Array, ts_phase: str, sde: Schedule) -> None:
    ends = (("sampling_T", "alpha", sde.t_start), ("sampling_eps", "sigma", sde.t_end))
    for (argument, level, t), infinite in zip(ends, _infinite(log_rho, ts_phase), strict=True):
        if infinite:
            raise ValueError(
                f"ts_phase={ts_phase!r} has no grid where {level} is 0, at {argument}={t!r}; use ts_phase='t', or a {argument} "
                "inside the schedule"
            )


def distinct_times(ts: Array, sde: Schedule) -> Array:
    """Round decreasing times to integers at which the noise levels of a discrete schedule differ; the ends stay where they are."""
    own = np.union1d(times_of_levels(sde), ts[[0, -1]])
    place = distinct_integers(np.interp(ts, own, np.arange(len(own))), len(own))
    return own[place.astype(np.intp)]


def times_of_levels(sde: Schedule) -> Array:
    """Return the integer times of a discrete schedule from `t_end` up to `t_start`, one for each noise level."""
    times = np.arange(np.ceil(sde.t_end), np.floor(sde.t_start) + 1)
    return times[np.diff(sde.alpha(times), prepend=np.inf) < 0]


def distinct_integers(ts: Array, num_times: int) -> Array:
    """Round decreasing times within 0..num_times-1 to distinct integers; the ends stay where they are."""
    steps = len(ts) - 1
    if steps + 1 > num_times:
        raise ValueError(f"num_step={steps} asks for {steps + 1} distinct times, and the schedule has {num_times}; use fewer steps")
    place = np.arange(steps + 1)
    rising = np.rint(ts[::-1])
    rising = np.maximum.accumulate(rising - place) + place  # each at least one more than the one before
    rising = np.minimum(rising, num_times - 1 - place[::-1])  # and leave room for those that follow
    return rising[::-1].copy()
