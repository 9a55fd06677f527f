"""Independent references: weights by mpmath at 40 digits, and probability-flow problems with a known solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

import deis

Array = NDArray[np.float64]
mp.dps = 40
FEW_STEPS = pytest.mark.filterwarnings("ignore:.* is off by:UserWarning", "ignore:(tau|eta)=.* adds more noise:UserWarning")
"""What the library says of plans of few steps, where it is true and beside what is tested."""


@dataclass(frozen=True)
class ExactVP:
    """A VP schedule in mpmath, from its cumulative alpha and the inverse of it, straight from the definitions."""

    abar: Callable[[Any], Any]
    t_of_abar: Callable[[Any], Any]

    def alpha(self, t: Any) -> Any:
        return mp.sqrt(self.abar(mpf(t)))

    def rho(self, t: Any) -> Any:
        return mp.sqrt(1 / self.abar(mpf(t)) - 1)

    def t_of_rho(self, rho: Any) -> Any:
        return self.t_of_abar(1 / (1 + rho**2))


def exact_linear(beta_0: float, beta_1: float) -> ExactVP:
    b, slope = mpf(beta_0), mpf(beta_1) - mpf(beta_0)
    return ExactVP(
        lambda t: mp.exp(-b * t - slope * t**2 / 2),
        lambda abar: (mp.sqrt(b**2 - 2 * slope * mp.log(abar)) - b) / slope,
    )


def exact_cosine(s: float = 0.008) -> ExactVP:
    shift = mpf(s)
    f_0 = mp.cos(shift / (1 + shift) * mp.pi / 2) ** 2
    return ExactVP(
        lambda t: mp.cos((t + shift) / (1 + shift) * mp.pi / 2) ** 2 / f_0,
        lambda abar: mp.acos(mp.sqrt(abar * f_0)) * 2 / mp.pi * (1 + shift) - shift,
    )


def exact_weights(sde: ExactVP, nodes: list[float], start: float, end: float, clock: str) -> list[Any]:
    """alpha(end) * integral of l_j(u(rho)) d(rho) from rho(start) to rho(end), in log rho, piece by piece."""

    def u(rho: Any) -> Any:
        return sde.t_of_rho(rho) if clock == "t" else rho

    # The clock of a node is its own time: t is given, rho is computed.
    points = [mpf(t) if clock == "t" else sde.rho(t) for t in nodes]
    low, high = mp.log(sde.rho(end)), mp.log(sde.rho(start))
    pieces = mp.linspace(high, low, int(mp.ceil((high - low) / 2)) + 1)
    weights = []
    for j in range(len(points)):

        def integrand(log_rho: Any, j: int = j) -> Any:
            rho = mp.exp(log_rho)
            value = rho
            for m, point in enumerate(points):
                if m != j:
                    value *= (u(rho) - point) / (points[j] - point)
            return value

        weights.append(sde.alpha(end) * mp.quad(integrand, pieces))
    return weights


def gaussian(
    sde: deis.Schedule, mean: float = 0.7, std: float = 0.5
) -> tuple[Callable[..., Array], Callable[[float, Array], Array]]:
    """Data of N(mean, std^2): the exact eps(x, t), and the exact solution at time t from x_T at the schedule's start."""

    def spread(t: Any) -> Any:
        return np.sqrt((sde.alpha(t) * std) ** 2 + sde.sigma(t) ** 2)

    def eps(x: Array, t: Array) -> Array:
        t = np.asarray(t)[:, None]
        return sde.sigma(t) * (x - sde.alpha(t) * mean) / spread(t) ** 2

    def solution(t: float, x_T: Array) -> Array:
        start = sde.t_start
        return sde.alpha(t) * mean + spread(t) / spread(start) * (x_T - sde.alpha(start) * mean)

    return eps, solution


def two_modes(sde: deis.Schedule) -> tuple[Callable[..., Array], Callable[[Array, Array], Array]]:
    """Data of two equal Gaussians at -1 and 1 of deviation 0.5: the exact eps, and solutions by an adaptive solver at 1e-12.

    Nonlinear in x, which a single Gaussian is not.
    """

    def eps(x: Array, t: Array) -> Array:
        t = np.asarray(t).reshape(-1, *(1,) * (np.ndim(x) - 1))
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        variance = (0.5 * alpha) ** 2 + sigma**2
        return sigma * (x - alpha * np.tanh(alpha * x / variance)) / variance

    def solution(ts: Array, x_T: Array) -> Array:
        rho = sde.rho(ts)

        def slope(r: float, v: Array) -> Array:
            t = sde.t_of_rho(r)
            return eps(sde.alpha(t) * v, np.full(len(v), t))

        out = solve_ivp(slope, (rho[0], rho[-1]), x_T / sde.alpha(ts[0]), method="DOP853", t_eval=rho, rtol=1e-13, atol=1e-13)
        return out.y.T * sde.alpha(ts)[:, None]

    return eps, solution
