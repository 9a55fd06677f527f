"""Methods: each a function from (sde, times) to a plan; and `make_plan`, which calls one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..arguments import function, kind, number, one_of, whole
from ..arrays import Array
from ..grids import DEFAULT_ORDER, custom_grid, has_grid, make_grid
from ..plan import Plan
from ..sde import Schedule, check_schedule
from .layout import Builder, StagedBuilder, gaussian_guess
from .noise import check_steps
from .registry import KNOWN, find, get_method

ANALYTICAL = " + analytical first step"
"""The end of the name of a plan with one."""

__all__ = ["ANALYTICAL", "KNOWN", "Builder", "evaluations_of_steps", "get_method", "make_plan"]


def make_plan(
    sde: Schedule,
    method: str | Builder = "auto",
    num_step: int | None = None,
    ts_phase: str | None = None,
    ts_order: float | None = None,
    *,
    nfe: int | None = None,
    ts: ArrayLike | None = None,
    sigmas: ArrayLike | None = None,
    afs: float | None = None,
    direction: str = "decode",
    **options: Any,
) -> Plan:
    """Build a plan from a noise schedule, a method and a time grid.

    Parameters
    ----------
    sde : Schedule
        `VPSDE`, `SubVPSDE`, `VESDE`, `EDM`, `FlowMatching`, or another implementation of `Schedule`.
    method : str or callable
        "auto", a predictor-corrector chosen by the measurements in docs/default.md; any name accepted by `get_method`; or your own
        builder, such as ``deis.adams(clock="arctan_rho", order=2)``.
    num_step : int, optional
        The number of steps; 10 if num_step, nfe, ts and sigmas are all missing. A method of s stages makes s evaluations per step;
        `plan.nfe` is the total.
    ts_phase, ts_order
        The grid, see `deis.make_grid`. By default it is the method's own, if its paper names one that the schedule has. Otherwise
        it is the schedule's (`default_grid`): t of power 2, and vp_t of power 2 for `EDM` and `VESDE`.
    nfe : int, optional
        Instead of num_step: the exact number of network evaluations. If a method has several stages that do not divide it, the
        plan ends with cheaper steps.
    ts, sigmas : array of shape (num_step + 1,), optional
        Instead of a grid: your own times, or your own noise levels sigma/alpha (what k-diffusion and most schedulers call
        sigmas), decreasing, or increasing to encode.
    afs : float, optional
        The standard deviation c of the data. It saves the first evaluation: its prediction is replaced by the one for Gaussian
        data of mean 0, eps = sigma x / (alpha^2 c^2 + sigma^2) (the analytical first step, arXiv 2210.05475).
    direction : {"decode", "encode"}
        From noise to data, or the other way on the same grid, for `deis.encode`. Every method without noise does both.
    options
        Options of the named method, such as lower_order_final=True, corrector=2, tau=0.5, eta=1.0 or norm=c.

    Raises
    ------
    ValueError
        If the method or grid is unknown, the method has no meaning on the schedule, it adds noise and the plan is to encode, or
        it cannot meet the budget; each message says what to give instead.
    """
    check_schedule(sde)
    rising = one_of("direction", direction, ("decode", "encode")) == "encode"
    afs = None if afs is None else number("afs", afs, above=0, hint="it is the standard deviation of the data")
    nfe = None if nfe is None else whole("nfe", nfe)
    num_step = None if num_step is None else whole("num_step", num_step)
    build, default_grid = _resolve(method, options)
    given = None if ts is None and sigmas is None else custom_grid(sde, ts, sigmas, rising)
    end = (sde.t_start if rising else sde.t_end) if given is None else given[-1]
    counts = None if nfe is None else evaluations_of_steps(build, nfe, bool(sde.sigma(end) == 0), saves=afs is not None)
    steps = _agree(num_step, counts, None if given is None else given[1:])
    if given is not None:
        times, grid = given, "custom grid"
    else:
        times, grid = _own_grid(sde, steps, ts_phase, ts_order, default_grid)
        times = times[::-1].copy() if rising else times
    with np.errstate(invalid="ignore") if rising else nullcontext():  # towards the noise, keep_z is the root of a negative number
        plan = build(sde, times, grid, counts) if isinstance(build, StagedBuilder) else build(sde, times, grid)
    kind("the result of method", plan, Plan, "a deis.Plan,")
    plan = plan if afs is None else _analytical_first_step(plan, afs)
    if nfe is not None and plan.nfe != nfe:
        raise ValueError(
            f"nfe={nfe!r} cannot be met: {plan.method!r} makes {plan.nfe} evaluations in {plan.num_step} steps; give num_step"
        )
    return check_steps(plan)


def _own_grid(
    sde: Schedule, steps: int, ts_phase: str | None, ts_order: float | None, default: tuple[str, float] | None
) -> tuple[Array, str]:
    """Return the requested grid, from noise to data, and its name; by default the method's own or the schedule's."""
    own = sde.default_grid if default is None or not has_grid(sde, default[0]) else default
    phase = own[0] if ts_phase is None else ts_phase
    order = own[1] if ts_order is None and phase == own[0] else ts_order
    return make_grid(sde, steps, phase, order), _grid_name(phase, order)


def _resolve(method: str | Builder, options: dict[str, Any]) -> tuple[Builder, tuple[str, float] | None]:
    """Return the builder of a method, and the grid that it prefers."""
    if isinstance(method, str):
        return get_method(method, **options), find(method)[0].grid
    function("method, where it is no name,", method, "sde", "ts", "grid")
    if options:
        raise ValueError(f"the options {sorted(options)} belong to a method given by name; give them to the builder")
    return method, None


def evaluations_of_steps(build: Builder, nfe: int, clean: bool, *, saves: bool = False) -> list[int]:
    """Return the number of evaluations in each step for a budget, on a grid that ends at sigma = 0 (clean) or not.

    If the analytical first step `saves` an evaluation, the budget allows one more row.
    """
    rows = whole("nfe", nfe) + saves
    return build.split(rows, clean) if isinstance(build, StagedBuilder) else [1] * rows


def _agree(num_step: int | None, counts: list[int] | None, ends: Array | None) -> int:
    """Return the number of steps that all arguments ask for; 10 if none does."""
    asked = {} if num_step is None else {"num_step": num_step}
    asked |= {name: len(steps) for name, steps in (("nfe", counts), ("ts or sigmas", ends)) if steps is not None}
    if len(set(asked.values())) > 1:
        wishes = ", ".join(f"{argument} asks for {steps} steps" for argument, steps in asked.items())
        raise ValueError(f"{wishes}, which contradict each other; leave one of them out")
    return next(iter(asked.values()), 10)


def _grid_name(phase: str, order: float | None) -> str:
    return f"{phase} grid" + ("" if phase == "log" else f" of power {DEFAULT_ORDER[phase] if order is None else order:g}")


def _analytical_first_step(plan: Plan, c: float) -> Plan:
    """Replace the plan's first evaluation by the prediction for Gaussian data of standard deviation c."""
    if plan.nfe == 1:
        raise ValueError(f"afs={c!r} would save the only evaluation of {plan.method!r} in {plan.num_step} steps; take more steps")
    i = int(np.argmax(plan.calls))
    calls, guess = plan.calls.copy(), plan.guess.copy()
    calls[i], guess[i] = False, gaussian_guess(plan.form, plan.alpha[i], plan.sigma[i], c)
    return replace(plan, calls=calls, guess=guess, method=plan.method + ANALYTICAL)
