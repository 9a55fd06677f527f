"""diffusers' `UNet2DModel` as a Flax NNX module, for running the same weights in JAX.

It covers what class-conditional pixel models use: residual blocks whose time embedding adds or scales and shifts, self-attention,
strided down- and nearest-neighbour upsampling. Names follow the keys of the PyTorch state, so that loading is one loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

_BLOCKS = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}
_DEFAULTS = {
    "time_embedding_type": "positional",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "center_input_sample": False,
    "class_embed_type": None,
    "add_attention": True,
    "attn_norm_num_groups": None,
    "num_train_timesteps": None,
}


def _conv(c_in: int, c_out: int, size: int, rngs: nnx.Rngs, stride: int = 1) -> nnx.Conv:
    return nnx.Conv(c_in, c_out, (size, size), strides=stride, padding=size // 2, rngs=rngs)


class Resnet(nnx.Module):
    """x + conv2(silu(h)) with h = norm2(conv1(silu(norm1(x))) + time), or norm2(conv1(silu(norm1(x)))) (1 + scale) + shift."""

    def __init__(self, c_in: int, c_out: int, c_time: int, scales: bool, norm: dict[str, Any], rngs: nnx.Rngs) -> None:
        self.scales = scales
        self.norm1, self.conv1 = nnx.GroupNorm(c_in, **norm, rngs=rngs), _conv(c_in, c_out, 3, rngs)
        self.time_emb_proj = nnx.Linear(c_time, c_out * (1 + scales), rngs=rngs)
        self.norm2, self.conv2 = nnx.GroupNorm(c_out, **norm, rngs=rngs), _conv(c_out, c_out, 3, rngs)
        self.conv_shortcut = _conv(c_in, c_out, 1, rngs) if c_in != c_out else None

    def __call__(self, x: Array, emb: Array) -> Array:
        h, time = self.conv1(nnx.silu(self.norm1(x))), self.time_emb_proj(nnx.silu(emb))[:, None, None, :]
        if self.scales:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(nnx.silu(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Self-attention over the pixels, with a residual connection, and with a norm before it where one is given."""

    def __init__(self, channels: int, head: int, norm: dict[str, Any] | None, rngs: nnx.Rngs) -> None:
        self.heads = channels // head
        self.group_norm = None if norm is None else nnx.GroupNorm(channels, **norm, rngs=rngs)
        self.to_q, self.to_k, self.to_v = (nnx.Linear(channels, channels, rngs=rngs) for _ in range(3))
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = (x if self.group_norm is None else self.group_norm(x)).reshape(batch, height * width, channels)
        q, k, v = (f(h).reshape(batch, height * width, self.heads, -1) for f in (self.to_q, self.to_k, self.to_v))
        h = jax.nn.dot_product_attention(q, k, v).reshape(h.shape)
        return x + self.to_out[0](h).reshape(x.shape)


class Sampler(nnx.Module):
    """The convolution that follows or precedes a change of resolution."""

    def __init__(self, channels: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv = _conv(channels, channels, 3, rngs, stride)


class Block(nnx.Module):
    """Residual blocks with or without attention, then a change of resolution where there is one."""

    def __init__(self, channels: list[tuple[int, int]], attends: int, scale: str, **parts: Any) -> None:
        c_time, scales, head, norm, rngs = (parts[name] for name in ("c_time", "scales", "head", "norm", "rngs"))
        c_out = channels[-1][1]
        self.resnets = nnx.List([Resnet(c_in, c, c_time, scales, norm, rngs) for c_in, c in channels])
        self.attentions = nnx.List([Attention(c_out, head or c_out, norm, rngs) for _ in range(attends)])
        self.downsamplers = nnx.List([Sampler(c_out, 2, rngs)] if scale == "down" else [])
        self.upsamplers = nnx.List([Sampler(c_out, 1, rngs)] if scale == "up" else [])

    def attend(self, i: int, x: Array) -> Array:
        return self.attentions[i](x) if i < len(self.attentions) else x

    def down(self, x: Array, emb: Array) -> tuple[Array, list[Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, resnet(x, emb))
            skips.append(x)
        for sampler in self.downsamplers:
            x = sampler.conv(x)
            skips.append(x)
        return x, skips

    def up(self, x: Array, emb: Array, skips: list[Array]) -> Array:
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, resnet(jnp.concatenate([x, skips.pop()], axis=-1), emb))
        for sampler in self.upsamplers:
            x = sampler.conv(x.repeat(2, axis=1).repeat(2, axis=2))
        return x


class TimeEmbedding(nnx.Module):
    """Two linear layers on the sinusoidal embedding."""

    def __init__(self, c_in: int, c_time: int, rngs: nnx.Rngs) -> None:
        self.linear_1, self.linear_2 = nnx.Linear(c_in, c_time, rngs=rngs), nnx.Linear(c_time, c_time, rngs=rngs)

    def __call__(self, emb: Array) -> Array:
        return self.linear_2(nnx.silu(self.linear_1(emb)))


class FlaxUNet2D(nnx.Module):
    """The network of a diffusers `config.json`; x of shape (batch, channels, height, width), t and labels (batch,)."""

    def __init__(self, config: Mapping[str, Any], rngs: nnx.Rngs) -> None:
        _check_config(config)
        widths, layers = config["block_out_channels"], config["layers_per_block"]
        norm = {"num_groups": config["norm_num_groups"], "epsilon": config["norm_eps"], "use_fast_variance": False}
        scales = config.get("resnet_time_scale_shift", "default") == "scale_shift"
        parts = {"c_time": 4 * widths[0], "scales": scales, "head": config["attention_head_dim"], "norm": norm, "rngs": rngs}
        self.config = nnx.static(dict(config))
        self.conv_in = _conv(config["in_channels"], widths[0], 3, rngs)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0], rngs)
        classes = config["num_class_embeds"]
        self.class_embedding = nnx.Embed(classes, 4 * widths[0], rngs=rngs) if classes else None
        last = len(widths) - 1
        down, skips, c = [], [widths[0]], widths[0]
        for i, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
            channels = [(c if j == 0 else width, width) for j in range(layers)]
            down.append(Block(channels, layers * ("Attn" in kind), "" if i == last else "down", **parts))
            skips += [width] * (layers + (i != last))
            c = width
        self.mid_block = Block([(c, c), (c, c)], 1, "", **parts)
        if scales:  # as in diffusers
            self.mid_block.attentions = nnx.List([Attention(c, config["attention_head_dim"] or c, None, rngs)])
        up = []
        for i, (kind, width) in enumerate(zip(config["up_block_types"], reversed(widths), strict=True)):
            channels = [((c if j == 0 else width) + skips.pop(), width) for j in range(layers + 1)]
            up.append(Block(channels, (layers + 1) * ("Attn" in kind), "" if i == last else "up", **parts))
            c = width
        self.down_blocks, self.up_blocks = nnx.List(down), nnx.List(up)
        self.conv_norm_out, self.conv_out = nnx.GroupNorm(c, **norm, rngs=rngs), _conv(c, config["out_channels"], 3, rngs)

    def __call__(self, x: Array, t: Array, labels: Array | None = None) -> Array:
        emb = self.time_embedding(self.embed(t).astype(x.dtype))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(labels)
        h = self.conv_in(x.transpose(0, 2, 3, 1))
        skips = [h]
        for block in self.down_blocks:
            h, made = block.down(h, emb)
            skips += made
        h = self.mid_block.resnets[0](h, emb)
        h = self.mid_block.resnets[1](self.mid_block.attentions[0](h), emb)
        for block in self.up_blocks:
            h = block.up(h, emb, skips)
        return self.conv_out(nnx.silu(self.conv_norm_out(h))).transpose(0, 3, 1, 2)

    def embed(self, t: Array) -> Array:
        """Return the sinusoidal embedding of the times, shape (batch, channels)."""
        half = self.config["block_out_channels"][0] // 2
        # In float32 throughout, as diffusers does: at t = 1000 the last bit of a frequency moves the angle by 6e-5.
        exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - self.config["freq_shift"])
        angle = t.astype(jnp.float32)[:, None] * np.exp(exponent)
        parts = [jnp.cos(angle), jnp.sin(angle)] if self.config["flip_sin_to_cos"] else [jnp.sin(angle), jnp.cos(angle)]
        return jnp.concatenate(parts, axis=-1)


def load_flax_unet(config: Mapping[str, Any], weights: Mapping[str, np.ndarray], dtype: str = "float32") -> FlaxUNet2D:
    """Build the network and fill it with a PyTorch state, in float32 or (where JAX's x64 is on) float64.

    Raises
    ------
    ValueError
        Where the config asks for what this module lacks, or a weight is missing, left over or of another shape.
    """
    unet = FlaxUNet2D(config, nnx.Rngs(0))
    slots = {".".join(map(str, path)): slot for path, slot in nnx.to_flat_state(nnx.state(unet, nnx.Param))}
    for key, value in weights.items():
        slot, array = _find_slot(slots, key, value.astype(dtype))
        if slot is None or slot.get_value().shape != array.shape:
            raise ValueError(f"weight {key!r} of shape {value.shape} does not belong to the network of the config")
        slot.set_value(jnp.asarray(array))
    if slots:
        raise ValueError(f"the weights lack {sorted(slots)[0]!r} and {len(slots) - 1} more")
    return unet


def _find_slot(slots: dict[str, Any], key: str, array: np.ndarray) -> tuple[Any, np.ndarray]:
    """Take the slot of a PyTorch key out of `slots`, and return it with the array in Flax's order of axes."""
    if key.endswith(".weight"):
        stem = key.removesuffix("weight")
        for name, order in (("kernel", (2, 3, 1, 0) if array.ndim == 4 else (1, 0)), ("scale", (0,)), ("embedding", (0, 1))):
            if stem + name in slots and array.ndim == len(order):
                return slots.pop(stem + name), array.transpose(order)
    return slots.pop(key, None), array


def _check_config(config: Mapping[str, Any]) -> None:
    for name, value in _DEFAULTS.items():
        if config.get(name, value) != value:
            raise ValueError(f"config {name}={config[name]!r} is not supported in Flax (only {value!r} is); use backend='torch'")
    if (shift := config.get("resnet_time_scale_shift", "default")) not in ("default", "scale_shift"):
        raise ValueError(f"config resnet_time_scale_shift={shift!r} is not supported by the Flax network; use backend='torch'")
    unknown = {*config["down_block_types"], *config["up_block_types"]} - _BLOCKS
    if unknown:
        raise ValueError(f"block types {sorted(unknown)} are not supported by the Flax network; use backend='torch'")
