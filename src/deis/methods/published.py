"""Methods whose published update replaces the exact integral of the polynomial by a simpler expression, as they are published.

With h = log rho_i - log rho_{i+1} and psi, c_0 = C_i0 of DDIM in the data form, each is x_{i+1} = psi x_i + c_0 sum_j w_j p_{i-j}
with weights w of sum 1. Libraries ship these; the exact forms (`dpmpp_2m`, `unipc2`, ...) are `adams`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..arguments import flag, one_of, shown
from ..arrays import Array, Indices
from ..plan import Plan
from ..quadrature import Form, Norm
from ..sde import Schedule
from .clocks import CLOCKS
from .layout import Builder, laid_out, multistep_plan
from .noise import check_noise
from .norms import fitted_to, normed
from .step import check_eta, check_tau, first_order, rises, step_degrees, transport

Solver = Literal["midpoint", "heun"]
_SOLVERS = ("midpoint", "heun")


def dpm_multistep(
    *,
    form: Form,
    order: Literal[1, 2, 3],
    solver: Solver = "midpoint",
    lower_order_final: bool = False,
    euler_at_final: bool = False,
    tau: float = 0.0,
    eta: float | None = None,
    norm: Norm | None = None,
) -> Builder:
    """Return the published multistep DPM-Solver (Lu et al., arXiv 2206.00927) or DPM-Solver++ (arXiv 2211.01095, appendix B).

    Order 2 is psi x + c_0 [(1 + s/r) p_0 - s/r p_1], r = h_{i-1} / h_i. With the solver "midpoint" s is 1/2; with "heun" it is
    phi_2 / phi_1, the exact integral. Order 3 adds divided differences with the weights phi_2 and phi_3, where the exact integral
    has phi_2 and 2 phi_3. So it converges at order 2. Its second step and any lowered step are those of order 2.

    With tau = 1 these are SDE-DPM-Solver and SDE-DPM-Solver++. The former doubles c_0 and adds noise of variance alpha_{i+1}^2
    (rho_i^2 - rho_{i+1}^2). This is right only for short steps, and so the plan must end with some noise. `euler_at_final` lowers
    the last step to order 1; `lower_order_final` also lowers the step before it to order 2. eta is tau^2, as in k-diffusion.

    Raises
    ------
    ValueError
        If the solver is unknown; and, when a plan is built, if the eps form with tau > 0 ends at sigma = 0.
    """
    option, given = ("tau", tau) if eta is None else ("eta", eta)
    if eta is not None and tau != 0:
        raise ValueError(f"tau={shown(tau)} and eta={shown(eta)} both set the rate of the noise, eta = tau^2; leave one out")
    tau = check_tau(tau) if eta is None else math.sqrt(check_eta(eta))
    flag("lower_order_final", lower_order_final)
    one_of("solver", solver, _SOLVERS)
    name = _dpm_name(form, f"{order}m", tau)

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        psi, c_0, keep_z, power = _dpm_step(sde, ts, form, tau, name)
        degrees = step_degrees(sde, ts, order - 1, CLOCKS["log_rho"], form, lower_order_final)
        h = -np.diff(sde.log_rho(ts))
        degrees[~np.isfinite(h)] = 0
        degrees[-1] *= not euler_at_final
        c_p = np.zeros((len(psi), degrees.max() + 1))
        for i, degree in enumerate(degrees.tolist()):
            c_p[i, : degree + 1] = c_0[i] * multistep_weights(power * h[i], h[i - degree : i][::-1] / h[i], solver)
        c_p = normed(sde, ts, form, c_p, norm)
        fitted = fitted_to(norm) or ("the reverse diffusion in short steps" if form == "eps" and tau else "")
        plan = multistep_plan(sde, ts, form, psi, c_p, name, grid, keep_z=keep_z, fitted=fitted)
        return plan if form == "eps" else check_noise(plan, repr(given), option)

    return build


def _dpm_name(form: Form, order: str, tau: float) -> str:
    return f"{'sde_' if tau else ''}{'dpm_solver' if form == 'eps' else 'dpmpp'}_{order}_published"


def _dpm_step(sde: Schedule, ts: Array, form: Form, tau: float, name: str) -> tuple[Array, Array, Array, float]:
    """Return psi, c_0 and the factor of the noise for each step, and the power of e^h whose integrals weight the differences."""
    if form == "data":
        _, psi, c_0 = first_order(sde, ts, form, tau)
        return psi, c_0, transport(sde, ts, form, tau)[1], -(1 + tau**2)
    _, psi, c_0 = first_order(sde, ts, form)
    rho = sde.rho(ts)
    if tau and rho[-1] == 0:
        raise ValueError(
            f"{name!r} adds noise in its last step, and cannot end at sigma = 0; end at the smallest noise of the schedule"
        )
    fall = (rho[:-1] - rho[1:]) * (rho[:-1] + rho[1:])
    keep_z = tau * sde.alpha(ts[1:]) * np.sqrt(fall) if tau else np.zeros_like(psi)
    return psi, (1 + tau**2) * c_0, keep_z, 1.0


def _shares(k: float) -> tuple[float, float]:
    """Return phi_2 / phi_1 and phi_3 / phi_1 of e^k: the weights of the differences, as shares of c_0."""
    phi_1 = np.expm1(k)
    return (phi_1 / k - 1) / phi_1, ((phi_1 - k) / k**2 - 0.5) / phi_1


def multistep_weights(k: float, r: Array, solver: Solver) -> Array:
    """Return the weights of the newest len(r) + 1 predictions, which lie r = (h_{i-1}, h_{i-2}) / h_i apart."""
    if len(r) == 0:
        return np.ones(1)
    phi_2, phi_3 = _shares(k)
    if len(r) == 1:
        share = (0.5 if solver == "midpoint" else phi_2) / r[0]
        return np.array([1 + share, -share])
    newer, older = np.array([1.0, -1.0, 0.0]) / r[0], np.array([0.0, 1.0, -1.0]) / r[1]
    second = (newer - older) / (r[0] + r[1])
    first = newer + r[0] * second
    return np.array([1.0, 0.0, 0.0]) + phi_2 * first + phi_3 * second


@dataclass(frozen=True)
class GridStages:
    """The published singlestep DPM-Solver and DPM-Solver++ whose stages lie at the grid's own times: one evaluation per time.

    A step of order k goes from t_i to t_{i+k}. Its stages are the steps of order 1, ..., k - 1 from the same state to the times
    in between; the exact forms (`dpm_solver_2`, `dpmpp_2s`, ...) place their stages themselves. The last times are reached by
    steps of lower order if the end is at sigma = 0, if the number of times requires it, or with `lower_order_final`.

    Attributes
    ----------
    form : {"eps", "data"}
    order : {2, 3}
    solver : {"midpoint", "heun"}
    lower_order_final : bool
    skipped : int
        The number of evaluations left out at the beginning. The steps lie where they would lie with these, and a step whose
        beginning is missing starts from the first time, with the predictions available.
    """

    form: Form
    order: Literal[2, 3]
    solver: Solver = "midpoint"
    lower_order_final: bool = False
    skipped: int = 0

    def __post_init__(self) -> None:
        one_of("solver", self.solver, _SOLVERS)

    @property
    def name(self) -> str:
        """The name of the method."""
        return _dpm_name(self.form, f"{self.order}s", 0.0)

    def __call__(self, sde: Schedule, ts: Array, grid: str) -> Plan:
        """Build the plan of a grid."""
        log_rho, scale = sde.log_rho(ts), sde.alpha(ts) if self.form == "eps" else sde.sigma(ts)
        infinite = np.isposinf(log_rho) | (np.isinf(log_rho) & rises(ts))
        if infinite.any():
            raise ValueError(
                f"{self.name!r} has stages in log rho, which is infinite at t={ts[infinite][0].item()!r}; use a multistep method"
            )
        orders = self._orders(len(ts) - 1, bool(np.isneginf(log_rho[-1])))
        accepts = np.append(orders[1:] == 1, True)
        n = len(orders)
        keep_x, next_x, keep_p, next_p = np.ones(n), np.ones(n), np.zeros((n, self.order)), np.zeros((n, self.order))
        for i, order in enumerate(orders.tolist()):
            base = i - order + 1
            c_0 = first_order(sde, ts[[base, i + 1]], self.form)[2]
            weights = c_0 * self._weights(log_rho[base] - log_rho[base : i + 2])
            c_x, c_p = (keep_x, keep_p) if accepts[i] else (next_x, next_p)
            c_x[i], c_p[i, :order] = scale[i + 1] / scale[base], weights
        columns = {"keep_x": keep_x, "keep_p": keep_p, "next_x": next_x, "next_p": next_p, "accepts": accepts}
        return laid_out(sde, ts, columns, form=self.form, method=self.name, grid=grid)

    def _orders(self, n: int, clean: bool) -> Indices:
        """Return the order of the step that ends at each time after the first."""
        whole = n + self.skipped
        orders = np.arange(whole) % self.order + 1
        if whole % self.order == 0 and (clean or self.lower_order_final):
            orders[-1] = 1
            orders[-2] = min(orders[-2], max(self.order - 1, 1))
        if clean:
            orders[-1] = 1
        return np.minimum(orders[self.skipped :], np.arange(n) + 1)

    def _weights(self, h: Array) -> Array:
        """Return the weights of the predictions, newest first, as shares of c_0; h is the fall of log rho from base to each t."""
        if len(h) == 2:
            return np.ones(1)
        phi_2, phi_3 = _shares(h[-1] if self.form == "eps" else -h[-1])
        r = h[1:-1] / h[-1]
        if len(h) == 3:
            share = (0.5 if self.solver == "midpoint" else phi_2) / r[0]
            return np.array([share, 1 - share])
        newest = np.array([1.0, 0.0, -1.0]) / r[1]
        base = np.array([0.0, 0.0, 1.0])
        if self.solver == "midpoint":
            return base + phi_2 * newest
        middle = np.array([0.0, 1.0, -1.0]) / r[0]
        return base + (phi_2 * (r[1] * middle - r[0] * newest) + 2 * phi_3 * (newest - middle)) / (r[1] - r[0])


def unipc(order: int, solver: Literal["bh1", "bh2"], *, lower_order_final: bool = False, norm: Norm | None = None) -> Builder:
    """Return the published UniPC with B(h) = h (bh1) or e^h - 1 (bh2), data form (Zhao et al., arXiv 2302.04867, algorithms 5-8).

    Whatever B(h) is, its linear systems are solved by the exact weights. The exception is a single difference, which gets the
    weight 1/2: in the predictor with two nodes and in the corrector of the first step.

    Raises
    ------
    ValueError
        If order is less than 1.
    """
    if order < 1:
        raise ValueError(f"method='unipc{order}_{solver}' is unknown: unipc has the orders 1, 2, ...")
    flag("lower_order_final", lower_order_final)

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        form, psi, c_0 = first_order(sde, ts, "data")
        degrees = step_degrees(sde, ts, order - 1, CLOCKS["log_rho"], form, lower_order_final)
        log_rho = sde.log_rho(ts)
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
        c_p = normed(sde, ts, form, c_p[:, : len(psi)], norm)
        c_c = normed(sde, ts, form, c_c, norm, ahead=True)
        return multistep_plan(sde, ts, form, psi, c_p, f"unipc{order}_{solver}", grid, corrector=c_c, fitted=fitted_to(norm))

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
