"""Networks of diffusers' pipelines, from a folder or the hub: of images, of latents by class, and of latents by text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ...extras import needs
from ...host import labels_like
from ...sde import VPSDE, FlowMatching, Schedule
from ..pretrained import Network, Pretrained
from .torch_files import StrPath, for_sampling

FLOW = "FlowMatchEulerDiscreteScheduler"
PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
"""diffusers' prediction_type -> what the network predicts."""


def load_pipeline(spec: StrPath, device: str | None = None, dtype: str = "float32") -> Pretrained:
    """Load the network of a pipeline of diffusers, with its schedule and its prediction from the pipeline's scheduler.

    Parameters
    ----------
    spec : path or str
        A folder with a `model_index.json`, or the name of one on the hub, such as "google/ddpm-cifar10-32".
    device, dtype
        See `deis.load_model`.

    Returns
    -------
    Pretrained
        For a `UNet2DModel` (DDPM and the like), a `DiTTransformer2DModel`, or a `UNet2DConditionModel` conditioned on text (Stable
        Diffusion 1 and 2). If the pipeline has an autoencoder, samples are latents, and `decode` turns them into images. With
        text, `conditional` takes prompts as labels, and guides away from the empty prompt.

    Raises
    ------
    ImportError
        Where diffusers, or transformers for text, is not installed; it names the extra.
    ValueError
        If spec is not a pipeline, or for other networks and schedules. `pipe.scheduler = PlanScheduler.from_config(...)` runs
        plans in any pipeline.
    """
    with needs("diffusers", "a pipeline"):
        import torch
        from diffusers import DiffusionPipeline
    try:
        pipe = DiffusionPipeline.from_pretrained(spec)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"spec={os.fspath(spec)!r} is no pipeline that diffusers can load: {error!r}") from error
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for_sampling(part, device, dtype)
    return of_pipeline(pipe)


def of_pipeline(pipe: Any) -> Pretrained:
    """Return the network of a pipeline of diffusers; see `load_pipeline`."""
    parts = pipe.components
    network = parts.get("unet") or parts.get("transformer")
    sde, predicts, scale = _schedule(parts["scheduler"])
    kind = type(network).__name__
    config = network.config if kind in _KINDS else None
    if config is None or config.get("addition_embed_type") is not None:
        raise ValueError(
            f"{type(pipe).__name__} has a {kind} that load_model cannot run by itself; let the pipeline run it, with "
            "pipe.scheduler = deis.adapters.diffusers.PlanScheduler.from_config(pipe.scheduler.config, method='auto')"
        )
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    net, classes, null, embed = _KINDS[kind](pipe, network)
    shape = (config.in_channels, height, width)
    decode = _decoder(parts.get("vae", parts.get("vqvae")))
    return Pretrained(net, sde, predicts, shape, classes, null, scale, embed=embed, decode=decode)


def _schedule(scheduler: Any) -> tuple[Schedule, str, float]:
    """Return the noise schedule, what the network predicts, and its unit of time."""
    config = scheduler.config
    if type(scheduler).__name__ == FLOW:
        return FlowMatching(), "flow", float(config.num_train_timesteps)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    predicts = PREDICTS.get(config.get("prediction_type", "epsilon"))
    if alphas is None or predicts is None:
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type={config.get('prediction_type')!r} has no schedule known here; give "
            "the network to deis.Denoiser with the schedule it was trained on"
        )
    return VPSDE.discrete(alphas), predicts, 1.0


Parts = tuple[Network, int | None, int | None, Callable[[Any], tuple[Any, Any]] | None]
"""net(x, t, labels), the number of classes, the label for none, and the function from other labels to conditions."""


def _by_class(network: Any) -> Network:
    def net(x: Any, t: Any, labels: Any) -> Any:
        output = network(x, timestep=t, class_labels=labels_like(labels, x), return_dict=False)[0]
        return output[:, : x.shape[1]]  # a variance may follow

    return net


def _of_text(pipe: Any, unet: Any) -> Parts:
    if pipe.components.get("text_encoder") is None or pipe.components.get("tokenizer") is None:
        raise ValueError(f"{type(pipe).__name__} lacks its text encoder or tokenizer, which the conditions need")

    def embed(prompts: Sequence[str]) -> tuple[Any, Any]:
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"labels={prompts!r} must be a sequence of prompts, one per sample, for this network")
        return pipe.encode_prompt(list(map(str, prompts)), unet.device, 1, do_classifier_free_guidance=True)[:2]

    def net(x: Any, t: Any, condition: Any) -> Any:
        if condition is None:
            condition = embed([""])[0].expand(len(x), -1, -1)
        return unet(x, t, encoder_hidden_states=condition, return_dict=False)[0]

    return net, None, None, embed


_KINDS: dict[str, Callable[[Any, Any], Parts]] = {
    "UNet2DModel": lambda pipe, unet: (_by_class(unet), unet.config.num_class_embeds, None, None),
    "DiTTransformer2DModel": lambda pipe, dit: (_by_class(dit), *[dit.config.num_embeds_ada_norm] * 2, None),
    "UNet2DConditionModel": _of_text,
}


def _decoder(autoencoder: Any) -> Callable[[Any], Any] | None:
    """Return the map of latents to images, or None without an autoencoder."""
    if autoencoder is None:
        return None
    scale, shift = autoencoder.config.scaling_factor, autoencoder.config.get("shift_factor") or 0.0

    def decode(z: Any) -> Any:
        return autoencoder.decode(z / scale + shift, return_dict=False)[0]

    return decode
