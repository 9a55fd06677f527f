"""Trained networks, and those in a folder: diffusers' model folder with a `deis.json` that says how it was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import needs
from ..foreign import labels_like
from ..methods import make_plan
from ..plan import Plan, load_plan
from ..sde import VPSDE, Schedule
from .guidance import EVERYWHERE, classifier_free
from .predictions import Denoiser

Network = Callable[[Any, Any, Any], Any]
"""net(x, t, labels) -> output, t in the network's own units."""


@dataclass(frozen=True)
class Pretrained:
    """A trained network: model(x, t) is its unconditional output, and `conditional` makes what `deis.sample` runs.

    Attributes
    ----------
    net : callable
        net(x, t, labels), in the framework it was loaded for, with t in the network's own units.
    sde : Schedule
        The noise schedule that it was trained on.
    predicts : str
        What it predicts; see `deis.Denoiser`.
    shape : tuple of int
        (channels, height, width) of one sample; samples lie in [-1, 1], or are latents, see `decode`.
    num_classes, null_class : int or None
        The labels 0 ... num_classes - 1, and the label that means none; None for an unconditional network.
    time_scale : float
        The network takes time_scale * t.
    plans : mapping of int to Plan
        Calibrated plans by their evaluations, for guidance 1; see `plan`.
    embed : callable, optional
        Of a network that is conditioned on something else than classes: embed(labels) -> (condition, null), each of shape
        (batch, ...), of what `conditional` is given, such as prompts.
    decode : callable, optional
        Of a network of latents: decode(x) -> images in [-1, 1].
    """

    net: Network
    sde: Schedule
    predicts: str
    shape: tuple[int, int, int]
    num_classes: int | None
    null_class: int | None
    time_scale: float
    plans: Mapping[int, Plan] = field(default_factory=dict)
    embed: Callable[[Any], tuple[Any, Any]] | None = None
    decode: Callable[[Any], Any] | None = None

    def plan(self, nfe: int = 10) -> Plan:
        """Return the calibrated plan that came with the network, or where there is none for nfe evaluations that of "auto"."""
        return self.plans[nfe] if nfe in self.plans else make_plan(self.sde, nfe=nfe)

    def __call__(self, x: Any, t: Any) -> Any:
        return self._evaluate(x, t, self._null(len(x)))

    def conditional(
        self,
        labels: Any = None,
        guidance: float = 1.0,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = EVERYWHERE,
        threshold: Callable[[Any], Any] | None = None,
    ) -> Denoiser:
        """Return the network as a Denoiser, for the given labels of shape (batch,), with classifier-free guidance.

        Parameters
        ----------
        labels : array of int of shape (batch,), optional
            Without them the network is asked for no class. For a network of text a sequence of prompts.
        guidance, rescale, interval
            See `deis.guided`; a guidance of 1 is the plain conditional network, in one call, and any other weight evaluates the
            network with and without the labels in one call on a batch of twice the size.
        threshold
            See `deis.Denoiser`.

        Raises
        ------
        ValueError
            Where the network has no classes, or a label lies outside them, or guidance was asked for without labels.
        """
        if labels is None:
            if guidance != 1:
                raise ValueError(f"guidance={guidance!r} needs labels to guide to; give them, or guidance=1")
            return Denoiser(self, self.sde, self.predicts, threshold)
        if self.embed is not None:
            condition, null = self.embed(labels)
            model = classifier_free(self._evaluate, condition, null, guidance, rescale=rescale, interval=interval)
            return Denoiser(model, self.sde, self.predicts, threshold)
        if self.num_classes is None:
            raise ValueError("labels were given, and this network has no classes; leave them out")
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels must be whole numbers of shape (batch,), and have shape {labels.shape} and dtype {labels.dtype}"
            )
        if labels.size and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise ValueError(f"labels={labels.tolist()} must lie in 0 ... {self.num_classes - 1}")
        null = self._null(len(labels))
        model = classifier_free(self._evaluate, labels, null, guidance, rescale=rescale, interval=interval)
        return Denoiser(model, self.sde, self.predicts, threshold)

    def _null(self, batch: int) -> np.ndarray | None:
        return None if self.null_class is None else np.full(batch, self.null_class)

    def _evaluate(self, x: Any, t: Any, labels: Any) -> Any:
        if labels is not None and len(labels) != len(x):
            raise ValueError(f"labels must have one entry a sample: there are {len(labels)} for x of shape {tuple(x.shape)}")
        return self.net(x, self.time_scale * t, labels)


def embedded(backend: str, device: str | None, dtype: str) -> Pretrained:
    """Load the class-conditional MNIST network that ships with the library; see `load_folder`."""
    with as_file(files("deis") / "assets" / "mnist") as path:
        return load_folder(path, backend, device, dtype)


def load_folder(
    folder: str | os.PathLike[str], backend: str = "torch", device: str | None = None, dtype: str = "float32"
) -> Pretrained:
    """Load a diffusers model folder (`config.json` and safetensors) with a `deis.json`, as `training/train_mnist.py` writes it.

    The plans in its folder `plans`, where there is one, are its own.

    Parameters
    ----------
    folder : path
    backend : {"torch", "jax"}
        torch runs diffusers' own module, JAX a Flax NNX module of the same weights.
    device : str, optional
        Torch only, such as "cuda".
    dtype : {"float32", "float64"}
        The precision of the weights, and of the x that the model takes. JAX has float64 where x64 is on.

    Raises
    ------
    FileNotFoundError
        Where the folder lacks one of the three files.
    ImportError
        Where the backend's packages are not installed; it names the extra that has them.
    ValueError
        For a `deis.json` that cannot be understood.
    """
    folder = Path(folder)
    for name in ("config.json", "deis.json", "diffusion_pytorch_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder={os.fspath(folder)!r} lacks {name}; give a diffusers model folder with a deis.json")
    config = json.loads((folder / "config.json").read_text())
    about = json.loads((folder / "deis.json").read_text())
    try:
        facts = {name: about[name] for name in ("predicts", "num_classes", "null_class", "time_scale")}
        sde = _read_schedule(about["schedule"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(folder / 'deis.json')!r} lacks {error}") from None
    net = _load_torch(folder, device, dtype) if backend == "torch" else _load_jax(folder, config, dtype)
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    plans = {plan.nfe: plan for plan in map(load_plan, sorted((folder / "plans").glob("*.json")))}
    return Pretrained(net, sde, shape=(config["in_channels"], height, width), plans=plans, **facts)


def _read_schedule(about: dict[str, Any]) -> Schedule:
    if about["type"] == "vp_linear":
        return VPSDE.linear(about["beta_0"], about["beta_1"], about["t_end"], about["t_start"])
    if about["type"] == "vp_cosine":
        return VPSDE.cosine(about["s"], about["t_end"], about["t_start"])
    if about["type"] == "vp_discrete":
        return VPSDE.discrete(about["alphas_cumprod"])
    raise ValueError(f"schedule type {about['type']!r} is unknown; the known ones are 'vp_linear', 'vp_cosine', 'vp_discrete'")


def _load_torch(folder: Path, device: str | None, dtype: str) -> Network:
    with needs("diffusers", "backend='torch'"):
        import torch
        from diffusers import UNet2DModel
    unet = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True)
    # diffusers' own `to` warns of casts, for the sake of half precision
    unet = torch.nn.Module.to(unet, device or "cpu", getattr(torch, dtype)).eval().requires_grad_(False)

    def net(x: Any, t: Any, labels: Any) -> Any:
        return unet(x, t, labels_like(labels, x), return_dict=False)[0]

    return net


def _load_jax(folder: Path, config: dict[str, Any], dtype: str) -> Network:
    with needs("jax", "backend='jax'"):
        import jax.numpy as jnp
        from safetensors.numpy import load_file

        from .flax_unet import load_flax_unet
    unet = load_flax_unet(config, load_file(folder / "diffusion_pytorch_model.safetensors"), dtype)

    def net(x: Any, t: Any, labels: Any) -> Any:
        return unet(x, t, None if labels is None else jnp.asarray(labels))

    return net
