"""PlanScheduler against diffusers' own schedulers, their protocol, and their pipelines."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

import deis
import deis.cut
from deis.adapters.diffusers import PlanScheduler
from deis.adapters.diffusers_config import FAMILIES, signature

from .schedulers import SD, both, loop, network, noise, run

PARITY = [
    ("DDIMScheduler", {"clip_sample": False}, "ddim"),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, "ddim"),
    ("DDIMScheduler", {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, "ddim"),
    ("DPMSolverMultistepScheduler", {}, "dpmpp_2m_published"),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m_published"),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun", "timestep_spacing": "trailing"}, "dpmpp_2m"),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, "dpmpp_2m_published"),
    ("DPMSolverMultistepScheduler", {"trained_betas": np.linspace(1e-4, 0.015, 1000).tolist()}, "dpmpp_2m_published"),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "dpmpp_2m_published"),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5}, "dpmpp_2m_published"),
    ("DPMSolverMultistepScheduler", {"prediction_type": "sample"}, "dpmpp_2m_published"),
    (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        "dpmpp_2m_published",
    ),
    ("UniPCMultistepScheduler", {}, "unipc2_bh2"),
    ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc3_bh2"),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, "unipc2_bh1"),
]


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("name", "settings", "method"), PARITY)
def test_it_equals_the_scheduler_whose_configuration_it_loads(name: str, settings: dict[str, Any], method: str, steps: int) -> None:
    theirs = getattr(diffusers, name)(**SD | settings)
    ours = PlanScheduler.from_config(theirs.config)
    assert ours.config.method == method
    expected = run(theirs, num_inference_steps=steps)
    torch.testing.assert_close(run(ours, num_inference_steps=steps), expected, rtol=1e-5, atol=1e-5)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}])
def test_it_equals_flow_matching_euler(settings: dict[str, Any]) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    ours = PlanScheduler.from_config(theirs.config)
    options: dict[str, Any] = {"mu": 0.8} if "use_dynamic_shifting" in settings else {}
    torch.testing.assert_close(run(ours, **options), run(theirs, **options), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}),
    ],
)
def test_it_equals_euler_in_its_other_space(name: str, settings: dict[str, Any]) -> None:
    """Diffusers' Euler holds x / alpha, and starts from sqrt(sigma^2 + 1) times the noise, which is alpha sqrt(...) = 1 here."""
    theirs = getattr(diffusers, name)(**SD | settings)
    expected = run(theirs, x=noise(2, 3, 8, 8) * _start(theirs))
    torch.testing.assert_close(run(PlanScheduler.from_config(theirs.config)), expected, rtol=1e-4, atol=1e-4)


def _start(scheduler: Any) -> float:
    scheduler.set_timesteps(10)
    return float(scheduler.init_noise_sigma)


METHODS = ("auto", "tab3", "rhoab2", "ipndm4", "deis_abm2", "unipc3", "dpmpp_3m", "dpm_solver_3", "rhork_4rk", "edm_heun", "lms3")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_a_row_of_the_plan(method: str) -> None:
    scheduler = PlanScheduler(**SD, method=method, final_sigmas_type="sigma_min")
    x_0 = run(scheduler, num_inference_steps=12)
    assert len(scheduler.timesteps) == scheduler.plan.nfe == scheduler.num_inference_steps == 12
    expected = deis.sample(scheduler.plan, deis.Denoiser(lambda x, t: network(x, t[0] - 1), scheduler.sde), noise(2, 3, 8, 8))
    torch.testing.assert_close(x_0, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("phase", ["t", "vp_t"])
def test_a_grid_of_deis_takes_the_place_of_the_spacing(phase: str) -> None:
    scheduler = PlanScheduler(**SD, method="tab2", ts_phase=phase)
    scheduler.set_timesteps(7)
    assert scheduler.plan == deis.make_plan(scheduler.sde, "tab2", ts_phase=phase, nfe=7)
    assert scheduler.timesteps.dtype == torch.int64
    assert 0 <= scheduler.timesteps.min() <= scheduler.timesteps.max() <= 999


@pytest.mark.parametrize("method", ["ancestral", "sde_dpmpp_2m", "sa_solver"])
def test_noise_comes_from_the_generator(method: str) -> None:
    scheduler = PlanScheduler(**SD, method=method)
    ends = []
    for seed in (0, 0, 1):
        scheduler.set_timesteps(5)
        x, generator = noise(64, 1, 4, 4), torch.Generator().manual_seed(seed)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x, generator=generator).prev_sample
        ends.append(x)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("method", ["tab3", "unipc2", "rhork_2heun"])
def test_a_later_beginning_is_the_method_on_the_times_that_are_left(method: str) -> None:
    scheduler = PlanScheduler(**SD, method=method, final_sigmas_type="sigma_min")
    x = noise(2, 3, 8, 8)
    x_0 = run(scheduler, x=x, first=4)
    left = scheduler.plan.ts[scheduler.plan.ts <= scheduler.timesteps[4].item() + 1]
    plan = deis.make_plan(scheduler.sde, method, ts=left)
    assert plan.nfe == 6
    expected = deis.sample(plan, deis.Denoiser(lambda x, t: network(x, t[0] - 1), scheduler.sde), x)
    torch.testing.assert_close(x_0, expected, rtol=1e-6, atol=1e-6)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(12)
    with pytest.raises(ValueError, match=r"begin_index=12 must lie in 0 \.\.\. 9"):
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("method", ["rhork_2heun", "dpm_solver_3", "dpmpp_3s", "rhork_3kutta", "edm_heun"])
@pytest.mark.parametrize("first", [3, 4])
def test_a_beginning_within_a_step_makes_the_evaluations_that_are_left(method: str, first: int) -> None:
    scheduler = PlanScheduler(**SD, method=method, final_sigmas_type="sigma_min")
    x = noise(2, 3, 8, 8)
    x_0 = run(scheduler, x=x, first=first)
    rest = deis.cut.from_call(scheduler.plan, scheduler.sde, first)
    assert rest.nfe == 10 - first
    assert (rest.t[:-1] - 1).tolist() == scheduler.timesteps[first:].double().tolist() or method != "rhork_2heun"
    expected = deis.sample(rest, deis.Denoiser(lambda x, t: network(x, t[0] - 1), scheduler.sde), x)
    torch.testing.assert_close(x_0, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_published_singlestep_begins_as_diffusers_does(order: int, first: int) -> None:
    theirs = diffusers.DPMSolverSinglestepScheduler(**SD, solver_order=order)
    ours = PlanScheduler.from_config(theirs.config)
    torch.testing.assert_close(run(ours, first=first), run(theirs, first=first), rtol=1e-5, atol=1e-5)


def test_the_state_may_be_changed_between_steps() -> None:
    """As inpainting does: what the network saw is what the row starts from."""
    scheduler = PlanScheduler(**SD, method="tab1")
    scheduler.set_timesteps(4)
    x, history = noise(1, 1, 4, 4), [torch.zeros(1, 1, 4, 4)]
    for i, t in enumerate(scheduler.timesteps):
        x = x + 1
        m = network(x, t)
        row, history = scheduler.plan.rows[i], [m, *history]
        expected = row.keep_x * x + sum(c * p for c, p in zip(row.keep_p, history, strict=False))
        x = scheduler.step(m, t, x).prev_sample
        torch.testing.assert_close(x, expected)


def test_half_precision_is_carried_in_float32() -> None:
    """Of 200 steps that each move the state by less than half its rounding, the sum arrives."""
    scheduler = PlanScheduler(**SD, method="ddim", ts_phase="t", ts_order=1.0)
    x, ends = noise(1, 1, 8, 8), []
    for dtype in (torch.float32, torch.float16):
        scheduler.set_timesteps(900)
        y = x.to(dtype)
        for t in scheduler.timesteps:
            y = scheduler.step(0.5 * torch.ones_like(y), t, y).prev_sample
        assert y.dtype == dtype
        ends.append(y.float())
    torch.testing.assert_close(ends[1], ends[0], rtol=2e-3, atol=2e-3)


def test_a_change_in_place_is_seen_in_half_precision() -> None:
    scheduler = PlanScheduler(**SD, method="ddim")
    scheduler.set_timesteps(4)
    first, second, *_ = scheduler.timesteps
    x = scheduler.step(torch.zeros(1, 1, 2, 2).half(), first, torch.ones(1, 1, 2, 2).half()).prev_sample
    x.mul_(3)
    end = scheduler.step(torch.zeros_like(x), second, x).prev_sample
    torch.testing.assert_close(end, (scheduler.plan.keep_x[1].item() * x.float()).half())


def test_the_network_may_use_its_output_s_memory_again() -> None:
    """As a network captured in a CUDA graph does."""
    scheduler = PlanScheduler(**SD, method="tab2")
    expected = run(scheduler)
    scheduler.set_timesteps(10)
    x, buffer = noise(2, 3, 8, 8), torch.empty(2, 3, 8, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(buffer.copy_(network(x, t)), t, x).prev_sample
    assert torch.equal(x, expected)


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
ZERO_SNR_FAMILIES: list[tuple[str, dict[str, Any], float]] = [
    ("DDIMScheduler", {"clip_sample": False}, 2e-5),
    ("DDPMScheduler", {"clip_sample": False}, 2e-5),
    ("EulerDiscreteScheduler", {}, 1e-4),  # holds the state times 4096
    ("EulerAncestralDiscreteScheduler", {}, 2e-5),
    *(("DPMSolverMultistepScheduler", {"solver_order": order}, 2e-5) for order in (1, 2, 3)),
    *(("DPMSolverMultistepScheduler", {"solver_order": order, "algorithm_type": "sde-dpmsolver++"}, 2e-5) for order in (1, 2)),
    (
        "DPMSolverMultistepScheduler",  # whose eps is multiplied by 4096
        {"solver_order": 2, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        1e-4,
    ),
    *(("UniPCMultistepScheduler", {"solver_order": order}, 2e-5) for order in (1, 2, 3)),
]


@pytest.mark.parametrize(("prediction", "steps"), [("v_prediction", 10), ("v_prediction", 200), ("sample", 10)])
@pytest.mark.parametrize(("name", "settings", "tolerance"), ZERO_SNR_FAMILIES)
def test_a_terminal_signal_to_noise_ratio_of_0(
    name: str, settings: dict[str, Any], tolerance: float, prediction: str, steps: int
) -> None:
    """DDIM and DDPM of diffusers have alpha = 0 at the last time, and its other classes 2^-12."""
    if name == "EulerAncestralDiscreteScheduler":
        prediction = "v_prediction"  # it has no other
    theirs = getattr(diffusers, name)(**SD, **ZERO_SNR, **settings, prediction_type=prediction)
    assert theirs.alphas_cumprod[-1] == (0 if name.startswith("DD") else 2**-24)
    ours = PlanScheduler.from_config(theirs.config)
    expected, found = both(theirs, ours, steps=steps)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


def test_eps_at_alpha_0_is_refused_with_the_cure() -> None:
    theirs = diffusers.DDIMScheduler(**SD, **ZERO_SNR)
    with pytest.raises(ValueError, match=r"prediction_type='epsilon' does not determine the data where alpha is 0.*use a network"):
        PlanScheduler.from_config(theirs.config).set_timesteps(5)
    PlanScheduler.from_config(theirs.config, timestep_spacing="leading").set_timesteps(5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("settings", [SD | ZERO_SNR, ZERO_SNR, {"beta_schedule": "squaredcos_cap_v2"}])
def test_noise_is_added_at_the_last_times_as_diffusers_adds_it(name: str, settings: dict[str, Any]) -> None:
    theirs = getattr(diffusers, name)(**settings, prediction_type="v_prediction")
    ours = PlanScheduler.from_config(theirs.config)
    x_0, eps, t = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1), torch.tensor([999, 998, 997])
    theirs.set_timesteps(1000)
    torch.testing.assert_close(ours.add_noise(x_0, eps, t), theirs.add_noise(x_0, eps, t), rtol=1e-6, atol=1e-6)
    data = ours.add_noise(x_0, 0 * eps, t)  # in which alpha alone is seen
    torch.testing.assert_close(data, theirs.add_noise(x_0, 0 * eps, t), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
    ],
)
def test_the_squared_cosine_keeps_its_last_alpha(name: str) -> None:
    settings = {"clip_sample": False, "timestep_spacing": "trailing", "solver_order": 1 if "Single" in name else 2}
    known = {key: value for key, value in settings.items() if key in signature(name)}
    theirs = getattr(diffusers, name)(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", **known)
    ours = PlanScheduler.from_config(theirs.config)
    expected, found = both(theirs, ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3 if name == "EulerDiscreteScheduler" else 1e-5)
    assert abs(float(ours.sde.alpha(1000.0)) - 4.928e-5) < 1e-8


# --- what diffusers' class of the name gets wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_ends_at_the_data(shift: float) -> None:
    theirs = diffusers.DEISMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    ours = PlanScheduler.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    assert theirs.sigmas[-1] > 0.09
    assert ours.sigmas[-1] == 0
    assert len(ours.timesteps) == 10


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_no_evaluation_is_wasted_on_a_level_that_repeats(spacing: str) -> None:
    theirs = diffusers.DEISMultistepScheduler(**SD, **{f"use_{spacing}_sigmas": True})
    for final in ("zero", "sigma_min"):
        ours = PlanScheduler.from_config(theirs.config, final_sigmas_type=final)
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(10)
        assert theirs.sigmas[-1] == theirs.sigmas[-2]
        assert len(ours.timesteps) == 10
        assert ours.timesteps[0] == 999
        assert (ours.sigmas.diff() < 0).all()
        assert (ours.sigmas[-1] == 0) == (final == "zero")


def test_order_3_stays_exact_when_steps_are_many() -> None:
    """For Gaussian data of deviation c, eps = sigma x / (alpha^2 c^2 + sigma^2), and x_t goes as sqrt(alpha^2 c^2 + sigma^2)."""
    c = 0.5

    def eps(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        abar = scheduler.alphas_cumprod[int(t)].double()
        return ((1 - abar).sqrt() * x.double() / (abar * c**2 + 1 - abar)).to(x.dtype)

    x = noise(1, 1, 8, 8, dtype=torch.float64)
    settings = {"solver_order": 3, "timestep_spacing": "linspace"}
    theirs = diffusers.DEISMultistepScheduler(**SD, **settings)
    ours = PlanScheduler.from_config(theirs.config, final_sigmas_type="sigma_min")
    abar = theirs.alphas_cumprod.double()[[0, -1]]
    level = (abar * c**2 + 1 - abar).sqrt()
    errors = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(999)
        y = x.float()
        for t in scheduler.timesteps:
            y = scheduler.step(eps(scheduler, y, t), t, y).prev_sample
        errors.append(float((y - x * level[0] / level[1]).abs().max()))
    assert errors[0] > 1e-2
    assert errors[1] < 1e-4


# --- a plan that is given -------------------------------------------------------------------------------------------------


def fitted(sde: deis.Schedule, nfe: int = 5) -> deis.Plan:
    """Return a plan calibrated on a Gaussian mixture in its own schedule."""
    model = deis.Denoiser(lambda x, t: x * np.tanh(1 + t[0] / 1000), sde)
    x_T = np.random.default_rng(0).standard_normal((12, 64))
    plan = deis.make_plan(sde, "tab2", nfe=nfe)
    return deis.calibrate(plan, model, x_T, teacher=64, stages=("least_squares",))


@pytest.mark.parametrize("with_data", [False, True])
def test_a_calibrated_plan_runs_in_a_pipeline_and_is_saved_with_it(tmp_path: Path, with_data: bool) -> None:
    config = PlanScheduler(**SD).config
    sde = PlanScheduler(**SD).sde if with_data else deis.VPSDE.discrete(PlanScheduler(**SD).alphas_cumprod)
    plan = fitted(sde)
    scheduler = PlanScheduler.from_plan(plan, config)
    x_0 = run(scheduler, num_inference_steps=5)
    assert scheduler.timesteps.tolist() == (plan.t[:-1] - int(with_data)).tolist()
    model = deis.Denoiser(lambda x, t: network(x, t[0] - int(with_data)), sde)
    torch.testing.assert_close(x_0, deis.sample(plan, model, noise(2, 3, 8, 8)), rtol=1e-6, atol=1e-6)
    scheduler.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    again.set_timesteps()
    assert again.plan == plan
    assert torch.equal(run(again, num_inference_steps=5), x_0)


def test_what_is_left_of_a_calibrated_plan_without_the_data_s_end() -> None:
    """Its times are the training's own, one less than with that end."""
    config = PlanScheduler(**SD).config
    sde = deis.VPSDE.discrete(PlanScheduler(**SD).alphas_cumprod)
    scheduler, x = PlanScheduler.from_plan(fitted(sde), config), noise(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="was calibrated as a whole"):
        x_0 = run(scheduler, x=x, num_inference_steps=5, first=2)
    rest = deis.make_plan(sde.between(float(scheduler.plan.t[2])), "auto", nfe=3)
    assert scheduler.timesteps.tolist() == [*scheduler.plan.t[:2], *rest.t[:-1]]
    expected = deis.sample(rest, deis.Denoiser(lambda x, t: network(x, t[0]), sde), x)
    torch.testing.assert_close(x_0, expected, rtol=1e-6, atol=1e-6)


def test_a_clone_of_a_calibrated_plan_begins_for_itself() -> None:
    scheduler = PlanScheduler.from_plan(fitted(PlanScheduler(**SD).sde), PlanScheduler(**SD).config)
    scheduler.set_timesteps()
    other, times = scheduler.clone(), scheduler.timesteps.tolist()
    with pytest.warns(UserWarning, match="was calibrated as a whole"):
        other.set_begin_index(2)
    assert scheduler.timesteps.tolist() == times != other.timesteps.tolist()


def test_a_plan_for_the_betas_in_float64_is_one_for_the_pipeline_s_float32() -> None:
    betas = np.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000) ** 2  # type: ignore[operator]
    sde = deis.VPSDE.discrete(np.cumprod(1 - betas))
    plan = deis.make_plan(sde, "tab2", 8)
    assert not plan.matches(deis.VPSDE.discrete(PlanScheduler(**SD).alphas_cumprod))
    scheduler = PlanScheduler.from_plan(plan, PlanScheduler(**SD).config)
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == plan.t[:-1].tolist()
    other = PlanScheduler(**SD | {"beta_end": 0.0125})
    with pytest.raises(ValueError, match="was made for the schedule"):
        PlanScheduler.from_plan(plan, other.config)


def test_a_plan_of_another_schedule_is_refused() -> None:
    plan = deis.make_plan(deis.VPSDE.linear(), "tab3", 5)
    with pytest.raises(ValueError, match=r"made for the schedule 'VPSDE.linear\(0.1, 20.0\)'.*make one for"):
        PlanScheduler.from_plan(plan, PlanScheduler(**SD).config)
    with pytest.raises(ValueError, match=r"made for the schedule 'FlowMatching\(\)'"):
        PlanScheduler.from_plan(deis.make_plan(deis.FlowMatching(), "tab3", 5), PlanScheduler(**SD).config)
    with pytest.raises(TypeError, match=r"deis\.load_plan reads a file"):
        PlanScheduler.from_plan("plan.json")


def test_a_plan_of_flow_matching() -> None:
    plan = deis.make_plan(deis.FlowMatching(), "tab2", 5)
    scheduler = PlanScheduler.from_plan(plan, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    x_0 = run(scheduler, num_inference_steps=5)
    model = deis.Denoiser(lambda x, t: network(x, 1000 * t[0]), deis.FlowMatching(), "flow")
    torch.testing.assert_close(x_0, deis.sample(plan, model, noise(2, 3, 8, 8)), rtol=1e-6, atol=1e-6)
    assert scheduler.config.use_flow_sigmas  # by which pipelines know to pass no sigmas


def test_a_plan_that_is_given_has_its_own_times() -> None:
    scheduler = PlanScheduler.from_plan(fitted(PlanScheduler(**SD).sde), PlanScheduler(**SD).config)
    with pytest.raises(ValueError, match="num_inference_steps=6 contradicts the plan 'tab2', which makes 5 evaluations"):
        scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="has times of its own; leave timesteps and sigmas out"):
        scheduler.set_timesteps(timesteps=[999, 500, 0])
    x = noise(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="was calibrated as a whole"):
        x_0 = run(scheduler, x=x, num_inference_steps=5, first=2)
    model = deis.Denoiser(lambda x, t: network(x, t[0] - 1), scheduler.sde)
    with pytest.warns(UserWarning, match="was calibrated as a whole"):
        rest = deis.cut_plan(scheduler.plan, scheduler.sde, float(scheduler.plan.t[2]))
    torch.testing.assert_close(x_0, deis.sample(rest, model, x), rtol=1e-6, atol=1e-6)
    scheduler.set_timesteps()
    with pytest.warns(UserWarning, match="was calibrated as a whole"):  # nobody tells before the first step: at the times there are
        x_0 = loop(scheduler, scheduler.timesteps[2:], x)
    with pytest.warns(UserWarning, match="was calibrated as a whole"):
        rest = deis.cut.from_call(scheduler.plan, scheduler.sde, 2)
    torch.testing.assert_close(x_0, deis.sample(rest, model, x), rtol=1e-6, atol=1e-6)
    saving = PlanScheduler.from_plan(deis.make_plan(scheduler.sde, "tab2", 5, afs=0.5), PlanScheduler(**SD).config)
    with pytest.raises(ValueError, match="begins without an evaluation"):
        saving.set_timesteps()


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tab"}, "method='tab' is unknown"),
        ({"method": "tab3", "method_options": {"corector": 2}}, "does not take the options"),
        ({"prediction_type": "velocity"}, "prediction_type='velocity' is unknown; the known ones are 'epsilon'"),
        ({"times": "LCMScheduler"}, "times='LCMScheduler' names no scheduler"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanScheduler(**settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"solver_ordr": 3}, r"unknown keys \['solver_ordr'\]"),
        ({"_class_name": "LCMScheduler"}, "a configuration of 'LCMScheduler' has no plan"),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0=False has no published plan"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "disable_corrector and solver_p have no plan"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver", "solver_order": 3},
            "algorithm_type='sde-dpmsolver' of solver_order=3 has no plan; give method=",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas=True has no plan"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous' has no plan"),
    ],
)
def test_nothing_in_a_configuration_is_ignored(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanScheduler.from_config(config)


def test_each_timestep_has_one_step_in_order() -> None:
    scheduler = PlanScheduler(**SD, method="tab1")
    x = noise(1, 1, 2, 2)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(3)
    t = scheduler.timesteps
    with pytest.raises(ValueError, match=r"timestep=998.0 is none of the scheduler's, which are \[999.0"):
        scheduler.step(x, 998, x)
    scheduler.step(x, t[0], x)
    with pytest.raises(ValueError, match="number 0, and number 1 is next"):
        scheduler.step(x, t[0], x)
    with pytest.raises(ValueError, match="number 2, and number 1 is next"):
        scheduler.step(x, t[2], x)
    scheduler.step(x, int(t[1]), x)
    scheduler.step(x, t[2].clone(), x)
    with pytest.raises(ValueError, match="called after the last of 3 steps"):
        scheduler.step(x, t[2], x)
    scheduler.set_timesteps(3)
    scheduler.step(x, scheduler.timesteps[0], x)


def test_the_timesteps_that_are_asked_for_must_exist() -> None:
    scheduler = PlanScheduler(**SD)
    for number in (0, -3, True):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            scheduler.set_timesteps(number)
    with pytest.raises(ValueError, match="num_inference_steps=1001 is more than the 1000 times"):
        scheduler.set_timesteps(1001)
    with pytest.raises(ValueError, match="num_step=1000 asks for 1001 distinct times, and the schedule has 1000; use fewer steps"):
        PlanScheduler(**SD, method="tab1", final_sigmas_type="sigma_min").set_timesteps(1000)
    with pytest.raises(ValueError, match="one of them"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="one of them"):
        scheduler.set_timesteps(timesteps=[3, 2], sigmas=[3.0, 2.0])
    with pytest.raises(ValueError, match="num_inference_steps=3 contradicts the 2 timesteps"):
        scheduler.set_timesteps(3, timesteps=[999, 500])
    with pytest.raises(ValueError, match="timesteps must be numbers that fall strictly"):
        scheduler.set_timesteps(timesteps=[500, 999])
    with pytest.raises(ValueError, match=r"timesteps must lie in 0 \.\.\. 999"):
        scheduler.set_timesteps(timesteps=[1000, 500])


def test_every_training_time_can_be_a_step() -> None:
    scheduler = PlanScheduler(**SD, method="tab1")
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))


def test_the_network_must_return_the_shape_of_the_sample() -> None:
    scheduler = PlanScheduler(**SD)
    scheduler.set_timesteps(3)
    x = noise(1, 4, 8, 8)
    with pytest.raises(ValueError, match="for a network that predicts a variance, too, set variance_type='learned_range'"):
        scheduler.step(noise(1, 8, 8, 8), scheduler.timesteps[0], x)
    learned = PlanScheduler(**SD, variance_type="learned_range")
    learned.set_timesteps(3)
    m = noise(1, 8, 8, 8, seed=1)
    expected = scheduler.step(m[:, :4], scheduler.timesteps[0], x).prev_sample
    assert torch.equal(learned.step(m, learned.timesteps[0], x).prev_sample, expected)


# --- times and levels -----------------------------------------------------------------------------------------------------


def test_custom_timesteps_and_sigmas() -> None:
    scheduler = PlanScheduler(**SD, method="tab2")
    scheduler.set_timesteps(timesteps=[999, 700, 400, 100])
    assert scheduler.timesteps.tolist() == [999, 700, 400, 100]
    assert scheduler.sigmas[-1] == 0
    sigmas = scheduler.sigmas.tolist()
    scheduler.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(scheduler.timesteps.double(), torch.tensor([999.0, 700, 400, 100]).double(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(sigmas))
    flow = PlanScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    flow.set_timesteps(sigmas=[1.0, 0.5])
    torch.testing.assert_close(flow.sigmas, torch.tensor([1.0, 0.75, 0.0]))


@pytest.mark.parametrize("name", ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_noise_is_added_as_diffusers_adds_it(name: str) -> None:
    theirs = getattr(diffusers, name)()
    ours = PlanScheduler.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    x_0, eps, t = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1), ours.timesteps[[0, 4, 9]]
    expected = theirs.add_noise(x_0, eps, t) if name == "DDPMScheduler" else theirs.scale_noise(x_0, t, eps)
    torch.testing.assert_close(ours.add_noise(x_0, eps, t), expected)
    torch.testing.assert_close(ours.scale_noise(x_0, t, eps), expected)
    with pytest.raises(ValueError, match="must lie within the training's 1000 times"):
        ours.add_noise(x_0, eps, torch.tensor([1001]))


# --- the protocol ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning:numpy")  # of tensors in KDPM2
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_configurations_go_through_every_neighbour_and_come_back(name: str) -> None:
    """The noise and the spacing as they were; the method and the times are the neighbour's own, and no longer the first one's."""
    scheduler = PlanScheduler(**SD, method="tab2", method_options={"lower_order_final": True}, timestep_spacing="trailing")
    assert getattr(diffusers, name) in scheduler.compatibles
    there = getattr(diffusers, name).from_config(scheduler.config)
    named = {"_class_name": name} if name in ("LMSDiscreteScheduler", "KDPM2DiscreteScheduler") else {}  # of the same parameters
    back = PlanScheduler.from_config(there.config | named)
    assert {key: back.config[key] for key in SD} | {"spacing": back.config.timestep_spacing} == SD | {"spacing": "trailing"}
    fresh = PlanScheduler.from_config({"_class_name": name} | dict(getattr(diffusers, name)(**_known(name)).config))
    assert (back.config.method, back.config.times) == (fresh.config.method, fresh.config.times)
    assert back.config.get("method_options") == fresh.config.get("method_options")
    back.set_timesteps(10)


def _known(name: str) -> dict[str, Any]:
    return {key: value for key, value in SD.items() if key in signature(name)}


def test_a_saved_configuration_is_one_for_a_neighbour(tmp_path: Path) -> None:
    """It holds None for what nobody chose, which is no setting of another class."""
    PlanScheduler(**SD, method="tab3").save_pretrained(tmp_path)
    saved = PlanScheduler.from_pretrained(tmp_path)
    there = diffusers.DPMSolverMultistepScheduler.from_config(saved.config)
    assert (there.config.beta_start, there.config.timestep_spacing) == (SD["beta_start"], "linspace")
    there.set_timesteps(5)


def test_the_defaults_of_a_neighbour_are_nobody_s_choice_for_the_next() -> None:
    ddim = diffusers.DDIMScheduler(**SD)
    assert ddim.config.timestep_spacing == "leading"
    ours = PlanScheduler.from_config(ddim.config)
    assert (ours.config.timestep_spacing, ours.config.clip_sample) == ("leading", True)
    assert diffusers.EulerDiscreteScheduler.from_config(ours.config).config.timestep_spacing == "linspace"


def test_an_option_that_is_asked_for_is_kept_whatever_the_steps() -> None:
    asked = PlanScheduler(**SD, method="tab3", method_options={"lower_order_final": True})
    loaded = PlanScheduler.from_config(diffusers.DEISMultistepScheduler(**SD, solver_order=4).config)
    assert loaded.config.method == "tab3"
    for steps in (10, 20):
        for scheduler in (asked, loaded):
            scheduler.set_timesteps(steps)
        low = deis.make_plan(asked.sde, "tab3", ts=asked.plan.ts, lower_order_final=True)
        plain = deis.make_plan(asked.sde, "tab3", ts=asked.plan.ts)
        np.testing.assert_array_equal(asked.plan.keep_p, low.keep_p)
        np.testing.assert_array_equal(loaded.plan.keep_p, low.keep_p if steps < 15 else plain.keep_p)


def test_it_is_saved_and_read(tmp_path: Path) -> None:
    scheduler = PlanScheduler(**SD, method="unipc2", trained_betas=np.linspace(1e-4, 1e-2, 50), num_train_timesteps=50)
    scheduler.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    assert again.betas.tolist() == scheduler.betas.tolist()
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["method"] == "unipc2"
    assert torch.equal(run(scheduler), run(again))


def test_it_is_a_scheduler() -> None:
    scheduler = PlanScheduler(**SD)
    assert isinstance(scheduler, SchedulerMixin)
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler), scheduler.step_index) == (1, 1.0, 1000, None)
    scheduler.set_timesteps(10)
    x = noise(1, 1, 2, 2)
    assert scheduler.scale_model_input(x, 0.0) is x
    first = scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(10)
    assert torch.equal(scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)[0], first.prev_sample)
    assert (scheduler.step_index, scheduler.begin_index) == (1, None)
    other = copy.deepcopy(scheduler)
    assert torch.equal(other.step(x, other.timesteps[1], x).prev_sample, scheduler.step(x, scheduler.timesteps[1], x).prev_sample)


def test_clones_serve_threads() -> None:
    scheduler = PlanScheduler(**SD, method="unipc2")
    scheduler.set_timesteps(10)
    starts = [noise(2, 3, 8, 8, seed=seed) for seed in range(4)]
    expected = [run(scheduler, x=x) for x in starts]
    ends: dict[int, Tensor] = {}

    def work(i: int, mine: PlanScheduler) -> None:
        x = starts[i]
        for t in mine.timesteps:
            x = mine.step(network(x, t), t, x, return_dict=False)[0]
        ends[i] = x

    threads = [threading.Thread(target=work, args=(i, scheduler.clone())) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(ends[i], expected[i]) for i in range(4))


class _NoReading(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses to read a tensor's value, for which a device would have to finish its work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{"method": "tab3"}, {"method": "unipc2"}, {"method": "ancestral"}])
def test_no_step_waits_for_the_device(settings: dict[str, Any]) -> None:
    scheduler = PlanScheduler(**SD, **settings)
    scheduler.set_timesteps(5)
    x = noise(1, 1, 4, 4)
    with _NoReading():  # type: ignore[no-untyped-call]
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, generator=torch.Generator(), return_dict=False)[0]
        with pytest.raises(AssertionError, match="a value was read"):
            float(x[0, 0, 0, 0])
