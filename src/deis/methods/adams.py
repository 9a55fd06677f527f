"""Exponential Adams: a polynomial through predictions, integrated exactly; every clock, form, order and corrector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arguments import flag, function, shown, whole
from ..arrays import Array
from ..plan import Plan
from ..quadrature import Form, Norm
from ..sde import Schedule
from .clocks import check_clock, clock_of
from .layout import Builder, multistep_plan
from .noise import check_noise
from .norms import checked_norm, fitted_to
from .step import adams_weights, check_form, check_tau, choose_form, step_degrees, transport


def adams(
    form: Form | None = None,
    clock: str | Callable[[Array], Array] = "t",
    order: int = 3,
    corrector: int | None = None,
    lower_order_final: bool = False,
    *,
    tau: float | Callable[[float], float] = 0.0,
    norm: Norm | None = None,
    name: str | None = None,
) -> Builder:
    r"""Return the exponential Adams method of a form, clock, order and corrector.

    x_{i+1} = psi_i x_i + sum_j C_ij p_{i-j}, where C_ij integrates the Lagrange polynomials through the newest order + 1
    predictions exactly (arXiv 2204.13902, eq. 14 and 15, for the eps form in t; `deis.quadrature` for all).

    Parameters
    ----------
    form : {"eps", "data"}, optional
        What the polynomial goes through. By default eps, and data where the grid starts at alpha = 0 or tau is given.
    clock : {"t", "rho", "log_rho", "sqrt_t", "vp_t", "arctan_rho"} or callable
        The variable of the polynomial. vp_t is the time at which the linear VP schedule has the same rho. A callable is any
        strictly monotone u(t) of an array of times.
    order : int
        The degree q of the polynomial; the method has order q + 1. The first steps use the predictions available so far, with
        degree 0, 1, ...; with fewer than order + 1 steps, all steps do. A node at which the clock is infinite (log rho at
        alpha = 0) is left out. If the clock is infinite at the end (log rho at sigma = 0), the last step of the data form has
        degree 0.
    corrector : int, optional
        After the end of a step has been evaluated, integrate the step again through that prediction and `corrector` earlier ones
        (exponential Adams-Moulton; UniC, arXiv 2302.04867). This costs no further evaluation. The last step has no corrector.
    lower_order_final : bool
        Lower the degree towards the end, to 0 in the last step.
    tau : float or callable
        The rate at which the noise is renewed, or a function of t that gives it at the start of each step. 0 is the probability
        flow, 1 the reverse diffusion (SA-Solver, arXiv 2309.05019). Only in the data form, as eps is not a smooth function of time
        where noise is added. With a corrector, predictor and corrector share the noise.
    norm : callable, optional
        c(t), the size of the predictions. The polynomial goes through p / c (DEIS-SN, arXiv 2311.00157). `deis.measure_norm`
        measures c.

    Raises
    ------
    ValueError
        If an argument is not one of these; and, when a plan is built, if the clock is not monotone on the grid.
    """
    order = whole("order", order, 0)
    corrector = None if corrector is None else whole("corrector", corrector, 0)
    form = check_form(form)
    flag("lower_order_final", lower_order_final)
    u = clock_of(clock)
    tau = tau if callable(tau) else check_tau(tau)
    if form == "eps" and tau != 0:
        raise ValueError(f"tau={tau!r} needs form='data': eps is not a smooth function of time where noise is added")
    if not isinstance(name, str | None):
        raise ValueError(f"name={shown(name)} must be a string")
    label = name or f"adams({form!r}, {clock if isinstance(clock, str) else 'custom clock'!r}, {order}, {corrector})"

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        rate = _rates(tau, ts)
        chosen = choose_form(sde, ts, "data" if rate.any() else form)
        c = checked_norm(norm, chosen)
        check_clock(sde, ts, u, label)
        degrees = step_degrees(sde, ts, order, u, chosen, lower_order_final)
        c_p = adams_weights(sde, ts, degrees, u, chosen, tau=rate, norm=c)
        c_c = None
        if corrector is not None:
            ahead = step_degrees(sde, ts, corrector, u, chosen, ahead=True)
            c_c = adams_weights(sde, ts, ahead, u, chosen, tau=rate, norm=c, ahead=True)
        psi, keep_z = transport(sde, ts, chosen, rate)
        plan = multistep_plan(sde, ts, chosen, psi, c_p, label, grid, corrector=c_c, keep_z=keep_z, fitted=fitted_to(norm))
        return check_noise(plan, "the function given" if callable(tau) else repr(tau))

    return build


def _rates(tau: float | Callable[[float], float], ts: Array) -> Array:
    if not callable(tau):
        return np.full(len(ts) - 1, tau)
    function("tau", tau, "t")
    return np.array([check_tau(tau(t)) for t in ts[:-1].tolist()])
