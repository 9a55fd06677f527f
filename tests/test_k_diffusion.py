"""sample_deis with k-diffusion's calling convention, against diffusers' schedulers in the same space; and the ComfyUI folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import deis
from deis.adapters.k_diffusion import sample_deis, schedule_of, sigmas_of
from deis.methods.registry import REGISTRY

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHAS = diffusers.DDIMScheduler(**SD).alphas_cumprod.double()
TABLE = ((1 - ALPHAS) / ALPHAS).sqrt()


def eps(x: Tensor, t: Any) -> Tensor:
    """Return a smooth function of the VP state and the training time."""
    s = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1) / 1000
    return x * (0.3 + 0.5 * s) + 0.1 * torch.sin(3 * x + 3 * s)


class DiscreteModel:
    """A network of training times in k-diffusion's space, as CompVisDenoiser and ComfyUI's models are."""

    def __init__(self) -> None:
        self.sigmas = TABLE.float()
        self.seen: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, offset: float = 0.0) -> Tensor:
        assert sigma.shape == (len(x),)
        self.seen.append(sigma[0].item())
        t = np.interp(np.log(sigma[0].item()), TABLE.log().numpy(), np.arange(1000))
        return x - sigma[0] * eps(x / (1 + sigma[0] ** 2).sqrt(), t) + offset


class FlowModel:
    """A flow-matching network, as ComfyUI wraps it."""

    class CONST:
        pass

    def __init__(self) -> None:
        self.inner_model = type("Inner", (), {"inner_model": type("Inner", (), {"model_sampling": self.CONST()})()})()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma[0] * eps(x, 1000 * sigma[0])


def noise(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("spacing", [{}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize(("name", "method"), [("EulerDiscreteScheduler", "ddim"), ("LMSDiscreteScheduler", "lms4")])
def test_it_equals_diffusers_in_the_same_space(name: str, method: str, spacing: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**SD, **spacing)
    scheduler.set_timesteps(10)
    sigmas, x, model = scheduler.sigmas, noise() * scheduler.sigmas[0], DiscreteModel()
    x_0 = sample_deis(model, x, sigmas, disable=True, method=method)
    np.testing.assert_allclose(model.seen, sigmas[:-1], rtol=1e-6)
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        denoised = DiscreteModel()(x, sigma.repeat(2))
        x = scheduler.step((x - denoised) / sigma, t, x).prev_sample
    torch.testing.assert_close(x_0, x, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_ends_at_the_data(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    x = noise()
    x_0 = sample_deis(FlowModel(), x, scheduler.sigmas, disable=True, method="ddim")
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t), t, x).prev_sample
    torch.testing.assert_close(x_0, x, rtol=1e-5, atol=1e-5)


NAMES = [entry.name.replace("<q>", "2").replace("<tableau>", "1euler") for entry in REGISTRY]


@pytest.mark.parametrize("method", NAMES)
def test_every_method_converges_in_the_model_s_own_schedule(method: str) -> None:
    """To the solution that DDIM finds in ten times as many steps; stochastic methods only stay finite."""
    model = DiscreteModel()
    sde = schedule_of(model)
    fine, coarse = (torch.from_numpy(sde.rho(deis.make_grid(sde, steps, "t", 1.0))) for steps in (400, 40))
    x = noise(torch.float64) * coarse[0]
    x_0 = sample_deis(model, x, coarse, disable=True, method=method, generator=torch.Generator().manual_seed(0))
    reference = sample_deis(model, x, fine, disable=True, method="ddim")
    assert torch.isfinite(x_0).all()
    if not deis.make_plan(sde, method, 4, "t").stochastic:
        assert float((x_0 - reference).abs().max()) < 0.1


def test_the_clock_is_the_model_s_training_time() -> None:
    """tab1 on three levels: the line through the predictions is one in the training time."""
    model = DiscreteModel()
    sde = schedule_of(model)
    sigmas = torch.tensor([TABLE[900], TABLE[500], TABLE[200]])
    x = noise(torch.float64) * sigmas[0]
    plan = deis.make_plan(sde, "tab1", ts=[901, 501, 201])
    expected = deis.sample(plan, lambda x, t: eps(x, t - 1), plan.alpha[0].item() * x) / plan.alpha[-1].item()
    torch.testing.assert_close(sample_deis(model, x, sigmas, disable=True, method="tab1"), expected, rtol=1e-5, atol=1e-5)


def test_a_plain_function_has_the_noise_level_for_its_time() -> None:
    sigmas = torch.tensor([80.0, 10.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    x = 80 * noise(torch.float64)
    x_0 = sample_deis(lambda x, sigma: x / (1 + sigma[0] ** 2), x, sigmas, disable=True, method="tab1")
    plan = deis.make_plan(deis.EDM(0.0, 80.0), "rhoab1", ts=sigmas.tolist())
    model = deis.Denoiser(lambda x, t: x / (1 + t[0] ** 2), deis.EDM(0.0, 80.0), "x0")
    torch.testing.assert_close(x_0, deis.sample(plan, model, x))


@pytest.mark.parametrize("method", ["tab2", "dpmpp_2s"])
def test_callback_and_arguments(method: str) -> None:
    told: list[dict[str, Any]] = []
    sigmas = torch.tensor([TABLE[900], TABLE[500], TABLE[200], 0.0])
    x = noise() * sigmas[0]
    end = sample_deis(DiscreteModel(), x, sigmas, {"offset": 0.1}, told.append, True, method=method)
    assert [entry["i"] for entry in told] == [0, 1, 2]
    np.testing.assert_allclose([entry["sigma"] for entry in told], sigmas[:-1], rtol=1e-6)
    torch.testing.assert_close(told[0]["x"], x)
    torch.testing.assert_close(told[0]["denoised"], DiscreteModel()(x, sigmas[0].repeat(2), 0.1))
    assert end.shape == x.shape
    assert sample_deis(DiscreteModel(), x, sigmas[:1]) is x


def test_the_seed_decides_the_noise() -> None:
    sigmas = torch.tensor([TABLE[900], TABLE[500], TABLE[200], 0.0])

    def model(x: Tensor, sigma: Tensor, seed: int) -> Tensor:
        return DiscreteModel()(x, sigma)

    x = noise() * sigmas[0]
    ends = [sample_deis(model, x, sigmas, {"seed": seed}, disable=True, method="ancestral") for seed in (1, 1, 2)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("offset", [0, 1])
def test_a_plan_runs_on_its_own_levels(offset: int) -> None:
    sde = schedule_of(DiscreteModel()) if offset else deis.VPSDE.discrete(1 / (1 + DiscreteModel().sigmas.double() ** 2))
    plan = deis.make_plan(sde, "tab2", 5)
    x = noise(torch.float64)
    sigmas = sigmas_of(plan)
    x_0 = sample_deis(DiscreteModel(), x * sigmas[0], sigmas, disable=True, plan=plan)
    expected = deis.sample(plan, lambda x, t: eps(x, t - offset), plan.alpha[0].item() * sigmas[0] * x) / plan.alpha[-1].item()
    torch.testing.assert_close(x_0, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="give it its own"):
        sample_deis(DiscreteModel(), x, sigmas * 1.01, disable=True, plan=plan)
    flow = deis.make_plan(deis.FlowMatching(), "tab2", 5)
    np.testing.assert_allclose(sigmas_of(flow), flow.ts, rtol=1e-6)
    with pytest.raises(ValueError, match="was made for the schedule 'FlowMatching"):
        sample_deis(DiscreteModel(), x, sigmas_of(flow), disable=True, plan=flow)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 2.0], "must be finite and fall strictly"),
        ([2.0, 1.0, 1.0], "must be finite and fall strictly"),
        ([float("nan"), 1.0], "must be finite and fall strictly"),
        ([100.0, 1.0], "is above the greatest noise level of the model, 14.61"),
    ],
)
def test_levels_that_no_plan_has_are_refused(sigmas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_deis(DiscreteModel(), noise(), torch.tensor(sigmas), disable=True)


def test_a_stage_at_the_data_themselves_is_refused() -> None:
    with pytest.raises(ValueError, match="predicts='x0' does not determine eps at t="):
        sample_deis(DiscreteModel(), noise(), torch.tensor([2.0, 1.0, 0.0]), disable=True, method="rhork_3kutta")


# --- ComfyUI --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load the custom-node folder beside a stand-in for what it uses of ComfyUI: its lists of names, and how it looks them up."""
    package, samplers, k_diffusion, sampling = (
        ModuleType(name) for name in ("comfy", "comfy.samplers", "comfy.k_diffusion", "comfy.k_diffusion.sampling")
    )
    stand_in: Any = samplers
    stand_in.KSAMPLER_NAMES = ["euler", "uni_pc"]
    stand_in.SAMPLER_NAMES = [*stand_in.KSAMPLER_NAMES, "ddim"]
    stand_in.KSampler = type("KSampler", (), {"SAMPLERS": stand_in.SAMPLER_NAMES})
    stand_in.KSAMPLER = type("KSAMPLER", (), {"__init__": lambda self, function: setattr(self, "sampler_function", function)})
    for module in (package, samplers, k_diffusion, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    path = Path(__file__).parents[1] / "comfy" / "__init__.py"
    spec = importlib.util.spec_from_file_location("deis_nodes", path)
    assert spec is not None
    assert spec.loader is not None
    nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)
    return nodes


def test_comfyui_finds_the_samplers(comfy: Any) -> None:
    samplers, sampling = (sys.modules[f"comfy.{name}"] for name in ("samplers", "k_diffusion.sampling"))
    names = samplers.KSampler.SAMPLERS
    assert names[:3] == ["euler", "uni_pc", "ddim"]
    assert names[3:] == list(comfy.SAMPLERS)
    comfy.register()
    assert len(names) == len(set(names))
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas
    x = noise() * sigmas[0]
    for name, method in comfy.SAMPLERS.items():
        # As comfy.samplers.ksampler does it.
        function = getattr(sampling, f"sample_{name}")
        end = function(DiscreteModel(), x, sigmas, extra_args={}, callback=None, disable=True)
        if "ancestral" not in name and "sde" not in name:
            assert torch.equal(end, sample_deis(DiscreteModel(), x, sigmas, disable=True, method=method))


def test_comfyui_loads_a_plan(comfy: Any, tmp_path: Path) -> None:
    plan = deis.make_plan(schedule_of(DiscreteModel()), "unipc2", 6)
    plan.save(tmp_path / "plan.json")
    node = comfy.NODE_CLASS_MAPPINGS["LoadDeisPlan"]
    assert set(node.INPUT_TYPES()["required"]) == {"path"}
    sampler, sigmas = getattr(node(), node.FUNCTION)(str(tmp_path / "plan.json"))
    assert len(node.RETURN_TYPES) == 2
    x = noise() * sigmas[0]
    end = sampler.sampler_function(DiscreteModel(), x, sigmas, extra_args={}, callback=None, disable=True)
    assert torch.equal(end, sample_deis(DiscreteModel(), x, sigmas, disable=True, plan=plan))
