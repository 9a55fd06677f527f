"""The third demo: critically damped Langevin and blurring diffusion of data whose score is known, in NumPy, torch and JAX.

python examples/linear.py --nfe 40 --out linear-demo.png

The data of Langevin diffusion are points of the plane, on a ring of eight Gaussians; those of blurring are waves of 16 pixels,
normal in each frequency. Each plan runs on the same noise in all three frameworks, and the greatest difference is printed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

import deis
from deis.linear.dct import from_frequencies, to_frequencies

FRAMEWORKS: dict[str, Any] = {"NumPy": np, "torch": torch, "JAX": jax.numpy}
ANGLES = np.arange(8) * math.pi / 4
MEANS, STD = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), 0.1
SIZE, BLUR, LEAST = 16, 4.0, 1e-3
DEVIATIONS = 1.5 / (1 + np.arange(SIZE))
LANGEVIN, BLURRING = deis.CLD(), deis.Blurring((SIZE,), BLUR, LEAST)


def ring(xp: Any) -> deis.LinearDenoiser:
    """Return the exact mean of points on the ring, given one with noise of deviation t, as a network of Langevin diffusion."""
    means = xp.asarray(MEANS)

    def clean(x: Any, t: Any) -> Any:
        away, variance = x[:, None] - means, STD**2 + t[:, None] ** 2
        logs = -(away**2).sum(-1) / (2 * variance)
        share = xp.exp(logs - xp.amax(logs, 1)[:, None])
        pull = (share[..., None] * away).sum(1) / share.sum(1)[:, None]
        return x - t[:, None] ** 2 / variance * pull

    return deis.LinearDenoiser(deis.Denoiser(clean, deis.EDM(), predicts="x0"), LANGEVIN)


def waves(xp: Any) -> Callable[[Any, Any], Any]:
    """Return the exact eps of waves in blurring diffusion, a function of pixels."""
    eigenvalues = xp.asarray((math.pi * np.arange(SIZE) / SIZE) ** 2)
    variances = xp.asarray(DEVIATIONS**2)

    def eps(x: Any, t: Any) -> Any:
        angle = math.pi / 2 * t[:, None]
        sigma = xp.sin(angle)
        heat = eigenvalues * (BLUR * sigma**2) ** 2 / 2
        psi = xp.cos(angle) * (LEAST + (1 - LEAST) * xp.exp(-heat))
        return from_frequencies(sigma / (psi**2 * variances + sigma**2) * to_frequencies(x, 1), 1)

    return eps


def run(sde: deis.LinearSDE, network: Callable[[Any], Any], noise: Any, nfe: int) -> np.ndarray:
    """Return the states at all times of the plan, after a comparison of the frameworks."""
    plan = deis.make_linear_plan(sde, "tab2", nfe=nfe)
    found = {}
    for name, xp in FRAMEWORKS.items():
        found[name] = np.asarray(deis.sample_linear(plan, network(xp), xp.asarray(noise), velocity=True, trajectory=True))
    far = max(float(np.abs(found[name][-1] - found["NumPy"][-1]).max()) for name in found)
    print(f"{sde.name}: {plan.nfe} evaluations; {', '.join(found)} differ by at most {far:.1e}")
    return found["NumPy"]


def draw(points: np.ndarray, pictures: np.ndarray, out: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.3), layout="constrained")
    plane, velocity, start, end = figure.subplots(1, 4)
    plane.plot(*points[:, 0, :40].transpose(2, 0, 1), lw=0.5, color="0.7")
    plane.plot(*points[-1, 0].T, ".", ms=2)
    plane.set(title="positions and their paths", aspect="equal")
    velocity.plot(points[:, 1, :20, 0], lw=0.6)
    velocity.set(title="velocities", xlabel="step")
    start.plot(pictures[0, :6].T, lw=0.8)
    start.set(title="noise")
    end.plot(pictures[-1, :6].T, lw=0.8)
    end.set(title="waves")
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", type=int, default=40)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--out", default="linear-demo.png")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        points = run(LANGEVIN, ring, LANGEVIN.noise(rng.standard_normal((2, args.num, 2))), args.nfe)
        pictures = run(BLURRING, waves, BLURRING.noise(rng.standard_normal((args.num, SIZE))), args.nfe)
    near = np.linalg.norm(points[-1, 0][:, None] - MEANS, axis=-1).min(axis=1)
    deviations = to_frequencies(pictures[-1], 1).std(axis=0)
    print(f"points: {np.median(near):.3f} from the nearest mean, where {STD * math.sqrt(2 * math.log(2)):.3f} is exact")
    firsts = ", ".join(f"{d:.2f} ({e:.2f})" for d, e in zip(deviations[:4], DEVIATIONS[:4], strict=True))
    print(f"waves: deviations of the first frequencies, and the exact ones: {firsts}")
    draw(points, pictures, args.out)


if __name__ == "__main__":
    main()
