"""Inverse problems against the exact posterior: a mixture of Gaussians fitted to 8x8 digits, measured at 4x4 pixels with noise 0.1.

python -m benchmarks.digits_posterior

The posterior of a mixture of Gaussians given linear measurements is one, in closed form. For eight digits the table has the
distance of the mean of 64 samples to the exact mean, by 40 calls of `auto`, beside that of the mean of the data to it, and the
deviation of the samples beside the exact one; root mean squares over the pixels, medians over the digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import deis

from . import methods

Array = NDArray[np.float64]
NOISE = 0.1
OPERATOR = deis.operators.downsample(2)
SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Mixture:
    """The data: weights, means and covariances of the components."""

    weights: Array
    means: Array
    covariances: Array

    def posterior(self, matrix: Array, y: Array, noise: float) -> tuple[Array, float]:
        """Return the mean of x_0 given y = matrix x_0 + noise n, and the root mean square of its deviations."""
        residual = y - self.means @ matrix.T
        cross = self.covariances @ matrix.T
        inner = matrix @ cross + noise**2 * np.eye(len(y))
        solved = np.linalg.solve(inner, residual[..., None])[..., 0]
        log_weight = np.log(self.weights) - (residual * solved).sum(1) / 2 - np.linalg.slogdet(inner)[1] / 2
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        means = self.means + np.einsum("kij,kj->ki", cross, solved)
        mean: Array = weight @ means
        within = np.trace(self.covariances - cross @ np.linalg.solve(inner, cross.transpose(0, 2, 1)), axis1=1, axis2=2)
        spread = weight @ (within + ((means - mean) ** 2).sum(1)) / len(mean)
        return mean, float(np.sqrt(spread))


def problem() -> tuple[deis.Denoiser, Mixture, Array]:
    """Return the exact denoiser of the data, its mixture, and digits that it was fitted to."""
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture

    data: Array = load_digits().data / 8 - 1
    fitted = GaussianMixture(30, reg_covar=1e-3, random_state=0).fit(data)
    exact = methods.digits(1)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return exact.model(x.reshape(len(x), 64), t).reshape(x.shape)

    return deis.Denoiser(eps, exact.sde), Mixture(fitted.weights_, fitted.means_, fitted.covariances_), data[100:900:100]


def matrix() -> Array:
    """Return A as a matrix."""
    found: Array = OPERATOR(np.eye(64).reshape(64, *SHAPE)).reshape(64, -1).T
    return found


def measure(denoiser: deis.Denoiser, mixture: Mixture, x_0: Array, seed: int, method: str) -> tuple[float, float, float, float]:
    """Return the errors of the samples' mean and of the data's mean, and the deviations of the samples and of the posterior."""
    y = matrix() @ x_0 + NOISE * np.random.default_rng(seed).standard_normal(16)
    mean, deviation = mixture.posterior(matrix(), y, NOISE)
    model = deis.posterior(denoiser, OPERATOR, y.reshape(1, 1, 4, 4), NOISE, method)
    x_T = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = deis.sample(deis.make_plan(denoiser.sde, nfe=40), model, x_T).reshape(64, 64).numpy()
    errors = [np.sqrt(((v - mean) ** 2).mean()) for v in (found.mean(0), mixture.weights @ mixture.means)]
    return errors[0], errors[1], float(np.sqrt(found.var(0).mean())), deviation


def main() -> None:
    denoiser, mixture, digits = problem()
    print("| method | mean of the samples | mean of the data | deviation of the samples | exact |\n|---|---|---|---|---|")
    for method in ("pigdm", "dps", "replacement"):
        rows = [measure(denoiser, mixture, x_0, i, method) for i, x_0 in enumerate(digits)]
        print(f"| {method} | {' | '.join(f'{value:.3f}' for value in np.median(rows, axis=0))} |")


if __name__ == "__main__":
    main()
