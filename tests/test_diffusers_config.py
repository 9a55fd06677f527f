"""What PlanScheduler reads of the configurations of diffusers' schedulers: every setting means here what it means there."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import deis
import deis.cut
from deis.adapters.diffusers import PlanScheduler
from deis.adapters.diffusers_config import signature
from deis.backends.torch import combine
from deis.machine import run_rows

from .oracle import FEW_STEPS
from .schedulers import SD, both, network, noise

# --- what stood for something else, without a word ------------------------------------------------------------------------


@FEW_STEPS
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("algorithm", "order", "final"),
    [
        ("dpmsolver", 1, "sigma_min"),
        ("dpmsolver", 2, "sigma_min"),
        ("dpmsolver", 3, "sigma_min"),
        ("dpmsolver++", 2, "sigma_min"),
        ("dpmsolver++", 3, "zero"),
        ("dpmsolver++", 3, "sigma_min"),
        ("sde-dpmsolver", 1, "sigma_min"),
        ("sde-dpmsolver", 2, "sigma_min"),
        ("sde-dpmsolver++", 1, "zero"),
        ("sde-dpmsolver++", 2, "zero"),
        ("sde-dpmsolver++", 2, "sigma_min"),
    ],
)
@pytest.mark.parametrize(("steps", "euler"), [(9, False), (20, False), (20, True)])
def test_every_solver_of_dpm_solver_multistep(algorithm: str, order: int, final: str, solver: str, steps: int, euler: bool) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(
        **SD, algorithm_type=algorithm, solver_order=order, solver_type=solver, final_sigmas_type=final, euler_at_final=euler
    )
    expected, found = both(theirs, PlanScheduler.from_config(theirs.config), steps=steps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))


@FEW_STEPS
@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 20])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("algorithm", "final"), [("dpmsolver++", "zero"), ("dpmsolver++", "sigma_min"), ("dpmsolver", "sigma_min")]
)
def test_singlestep_solvers_run_at_the_times_of_their_configuration(
    algorithm: str, final: str, order: int, solver: str, steps: int
) -> None:
    theirs = diffusers.DPMSolverSinglestepScheduler(
        **SD, algorithm_type=algorithm, solver_order=order, solver_type=solver, final_sigmas_type=final
    )
    ours = PlanScheduler.from_config(theirs.config)
    expected, found = both(theirs, ours, steps=steps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_stochastic_sampling_of_flow_matching_renews_all_the_noise(shift: float) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    ours = PlanScheduler.from_config(theirs.config)
    ends = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        x, generator = noise(2, 3, 8, 8), torch.Generator().manual_seed(3)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)


def timeless(x: Tensor, t: Tensor) -> Tensor:
    """Return a function of the state alone: diffusers rounds the times of some levels, and keeps the levels."""
    return 0.5 * x + 0.1 * torch.sin(3 * x)


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_a_spacing_that_the_class_of_the_configuration_lacks_is_dpm_solver_s(name: str, spacing: str) -> None:
    config = getattr(diffusers, name)(**SD).config
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(config, solver_type="heun", **{spacing: True})
    options = {"lower_order_final": True}
    ours = PlanScheduler.from_config(config, method="dpmpp_2m", method_options=options, clip_sample=False, **{spacing: True})
    expected, found = both(theirs, ours, model=timeless)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)


@pytest.mark.parametrize("most", [0.5, 1.0, 1.5])
def test_thresholding_to_less_than_the_data_s_range(most: float) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, thresholding=True, sample_max_value=most)
    expected, found = both(theirs, PlanScheduler.from_config(theirs.config), model=lambda x, t: 0.3 * network(x, t))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}])
@pytest.mark.parametrize(
    "bounds", [{"sigma_max": 700.0}, {"sigma_max": 700.0, "sigma_min": 0.002}, {"sigma_max": 3.0, "sigma_min": 0.1}]
)
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_levels_beyond_the_training_s(name: str, settings: dict[str, Any], bounds: dict[str, float]) -> None:
    """The network is told the last training time, or the first, as by diffusers."""
    theirs = getattr(diffusers, name)(**SD, **settings, **bounds, prediction_type="v_prediction")
    ours = PlanScheduler.from_config(theirs.config)
    expected, found = both(theirs, ours, model=timeless)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    assert ours.timesteps[0] == theirs.timesteps[0] or bounds["sigma_max"] == 3.0
    assert 0 <= ours.timesteps.min() <= ours.timesteps.max() <= 999
    x_0, eps = noise(1, 1, 4, 4), noise(1, 1, 4, 4, seed=1)
    ours.set_begin_index(0)
    plan = ours.plan
    torch.testing.assert_close(ours.add_noise(x_0, eps, ours.timesteps[:1]), plan.alpha[0] * x_0 + plan.sigma[0] * eps)


def test_bounds_of_the_levels_that_another_class_left() -> None:
    """diffusers' spacings read them of any configuration."""
    euler = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True, sigma_max=700.0, sigma_min=0.002)
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(euler.config)
    ours = PlanScheduler.from_config(theirs.config)
    expected, found = both(theirs, ours, model=timeless)
    assert theirs.sigmas[0] == 700
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_karras_levels_from_a_signal_to_noise_ratio_of_0_start_at_the_last_time() -> None:
    """In the default betas, rescaled, the last alpha of 2^-12 lies above the two before it."""
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "use_karras_sigmas": True}
    theirs = diffusers.DPMSolverMultistepScheduler(**settings)
    assert theirs.alphas_cumprod[-1] > theirs.alphas_cumprod[-3]
    ours = PlanScheduler.from_config(theirs.config)
    expected, found = both(theirs, ours, model=timeless)
    assert ours.timesteps[0] == 999
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("settings", [{"beta_schedule": "exp"}, {}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}])
def test_it_equals_heun(settings: dict[str, Any]) -> None:
    theirs = diffusers.HeunDiscreteScheduler(**SD | settings)
    ours = PlanScheduler.from_config(theirs.config)
    assert ours.config.times == "HeunDiscreteScheduler"
    expected, found = both(theirs, ours, steps=10, own_steps=19, model=timeless)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ts_phase": "t", "use_karras_sigmas": True}, "ts_phase='t' and use_karras_sigmas=True name two grids"),
        (
            {"beta_schedule": "exp"},
            "beta_schedule='exp' is unknown to DPMSolverMultistepScheduler; give its betas as trained_betas",
        ),
        ({"use_flow_sigmas": True, "timestep_spacing": "trailing"}, "timestep_spacing='trailing' does not apply to flow matching"),
        ({"use_flow_sigmas": True, "trained_betas": [0.1, 0.2]}, r"trained_betas=\[0.1, 0.2\] does not apply to flow matching"),
        ({"use_flow_sigmas": True, "final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min' has no meaning for flow"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanScheduler(**settings)


def test_an_argument_that_the_configuration_cannot_use_is_refused() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    with pytest.raises(ValueError, match=r"timestep_spacing='trailing' does not apply to the times of a configuration of Flow"):
        PlanScheduler.from_config(flow, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"shift=2\.0 does not apply to the times of a configuration of DDIMScheduler"):
        PlanScheduler.from_config(diffusers.DDIMScheduler().config, shift=2.0)
    unipc = diffusers.UniPCMultistepScheduler(**SD, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    ours = PlanScheduler.from_config(unipc.config)  # whose class ignores its spacing and its betas, too
    assert ours.config.beta_end == SD["beta_end"]
    expected, found = both(unipc, ours, model=timeless)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_method_of_an_earlier_plan_scheduler_does_not_persist() -> None:
    plan = deis.make_plan(PlanScheduler(**SD).sde, "tab2", 5)
    for first in (PlanScheduler(**SD, method="tab3", ts_phase="t"), PlanScheduler.from_plan(plan, PlanScheduler(**SD).config)):
        unipc = diffusers.UniPCMultistepScheduler.from_config(first.config)
        back = PlanScheduler.from_config(unipc.config)
        assert (back.config.method, back.config.times) == ("unipc2_bh2", "UniPCMultistepScheduler")
        assert not {"plan", "ts_phase"} & set(back.config)
        expected, found = both(unipc, back)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    again = PlanScheduler.from_config(first.config)
    assert again.config.plan == first.config.plan


def test_a_new_method_leaves_the_options_and_the_plan_of_the_old_one() -> None:
    plan = deis.make_plan(PlanScheduler(**SD).sde, "tab2", 5)
    options = {"solver": "heun"}
    for first in (
        PlanScheduler(**SD, method="dpmpp_3m_published", method_options=options),
        PlanScheduler.from_plan(plan, PlanScheduler(**SD).config),
    ):
        second = PlanScheduler.from_config(first.config, method="tab3")
        second.set_timesteps(7)
        assert second.plan.method == "tab3"
    kept = PlanScheduler.from_config(PlanScheduler(**SD, method="dpmpp_3m_published", method_options=options).config, ts_phase="t")
    assert kept.config.method_options == options


def test_a_setting_that_flow_matching_never_had_goes_on_to_the_next_class() -> None:
    dpm = diffusers.DPMSolverMultistepScheduler(**SD, final_sigmas_type="sigma_min", timestep_spacing="trailing")
    ours = PlanScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler.from_config(dpm.config).config)
    ours.set_timesteps(5)
    assert ours.sigmas[-1] == 0
    again = diffusers.DPMSolverMultistepScheduler.from_config(ours.config)
    assert (again.config.final_sigmas_type, again.config.timestep_spacing) == ("sigma_min", "trailing")


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_a_configuration_that_may_be_that_of_two_methods_is_refused(name: str) -> None:
    """The two have the same parameters, and one that was never saved has no name; a method that is asked for settles it."""
    config = dict(signature(name))
    with pytest.raises(ValueError, match="may be that of LMSDiscreteScheduler or KDPM2DiscreteScheduler"):
        PlanScheduler.from_config(config)
    assert PlanScheduler.from_config(config, method="tab3").config.method == "tab3"


# --- the grid of auto -----------------------------------------------------------------------------------------------------


def is_own_grid(scheduler: PlanScheduler) -> bool:
    scheduler.set_timesteps(7)
    return bool(scheduler.plan == deis.make_plan(scheduler.sde, "auto", nfe=7))


def test_auto_runs_on_its_own_grid_unless_a_spacing_is_named() -> None:
    assert is_own_grid(PlanScheduler(**SD))
    assert is_own_grid(PlanScheduler())
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        saved = json.loads(getattr(diffusers, name)(**SD).to_json_string())  # where defaults stand beside choices
        for config in (getattr(diffusers, name)(**SD).config, saved):
            assert is_own_grid(PlanScheduler.from_config(config, method="auto"))
            assert is_own_grid(PlanScheduler.from_config(PlanScheduler.from_config(config, method="tab3").config, method="auto"))
    assert is_own_grid(PlanScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config, method="auto"))


@pytest.mark.parametrize(
    "settings", [{"timestep_spacing": "linspace"}, {"ts_phase": "t"}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}]
)
def test_auto_runs_on_a_spacing_that_is_named(settings: dict[str, Any]) -> None:
    other = {"ts_phase": "t", "ts_order": None} if "ts_phase" in settings else {}
    for scheduler in (
        PlanScheduler(**SD, **settings),
        PlanScheduler.from_config(diffusers.DDIMScheduler(**SD).config, method="auto", **settings),
    ):
        assert not is_own_grid(scheduler)
        twin = PlanScheduler.from_config(scheduler.config, method="tab1", **other)
        twin.set_timesteps(7)
        assert twin.timesteps.tolist() == scheduler.timesteps.tolist()


def test_auto_runs_on_the_shift_of_flow_matching() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = PlanScheduler.from_config(theirs.config, method="auto")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)


def test_a_grid_in_t_has_the_shift_of_flow_matching() -> None:
    ours = PlanScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, ts_phase="t", ts_order=1.0)
    ours.set_timesteps(4)
    torch.testing.assert_close(ours.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


@pytest.mark.parametrize("settings", [{"ts_phase": "t"}, {"ts_phase": "vp_t"}, {}])
def test_a_grid_of_deis_ends_where_the_configuration_says(settings: dict[str, Any]) -> None:
    scheduler = PlanScheduler(**SD, **settings, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(6)
    assert scheduler.plan.t[-1] == 1
    assert scheduler.plan.nfe == len(scheduler.timesteps) == 6


def test_rows_without_an_evaluation_are_done_with_the_one_before() -> None:
    """EDM's churn adds noise before a step; not before the first here, which lies above its range."""
    scheduler = PlanScheduler(**SD, method="edm_heun", method_options={"churn": 4.0, "high": 10.0}, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(10)
    x, generator = noise(2, 3, 8, 8), torch.Generator().manual_seed(0)
    x_0, plan = x, scheduler.plan
    for t in scheduler.timesteps:
        x_0 = scheduler.step(network(x_0, t), t, x_0, generator=generator, return_dict=False)[0]
    generator = torch.Generator().manual_seed(0)
    expected = run_rows(
        plan.rows,
        lambda i, x: network(x, plan.t[i] - 1),
        combine,
        x,
        add_noise=lambda keep_z, x: torch.add(x, torch.randn(x.shape, generator=generator), alpha=keep_z),
    )
    assert (~plan.calls).sum() > 1
    assert len(scheduler.timesteps) == plan.nfe == 10
    torch.testing.assert_close(x_0, expected, rtol=1e-6, atol=1e-6)
