"""PlanScheduler in real pipelines of diffusers, on tiny networks: the same pictures as with diffusers' own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import deis
from deis.adapters.diffusers import PlanScheduler

from .oracle import FEW_STEPS

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PROMPT, NEGATIVE = (torch.randn(1, 5, 16, generator=generator(seed)) for seed in (1, 2))
POOLED = torch.randn(1, 16, generator=generator(3))
IMAGE = torch.rand(1, 3, 16, 16, generator=generator(4))


def no_text(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def vae() -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.0,
    )


def unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
        **more,
    )


def stable_diffusion(kind: Any) -> Any:
    return kind(
        **no_text("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
        vae=vae(),
        unet=unet(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**SD, steps_offset=1),  # the pipelines' own setting
        requires_safety_checker=False,
    )


def text_to_image() -> Any:
    return stable_diffusion(diffusers.StableDiffusionPipeline), {}


def image_to_image() -> Any:
    return stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline), {"image": IMAGE, "strength": 0.6}


def inpaint() -> Any:
    mask = (IMAGE[:, :1] > 0.5).float()
    return stable_diffusion(diffusers.StableDiffusionInpaintPipeline), {
        "image": IMAGE, "mask_image": mask, "height": 16, "width": 16,
    }  # fmt: skip


def xl() -> Any:
    network = unet(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
    pipe = diffusers.StableDiffusionXLPipeline(
        **no_text("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        vae=vae(),
        unet=network,
        scheduler=diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    return pipe, {"pooled_prompt_embeds": POOLED, "negative_pooled_prompt_embeds": -POOLED}


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        **no_text("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
        vae=vae(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return pipe, {"pooled_prompt_embeds": POOLED, "negative_pooled_prompt_embeds": -POOLED}


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        **no_text("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        vae=vae(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    return pipe, {"pooled_prompt_embeds": POOLED, "height": 16, "width": 16, "negative_prompt_embeds": None}


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer=transformer.eval(), vae=vae(), scheduler=scheduler)
    return pipe, {"class_labels": [1, 2], "prompt_embeds": None, "negative_prompt_embeds": None}


def ddim() -> Any:
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DDPMPipeline(unet=network, scheduler=scheduler), {"prompt_embeds": None, "negative_prompt_embeds": None}


def video() -> Any:
    network = diffusers.UNet3DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.TextToVideoSDPipeline(
        **no_text("text_encoder", "tokenizer"), vae=vae(), unet=network.eval(), scheduler=diffusers.UniPCMultistepScheduler(**SD)
    )
    return pipe, {"num_frames": 2, "height": 16, "width": 16}


def images(made: tuple[Any, dict[str, Any]], steps: int = 5) -> Tensor:
    """Run a pipeline, with the arguments of the family that are not None."""
    pipe, more = made
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE} | more
    given = {name: value for name, value in arguments.items() if value is not None}
    output = pipe(**given, num_inference_steps=steps, generator=generator(), output_type="np", return_dict=False)[0]
    return torch.from_numpy(output)


def make(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)  # the weights
    return build()


PIPELINES = [text_to_image, image_to_image, inpaint, xl, sd3, flux, dit, ddim, video]


@pytest.mark.parametrize("build", PIPELINES)
def test_the_pictures_are_those_of_the_scheduler_whose_configuration_was_loaded(build: Callable[[], Any]) -> None:
    made = make(build)
    if build is ddim:
        reference = diffusers.DDIMPipeline(unet=made[0].unet, scheduler=made[0].scheduler)
        expected = images((reference, made[1]))
    else:
        expected = images(made)
    made[0].scheduler = PlanScheduler.from_config(made[0].scheduler.config)
    torch.testing.assert_close(images(made), expected, rtol=1e-5, atol=1e-5)
    assert len(made[0].scheduler.timesteps) == 5


@FEW_STEPS
@pytest.mark.parametrize(
    ("build", "method"),
    [
        *((build, method) for build in PIPELINES for method in ("tab3", "unipc2", "ancestral")),
        *((build, "rhork_2heun") for build in (text_to_image, xl, dit, ddim, video)),
    ],
)
def test_other_methods_run(build: Callable[[], Any], method: str) -> None:
    made = make(build)
    first = images(made, 6)
    made[0].scheduler = PlanScheduler.from_config(made[0].scheduler.config, method=method)
    second = images(made, 6)
    assert torch.isfinite(second).all()
    assert second.shape == first.shape
    assert not torch.equal(second, first)


# --- pipelines that begin or end on the way -------------------------------------------------------------------------------


def evaluations(network: Any) -> list[float]:
    """Return a list to which each call of a network adds its time."""
    times: list[float] = []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(float(args[1] if len(args) > 1 else kwargs["timestep"])), with_kwargs=True
    )
    return times


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    "settings",
    [
        {"solver_order": 2},
        {"solver_order": 3},
        {"_class_name": "UniPCMultistepScheduler"},
        {"_class_name": "DDIMScheduler", "clip_sample": False},
        {"_class_name": "DPMSolverSinglestepScheduler"},
        {"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3},
    ],
)
def test_image_to_image_is_that_of_diffusers(settings: dict[str, Any], strength: float) -> None:
    pipe, more = make(image_to_image)
    name = settings.get("_class_name", "DPMSolverMultistepScheduler")
    pipe.scheduler = getattr(diffusers, name)(**SD, **{key: value for key, value in settings.items() if key != "_class_name"})
    expected = images((pipe, more | {"strength": strength}), 10)
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config)
    times = evaluations(pipe.unet)
    torch.testing.assert_close(images((pipe, more | {"strength": strength}), 10), expected, rtol=1e-5, atol=1e-5)
    assert times == pipe.scheduler.timesteps[-int(10 * strength) :].tolist()


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("method", ["dpm_solver_3", "dpmpp_3s", "rhork_3kutta", "edm_heun", "auto", "tab3", "unipc3"])
def test_every_method_and_file_begins_where_the_strength_says(
    tmp_path: Path, method: str, from_file: bool, strength: float
) -> None:
    """With exactly the evaluations that are left, at their times."""
    pipe, more = make(image_to_image)
    config = pipe.scheduler.config
    pipe.scheduler = PlanScheduler.from_config(config, method=method, ts_phase="vp_t")
    if from_file:
        deis.make_plan(pipe.scheduler.sde, method, ts_phase="vp_t", nfe=20).save(tmp_path / "plan.json")
        pipe.scheduler = PlanScheduler.from_plan(deis.load_plan(tmp_path / "plan.json"), config)
    times = evaluations(pipe.unet)
    found = images((pipe, more | {"strength": strength}), 20)
    assert len(times) == int(20 * strength)
    assert times == pipe.scheduler.timesteps[-len(times) :].tolist()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
def test_what_is_left_of_a_calibrated_plan_runs_on_auto_s_own_grid(strength: float) -> None:
    """The pipeline slices the times before it tells where to begin, and its slice follows."""
    pipe, more = make(image_to_image)
    whole = deis.make_plan(PlanScheduler.from_config(pipe.scheduler.config).sde, "tab2", nfe=10)
    plan = replace(whole, fitted="a test", provenance={"stages": []})
    pipe.scheduler = PlanScheduler.from_plan(plan, pipe.scheduler.config)
    times, first = evaluations(pipe.unet), 10 - int(10 * strength)
    with pytest.warns(UserWarning, match="was calibrated as a whole"):
        images((pipe, more | {"strength": strength}), 10)
    rest = deis.make_plan(pipe.scheduler.sde.between(float(plan.t[first])), "auto", nfe=10 - first)
    assert times == (rest.t[:-1] - 1).tolist()
    assert times != (plan.t[first:-1] - 1).tolist()
    noisy = pipe.scheduler.add_noise(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor(times[-2:]))
    np.testing.assert_allclose(noisy[:, 0], rest.sigma[-3:-1], rtol=1e-3)
    pipe.scheduler.set_begin_index(0)
    assert pipe.scheduler.timesteps.tolist() == (plan.t[:-1] - 1).tolist()


def refiner(base: Any) -> Any:
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **no_text("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        vae=base.vae,
        unet=base.unet,
        scheduler=base.scheduler,
        add_watermarker=False,
        requires_aesthetics_score=False,
    )


def in_two_parts(base: Any, more: dict[str, Any], scheduler: Any, steps: int = 10) -> Tensor:
    """Run the first 60 percent of the noise in one pipeline, and the rest in another, as SDXL's base and refiner."""
    base.scheduler = scheduler
    second = refiner(base)
    arguments = {"prompt_embeds": PROMPT, "negative_prompt_embeds": NEGATIVE, "num_inference_steps": steps} | more
    for pipe in (base, second):
        pipe.set_progress_bar_config(disable=True)
    latents = base(**arguments, denoising_end=0.6, generator=generator(), output_type="latent", return_dict=False)[0]
    output = second(
        **arguments, image=latents, denoising_start=0.6, generator=generator(), output_type="latent", return_dict=False
    )[0]
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_base_and_refiner_are_those_of_diffusers(name: str) -> None:
    base, more = make(xl)
    theirs = getattr(diffusers, name)(**SD, timestep_spacing="leading", steps_offset=1)
    expected = in_two_parts(base, more, theirs)
    times = evaluations(base.unet)
    found = in_two_parts(base, more, PlanScheduler.from_config(theirs.config))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert times == base.scheduler.timesteps.tolist()


@pytest.mark.parametrize("method", ["auto", "tab3", "dpm_solver_3", "edm_heun", "a plan"])
def test_every_method_runs_in_base_and_refiner(method: str) -> None:
    base, more = make(xl)
    config = base.scheduler.config
    scheduler = PlanScheduler.from_config(config, method="tab3" if method == "a plan" else method, ts_phase="vp_t")
    if method == "a plan":
        scheduler = PlanScheduler.from_plan(deis.make_plan(scheduler.sde, "rhork_3kutta", nfe=10), config)
    times = evaluations(base.unet)
    assert torch.isfinite(in_two_parts(base, more, scheduler)).all()
    assert times == base.scheduler.timesteps.tolist()


def test_a_pipeline_is_saved_with_its_scheduler(tmp_path: Path) -> None:
    pipe, more = make(text_to_image)
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, method="tab3")
    expected = images((pipe, more))
    pipe.save_pretrained(tmp_path)
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **no_text(*names))
    assert isinstance(again.scheduler, PlanScheduler)
    assert again.scheduler.config.method == "tab3"
    assert torch.equal(images((again, more)), expected)
