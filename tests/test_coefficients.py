"""Coefficients against mpmath, and the identities that they obey."""

from typing import Literal

import numpy as np
import pytest
from scipy.integrate import quad

import deis
from deis.methods.clocks import CLOCKS

from .oracle import exact_cosine, exact_linear, exact_weights

SCHEDULES = {
    "linear": (deis.VPSDE.linear(0.1, 20.0), exact_linear(0.1, 20.0)),
    "linear, small beta_0": (deis.VPSDE.linear(0.01, 20.0), exact_linear(0.01, 20.0)),
    "cosine": (deis.VPSDE.cosine(), exact_cosine()),
}
EVERY = [
    deis.VPSDE.linear(),
    deis.VPSDE.cosine(),
    deis.VPSDE.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
    deis.SubVPSDE.linear(),
    deis.VESDE(),
    deis.EDM(),
    deis.FlowMatching(),
]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("order", "phase", "num_step"), [(0, "log", 3), (1, "t", 100), (2, "rho", 10), (3, "t", 10), (5, "t", 6)])
def test_weights_agree_with_mpmath_at_40_digits(name: str, order: int, phase: str, num_step: int) -> None:
    sde, exact = SCHEDULES[name]
    plan = deis.make_plan(sde, f"tab{order}", num_step, ts_phase=phase)
    for i in {0, min(order, num_step - 1), num_step // 2, num_step - 1}:
        used = min(i, order) + 1
        weights = exact_weights(exact, plan.t[i - np.arange(used)].tolist(), plan.t[i], plan.t[i + 1], "t")
        error = max(abs(float(w - c)) for w, c in zip(weights, plan.keep_p[i].tolist(), strict=False))
        assert error <= 1e-12 * float(max(map(abs, weights)))


def test_rhoab_weights_agree_with_mpmath() -> None:
    sde, exact = SCHEDULES["linear"]
    plan = deis.make_plan(sde, "rhoab3", 8)
    weights = exact_weights(exact, plan.t[5 - np.arange(4)].tolist(), plan.t[5], plan.t[6], "rho")
    assert (
        max(abs(float(w - c)) for w, c in zip(weights, plan.keep_p[5].tolist(), strict=True)) < 1e-12 * np.abs(plan.keep_p[5]).max()
    )


@pytest.mark.parametrize("sde", EVERY, ids=lambda s: s.name)
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_weights_sum_to_the_ddim_weight(sde: deis.Schedule, order: int) -> None:
    for num_step in (3, 10, 100):
        tab = deis.make_plan(sde, f"tab{order}", num_step)
        alpha, sigma = tab.alpha, tab.sigma
        if tab.form == "eps":
            ddim = sigma[1:] - alpha[1:] / alpha[:-1] * sigma[:-1]
        else:
            ddim = alpha[1:] - sigma[1:] / sigma[:-1] * alpha[:-1]
        assert np.all(np.abs(tab.keep_p.sum(axis=1) - ddim) <= 1e-13 * np.abs(tab.keep_p).max(axis=1) + 4e-16)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("form", ["eps", "data"])
@pytest.mark.parametrize("order", [0, 1, 2, 4, 7])
def test_polynomials_in_the_clock_are_integrated_exactly(clock: str, form: Literal["eps", "data"], order: int) -> None:
    """The order conditions: p = u^m for m <= order, against adaptive quadrature of the integral itself."""
    sde = deis.VPSDE.linear()
    ts = deis.make_grid(sde, 24)
    c_p = deis.make_plan(sde, deis.adams(form, clock, order), ts=ts).keep_p
    i = 19
    nodes = ts[i - np.arange(order + 1)]
    scale = np.abs(CLOCKS[clock](sde, nodes, sde.log_rho(nodes))).max()

    def u(t: np.ndarray) -> np.ndarray:
        return CLOCKS[clock](sde, t, sde.log_rho(t)) / scale

    for m in range(order + 1):
        if form == "eps":
            rho = sde.rho(ts[i : i + 2])
            value = quad(lambda r, m=m: u(sde.t_of_rho(r)) ** m, rho[0], rho[1], epsabs=0, epsrel=1e-13)[0] * sde.alpha(ts[i + 1])
        else:
            y = 1 / sde.rho(ts[i : i + 2])
            value = quad(lambda r, m=m: u(sde.t_of_rho(1 / r)) ** m, y[0], y[1], epsabs=0, epsrel=1e-13)[0] * sde.sigma(ts[i + 1])
        assert abs(c_p[i] @ u(nodes) ** m - value) < 1e-12 * np.abs(c_p[i]).max()


@pytest.mark.parametrize("sde", EVERY[:-1], ids=lambda s: s.name)
def test_order_zero_is_ddim_in_every_clock(sde: deis.Schedule) -> None:
    plans = [deis.make_plan(sde, name, 7) for name in ("ddim", "tab0", "rhoab0", "ipndm1", "rhork_1euler")]
    plans += [deis.make_plan(sde, deis.adams("eps", clock, 0), 7) for clock in CLOCKS]
    alpha, sigma = plans[0].alpha, plans[0].sigma
    for plan in plans:
        np.testing.assert_allclose(plan.keep_x, alpha[1:] / alpha[:-1], rtol=1e-13)
        np.testing.assert_allclose(plan.keep_p[:, 0], sigma[1:] - plan.keep_x * sigma[:-1], rtol=1e-11, atol=1e-14)


def test_the_two_forms_of_ddim_are_one_update() -> None:
    """x0 = (x - sigma eps) / alpha turns one into the other, in every clock."""
    sde = deis.VPSDE.linear()
    for clock in CLOCKS:
        eps, data = (deis.make_plan(sde, deis.adams(form, clock, 0), 9) for form in ("eps", "data"))
        alpha, sigma = eps.alpha[:-1], eps.sigma[:-1]
        np.testing.assert_allclose(data.keep_x + data.keep_p[:, 0] / alpha, eps.keep_x, rtol=1e-12)
        np.testing.assert_allclose(-data.keep_p[:, 0] * sigma / alpha, eps.keep_p[:, 0], rtol=1e-12)


def test_flow_matching_ddim_is_euler_on_the_velocity() -> None:
    plan = deis.make_plan(deis.FlowMatching(), "ddim", ts=[1.0, 0.7, 0.2, 0.0])
    assert plan.form == "data"
    x, v = 0.3, -1.1
    for i in range(3):
        t, s = plan.t[i], plan.t[i + 1]
        np.testing.assert_allclose(plan.keep_x[i] * x + plan.keep_p[i, 0] * (x - t * v), x + (s - t) * v, rtol=1e-13)


def test_ab_on_even_rho_has_the_classical_adams_bashforth_weights() -> None:
    plan = deis.make_plan(deis.EDM(), "rhoab3", 8, ts_phase="rho", ts_order=1)
    h = plan.t[1] - plan.t[0]
    np.testing.assert_allclose(plan.keep_p[4] / h, np.array([55, -59, 37, -9]) / 24, rtol=1e-10)


def test_discrete_weights_are_exact_across_the_kinks_of_the_table() -> None:
    """alpha is piecewise linear in t: integrate piece by piece and compare."""
    sde = deis.VPSDE.discrete(np.cumprod(1 - np.linspace(1e-4, 0.2, 40)))
    plan = deis.make_plan(sde, "tab2", 6)
    i, nodes = 3, plan.t[[3, 2, 1]]
    knots = np.arange(plan.t[i + 1], plan.t[i] + 1)[::-1]
    for j in range(3):
        others = [m for m in range(3) if m != j]

        def basis(rho: float, j: int = j, others: list[int] = others) -> float:
            t = float(sde.t_of_rho(rho))
            return float(np.prod([(t - nodes[m]) / (nodes[j] - nodes[m]) for m in others]))

        pieces = [quad(basis, *sde.rho(knots[k : k + 2]), epsabs=0, epsrel=1e-12)[0] for k in range(len(knots) - 1)]
        np.testing.assert_allclose(plan.keep_p[i, j], sde.alpha(plan.t[i + 1]) * sum(pieces), rtol=1e-10)
