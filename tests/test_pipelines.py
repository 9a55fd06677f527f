"""PlanScheduler in real pipelines of diffusers, on tiny networks: the same pictures as with diffusers' own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from deis.adapters.diffusers import PlanScheduler

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
        scheduler=diffusers.DPMSolverMultistepScheduler(**SD),
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
