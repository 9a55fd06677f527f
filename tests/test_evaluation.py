"""Distances between features, paired errors, and what an interrupted evaluation keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

import deis
from deis.cli import main
from deis.evaluation import converged, distances, evaluate, features, load_extractor, load_images, load_perceptual

SDE = deis.VPSDE.linear()


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """Return the exact eps of data of deviation 1/2."""
    alpha, sigma = (float(f(t[0].item())) for f in (SDE.alpha, SDE.sigma))
    return sigma * x / (alpha**2 / 4 + sigma**2)


MODEL = deis.Denoiser(gaussian, SDE)


def noise(n: int = 20) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((n, 1, 4, 4)))


def pixels(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :3]


# --- distances ------------------------------------------------------------------------------------------------------------


def kernel(x: Any, y: Any) -> Any:
    return (x @ y.T / x.shape[1] + 1) ** 3


def test_distances_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    fake, real = rng.standard_normal((300, 4)) * [1, 2, 0.5, 1] + [0.5, 0, 0, 0], rng.standard_normal((250, 4))
    found = distances(fake, real)
    covariances = [np.cov(x, rowvar=False) for x in (fake, real)]
    root = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real)
    shift = np.square(fake.mean(0) - real.mean(0)).sum()
    assert found["frechet"] == pytest.approx(shift + np.trace(sum(covariances)) - 2 * root, rel=1e-6)
    for name, points, centres in (("precision", fake, real), ("recall", real, fake)):
        tree = NearestNeighbors().fit(centres)
        radius = tree.kneighbors(centres, 4)[0][:, -1]  # itself, and three neighbours
        inside = [(np.linalg.norm(centres - x, axis=1) <= radius).any() for x in points]
        assert found[name] == pytest.approx(np.mean(inside))
    off = [(kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1)) for x in (fake, real)]
    assert found["kid"] == pytest.approx(sum(off) - 2 * kernel(fake, real).mean(), abs=4 * found["kid_std"] + 1e-9)


def test_a_set_is_at_no_distance_from_itself() -> None:
    x = np.random.default_rng(1).standard_normal((60, 3))
    found = distances(x, x)
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1, 1)
    far = distances(x, x + 100)
    assert (far["precision"], far["recall"]) == (0, 0)
    with pytest.raises(ValueError, match=r"features of shapes \(60, 3\) and \(60, 2\) cannot be compared"):
        distances(x, x[:, :2])


# --- evaluate -------------------------------------------------------------------------------------------------------------


def test_the_errors_are_those_from_the_converged_solution() -> None:
    x_T, plan = noise(), deis.make_plan(SDE, "tab1", 6)
    reference, error = converged(MODEL, x_T[:7], 64)
    level = [np.sqrt(SDE.alpha(t) ** 2 / 4 + SDE.sigma(t) ** 2) for t in (1.0, 1e-3)]
    np.testing.assert_allclose(reference, x_T[:7] * level[1] / level[0], rtol=1e-3, atol=1e-4)
    assert error < 1e-2
    found = evaluate(plan, MODEL, x_T, reference=reference, batch=3)
    expected = np.sqrt(np.square(deis.sample(plan, MODEL, x_T[:7]).numpy() - reference).mean((1, 2, 3)))
    assert found["rmse"] == pytest.approx(np.median(expected))
    assert found["psnr"] == pytest.approx(20 * np.log10(2 / np.median(expected)))
    assert (found["nfe"], found["samples"], found["method"]) == (6, 20, "tab1")
    assert found["images_per_second"] == pytest.approx(20 / found["seconds"])
    assert "frechet" not in found
    with pytest.raises(ValueError, match="steps=1 must be a whole number of at least 2"):
        converged(MODEL, x_T, 1)


def test_the_features_are_compared_with_real_ones() -> None:
    x_T, plan = noise(), deis.make_plan(SDE, "tab1", 6)
    real = np.random.default_rng(1).standard_normal((40, 3))
    found = evaluate(plan, MODEL, x_T, extractor=pixels, real=real, batch=7)
    x_0 = deis.sample(plan, MODEL, x_T).clamp(-1, 1).float()
    expected = distances(pixels(x_0).double().numpy(), real)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="extractor and real belong together"):
        evaluate(plan, MODEL, x_T, extractor=pixels)
    with pytest.raises(ValueError, match=r"must return \(n, d\)"):
        features(lambda x: x, x_T.numpy())
    with pytest.raises(ValueError, match="of 'tab1' are not finite"):
        evaluate(plan, deis.Denoiser(lambda x, t: x * torch.nan, SDE), x_T)


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    x_T, plan = noise(), deis.make_plan(SDE, "tab1", 6)
    calls = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return gaussian(x, t)

    def stops(images: Tensor) -> Tensor:
        if len(calls) > 3 * 6:
            raise KeyboardInterrupt
        return pixels(images)

    model, real = deis.Denoiser(counted, SDE), np.random.default_rng(1).standard_normal((40, 3))
    arguments: dict[str, Any] = {"real": real, "batch": 5, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, model, x_T, extractor=stops, **arguments)
    assert len(list(tmp_path.iterdir())) == 3
    calls.clear()
    found = evaluate(plan, model, x_T, extractor=pixels, **arguments)
    assert len(calls) == 6
    whole = evaluate(plan, MODEL, x_T, extractor=pixels, real=real, batch=5)
    assert found["frechet"] == pytest.approx(whole["frechet"])
    calls.clear()
    evaluate(plan, model, x_T, extractor=pixels, tag="another model", **arguments)
    assert len(calls) == 4 * 6


# --- images and extractors ------------------------------------------------------------------------------------------------


def test_images_are_read_in_every_layout(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "last.npz", images=images)
    np.savez(tmp_path / "grey.npz", images=images[..., 0])
    expected = images.transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    np.testing.assert_allclose(load_images(tmp_path / "last.npz"), expected, atol=1e-6)
    np.testing.assert_allclose(load_images(tmp_path / "grey.npz"), expected[:, :1], atol=1e-6)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    np.testing.assert_allclose(load_images(folder, 4), expected[:4], atol=1e-6)
    Image.fromarray(images[0, :2]).save(folder / "small.png")
    with pytest.raises(ValueError, match="must hold pictures of one size and mode"):
        load_images(folder)
    np.savez(tmp_path / "raw.npz", images=images.astype(float))
    with pytest.raises(ValueError, match="give uint8 images, or floats in"):
        load_images(tmp_path / "raw.npz")


def test_an_extractor_is_a_file(tmp_path: Path) -> None:
    script = torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.zeros(2, 1, 4, 4))
    script.save(str(tmp_path / "net.pt"))
    images = noise(5).float().clamp(-1, 1)
    np.testing.assert_allclose(
        features(load_extractor(str(tmp_path / "net.pt")), images.numpy()), script(images).detach(), rtol=1e-6
    )
    with pytest.raises(FileNotFoundError, match="is no file; give 'inception'"):
        load_extractor("net.pth")


class Apart(nn.Module):
    """The mean distance of the pixels of two pictures."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().flatten(1).mean(1)


def test_the_perceptual_distance_is_that_of_the_pictures(tmp_path: Path) -> None:
    torch.jit.script(Apart()).save(str(tmp_path / "apart.pt"))
    perceptual = load_perceptual(str(tmp_path / "apart.pt"))
    x_T, plan = noise(), deis.make_plan(SDE, "ddim", 3)
    reference, _ = converged(MODEL, x_T[:7], 40)
    x_0 = deis.sample(plan, MODEL, x_T).numpy()[:7]
    shared: dict[str, Any] = {"reference": reference, "perceptual": perceptual, "batch": 3}
    expected = np.median(np.abs(np.clip(x_0, -1, 1) - np.clip(reference, -1, 1)).mean((1, 2, 3)))
    assert evaluate(plan, MODEL, x_T, **shared)["lpips"] == pytest.approx(expected, rel=1e-5)
    half = evaluate(plan, MODEL, x_T, decode=lambda z: z / 2, **shared)
    expected = np.median(np.abs(np.clip(x_0 / 2, -1, 1) - np.clip(reference / 2, -1, 1)).mean((1, 2, 3)))
    assert half["lpips"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="perceptual needs reference"):
        evaluate(plan, MODEL, x_T, perceptual=perceptual)
    with pytest.raises(ValueError, match=r"distances of shape \(3, 1, 4, 4\) for 7 pairs"):
        evaluate(plan, MODEL, x_T, reference=reference, perceptual=lambda a, b: (a - b)[:3])
    with pytest.raises(FileNotFoundError, match="is no file; give 'alex', 'vgg', 'squeeze'"):
        load_perceptual("lpips.pth")


def test_features_are_of_decoded_latents() -> None:
    x_T, plan = noise(), deis.make_plan(SDE, "ddim", 3)
    real = pixels(noise(30)).numpy()
    expected = distances(pixels((deis.sample(plan, MODEL, x_T) / 4 + 0.1).clamp(-1, 1)).float().double().numpy(), real)
    found = evaluate(plan, MODEL, x_T, extractor=pixels, real=real, decode=lambda z: z / 4 + 0.1)
    assert found["frechet"] == pytest.approx(expected["frechet"], rel=1e-5)


# --- the command ----------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_the_command_measures_plans_side_by_side(tmp_path: Path) -> None:
    torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(784, 4)), torch.zeros(2, 1, 28, 28)).save(str(tmp_path / "net.pt"))
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).uniform(-1, 1, (30, 28, 28)))
    deis.make_plan(deis.load_model().sde, "tab2", 3).save(tmp_path / "plan.json")
    arguments = ["--num", 12, "--batch", 6, "--paired", 4, "--reference-steps", 8, "--out", tmp_path / "out.json"]
    torch.jit.script(Apart()).save(str(tmp_path / "apart.pt"))
    files = ["--real", tmp_path / "real.npz", "--features", tmp_path / "net.pt", "--plan", tmp_path / "plan.json"]
    files += ["--lpips", tmp_path / "apart.pt"]
    result = run(
        *arguments, *files, "--method", "auto", "--method", "calibrated", "--nfe", 3, "--nfe", 4, "--work", tmp_path / "work"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["method"], row["nfe"]) for row in found["plans"]] == [
        ("tab2", 3), ("auto", 3), ("auto", 4), ("auto", 3), ("auto", 4),
    ]  # fmt: skip
    errors = [row["rmse"] for row in found["plans"]]
    assert errors[3] < errors[1]
    assert errors[4] < errors[2]
    assert {"frechet", "kid", "precision", "recall", "psnr", "lpips", "images_per_second"} <= set(found["plans"][0])
    assert result.output.count("tab2") == 1
    assert len(list((tmp_path / "work").iterdir())) == 10


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    assert "--real and --features belong together" in run("--num", 2, "--features", "net.pt").output
    deis.make_plan(deis.EDM(), "tab2", 3).save(tmp_path / "plan.json")
    assert "was made for the schedule EDM()" in run("--num", 2, "--plan", tmp_path / "plan.json").output
    assert "--lpips is a distance of pairs" in run("--num", 2, "--lpips", "alex", "--paired", 0).output
    assert "evaluation runs in torch only" in run("--backend", "jax").output
