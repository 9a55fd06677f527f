"""The linear SDEs that people train: critically damped Langevin, phase-space Langevin, and blurring."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from ..arguments import array, function, number, shown, whole
from ..arrays import Array
from .sde import LinearSDE

Beta = float | Callable[[float], float]


def CLD(
    beta: Beta = 4.0,
    mass: float = 0.25,
    friction: float | None = None,
    gamma: float = 0.04,
    *,
    sampling_eps: float = 1e-3,
    sampling_T: float = 1.0,
) -> LinearSDE:
    r"""Return damped Langevin diffusion of position x and velocity v (arXiv 2112.07068), the two blocks of the state::

        dx = beta v / M dt,   dv = -beta (x + Gamma v / M) dt + sqrt(2 Gamma beta) dw

    Parameters
    ----------
    beta : float or callable
        The speed, or that as a function of t.
    mass, friction : float
        M and Gamma > 0; by default critically damped, Gamma = 2 sqrt(M). In equilibrium the variances of x and v are 1 and M.
    gamma : float
        At t = 0 the velocity is normal of variance gamma M.
    sampling_eps, sampling_T
        See `LinearSDE`.

    Raises
    ------
    ValueError
        If a number is not positive.
    """
    speed = _speed(beta)
    M = number("mass", mass, above=0)
    Gamma = 2 * M**0.5 if friction is None else number("friction", friction, above=0)
    drift, noise = np.array([[0, 1 / M], [-1, -Gamma / M]]), np.diag([0, (2 * Gamma) ** 0.5])
    covariance = np.diag([0, number("gamma", gamma, least=0) * M])
    name = f"CLD({_called(beta)}, {M!r}, {Gamma!r}, {gamma!r})"
    return _scaled(drift, noise, covariance, speed, name, "block", sampling_eps, sampling_T)


def PSLD(
    beta: Beta = 8.0,
    mass: float = 0.25,
    Gamma: float = 0.01,
    nu: float | None = None,
    gamma: float = 0.04,
    *,
    sampling_eps: float = 1e-3,
    sampling_T: float = 1.0,
) -> LinearSDE:
    r"""Return phase-space Langevin diffusion (arXiv 2303.01748), which adds noise to position x and velocity v alike::

        dx = beta/2 (v / M - Gamma x) dt + sqrt(beta Gamma) dw_x,   dv = -beta/2 (x + nu v) dt + sqrt(beta nu M) dw_v

    Parameters
    ----------
    beta : float or callable
        The speed, or that as a function of t.
    mass : float
        M > 0.
    Gamma, nu : float
        The friction of position and of velocity; by default critically damped, nu = Gamma + 2 / sqrt(M).
    gamma : float
        At t = 0 the velocity is normal of variance gamma M.
    sampling_eps, sampling_T
        See `LinearSDE`.

    Raises
    ------
    ValueError
        If a number is negative, or the mass 0.
    """
    speed = _speed(beta)
    M, G = number("mass", mass, above=0), number("Gamma", Gamma, least=0)
    v = G + 2 / M**0.5 if nu is None else number("nu", nu, least=0)
    drift, noise = np.array([[-G, 1 / M], [-1, -v]]) / 2, np.diag([G**0.5, (v * M) ** 0.5])
    covariance = np.diag([0, number("gamma", gamma, least=0) * M])
    name = f"PSLD({_called(beta)}, {M!r}, {G!r}, {v!r}, {gamma!r})"
    return _scaled(drift, noise, covariance, speed, name, "block", sampling_eps, sampling_T)


def FrequencyVP(
    rates: ArrayLike, beta_0: float = 0.1, beta_1: float = 20.0, *, sampling_eps: float = 1e-3, sampling_T: float = 1.0
) -> LinearSDE:
    r"""Return a variance-preserving SDE of each frequency's own rate: dx_n = -1/2 r_n beta x_n dt + sqrt(r_n beta) dw_n.

    With all rates 1 it is `VPSDE.linear`, beta = beta_0 + (beta_1 - beta_0) t; greater rates lose a frequency earlier, as blurring
    does (arXiv 2206.13397 and 2209.05557 write it so, in the basis of the discrete cosine transform).

    Parameters
    ----------
    rates : array of the shape of the data's last axes, such as (height, width)
        r_n > 0, the lowest frequency first. Rates of 3 lose e^(-15) of the data at t = 1, which no step restores in float32.
    beta_0, beta_1, sampling_eps, sampling_T
        As for `VPSDE.linear`.

    Raises
    ------
    ValueError
        If a rate is not positive and finite.
    """
    r = array("rates", rates)
    if not (r.ndim and r.size and np.isfinite(r).all() and (r > 0).all()):
        raise ValueError(f"rates={shown(r.tolist())} must be an array of finite numbers greater than 0, one a frequency")
    low, high = number("beta_0", beta_0, least=0), number("beta_1", beta_1, above=0)
    name = f"FrequencyVP(rates of shape {r.shape}, {low!r}, {high!r})"
    return _scaled(-r / 2, r**0.5, np.zeros_like(r), lambda t: low + (high - low) * t, name, "dct", sampling_eps, sampling_T)


def Blurring(
    shape: tuple[int, ...],
    blur: float = 20.0,
    least: float = 1e-3,
    offset: float = 0.0,
    *,
    sampling_eps: float = 1e-3,
    sampling_T: float = 0.9946,
) -> LinearSDE:
    r"""Return blurring diffusion (arXiv 2209.05557): the heat equation and noise, on the cosine schedule.

    In the basis of the discrete cosine transform, for the frequency n of eigenvalue lambda_n = sum over axes of (pi n / N)^2::

        x_t = a d_n x_0 + sigma eps,   a = cos theta,   sigma = sin theta,   theta = pi/2 (t + offset) / (1 + 2 offset)
        d_n = least + (1 - least) exp(-lambda_n s^2 / 2),   s = blur sin(pi t / 2)^2

    Parameters
    ----------
    shape : tuple of int
        Of the data's last axes, which are blurred, such as (height, width).
    blur : float
        The deviation of the blur at t = 1, in pixels; 0 is no blur.
    least : float in (0, 1]
        What is left of the highest frequencies.
    offset : float
        How far the cosine schedule has gone at t = 0. A sample is of a(0) x_0, so small offsets alone make sense; gDDIM's is 0.004.
    sampling_eps, sampling_T
        See `LinearSDE`; a is 0 at t = 1.

    Raises
    ------
    ValueError
        If an argument is none of these.
    """
    if not (isinstance(shape, tuple | list) and len(shape)):
        raise ValueError(f"shape={shown(shape)} must be a tuple of sizes, such as (28, 28)")
    sizes = [whole(f"shape[{i}]", n) for i, n in enumerate(shape)]
    blur, least = number("blur", blur, least=0, most=1e4), number("least", least, above=0, most=1)
    offset = number("offset", offset, least=0, most=0.1)
    number("sampling_T", sampling_T, above=0, most=1 - 1e-6, hint="at t = 1 nothing is left of the data")
    speed = np.pi / 2 / (1 + 2 * offset)  # d theta / dt
    lam = sum(np.meshgrid(*[(np.pi * np.arange(n) / n) ** 2 for n in sizes], indexing="ij"), np.zeros(sizes))

    def rate(t: float) -> Array:
        """The decay of d_n: -d log d_n / dt."""
        sine, cosine = np.sin(np.pi * t / 2), np.cos(np.pi * t / 2)
        heat = lam * blur**2 * sine**4 / 2
        slope = lam * blur**2 * np.pi * sine**3 * cosine  # d heat / dt
        left = (1 - least) * np.exp(-heat)
        return np.asarray(left * slope / (least + left))

    def F(t: float) -> Array:
        return -rate(t) - speed * np.tan(speed * (t + offset))

    def G(t: float) -> Array:
        # g^2 = d sigma^2 / dt - 2 f sigma^2, where the tangents of a and sigma add up
        theta = speed * (t + offset)
        return np.sqrt(2 * speed * np.tan(theta) + 2 * rate(t) * np.sin(theta) ** 2)

    name = f"Blurring({tuple(sizes)!r}, {blur!r}, {least!r}" + (f", {offset!r})" if offset else ")")
    covariance = np.full(sizes, np.sin(speed * offset) ** 2)
    return LinearSDE(F, G, covariance, "dct", sampling_eps, sampling_T, name)


def _speed(beta: Beta) -> Callable[[float], float]:
    if callable(beta):
        function("beta", beta, "t")
        return beta
    constant = number("beta", beta, above=0)
    return lambda t: constant


def _called(beta: Beta) -> str:
    """Return what a name says of a speed: a function has no text that another process would have, too."""
    return "beta(t)" if callable(beta) else repr(float(beta))


def _scaled(
    drift: Array,
    noise: Array,
    covariance: Array,
    speed: Callable[[float], float],
    name: str,
    basis: str,
    sampling_eps: float,
    sampling_T: float,
) -> LinearSDE:
    """Return the SDE of F = beta drift and G = sqrt(beta) noise."""

    def beta(t: float) -> float:
        return number(f"beta({t!r})", speed(t), least=0)

    return LinearSDE(lambda t: beta(t) * drift, lambda t: beta(t) ** 0.5 * noise, covariance, basis, sampling_eps, sampling_T, name)
