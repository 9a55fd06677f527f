"""Where the weights of DDPM++, NCSN++ and ADM are in EDM's files (arXiv 2206.00364), by the names there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

from ...extras import needs
from .torch_files import Shapes, StrPath, check_convolutions

if TYPE_CHECKING:
    from .ncsnpp import Architecture

KIND = "a checkpoint of an EDM network"

_HEAD = 64  # channels of a head of attention in ADM

# A part of a block of Song et al.'s module, or of diffusers', -> the file's name of it
_SONG_BLOCK = {
    "GroupNorm_0": "norm0", "Conv_0": "conv0", "Dense_0": "affine", "GroupNorm_1": "norm1", "Conv_1": "conv1", "Conv_2": "skip"
}  # fmt: skip
_ADM_BLOCK = {
    "norm1": "norm0", "conv1": "conv0", "time_emb_proj": "affine", "norm2": "norm1", "conv2": "conv1", "conv_shortcut": "skip"
}  # fmt: skip
_ADM_ENDS = {
    "conv_in": "enc.{0}x{0}_conv",
    "time_embedding.linear_1": "map_layer0",
    "time_embedding.linear_2": "map_layer1",
    "conv_norm_out": "out_norm",
    "conv_out": "out_conv",
}


def _whole(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Source:
    """Where a weight is in the file: its name, its shape there, and how to convert it."""

    name: str
    shape: tuple[int, ...]
    take: Callable[[Any], Any] = _whole


Sources = dict[str, Source]


def size_of(found: Shapes, path: StrPath) -> int:
    """Return the size of the images, which is in the name of the first convolution."""
    for key in found:
        match = re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", key)
        if match and len(found[key]) == 4:
            return int(match[1])
    raise ValueError(f"path={os.fspath(path)!r} is not {KIND}: it lacks a convolution 'model.enc.<size>x<size>_conv.weight'")


def _encoder(found: Shapes, size: int, path: StrPath) -> tuple[tuple[int, ...], int, tuple[bool, ...]]:
    """Return the widths, the blocks of each level and which levels have attention."""
    conv = "enc.{0}x{0}_block{1}.conv0.weight".format
    sizes = list(takewhile(lambda r: conv(r, 0) in found, (size >> i for i in range(size.bit_length()))))
    blocks = len(list(takewhile(lambda j: conv(size, j) in found, count())))
    check_convolutions(found, (conv(r, 0) for r in sizes or [size]), path, KIND)
    return tuple(found[conv(r, 0)][0] for r in sizes), blocks, tuple(f"enc.{r}x{r}_block0.qkv.weight" in found for r in sizes)


def song(found: Shapes, size: int, fir: bool, path: StrPath) -> tuple[Any, Sources]:
    """Return the module of a DDPM++ or NCSN++, without values, and where each of its weights is in the file."""
    import torch

    from .ncsnpp import Architecture, Attention, NCSNpp

    widths, blocks, attends = _encoder(found, size, path)
    c_out, c_in = found[f"enc.{size}x{size}_conv.weight"][:2]
    half = f"enc.{size // 2}x{size // 2}_aux_"
    architecture = Architecture(
        channels=c_in,
        features=c_out,
        widths=widths,
        blocks=blocks,
        attends=attends,
        fourier="map_noise.freqs" in found,
        input_pyramid="residual" if f"{half}residual.weight" in found else "sum" if f"{half}skip.weight" in found else "none",
        output_pyramid=f"dec.{size // 2}x{size // 2}_aux_conv.weight" in found,
        fir=fir,
        classes=found.get("map_label.weight", (0, 0))[1],
    )
    with torch.device("meta"):
        network = NCSNpp(architecture)
    sources: Sources = {}
    names = _song_order(architecture, size)
    name = ""
    for i, module in enumerate(network.all_modules):
        name = name if isinstance(module, Attention) else next(names)  # attention is part of the block before it
        for key, value in module.state_dict().items():
            sources[f"all_modules.{i}.{key}"] = _song_source(name, key, tuple(value.shape), isinstance(module, Attention))
    labels = {key: tuple(value.shape) for key, value in network.state_dict().items() if key.startswith("map_label.")}
    return network, sources | {key: Source(key, shape) for key, shape in labels.items()}


def _song_order(a: Architecture, size: int) -> Iterator[str]:
    """Yield the file's names of the modules of NCSNpp in their order, without attention."""
    sizes = [size >> i for i in range(len(a.widths))]
    yield from ["map_noise"] * a.fourier + ["map_layer0", "map_layer1", f"enc.{size}x{size}_conv"]
    for i, r in enumerate(sizes):
        if i > 0:
            yield f"enc.{r}x{r}_down"
            yield from {"none": [], "sum": [f"enc.{r}x{r}_aux_skip"], "residual": [f"enc.{r}x{r}_aux_residual"]}[a.input_pyramid]
        yield from (f"enc.{r}x{r}_block{j}" for j in range(a.blocks))
    for i, r in reversed(list(enumerate(sizes))):
        yield from [f"dec.{r}x{r}_in0", f"dec.{r}x{r}_in1"] if i == len(sizes) - 1 else [f"dec.{r}x{r}_up"]
        yield from (f"dec.{r}x{r}_block{j}" for j in range(a.blocks + 1))
        if a.output_pyramid or i == 0:
            yield from (f"dec.{r}x{r}_aux_norm", f"dec.{r}x{r}_aux_conv")


def _song_source(name: str, key: str, shape: tuple[int, ...], attention: bool) -> Source:
    """Return where the weight `key` of a module is, which the file calls `name`."""
    part, _, leaf = key.rpartition(".")
    if attention and part != "GroupNorm_0":  # q, k, v and the output: NIN_0 to NIN_3, matrices (channels in, channels out)
        j = int(part[-1])
        own = f"{name}.{'proj' if j == 3 else 'qkv'}.{'weight' if leaf == 'W' else 'bias'}"
        return _projection(own, shape[0], 1, j if j < 3 else None, leaf == "W", transposed=True)
    if attention:
        return Source(f"{name}.norm2.{leaf}", shape)
    inner = {"Conv2d_0": ".", "": "."}.get(part, f".{_SONG_BLOCK.get(part, '')}.")
    if name.endswith("aux_skip"):
        inner = "."
    return Source(name + inner + leaf.replace("W", "freqs"), shape)


def _projection(name: str, c: int, heads: int, part: int | None, weight: bool, *, transposed: bool = False) -> Source:
    """Return the source of one of q, k, v, which the file has as channels (head, channel, part) of one convolution of 1 x 1."""
    rows = c if part is None else 3 * c

    def take(value: Any) -> Any:
        value = value.reshape(rows, c) if weight else value
        if part is not None:
            value = value.reshape(heads, c // heads, 3, *value.shape[1:])[:, :, part].reshape(c, *value.shape[1:])
        return value.T.contiguous() if transposed and weight else value

    return Source(name, (rows, c, 1, 1) if weight else (rows,), take)


def adm(found: Shapes, size: int, path: StrPath) -> tuple[Any, Sources]:
    """Return diffusers' module of an ADM network (Dhariwal & Nichol, arXiv 2105.05233), and where each weight is in the file."""
    with needs("diffusers", "an ADM network"):
        import torch
        from diffusers import UNet2DModel
    widths, blocks, attends = _encoder(found, size, path)
    if any(width % _HEAD or width < 128 for width in widths):
        raise ValueError(
            f"path={os.fspath(path)!r} has channels {widths}, but an ADM network has multiples of {_HEAD} from 128 up, in 32 groups"
        )
    classes = found.get("map_label.weight", (0, 0))[1]
    with torch.device("meta"):
        unet = UNet2DModel(
            in_channels=found[f"enc.{size}x{size}_conv.weight"][1],
            out_channels=found["out_conv.weight"][0],
            block_out_channels=widths,
            layers_per_block=blocks,
            down_block_types=tuple("AttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends),
            up_block_types=tuple("AttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends)),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=_HEAD,
            attn_norm_num_groups=32,
            flip_sin_to_cos=True,
            freq_shift=0,
            norm_eps=1e-5,
            num_class_embeds=classes + 1 if classes else None,
        )
    sources = {key: _adm_source(key, tuple(value.shape), size, len(widths)) for key, value in unet.state_dict().items()}
    return unet, sources


def _with_none(embedding: Any) -> Any:
    import torch

    return torch.cat([embedding, torch.zeros_like(embedding[:1])])


def _adm_source(key: str, shape: tuple[int, ...], size: int, levels: int) -> Source:
    """Return where the weight is that diffusers calls `key`."""
    if key == "class_embedding.weight":  # "no class" adds nothing
        return Source("map_label.weight", (shape[1], shape[0] - 1), lambda value: _with_none(value.T))
    match = re.fullmatch(r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        head, _, leaf = key.rpartition(".")
        return Source(f"{_ADM_ENDS.get(head, head).format(size)}.{leaf}", shape)
    way, block, kind, j, part, leaf = match.groups()
    level = {"down": int(block or 0), "up": levels - 1 - int(block or 0), "mid": levels - 1}[way]
    level += {"downsamplers": 1, "upsamplers": -1}.get(kind, 0)
    name = {"downsamplers": "down", "upsamplers": "up"}.get(kind, f"in{j}" if way == "mid" else f"block{j}")
    prefix = f"{'enc' if way == 'down' else 'dec'}.{size >> level}x{size >> level}_{name}"
    if kind != "attentions":
        return Source(f"{prefix}.{_ADM_BLOCK[part]}.{leaf}", shape)
    if part == "group_norm":
        return Source(f"{prefix}.norm2.{leaf}", shape)
    which = {"to_q": 0, "to_k": 1, "to_v": 2}.get(part)
    return _projection(
        f"{prefix}.{'proj' if which is None else 'qkv'}.{leaf}", shape[0], shape[0] // _HEAD, which, leaf == "weight"
    )
