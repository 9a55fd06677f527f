"""Checkpoints of the DDIM and PNDM code bases: the U-Net of Ho et al. (arXiv 2006.11239) in PyTorch, run as diffusers' module."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

import numpy as np

from ...arguments import one_of
from ...extras import needs
from ...sde import VPSDE
from ..pretrained import Pretrained
from . import torch_files
from .torch_files import Shapes, StrPath

_KIND = "a DDIM or PNDM checkpoint"

# diffusers' name of a part -> the checkpoint's; levels of up blocks are counted from the other end, so that rule is in code
_NAMES = (
    (r"^time_embedding\.linear_1", "temb.dense.0"),
    (r"^time_embedding\.linear_2", "temb.dense.1"),
    (r"^conv_norm_out", "norm_out"),
    (r"^mid_block\.resnets\.0", "mid.block_1"),
    (r"^mid_block\.resnets\.1", "mid.block_2"),
    (r"^mid_block\.attentions\.0", "mid.attn_1"),
    (r"^(up|down)_blocks\.", r"\1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(up|down)samplers\.0\.", r".\1sample."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
_ATTENTION_MATRIX = re.compile(r"\.(q|k|v|proj_out)\.weight$")


def load_ddim(
    path: StrPath,
    device: str | None = None,
    dtype: str = "float32",
    *,
    config: Mapping[str, Any] | None = None,
    size: int | None = None,
) -> Pretrained:
    r"""Load a checkpoint of the code base of DDIM (Song et al., arXiv 2010.02502) or PNDM (Liu et al., arXiv 2202.09778).

    The network predicts eps of x = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps at the integer times t = 0 ... N - 1, with
    abar_t = prod_{s <= t} (1 - beta_s) and beta linear. Data lie in [-1, 1].

    Parameters
    ----------
    path : path
        What torch.save wrote: a state dict (`ema_*.ckpt`), or the list [weights, optimizer, epoch, step, averaged weights] of
        training (`ckpt.pth`), of which the averaged weights are used, or the first entry if it has only four.
    device, dtype
        See `deis.load_model`.
    config : mapping, optional
        The code base's YAML file, parsed; only its section `diffusion` is used, for a network that was trained with
        other betas than 1e-4 ... 0.02 in 1000 steps. The architecture is inferred from the weights.
    size : int, optional
        Height and width of the images. The file does not contain it. By default it is the size at which the first attention is at
        16 x 16, as in all published networks: 32 for CIFAR-10, 64 for CelebA, 256 for LSUN.

    Raises
    ------
    FileNotFoundError
    ImportError
        Where torch or diffusers is not installed; it names the extra.
    ValueError
        If the file is not such a checkpoint (the message names the first key that differs); for an unknown dtype; for betas that
        are not linear.
    """
    one_of("dtype", dtype, torch_files.DTYPES)
    return of_saved(torch_files.read(path), path, device, dtype, config=config, size=size)


def recognises(saved: Any) -> bool:
    """Return whether the content of a file looks like such a checkpoint."""
    inner = saved[-1 if len(saved) == 5 else 0] if isinstance(saved, (list, tuple)) and saved else saved
    return isinstance(inner, Mapping) and any(str(key).endswith("temb.dense.0.weight") for key in inner)


def of_saved(
    saved: Any, path: StrPath, device: str | None, dtype: str, *, config: Mapping[str, Any] | None = None, size: int | None = None
) -> Pretrained:
    """Return the network from the content of a file; see `load_ddim`."""
    sde = _schedule((config or {}).get("diffusion", {}))
    state = torch_files.weights(*_unwrap(saved, path), path)
    unet, names = _network(torch_files.shapes_of(state), path)
    shapes = torch_files.shapes_of(unet.state_dict())
    unet = torch_files.fill(unet, {key: state[name].reshape(shapes[key]) for key, name in names.items()}, device, dtype)
    attends = [kind == "AttnDownBlock2D" for kind in unet.config.down_block_types]
    size = size or torch_files.size_of(attends, path)
    return Pretrained(
        lambda x, t, labels: unet(x, t, return_dict=False)[0], sde, "eps", (unet.config.in_channels, size, size), None, None, 1.0
    )


def _schedule(about: Mapping[str, Any]) -> VPSDE:
    """Return the schedule of the section `diffusion` of a configuration."""
    kind = about.get("beta_schedule", "linear")
    if kind != "linear":
        raise ValueError(f"config['diffusion']['beta_schedule']={kind!r} is unknown; the known one is 'linear'")
    steps = about.get("num_diffusion_timesteps", 1000)
    return VPSDE.discrete(np.cumprod(1 - np.linspace(about.get("beta_start", 1e-4), about.get("beta_end", 0.02), steps)))


def _unwrap(saved: Any, path: StrPath) -> tuple[Any, str]:
    """Return the weights to use from the content of a file, and their name for messages."""
    if not isinstance(saved, (list, tuple)):
        return saved, "the file"
    if len(saved) not in (4, 5):
        raise ValueError(
            f"path={os.fspath(path)!r} is not {_KIND}: it is a list of {len(saved)} entries, and not of 4 or 5: "
            "weights, optimizer, epoch, step and, with 5, averaged weights"
        )
    i = 4 if len(saved) == 5 else 0
    return saved[i], f"entry {i} of the list"


def _network(found: Shapes, path: StrPath) -> tuple[Any, dict[str, str]]:
    """Return diffusers' module for these weights, without values, and the checkpoint's name of each of its own."""
    with needs("diffusers", _KIND):
        import torch
        from diffusers import UNet2DModel
    options = _unet_options(found, path)
    with torch.device("meta"):
        unet = UNet2DModel(**options)
    levels = len(options["block_out_channels"])
    names = {key: _name(key, levels) for key in unet.state_dict()}
    expected = {}
    for key, shape in torch_files.shapes_of(unet.state_dict()).items():  # their attention has convolutions of 1 x 1
        expected[names[key]] = (*shape, 1, 1) if _ATTENTION_MATRIX.search(names[key]) else shape
    torch_files.check(found, expected, path, _KIND)
    return unet, names


def _name(key: str, levels: int) -> str:
    """Return the checkpoint's name of a weight that diffusers calls `key`."""
    key = re.sub(r"^up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", key)
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _unet_options(found: Shapes, path: StrPath) -> dict[str, Any]:
    """Return the options of diffusers' module that the shapes of the weights imply."""
    conv1 = "down.{}.block.{}.conv1.weight".format
    levels = len(list(takewhile(lambda i: conv1(i, 0) in found, count())))
    layers = len(list(takewhile(lambda j: conv1(0, j) in found, count())))
    convolutions = ("conv_in.weight", "conv_out.weight", *(conv1(i, 0) for i in range(max(levels, 1))))
    torch_files.check_convolutions(found, convolutions, path, _KIND)
    widths = tuple(found[conv1(i, 0)][0] for i in range(levels))
    for i, width in enumerate(widths):
        if width % 32:
            raise ValueError(f"path={os.fspath(path)!r} is not {_KIND}: {conv1(i, 0)!r} has {width} channels, no multiple of 32")
    attends = [f"down.{i}.attn.0.q.weight" in found for i in range(levels)]
    return {
        "in_channels": found["conv_in.weight"][1],
        "out_channels": found["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        "up_block_types": tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        "attention_head_dim": None,  # a single head
        "downsample_padding": 0,  # that is, below and to the right only
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
