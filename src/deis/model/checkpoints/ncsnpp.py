"""The networks DDPM++ and NCSN++ of Song et al. (arXiv 2011.13456, appendix H), with the names that their PyTorch files have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Architecture:
    """The numbers that distinguish these networks.

    Attributes
    ----------
    channels : int
        Of the data.
    features : int
        Of the first convolution; the embedding of the noise level has four times as many.
    widths : tuple of int
        Channels at each level, from full resolution down.
    blocks : int
        Residual blocks at each level on the way down; on the way up there is one more.
    attends : tuple of bool
        Whether a level has attention.
    fourier : bool
        Whether the noise level enters as Fourier features of its logarithm, or as a sinusoidal embedding of t, as in transformers.
    input_pyramid : {"none", "sum", "residual"}
        How the image, blurred and halved, joins each level on the way down: not at all; through a 1 x 1 convolution ("input skip");
        or in a chain of strided convolutions whose result becomes the state.
    output_pyramid : bool
        Whether the output is a sum of one image from each level ("output skip").
    fir : bool
        Whether the resolution changes through a blur, rather than by means and copies of pixels.
    classes : int
        The labels 0 ... classes - 1, or 0 for a network without them.
    outputs : int
        Channels of the output, or 0 for those of the data.
    """

    channels: int
    features: int
    widths: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]
    fourier: bool
    input_pyramid: str
    output_pyramid: bool
    fir: bool
    classes: int = 0
    outputs: int = 0


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def _conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class FourierFeatures(nn.Module):
    """[sin, cos](2 pi W s) of the noise level s, with W drawn once and never trained."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, noise: Tensor) -> Tensor:
        angles = 2 * math.pi * noise[:, None] * self.W
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def positions(t: Tensor, size: int) -> Tensor:
    """Return [sin, cos](t 10^(-4 i / (size/2 - 1))), i = 0 ... size/2 - 1, of shape (batch, size)."""
    half = size // 2
    rates = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10_000) / (half - 1)))
    angles = t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Blur(nn.Module):
    """The filter of [1, 3, 3, 1] in both directions, channel by channel (StyleGAN-2, arXiv 1912.04958).

    scale = "down" then takes every other pixel; "up" before it puts a zero after every pixel; "" leaves a picture that is one
    pixel larger, for a strided convolution without padding.
    """

    def __init__(self, scale: str) -> None:
        super().__init__()
        self.scale = scale
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cpu") / 8  # the CPU also while weights are on the meta device
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.get_buffer("kernel").to(x).expand(channels, 1, 4, 4)
        if self.scale == "up":  # three of four pixels are zeros, hence the factor
            return functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=channels)
        stride, padding = (2, 1) if self.scale == "down" else (1, 2)
        return functional.conv2d(x, kernel, stride=stride, padding=padding, groups=channels)


def _resampler(scale: str, fir: bool) -> nn.Module:
    if scale == "":
        return nn.Identity()
    if fir:
        return Blur(scale)
    return nn.AvgPool2d(2) if scale == "down" else nn.Upsample(scale_factor=2.0, mode="nearest")


class Residual(nn.Module):
    """(shortcut(S x) + conv1(silu(norm1(conv0(S silu(norm0(x))) + dense(silu(emb)))))) / sqrt 2; S changes the resolution."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, scale: str = "", fir: bool = False) -> None:
        super().__init__()
        self.GroupNorm_0, self.Conv_0 = _norm(c_in), _conv(c_in, c_out)
        self.Dense_0 = nn.Linear(c_emb, c_out)
        self.GroupNorm_1, self.Conv_1 = _norm(c_out), _conv(c_out, c_out)
        self.Conv_2 = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or scale else nn.Identity()
        self.resample = _resampler(scale, fir)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.Conv_0(self.resample(functional.silu(self.GroupNorm_0(x))))
        h = h + self.Dense_0(functional.silu(emb))[:, :, None, None]
        h = self.Conv_1(functional.silu(self.GroupNorm_1(h)))
        return (self.Conv_2(self.resample(x)) + h) / math.sqrt(2)


class PixelLinear(nn.Module):
    """W^T x + b at each pixel, with W of shape (channels in, channels out)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.empty(c_in, c_out)), nn.Parameter(torch.empty(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", x, self.W) + self.b[:, None, None]


class Attention(nn.Module):
    """(x + attention over the pixels) / sqrt 2, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = _norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (PixelLinear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.NIN_0, self.NIN_1, self.NIN_2))
        h = functional.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return (x + self.NIN_3(h)) / math.sqrt(2)


class InputSkip(nn.Module):
    """The state plus a 1 x 1 convolution of the smaller image."""

    def __init__(self, c_image: int, channels: int) -> None:
        super().__init__()
        self.Conv_0 = nn.Conv2d(c_image, channels, 1)

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        return self.Conv_0(image) + h


class StridedBlur(nn.Module):
    """A convolution of stride 2 after the blur."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.blur, self.Conv2d_0 = Blur(""), nn.Conv2d(c_in, c_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.Conv2d_0(self.blur(x))


class NCSNpp(nn.Module):
    """The network itself: it maps x of shape (batch, channels, height, width) and its noise level, of shape (batch,), to an image.

    The noise level enters as Fourier features (of log sigma, as in Song et al.) or as a position; the image is not divided by
    sigma. `all_modules` are in the order of the files, and the forward pass uses each of them once. With classes, `labels` are of
    shape (batch,), and the label `classes` stands for none.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.all_modules = nn.ModuleList()
        self.shrink, self.grow = _resampler("down", a.fir), _resampler("up", a.fir)
        self._build_embedding()
        skips = self._build_down()
        c = a.widths[-1]
        self.all_modules.extend([self._residual(c, c), Attention(c), self._residual(c, c)])
        self._build_up(skips)

    def _residual(self, c_in: int, c_out: int, scale: str = "") -> Residual:
        return Residual(c_in, c_out, 4 * self.architecture.features, scale, self.architecture.fir)

    def _build_embedding(self) -> None:
        a, add = self.architecture, self.all_modules.append
        size = a.features * (2 if a.fourier else 1)
        if a.fourier:
            add(FourierFeatures(a.features))
        if a.classes:
            self.map_label = nn.Linear(a.classes, size)
        add(nn.Linear(size, 4 * a.features))
        add(nn.Linear(4 * a.features, 4 * a.features))

    def _build_down(self) -> list[int]:
        """Add the way down, and return the channels of the states that it leaves for the way up."""
        a, add = self.architecture, self.all_modules.append
        add(_conv(a.channels, a.features))
        skips, image = [a.features], a.channels
        for i, (c, attends) in enumerate(zip(a.widths, a.attends, strict=True)):
            for _ in range(a.blocks):
                add(self._residual(skips[-1], c))
                if attends:
                    add(Attention(c))
                skips.append(c)
            if i < len(a.widths) - 1:
                add(self._residual(c, c, "down"))
                if a.input_pyramid == "sum":
                    add(InputSkip(image, c))
                elif a.input_pyramid == "residual":
                    add(StridedBlur(image, c))
                    image = c
                skips.append(c)
        return skips

    def _build_up(self, skips: list[int]) -> None:
        a, add = self.architecture, self.all_modules.append
        c = a.widths[-1]
        for i in reversed(range(len(a.widths))):
            for _ in range(a.blocks + 1):
                add(self._residual(c + skips.pop(), a.widths[i]))
                c = a.widths[i]
            if a.attends[i]:
                add(Attention(c))
            if a.output_pyramid or i == 0:
                self.all_modules.extend([_norm(c), _conv(c, a.outputs or a.channels)])
            if i > 0:
                add(self._residual(c, c, "up"))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        a, modules = self.architecture, iter(self.all_modules)
        emb = next(modules)(noise) if a.fourier else positions(noise, a.features)
        if a.classes:
            if labels is None:
                labels = torch.full((len(x),), a.classes, device=x.device)
            one_hot = functional.one_hot(labels, a.classes + 1)[:, : a.classes].to(x.dtype)
            emb = emb + self.map_label(one_hot * math.sqrt(a.classes))
        emb = next(modules)(emb)
        emb = next(modules)(functional.silu(emb))
        skips = self._down(modules, x, emb)
        h = next(modules)(skips[-1], emb)
        h = next(modules)(h)
        h = next(modules)(h, emb)
        return self._up(modules, h, emb, skips)

    def _down(self, modules: Iterator[nn.Module], x: Tensor, emb: Tensor) -> list[Tensor]:
        a, image, skips = self.architecture, x, [next(modules)(x)]
        for i, attends in enumerate(a.attends):
            for _ in range(a.blocks):
                h = next(modules)(skips[-1], emb)
                skips.append(next(modules)(h) if attends else h)
            if i == len(a.widths) - 1:
                break
            h = next(modules)(skips[-1], emb)
            if a.input_pyramid == "sum":
                image = self.shrink(image)
                h = next(modules)(image, h)
            elif a.input_pyramid == "residual":
                h = image = (next(modules)(image) + h) / math.sqrt(2)
            skips.append(h)
        return skips

    def _up(self, modules: Iterator[nn.Module], h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        a = self.architecture
        images: list[Tensor] = []
        for i in reversed(range(len(a.widths))):
            for _ in range(a.blocks + 1):
                h = next(modules)(torch.cat([h, skips.pop()], dim=1), emb)
            if a.attends[i]:
                h = next(modules)(h)
            if a.output_pyramid or i == 0:
                norm, conv = next(modules), next(modules)
                images.append(conv(functional.silu(norm(h))))
            if i > 0:
                h = next(modules)(h, emb)
        return reduce(lambda image, finer: self.grow(image) + finer, images)
