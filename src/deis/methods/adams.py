"""Exponential Adams-Bashforth: a polynomial through past predictions, integrated exactly (tAB-DEIS, rhoAB-DEIS, DDIM)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..plan import Plan
from ..quadrature import Clock, Form, lagrange_integrals
from ..sde import Schedule

Array = NDArray[np.float64]


def clock_t(schedule: Schedule, t: Array, log_rho: Array) -> Array:
    """u = t: the clock of tAB-DEIS."""
    return t


def clock_rho(schedule: Schedule, t: Array, log_rho: Array) -> Array:
    """u = rho: the clock of rhoAB-DEIS."""
    return np.exp(log_rho)


def t_ab(order: int, name: str | None = None) -> Callable[[Schedule, Array, str], Plan]:
    """Return tAB-DEIS of polynomial degree `order` (arXiv 2204.13902, section 3); degree 0 is DDIM."""
    return _adams(order, clock_t, name or f"tab{order}")


def rho_ab(order: int) -> Callable[[Schedule, Array, str], Plan]:
    """Return rhoAB-DEIS of polynomial degree `order` (arXiv 2204.13902, section 4): Adams-Bashforth in rho; degree 0 is DDIM."""
    return _adams(order, clock_rho, f"rhoab{order}")


def choose_form(schedule: Schedule, ts: Array) -> Form:
    """Return "eps", and "data" where the grid starts at alpha = 0, of which eps says nothing."""
    return "data" if np.isneginf(schedule.log_alpha(ts[:1])).any() else "eps"


def adams_weights(schedule: Schedule, ts: Array, order: int, clock: Clock, form: Form) -> tuple[Array, Array]:
    """Return psi of shape (n,) and C of shape (n, W): x_{i+1} = psi_i x_i + sum_j C_ij p_{i-j}.

    Step i uses the min(i, order) + 1 newest predictions, so that W = min(order + 1, n).
    """
    n = len(ts) - 1
    scale = schedule.alpha(ts) if form == "eps" else schedule.sigma(ts)
    c_p = np.zeros((n, min(order + 1, n)))
    for k in range(1, c_p.shape[1] + 1):
        steps = np.arange(k - 1, n) if k == c_p.shape[1] else np.array([k - 1])
        node_t = ts[steps[:, None] - np.arange(k)]
        c_p[steps, :k] = lagrange_integrals(schedule, clock, form, node_t, ts[steps], ts[steps + 1])
    return scale[1:] / scale[:-1], c_p


def multistep_plan(schedule: Schedule, ts: Array, form: Form, psi: Array, c_p: Array, method: str, grid: str) -> Plan:
    """Lay x_{i+1} = psi_i x_i + sum_j C_ij p_{i-j} out as a plan: every evaluation keeps a state, and the network sees it."""
    return Plan(
        t=ts,
        alpha=schedule.alpha(ts),
        sigma=schedule.sigma(ts),
        keep_x=psi,
        keep_p=c_p,
        next_x=np.ones_like(psi),
        next_p=np.zeros_like(c_p),
        form=form,
        discrete=schedule.num_times is not None and bool((ts == np.rint(ts)).all()),
        method=method,
        grid=grid,
        schedule=schedule.name,
    )


def _adams(order: int, clock: Clock, name: str) -> Callable[[Schedule, Array, str], Plan]:
    if isinstance(order, bool) or int(order) != order or order < 0:
        raise ValueError(f"order={order!r} must be a whole number of at least 0")

    def build(schedule: Schedule, ts: Array, grid: str) -> Plan:
        form = choose_form(schedule, ts)
        nodes = ts[:-1]
        if order > 0 and len(nodes) > 1 and not np.isfinite(clock(schedule, nodes, schedule.log_rho(nodes))).all():
            raise ValueError(
                f"method={name!r} has no polynomial at t={ts[0].item()!r}, where alpha is 0; use 'tab{order}', or start later"
            )
        psi, c_p = adams_weights(schedule, ts, order, clock, form)
        return multistep_plan(schedule, ts, form, psi, c_p, name, grid)

    return build
