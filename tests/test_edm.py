"""Checkpoints of EDM: files written here in its format, and its networks written here from the paper (arXiv 2206.00364)."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.upsampling import upfirdn2d_native
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

import deis
from deis.model.checkpoints import edm, edm_names
from deis.model.checkpoints.edm import load_edm

from .weights import FIR, Damage, Weights, having, resize, without

X = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32))
SIGMA = torch.tensor([0.05, 3.0])
DDPMPP: dict[str, Any] = {"widths": (16, 24, 16), "blocks": 2, "attends": [1], "classes": 5, "taps": [1, 1]}
NCSNPP = DDPMPP | {"classes": 0, "fourier": True, "encoder": "residual", "taps": FIR}
SKIPS = DDPMPP | {"encoder": "skip", "decoder": "skip", "taps": FIR}
BLURRED = DDPMPP | {"taps": FIR}
ADM: dict[str, Any] = {"adm": True, "widths": (128, 192), "blocks": 1, "attends": [1], "classes": 5, "taps": [1, 1]}
NETWORKS = {"DDPM++": DDPMPP, "NCSN++": NCSNPP, "skips": SKIPS, "blurred": BLURRED, "ADM": ADM}


class Karras:
    """The networks of Karras et al. 2022, appendix F.2, with the names of the authors' files; `out` counts the channels out."""

    def __init__(
        self, w: Weights, *, widths: Any, blocks: int, attends: list[int], classes: int, taps: list[int], **kind: Any
    ) -> None:
        self.w, self.widths, self.blocks, self.attends, self.classes = w, widths, blocks, attends, classes
        self.kind = {
            "adm": False,
            "fourier": False,
            "encoder": "standard",
            "decoder": "standard",
            "out": 3,
            "features": widths[0],
        } | kind
        self.taps, self.fir, self.emb = torch.tensor(taps), taps == FIR, torch.empty(0)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.w.group_norm(x, name, min(32, x.shape[1] // 4), 1e-5 if self.kind["adm"] else 1e-6)

    def filter(self, name: str) -> None:
        """Keep the filter of a resampling, which the files have."""
        outer = torch.outer(self.taps, self.taps) / self.taps.sum() ** 2
        self.w[f"{name}.resample_filter"] = outer[None, None].float()

    def block(self, x: Tensor, name: str, c: int, way: str = "", attends: bool = False) -> Tensor:
        w, name, adm = self.w, f"model.{name}", self.kind["adm"]
        skips = x.shape[1] != c or bool(way)
        for part in ["conv0", "skip"] if way else []:
            self.filter(f"{name}.{part}")
        h = w.conv(resize(functional.silu(self.norm(x, f"{name}.norm0")), way, self.fir), f"{name}.conv0", c)
        emb = w.linear(self.emb, f"{name}.affine", c * (1 + adm))[:, :, None, None]
        if adm:
            h = functional.silu(self.norm(h, f"{name}.norm1") * (1 + emb[:, :c]) + emb[:, c:])
        else:
            h = functional.silu(self.norm(h + emb, f"{name}.norm1"))
        h = w.conv(h, f"{name}.conv1", c)
        x = resize(x, way, self.fir)
        half = 1.0 if adm else 0.5**0.5
        h = half * (h + (w.conv(x, f"{name}.skip", c, 1) if skips and not (adm and x.shape[1] == c) else x))
        if not attends:
            return h
        heads = c // 64 if adm else 1
        qkv = w.conv(self.norm(h, f"{name}.norm2"), f"{name}.qkv", 3 * c, 1).flatten(2)
        q, k, v = qkv.unflatten(1, (heads, c // heads, 3)).unbind(3)  # (batch, heads, channels, pixels)
        weights = torch.softmax(q.transpose(2, 3) @ k * (c // heads) ** -0.5, dim=-1)
        return half * (h + w.conv((v @ weights.transpose(2, 3)).reshape(h.shape), f"{name}.proj", c, 1))

    def embed(self, noise: Tensor, one_hot: Tensor) -> None:
        w, c, adm = self.w, self.kind["features"], self.kind["adm"]
        if self.kind["fourier"]:
            angles = 2 * torch.pi * torch.outer(noise, w("model.map_noise.freqs", c))
        else:
            angles = torch.outer(noise, 1e-4 ** (torch.arange(c // 2, device=noise.device) / (c // 2 - (not adm))))
        parts = [angles.cos(), angles.sin()] if adm else [angles.sin(), angles.cos()]
        emb = torch.cat(parts, dim=1)
        if self.classes and not adm:
            emb = emb + w.linear(one_hot * self.classes**0.5, "model.map_label", emb.shape[1])
        w("model.map_augment.weight", emb.shape[1], 9)  # of labels that are 0 in sampling
        emb = functional.silu(w.linear(emb, "model.map_layer0", 4 * c))
        emb = w.linear(emb, "model.map_layer1", 4 * c)
        if self.classes and adm:
            emb = emb + one_hot @ w("model.map_label.weight", 4 * c, self.classes).T
        self.emb = functional.silu(emb)

    def __call__(self, x: Tensor, noise: Tensor, one_hot: Tensor) -> Tensor:
        w, aux, kind = self.w, x, self.kind
        self.embed(noise, one_hot)
        size = x.shape[-1]
        skips = [w.conv(x, f"model.enc.{size}x{size}_conv", kind["features"])]
        for i, c in enumerate(self.widths):
            r = f"{size >> i}x{size >> i}"
            if i > 0:
                h = self.block(skips[-1], f"enc.{r}_down", skips[-1].shape[1], "down")
                if kind["encoder"] == "skip":
                    self.filter(f"model.enc.{r}_aux_down")
                    aux = resize(aux, "down", self.fir)
                    h = h + w.conv(aux, f"model.enc.{r}_aux_skip", h.shape[1], 1)
                if kind["encoder"] == "residual":
                    self.filter(f"model.enc.{r}_aux_residual")
                    blurred = upfirdn2d_native(aux, torch.outer(self.taps, self.taps) / 64, pad=(2, 2))
                    aux = w.conv(blurred, f"model.enc.{r}_aux_residual", h.shape[1], stride=2, padding=0)
                    h = aux = (h + aux) * 0.5**0.5
                skips.append(h)
            for j in range(self.blocks):
                skips.append(self.block(skips[-1], f"enc.{r}_block{j}", c, attends=i in self.attends))
        h = self.block(skips[-1], f"dec.{r}_in0", c, attends=True)
        h = self.block(h, f"dec.{r}_in1", c)
        output = torch.zeros(())
        for i, c in reversed(list(enumerate(self.widths))):
            r = f"{size >> i}x{size >> i}"
            if i < len(self.widths) - 1:
                h = self.block(h, f"dec.{r}_up", h.shape[1], "up")
            for j in range(self.blocks + 1):
                attends = i in self.attends and (kind["adm"] or j == self.blocks)
                h = self.block(torch.cat([h, skips.pop()], dim=1), f"dec.{r}_block{j}", c, attends=attends)
            if not kind["adm"] and (i == 0 or kind["decoder"] == "skip"):
                if output.ndim > 0:
                    self.filter(f"model.dec.{r}_aux_up")
                    output = resize(output, "up", self.fir)
                output = output + w.conv(functional.silu(self.norm(h, f"model.dec.{r}_aux_norm")), f"model.dec.{r}_aux_conv", 3)
        return w.conv(functional.silu(self.norm(h, "model.out_norm")), "model.out_conv", kind["out"]) if kind["adm"] else output


def karras(kind: dict[str, Any]) -> tuple[Weights, Callable[[Tensor, Tensor, Tensor | None], Tensor]]:
    """Return the weights of a network and F(x, noise, labels), where no labels are zeros."""
    w = Weights()
    network = Karras(w, **kind)
    classes = kind["classes"]

    def raw(x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        one_hot = torch.zeros(len(x), classes) if labels is None else torch.eye(classes)[labels]
        return network(x, noise, one_hot)

    raw(X, SIGMA, None)
    return w, raw


def each(sigma: Tensor) -> Tensor:
    return sigma[:, None, None, None]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_edm_equals_the_paper(tmp_path: Path, kind: str, suffix: str) -> None:
    w, raw = karras(NETWORKS[kind])
    (save_file if suffix == ".safetensors" else torch.save)(dict(w), tmp_path / f"net{suffix}")
    network = load_edm(tmp_path / f"net{suffix}")
    classes = NETWORKS[kind]["classes"] or None
    assert (network.sde, network.predicts, network.shape) == (deis.EDM(), "x0", (3, 8, 8))
    assert (network.num_classes, network.null_class) == (classes, classes)
    x = X * each(SIGMA**2 + 1).sqrt()
    for labels in [None, [3, 1]] if classes else [None]:
        total = each(SIGMA**2 + 0.25)
        F = raw(x / total.sqrt(), SIGMA.log() / 4, None if labels is None else torch.tensor(labels))
        expected = 0.25 / total * x + 0.5 * each(SIGMA) / total.sqrt() * F
        torch.testing.assert_close(network.conditional(labels)(x, SIGMA), expected, rtol=0, atol=2e-5)
        assert F.std() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_edm_guides_away_from_no_class(tmp_path: Path, guidance: float) -> None:
    save_file(dict(karras(DDPMPP)[0]), tmp_path / "net.safetensors")
    network = deis.load_model(tmp_path / "net.safetensors")
    none, some = network(X, SIGMA), network.conditional([3, 1])(X, SIGMA)
    expected = none + guidance * (some - none)
    torch.testing.assert_close(network.conditional([3, 1], guidance)(X, SIGMA), expected, rtol=0, atol=1e-5)
    assert (none - some).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "preconditioning"), [("DDPM++", "vp"), ("NCSN++", "ve"), ("ADM", "iddpm")])
def test_the_other_preconditionings(tmp_path: Path, kind: str, preconditioning: str) -> None:
    """D(x, sigma) of table 1 of the paper, of the schedule's own x and sigma."""
    discrete = preconditioning == "iddpm"
    w, raw = karras(NETWORKS[kind] | ({"out": 6} if discrete else {}))
    alphas = np.cos(np.pi / 2 * np.arange(1001) / 1000 / 1.008) ** 2
    u = torch.tensor(np.sqrt(1 / np.maximum(alphas, 1e-8) - 1)[::-1].copy(), dtype=torch.float32)  # from the greatest to 0
    torch.save(dict(w) | ({"u": u} if discrete else {}), tmp_path / "net.pt")
    network = load_edm(tmp_path / "net.pt", preconditioning=None if discrete else preconditioning)
    for t in (30, 700) if discrete else (0.1, 0.7):
        alpha, sigma = float(network.sde.alpha(t)), float(network.sde.sigma(t))
        rho = torch.full((2,), sigma / alpha)
        y = X * each(rho**2 + 1).sqrt()
        c_in = 1.0 if preconditioning == "ve" else 1 / each(rho**2 + 1).sqrt()
        noise = {"vp": 999 * t, "ve": np.log(sigma / 2), "iddpm": t}[preconditioning]
        F = raw(c_in * y, torch.full((2,), float(noise)), None)[:, :3]
        D = y + (1 if preconditioning == "ve" else -1) * each(rho) * F
        predicted = network.conditional().predict(alpha * y, t, "x0")
        torch.testing.assert_close(predicted, D, rtol=1e-4, atol=1e-4)
    assert network.sde.t_start == (999 if discrete else 1.0)
    if discrete:
        np.testing.assert_allclose(network.sde.rho([0, 400, 999]), u[[999, 599, 0]], rtol=1e-5)


def test_edm_samples(tmp_path: Path) -> None:
    torch.save(dict(karras(DDPMPP)[0]), tmp_path / "net.pt")
    network = load_edm(tmp_path / "net.pt", dtype="float64")
    x_0 = deis.sample(deis.make_plan(network.sde, nfe=3), network.conditional([0, 4]), 80 * X.double())
    assert (x_0.dtype, bool(torch.isfinite(x_0).all()), x_0.requires_grad) == (torch.float64, True, False)


# As the code base's own definitions count them, with the weights of augmentation.
@pytest.mark.parametrize(
    ("kind", "size", "parameters"),
    [
        ({"widths": (256,) * 3, "features": 128, "blocks": 4, "attends": [1], "classes": 10, "taps": [1, 1]}, 32, 55_735_299),
        (ADM | {"widths": (192, 384, 576, 768), "blocks": 3, "attends": [1, 2, 3], "classes": 1000}, 64, 295_899_267 + 192 * 9),
    ],
    ids=["CIFAR-10", "ImageNet-64"],
)
def test_the_published_edm_networks(kind: dict[str, Any], size: int, parameters: int) -> None:
    w = Weights("meta")
    Karras(w, **kind)(*(torch.empty(shape, device="meta") for shape in ((1, 3, size, size), (1,), (1, kind["classes"]))))
    weights = {key: value for key, value in w.items() if not key.endswith("resample_filter")}
    assert sum(value.numel() for value in weights.values()) == parameters
    found = {key.removeprefix("model."): tuple(value.shape) for key, value in weights.items() if "map_augment" not in key}
    _, sources = edm_names.adm(found, size, "published") if "adm" in kind else edm_names.song(found, size, False, "published")
    assert {source.name: source.shape for source in sources.values()} == found


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("model.enc.8x8_conv.weight"), "lacks a convolution 'model.enc.<size>x<size>_conv.weight'"),
        (without("model.enc.8x8_block0.conv0.weight"), "lacks 'enc.8x8_block0.conv0.weight'"),
        (without("model.dec.2x2_in0.qkv.bias"), r"lacks 'dec.2x2_in0.qkv.bias', of shape \(48,\)"),
        (having("model.logvar", X), r"has 'logvar', of shape \(2, 3, 8, 8\), which that network does not"),
        (having("model.enc.4x4_down.skip.bias", X), r"'enc.4x4_down.skip.bias' of shape \(2, 3, 8, 8\), and not \(16,\)"),
        (having("model.enc.4x4_down.skip.resample_filter", torch.ones(1, 1, 3, 3)), "resamples with the filters"),
        (having("step", 3), "'step' is a int"),
    ],
)
def test_edm_refuses_another_file_and_says_why(tmp_path: Path, damage: Damage, message: str) -> None:
    torch.save(damage(dict(karras(DDPMPP)[0])), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message):
        load_edm(tmp_path / "net.pt")


def test_edm_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    torch.save(dict(karras(DDPMPP)[0]), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="preconditioning='ddpm' is unknown; the known ones are 'edm', 'vp', 've', 'iddpm'"):
        load_edm(tmp_path / "net.pt", preconditioning="ddpm")
    with pytest.raises(ValueError, match="preconditioning='iddpm' needs the levels 'u'"):
        load_edm(tmp_path / "net.pt", preconditioning="iddpm")
    with pytest.raises(ValueError, match="dtype='half' is unknown"):
        load_edm(tmp_path / "net.pt", dtype="half")
    torch.save(dict(karras(ADM | {"widths": (64, 128)})[0]), tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match=r"has channels \(64, 128\), but an ADM network has multiples of 64 from 128 up"):
        load_edm(tmp_path / "narrow.pt")


class Network:
    """What unpickling makes."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights


def test_a_pickle_is_read_only_where_that_is_asked_for(tmp_path: Path) -> None:
    w, _ = karras(DDPMPP)
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": Network(dict(w))}))
    for load in (load_edm, deis.load_model):
        with pytest.raises(ValueError, match="reading a pickle runs the code in it; give allow_pickle=True if you trust"):
            load(tmp_path / "edm.pkl")
    torch.save(dict(w), tmp_path / "net.pt")
    expected = load_edm(tmp_path / "net.pt")(X, SIGMA)
    assert torch.equal(deis.load_model(tmp_path / "edm.pkl", allow_pickle=True)(X, SIGMA), expected)
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"net": 3}))
    with pytest.raises(ValueError, match=r"it must have a network as 'ema', and gave KeyError\('ema'\)"):
        load_edm(tmp_path / "other.pkl", allow_pickle=True)
    (tmp_path / "foreign.pkl").write_bytes(b"ctorch_utils.persistence\nNetwork\n.")
    assert "torch_utils" not in sys.modules
    with pytest.raises(ImportError, match="needs its code base on the path: No module named 'torch_utils'"):
        load_edm(tmp_path / "foreign.pkl", allow_pickle=True)


def test_edm_is_recognised() -> None:
    assert edm.recognises(dict(karras(DDPMPP)[0]))
    assert not edm.recognises({"map_layer0.weight": X})
