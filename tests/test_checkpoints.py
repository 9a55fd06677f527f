"""Checkpoints of other code bases: files written here in their formats, and networks written here from their papers."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import deis
from deis.model.checkpoints import ddim_unet
from deis.model.checkpoints.ddim_unet import load_ddim

X = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32))


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

    def group_norm(self, x: Tensor, name: str, groups: int) -> Tensor:
        gain, bias = self(f"{name}.weight", x.shape[1]), self(f"{name}.bias", x.shape[1])
        return functional.group_norm(x, groups, gain, bias, eps=1e-6)

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


def ho(w: Weights, x: Tensor, t: Tensor, widths: Sequence[int], blocks: int, attends: Sequence[int]) -> Tensor:
    """The U-Net of Ho et al. 2020, appendix B, with the names of its PyTorch port; attention at the levels `attends`."""
    swish = functional.silu

    def residual(x: Tensor, name: str, c: int) -> Tensor:
        h = w.conv(swish(w.group_norm(x, f"{name}.norm1", 32)), f"{name}.conv1", c)
        h = h + w.linear(swish(temb), f"{name}.temb_proj", c)[:, :, None, None]
        h = w.conv(swish(w.group_norm(h, f"{name}.norm2", 32)), f"{name}.conv2", c)
        return h + (x if x.shape[1] == c else w.conv(x, f"{name}.nin_shortcut", c, 1))

    def attention(x: Tensor, name: str) -> Tensor:
        c, h = x.shape[1], w.group_norm(x, f"{name}.norm", 32)
        q, k, v = (w.conv(h, f"{name}.{part}", c, 1) for part in "qkv")
        return x + w.conv(attend(q, k, v), f"{name}.proj_out", c, 1)

    temb = w.linear(waves(t, widths[0]), "temb.dense.0", 4 * widths[0])
    temb = w.linear(swish(temb), "temb.dense.1", 4 * widths[0])
    skips = [w.conv(x, "conv_in", widths[0])]
    for i, c in enumerate(widths):
        for j in range(blocks):
            h = residual(skips[-1], f"down.{i}.block.{j}", c)
            skips.append(attention(h, f"down.{i}.attn.{j}") if i in attends else h)
        if i < len(widths) - 1:
            skips.append(w.conv(functional.pad(skips[-1], (0, 1, 0, 1)), f"down.{i}.downsample.conv", c, stride=2, padding=0))
    h = residual(skips[-1], "mid.block_1", widths[-1])
    h = residual(attention(h, "mid.attn_1"), "mid.block_2", widths[-1])
    for i, c in reversed(list(enumerate(widths))):
        for j in range(blocks + 1):
            h = residual(torch.cat([h, skips.pop()], dim=1), f"up.{i}.block.{j}", c)
            h = attention(h, f"up.{i}.attn.{j}") if i in attends else h
        if i > 0:
            h = w.conv(functional.interpolate(h, scale_factor=2.0), f"up.{i}.upsample.conv", c)
    return w.conv(swish(w.group_norm(h, "norm_out", 32)), "conv_out", 3)


SMALL: dict[str, Any] = {"widths": (32, 64, 32), "blocks": 2, "attends": [1]}
T = torch.tensor([3, 998])


def ho_weights() -> tuple[Weights, Tensor]:
    """Return weights, and the output that they imply for (X, T)."""
    w = Weights()
    return w, ho(w, X, T, **SMALL)


def parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda w: w,
    "parallel": parallel,
    "trained": lambda w: [parallel({k: v + 1 for k, v in w.items()}), {"state": {}, "param_groups": []}, 7, 700, w],
    "trained, parallel average": lambda w: [{k: v + 1 for k, v in w.items()}, {}, 7, 700, parallel(w)],
    "trained without average": lambda w: [parallel(w), {}, 7, 700],
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ddim_equals_the_paper(tmp_path: Path, wrapper: str) -> None:
    w, expected = ho_weights()
    torch.save(WRAPPERS[wrapper](dict(w)), tmp_path / "ckpt.pth")
    denoiser = load_ddim(tmp_path / "ckpt.pth")
    torch.testing.assert_close(denoiser(X, T), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


def test_ddim_samples_without_gradients_or_dropout_at_the_training_times(tmp_path: Path) -> None:
    torch.save(dict(ho_weights()[0]), tmp_path / "ema.ckpt")
    denoiser = load_ddim(tmp_path / "ema.ckpt", dtype="float64")
    assert (denoiser.predicts, denoiser.sde.num_times) == ("eps", 1000)
    betas = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
    np.testing.assert_allclose(denoiser.sde.alpha([0, 1, 999]) ** 2, np.cumprod(1 - betas)[[0, 1, 999]], rtol=1e-12)
    output = denoiser(X.double(), T)
    assert (output.dtype, output.requires_grad) == (torch.float64, False)
    assert torch.equal(output, denoiser(X.double(), T))
    sample = deis.sample(deis.make_plan(denoiser.sde, "tab3", 3), denoiser, X.double())
    assert torch.isfinite(sample).all()


def test_ddim_takes_the_betas_of_a_configuration(tmp_path: Path) -> None:
    torch.save(dict(ho_weights()[0]), tmp_path / "ema.ckpt")
    about = {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.2, "num_diffusion_timesteps": 3}
    alpha = load_ddim(tmp_path / "ema.ckpt", {"diffusion": about}).sde.alpha([0, 1, 2])
    np.testing.assert_allclose(alpha**2, [0.9, 0.9 * 0.85, 0.9 * 0.85 * 0.8], rtol=1e-12)
    with pytest.raises(ValueError, match=r"'beta_schedule'.*'quad' is unknown"):
        load_ddim(tmp_path / "ema.ckpt", {"diffusion": about | {"beta_schedule": "quad"}})
    with pytest.raises(ValueError, match="dtype='float16' is unknown"):
        load_ddim(tmp_path / "ema.ckpt", dtype="float16")


# As the code base's own definition counts them; arXiv 2006.11239, appendix B, has 35.7 and 114 million for the first and last.
@pytest.mark.parametrize(
    ("widths", "attends", "size", "parameters"),
    [
        ((128, 256, 256, 256), [1], 32, 35_746_307),
        ((128, 256, 256, 256, 512), [2], 64, 78_700_803),
        ((128, 128, 256, 256, 512, 512), [4], 256, 113_673_219),
    ],
    ids=["CIFAR-10", "CelebA", "LSUN"],
)
def test_the_published_ddim_networks(widths: tuple[int, ...], attends: list[int], size: int, parameters: int) -> None:
    w = Weights("meta")
    ho(w, torch.empty(1, 3, size, size, device="meta"), torch.empty(1, device="meta"), widths, 2, attends)
    assert sum(value.numel() for value in w.values()) == parameters
    unet, names = ddim_unet._network({key: tuple(value.shape) for key, value in w.items()}, "published")
    assert sum(value.numel() for value in unet.parameters()) == parameters
    assert set(names.values()) == set(w)


Damage = Callable[[dict[str, Any]], Any]


def without(key: str) -> Damage:
    return lambda state: {k: v for k, v in state.items() if k != key}


def having(key: str, value: Any) -> Damage:
    return lambda state: state | {key: value}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("conv_in.weight"), r"lacks 'conv_in.weight'"),
        (without("down.0.block.0.conv1.weight"), r"lacks 'down.0.block.0.conv1.weight'"),
        (without("mid.attn_1.q.weight"), r"lacks 'mid.attn_1.q.weight', of shape \(32, 32, 1, 1\)"),
        (having("logvar", torch.zeros(4)), r"has 'logvar', of shape \(4,\), which that network does not"),
        (having("up.2.upsample.conv.bias", torch.zeros(5)), r"'up.2.upsample.conv.bias' of shape \(5,\), and not \(32,\)"),
        (
            having("mid.attn_1.k.weight", torch.zeros(32, 32)),
            r"'mid.attn_1.k.weight' of shape \(32, 32\), and not \(32, 32, 1, 1\)",
        ),
        (having("down.1.block.0.conv1.weight", torch.zeros(40, 32, 3, 3)), "'down.1.block.0.conv1.weight' has 40 channels"),
        (having("conv_out.weight", torch.zeros(3)), r"has 'conv_out.weight' of shape \(3,\), and a convolution was expected"),
        (having("step", 3), "the file must map names to tensors, and 'step' is a int"),
        (lambda state: [state, state], "a list of 2 entries, and not of 4 or 5"),
        (lambda state: [1, 2, 3, 4, 5], "entry 4 of the list must map names to tensors, and is a int"),
        (lambda state: Path("a"), "is not a file of tensors that torch.save wrote"),
    ],
)
def test_ddim_refuses_another_file_and_says_why(tmp_path: Path, damage: Damage, message: str) -> None:
    torch.save(damage(dict(ho_weights()[0])), tmp_path / "ema.ckpt")
    with pytest.raises(ValueError, match=message):
        load_ddim(tmp_path / "ema.ckpt")


def test_a_file_that_torch_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "page.ckpt").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page.ckpt' is not a file of tensors that torch.save wrote"):
        load_ddim(tmp_path / "page.ckpt")
    with pytest.raises(FileNotFoundError):
        load_ddim(tmp_path / "nothing.ckpt")
