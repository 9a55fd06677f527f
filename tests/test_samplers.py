"""The samplers of ComfyUI and diffusers as plans: their transcriptions to rounding, one another's special cases, refusals."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

import deis
from deis.adapters.diffusers import PlanScheduler
from deis.backends.numpy import combine
from deis.cut import from_call
from deis.machine import run_rows

from . import transcriptions as tr
from .test_convergence import SMOOTH, STEPS, measure
from .test_stochastic import law
from .test_transcriptions import HIGH, X, karras, noise, silent, two_modes

Array = NDArray[np.float64]
Sampler = Callable[..., Array]
VP, EDM, FLOW = deis.VPSDE.linear(), deis.EDM(0.0), deis.FlowMatching()
GRIDS = [
    *((sde, False) for sde in (EDM, deis.VESDE(0.002, 80.0), VP, deis.VPSDE.cosine(), deis.SubVPSDE.linear(), FLOW)),
    *((sde, True) for sde in (EDM, VP, deis.VPSDE.cosine(), deis.SubVPSDE.linear(), FLOW)),
]
"""Schedules, and whether the grid ends at sigma = 0."""


def run(plan: deis.Plan, denoise: tr.Denoise, x: Array, seen: Callable[[int, int], Array] = noise) -> Array:
    """Run a plan from x at scale alpha + sigma = 1, its k-th noise of step i being seen(i, k), and return the end at that scale.

    `denoise` is told sigma of that scale.
    """
    scale = plan.alpha + plan.sigma
    steps: list[int] = (np.cumsum(plan.accepts) - plan.accepts)[plan.keep_z != 0].tolist()
    numbers = iter([(i, steps[:j].count(i)) for j, i in enumerate(steps)])

    def predict(i: int, x: Array) -> Array:
        x_0 = denoise(x / scale[i], float(plan.sigma[i] / scale[i]))
        return x_0 if plan.form == "data" else (x - plan.alpha[i] * x_0) / plan.sigma[i]

    def add_noise(keep_z: float, x: Array) -> Array:
        return x + keep_z * seen(*next(numbers))

    return run_rows(plan.rows, predict, combine, scale[0] * x, None, add_noise) / scale[-1]


def of_flow(x: Array, sigma: float) -> Array:
    """Return the x_0 of two modes for the state (1 - sigma) x_0 + sigma eps; from sigma = 1 their mean."""
    return two_modes(x / (1 - sigma), sigma / (1 - sigma)) if sigma < 1 else 0 * x


def close(plan: deis.Plan, sampler: Sampler, sigmas: Array, seen: Callable[[int, int], Array] = noise) -> None:
    """Compare with a sampler of the state x_0 + rho eps."""
    rho = sigmas[0]
    mine = run(plan, of_flow, X / (1 + rho), seen) * (1 + sigmas[-1])
    expected = sampler(two_modes, X, sigmas)
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def carried(sigmas: Array, r: float, eta: float) -> tr.Noise:
    """Return noises of dpmpp_sde whose second is what is left of the first at the end of a step, and new noise."""

    def second(i: int) -> Array:
        s, t = sigmas[i : i + 2]
        (d_1, u_1), (d, u) = (tr.ancestral(s, level, eta) for level in (s * (t / s) ** r, t))
        old = d * u_1 / d_1
        new = np.sqrt(u**2 - old**2) if r < 1 else 0.0
        return (old * noise(i, 0) + new * noise(i, 1)) / u

    return lambda i, k: second(i) if k == 1 and eta > 0 else noise(i, 0)


COVARIANT: list[tuple[str, dict[str, Any], Sampler]] = [
    ("heunpp2", {}, tr.heunpp2),
    *((f"ipndm_v{q}", {}, partial(tr.ipndm_v, order=q)) for q in (1, 2, 3, 4)),
    ("gradient_estimation", {}, tr.gradient_estimation),
    ("gradient_estimation", {"gamma": 1.5}, partial(tr.gradient_estimation, ge_gamma=1.5)),
    ("res_multistep", {}, tr.res_multistep),
    ("exp_heun_2_x0", {}, tr.exp_heun_2_x0),
    ("lcm", {}, partial(tr.lcm, noise=noise)),
    ("exp_heun_2_x0_sde", {}, partial(tr.exp_heun_2_x0_sde, noise=noise)),
    *(
        (sampler.__name__, {"eta": eta}, partial(sampler, noise=noise, eta=eta))
        for sampler in (
            tr.euler_ancestral, tr.dpm_2_ancestral, tr.dpmpp_2s_ancestral, tr.res_multistep_ancestral, tr.dpmpp_2m_sde,
            tr.dpmpp_3m_sde, tr.seeds_2, tr.seeds_3,
        )
        for eta in (0.0, 0.4, 1.0)
    ),
    ("dpmpp_2m_sde", {"solver": "heun"}, partial(tr.dpmpp_2m_sde, noise=noise, solver_type="heun")),
    ("seeds_2", {"r": 0.3}, partial(tr.seeds_2, noise=noise, r=0.3)),
    ("seeds_2", {"r": 0.3, "solver": "phi_2"}, partial(tr.seeds_2, noise=noise, r=0.3, solver_type="phi_2")),
    ("seeds_3", {"r_1": 0.4, "r_2": 0.8}, partial(tr.seeds_3, noise=noise, r_1=0.4, r_2=0.8)),
    ("seeds_2", {"eta": 2.5}, partial(tr.seeds_2, noise=noise, eta=2.5)),
    *(("er_sde", {"stages": k}, partial(tr.er_sde, noise=noise, max_stage=k, points=None)) for k in (1, 2, 3)),
    ("er_sde", {"scaler": np.square}, partial(tr.er_sde, noise=noise, scaler=np.square, points=None)),
    ("er_sde", {"scaler": lambda rho: rho}, partial(silent(tr.er_sde, scaler=lambda rho: rho, points=None))),
]  # fmt: skip


@pytest.mark.parametrize(("sde", "to_zero"), GRIDS, ids=[f"{sde.name} {to_zero}" for sde, to_zero in GRIDS])
@pytest.mark.parametrize(("name", "options", "sampler"), COVARIANT, ids=[f"{name}-{list(o)}" for name, o, _ in COVARIANT])
def test_a_plan_is_its_transcription(
    name: str, options: dict[str, Any], sampler: Sampler, sde: deis.Schedule, to_zero: bool
) -> None:
    sigmas = karras(7, to_zero)
    close(deis.make_plan(sde, name, sigmas=sigmas, **options), sampler, sigmas)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("r", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("sde", [EDM, VP, FLOW], ids=lambda sde: sde.name)
def test_dpmpp_sde_carries_the_noise_of_its_stage(sde: deis.Schedule, r: float, eta: float) -> None:
    sigmas = karras(7)
    sampler = partial(tr.dpmpp_sde, noise=carried(sigmas, r, eta), r=r, eta=eta)
    close(deis.make_plan(sde, "dpmpp_sde", sigmas=sigmas, r=r, eta=eta), sampler, sigmas)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sde", [VP, deis.VPSDE.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))], ids=["", "discrete"])
def test_tcd_is_its_transcription(sde: deis.Schedule, gamma: float) -> None:
    ts = np.array([0.9, 0.7, 0.3, 0.1, 0.0]) if sde is VP else np.array([959.0, 719.0, 479.0, 239.0, 0.0])
    down = (1 - gamma) * ts[1:] if sde is VP else np.floor((1 - gamma) * ts[1:])
    close(deis.make_plan(sde, "tcd", ts=ts, gamma=gamma), partial(tr.tcd, noise=noise, down=sde.rho(down)), sde.rho(ts))


RF = {
    "ancestral_rf": tr.euler_ancestral_flow,
    "dpm_2_ancestral_rf": tr.dpm_2_ancestral_flow,
    "dpmpp_2s_ancestral_rf": tr.dpmpp_2s_ancestral_flow,
}


@pytest.mark.parametrize("sigmas", [np.linspace(1, 0, 8), np.linspace(0.98, 0.1, 8)], ids=["from 1 to 0", "within"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", RF)
def test_ancestral_sampling_of_flow_matching_is_its_transcription(name: str, eta: float, sigmas: Array) -> None:
    """On flow matching, and at the same levels of any schedule."""
    sampler = partial(RF[name], noise=noise, eta=eta) if eta else silent(RF[name], eta=eta)  # whose noise is but rounding
    expected = sampler(of_flow, X, sigmas)
    plans = [deis.make_plan(FLOW, name, ts=sigmas, eta=eta)]
    if sigmas[0] < 1:
        plans += [deis.make_plan(sde, name, sigmas=sigmas / (1 - sigmas), eta=eta) for sde in (VP, EDM)]
    for plan in plans:
        np.testing.assert_allclose(run(plan, of_flow, X), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# --- special cases, orders, and what they cannot do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "other", "others"),
    [
        ("lcm", {}, "renoise", {}),
        ("euler_ancestral", {"eta": 0.5}, "ddim", {"eta": 0.5}),
        ("euler_ancestral", {}, "ancestral", {}),
        ("res_multistep", {}, "dpmpp_2m", {}),
        ("res_multistep_ancestral", {"eta": 0.0}, "dpmpp_2m", {}),
        ("res_multistep_ancestral", {}, "sde_dpmpp_2m", {}),
        ("dpmpp_2m_sde", {"eta": 0.49}, "sde_dpmpp_2m_published", {"tau": 0.7}),
        ("dpmpp_2m_sde", {"eta": 0.49, "solver": "heun"}, "sde_dpmpp_2m", {"tau": 0.7}),
        ("dpmpp_3m_sde", {"eta": 0.0}, "dpmpp_3m_published", {"solver": "heun"}),
        ("dpm_2_ancestral", {"eta": 0.0}, "dpm_solver_2", {}),
        ("dpmpp_2s_ancestral", {"eta": 0.0}, "dpmpp_2s", {}),
        ("dpmpp_2s_ancestral_rf", {"eta": 0.0}, "dpmpp_2s", {}),
        ("ancestral_rf", {"eta": 0.0}, "ddim", {}),
        ("tcd", {"gamma": 0.0}, "ddim", {}),
        ("gradient_estimation", {"gamma": 1.0}, "ddim", {}),
        ("ipndm_v2", {}, "lms2", {}),
        ("seeds_2", {}, "dpmpp_sde", {}),
        ("seeds_2", {"eta": 0.0}, "dpmpp_2s", {}),
        ("seeds_3", {"eta": 0.0}, "dpmpp_3s", {}),
        ("exp_heun_2_x0_sde", {"eta": 0.0}, "exp_heun_2_x0", {}),
        ("er_sde", {"stages": 1, "scaler": np.square}, "sde_dpmpp_1m", {}),
        ("er_sde", {"stages": 1, "scaler": lambda rho: rho**3}, "sde_dpmpp_1m", {"tau": 2**0.5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sde", [VP, deis.EDM()], ids=lambda sde: sde.name)
@pytest.mark.filterwarnings("ignore:.*adds more noise")
def test_they_are_one_another(name: str, options: dict[str, Any], other: str, others: dict[str, Any], sde: deis.Schedule) -> None:
    one, two = deis.make_plan(sde, name, 8, "vp_t", **options), deis.make_plan(sde, other, 8, "vp_t", **others)
    assert (one.form, one.stochastic) == (two.form, two.stochastic)
    for column in ("t", "keep_x", "keep_z"):
        np.testing.assert_allclose(getattr(one, column), getattr(two, column), rtol=1e-11)
    np.testing.assert_allclose(run(one, of_flow, X), run(two, of_flow, X), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("gradient_estimation", {"gamma": 1.5}, 2),
        ("seeds_2", {"eta": 0.0, "r": 0.3, "solver": "phi_2"}, 2),
        ("seeds_3", {"eta": 0.0}, 3),
        ("seeds_3", {"eta": 0.0, "r_2": 0.5}, 2),
        ("er_sde", {"scaler": lambda rho: rho}, 2),
        ("er_sde", {"scaler": lambda rho: rho, "stages": 1}, 1),
        ("dpmpp_sde", {"eta": 0.0, "r": 0.3}, 2),
        ("dpm_2_ancestral_rf", {"eta": 0.0}, 2),
        ("dpmpp_3m_sde", {"eta": 0.0}, 2),
    ],
)
def test_order_without_noise(name: str, options: dict[str, Any], order: int) -> None:
    assert abs(measure(deis.get_method(name, **options), SMOOTH, STEPS, "t", 1) - order) < 0.2


def mean_of(function: Callable[[Array], Array], plan: deis.Plan) -> float:
    """Return the mean of a function of the samples of a plan whose steps are noisy at their end only, for data of two modes.

    It goes back from the end: a step's mean of the function after it is one of x, by Gauss-Hermite and splines.
    """
    x, (z, weight) = np.linspace(-18, 18, 1501), np.polynomial.hermite_e.hermegauss(12)
    ends = np.flatnonzero(plan.accepts)
    for i, j in zip([0, *(ends[:-1] + 1)][::-1], ends[::-1], strict=True):
        rows = [row._replace(keep_z=0.0) for row in plan.rows[i : j + 1]]
        form, sigma = plan.form, plan.sigma[i:]

        def predict(k: int, y: Array, form: str = form, sigma: Array = sigma) -> Array:
            x_0 = two_modes(y, float(sigma[k]))
            return x_0 if form == "data" else (y - x_0) / sigma[k]

        end = run_rows(rows, predict, combine, x)[:, None] + plan.keep_z[j] * z
        function = CubicSpline(x, function(end) @ weight / weight.sum())
    density = sum(np.exp(-((x - mode) ** 2) / (0.5 + 2 * plan.sigma[0] ** 2)) for mode in (-1, 1))
    return float((function(x) * density).sum() / density.sum())


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_2s_ancestral", "dpm_2_ancestral_rf", "dpmpp_2s_ancestral_rf"])
def test_two_stages_have_weak_order_two_where_the_prediction_is_not_linear(name: str) -> None:
    """Ancestral steps carry the law: the stage needs no noise of its own, as it would to follow the reverse diffusion."""
    sde = deis.EDM(0.3, 3.0)
    exact = np.exp(-2 * (0.25 + 0.3**2)) * np.cos(2.0)  # the mean of cos(2 x)
    errors = [abs(mean_of(lambda x: np.cos(2 * x), deis.make_plan(sde, name, n, "rho")) - exact) for n in (40, 80)]
    assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.2


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_tcd_converges_without_noise_only(gamma: float) -> None:
    """Each step goes as far back, however short it is: the variance at 160 and at 320 steps is off by the same."""
    found = [law(deis.make_plan(SMOOTH, "tcd", n, "log", gamma=gamma), SMOOTH)[1] for n in (160, 320)]
    exact = law(deis.make_plan(SMOOTH, "tab4", 2000, "log"), SMOOTH)[1]
    assert abs(found[0] - exact) > 0.02
    np.testing.assert_allclose(found[1] - exact, found[0] - exact, rtol=0.05)


@pytest.mark.parametrize(
    "name",
    [
        "tcd", "euler_ancestral", "dpmpp_2s_ancestral", "ancestral_rf", "dpm_2_ancestral_rf", "dpmpp_2s_ancestral_rf",
        "res_multistep_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "gradient_estimation",
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_step", [1, 2, 6])
@pytest.mark.filterwarnings("ignore:.*adds more noise", "ignore:.*is off by")
def test_flow_matching_from_pure_noise_to_clean_data(name: str, num_step: int) -> None:
    """From alpha = 0, where one step or stage is the prediction, whatever x is: the mean of the modes."""
    plan = deis.make_plan(FLOW, name, num_step)
    assert np.isfinite(run(plan, of_flow, X)).all()
    if num_step == 1:
        np.testing.assert_allclose(run(plan, of_flow, X), 0, atol=1e-14)


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "ipndm_v3", "heunpp2", "seeds_2", "seeds_3", "dpmpp_sde", "exp_heun_2_x0"])
def test_those_that_cannot_start_at_alpha_0_say_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"at t=1\.0; .*start later"):
        deis.make_plan(FLOW, name, 4)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("tcd", {"gamma": 1.5}, "gamma=1.5"),
        ("tcd", {"form": "x"}, "form='x'"),
        ("ancestral_rf", {"eta": -0.1}, "eta=-0.1"),
        ("dpm_2_ancestral", {"eta": 1.1}, "eta=1.1"),
        ("res_multistep_ancestral", {"eta": 2.0}, "eta=2.0"),
        ("dpmpp_2m_sde", {"eta": -1.0}, "eta=-1.0"),
        ("dpmpp_sde", {"r": 0.0}, "r=0.0"),
        ("dpmpp_sde", {"eta": 1.5}, "eta=1.5"),
        ("seeds_2", {"r": 1.5}, "r=1.5"),
        ("seeds_2", {"solver": "heun"}, "solver='heun'"),
        ("seeds_3", {"r_1": 0.9}, "r_1=0.9"),
        ("er_sde", {"stages": 4}, "stages=4 must be 1, 2 or 3"),
        ("er_sde", {"scaler": np.sqrt}, r"scaler\(rho\) / rho must be positive and not fall"),
        ("er_sde", {"scaler": 1.0}, "scaler"),
        ("gradient_estimation", {"gamma": float("nan")}, "gamma=nan"),
        ("ipndm_v5", {}, "ipndm_v5"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        deis.make_plan(VP, name, 5, **options)


def test_too_much_noise_is_named_by_its_option() -> None:
    with pytest.warns(UserWarning, match=r"^eta=1\.0 adds more noise than 'res_multistep_ancestral.*a lower eta"):
        deis.make_plan(VP, "res_multistep_ancestral", 5)


def test_ipndm_v4_says_what_its_weights_are() -> None:
    plan = deis.make_plan(VP, "ipndm_v4", 6)
    assert "add up to 1 on geometric steps only" in repr(plan)
    assert deis.make_plan(VP, "ipndm_v3", 6).fitted == ""
    geometric = deis.make_plan(deis.EDM(), "ipndm_v4", sigmas=np.geomspace(HIGH, 0.2, 7))
    np.testing.assert_allclose(geometric.keep_p.sum(axis=1), np.diff(geometric.sigma), rtol=1e-12)


def test_heunpp2_looks_ahead() -> None:
    plan = deis.make_plan(deis.EDM(), "heunpp2", sigmas=[8.0, 5.0, 3.0, 2.0])
    np.testing.assert_allclose(plan.t, [8, 5, 3, 5, 3, 3, 2], rtol=1e-12)
    assert [deis.make_plan(VP, "heunpp2", n).nfe for n in (1, 2, 3, 10)] == [1, 3, 6, 27]


def test_heunpp2_can_be_cut_at_its_full_steps() -> None:
    plan = deis.make_plan(VP, "heunpp2", 5)
    part = deis.cut_plan(plan, VP, start=float(plan.ts[1]))
    assert part.nfe == plan.nfe - 3
    np.testing.assert_array_equal(part.keep_p[2:], plan.keep_p[5:])
    with pytest.raises(ValueError, match=r"cannot begin with its row 1.* or its step .* ends there; begin with one of its full"):
        from_call(plan, VP, 1)
    with pytest.raises(ValueError, match="cannot begin with its row 2"):
        from_call(plan, VP, 2)


def test_heunpp2_runs_in_somebody_else_s_loop() -> None:
    """Its third evaluation looks ahead, so the timesteps of diffusers' loop rise and fall; and they may begin at a full step."""
    scheduler = PlanScheduler(method="heunpp2", prediction_type="sample")
    scheduler.set_timesteps(9)
    assert len(scheduler.timesteps) == scheduler.plan.nfe == 9
    assert (np.diff(scheduler.timesteps.numpy()) > 0).any()
    x_T = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    for begin, plan in ((0, scheduler.plan), (3, from_call(scheduler.plan, scheduler.sde, 3))):
        scheduler.set_timesteps(9)
        scheduler.set_begin_index(begin)
        x = x_T
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(x / (1 + x * x), t, x).prev_sample
        expected = deis.sample(plan, lambda x, t: x / (1 + x * x), x_T, predicts="x0")
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    scheduler.set_timesteps(9)
    scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match="begin with one of its full steps"):
        scheduler.step(x_T, scheduler.timesteps[1], x_T)
