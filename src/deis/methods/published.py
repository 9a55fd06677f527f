"""Methods whose published update replaces the exact integral of the polynomial by a simpler expression, as they are published.

With h = log rho_i - log rho_{i+1} and psi, c_0 = C_i0 of DDIM in the data form, each is x_{i+1} = psi x_i + c_0 sum_j w_j p_{i-j}
with weights w of sum 1. Libraries ship these; the exact forms (`dpmpp_2m`, `unipc2`, ...) are `adams`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..arguments import flag
from ..plan import Plan
from ..quadrature import Form, Norm
from ..sde import Schedule
from .adams import (
    CLOCKS,
    Array,
    Builder,
    adams_weights,
    check_tau,
    checked_norm,
    choose_form,
    multistep_plan,
    source,
    step_degrees,
    transport,
)
from .noise import check_noise


def first_order(schedule: Schedule, ts: Array, form: Form | None, tau: float = 0.0) -> tuple[Form, Array, Array]:
    """Return the form, and psi and C_i0 of the DDIM step in it, shape (n,)."""
    chosen = choose_form(schedule, ts, form)
    c_0 = adams_weights(schedule, ts, np.zeros(len(ts) - 1, dtype=np.intp), CLOCKS["t"], chosen, tau=tau)[:, 0]
    return chosen, transport(schedule, ts, chosen, tau)[0], c_0


def normed(schedule: Schedule, ts: Array, form: Form, c_p: Array, norm: Norm | None, *, ahead: bool = False) -> Array:
    """Return weights of p as weights of p / c(t), each step multiplied by its mean c; the weights themselves without a norm.

    The newest node of step i is t_i, and with `ahead` t_{i+1}.
    """
    scale = checked_norm(norm, form)
    if scale is None:
        return c_p
    zeros = np.zeros(len(ts) - 1, dtype=np.intp)
    plain, with_c = (adams_weights(schedule, ts, zeros, CLOCKS["t"], form, norm=c)[:, 0] for c in (None, scale))
    mean = with_c / plain * scale(ts[:-1])
    node = np.arange(len(ts) - 1)[:, None] + int(ahead) - np.arange(c_p.shape[1])
    return c_p * mean[:, None] / scale(ts[np.maximum(node, 0)])


def dpmpp_multistep(
    order: Literal[2, 3], *, lower_order_final: bool = False, tau: float = 0.0, norm: Norm | None = None
) -> Builder:
    """Return the published multistep DPM-Solver++ (Lu et al., arXiv 2211.01095, algorithm 2 and appendix B).

    Order 2 is psi x + c_0 [(1 + 1/2r) p_0 - 1/2r p_1], r = h_{i-1} / h_i; with tau = 1 it is SDE-DPM-Solver++ 2M. Order 3 adds
    divided differences with the weights phi_2 and phi_3 where the exact integral has phi_2 and 2 phi_3, so that it converges at
    order 2.
    """
    tau = check_tau(tau)
    flag("lower_order_final", lower_order_final)
    name = f"sde_dpmpp_{order}m_published" if tau else f"dpmpp_{order}m_published"

    def build(schedule: Schedule, ts: Array, grid: str) -> Plan:
        form, psi, c_0 = first_order(schedule, ts, "data", tau)
        degrees = step_degrees(schedule, ts, order - 1, CLOCKS["log_rho"], form, lower_order_final)
        h = -np.diff(schedule.log_rho(ts))
        c_p = np.zeros((len(psi), degrees.max() + 1))
        for i, degree in enumerate(degrees.tolist()):
            c_p[i, : degree + 1] = c_0[i] * _dpmpp_weights(h[i], h[i - degree : i][::-1] / h[i])
        c_p = normed(schedule, ts, form, c_p, norm)
        keep_z = transport(schedule, ts, form, tau)[1]
        plan = multistep_plan(schedule, ts, form, psi, c_p, name, grid, keep_z=keep_z, fitted=source(norm))
        return check_noise(plan, repr(tau))

    return build


def _dpmpp_weights(h: float, r: Array) -> Array:
    """Return the weights of the newest len(r) + 1 predictions, at the distances r = (h_{i-1}, h_{i-2}) / h_i before each other."""
    if len(r) < 2:
        return np.array([1 + 0.5 / r[0], -0.5 / r[0]]) if len(r) else np.ones(1)
    newer, older = np.array([1.0, -1.0, 0.0]) / r[0], np.array([0.0, 1.0, -1.0]) / r[1]
    second = (newer - older) / (r[0] + r[1])
    first = newer + r[0] * second
    phi_1, phi_2, phi_3 = -np.expm1(-h), np.expm1(-h) / h + 1, (np.expm1(-h) + h) / h**2 - 0.5
    return np.array([1.0, 0.0, 0.0]) + (phi_2 * first - phi_3 * second) / phi_1


def unipc(order: int, solver: Literal["bh1", "bh2"], *, lower_order_final: bool = False, norm: Norm | None = None) -> Builder:
    """Return the published UniPC of B(h) = h (bh1) or e^h - 1 (bh2), data form (Zhao et al., arXiv 2302.04867, algorithm 5 to 8).

    Its linear systems have the exact weights for solution whatever B(h) is, except where a single difference is given 1/2
    for its weight: in the predictor of two nodes and the corrector of the first step.

    Raises
    ------
    ValueError
        Where order is less than 1.
    """
    if order < 1:
        raise ValueError(f"method='unipc{order}_{solver}' is unknown: unipc has the orders 1, 2, ...")
    flag("lower_order_final", lower_order_final)

    def build(schedule: Schedule, ts: Array, grid: str) -> Plan:
        form, psi, c_0 = first_order(schedule, ts, "data")
        degrees = step_degrees(schedule, ts, order - 1, CLOCKS["log_rho"], form, lower_order_final)
        log_rho = schedule.log_rho(ts)
        c_p, c_c = np.zeros((len(psi), order)), np.zeros((len(psi), order + 1))
        for i, degree in enumerate(degrees.tolist()):
            h = log_rho[i] - log_rho[i + 1]
            past = (log_rho[i] - log_rho[i - degree : i][::-1]) / h
            c_p[i, : degree + 1] = c_0[i] * _unipc_weights(h, past, solver)
            if np.isfinite(h) and np.isfinite(log_rho[i]):
                newest_last = _unipc_weights(h, np.append(past, 1.0), solver)
                c_c[i, : degree + 2] = c_0[i] * np.roll(newest_last, 1)
            else:
                c_c[i, :2] = 0.0, c_0[i]
        c_p = normed(schedule, ts, form, c_p[:, : len(psi)], norm)
        c_c = normed(schedule, ts, form, c_c, norm, ahead=True)
        return multistep_plan(schedule, ts, form, psi, c_p, f"unipc{order}_{solver}", grid, corrector=c_c, fitted=source(norm))

    return build


def _unipc_weights(h: float, r: Array, solver: str) -> Array:
    """Return the weights of p_i and of the predictions at log rho_i - r h, as shares of c_0 = 1 - e^-h."""
    if len(r) == 0:
        return np.ones(1)
    b_h = -h if solver == "bh1" else np.expm1(-h)
    phi, factorial, right = np.expm1(-h) / -h - 1, 1.0, []
    for k in range(1, len(r) + 1):
        right.append(phi * factorial / b_h)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    rho = np.array([0.5]) if len(r) == 1 else np.linalg.solve(np.vander(r, increasing=True).T, right)
    share = rho * b_h / np.expm1(-h) / r
    return np.concatenate([[1 - share.sum()], share])
