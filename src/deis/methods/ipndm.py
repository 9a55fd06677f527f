"""iPNDM: the classical Adams-Bashforth weights of equal steps on the DDIM step, whatever the grid."""

from __future__ import annotations

import numpy as np

from ..arguments import whole
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
    """Return iPNDM of `order` predictions, 1 to 4 (arXiv 2204.13902, appendix; the iPNDM of Liu et al., arXiv 2202.09778).

    x_{i+1} = psi_i x_i + C_i0 sum_j b_j p_{i-j}, where psi and C_i0 are those of DDIM and b the Adams-Bashforth weights of the
    predictions that there are. The DDIM step exists for every schedule, and so does this.

    Raises
    ------
    ValueError
        Where order is not 1, 2, 3 or 4.
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
