"""The registry, the options of builders, budgets, and what the general exponential Adams method refuses or converts."""

from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

import deis
from deis.methods.clocks import CLOCKS
from deis.methods.registry import REGISTRY

from .oracle import FEW_STEPS, gaussian, two_modes
from .test_coefficients import EVERY

SDE = deis.VPSDE.linear()
X_T = np.linspace(-2, 2, 6).reshape(3, 2)
NAMES = [entry.name.replace("<q>", "2").replace("<tableau>", "3kutta") for entry in REGISTRY]


def count(plan: deis.Plan) -> int:
    calls: list[int] = []

    def model(x: Any, t: Any) -> Any:
        calls.append(1)
        return 0.1 * x

    deis.sample(plan, model, X_T, rng=np.random.default_rng(0))
    return len(calls)


@FEW_STEPS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sde", [SDE, deis.EDM(sampling_eps=0.0)], ids=lambda s: s.name)
def test_every_name_meets_every_budget(name: str, sde: deis.Schedule) -> None:
    for nfe in range(1, 14):
        plan = deis.make_plan(sde, name, nfe=nfe)
        assert plan.nfe == count(plan) == nfe
        saved = deis.make_plan(sde, name, nfe=nfe, afs=0.5)
        assert saved.nfe == count(saved) == nfe
        assert len(saved.rows) >= len(plan.rows) + 1


@FEW_STEPS
@pytest.mark.parametrize("name", NAMES)
def test_every_name_survives_a_file_and_prints(name: str, tmp_path: Any) -> None:
    plan = deis.make_plan(SDE, name, 4, afs=0.5)
    plan.save(tmp_path / "plan.json")
    assert deis.load_plan(tmp_path / "plan.json") == plan
    assert "no call" in repr(plan)
    assert plan.method in repr(plan)


def test_hyphens_are_underscores() -> None:
    assert deis.make_plan(SDE, "deis-abm", 5) == deis.make_plan(SDE, "deis_abm", 5)
    assert deis.make_plan(SDE, "deis-abm", 5).method == "deis_abm2"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "tab3", "nfe": 0}, "nfe=0 must be a whole number of at least 1"),
        ({"method": "tab3", "nfe": 2.5}, "nfe=2.5"),
        ({"method": "dpm_solver_3", "nfe": 7, "num_step": 7}, "num_step asks for 7 steps, nfe asks for 3 steps"),
        ({"method": "tab3", "nfe": 7, "ts": [1.0, 0.5, 0.1]}, "nfe asks for 7 steps, ts or sigmas asks for 2 steps"),
        ({"method": lambda s, ts, g: deis.make_plan(s, "rhork_2heun", ts=ts), "nfe": 5}, "nfe=5 cannot be met"),
        ({"method": "tab3", "afs": 0.0}, "afs=0.0"),
        ({"method": "tab3", "eta": 1.0}, r"'tab3' does not take the options \['eta'\]"),
        ({"method": deis.adams(), "tau": 1.0}, "give them to the builder"),
        ({"method": "lms0"}, "lms0"),
        ({"method": "ipndm5"}, "ipndm5"),
        ({"method": "unipc0"}, "unipc0"),
        ({"method": "unipc0_bh2"}, "unipc0_bh2"),
    ],
)
def test_bad_budgets_and_options_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deis.make_plan(SDE, **arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"order": -1}, "order=-1"),
        ({"order": 1.5}, "order=1.5"),
        ({"corrector": -2}, "corrector=-2"),
        ({"form": "score"}, "form='score'"),
        ({"clock": "u"}, "'arctan_rho'"),
        ({"tau": float("nan")}, "tau="),
    ],
)
def test_bad_arguments_of_adams_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deis.make_plan(SDE, deis.adams(**arguments), 5)


@pytest.mark.parametrize(
    "clock", [lambda t: (t - 0.5) ** 2, lambda t: 0 * t, lambda t: np.where(t > 0.5, np.nan, t), lambda t: t[:2]]
)
def test_a_clock_that_is_not_monotone_on_the_grid_is_refused(clock: Any) -> None:
    with pytest.raises(ValueError, match="not monotone on the grid"):
        deis.make_plan(SDE, deis.adams(clock=clock), 5)


def test_a_clock_that_turns_between_the_times_of_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="not monotone on the grid"):
        deis.make_plan(SDE, deis.adams(clock=lambda t: t + 0.2 * np.sin(8 * np.pi * t)), ts=[1.0, 0.75, 0.5, 0.25, 0.125])


def test_any_monotone_clock_is_taken() -> None:
    """A function of t; and the polynomial is the same in u, -u and 3 u + 1."""
    plan = deis.make_plan(SDE, deis.adams(clock=lambda t: t, name="tab3"), 7)
    named = deis.make_plan(SDE, "tab3", 7)
    for clock in (lambda t: t, lambda t: -t, lambda t: 3 * t + 1):
        plan = deis.make_plan(SDE, deis.adams(clock=clock), 7)
        np.testing.assert_allclose(plan.keep_p, named.keep_p, rtol=1e-9, atol=1e-12)
    by_rho = deis.make_plan(SDE, deis.adams(clock=SDE.log_rho, order=2), 7)
    np.testing.assert_allclose(by_rho.keep_p, deis.make_plan(SDE, "dpm_solver_3m", 7).keep_p, rtol=1e-9, atol=1e-12)


def test_an_order_that_the_steps_cannot_carry_is_lowered() -> None:
    """The documented conversion: step i has degree min(order, i)."""
    for name in ("tab3", "dpmpp_3m", "ipndm4", "unipc3", "deis_abm"):
        plan = deis.make_plan(SDE, name, 1)
        np.testing.assert_allclose(plan.keep_p + plan.next_p, deis.make_plan(SDE, "ddim" if plan.form == "eps" else DATA, 1).keep_p)
    assert deis.make_plan(SDE, "tab7", 3).window == 3
    last = deis.make_plan(SDE, "tab3", 8, lower_order_final=True).keep_p
    assert [int((row != 0).sum()) for row in last] == [1, 2, 3, 4, 4, 3, 2, 1]


DATA = deis.adams("data", "t", 0)


@pytest.mark.parametrize(
    "name", ["dpmpp_2m", "dpmpp_3m", "rhoab2", "lms4", "unipc2", "unipc3_bh2", "dpmpp_2m_published", "sa_solver"]
)
def test_flow_matching_runs_from_alpha_zero_to_sigma_zero(name: str) -> None:
    """Where a clock is infinite its node is left out, and the solution still converges; the last step ends on x_0 itself."""
    sde = deis.FlowMatching()

    def velocity(x: Any, t: Any) -> Any:
        t = t[:, None]
        x_0 = 0.7 + (1 - t) * 0.25 * (x - (1 - t) * 0.7) / (((1 - t) * 0.5) ** 2 + t**2)
        return (x - x_0) / np.where(t > 0, t, 1)

    error = []
    for n in (20, 80):
        options: dict[str, Any] = {"tau": 0.0} if name == "sa_solver" else {}
        plan = deis.make_plan(sde, name, n, "t", 1.5, **options)
        error.append(np.abs(deis.sample(plan, velocity, X_T, predicts="flow") - (0.7 + 0.5 * X_T)).max())
    assert error[1] < min(error[0] / 4, 0.03)


@settings(max_examples=60, deadline=None)
@given(
    inner=st.lists(st.floats(0.02, 0.98), min_size=1, max_size=12, unique_by=lambda t: round(t, 3)),
    form=st.sampled_from(["eps", "data"]),
    clock=st.sampled_from(list(CLOCKS)),
    order=st.integers(0, 4),
    corrector=st.none() | st.integers(0, 4),
    tau=st.sampled_from([0.0, 0.3, 1.0]),
    final=st.booleans(),
    sde=st.sampled_from([s for s in EVERY if s.num_times is None]),
)
def test_every_exponential_adams_plan_carries_constants_exactly(
    inner: list[float],
    form: Literal["eps", "data"],
    clock: str,
    order: int,
    corrector: int | None,
    tau: float,
    final: bool,
    sde: deis.Schedule,
) -> None:
    """A plan refuses itself where it does not, so that building it is the test; on any grid, clock, form, order and noise."""
    if form == "eps" and (tau or sde.alpha(sde.t_start) == 0):
        return
    ts = np.concatenate([[sde.t_start], sde.t_end + (sde.t_start - sde.t_end) * np.sort(inner)[::-1], [sde.t_end]])
    with mock.patch("deis.methods.noise.WARN", np.inf):  # noise that extrapolation multiplies is another matter
        plan = deis.make_plan(sde, deis.adams(form, clock, order, corrector, final, tau=tau), ts=ts)
    assert plan.nfe == len(ts) - 1
    assert plan.window <= min(plan.nfe, max(order, corrector or 0) + 1)


# --- the analytical first step, and score normalisation ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "tab3", "dpmpp_2m", "unipc2", "ipndm3", "dpm_solver_2", "unipc2_bh2"])
def test_the_analytical_first_step_is_exact_for_gaussian_data(name: str) -> None:
    """Data of N(0, c^2): the estimate is the network's own prediction, and the sample the same with one evaluation less."""
    c = 0.5
    eps = gaussian(SDE, 0.0, c)[0]
    plain, saved = deis.make_plan(SDE, name, 6), deis.make_plan(SDE, name, 6, afs=c)
    assert saved.nfe == plain.nfe - 1
    np.testing.assert_allclose(deis.sample(saved, eps, X_T), deis.sample(plain, eps, X_T), rtol=1e-10)
    assert "analytical first step" in saved.method


def test_the_analytical_first_step_on_torch_and_jax_and_from_alpha_zero() -> None:
    import jax.numpy as jnp

    plan = deis.make_plan(SDE, "tab2", 5, afs=0.5)
    expected = deis.sample(plan, lambda x, t: 0.3 * x, X_T)
    np.testing.assert_allclose(deis.sample(plan, lambda x, t: 0.3 * x, torch.tensor(X_T)), expected, rtol=1e-12)
    np.testing.assert_allclose(deis.sample(plan, lambda x, t: 0.3 * x, jnp.asarray(X_T)), expected, rtol=1e-4, atol=1e-5)
    flow = deis.make_plan(deis.FlowMatching(), "tab2", 5, afs=0.5)
    assert flow.guess[0] == 0  # at alpha = 0 the estimate of x_0 is the mean of the data
    # A network that predicts eps, which says nothing of x_0 at alpha = 0, is not asked there.
    assert np.isfinite(deis.sample(flow, lambda x, t: 0.3 * x, X_T)).all()


@pytest.mark.parametrize("name", ["tab3", "dpmpp_2m", "unipc2", "ipndm3", "dpmpp_2m_published", "unipc3_bh2", "deis_abm"])
def test_a_constant_norm_changes_nothing(name: str) -> None:
    plain, normed = deis.make_plan(SDE, name, 7), deis.make_plan(SDE, name, 7, norm=lambda t: 0 * t + 3.0)
    for column in ("keep_x", "keep_p", "next_p"):
        np.testing.assert_allclose(getattr(normed, column), getattr(plain, column), rtol=1e-12, atol=1e-14)
    assert normed.fitted
    assert not plain.fitted


@pytest.mark.parametrize("name", ["tab2", "rhoab1", "dpm_solver_2m", "ipndm2", "deis_abm1"])
def test_predictions_in_proportion_to_the_norm_are_integrated_exactly(name: str) -> None:
    """eps = c(t) eps_0 with constant eps_0: one step after another is exact, as it is for constant eps without a norm."""

    def c(t: Any) -> Any:
        return 1 + np.sin(3 * t)

    plan = deis.make_plan(SDE, name, 14, norm=c)
    x = np.zeros((1, 1))
    x_0 = deis.sample(plan, lambda x, t: c(t)[:, None] + 0 * x, x)
    rho = SDE.rho(plan.ts)
    exact = SDE.alpha(plan.ts[-1]) * quad(lambda r: c(SDE.t_of_rho(r)), rho[0], rho[-1], limit=400, epsrel=1e-11)[0]
    np.testing.assert_allclose(x_0[0, 0], exact, rtol=1e-8)


def test_the_measured_norm_is_that_of_the_predictions_and_helps() -> None:
    """DEIS-SN: on two modes the norm of eps falls towards t = 0, and the normed plan errs less."""
    eps, solution = two_modes(SDE)
    x_T = np.random.default_rng(0).standard_normal((200, 1))
    denoiser = deis.Denoiser(eps, SDE)
    norm = deis.measure_norm(deis.make_plan(SDE, "tab2", 40), denoiser, x_T)
    assert norm.source == "the mean norm of eps at 40 times"
    np.testing.assert_allclose(norm(np.array([1.0])), np.abs(x_T).mean(), rtol=2e-2)
    exact = solution(np.array([SDE.t_start, SDE.t_end]), x_T[:, 0])[-1]
    plans = (deis.make_plan(SDE, "tab1", 8), deis.make_plan(SDE, "tab1", 8, norm=norm))
    plain, normed = (np.abs(deis.sample(plan, eps, x_T)[:, 0] - exact).mean() for plan in plans)
    assert normed < 0.8 * plain
    with pytest.raises(ValueError, match="measured on predictions of form='eps'"):
        deis.make_plan(SDE, "dpmpp_2m", 8, norm=norm)
    with pytest.raises(ValueError, match="plan has 1 step"):
        deis.measure_norm(deis.make_plan(SDE, "tab2", 1), denoiser, x_T)
    with pytest.raises(ValueError, match="must be positive and finite"):
        deis.measure_norm(deis.make_plan(SDE, "tab2", 4), deis.Denoiser(lambda x, t: 0 * x, SDE), x_T)
