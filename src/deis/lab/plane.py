"""An example in two dimensions, whose network is exact: a Gaussian mixture, the paths of a plan and the true ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arguments import one_of
from ..arrays import Array
from ..methods import make_plan
from ..model.predictions import Denoiser
from ..plan import Plan
from ..run import sample
from ..sde import VPSDE, Schedule
from .choices import MOST_SEED, Choice, bounded

SPREAD = 0.06
"""The standard deviation of each Gaussian."""
MOST_PARTICLES = 200
_TRUE_STEPS = 256


def _ring() -> Array:
    angle = 2 * np.pi * np.arange(8) / 8
    return 1.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _spiral() -> Array:
    angle = np.linspace(0.5, 3.2, 24) * np.pi
    return np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) * 0.18


def _grid() -> Array:
    side = np.array([-1.4, 0.0, 1.4])
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)


DATA = {"eight on a ring": _ring, "a spiral": _spiral, "three by three": _grid}


@dataclass(frozen=True)
class Mixture:
    """The exact network of equally likely Gaussians of deviation s, a mean each: model(x, t) -> E[x_0 | x_t = x].

    With x_t = alpha x_0 + sigma eps the posterior of Gaussian k has the mean mu_k + g (x - alpha mu_k), where
    g = alpha s^2 / (alpha^2 s^2 + sigma^2), and the weight exp(-|x - alpha mu_k|^2 / 2 (alpha^2 s^2 + sigma^2)).
    """

    means: Array
    sde: Schedule

    def __call__(self, x: Array, t: Array) -> Array:
        alpha, sigma = (level(t)[:, None] for level in (self.sde.alpha, self.sde.sigma))
        variance = alpha**2 * SPREAD**2 + sigma**2
        apart = x[:, None] - alpha[..., None] * self.means
        log_weight = -(apart**2).sum(-1) / (2 * variance)
        weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        found: Array = weight @ self.means + alpha * SPREAD**2 / variance * (weight[..., None] * apart).sum(axis=1)
        return found


@dataclass(frozen=True)
class Paths:
    """Particles from the same noise, on the paths of a plan and on the true ones.

    Attributes
    ----------
    plan : Plan
    notes : list of str
        What the library warns of.
    means : array of shape (k, 2)
    t, x : arrays of shape (n + 1,) and (n + 1, particles, 2)
        The states between the plan's steps.
    true_t, true_x : arrays of shape (m + 1,) and (m + 1, particles, 2)
        The probability flow in many steps.
    rmse : float
        The root mean square distance between the ends, a particle's to its own.
    """

    plan: Plan
    notes: list[str]
    means: Array
    t: Array
    x: Array
    true_t: Array
    true_x: Array

    @property
    def rmse(self) -> float:
        """The root mean square distance between the ends of the two paths of each particle."""
        return float(np.sqrt(((self.x[-1] - self.true_x[-1]) ** 2).sum(axis=-1).mean()))


def paths(choice: Choice, data: str, seed: int = 0, particles: int = 80) -> Paths:
    """Return the paths of particles from noise to a mixture on the linear VP schedule.

    Raises
    ------
    ValueError
        For unknown data, a plan that cannot be built, or numbers outside the bounds.
    """
    means = DATA[one_of("data", data, DATA)]()
    seed, particles = bounded("seed", seed, 0, MOST_SEED), bounded("particles", particles, 1, MOST_PARTICLES)
    sde = VPSDE.linear()
    plan, notes = choice.plan_on(sde)
    true_plan = make_plan(sde, "dpmpp_3m", _TRUE_STEPS, ts_phase="log")
    model = Denoiser(Mixture(means, sde), sde, "x0")
    x_T = plan.sigma[0] * np.random.default_rng(seed).standard_normal((particles, 2))
    x = sample(plan, model, x_T, trajectory=True, rng=np.random.default_rng((seed, 1)) if plan.stochastic else None)
    return Paths(plan, notes, means, plan.ts, x, true_plan.ts, sample(true_plan, model, x_T, trajectory=True))
