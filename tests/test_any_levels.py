"""Exponential Adams on levels that another program laid: the method itself, from alpha = 0, and where a step is too long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import deis
from deis.methods.any_levels import adams_on_any_levels
from deis.methods.noise import noise_left

MEAN, DEVIATION = np.array([0.5, -1.0, 2.0]), np.array([0.3, 1.0, 0.1])


def x_0(x: Any, alpha: float, sigma: float) -> Any:
    """Return the mean of x_0 for Gaussian data."""
    return MEAN + alpha * DEVIATION**2 / ((alpha * DEVIATION) ** 2 + sigma**2) * (x - alpha * MEAN)


def end(plan: deis.Plan, x: Any) -> Any:
    """Return the end of a plan for flow matching."""
    model = deis.Denoiser(lambda x, t: x_0(x, 1 - t[0], t[0]), deis.FlowMatching(), "x0")
    return deis.sample(plan, model, x)


@pytest.mark.parametrize(
    ("form", "clock", "order", "corrector"), [("eps", "t", 3, None), ("data", "log_rho", 1, 2), ("data", "t", 2, 3)]
)
def test_it_is_adams_on_even_levels(form: Any, clock: str, order: int, corrector: int | None) -> None:
    sde = deis.VPSDE.linear()
    for most in (5.0, 2.0):
        build = adams_on_any_levels(form, clock, order, corrector, most=most, name="x")
        plan = deis.make_plan(sde, build, 8, "log")
        same = deis.make_plan(sde, deis.adams(form, clock, order, corrector, name="x"), 8, "log")
        for name in ("keep_x", "keep_p", "next_p", "t"):
            np.testing.assert_allclose(getattr(plan, name), getattr(same, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("clock", ["t", "rho", "arctan_rho"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_from_alpha_0_it_is_the_limit_of_the_eps_form(clock: str, order: int) -> None:
    """Starts at smaller and smaller alpha differ less and less from it, in proportion to alpha."""
    build = adams_on_any_levels("eps", clock, order, most=np.inf, name="x")
    x = np.random.default_rng(0).standard_normal((5, 3))
    ts = np.linspace(1, 0, 8)
    plan = deis.make_plan(deis.FlowMatching(), build, ts=ts)
    assert (plan.form, plan.nfe) == ("data", 7)
    away = []
    for alpha in (1e-4, 1e-5):
        later = deis.make_plan(deis.FlowMatching(), build, ts=np.append(1 - alpha, ts[1:]))
        assert later.form == "eps"
        away.append(np.abs(end(later, (1 - alpha) * x) - end(plan, x)).max())
    # rho of the first node goes to infinity, and in that clock its weights to 0.
    assert away[1] < 0.2 * away[0] < 1e-3


def test_from_alpha_0_it_converges_at_its_order() -> None:
    x = np.random.default_rng(0).standard_normal((5, 3))
    exact = MEAN + DEVIATION * x
    errors = []
    for steps in (40, 80):
        build = adams_on_any_levels("eps", "t", 2, name="x")
        errors.append(np.abs(end(deis.make_plan(deis.FlowMatching(), build, ts=np.linspace(1, 0, steps + 1)), x) - exact).max())
    assert np.log2(errors[0] / errors[1]) > 1.8


def test_a_step_too_long_for_its_nodes_takes_a_lower_degree() -> None:
    ts = [1.0, 0.9999, 0.9998, 0.9997, 0.5, 0.2, 0.05]
    plan = deis.make_plan(deis.VPSDE.linear(), adams_on_any_levels("eps", "t", 3, name="x"), ts=ts)
    np.testing.assert_array_equal(np.count_nonzero(plan.keep_p, axis=1), [1, 2, 3, 1, 2, 3])
    wild = deis.make_plan(deis.VPSDE.linear(), adams_on_any_levels("eps", "t", 3, most=np.inf, name="x"), ts=ts)
    assert np.abs(plan.keep_p).max() < 100 < 1e-4 * np.abs(wild.keep_p).max()


def test_a_corrector_of_eps_is_refused() -> None:
    with pytest.raises(ValueError, match="corrector=2 needs form='data'"):
        adams_on_any_levels("eps", "t", 2, 2, name="x")


def test_noise_is_carried_over_long_steps_at_a_lower_degree() -> None:
    """Where extrapolation over long steps multiplies the noise that was added, adams refuses, and this lowers the degree."""
    sde, ts = deis.FlowMatching(), [1.0, 0.97, 0.86, 0.7, 0.5, 0.35, 0.2, 0.1, 0.02, 0.0009, 0.0]
    short = deis.make_plan(deis.VPSDE.linear(), adams_on_any_levels("data", "log_rho", 1, tau=1.0, name="x"), 40, "log")
    same = deis.make_plan(deis.VPSDE.linear(), "sde_dpmpp_2m", 40, "log")
    for name in ("keep_x", "keep_p", "keep_z"):
        np.testing.assert_allclose(getattr(short, name), getattr(same, name), rtol=1e-12, atol=1e-14)

    def spread(most: float) -> float:
        plan = adams_on_any_levels("data", "log_rho", 1, tau=1.0, most=most, name="x")(sde, np.array(ts), "")
        return max(noise_left(plan, c) for c in (0.25, 1.0))

    assert spread(np.inf) > 2
    assert spread(1.25) < 1.25
    with pytest.raises(ValueError, match=r"tau=1.0 needs form='data'"):
        adams_on_any_levels("eps", "t", 2, tau=1.0, name="x")
