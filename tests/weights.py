"""Networks that tests write from their papers: random weights, called into being by a forward pass; and damaged files."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.downsampling import downsample_2d
from diffusers.models.upsampling import upsample_2d
from torch import Tensor
from torch.nn import functional


class Weights(dict[str, Tensor]):
    """Weights that come into being, random, where a network first asks for them, and so in the order in which it does."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def __call__(self, key: str, *shape: int) -> Tensor:
        if key not in self:
            noise = torch.randn(shape, generator=self.generator) if self.device == "cpu" else torch.empty(shape, device="meta")
            scale = 0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
            self[key] = noise * scale
        return self[key]

    def group_norm(self, x: Tensor, name: str, groups: int, eps: float = 1e-6) -> Tensor:
        gain, bias = self(f"{name}.weight", x.shape[1]), self(f"{name}.bias", x.shape[1])
        return functional.group_norm(x, groups, gain, bias, eps)

    def conv(self, x: Tensor, name: str, c_out: int, size: int = 3, **options: Any) -> Tensor:
        kernel, bias = self(f"{name}.weight", c_out, x.shape[1], size, size), self(f"{name}.bias", c_out)
        return functional.conv2d(x, kernel, bias, **({"padding": size // 2} | options))

    def linear(self, x: Tensor, name: str, c_out: int) -> Tensor:
        return functional.linear(x, self(f"{name}.weight", c_out, x.shape[1]), self(f"{name}.bias", c_out))


def waves(t: Tensor, size: int) -> Tensor:
    """sin and cos of t at size / 2 frequencies from 1 to 1e-4, as the transformer's positions with (i / (size / 2 - 1))."""
    angles = t.float()[:, None] * torch.logspace(0, -4, size // 2, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head over the pixels."""
    scores = torch.einsum("bcij,bckl->bijkl", q, k) / q.shape[1] ** 0.5
    return torch.einsum("bijkl,bckl->bcij", scores.flatten(3).softmax(-1).reshape(scores.shape), v)


FIR = [1, 3, 3, 1]


def resize(x: Tensor, way: str, fir: bool) -> Tensor:
    """x at twice ("up") or half ("down") the resolution, through diffusers' FIR filter or by the mean of four pixels."""
    if way == "up":
        return upsample_2d(x, FIR) if fir else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if way == "down":
        return downsample_2d(x, FIR) if fir else x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
    return x


Damage = Callable[[dict[str, Any]], Any]


def without(key: str) -> Damage:
    return lambda state: {k: v for k, v in state.items() if k != key}


def having(key: str, value: Any) -> Damage:
    return lambda state: state | {key: value}
