"""Methods: each a function from (schedule, times) to a plan; and the registry of their names."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..grids import custom_grid, make_grid
from ..plan import Plan
from ..sde import Schedule
from .adams import rho_ab, t_ab
from .ipndm import ipndm
from .runge_kutta import TABLEAUX, rho_rk

Method = Callable[[Schedule, NDArray[np.float64], str], Plan]
"""A builder: method(schedule, ts, grid) -> Plan, with ts decreasing, one time more than steps, and grid its name."""

KNOWN = "'ddim', 'tab0', 'tab1', ... (any order), 'rhoab0', 'rhoab1', ... (any order), 'ipndm1' to 'ipndm4', 'ipndm', " + ", ".join(
    f"'rhork_{name}'" for name in TABLEAUX
)


def get_method(name: str) -> Method:
    """Return the builder of a registered name.

    ``ddim``; ``tab<q>`` and ``rhoab<q>``, the exponential Adams-Bashforth methods of polynomial degree q; ``ipndm<p>`` of p
    predictions, ``ipndm`` being ``ipndm4``; ``rhork_<tableau>``.

    Raises
    ------
    ValueError
        For any other name; it lists the known ones.
    """
    if name == "ddim":
        return t_ab(0, name)
    if name == "ipndm":
        return ipndm(4)
    if match := re.fullmatch(r"(tab|rhoab|ipndm)(\d{1,3})", name):
        return {"tab": t_ab, "rhoab": rho_ab, "ipndm": ipndm}[match[1]](int(match[2]))
    if name.startswith("rhork_"):
        return rho_rk(name.removeprefix("rhork_"))
    raise ValueError(f"method={name!r} is unknown; the known ones are {KNOWN}, or a function (schedule, ts, grid) -> Plan")


def make_plan(
    sde: Schedule,
    method: str | Method = "tab3",
    num_step: int | None = None,
    ts_phase: str = "t",
    ts_order: float = 2.0,
    *,
    ts: ArrayLike | None = None,
    sigmas: ArrayLike | None = None,
) -> Plan:
    """Build a plan from a noise schedule, a method and a time grid.

    Parameters
    ----------
    sde : Schedule
        `VPSDE`, `SubVPSDE`, `VESDE`, `EDM`, `FlowMatching`, or another implementation of `Schedule`.
    method : str or callable
        A name that `get_method` knows, or a builder of your own such as ``deis.rho_rk(tableau)``.
    num_step : int, optional
        The number of steps; 10 where neither it, ts nor sigmas is given. A Runge-Kutta method of s stages makes s evaluations
        a step; `plan.nfe` tells.
    ts_phase, ts_order
        The grid, see `deis.make_grid`.
    ts, sigmas : array of shape (num_step + 1,), optional
        Instead of a grid: your own times, or your own noise levels sigma/alpha (what k-diffusion and most schedulers call
        sigmas), decreasing.

    Raises
    ------
    ValueError
        For an unknown method or grid, and for a method that has no meaning on the schedule; each says what to give instead.
    """
    if not isinstance(sde, Schedule):
        raise TypeError(f"sde must be a noise schedule such as deis.VPSDE.linear(), and is {sde!r}")
    build = get_method(method) if isinstance(method, str) else method
    if not callable(build):
        raise TypeError(f"method must be a name or a function (schedule, ts, grid) -> Plan, and is {method!r}")
    if ts is None and sigmas is None:
        times = make_grid(sde, 10 if num_step is None else num_step, ts_phase, ts_order)
        grid = f"{ts_phase} grid" if ts_phase == "log" else f"{ts_phase} grid of power {ts_order:g}"
    else:
        times, grid = custom_grid(sde, ts, sigmas), "custom grid"
        if num_step is not None and num_step != len(times) - 1:
            raise ValueError(f"num_step={num_step!r} contradicts the {len(times)} given times; leave it out")
    return build(sde, times, grid)
