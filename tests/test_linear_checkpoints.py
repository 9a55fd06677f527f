"""Checkpoints of networks of linear SDEs: the authors' own programs, and files in their formats.

Run with `DEIS_CLD_SGM=path DEIS_GDDIM=path python -m pytest -m originals`, the checkouts of github.com/nv-tlabs/CLD-SGM and
github.com/qsh-zh/gDDIM. Each runs in a process of its own (tests/original_cld_sgm.py, tests/original_gddim.py): it makes its
network with random weights, saves it by its own code, and computes what its sampler uses.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax.serialization import msgpack_serialize
from numpy.typing import NDArray

import deis
from deis.linear.pretrained import PretrainedLinear
from deis.model.checkpoints import linear_sdes
from deis.model.checkpoints.flax_files import _leaf
from deis.model.checkpoints.linear_sdes import load_linear_sde, rotation
from deis.model.checkpoints.ncsnpp import Architecture

from .test_checkpoints import NETWORKS, Song
from .weights import Weights, having, without

Array = NDArray[np.float64]
HERE = Path(__file__).parent
cld_sgm = pytest.mark.skipif("DEIS_CLD_SGM" not in os.environ, reason="DEIS_CLD_SGM names no checkout of CLD-SGM")
gddim = pytest.mark.skipif("DEIS_GDDIM" not in os.environ, reason="DEIS_GDDIM names no checkout of gDDIM")
TIMES = torch.tensor([0.9, 0.004])
X = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 6, 8, 8), dtype=np.float32))


def original(script: str, checkout: str, folder: Path, kind: str) -> Any:
    code = [sys.executable, "-W", "ignore", str(HERE / script), str(Path(checkout).resolve()), str(folder), kind]
    subprocess.run(code, check=True, cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return np.load(folder / "expected.npz")


@pytest.mark.originals
@cld_sgm
@pytest.mark.parametrize(("kind", "options"), [("cifar10", {}), ("celeba", {"beta": [0.1, 6.9]})])
def test_cld_sgm_is_the_original(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    expected = original("original_cld_sgm.py", os.environ["DEIS_CLD_SGM"], tmp_path, kind)
    network = deis.load_model(tmp_path / "checkpoint_7.pth", sde="cld", **options)
    assert isinstance(network, PretrainedLinear)
    assert (network.predicts, network.shape) == ("score", (3, *(expected["u"].shape[-2:])))
    u, t = torch.from_numpy(expected["u"]), torch.from_numpy(expected["t"])
    found = network.conditional().model(u, t.float()).numpy()
    size = np.abs(expected["score"]).max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(found[:, 3:] / size, expected["score"] / size, rtol=0, atol=1e-5)
    sde, floor = network.sde, 1e-9 if kind == "cifar10" else 1e-6
    L = np.linalg.cholesky(sde.Sigma(expected["t"]) + floor * np.eye(2))[..., None, None, None]
    eps_x = -(L[:, 0, 0] * found[:, :3] + L[:, 1, 0] * found[:, 3:])
    psi = sde.psi(expected["t"], 0.0)[:, 0, 0, None, None, None]
    x_0 = (expected["u"][:, :3] - L[:, 0, 0] * eps_x) / psi
    np.testing.assert_allclose(x_0, expected["x_0"], rtol=0, atol=1e-4 * np.abs(expected["x_0"]).max())
    for i, time in enumerate(expected["t"].tolist()):  # the SDE itself
        drift = np.einsum("ij,jchw->ichw", np.asarray(network.sde.F(time)), expected["u"][i].reshape(2, 3, *network.shape[1:]))
        np.testing.assert_allclose(drift.reshape(expected["u"][i].shape), expected["drift"][i], rtol=1e-5, atol=1e-5)


@pytest.mark.originals
@gddim
def test_gddim_is_the_original(tmp_path: Path) -> None:
    expected = original("original_gddim.py", os.environ["DEIS_GDDIM"], tmp_path, "cld")
    u = torch.from_numpy(np.moveaxis(expected["u"], (-1, -2), (1, 2)).reshape(3, 6, 32, 32).copy())
    t = torch.from_numpy(expected["t"])
    for mixed, name in ((False, "eps"), (True, "mixed")):
        network = deis.load_model(tmp_path / "checkpoint_7", dtype="float64", sde="cld", mixed=mixed, size=32)
        assert (network.predicts, network.shape) == ("R", (3, 32, 32))
        theirs = np.moveaxis(expected[name], (-1, -2), (1, 2))  # (batch, block, channel, height, width)
        wanted = np.einsum("ij,bjchw->bichw", rotation(network.sde), theirs).reshape(3, 6, 32, 32)
        np.testing.assert_allclose(
            network.conditional().model(u, t).numpy(), wanted, rtol=0, atol=(1e-4 if mixed else 1e-10) * np.abs(wanted).max()
        )
    # its R is on a grid of int(1 / 1e-5) = 99999 steps, so its times are off by 1e-5 of themselves; test_the_rotation... is exact
    ours = network.sde.K(expected["ts"]) @ rotation(network.sde)
    np.testing.assert_allclose(ours, expected["R"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(network.sde.psi(expected["ts"], 0.0), expected["psi"], rtol=0, atol=1e-12)


@pytest.mark.originals
@gddim
def test_gddim_of_blurring_is_the_original(tmp_path: Path) -> None:
    expected = original("original_gddim.py", os.environ["DEIS_GDDIM"], tmp_path, "blurring")
    network = deis.load_model(tmp_path / "checkpoint_7", dtype="float64", sde="blurring", size=32)
    assert (network.predicts, network.shape) == ("R", (3, 32, 32))
    u, t = torch.from_numpy(np.moveaxis(expected["u"], -1, 1).copy()), torch.from_numpy(expected["t"])
    np.testing.assert_allclose(network.conditional().model(u, t).numpy(), np.moveaxis(expected["eps"], -1, 1), rtol=0, atol=1e-10)
    sde, start = network.sde, np.cos(np.pi / 2 * 0.004 / 1.008)
    np.testing.assert_allclose(start * sde.psi(expected["ts"], 0.0), expected["mean"][..., 0], rtol=0, atol=1e-9)
    deviation = np.broadcast_to(expected["std"][:, None, None], (5, 32, 32))
    np.testing.assert_allclose(np.sqrt(sde.Sigma(expected["ts"])), deviation, rtol=0, atol=1e-9)
    assert sde.t_start == pytest.approx(float(expected["start"]), abs=1e-9)


# --- the formats -------------------------------------------------------------------------------------------------------


def trained(w: Weights) -> dict[str, Any]:
    """Return a checkpoint as CLD-SGM's training writes it: the averages alone are the weights, and there are no sigmas."""
    learned = [key for key in w if key != "all_modules.0.W"]
    return {
        "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
        "model": {f"module.{key}": w[key] + (key in learned) for key in w},
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": [w[key] for key in learned]},
        "step": 7,
    }


def saved(kind: str = "NCSN++") -> tuple[dict[str, Any], Song]:
    """Return a file and the network; the one of score SDEs always has three channels out, and here there are six in."""
    w = Weights()
    network = Song(w, (16, 24), 1, [1], **NETWORKS[kind])
    network(X, TIMES)
    return trained(w), network


@pytest.mark.parametrize("kind", ["NCSN++", "DDPM++"])
def test_the_score_of_cld_sgm(tmp_path: Path, kind: str) -> None:
    """arXiv 2112.07068, equations 9 and 10: s = -L_vv^-1 (F + L_vv v / Sigma_vv), of the velocity."""
    content, network = saved(kind)
    torch.save(content, tmp_path / "checkpoint_7.pth")
    sde = deis.CLD()
    for mixed in (True, False):
        loaded = deis.load_model(tmp_path / "checkpoint_7.pth", sde="cld", mixed=mixed)
        Sigma = sde.Sigma(TIMES.double().numpy()) + (1e-9 if kind == "NCSN++" else 1e-6) * np.eye(2)
        L = torch.from_numpy(np.linalg.cholesky(Sigma)[:, 1, 1]).float()[:, None, None, None]
        share = torch.from_numpy(Sigma[:, 1, 1]).float()[:, None, None, None]
        wanted = -(network(X, TIMES) / L) - mixed * X[:, 3:] / share
        found = loaded.conditional().model(X, TIMES)
        torch.testing.assert_close(found[:, 3:], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert loaded.shape == (3, 32, 32)
    assert loaded.sde.name == sde.name


@pytest.mark.parametrize("time", [0.001, 0.05, 0.4, 1.0])
def test_the_score_of_the_position_follows(time: float) -> None:
    """Of data N(0, 0.25), whose score is known, by a network that returns the velocity's part of eps of L alone."""
    sde, t = deis.CLD(), torch.full((2,), time)
    time = float(t[0])
    psi, Sigma = sde.psi(time, 0.0), sde.Sigma(time)
    score = -np.linalg.inv(Sigma + 0.25 * np.outer(psi[:, 0], psi[:, 0]))
    L_vv = np.linalg.cholesky(Sigma)[1, 1]
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 6, 2, 2)))

    class Exact(torch.nn.Module):
        architecture = Architecture(6, 16, (16,), 1, (False,), False, "none", False, False)

        def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return -L_vv * (score[1, 0] * x[:, :3] + score[1, 1] * x[:, 3:])

    net, _ = linear_sdes._cld_sgm(Exact(), mixed=False, numerical_eps=0.0)
    wanted = np.einsum("ij,bjchw->bichw", score, x.numpy().reshape(2, 2, 3, 2, 2)).reshape(x.shape)
    np.testing.assert_allclose(net(x, t, None).numpy(), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_a_loaded_network_samples(tmp_path: Path) -> None:
    torch.save(saved()[0], tmp_path / "checkpoint_7.pth")
    network = load_linear_sde(tmp_path / "checkpoint_7.pth", dtype="float64", size=8)
    plan = deis.make_linear_plan(network.sde, "tab1", 4, predicts="score")
    z = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 6, 8, 8)))
    out = deis.sample_linear(plan, network.conditional(), network.noise(z))
    assert out.shape == (2, 3, 8, 8)
    assert out.dtype == torch.float64
    assert bool(out.isfinite().all())


def flax_of(w: Weights, kinds: list[str]) -> bytes:
    """Return these weights as gDDIM's Flax files hold them, with the names that Flax gives the modules."""
    used: Counter[str] = Counter()
    names = {}
    for i, kind in enumerate(kinds):
        names[f"all_modules.{i}"] = f"{kind}_{used[kind]}"
        used[kind] += 1
    params: dict[str, Any] = {}
    for key, value in w.items():
        head = ".".join(key.split(".")[:2])
        place, leaf = params.setdefault(names[head], {}), _leaf(key[len(head) + 1 :], value.ndim)
        *inner, last = leaf.split("/")
        for part in inner:
            place = place.setdefault(part, {})
        kernel = last in ("kernel", "weight")
        place[last] = value.permute({2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim]).numpy() if kernel else value.numpy()
    state = {"step": 7, "lr": 2e-4, "model_state": {}, "ema_rate": 0.9999, "params_ema": params, "rng": np.zeros(2, np.uint32)}
    return bytes(msgpack_serialize(state | {"optimizer": {"target": {}}}))


def test_gddim_of_blurring_in_flax(tmp_path: Path) -> None:
    w = Weights()
    network = Song(w, (16, 24), 1, [1], **NETWORKS["NCSN++"])
    x = X[:, :3]
    wanted = network(x, 999 * TIMES)
    (tmp_path / "checkpoint_7").write_bytes(flax_of(w, network.modules))
    loaded = deis.load_model(tmp_path / "checkpoint_7", sde="blurring", size=32, blur=4.0)
    torch.testing.assert_close(loaded.conditional().model(x, TIMES), wanted, rtol=0, atol=1e-5)
    assert (loaded.predicts, loaded.sde.t_end) == ("R", 1e-5)
    assert loaded.sde.name == "Blurring((32, 32), 4.0, 0.001, 0.004)"
    ratio = np.tan(np.pi / 2 * (loaded.sde.t_start + 0.004) / 1.008) - np.tan(np.pi / 2 * 0.004 / 1.008)
    assert ratio == pytest.approx(80, rel=1e-4)


def test_the_rotation_between_the_two_r() -> None:
    """Data at a point, with the variances of gDDIM at t = 0: in both R the eps along one path is constant, and Q leads across."""
    plain = deis.CLD()
    covariance = np.diag([1e-6, 0.01 + 1e-6])
    sde = deis.LinearSDE(plain.F, plain.G, covariance, name="CLD of gDDIM")
    turn = rotation(sde)
    np.testing.assert_allclose(turn @ turn.T, np.eye(2), atol=1e-10)
    assert abs(turn[0, 1]) > 0.1
    from scipy.integrate import solve_ivp

    def slope(t: float, flat: Array) -> Array:
        R, F, G = flat.reshape(2, 2), np.asarray(plain.F(t)), np.asarray(plain.G(t))
        return np.asarray(F @ R + 0.5 * G @ G.T @ np.linalg.inv(R).T).ravel()

    out = solve_ivp(slope, (0.0, 0.3), np.sqrt(covariance).ravel(), method="DOP853", rtol=1e-11, atol=1e-13, t_eval=[0.01, 0.3])
    np.testing.assert_allclose(sde.K([0.01, 0.3]) @ turn, out.y.T.reshape(2, 2, 2), atol=1e-7)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (without("ema"), {}, r"is not a checkpoint of CLD-SGM or gDDIM: .*KeyError\('ema'\)"),
        (having("model", 3), {}, "entry 'model' must map names to tensors"),
        (dict, {"sde": "edm"}, "sde='edm' is unknown"),
        (dict, {"dtype": "half"}, "dtype='half' is unknown"),
        (dict, {"beta": [1.0]}, r"beta=\[1.0\] must be a number, or \[b_0, b_1\]"),
        (dict, {"beta": -1.0}, "beta=-1.0"),
        (dict, {"mixed": 2}, "mixed=2"),
        (dict, {"numerical_eps": -1.0}, "numerical_eps=-1.0"),
    ],
)
def test_another_file_is_refused_and_says_why(tmp_path: Path, damage: Any, options: dict[str, Any], message: str) -> None:
    torch.save(damage(saved()[0]), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=message):
        load_linear_sde(tmp_path / "checkpoint.pth", **options)


def test_the_loader_of_score_sdes_points_to_this_one(tmp_path: Path) -> None:
    content = saved("DDPM++")[0]
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"has no 'sigmas' and takes sde='cld'"):
        deis.load_model(tmp_path / "checkpoint.pth", sde="vp")
    torch.save(content | {"model": content["model"] | {"sigmas": torch.ones(2)}}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"has 3 channels out and 6 in: .*; give sde='cld'"):
        deis.load_model(tmp_path / "checkpoint.pth", sde="vp")


def test_a_network_without_a_velocity_is_refused(tmp_path: Path) -> None:
    w = Weights()
    network = Song(w, (16, 24), 1, [1], **NETWORKS["NCSN++"])
    network(X[:, :3], TIMES)
    torch.save(trained(w), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="has 3 channels in and 3 out, and a network of position and velocity"):
        load_linear_sde(tmp_path / "checkpoint.pth")
