"""iPNDM and its kind: fixed or published weights on the DDIM step, whatever the grid."""

from __future__ import annotations

import numpy as np

from ..arguments import number, whole
from ..arrays import Array
from ..plan import Plan
from ..quadrature import Norm
from ..sde import Schedule
from .layout import Builder, multistep_plan
from .norms import fitted_to, normed
from .step import first_order

ADAMS_BASHFORTH = (
    np.array([1.0]),
    np.array([3.0, -1.0]) / 2,
    np.array([23.0, -16.0, 5.0]) / 12,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24,
)


def ipndm(order: int, *, norm: Norm | None = None) -> Builder:
    """Return iPNDM with `order` predictions, 1 to 4 (arXiv 2204.13902, appendix; the iPNDM of Liu et al., arXiv 2202.09778).

    x_{i+1} = psi_i x_i + C_i0 sum_j b_j p_{i-j}, where psi and C_i0 are those of DDIM and b are the Adams-Bashforth weights for
    the predictions available. The DDIM step exists for every schedule, and so does iPNDM.

    Raises
    ------
    ValueError
        If order is not 1, 2, 3 or 4.
    """
    if whole("order", order) > 4:
        raise ValueError(f"method='ipndm{order}' is unknown: iPNDM has the orders 1, 2, 3 and 4")

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        form, psi, c_0 = first_order(sde, ts, None)
        shares = np.zeros((len(psi), min(order, len(psi))))
        for i in range(len(psi)):
            weights = ADAMS_BASHFORTH[min(i, order - 1)]
            shares[i, : len(weights)] = weights
        c_p = normed(sde, ts, form, c_0[:, None] * shares, norm)
        return multistep_plan(sde, ts, form, psi, c_p, f"ipndm{order}", grid, fitted=fitted_to(norm))

    return build


def ipndm_v(order: int) -> Builder:
    """Return iPNDM with variable steps as published in ComfyUI, with 1 to 4 predictions; its exact form is `lms<q>`.

    It is Newton's polynomial in rho through the newest eps, eps_i + sum_k m_k eps[i, ..., i-k], where m_k should be the mean over
    the step of prod_{j<k} (rho - rho_{i-j}). This holds for m_1, for m_2 on even steps, and never for m_3. At order 4 the oldest
    weight also differs, so that the weights add up to 1 on geometric steps only, and the order of convergence is 2.

    Raises
    ------
    ValueError
        If order is not 1, 2, 3 or 4.
    """
    if whole("order", order) > 4:
        raise ValueError(f"method='ipndm_v{order}' is unknown: iPNDM has the orders 1, 2, 3 and 4")
    fitted = "" if order < 4 else "nothing: weights as published, which add up to 1 on geometric steps only"

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        form, psi, c_0 = first_order(sde, ts, "eps")
        rho = sde.rho(ts)
        shares = np.zeros((len(psi), min(order, len(psi))))
        for i in range(len(psi)):
            size = min(order, i + 1) if 0 < rho[i + 1] < np.inf else 1
            shares[i, :size] = _published_shares(np.diff(rho[i + 1 - size : i + 2])[::-1])
        return multistep_plan(sde, ts, form, psi, c_0[:, None] * shares, f"ipndm_v{order}", grid, fitted=fitted)

    return build


def _published_shares(steps: Array) -> Array:
    """Return ComfyUI's weights of the newest predictions, as shares of the step; `steps` are in rho, newest first."""
    q = np.append(steps[1:] / steps[0], [0.0, 0.0])
    m_3 = 1 / 4 + (2 * q[0] + q[1]) / 3 + q[0] * (q[0] + q[1]) / 2 + (1 + q[0]) / 3 - 1 / 6
    means = (1.0, 1 / 2, (q[0] * (q[0] + q[1]) - 1 / 3) / 2, m_3)
    back = np.append(0.0, np.cumsum(q[: len(steps) - 1]))
    table = np.eye(len(steps))  # divided differences
    shares = means[0] * table[0]
    for k in range(1, len(steps)):
        table = (table[:-1] - table[1:]) / (back[k:] - back[:-k])[:, None]
        shares = shares + means[k] * table[0]
    if len(steps) == 4:
        shares[3] += m_3 / (q[1] * (q[1] + q[2]) * back[3]) * (q[1] / q[2] - q[0] / q[1])
    return shares


def gradient_estimation(gamma: float = 2.0) -> Builder:
    """Return the sampler of Permenter and Yuan (arXiv 2306.04848): DDIM's step along gamma p_i + (1 - gamma) p_{i-1}.

    The first step and a step to sigma = 0 use p_i. gamma = 1 is DDIM. Only gamma = 3/2 has order 2 on smooth grids.

    Raises
    ------
    ValueError
        If gamma is not a finite number.
    """
    gamma = number("gamma", gamma)

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        form, psi, c_0 = first_order(sde, ts, None)
        older = np.full(len(psi), 1 - gamma)
        older[sde.sigma(ts[1:]) == 0] = older[0] = 0.0
        c_p = c_0[:, None] * np.stack([1 - older, older], axis=1)[:, : len(psi)]
        return multistep_plan(sde, ts, form, psi, c_p, f"gradient_estimation(gamma={gamma:g})", grid)

    return build
