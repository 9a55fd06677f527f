"""Exactly invertible methods: two-step recurrences of the states that can be solved for the oldest of them."""

from __future__ import annotations

import numpy as np

from ..arguments import number
from ..arrays import Array
from ..plan import Plan
from ..quadrature import Form
from ..sde import Schedule
from .layout import Builder, laid_out
from .step import check_form, choose_form, first_order


def bdia(gamma: float = 1.0, form: Form | None = None) -> Builder:
    r"""Return BDIA (Zhang et al., arXiv 2307.10829), bidirectional integration approximation.

    With D_ij(x) = psi_ij x + c_ij p_i, DDIM's step from t_i to t_j, forwards or backwards::

        x_{i+1} = gamma x_{i-1} + D_{i,i+1}(x_i) - gamma D_{i,i-1}(x_i)

    The first step is DDIM's. gamma = 0 is DDIM. At gamma = 1 the errors of both halves cancel, and the order is 2, but nothing
    damps an error that changes sign from step to step. A smaller gamma damps it, at order 1.

    Raises
    ------
    ValueError
        If gamma lies outside [0, 1].
    """
    gamma, form = number("gamma", gamma, least=0, most=1), check_form(form)
    name = "bdia" if gamma == 1 else f"bdia(gamma={gamma:g})"

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        chosen, psi, c_0 = first_order(sde, ts, form)
        b, c = psi.copy(), c_0.copy()
        if len(psi) > 1:
            _, psi_back, c_back = first_order(sde, ts[-2::-1], chosen)
            b[1:] -= gamma * psi_back[::-1]
            c[1:] -= gamma * c_back[::-1]
        return _two_step_plan(sde, ts, chosen, np.full(len(psi), gamma), b, c, name, grid)

    return build


def belm(form: Form | None = None) -> Builder:
    r"""Return O-BELM (Wang et al., arXiv 2410.07273), the bidirectional explicit linear multistep method with the least error.

    With y = x/alpha and s = rho in the eps form, or y = x/sigma and s = 1/rho in the data form, h_i = s_{i+1} - s_i and
    r = h_i / h_{i-1}::

        y_{i+1} = r^2 y_{i-1} + (1 - r^2) y_i + h_i (1 + r) p_i

    This is exact if y is a parabola in s: order 2. The first step is DDIM's.

    Raises
    ------
    ValueError
        When a plan is built, if s is infinite at its end: at sigma = 0 in the data form, at alpha = 0 in the eps form.
    """
    form = check_form(form)

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        chosen = choose_form(sde, ts, form)
        scale, level = (sde.alpha(ts), "alpha") if chosen == "eps" else (sde.sigma(ts), "sigma")
        if scale[-1] == 0:
            raise ValueError(
                f"'belm' of the {chosen} form cannot end at t={ts[-1].item()!r}, where {level} is 0; end before it, or use 'bdia'"
            )
        _, b, c = first_order(sde, ts, chosen)
        r = np.append(0.0, (c / scale[1:])[1:] / (c / scale[1:])[:-1])
        a = r**2 * np.append(0.0, scale[2:] / scale[:-2])
        return _two_step_plan(sde, ts, chosen, a, (1 - r**2) * b, (1 + r) * c, "belm", grid)

    return build


def _two_step_plan(sde: Schedule, ts: Array, form: Form, a: Array, b: Array, c: Array, method: str, grid: str) -> Plan:
    """Lay x_{i+1} = a_i x_{i-1} + b_i x_i + c_i p_i out in two rows per step; a_0 has no meaning.

    The first row calls. The second does not: it puts x_i next to p_i in the history, so that the next step finds both, and keeps.
    """
    n = len(b)
    keep_x, keep_p, second = np.ones(2 * n), np.zeros((2 * n, 4)), np.arange(2 * n) % 2 == 1
    keep_x[1::2], keep_p[1::2, 1], keep_p[3::2, 2] = b, c, a[1:]
    columns = {"keep_x": keep_x, "keep_p": keep_p, "next_x": np.ones(2 * n), "next_p": np.zeros((2 * n, 4))}
    columns |= {"accepts": second, "calls": ~second, "guess": np.where(second, 1.0, 0.0)}
    return laid_out(sde, np.append(np.repeat(ts[:-1], 2), ts[-1]), columns, form=form, method=method, grid=grid)
