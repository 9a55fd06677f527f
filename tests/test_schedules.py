"""Noise schedules: accuracy near t = 0, inverses, functions of every framework, refusals."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf
from numpy.typing import NDArray

import deis
from deis.reference import get_cos_alpha_fns, get_linear_alpha_fns

from .oracle import FEW_STEPS, Array, exact_cosine, exact_linear, gaussian
from .test_coefficients import EVERY


@pytest.mark.parametrize(
    ("sde", "exact"),
    [(deis.VPSDE.linear(), exact_linear(0.1, 20.0)), (deis.VPSDE.cosine(), exact_cosine())],
    ids=["linear", "cosine"],
)
def test_nothing_cancels_near_zero(sde: deis.Schedule, exact: object) -> None:
    for t in (1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.99):
        rho = exact.rho(t)  # type: ignore[attr-defined]
        with mp.workdps(60):
            rho = mp.sqrt(1 / exact.abar(mpf(t)) - 1)  # type: ignore[attr-defined]
        assert abs(float(sde.rho(t) / rho) - 1) < 1e-14
        assert abs(float(sde.t_of_rho(float(rho))) / t - 1) < 1e-14


@given(st.sampled_from(EVERY), st.floats(0, 1))
def test_the_inverse_of_rho_inverts(sde: deis.Schedule, where: float) -> None:
    t = sde.t_end + where * (sde.t_start - sde.t_end)
    if sde.sigma(t) > 0 and sde.alpha(t) > 0 and t > 1e-12:
        assert math.isclose(float(sde.t_of_log_rho(sde.log_rho(t))), t, rel_tol=1e-9, abs_tol=1e-9)


@given(st.sampled_from(EVERY), st.floats(0, 1), st.floats(0, 1))
def test_rho_increases_and_is_sigma_over_alpha(sde: deis.Schedule, a: float, b: float) -> None:
    low, high = (sde.t_end + w * (sde.t_start - sde.t_end) for w in sorted((a, b)))
    assert sde.rho(low) <= sde.rho(high)
    if sde.alpha(low) > 0:
        assert math.isclose(float(sde.rho(low) * sde.alpha(low)), float(sde.sigma(low)), rel_tol=1e-12)


def test_definitions() -> None:
    t = np.array([0.2, 0.6])
    vp, sub, ve, flow = deis.VPSDE.linear(), deis.SubVPSDE.linear(), deis.VESDE(0.01, 50.0), deis.FlowMatching()
    abar = np.exp(-0.1 * t - 9.95 * t**2)
    np.testing.assert_allclose(vp.alpha(t) ** 2, abar, rtol=1e-14)
    np.testing.assert_allclose(vp.sigma(t) ** 2, 1 - abar, rtol=1e-14)
    np.testing.assert_allclose(sub.alpha(t) ** 2, abar, rtol=1e-14)
    np.testing.assert_allclose(sub.sigma(t), 1 - abar, rtol=1e-14)
    np.testing.assert_allclose(ve.sigma(t), 0.01 * 5000**t, rtol=1e-14)
    np.testing.assert_allclose((flow.alpha(t), flow.sigma(t)), (1 - t, t), rtol=1e-15)
    ends = np.array([0.0, 1.0])
    np.testing.assert_array_equal((flow.alpha(ends), flow.sigma(ends)), ([1, 0], [0, 1]))
    np.testing.assert_array_equal(deis.EDM().sigma(t), np.exp(np.log(t)))


def cosine_in(xp: object) -> tuple[object, object]:
    return (
        lambda t: xp.cos(t * (math.pi / 2 * 0.99)) ** 2,  # type: ignore[attr-defined]
        lambda a: xp.arccos(a**0.5) / (math.pi / 2 * 0.99),  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("xp", [np, torch, jnp, math], ids=["numpy", "torch", "jax", "math"])
def test_functions_of_every_framework_give_float64_coefficients(xp: object) -> None:
    if xp is math:
        fns = (lambda t: math.cos(t * (math.pi / 2 * 0.99)) ** 2, lambda a: math.acos(a**0.5) / (math.pi / 2 * 0.99))
    else:
        fns = cosine_in(xp)  # type: ignore[assignment]
    plan = deis.make_plan(deis.VPSDE(*fns, 1e-3, 1.0), "tab3", 8)
    expected = deis.make_plan(deis.VPSDE(*cosine_in(np), 1e-3, 1.0), "tab3", 8)  # type: ignore[arg-type]
    np.testing.assert_allclose(plan.keep_p, expected.keep_p, rtol=1e-9)
    assert jnp.ones(1).dtype == jnp.float32
    assert torch.get_default_dtype() == torch.float32


def test_a_schedule_can_be_made_while_jax_traces() -> None:
    sde = deis.VPSDE(*cosine_in(jnp), 1e-3, 1.0)  # type: ignore[arg-type]

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        return deis.sample(deis.make_plan(sde, "tab2", 4), lambda x, t: 0.1 * x, x)

    assert np.isfinite(run(jnp.ones((2, 3)))).all()


@pytest.mark.parametrize("fns", [get_linear_alpha_fns(0.1, 20.0), get_cos_alpha_fns()], ids=["linear", "cosine"])
def test_alpha_functions_take_every_array(fns: tuple[object, object]) -> None:
    there, back = fns
    t = np.array([0.1, 0.5, 0.9])
    alpha = there(t)  # type: ignore[operator]
    np.testing.assert_allclose(back(alpha), t, rtol=1e-12)  # type: ignore[operator]
    for make in (torch.tensor, jnp.asarray):
        given_t = make(t.astype(np.float32))
        assert type(there(given_t)) is type(given_t)  # type: ignore[operator]
        np.testing.assert_allclose(np.asarray(there(given_t)), alpha, rtol=1e-5)  # type: ignore[operator]
        np.testing.assert_allclose(np.asarray(back(there(given_t))), t, rtol=1e-4)  # type: ignore[operator]
    assert math.isclose(there(0.5), alpha[1])  # type: ignore[operator]


@pytest.mark.parametrize("convert", [np.asarray, np.float32, torch.tensor, jnp.asarray], ids=["np", "f32", "torch", "jax"])
def test_discrete_schedules_take_every_array(convert: object) -> None:
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    sde = deis.VPSDE.discrete(convert(alphas))  # type: ignore[operator]
    assert (sde.t_start, sde.t_end, sde.num_times) == (999, 0, 1000)
    np.testing.assert_allclose(sde.alpha(np.arange(1000)) ** 2, alphas, rtol=1e-6)
    plan = deis.make_plan(sde, "tab3", 10)
    assert plan.discrete
    np.testing.assert_allclose(plan.keep_p, deis.make_plan(deis.VPSDE.discrete(alphas), "tab3", 10).keep_p, rtol=0, atol=2e-4)


@pytest.mark.parametrize("alphas", [[0.9, 0.95], [1.1, 0.5], [0.5, np.nan], [0.5, -0.1], [0.5, 1e-9, 1e-7]])
def test_alphas_that_rise_or_leave_0_1_are_refused(alphas: list[float]) -> None:
    with pytest.raises(ValueError, match=r"alphas_cumprod\[[012]\]"):
        deis.VPSDE.discrete(alphas)


LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def zero_snr(alphas: NDArray[np.floating[Any]]) -> Array:
    """A table shifted and scaled to a terminal signal-to-noise ratio of 0 (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(alphas, dtype=np.float64)
    return np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))


@FEW_STEPS
def test_a_terminal_signal_to_noise_ratio_of_zero_starts_at_alpha_0() -> None:
    sde = deis.VPSDE.discrete(zero_snr(LINEAR))
    assert (sde.t_start, float(sde.alpha(999)), float(sde.rho(999))) == (999, 0, np.inf)
    for method in ("auto", "tab3", "dpmpp_2m", "unipc2", "ddim", "ipndm", "sde_dpmpp_2m"):
        plan = deis.make_plan(sde, method, nfe=8)
        assert (plan.form, plan.alpha[0], plan.nfe) == ("data", 0, 8)
    with pytest.raises(ValueError, match="form='eps' has no meaning where alpha is 0"):
        deis.make_plan(sde, "dpm_solver_2m")


@pytest.mark.parametrize("predicts", ["v", "x0", "flow"])
def test_sampling_from_alpha_0_converges_to_the_gaussians_solution(predicts: str) -> None:
    """At order 2, against the exact solution; at alpha = 0 the noise itself is the state."""
    sde = deis.VPSDE.discrete(zero_snr(LINEAR))
    eps, solution = gaussian(sde)
    x_T = np.array([[-1.5], [0.3], [2.0]])

    def model(x: Array, t: Array) -> Array:
        level = deis.Denoiser(eps, sde).level(float(t[0]))
        x_0 = 0.7 + 0.25 * level.alpha * (x - 0.7 * level.alpha) / ((0.5 * level.alpha) ** 2 + level.sigma**2)
        return {"x0": x_0, "v": level.alpha * eps(x, t) - level.sigma * x_0, "flow": eps(x, t) - x_0}[predicts]

    errors = []
    for steps in (20, 40):
        plan = deis.make_plan(sde, "dpmpp_2m", steps, "vp_t")
        errors.append(np.abs(deis.sample(plan, model, x_T, predicts=predicts) - solution(sde.t_end, x_T)).max())
    assert errors[1] < errors[0] / 3.5 < 0.02
    with pytest.raises(ValueError, match="'eps' does not determine x_0 at t=999"):
        deis.sample(plan, eps, x_T)


def test_a_guard_of_2_to_the_minus_24_may_lie_above_its_neighbours() -> None:
    alphas = zero_snr(np.cumprod(1 - np.linspace(5e-5, 0.01, 2000)))
    alphas[-1] = 2.0**-24
    assert alphas[-2] < alphas[-1]
    sde = deis.VPSDE.discrete(alphas)
    first = int(np.argmax(alphas <= 2.0**-24))
    assert sde.t_start == first < 1998
    np.testing.assert_allclose(
        sde.alpha(np.array([first - 1, first, 1999])) ** 2, [alphas[first - 1], 2.0**-24, 2.0**-24], rtol=1e-14
    )
    assert deis.make_plan(sde, "tab3", 10).alpha[0] == sde.alpha(1999)


@FEW_STEPS
@given(st.lists(st.integers(1, 4), min_size=3, max_size=30), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_tables_with_ties_have_grids_and_inverses(runs: list[int], seed: int, clean: bool, zero: bool) -> None:
    """Each alpha is repeated as often as its run says: clamped ends, and what float16 makes of a table."""
    levels = np.sort(np.random.default_rng(seed).uniform(0.01, 0.99, len(runs)))[::-1]
    levels[0], levels[-1] = 1.0 if clean else levels[0], 0.0 if zero else levels[-1]
    if (np.diff(levels) > -1e-6).any():
        return
    sde = deis.VPSDE.discrete(np.repeat(levels, runs))
    assert (sde.t_end, sde.t_start) == (runs[0] - 1, sum(runs[:-1]))
    inside = levels[int(clean) : len(levels) - int(zero)]
    back = sde.t_of_rho(np.sqrt(1 / inside - 1))
    np.testing.assert_allclose(sde.alpha(back) ** 2, inside, rtol=1e-9)
    for end in (sde.t_start, sde.t_end):  # beyond the ends, too: rounding may lead there
        if 0 < sde.rho(end) < np.inf:
            assert sde.t_of_rho(sde.rho(end) * np.array([1 - 1e-15, 1, 1 + 1e-15])) == pytest.approx(end, abs=1e-9)
    between = (inside[1:] + inside[:-1]) / 2  # where the table is linear, the inverse is continuous
    np.testing.assert_allclose(sde.alpha(sde.t_of_rho(np.sqrt(1 / between - 1))) ** 2, between, rtol=1e-9)
    for num_step in (1, len(runs) - 1):
        ts = deis.make_grid(sde, num_step)
        assert (ts[0], ts[-1]) == (sde.t_start, sde.t_end)
        assert (np.diff(sde.alpha(ts)) > 0).all()
    plan = deis.make_plan(sde, "auto", len(runs) - 1)  # which runs the check of transport
    assert plan.discrete
    with pytest.raises(ValueError, match=f"the schedule has {len(runs)}"):
        deis.make_grid(sde, len(runs))


def test_times_that_share_a_noise_level_make_no_step() -> None:
    sde = deis.VPSDE.discrete([0.9, 0.5, 0.5, 0.1, 0.0, 0.0])
    with pytest.raises(ValueError, match="repeats one of its noise levels"):
        deis.make_plan(sde, ts=[3, 2, 1, 0])
    with pytest.raises(ValueError, match="repeats one of its noise levels"):
        deis.make_plan(sde, ts=[5, 4, 1, 0])
    assert deis.make_plan(sde, ts=[5, 3, 1, 0]).nfe == 3  # any of a run may be named
    with pytest.raises(ValueError, match="no noise to remove"):
        deis.VPSDE.discrete([0.5, 0.5])


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(N,\)"):
        deis.VPSDE.discrete([[0.9, 0.8]])
    with pytest.raises(ValueError, match=r"sampling_T=0\.001 must be greater than sampling_eps=1"):
        deis.VPSDE.linear(0.1, 20, sampling_eps=1.0, sampling_T=1e-3)
    with pytest.raises(ValueError, match="must increase"):
        deis.VPSDE(lambda t: 0.5 + 0.4 * t, lambda a: (a - 0.5) / 0.4)
    with pytest.raises(ValueError, match="cumulative alpha"):
        deis.VPSDE(lambda t: 2 - t, lambda a: 2 - a)
    with pytest.raises(TypeError, match="t2alpha_fn must be a function"):
        deis.VPSDE(0.5, lambda a: a)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="t2alpha_fn must map an array"):
        deis.VPSDE(lambda t: "no", lambda a: a)
    with pytest.raises(ValueError, match="beta_0"):
        deis.VPSDE.linear(-1, 20)
    with pytest.raises(ValueError, match="sigma_min"):
        deis.VESDE(1.0, 0.5)
    with pytest.raises(ValueError, match="sampling_T=2"):
        deis.FlowMatching(0.0, 2.0)
    with pytest.raises(ValueError, match="sampling_eps=-1"):
        deis.EDM(-1.0)
