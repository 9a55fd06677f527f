"""Checkpoints of other code bases: files written here in their formats, and networks written here from their papers."""

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.upsampling import upfirdn2d_native
from flax.serialization import msgpack_serialize
from torch import Tensor
from torch.nn import functional

import deis
from deis.model.checkpoints import ddim_unet, score_sde, torch_files
from deis.model.checkpoints.ddim_unet import load_ddim
from deis.model.checkpoints.score_sde import load_score_sde

from .weights import FIR, Damage, Weights, attend, having, resize, waves, without

X = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32))


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
    alpha = load_ddim(tmp_path / "ema.ckpt", config={"diffusion": about}).sde.alpha([0, 1, 2])
    np.testing.assert_allclose(alpha**2, [0.9, 0.9 * 0.85, 0.9 * 0.85 * 0.8], rtol=1e-12)
    with pytest.raises(ValueError, match=r"'beta_schedule'.*'quad' is unknown"):
        load_ddim(tmp_path / "ema.ckpt", config={"diffusion": about | {"beta_schedule": "quad"}})
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
    torch.save({"weight": X}, tmp_path / "partial.ckpt")
    (tmp_path / "partial.ckpt").write_bytes((tmp_path / "partial.ckpt").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"partial.ckpt' is not a file of tensors that torch.save wrote"):
        load_ddim(tmp_path / "partial.ckpt")
    with pytest.raises(FileNotFoundError):
        load_ddim(tmp_path / "nothing.ckpt")


NETWORKS: dict[str, dict[str, Any]] = {
    "DDPM++": {"fourier": False, "fir": False, "pyramid": "none", "output_skip": False},
    "NCSN++ for VP": {"fourier": False, "fir": True, "pyramid": "residual", "output_skip": False},
    "NCSN++": {"fourier": True, "fir": True, "pyramid": "residual", "output_skip": False},
    "NCSN++ of high resolution": {"fourier": True, "fir": True, "pyramid": "sum", "output_skip": True},
}


class Song:
    """DDPM++ and NCSN++ of Song et al. 2021, appendix H, with the names of the authors' files; the FIR filter is diffusers'."""

    def __init__(self, w: Weights, widths: Sequence[int], blocks: int, attends: Sequence[int], **kind: Any) -> None:
        self.w, self.widths, self.blocks, self.attends, self.kind = w, widths, blocks, attends, kind
        self.modules: list[str] = []
        self.emb = torch.empty(0)

    def name(self, kind: str) -> str:
        """Return the name of the next module; `kind` is what JAX's files call it."""
        self.modules.append(kind)
        return f"all_modules.{len(self.modules) - 1}"

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.w.group_norm(x, name, min(x.shape[1] // 4, 32))

    def resize(self, x: Tensor, way: str) -> Tensor:
        return resize(x, way, self.kind["fir"])

    def residual(self, x: Tensor, c: int, way: str = "") -> Tensor:
        w, name = self.w, self.name("ResnetBlockBigGANpp")
        h = w.conv(self.resize(functional.silu(self.norm(x, f"{name}.GroupNorm_0")), way), f"{name}.Conv_0", c)
        h = h + w.linear(functional.silu(self.emb), f"{name}.Dense_0", c)[:, :, None, None]
        h = w.conv(functional.silu(self.norm(h, f"{name}.GroupNorm_1")), f"{name}.Conv_1", c)
        x = self.resize(x, way)
        return ((w.conv(x, f"{name}.Conv_2", c, 1) if way or x.shape[1] != c else x) + h) * 0.5**0.5

    def attention(self, x: Tensor) -> Tensor:
        name, c = self.name("AttnBlockpp"), x.shape[1]

        def mix(h: Tensor, i: int) -> Tensor:
            matrix, bias = self.w(f"{name}.NIN_{i}.W", c, c), self.w(f"{name}.NIN_{i}.b", c)
            return (h.movedim(1, -1) @ matrix + bias).movedim(-1, 1)

        h = self.norm(x, f"{name}.GroupNorm_0")
        return (x + mix(attend(mix(h, 0), mix(h, 1), mix(h, 2)), 3)) * 0.5**0.5

    def embed(self, noise: Tensor) -> None:
        features = self.widths[0]
        if self.kind["fourier"]:
            angles = (
                torch.outer(noise.log().float(), self.w(f"{self.name('GaussianFourierProjection')}.W", features)) * 2 * torch.pi
            )
            self.emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        else:
            self.emb = waves(noise, features)
        self.emb = self.w.linear(self.emb, self.name("Dense"), 4 * features)
        self.emb = self.w.linear(functional.silu(self.emb), self.name("Dense"), 4 * features)

    def joined(self, image: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smaller image and the state after it has joined."""
        if self.kind["pyramid"] == "sum":
            image = self.resize(image, "down")
            return image, h + self.w.conv(image, f"{self.name('Combine')}.Conv_0", h.shape[1], 1)
        if self.kind["pyramid"] == "residual":
            blurred = upfirdn2d_native(image, torch.outer(torch.tensor(FIR), torch.tensor(FIR)) / 64, pad=(2, 2))
            image = self.w.conv(blurred, f"{self.name('Downsample')}.Conv2d_0", h.shape[1], stride=2, padding=0)
            image = h = (image + h) * 0.5**0.5
        return image, h

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        self.modules = []
        self.embed(noise)
        image, skips = x, [self.w.conv(x, self.name("Conv"), self.widths[0])]
        for i, c in enumerate(self.widths):
            for _ in range(self.blocks):
                h = self.residual(skips[-1], c)
                skips.append(self.attention(h) if i in self.attends else h)
            if i < len(self.widths) - 1:
                image, h = self.joined(image, self.residual(skips[-1], c, "down"))
                skips.append(h)
        h = self.residual(self.attention(self.residual(skips[-1], c)), c)
        output = torch.zeros(())
        for i, c in reversed(list(enumerate(self.widths))):
            for _ in range(self.blocks + 1):
                h = self.residual(torch.cat([h, skips.pop()], dim=1), c)
            h = self.attention(h) if i in self.attends else h
            if i == 0 or self.kind["output_skip"]:
                part = self.w.conv(functional.silu(self.norm(h, self.name("GroupNorm"))), self.name("Conv"), 3)
                output = part if output.ndim == 0 else part + self.resize(output, "up")
            if i > 0:
                h = self.residual(h, c, "up")
        return output


TIMES = torch.tensor([0.002, 0.7])


def song(kind: str, sigma_max: float = 50.0) -> tuple[dict[str, Any], Song]:
    """Return a checkpoint as training writes it, whose averages alone are the weights of the network, and the network."""
    w = Weights()
    network = Song(w, (16, 24, 16), 2, [1], **NETWORKS[kind])
    network(X, TIMES)
    trained = [key for key in w if key != "all_modules.0.W"]
    sigmas = torch.tensor(np.exp(np.linspace(np.log(sigma_max), np.log(0.01), 10)))
    saved = {
        "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
        "model": {"module.sigmas": sigmas} | {f"module.{key}": w[key] + (key in trained) for key in w},
        "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": [w[key] for key in trained]},
        "step": 7,
    }
    return saved, network


@pytest.mark.parametrize("sde", ["vp", "subvp"])
@pytest.mark.parametrize("kind", ["DDPM++", "NCSN++ for VP"])
def test_score_sde_equals_the_paper(tmp_path: Path, sde: str, kind: str) -> None:
    saved, network = song(kind)
    torch.save(saved, tmp_path / "checkpoint_8.pth")
    denoiser = load_score_sde(tmp_path / "checkpoint_8.pth", sde=sde)
    expected = network(X, 999 * TIMES)
    torch.testing.assert_close(denoiser(X, TIMES), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1
    abar = math.exp(-0.1 * 0.7 - 19.9 * 0.7**2 / 2)
    assert denoiser.predicts == "eps"
    assert float(denoiser.sde.alpha(0.7)) == pytest.approx(abar**0.5)
    assert float(denoiser.sde.sigma(0.7)) == pytest.approx((1 - abar) ** (0.5 if sde == "vp" else 1))
    assert (denoiser.sde.t_start, denoiser.sde.t_end) == (1, 1e-3)


@pytest.mark.parametrize("sigma_max", [50.0, 348.0])
@pytest.mark.parametrize("kind", ["NCSN++", "NCSN++ of high resolution"])
def test_score_sde_with_exploding_variance_equals_the_paper(tmp_path: Path, kind: str, sigma_max: float) -> None:
    saved, network = song(kind, sigma_max)
    torch.save(saved, tmp_path / "checkpoint_24.pth")
    denoiser = load_score_sde(tmp_path / "checkpoint_24.pth", sde="ve")
    assert denoiser.sde == deis.VESDE(0.02, 2 * sigma_max, 1e-5)
    sigma = torch.from_numpy(0.01 * (sigma_max / 0.01) ** TIMES.numpy())[:, None, None, None]
    score = network(X, sigma.flatten()) / sigma  # of the data in [0, 1], at (X + 1) / 2
    torch.testing.assert_close(denoiser(X, TIMES), (-sigma * score).float(), rtol=0, atol=1e-5)
    assert (denoiser.predicts, bool(score.std() > 0.1)) == ("eps", True)


@pytest.mark.parametrize(("kind", "sde"), [("DDPM++", "vp"), ("NCSN++", "ve")])
def test_score_sde_samples_without_gradients(tmp_path: Path, kind: str, sde: str) -> None:
    torch.save(song(kind)[0], tmp_path / "checkpoint.pth")
    denoiser = load_score_sde(tmp_path / "checkpoint.pth", sde=sde, dtype="float64")
    output = denoiser(X.double(), TIMES.double())
    assert (output.dtype, output.requires_grad) == (torch.float64, False)
    sample = deis.sample(deis.make_plan(denoiser.sde, "tab2", 3), denoiser, X.double() * float(denoiser.sde.sigma(1.0)))
    assert torch.isfinite(sample).all()


# As the authors' own definitions count them, with the 128 fixed frequencies of NCSN++
@pytest.mark.parametrize(
    ("kind", "widths", "blocks", "attends", "size", "parameters"),
    [
        ("DDPM++", (128, 256, 256, 256), 4, [1], 32, 61_804_419),
        ("DDPM++", (128, 256, 256, 256), 8, [1], 32, 106_632_579),
        ("NCSN++", (128, 256, 256, 256), 4, [1], 32, 62_758_915),
        ("NCSN++ of high resolution", (128, 128, 256, 256, 256, 256, 256), 2, [4], 256, 65_574_549),
    ],
)
def test_the_published_score_sde_networks(
    kind: str, widths: tuple[int, ...], blocks: int, attends: list[int], size: int, parameters: int
) -> None:
    w = Weights("meta")
    network = Song(w, widths, blocks, attends, **NETWORKS[kind])
    network(torch.empty(1, 3, size, size, device="meta"), torch.empty(1, device="meta"))
    assert sum(value.numel() for value in w.values()) == parameters
    loaded = score_sde.network_of({key: tuple(value.shape) for key, value in w.items()}, "published")
    assert sum(value.numel() for value in loaded.parameters()) == parameters


def in_model(damage: Damage) -> Damage:
    return lambda saved: saved | {"model": damage(saved["model"])}


def with_averages(change: Callable[[list[Tensor]], list[Tensor]]) -> Damage:
    return lambda saved: saved | {"ema": {"shadow_params": change(saved["ema"]["shadow_params"])}}


def in_both(key: str, value: Tensor) -> Damage:
    """Replace a weight together with its average."""

    def damage(saved: dict[str, Any]) -> Any:
        i = [k for k in saved["model"] if k not in ("module.sigmas", "module.all_modules.0.W")].index(key)
        averages = saved["ema"]["shadow_params"]
        averages[i] = value
        return saved | {"model": saved["model"] | {key: value}}

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("ema"), r"were expected, and reading them raised KeyError\('ema'\)"),
        (in_model(without("module.sigmas")), r"were expected, and reading them raised KeyError\('sigmas'\)"),
        (list, "were expected, and reading them raised TypeError"),
        (having("model", 3), "entry 'model' must map names to tensors, and is a int"),
        (with_averages(lambda averages: averages[1:]), r"has \d+ trained weights, and averages of \d+"),
        (
            with_averages(lambda averages: averages[::-1]),
            r"'all_modules.0.weight' of shape \(64, 16\), and an average of it of shape \(3,\)",
        ),
        (in_model(lambda model: model | {"module.sigmas2": model.pop("module.all_modules.0.weight")}), "has 'sigmas2', and 'all_"),
        (
            in_both("module.all_modules.4.Conv_0.bias", torch.zeros(7)),
            r"'all_modules.4.Conv_0.bias' of shape \(7,\), and not \(16,\)",
        ),
        (
            lambda saved: saved | {"model": {"sigmas": torch.ones(2), "all_modules.0.weight": X}, "ema": {"shadow_params": [X]}},
            "its all_modules have 0 residual blocks for 1 levels",
        ),
    ],
)
def test_score_sde_refuses_another_file_and_says_why(tmp_path: Path, damage: Damage, message: str) -> None:
    torch.save(damage(song("DDPM++")[0]), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=message):
        load_score_sde(tmp_path / "checkpoint.pth")


def test_score_sde_refuses_the_wrong_sde(tmp_path: Path) -> None:
    for kind in ("DDPM++", "NCSN++"):
        torch.save(song(kind)[0], tmp_path / f"{kind}.pth")
    with pytest.raises(ValueError, match=r"sde='ve' does not fit .* by positions, as with sde='vp' or 'subvp'"):
        load_score_sde(tmp_path / "DDPM++.pth", sde="ve")
    with pytest.raises(ValueError, match=r"sde='subvp' does not fit .* by features of log sigma, as with sde='ve'"):
        load_score_sde(tmp_path / "NCSN++.pth", sde="subvp")
    with pytest.raises(ValueError, match="sde='edm' is unknown"):
        load_score_sde(tmp_path / "DDPM++.pth", sde="edm")
    with pytest.raises(ValueError, match="dtype='half' is unknown"):
        load_score_sde(tmp_path / "DDPM++.pth", dtype="half")


def test_networks_are_filled_for_sampling() -> None:
    network = torch_files.fill(torch.nn.Dropout(), {}, None, "float32")
    assert not network.training


def test_the_loaders_import_no_framework() -> None:
    code = "import sys, deis.model.checkpoints.ddim_unet, deis.model.checkpoints.score_sde; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def flax_params(saved: dict[str, Any], network: Song) -> dict[str, Any]:
    """The averaged weights as JAX's code base nests them: channels last, modules of a class numbered in the order of use."""
    used: Counter[str] = Counter()
    names = []
    for kind in network.modules:
        names.append(f"{kind}_{used[kind]}")
        used[kind] += 1
    params: dict[str, Any] = {}
    for key, value in network.w.items():
        _, number, *parts, leaf = key.split(".")
        array = value.numpy()
        if leaf == "weight":
            array = array.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[array.ndim])
            leaf = "scale" if array.ndim == 1 else "weight" if parts == ["Conv2d_0"] else "kernel"
        into = params.setdefault(names[int(number)], {})
        for part in parts:
            into = into.setdefault(part, {})
        into[leaf] = np.ascontiguousarray(array)
    return params


def flax_file(path: Path, params: dict[str, Any]) -> Path:
    state = {"step": 7, "optimizer": {"target": {}, "state": {"step": 7}}, "lr": 2e-4, "ema_rate": 0.999, "params_ema": params}
    path.write_bytes(msgpack_serialize(state))
    return path


@pytest.mark.parametrize(
    ("kind", "sde"), [("DDPM++", "vp"), ("NCSN++ for VP", "subvp"), ("NCSN++", "ve"), (list(NETWORKS)[3], "ve")]
)
def test_a_checkpoint_of_jax_equals_that_of_torch(tmp_path: Path, kind: str, sde: str) -> None:
    saved, network = song(kind)
    torch.save(saved, tmp_path / "checkpoint_8.pth")
    flax_file(tmp_path / "checkpoint_8", flax_params(saved, network))
    expected = load_score_sde(tmp_path / "checkpoint_8.pth", sde=sde, size=32)
    got = load_score_sde(tmp_path / "checkpoint_8", sde=sde, size=32)
    assert torch.equal(got(X, TIMES), expected(X, TIMES))
    assert got.sde.name == expected.sde.name
    assert (got.shape, got.predicts) == (expected.shape, expected.predicts)


def test_a_checkpoint_of_jax_that_is_another_network(tmp_path: Path) -> None:
    params = flax_params(*song("DDPM++"))
    attention = params["AttnBlockpp_1"].pop("NIN_2")
    with pytest.raises(ValueError, match=r"lacks 'AttnBlockpp_1/NIN_2/W', of shape \(24, 24\)"):
        load_score_sde(flax_file(tmp_path / "checkpoint_1", params), size=32)
    params["AttnBlockpp_1"]["NIN_2"] = attention
    with pytest.raises(ValueError, match=r"'AttnBlockpp_0/GroupNorm_0/scale' of shape \(24,\), and not \(16,\)"):
        load_score_sde(flax_file(tmp_path / "checkpoint_2", params), size=64)  # attention elsewhere
    params["Conv_1"]["kernel"] = np.zeros((3, 3, 16, 5), np.float32)
    with pytest.raises(ValueError, match=r"'Conv_1/kernel' of shape \(3, 3, 16, 5\), and not \(3, 3, 16, 3\)"):
        load_score_sde(flax_file(tmp_path / "checkpoint_3", params), size=32)
    del params["ResnetBlockBigGANpp_0"]
    with pytest.raises(ValueError, match="lacks 'ResnetBlockBigGANpp_0/Conv_0/kernel', and a convolution was expected there"):
        load_score_sde(flax_file(tmp_path / "checkpoint_4", params))
    with pytest.raises(ValueError, match="has 'Conv_0' of type int, not an array"):
        load_score_sde(flax_file(tmp_path / "checkpoint_5", {"Conv_0": 3}))
    whole = flax_file(tmp_path / "checkpoint_6", params).read_bytes()
    (tmp_path / "checkpoint_6").write_bytes(whole[:-99])
    with pytest.raises(ValueError, match="checkpoint_6' cannot be read as Flax's MessagePack"):
        load_score_sde(tmp_path / "checkpoint_6")
