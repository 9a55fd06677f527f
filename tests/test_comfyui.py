"""The folder `comfy` in ComfyUI itself: every model class, sampler and scheduler, and its own samplers beside ours.

It needs a checkout of ComfyUI, named by the environment variable DEIS_COMFYUI, and what ComfyUI imports:

    DEIS_COMFYUI=.../ComfyUI python -m pytest tests/test_comfyui.py -m comfyui

The network is a function inside ComfyUI's own BaseModel and ModelPatcher. Its output is what its model class turns into the exact
mean of x_0 for Gaussian data, or a mixture, so that the solution is known.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import deis
from benchmarks.comfyui import CONDITIONING, NODES, load_program, patcher_of
from deis.adapters.k_diffusion import schedule_of

ROOT = os.environ.get("DEIS_COMFYUI")
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(ROOT is None, reason="DEIS_COMFYUI does not name a checkout of ComfyUI"),
    pytest.mark.filterwarnings("ignore"),  # ComfyUI's own
]

SHAPE = (2, 4, 8, 8)
DEVIATION = torch.tensor([0.2, 0.45, 0.7, 1.0], dtype=torch.float64).view(1, 4, 1, 1)
MEAN = 0.3
MODES = torch.tensor([[0.3, -0.9, 0.25], [0.3, 0.2, 0.1], [0.4, 0.8, 0.3]], dtype=torch.float64).T  # weights, means, deviations
runs = {"asked": 0, "passed": 0}


@pytest.fixture(scope="module")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """ComfyUI's modules, with a folder of inputs; at the end it prints how many runs passed."""
    assert ROOT is not None
    found = load_program(ROOT)
    found.inputs = tmp_path_factory.mktemp("input")
    found.folders.set_input_directory(str(found.inputs))
    yield found
    version = importlib.import_module("comfyui_version").__version__
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        print(f"\nComfyUI {version}: {runs['passed']} of {runs['asked']} runs as they must be")


# --- models whose solution is known ------------------------------------------------------------------------------------------


def gaussian(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean of x_0 for data ~ N(MEAN, DEVIATION^2)."""
    return MEAN + alpha * DEVIATION**2 / ((alpha * DEVIATION) ** 2 + sigma**2) * (x - alpha * MEAN)


def mixture(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean of x_0 for data of which each number is from a mixture of three normal distributions."""
    weight, mean, deviation = MODES
    x, alpha, sigma = x[..., None], alpha[..., None], sigma[..., None]
    variance = (alpha * deviation) ** 2 + sigma**2
    share = (weight.log() - variance.log() / 2 - (x - alpha * mean) ** 2 / variance / 2).softmax(-1)
    return (share * (mean + alpha * deviation**2 / variance * (x - alpha * mean))).sum(-1)


class Network(torch.nn.Module):
    """A network whose output the class of the model turns into `mean_of`."""

    dtype = torch.float64

    def __init__(self, model: Any, mean_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.sampling: Callable[[], Any] = lambda: model.model_sampling
        self.mean_of = mean_of
        self.seen: list[float] = []

    def forward(self, x_in: Tensor, t: Tensor, transformer_options: Any = None, **others: Any) -> Tensor:
        about = self.sampling()
        sigma = transformer_options["sigmas"].double()
        self.seen.append(sigma[0].item())
        sigma = sigma.repeat(len(x_in) // len(sigma))
        zero, one = torch.zeros_like(x_in), torch.ones_like(x_in)
        x = x_in / about.calculate_input(sigma, one)
        x_0 = self.mean_of(x, about.noise_scaling(sigma, zero, one.clone()), sigma.view(-1, 1, 1, 1))
        # calculate_denoised is linear in the output.
        constant = about.calculate_denoised(sigma, zero, x)
        return (x_0 - constant) / (about.calculate_denoised(sigma, one, x) - constant)


def patched(node: str, *arguments: Any, method: str = "patch") -> Callable[[Any, Any], Any]:
    """Return what changes a model as a node of ComfyUI does."""
    return lambda program, model: getattr(program.nodes.NODE_CLASS_MAPPINGS[node](), method)(model, *arguments)[0]


# name: (ModelType, its sampling settings, a node that changes it)
CLASSES: dict[str, tuple[str, dict[str, Any], Callable[[Any, Any], Any] | None]] = {
    "EPS": ("EPS", {}, None),
    "EPS, cosine": ("EPS", {"beta_schedule": "cosine"}, None),
    "EPS, zsnr": ("EPS", {}, patched("ModelSamplingDiscrete", "eps", True)),
    "X0": ("EPS", {}, patched("ModelSamplingDiscrete", "x0", False)),
    "LCM": ("EPS", {}, patched("ModelSamplingDiscrete", "lcm", False)),
    "V": ("V_PREDICTION", {}, None),
    "V, zsnr": ("V_PREDICTION", {}, patched("ModelSamplingDiscrete", "v_prediction", True)),
    "V_EDM": ("V_PREDICTION_EDM", {}, None),
    "V_CONTINUOUS": ("V_PREDICTION_CONTINUOUS", {"sigma_min": 0.03, "sigma_max": 500.0}, None),
    "CASCADE": ("STABLE_CASCADE", {}, None),
    "CASCADE, shift": ("STABLE_CASCADE", {}, patched("ModelSamplingStableCascade", 2.0)),
    "EDM": ("EDM", {"sigma_data": 0.5, "sigma_max": 80.0}, None),
    "EDM, eps": ("EDM", {}, patched("ModelSamplingContinuousEDM", "eps", 120.0, 0.002)),
    "FLOW": ("FLOW", {}, None),
    "FLOW, shift": ("FLOW", {}, patched("ModelSamplingSD3", 3.0)),
    "AURA": ("FLOW", {}, patched("ModelSamplingAuraFlow", 1.73, method="patch_aura")),
    "FLUX": ("FLUX", {}, None),
    "IMG_TO_IMG": ("IMG_TO_IMG", {}, None),
    "COSMOS": ("FLOW_COSMOS", {"sigma_data": 1.0, "sigma_max": 80.0, "sigma_min": 0.002}, None),
}
LATER = {"IMG_TO_IMG_FLOW", "V_PREDICTION_DDPM"}
"""Types that came after 0.3.64, whose models bring their own table of levels; they have not been tried."""
STRAIGHT = ("FLOW", "FLOW, shift", "AURA", "FLUX")


def build(program: Any, name: str, mean_of: Callable[[Tensor, Tensor, Tensor], Tensor] = gaussian) -> Any:
    """Return a model patcher."""
    kind, settings, change = CLASSES[name]
    patcher = patcher_of(program, kind, settings)
    patcher.model.diffusion_model = Network(patcher.model, mean_of)
    return patcher if change is None else change(program, patcher)


def run(program: Any, model: Any, sampler: str, scheduler: str, steps: int = 10, *, check: bool = True, **options: Any) -> Tensor:
    """Return a picture by way of comfy.sample.sample, counted; its values are checked to be those of data."""
    latent, seed = options.pop("latent_image", torch.zeros(SHAPE)), options.pop("seed", 0)
    noise = options.pop("noise", program.sample.prepare_noise(latent, seed))
    model.model.diffusion_model.seen.clear()
    runs["asked"] += check
    end: Tensor = program.sample.sample(
        model, noise, steps, options.pop("cfg", 1.0), sampler, scheduler, CONDITIONING, CONDITIONING, latent,
        seed=seed, disable_pbar=True, **options,
    )  # fmt: skip
    if check:
        assert end.shape == latent.shape
        assert float(end.abs().max()) < 20, f"{sampler} with {scheduler} ends at {float(end.abs().max())}"
        runs["passed"] += 1
    return end


def sigmas(program: Any, model: Any, scheduler: str, steps: int) -> Tensor:
    levels: Tensor = program.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    return levels


# --- runs ------------------------------------------------------------------------------------------------------------------


def test_every_type_of_model_is_here(program: Any) -> None:
    assert {kind for kind, _, _ in CLASSES.values()} == set(program.model_base.ModelType.__members__) - LATER


def test_its_lists_have_the_samplers(program: Any) -> None:
    for names in (program.samplers.SAMPLER_NAMES, program.nodes.KSampler.INPUT_TYPES()["required"]["sampler_name"][0]):
        assert names[-len(program.ours.SAMPLERS) :] == list(program.ours.SAMPLERS)
    assert program.nodes.KSampler.INPUT_TYPES()["required"]["scheduler"][0][-1] == "deis"
    assert program.folders.get_folder_paths("deis_plans")


@pytest.mark.parametrize("name", CLASSES)
def test_every_sampler_on_every_class_and_scheduler(program: Any, name: str) -> None:
    """The network is called once at each of the different levels above 0, exactly there."""
    model = build(program, name)
    for scheduler in program.samplers.SCHEDULER_NAMES:
        levels = sigmas(program, model, scheduler, 10)
        different = [a for a, b in zip(levels.tolist(), [*levels.tolist()[1:], None], strict=True) if a != b and a > 0]
        for sampler in program.ours.SAMPLERS:
            run(program, model, sampler, scheduler)
            assert model.model.diffusion_model.seen == pytest.approx(different, rel=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_parts_masks_and_guidance(program: Any, name: str) -> None:
    model = build(program, name)
    latent = 0.5 + torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) / 10
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    rounding = 1e-4 + 2e-6 * float(model.get_model_object("model_sampling").sigma_max)  # of states as great as that, in float32
    for sampler in program.ours.SAMPLERS:
        for scheduler in ("simple", "karras", "deis"):
            half = run(program, model, sampler, scheduler, denoise=0.5, latent_image=latent)
            assert len(model.model.diffusion_model.seen) == 10
            assert not torch.equal(half, latent)
            painted = run(program, model, sampler, scheduler, latent_image=latent, noise_mask=mask)
            torch.testing.assert_close(painted[..., 4:], latent[..., 4:], rtol=0, atol=rounding)
            whole = run(program, model, sampler, scheduler)
            torch.testing.assert_close(run(program, model, sampler, scheduler, cfg=4.0), whole, rtol=1e-3, atol=1e-3)
            first = run(program, model, sampler, scheduler, last_step=4, check=False)
            second = run(program, model, sampler, scheduler, start_step=4, latent_image=first, noise=torch.zeros(SHAPE))
            if "ancestral" not in sampler and "sde" not in sampler:
                assert float((second - whole).square().mean().sqrt()) < 0.5
            run(program, model, sampler, scheduler, last_step=6, force_full_denoise=True)


@pytest.mark.parametrize("name", ["EPS", "FLUX", "EDM"])
def test_the_seed_decides(program: Any, name: str) -> None:
    model = build(program, name)
    for sampler in program.ours.SAMPLERS:
        ends = [run(program, model, sampler, "normal", seed=seed) for seed in (1, 1, 2**64 - 1)]
        assert torch.equal(ends[0], ends[1])
        assert not torch.equal(ends[0], ends[2])
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for sampler in ("deis_ancestral", "deis_sde_dpmpp_2m"):
        ends = [run(program, model, sampler, "normal", seed=seed, noise=noise) for seed in (1, 1, 2)]
        assert torch.equal(ends[0], ends[1])
        assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("name", ["EPS", "FLUX", "CASCADE"])
def test_callbacks_previews_and_interruption(program: Any, name: str) -> None:
    model = build(program, name)
    preview = importlib.import_module("latent_preview")
    preview.args.preview_method = preview.LatentPreviewMethod.Latent2RGB
    show = preview.prepare_callback(model, 8)
    told: list[tuple[int, Tensor, Tensor, int]] = []

    def callback(*about: Any) -> None:
        told.append(about)
        show(*about)

    for sampler in program.ours.SAMPLERS:
        told.clear()
        run(program, model, sampler, "simple", 8, callback=callback)
        assert [(i, total) for i, _, _, total in told] == [(i, 8) for i in range(8)]
        assert all(x_0.shape == x.shape == SHAPE for _, x_0, x, _ in told)

        def stop(*about: Any) -> None:
            raise InterruptedError("enough")

        with pytest.raises(InterruptedError, match="enough"):
            run(program, model, sampler, "simple", 8, callback=stop, check=False)


def custom(program: Any, model: Any, sampler: Any, levels: Tensor, latent: Tensor | None = None, noise: bool = True) -> Tensor:
    """Return a picture by way of the node SamplerCustom."""
    node = program.nodes.NODE_CLASS_MAPPINGS["SamplerCustom"]()
    runs["asked"] += 1
    start = {"samples": torch.zeros(SHAPE) if latent is None else latent}
    result, _ = getattr(node, node.FUNCTION)(model, noise, 0, 1.0, CONDITIONING, CONDITIONING, sampler, levels, start)
    end: Tensor = result["samples"]
    assert float(end.abs().max()) < 20
    runs["passed"] += 1
    return end


@pytest.mark.parametrize("name", CLASSES)
def test_a_plan_from_a_file(program: Any, name: str) -> None:
    """It runs whole, as image-to-image, and in two parts."""
    model = build(program, name)
    about = model.get_model_object("model_sampling")
    sde = schedule_of(SimpleNamespace(model_sampling=about))
    if isinstance(sde, deis.EDM):
        sde = deis.EDM(0.0, float(about.sigma_max))
    if name == "COSMOS":
        pytest.skip("a plan for flow matching counts its levels from 0 to 1, and Cosmos from 0 to 80")
    if name == "V_CONTINUOUS":
        sde = deis.VPSDE.cosine(0.0, 0.0, float(sde.t_of_rho(float(about.sigma_max))))
    for method in ("auto", "tab2", "unipc2"):
        plan = deis.make_plan(sde, method, 8, "vp_t")
        plan.save(program.inputs / "plan.json")
        node = program.nodes.NODE_CLASS_MAPPINGS["LoadDeisPlan"]()
        sampler, levels = node.load("plan.json", 1.0)
        whole = custom(program, model, sampler, levels)
        latent = torch.full(SHAPE, 0.5)
        _, later = node.load("plan.json", 0.5)
        assert len(later) == 5
        custom(program, model, sampler, later, latent)
        assert len(model.model.diffusion_model.seen) > 0
        high, low = program.custom_sampler.SplitSigmas().get_sigmas(levels, 3)
        first = custom(program, model, sampler, high) if name in STRAIGHT else custom_high(program, model, sampler, high)
        second = custom(program, model, sampler, low, first, noise=False)
        assert float((second - whole).square().mean().sqrt()) < 0.3


def custom_high(program: Any, model: Any, sampler: Any, levels: Tensor) -> Tensor:
    """Return the state above the data, whose noise is as great as its level."""
    node = program.nodes.NODE_CLASS_MAPPINGS["SamplerCustom"]()
    start = {"samples": torch.zeros(SHAPE)}
    result, _ = node.sample(model, True, 0, 1.0, CONDITIONING, CONDITIONING, sampler, levels, start)
    end: Tensor = result["samples"]
    return end


# --- accuracy --------------------------------------------------------------------------------------------------------------


def start_of(program: Any, model: Any, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state that ComfyUI starts from, and its alpha."""
    about = model.get_model_object("model_sampling")
    noise, latent = program.sample.prepare_noise(torch.zeros(SHAPE), 0).double(), torch.zeros(SHAPE).double()
    full = program.samplers.Sampler().max_denoise(SimpleNamespace(inner_model=SimpleNamespace(model_sampling=about)), levels)
    x = about.noise_scaling(levels[0].double(), noise, latent, full)
    return x, about.noise_scaling(levels[:1].double(), latent[:1, :1, :1, :1], torch.ones(1, 1, 1, 1).double())


def solution(program: Any, model: Any, levels: Tensor) -> Tensor:
    """Return the end of the probability flow: known for a Gaussian, else by 1500 steps of order 4 in log sigma."""
    x, alpha = start_of(program, model, levels)
    mean_of = model.model.diffusion_model.mean_of
    if mean_of is gaussian:
        return MEAN + DEVIATION * (x - alpha * MEAN) / ((alpha * DEVIATION) ** 2 + levels[0].double() ** 2).sqrt()
    straight = float(alpha) != 1
    log_sigma = torch.linspace(float(levels[0].double().log()), -9.0, 1501, dtype=torch.float64).tolist()

    def slope(log: float, x: Tensor) -> Tensor:
        sigma = torch.tensor(log, dtype=torch.float64).exp().view(1, 1, 1, 1)
        return x - mean_of(x, 1 - sigma if straight else torch.ones_like(sigma), sigma)

    for a, b in pairwise(log_sigma):
        h = b - a
        k_1 = slope(a, x)
        k_2 = slope(a + h / 2, x + h / 2 * k_1)
        k_3 = slope(a + h / 2, x + h / 2 * k_2)
        k_4 = slope(b, x + h * k_3)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x - slope(log_sigma[-1], x)


def errors(program: Any, model: Any, scheduler: str, samplers: tuple[str, ...]) -> dict[str, float]:
    exact = solution(program, model, sigmas(program, model, scheduler, 10))
    return {name: float((run(program, model, name, scheduler) - exact).square().mean().sqrt()) for name in samplers}


OURS, THEIRS = ("deis_auto", "deis_tab3", "deis_unipc2"), ("deis", "dpmpp_2m", "uni_pc")


@pytest.mark.parametrize("name", CLASSES)
def test_none_is_worse_than_euler_on_a_gaussian(program: Any, name: str) -> None:
    """With karras, whose steps grow in log sigma, unipc2 is where sigma runs over many decades, as ComfyUI's uni_pc."""
    model = build(program, name)
    for scheduler in ("normal", "karras", "simple", "sgm_uniform", "exponential", "ddim_uniform", "beta", "kl_optimal", "deis"):
        found = errors(program, model, scheduler, ("euler", *OURS))
        for sampler in OURS[:2] if scheduler == "karras" else OURS:
            assert found[sampler] <= found["euler"], (scheduler, found)


@pytest.mark.parametrize("name", CLASSES)
def test_deis_auto_is_better_than_comfyui_s_own_on_a_gaussian(program: Any, name: str) -> None:
    """With the scheduler "deis"; by flow matching, where Adams in t is all but exact there, with "simple"."""
    found = errors(program, build(program, name), "simple" if name in STRAIGHT else "deis", ("deis_auto", *THEIRS))
    for sampler in THEIRS:
        assert found["deis_auto"] < found[sampler], found


@pytest.mark.parametrize("name", CLASSES)
def test_better_than_comfyui_s_own_on_a_mixture(program: Any, name: str) -> None:
    """deis_arctan2 is better than all of them; deis_auto than all but "deis"."""
    found = errors(program, build(program, name, mixture), "deis", ("deis_auto", "deis_arctan2", *THEIRS))
    for sampler in THEIRS:
        assert found["deis_arctan2"] < found[sampler], found
        assert found["deis_auto"] < found[sampler] or sampler == "deis", found


# --- the folder ------------------------------------------------------------------------------------------------------------


def prompt_of(program: Any, workflow: dict[str, Any]) -> dict[str, Any]:
    """Return a workflow as the prompt that ComfyUI's page makes of it."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        kinds = program.nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        linked = {socket["name"]: links[socket["link"]] for socket in node.get("inputs", ())}
        values = iter(node.get("widgets_values", ()))
        inputs: dict[str, Any] = {}
        for name, kind in {**kinds["required"], **kinds.get("optional", {})}.items():
            if name in linked:
                inputs[name] = linked[name]
                continue
            inputs[name] = next(values)
            if len(kind) > 1 and (kind[1].get("control_after_generate") or kind[1].get("image_upload")):
                next(values)  # the page's own widget beside it
        assert next(values, None) is None
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("file", sorted((NODES / "example_workflows").glob("*.json")), ids=lambda file: file.stem)
def test_the_workflows_are_valid(program: Any, file: Path, tmp_path: Path) -> None:
    prompt = prompt_of(program, json.loads(file.read_text()))
    for node in prompt.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            (tmp_path / node["inputs"]["ckpt_name"]).touch()
        if node["class_type"] == "LoadDeisPlan":
            deis.make_plan(deis.VPSDE.linear(), "auto", 8).save(program.inputs / node["inputs"]["path"])
        if node["class_type"] == "LoadImage":
            (program.inputs / node["inputs"]["image"]).touch()
    program.folders.add_model_folder_path("checkpoints", str(tmp_path))
    program.folders.filename_list_cache.clear()
    valid, error, outputs, node_errors = asyncio.run(program.execution.validate_prompt("1", prompt, None))
    assert valid, (error, node_errors)
    assert outputs


def test_a_missing_plan_is_told_before_anything_runs(program: Any) -> None:
    prompt = prompt_of(program, json.loads((NODES / "example_workflows" / "deis_plan.json").read_text()))
    for node in prompt.values():
        if node["class_type"] == "LoadDeisPlan":
            node["inputs"]["path"] = "nowhere.json"
    valid, _, _, node_errors = asyncio.run(program.execution.validate_prompt("1", prompt, None))
    assert not valid
    assert "there is no plan file 'nowhere.json'" in json.dumps(node_errors)


def test_the_metadata_are_what_the_registry_reads(program: Any) -> None:
    found = importlib.import_module("comfy_config.config_parser").extract_node_configuration(str(NODES))
    assert found.project.name == "deis"
    assert found.project.version == deis.__version__
    assert found.tool_comfy.publisher_id
    assert found.tool_comfy.display_name
