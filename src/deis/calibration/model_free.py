"""A grid that needs no model."""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..backends.numpy import combine
from ..grids import continuous_grid, distinct_times
from ..machine import run_rows
from ..methods import make_plan
from ..methods.layout import Builder
from ..plan import Plan
from ..sde import Schedule
from .table import Table

_GREATEST_RHO = 1e3  # where alpha is 0, the prediction of x_0 errs by no more than the size of the data


def model_free_grid(sde: Schedule, method: str | Builder, num_step: int, power: float = 1.0) -> Array:
    r"""Return times that minimise a bound of the global error, without any model (Xue et al., CVPR 2024, arXiv 2402.17376).

    The final state is a sum of x_T and the predictions p_i, with the weights W_i of the plan. If x_0 is predicted to within
    rho^power, the final error is at most sum_i |W_i| rho(t_i)^power, with rho^(power - 1) in the eps form. This bound is minimised
    over the inner times.

    Parameters
    ----------
    power : float
        1 for pixels and 2 for latents in the paper.
    """
    from scipy.optimize import minimize

    dense = continuous_grid(sde, 256, "vp_t", 2.0)
    place = np.linspace(0, 1, len(dense))

    def times(z: Array) -> Array:
        """Return the times whose increments along the dense grid are in the ratio exp(z): they stay in order."""
        inner = np.cumsum(np.exp(z - z.max()))
        ts = np.append(np.interp(np.append(0.0, inner[:-1] / inner[-1]), place, dense), dense[-1])
        return ts if sde.num_times is None else distinct_times(ts, sde)

    def bound(z: Array) -> float:
        plan = make_plan(sde, method, ts=times(z))
        rho = np.minimum(sde.rho(plan.t[:-1]), _GREATEST_RHO)
        return float(np.abs(end_weights(plan)) @ rho ** (power - (plan.form == "eps")))

    step = 1e-3 if sde.num_times is None else 0.1
    found = minimize(bound, np.zeros(num_step), method="SLSQP", bounds=[(-3, 3)] * num_step, options={"maxiter": 50, "eps": step})
    return times(found.x)


def end_weights(plan: Plan) -> Array:
    """Return the weight W_i of each prediction in the final state, shape (n,)."""
    unit = np.eye(len(plan.rows))
    return run_rows(Table.of(plan).rows, lambda i, x: unit[i], combine, np.zeros(len(unit)))
