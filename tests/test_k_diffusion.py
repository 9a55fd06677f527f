"""sample_deis with k-diffusion's calling convention, against diffusers' schedulers in the same space; and the ComfyUI folder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
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
from deis.cut import cut_plan
from deis.methods.registry import REGISTRY

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


# --- ComfyUI's wrappers, in their shape: KSamplerX0Inpaint -> CFGGuider -> BaseModel, which has a model_sampling -------------


class EPS:
    """x = x_0 + sigma eps."""


class CONST:
    """x = (1 - sigma) x_0 + sigma eps."""


class ModelSamplingDiscrete:
    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas.float()
        self.sigma_max = self.sigmas[-1]


class ModelSamplingContinuousEDM(ModelSamplingDiscrete):
    """Its table stands there for the schedulers alone."""


class ModelSamplingContinuousV(ModelSamplingContinuousEDM):
    pass


class ModelSamplingCosmosRFlow(ModelSamplingContinuousEDM):
    pass


class BaseModel:
    def __init__(self, model_sampling: Any, denoise: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model_sampling, self.apply_model = model_sampling, denoise


class CFGGuider:
    def __init__(self, inner_model: BaseModel) -> None:
        self.inner_model = inner_model

    def __call__(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        return self.inner_model.apply_model(x, timestep)


class KSamplerX0Inpaint:
    """What a sampler is called with. Its `sigmas` are the falling levels of this run, no table of the model."""

    def __init__(self, model: CFGGuider, sigmas: Tensor) -> None:
        self.inner_model, self.sigmas = model, sigmas

    def __call__(
        self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None = None, model_options: Any = None, seed: int | None = None
    ) -> Tensor:
        return self.inner_model(x, sigma, model_options=model_options, seed=seed)


def wrapped(
    state: type, base: type, sigmas: Tensor, denoise: Callable[[Tensor, Tensor], Tensor] | None = None, table: Tensor = TABLE
) -> KSamplerX0Inpaint:
    kind = type("ModelSampling", (base, state), {})
    return KSamplerX0Inpaint(CFGGuider(BaseModel(kind(table), denoise or DiscreteModel())), sigmas)


def flow(x: Tensor, sigma: Tensor) -> Tensor:
    """Return x_0 of a flow-matching network."""
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
        scheduler.scale_model_input(x, t)  # which it wants to be asked, though this network takes x as it is
        x = scheduler.step((x - denoised) / sigma, t, x).prev_sample
    torch.testing.assert_close(x_0, x, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_ends_at_the_data(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    x = noise()
    x_0 = sample_deis(
        wrapped(CONST, ModelSamplingDiscrete, scheduler.sigmas, flow), x, scheduler.sigmas, disable=True, method="ddim"
    )
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
    straight = deis.make_plan(deis.FlowMatching(), "tab2", 5)
    np.testing.assert_allclose(sigmas_of(straight), straight.ts, rtol=1e-6)
    with pytest.raises(ValueError, match="give it its own"):
        sample_deis(DiscreteModel(), x, sigmas_of(straight), disable=True, plan=straight)
    other = deis.make_plan(deis.EDM(0.1, 14), "tab2", 5)
    with pytest.raises(ValueError, match="was made for the schedule 'EDM"):
        sample_deis(DiscreteModel(), x, sigmas_of(other), disable=True, plan=other)


@pytest.mark.parametrize("part", [(0, 4), (2, 6), (4, 6), (1, 3)])
def test_a_plan_runs_on_a_part_of_its_levels(part: tuple[int, int]) -> None:
    """As ComfyUI's SplitSigmas cuts them."""
    sde = schedule_of(DiscreteModel())
    plan = deis.make_plan(sde, "tab2", 5)
    cut = cut_plan(plan, sde, *(float(plan.ts[i]) if 0 < i < 5 else None for i in (part[0], part[1] - 1)))
    sigmas = sigmas_of(plan)[slice(*part)]
    x = noise(torch.float64) * sigmas[0]
    told: list[dict[str, Any]] = []
    model = DiscreteModel()
    end = sample_deis(model, x, sigmas, None, told.append, disable=True, plan=plan)
    expected = deis.sample(cut, lambda x, t: eps(x, t - 1), cut.alpha[0].item() * x) / cut.alpha[-1].item()
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.seen, sigmas[:-1], rtol=1e-6)
    assert [entry["i"] for entry in told] == list(range(len(sigmas) - 1))


def test_a_plan_begins_between_two_of_its_levels() -> None:
    plan = deis.make_plan(schedule_of(DiscreteModel()), "tab2", 5)
    sigmas = sigmas_of(plan)[1:]
    sigmas[0] *= 1.2
    x = noise() * sigmas[0]
    model = DiscreteModel()
    assert torch.isfinite(sample_deis(model, x, sigmas, disable=True, plan=plan)).all()
    np.testing.assert_allclose(model.seen, sigmas[:-1], rtol=1e-6)
    for wrong in (sigmas[[0, 2, 4]], sigmas_of(plan) * torch.tensor([1.1, 1, 1, 1, 1, 1])):
        with pytest.raises(ValueError, match="give it its own"):
            sample_deis(DiscreteModel(), x, wrong, disable=True, plan=plan)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 2.0], "must be finite, at least 0, and never rise"),
        ([1.0, -0.1], "must be finite, at least 0, and never rise"),
        ([float("nan"), 1.0], "must be finite, at least 0, and never rise"),
    ],
)
def test_levels_that_no_plan_has_are_refused(sigmas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_deis(DiscreteModel(), noise(), torch.tensor(sigmas), disable=True)


def test_levels_above_a_schedule_take_the_level_for_the_time() -> None:
    sigmas = torch.tensor([100.0, 14.0, 1.0, 0.0])
    x = noise() * 100
    expected = sample_deis(DiscreteModel(), x, sigmas, disable=True, method="tab2", schedule=deis.EDM(0.0, 100.0))
    assert torch.equal(sample_deis(DiscreteModel(), x, sigmas, disable=True, method="tab2"), expected)
    for schedule, start in ((schedule_of(DiscreteModel()), 100.0), (deis.FlowMatching(), 1.5)):
        with pytest.raises(ValueError, match="is above the greatest noise level of the schedule"):
            sample_deis(DiscreteModel(), x, torch.tensor([start, 0.5]), disable=True, schedule=schedule)


@pytest.mark.parametrize("method", ["tab2", "dpmpp_2s", "ancestral"])
def test_equal_levels_are_one(method: str) -> None:
    """A step of no length is no step; the last of equal levels is the one that is counted."""
    sigmas = torch.tensor([14.0, 14.0, 5.0, 1.0, 1.0, 1.0 - 1e-7, 0.3, 0.0, 0.0])
    told: list[dict[str, Any]] = []
    x = noise() * 14
    end = sample_deis(DiscreteModel(), x, sigmas, None, told.append, True, method=method, generator=torch.Generator())
    different = sigmas[[1, 2, 5, 6, 8]]
    expected = sample_deis(DiscreteModel(), x, different, disable=True, method=method, generator=torch.Generator())
    torch.testing.assert_close(end, expected)
    assert [entry["i"] for entry in told] == [1, 2, 5, 6]
    for flat in (sigmas[:2], sigmas[:1], sigmas[-2:]):
        assert sample_deis(DiscreteModel(), x, flat, disable=True, method=method) is x


def test_a_stage_at_the_data_themselves_is_refused() -> None:
    with pytest.raises(ValueError, match="predicts='x0' does not determine eps at t="):
        sample_deis(DiscreteModel(), noise(), torch.tensor([2.0, 1.0, 0.0]), disable=True, method="rhork_3kutta")


# --- ComfyUI --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tab3", "auto"])
def test_the_levels_of_a_run_are_no_table(method: str) -> None:
    """A wrapper keeps them in `sigmas`; the model behind it has its own."""
    sigmas = TABLE[[900, 600, 300, 100]].float()
    x, model = noise() * sigmas[0], DiscreteModel()
    through = wrapped(EPS, ModelSamplingDiscrete, sigmas, model)
    assert schedule_of(through).num_times == 1001
    end = sample_deis(through, x, sigmas, {"model_options": {}, "seed": None, "denoise_mask": None}, disable=True, method=method)
    assert torch.equal(end, sample_deis(DiscreteModel(), x, sigmas, disable=True, method=method))
    assert model.seen == sigmas[:-1].tolist()
    lone = KSamplerX0Inpaint(CFGGuider(BaseModel(None, flow)), sigmas)
    assert isinstance(schedule_of(lone), deis.EDM)


@pytest.mark.parametrize(
    ("state", "base", "t_of_rho"),
    [
        (EPS, ModelSamplingContinuousEDM, lambda rho: rho),
        (EPS, ModelSamplingContinuousV, lambda rho: np.arctan(rho) * 2 / np.pi),
        (EPS, ModelSamplingCosmosRFlow, lambda rho: rho / (1 + rho)),
        (CONST, ModelSamplingDiscrete, lambda rho: rho / (1 + rho)),
    ],
)
def test_a_continuous_class_has_its_own_clock(state: type, base: type, t_of_rho: Callable[[Any], Any]) -> None:
    rho = np.array([80.0, 5.0, 1.0, 0.1, 1e-3])
    np.testing.assert_allclose(schedule_of(wrapped(state, base, TABLE)).t_of_rho(rho), t_of_rho(rho), rtol=1e-12)


@pytest.mark.parametrize("state", [EPS, CONST])
@pytest.mark.parametrize("base", [ModelSamplingContinuousEDM, ModelSamplingContinuousV, ModelSamplingCosmosRFlow])
def test_every_state_runs_to_the_data(state: type, base: type) -> None:
    """For data that are one point, every consistent method ends there exactly."""
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.1, 0.0])
    x, point = noise(torch.float64), noise(torch.float64).flip(-1)
    start = x + point if state is EPS else x
    for method in ("tab2", "auto", "unipc2", "rhoab2"):
        model = wrapped(state, base, sigmas, lambda x, sigma: point)
        torch.testing.assert_close(sample_deis(model, start, sigmas, disable=True, method=method), point)
        partly = sample_deis(model, start, sigmas[:3], disable=True, method=method)
        torch.testing.assert_close(partly, (point if state is EPS else 0.7 * point) + 0.3 * x)


@pytest.mark.parametrize("table", ["clamped", "zero"])
def test_tables_with_ties_and_of_zero_snr_run(table: str) -> None:
    if table == "clamped":
        sigmas = TABLE.clamp(0.05, 10)
    else:
        root = ALPHAS.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas[-1] = 4.9e-8
        sigmas = ((1 - alphas) / alphas).sqrt()
    levels = torch.cat([sigmas.flip(0)[::20], sigmas.new_zeros(1)])
    x = noise(torch.float64) * levels[0]
    exact = x / (1 + levels[0] ** 2).sqrt()
    for method in ("tab2", "rhoab2", "auto"):
        model = wrapped(EPS, ModelSamplingDiscrete, levels, lambda x, sigma: x / (1 + sigma[0] ** 2), sigmas)
        end = sample_deis(model, x, levels, disable=True, method=method)
        assert float((end - exact).abs().max()) < 0.05


def test_flow_matching_takes_a_level_near_1_for_1() -> None:
    sigmas, x = torch.tensor([1 - 5e-5, 0.5, 0.0]), noise()
    ends = []
    for first in (sigmas[0], 1.0, 1 + 5e-5):
        sigmas[0] = first
        ends.append(sample_deis(wrapped(CONST, ModelSamplingDiscrete, sigmas, flow), x, sigmas, disable=True, method="tab2"))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Load the custom-node folder beside a stand-in for what it uses of ComfyUI: its lists of names, and how it looks them up."""
    package, samplers, k_diffusion, sampling, folders = (
        ModuleType(name) for name in ("comfy", "comfy.samplers", "comfy.k_diffusion", "comfy.k_diffusion.sampling", "folder_paths")
    )
    stand_in: Any = samplers
    stand_in.KSAMPLER_NAMES = ["euler", "uni_pc"]
    stand_in.SAMPLER_NAMES = [*stand_in.KSAMPLER_NAMES, "ddim"]
    stand_in.SCHEDULER_HANDLERS = {"simple": None}
    stand_in.SCHEDULER_NAMES = list(stand_in.SCHEDULER_HANDLERS)
    stand_in.SchedulerHandler = lambda handler: handler
    lists = {"SAMPLERS": stand_in.SAMPLER_NAMES, "SCHEDULERS": stand_in.SCHEDULER_NAMES}
    stand_in.KSampler = type("KSampler", (), lists)
    stand_in.KSAMPLER = type("KSAMPLER", (), {"__init__": lambda self, function: setattr(self, "sampler_function", function)})
    files: Any = folders
    known: dict[str, list[str]] = {}
    files.models_dir = str(tmp_path / "models")
    files.add_model_folder_path = lambda name, path: known.setdefault(name, [path])
    files.get_folder_paths = known.__getitem__
    files.get_input_directory = lambda: str(tmp_path / "input")
    for module in (package, samplers, k_diffusion, sampling, folders):
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
    assert samplers.KSampler.SCHEDULERS == ["simple", "deis"] == list(samplers.SCHEDULER_HANDLERS)
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas
    x = noise() * sigmas[0]
    for name, method in comfy.SAMPLERS.items():
        # As comfy.samplers.ksampler does it.
        function = getattr(sampling, f"sample_{name}")
        assert function.__name__ == f"sample_{name}"  # ComfyUI 0.29 logs it
        model = wrapped(EPS, ModelSamplingDiscrete, sigmas)
        end = function(model, x, sigmas, extra_args={"model_options": {}, "seed": 0}, callback=None, disable=True)
        assert torch.isfinite(end).all()
        if "ancestral" not in name and "sde" not in name:
            assert torch.equal(end, sample_deis(DiscreteModel(), x, sigmas, disable=True, method=method))


def test_comfyui_s_scheduler_is_the_grid_of_auto(comfy: Any) -> None:
    handler = sys.modules["comfy.samplers"].SCHEDULER_HANDLERS[comfy.SCHEDULER]
    sde = deis.EDM(0.0, float(TABLE[-1]))
    sampling = wrapped(EPS, ModelSamplingDiscrete, TABLE).inner_model.inner_model.model_sampling
    np.testing.assert_allclose(handler(sampling, 6), deis.make_plan(sde, "auto", 6).ts, rtol=1e-6)
    straight = wrapped(
        CONST, ModelSamplingDiscrete, TABLE, table=torch.linspace(0.01, 1, 100)
    ).inner_model.inner_model.model_sampling
    np.testing.assert_allclose(handler(straight, 6), deis.make_plan(deis.FlowMatching(), "auto", 6).ts, rtol=1e-6)


def test_comfyui_loads_a_plan(comfy: Any, tmp_path: Path) -> None:
    plan = deis.make_plan(schedule_of(DiscreteModel()), "unipc2", 6)
    node = comfy.NODE_CLASS_MAPPINGS["LoadDeisPlan"]
    with pytest.raises(
        FileNotFoundError, match=r"there is no plan file 'my.json'; give its whole path, or put it into .*deis_plans"
    ):
        node().load("my.json")
    assert "there is no plan file 'my.json'" in node.VALIDATE_INPUTS("my.json")
    for place in (tmp_path / "models" / "deis_plans", tmp_path / "input"):
        place.mkdir(parents=True)
        plan.save(place / f"{place.name}.json")
    assert set(node.INPUT_TYPES()["required"]) == {"path", "denoise"}
    assert len(node.RETURN_TYPES) == 2
    x = noise()
    for path in (str(tmp_path / "input" / "input.json"), "input.json", "deis_plans.json"):
        assert node.VALIDATE_INPUTS(path) is True
        for denoise, steps in ((1.0, 6), (0.5, 3)):
            sampler, sigmas = getattr(node(), node.FUNCTION)(path, denoise)
            assert torch.equal(sigmas, sigmas_of(plan)[-steps - 1 :])
            model = DiscreteModel()
            end = sampler.sampler_function(model, x * sigmas[0], sigmas, extra_args={}, callback=None, disable=True)
            assert len(model.seen) == steps
            assert torch.equal(end, sample_deis(DiscreteModel(), x * sigmas[0], sigmas, disable=True, plan=plan))
    assert node().load("input.json", 0.0)[1].shape == (0,)
    before = node.IS_CHANGED("input.json")
    deis.make_plan(schedule_of(DiscreteModel()), "tab2", 6).save(tmp_path / "input" / "input.json")
    assert node.IS_CHANGED("input.json") != before
    (tmp_path / "input" / "input.json").write_text("{")
    assert "is not a usable plan file" in node.VALIDATE_INPUTS("input.json")
