"""Clocks: the variables in which polynomials go through predictions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arguments import array, function, one_of
from ..arrays import Array
from ..grids import vp_time
from ..quadrature import Clock
from ..sde import Schedule

CLOCKS: dict[str, Clock] = {
    "t": lambda sde, t, log_rho: t,
    "rho": lambda sde, t, log_rho: np.exp(log_rho),
    "log_rho": lambda sde, t, log_rho: log_rho,
    "sqrt_t": lambda sde, t, log_rho: np.sqrt(t),
    "vp_t": lambda sde, t, log_rho: vp_time(log_rho),
    "arctan_rho": lambda sde, t, log_rho: np.arctan(np.exp(log_rho)),  # the angle of TrigFlow, arXiv 2410.11081
}


def clock_of(clock: str | Callable[[Array], Array]) -> Clock:
    """Return a clock by its name, or a function of times as one."""
    if not callable(clock):
        return CLOCKS[one_of("clock", clock, CLOCKS, ", or a function u(t)")]

    def u(sde: Schedule, t: Array, log_rho: Array) -> Array:
        function("clock", clock, "t")
        return array("the result of clock(t)", clock(t))

    return u


def check_clock(sde: Schedule, ts: Array, clock: Clock, label: str) -> None:
    """Raise unless the clock is strictly monotone at the times of the grid, and turns nowhere between them.

    Between them it may rest, as log rho does where a table repeats a noise level.
    """
    t = np.append((ts[:-1, None] + np.diff(ts)[:, None] * np.array([0.0, 0.25, 0.5, 0.75])).ravel(), ts[-1])
    u = clock(sde, t, sde.log_rho(t))
    if u.shape == t.shape:
        change, step = (np.diff(v[np.isfinite(v)]) for v in (u, u[::4]))
        monotone = ((change >= 0).all() and (step > 0).all()) or ((change <= 0).all() and (step < 0).all())
    if u.shape != t.shape or np.isnan(u).any() or not monotone:
        raise ValueError(f"the clock of {label} is not monotone on the grid: at the times {t.tolist()} it is {u.tolist()}")
