"""Digits from the same noise by untuned and calibrated plans: the pictures docs/calibrated.png and docs/calibration.png.

python -m benchmarks.pictures

The untuned method is the best of all methods and grids at each NFE, by benchmarks/results/calibration_mnist.csv; the calibrated
plans are those that ship with the network; the last strip is converged (200 steps).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from numpy.typing import NDArray

import deis
from benchmarks import calibration, methods
from benchmarks.pages import measured

DOCS = Path(__file__).parent.parent / "docs"
COUNT = 20


def strips(nfes: list[int]) -> list[tuple[str, NDArray[np.float32]]]:
    """Return a title and COUNT digits for each plan."""
    network = deis.load_model()
    x_T = torch.from_numpy(np.random.default_rng(21).standard_normal((COUNT, *network.shape), dtype=np.float32))
    model = network.conditional(np.arange(COUNT) % 10)
    rows = measured(calibration.RESULTS / "calibration_mnist.csv")
    best = {int(row["nfe"]): row["detail"] for row in rows if row["stage"] == "untuned"}
    found = []
    for nfe in nfes:
        every = calibration.untuned(methods.mnist(1), "mnist", nfe, cells=None)
        found.append((f"{nfe} calls, untuned: {best[nfe]}", next(plan for detail, plan in every if detail == best[nfe])))
        found.append((f"{nfe} calls, calibrated", network.plan(nfe)))
    found.append(("converged, 200 calls", deis.make_plan(network.sde, "tab3", 200, "t", 1.0)))
    return [(title, deis.sample(plan, model, x_T).numpy()) for title, plan in found]


def draw(nfes: list[int], path: Path) -> None:
    parts = strips(nfes)
    figure, axes = plt.subplots(len(parts), 1, figsize=(9, 0.68 * len(parts)), constrained_layout=True)
    for axis, (title, digits) in zip(axes, parts, strict=True):
        axis.imshow(np.concatenate(list(digits[:, 0].clip(-1, 1)), axis=1), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title.replace("`", ""), fontsize=7, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(path, dpi=130)


def main() -> None:
    draw([4, 5], DOCS / "calibrated.png")
    draw([4, 5, 6, 8, 10], DOCS / "calibration.png")


if __name__ == "__main__":
    main()
