"""Networks in a folder: diffusers' model folder with a `deis.json` that says how it was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from ..backends import backend_of
from ..extras import needs
from ..host import labels_like
from ..linear.named import CLD, PSLD, Blurring
from ..linear.pretrained import PretrainedLinear
from ..linear.sde import LinearSDE
from ..plan import load_plan
from ..sde import VPSDE, Schedule
from .checkpoints.torch_files import StrPath, for_sampling
from .pretrained import Network, Pretrained

BUNDLED = ("mnist", "mnist-blurring")
"""The networks that ship with the library."""


def embedded(name: str, backend: str, device: str | None, dtype: str) -> Any:
    """Load a network that ships with the library; see `load_folder`."""
    with as_file(files("deis") / "assets" / name) as path:
        return load_folder(path, backend, device, dtype)


def load_folder(folder: StrPath, backend: str = "torch", device: str | None = None, dtype: str = "float32") -> Any:
    """Load a diffusers model folder (`config.json` and safetensors) with a `deis.json`, as `training/train_mnist.py` writes it.

    Its calibrated plans are those in its folder `plans`, if there is one.

    Parameters
    ----------
    folder : path
    backend : {"torch", "jax"}
        torch runs diffusers' own module, JAX a Flax NNX module of the same weights.
    device, dtype
        See `deis.load_model`.

    Raises
    ------
    FileNotFoundError
        Where the folder lacks one of the three files.
    ImportError
        Where the backend's packages are not installed; the message names the extra that has them.
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
        trained = {name: about[name] for name in ("predicts", "num_classes", "null_class", "time_scale")}
        trained["sde"] = _read_schedule(about["schedule"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(folder / 'deis.json')!r} lacks {error}") from None
    net = _load_torch(folder, device, dtype) if backend == "torch" else _load_jax(folder, config, dtype)
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    if isinstance(trained["sde"], LinearSDE):
        return PretrainedLinear(_of_one_shape(net), shape=(config["out_channels"], height, width), **trained)
    plans = {plan.nfe: plan for plan in map(load_plan, sorted((folder / "plans").glob("*.json")))}
    return Pretrained(net, shape=(config["in_channels"], height, width), plans=plans, **trained)


def _of_one_shape(net: Network) -> Network:
    """Return a network whose output has the shape of its input, with zeros for the channels that it leaves out."""

    def padded(x: Any, t: Any, labels: Any) -> Any:
        xp, m = backend_of(x).xp, net(x, t, labels)
        return m if m.shape == x.shape else xp.concatenate([m, 0 * x[:, m.shape[1] :]], axis=1)

    return padded


def _vp_linear(beta_0: float, beta_1: float, t_end: float, t_start: float) -> Schedule:
    return VPSDE.linear(beta_0, beta_1, t_end, t_start)


def _vp_cosine(s: float, t_end: float, t_start: float) -> Schedule:
    return VPSDE.cosine(s, t_end, t_start)


_SCHEDULES: dict[str, Callable[..., Schedule | LinearSDE]] = {
    "vp_linear": _vp_linear,
    "vp_cosine": _vp_cosine,
    "vp_discrete": VPSDE.discrete,
    "cld": CLD,
    "psld": PSLD,
    "blurring": Blurring,
}
"""By the type that a `deis.json` names; the other entries are the arguments."""


def _read_schedule(about: dict[str, Any]) -> Schedule | LinearSDE:
    make = _SCHEDULES.get(about["type"])
    if make is None:
        raise ValueError(f"schedule type {about['type']!r} is unknown; the known ones are {', '.join(map(repr, _SCHEDULES))}")
    return make(**{name: value for name, value in about.items() if name != "type"})


def _load_torch(folder: Path, device: str | None, dtype: str) -> Network:
    with needs("diffusers", "backend='torch'"):
        import torch  # noqa: F401
        from diffusers import UNet2DModel
    unet = for_sampling(UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True), device, dtype)

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
