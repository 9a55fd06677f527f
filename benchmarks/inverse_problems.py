"""Inverse problems on the bundled MNIST model: the picture docs/inverse-problems.png and benchmarks/results/inverse_problems.csv.

python -m benchmarks.inverse_problems --data mnist.npz

The first three MNIST test images of each class, in [-1, 1], with measurements of noise 0.1: a square of 12 x 12 pixels missing,
means of 4 x 4 pixels, and a Gaussian blur of deviation 2. The network is told the class. Each method samples from the same noise by
`auto` plans of 20 calls, which the picture shows, and the three plain ones by 60; x_0 is clipped to [-1, 1], but for the rows that
say so. `rmse` is the root mean square distance to the
image, `residual` that of A x to y, both over all samples. A sample of the posterior has a residual of about the noise; it is not
the image, so that its rmse is not 0 either.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import deis
from deis.operators import LinearOperator

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "inverse-problems.png"
RESULTS = HERE / "results" / "inverse_problems.csv"
NOISE, EACH = 0.1, 3
METHODS: dict[str, dict[str, float]] = {
    "pigdm": {},
    "dps": {},
    "replacement": {},
    "pigdm, without threshold": {},
    "dps, without threshold": {},
    "dps, weight 1": {"weight": 1.0},
}
SHOWN = ("pigdm", "dps", "replacement")


def problems() -> dict[str, LinearOperator]:
    known = np.ones((1, 28, 28))
    known[:, 8:20, 8:20] = 0
    profile = np.exp(-(np.arange(-6, 7) ** 2) / (2 * 2.0**2))
    kernel = np.outer(profile, profile)
    return {
        "inpainting": deis.operators.mask(known),
        "super-resolution": deis.operators.downsample(4),
        "deblurring": deis.operators.blur(kernel / kernel.sum()),
    }


def load_images(path: str) -> tuple[Tensor, np.ndarray]:
    """Return EACH test images of every class, one class after the other in turn, and their labels."""
    with np.load(path) as arrays:
        images, labels = arrays["x_test"], arrays["y_test"].astype(np.int64)
    places = np.stack([np.flatnonzero(labels == k)[:EACH] for k in range(10)], axis=1).ravel()
    return torch.from_numpy(images[places]).float()[:, None] / 127.5 - 1, labels[places]


def residual(operator: LinearOperator, x: Tensor, y: Tensor) -> float:
    r = operator(x) - y
    counted = torch.ones_like(r) if operator.measured is None else operator.measured(r)
    return float(((r * counted).square().sum() / counted.sum()).sqrt())


def runs(images: Tensor, labels: np.ndarray) -> Iterator[tuple[str, str, int, Tensor, Tensor, LinearOperator]]:
    """Yield problem, method, calls, y, samples and operator."""
    network = deis.load_model()
    free, bound = network.conditional(labels), network.conditional(labels, threshold=deis.static_threshold())
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(images.shape, generator=generator)
    for name, operator in problems().items():
        clean = operator(images)
        y = clean + NOISE * torch.randn(clean.shape, generator=generator)
        for nfe in (20, 60):
            plan = deis.make_plan(network.sde, nfe=nfe)
            for about, options in METHODS.items():
                if nfe != 20 and about not in SHOWN:
                    continue
                model = free if "without" in about else bound
                denoiser = deis.posterior(model, operator, y, NOISE, about.partition(",")[0], **options)
                yield name, about, nfe, y, deis.sample(plan, denoiser, x_T), operator


def draw(images: Tensor, shown: dict[str, list[Tensor]]) -> None:
    titles = ["image", "measurements", *SHOWN]
    figure, axes = plt.subplots(len(shown), len(titles), figsize=(11, 7.1), constrained_layout=True)
    for row, (name, found) in zip(axes, shown.items(), strict=True):
        for axis, title, x in zip(row, titles, [images, *found], strict=True):
            square = x[:9, 0].clip(-1, 1).reshape(3, 3, *x.shape[2:]).permute(0, 2, 1, 3).reshape(3 * x.shape[2], -1)
            axis.imshow(square, cmap="gray", vmin=-1, vmax=1)
            axis.set_title(f"{name}: {title}" if title == "image" else title, fontsize=9)
            axis.axis("off")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="mnist.npz in the layout of keras.datasets.mnist")
    images, labels = load_images(parser.parse_args().data)
    shown: dict[str, list[Tensor]] = {}
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["problem", "method", "nfe", "rmse", "residual"])
        for name, about, nfe, y, x_0, operator in runs(images, labels):
            rmse = float((x_0 - images).square().mean().sqrt())
            writer.writerow([name, about, nfe, f"{rmse:.4f}", f"{residual(operator, x_0, y):.4f}"])
            file.flush()
            if nfe == 20 and about in SHOWN:
                shown.setdefault(name, [y]).append(x_0)
    draw(images, shown)


if __name__ == "__main__":
    main()
