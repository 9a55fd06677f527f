"""Exponential Runge-Kutta in log rho: DPM-Solver and DPM-Solver++ of several stages."""

from __future__ import annotations

from functools import partial

import numpy as np

from ..arrays import Array
from ..quadrature import Form, lagrange_integrals
from ..sde import Schedule
from .clocks import CLOCKS
from .singlestep import SingleStep, Steps
from .step import choose_form


def exponential_rk(form: Form | None, name: str, order: int) -> SingleStep:
    """Return the exponential Runge-Kutta method of DPM-Solver (arXiv 2206.00927, algorithm 1 and 2) or DPM-Solver++.

    Stage k lies at log rho = log rho_i + c_k (log rho_{i+1} - log rho_i), and each state comes from x_i by the exact integral of
    the polynomial in log rho through some of the stages before it: order 2 has c = (0, 1/2) and a last polynomial through stage 1
    alone; order 3 c = (0, 1/3, 2/3) and polynomials through (0), (0, 1) and (0, 2). form="eps" is DPM-Solver, "data" DPM-Solver++
    (arXiv 2211.01095).
    """
    tables: dict[int, tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]] = {
        1: ((0.0,), ((0,),)),
        2: ((0.0, 1 / 2), ((0,), (1,))),
        3: ((0.0, 1 / 3, 2 / 3), ((0,), (0, 1), (0, 2))),
    }
    family = {s: partial(exponential_steps, form=form, c=c, through=through) for s, (c, through) in tables.items() if s <= order}
    return SingleStep(name, family, clean_end=True)


def exponential_steps(
    sde: Schedule, start: Array, end: Array, *, form: Form | None, c: tuple[float, ...], through: tuple[tuple[int, ...], ...]
) -> Steps:
    """Return the steps of an exponential Runge-Kutta method; see `exponential_rk`."""
    chosen, s = choose_form(sde, start, form), len(c)
    high, low = sde.log_rho(start), sde.log_rho(end)
    if s > 1 and not (np.isfinite(high).all() and np.isfinite(low).all()):
        t_infinite = (start[0] if np.isinf(high).any() else end[-1]).item()
        raise ValueError(
            f"stages in log rho need a finite one, and it is infinite at t={t_infinite!r}; start later, or use "
            "a multistep method such as 'tab3' or 'dpmpp_2m'"
        )
    t = np.stack([start] + [sde.t_of_log_rho(high + c_k * (low - high)) for c_k in c[1:]], axis=1)
    target = np.append(t[:, 1:], end[:, None], axis=1)
    scale = sde.alpha if chosen == "eps" else sde.sigma
    c_p = np.zeros((len(start), s, s))
    for k, nodes in enumerate(through):
        weights = lagrange_integrals(sde, CLOCKS["log_rho"], chosen, t[:, nodes], start, target[:, k])
        c_p[:, k, list(nodes)] = weights
    return Steps(chosen, t, scale(target) / scale(start)[:, None], c_p)
