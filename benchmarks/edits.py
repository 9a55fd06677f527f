"""What edits look like, docs/edits.png, and how well RePaint's passes join the new pixels to the known ones.

python -m benchmarks.edits [--data mnist.npz]

The pictures are test digits of MNIST, in the layout of keras.datasets.mnist, or without --data digits of the bundled MNIST model.
Two tables follow. The first is exact: pairs of a Gaussian with unit variances and correlation 0.9, of which one is known. The
mean of the other, given the known one at 1, is to be 0.9, and its standard deviation 0.436. The second is of the network: the
lower half of 64 digits is painted anew, and the seam is the mean absolute difference of the two rows beside it, in [-1, 1], over
the columns where the known row has ink."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import deis

PICTURE = Path(__file__).parent.parent / "docs" / "edits.png"
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
COUNT = 8
CORRELATION = 0.9


def streams(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def digits(network: deis.Pretrained, count: int, data: Path | None) -> tuple[Tensor, np.ndarray]:
    """Return digits in [-1, 1] and their classes."""
    if data is not None:
        with np.load(data) as arrays:
            images, labels = arrays["x_test"][:count], arrays["y_test"][:count].astype(np.int64)
        return torch.from_numpy(images[:, None].astype(np.float32) / 127.5 - 1), labels
    labels = np.arange(count) % 10
    noise = torch.stack([torch.randn(network.shape, generator=rng) for rng in streams(4, count)])
    found: Tensor = deis.sample(network.plan(10), network.conditional(labels), noise)
    return found.clamp(-1, 1), labels


def lower_half(network: deis.Pretrained) -> np.ndarray:
    mask = np.zeros((1, 1, *network.shape[1:]), dtype=bool)
    mask[..., network.shape[1] // 2 :, :] = True
    return mask


def rows_of_pictures(network: deis.Pretrained, x_0: Tensor, labels: np.ndarray) -> list[tuple[str, Tensor]]:
    """Return a title and COUNT pictures for each row."""
    sde = network.sde
    found = [("the pictures to begin with", x_0)]
    other = network.conditional((labels + 5) % 10, guidance=2.0)
    for strength in STRENGTHS:
        plan = deis.make_plan(sde.between(strength=strength), nfe=10)
        edited = deis.image_to_image(plan, other, x_0, strength, rng=streams(0, COUNT))
        found.append((f"image-to-image towards the class five further, strength {strength}", edited))
    mask = lower_half(network)
    grey = torch.where(torch.from_numpy(mask), torch.tensor(0.0), x_0)
    found.append(("the lower half to be painted anew", grey))
    for resample in (1, 5):
        painted = deis.inpaint(deis.make_plan(sde, nfe=10), network, x_0, mask, rng=streams(0, COUNT), resample=resample)
        found.append((f"painted without a class, resample={resample}", painted))
    return found


def draw(rows: list[tuple[str, Tensor]]) -> None:
    figure, axes = plt.subplots(len(rows), 1, figsize=(5.2, 0.92 * len(rows)), constrained_layout=True)
    for axis, (title, pictures) in zip(axes, rows, strict=True):
        strip = np.concatenate(list(pictures[:, 0].clamp(-1, 1).numpy()), axis=1)
        axis.imshow(strip, cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title, fontsize=7, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(PICTURE, dpi=120)


def pairs(method: str, nfe: int, resample: int) -> tuple[float, float]:
    """Return the mean and the standard deviation of the unknown one of correlated pairs, the known one at 1."""
    sde, covariance = deis.VPSDE.linear(), np.array([[1, CORRELATION], [CORRELATION, 1]])

    def eps(x: Any, t: Any) -> Any:
        alpha, sigma = sde.alpha(t[0]), sde.sigma(t[0])
        return sigma * x @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(2))

    x_0 = np.ones((1, 200_000, 2))
    plan, rng = deis.make_plan(sde, method, nfe=nfe), np.random.default_rng(0)
    found = deis.inpaint(plan, deis.Denoiser(eps, sde), x_0, [[[1, 0]]], rng=rng, resample=resample)
    return float(found[..., 0].mean()), float(found[..., 0].std())


def evaluations(nfe: int, resample: int) -> int:
    """Return those of a method with one a step."""
    return resample * (nfe - 1) + 1


def seam(pictures: Tensor, mask: np.ndarray) -> float:
    row = int(np.argmax(mask[0, 0, :, 0]))
    above, below = pictures[:, 0, row - 1], pictures[:, 0, row]
    return float((above - below)[above > 0].abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    data = parser.parse_args().data
    network = deis.load_model()
    draw(rows_of_pictures(network, *digits(network, COUNT, data)))
    print(f"wrote {PICTURE}\n\n| plan | evaluations | resample | mean (exact 0.900) | deviation (exact 0.436) |")
    print("|---|---|---|---|---|")
    for method in ("auto", "ancestral"):
        for nfe, resample in ((10, 1), (91, 1), (10, 2), (10, 5), (10, 10)):
            mean, spread = pairs(method, nfe, resample)
            print(f"| `{method}`, {nfe} | {evaluations(nfe, resample)} | {resample} | {mean:.3f} | {spread:.3f} |")
    x_0, _ = digits(network, 64, data)
    mask = lower_half(network)
    print(f"\n| plan | evaluations | resample | seam |\n|---|---|---|---|\n| the digits themselves | | | {seam(x_0, mask):.3f} |")
    for nfe, resample in ((10, 1), (46, 1), (10, 2), (10, 5)):
        plan = deis.make_plan(network.sde, nfe=nfe)
        painted = deis.inpaint(plan, network, x_0, mask, rng=streams(1, 64), resample=resample)
        print(f"| `auto`, {nfe} | {evaluations(nfe, resample)} | {resample} | {seam(painted, mask):.3f} |", flush=True)


if __name__ == "__main__":
    main()
