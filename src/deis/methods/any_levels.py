"""Exponential Adams on noise levels that another program laid: coarse, crowded, or from alpha = 0."""

from __future__ import annotations

import numpy as np

from ..arrays import Array, Indices
from ..plan import Plan
from ..quadrature import Clock, Form, lagrange_integrals
from ..sde import Schedule
from .clocks import CLOCKS, check_clock
from .layout import Builder, multistep_plan
from .step import step_degrees, transport

_EVEN = np.array([1, 2, 11 / 3, 20 / 3])
"""sum |C| / |sum C| of the Adams-Bashforth weights of degree 0, 1, 2, 3 on even steps."""


def adams_on_any_levels(
    form: Form, clock: str, order: int, corrector: int | None = None, *, tau: float = 0.0, most: float = 5.0, name: str
) -> Builder:
    r"""Return `deis.adams(form, clock, order, corrector)` for levels that are not of its own choice.

    It is that method, but for two cases:

    - A step so long beside those before it that the polynomial leaves its nodes far behind takes a lower degree: where sum_j
      \|C_ij\| / \|sum_j C_ij\|, the factor by which errors of the predictions grow, is more than `most` times that of even steps.
    - The eps form may start at alpha = 0, where eps is the state itself, x / sigma. The first step is DDIM's, and the plan is the
      same method in terms of the predicted x_0: eps_j = (x_j - alpha_j p_j) / sigma_j, and every x_j is linear in the state and the
      predictions.

    Parameters
    ----------
    form : {"eps", "data"}
    clock : str
        A name of `deis.adams`.
    order : int
        The greatest degree of the polynomial, at most 3.
    corrector : int, optional
        As for `deis.adams`, at most 3; the data form only, which rounding does not grow in from a small alpha.
    tau : float
        As for `deis.adams`, the data form only.
    most : float
        See above.
    name : str
        The name of the plan's method.
    """
    u = CLOCKS[clock]
    if form == "eps" and corrector is not None:
        raise ValueError(f"corrector={corrector!r} needs form='data'")
    if form == "eps" and tau != 0:
        raise ValueError(f"tau={tau!r} needs form='data'")

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        check_clock(sde, ts, u, name)
        from_noise = form == "eps" and bool(np.isneginf(sde.log_alpha(ts[0])))

        def weights(degree: int, *, ahead: bool = False) -> list[Array]:
            degrees = step_degrees(sde, ts, degree, u, form, ahead=ahead)
            steps = range(int(from_noise), len(degrees))
            return [_weights(sde, ts, i, degrees[i], u, form, tau, most, ahead) for i in steps]

        if from_noise:
            return _in_data(sde, ts, weights(order), name, grid)
        psi, keep_z = transport(sde, ts, form, tau)
        c_c = None if corrector is None else _rows(weights(corrector, ahead=True))
        return multistep_plan(sde, ts, form, psi, _rows(weights(order)), name, grid, corrector=c_c, keep_z=keep_z)

    return build


def _weights(sde: Schedule, ts: Array, i: int, degree: int, u: Clock, form: Form, tau: float, most: float, ahead: bool) -> Array:
    """Return the weights of step i, newest node first, of the highest degree up to `degree` that does not run away."""
    while True:
        nodes = ts[i + int(ahead) - np.arange(degree + 1)]
        c: Array = lagrange_integrals(sde, u, form, nodes[None], ts[i : i + 1], ts[i + 1 : i + 2], tau=tau)[0]
        if degree == 0 or np.abs(c).sum() <= most * _EVEN[degree] * np.abs(c.sum()):
            return c
        degree -= 1


def _rows(steps: list[Array]) -> Array:
    """Return weights of different degrees as one table."""
    return np.stack([np.pad(c, (0, max(map(len, steps)) - len(c))) for c in steps])


def _in_data(sde: Schedule, ts: Array, steps: list[Array], name: str, grid: str) -> Plan:
    """Return the plan from alpha = 0 whose later steps have the weights `steps` of eps, in terms of the predicted x_0."""
    alpha, sigma, n = sde.alpha(ts), sde.sigma(ts), len(ts) - 1
    # The weights of p_0, p_1, ... in x_i = sigma_i / sigma_0 x_T + ... and in eps_i.
    x, eps = np.zeros((n + 1, n)), np.zeros((n, n))
    x[1, 0] = alpha[1]
    for i, c in enumerate([np.ones(1), *steps]):
        eps[i] = x[i] / sigma[i]
        eps[i, i] -= alpha[i] / sigma[i]
        if i > 0:
            x[i + 1] = alpha[i + 1] / alpha[i] * x[i] + c @ eps[i - np.arange(len(c))]
    psi = sigma[1:] / sigma[:-1]
    by_row = x[1:] - psi[:, None] * x[:-1]
    place: Indices = np.arange(n)[:, None] - np.arange(n)
    newest_first = np.where(place >= 0, np.take_along_axis(by_row, np.maximum(place, 0), axis=1), 0.0)
    return multistep_plan(sde, ts, "data", psi, newest_first, name, grid)
