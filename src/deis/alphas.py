"""Cumulative alphas: abar(t) and its inverse, known by their logarithms or given by the user."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .arguments import function, number
from .arrays import Array
from .backends import backend_of, like
from .foreign import call_in_float64, is_torch

TimeFn = Callable[[Any], Any]


@dataclass(frozen=True)
class AlphaFn:
    """A cumulative alpha known by its logarithm: abar(t) = exp(log(t)).

    Calling it takes a float or an array of NumPy, torch or JAX; `log` is what a schedule computes with, exact near t = 0. Where
    abar is 0 at a legal time, exp(log) has no gradient there, and `abar` gives the value without it.
    """

    log: TimeFn
    abar: TimeFn | None = None

    def __call__(self, t: Any) -> Any:
        return backend_of(t).xp.exp(self.log(t)) if self.abar is None else self.abar(t)


@dataclass(frozen=True)
class AlphaInverse:
    """The inverse of an `AlphaFn`: t(abar), known as a function of log abar."""

    of_log: TimeFn

    def __call__(self, alpha: Any) -> Any:
        return self.of_log(backend_of(alpha).xp.log(alpha))


def linear_alpha(beta_0: float, beta_1: float) -> tuple[AlphaFn, AlphaInverse]:
    r"""Return t -> abar(t) and its inverse for beta(t) = beta_0 + (beta_1 - beta_0) t.

    log abar(t) = -(beta_0 t + (beta_1 - beta_0) t^2 / 2), score_sde's continuous VP schedule (arXiv 2011.13456).
    """
    beta_0, beta_1 = number("beta_0", beta_0, least=0), number("beta_1", beta_1, above=0)
    slope = beta_1 - beta_0

    def log_alpha(t: Any) -> Any:
        return -(beta_0 + 0.5 * slope * t) * t

    def t_of_log(log_alpha: Any) -> Any:
        # The root of beta_0 t + slope t^2 / 2 = -log abar that does not subtract its two terms.
        root = (beta_0**2 - 2 * slope * log_alpha) ** 0.5
        return -2 * log_alpha / (beta_0 + root)

    def t_of_log_from_zero(log_alpha: Any) -> Any:
        return (-2 * log_alpha / slope) ** 0.5

    return AlphaFn(log_alpha), AlphaInverse(t_of_log if beta_0 > 0 else t_of_log_from_zero)


def cosine_alpha(s: float = 0.008) -> tuple[AlphaFn, AlphaInverse]:
    r"""Return t -> abar(t) and its inverse for abar = cos^2((t+s)/(1+s) pi/2) / cos^2(s/(1+s) pi/2).

    Nichol & Dhariwal's cosine schedule (arXiv 2102.09672, eq. 17). alpha(1) = 0.
    """
    s = number("s", s, least=0)
    a, scale = s / (1 + s) * math.pi / 2, math.pi / 2 / (1 + s)

    def log_alpha(t: Any) -> Any:
        # 1 - abar = sin(2a + d) sin(d) / cos(a)^2 keeps every digit near t = 0; abar = sin(pi/2 - a - d)^2 / cos(a)^2 near t = 1.
        xp = backend_of(t).xp
        d = scale * t
        noise = xp.sin(2 * a + d) * xp.sin(d) / math.cos(a) ** 2
        near_noise = 2 * xp.log(xp.sin(scale * (1 - t)) / math.cos(a))
        return xp.where(noise < 0.5, xp.log1p(-noise), near_noise)

    def t_of_log(log_alpha: Any) -> Any:
        # tan(a + d)^2 = (sin(a)^2 + rho^2) / cos(a)^2 with rho^2 = 1/abar - 1; then tan(d) by the difference formula.
        xp = backend_of(log_alpha).xp
        rho_2 = xp.expm1(-log_alpha)
        root = xp.sqrt(math.sin(a) ** 2 + rho_2)
        # tan(d) = num/den; written as atan2 so that rho -> infinity gives pi/2 - a.
        num = rho_2 / (root + math.sin(a)) * math.cos(a)
        den = math.cos(a) ** 2 + root * math.sin(a)
        return xp.arctan2(num, den) / scale

    return AlphaFn(log_alpha), AlphaInverse(t_of_log)


def table_alpha(alphas: Array) -> tuple[AlphaFn, AlphaInverse]:
    """Return t -> abar(t), linear between the integer times of a table of cumulative alphas that never rises, and its inverse.

    Where several times share an alpha, the inverse gives the innermost of a run at either end, and the smallest of another.
    """
    times = np.arange(len(alphas), dtype=np.float64)
    inner = slice(*inner_times(alphas))
    rising, falling_times = alphas[inner][::-1], times[inner][::-1]

    def log_alpha(t: Any) -> Any:
        with np.errstate(divide="ignore"):
            return backend_of(t).xp.log(_interp(t, times, alphas))

    def t_of_log(log_alpha: Any) -> Any:
        return _interp(backend_of(log_alpha).xp.exp(log_alpha), rising, falling_times)

    return AlphaFn(log_alpha), AlphaInverse(t_of_log)


def inner_times(alphas: Array) -> tuple[int, int]:
    """Return the last time of a table's greatest alpha, and one more than the first time of its smallest: a range."""
    return int(np.flatnonzero(alphas == alphas[0])[-1]), int(np.argmax(alphas == alphas[-1])) + 1


def log_abar(t2alpha_fn: TimeFn, t: ArrayLike) -> Array:
    """Return log abar(t) in float64, of an `AlphaFn` or of a user's function in any framework."""
    t = np.asarray(t, dtype=np.float64)
    if isinstance(t2alpha_fn, AlphaFn):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(t2alpha_fn.log(t), dtype=np.float64)
    alpha = call_in_float64(t2alpha_fn, t, "t2alpha_fn")
    if not (np.all(alpha >= 0) and np.all(alpha <= 1)):
        bad = t.ravel()[~((alpha >= 0) & (alpha <= 1)).ravel()][0].item()
        raise ValueError(f"t2alpha_fn must return the cumulative alpha, in [0, 1], and does not at t={bad!r}")
    with np.errstate(divide="ignore"):
        return np.log(alpha)


def t_of_log_abar(alpha2t_fn: TimeFn, log_abar: Array) -> Array:
    """Return t(abar) in float64, of an `AlphaInverse` or of a user's function in any framework."""
    if isinstance(alpha2t_fn, AlphaInverse):
        return np.asarray(alpha2t_fn.of_log(log_abar), dtype=np.float64)
    return call_in_float64(alpha2t_fn, np.exp(log_abar), "alpha2t_fn")


def check_functions(t2alpha_fn: TimeFn, alpha2t_fn: TimeFn) -> None:
    """Raise TypeError unless both are functions."""
    for argument, fn in (("t2alpha_fn", t2alpha_fn), ("alpha2t_fn", alpha2t_fn)):
        function(argument, fn, "array")


def _interp(x: Any, points: Array, values: Array) -> Any:
    """Return the values between increasing points, linear in x and constant beyond them, in the framework and dtype of x."""
    torch = backend_of(x).xp
    if not is_torch(x):
        return torch.interp(x, points, values)
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    at, to = like(points, x), like(values, x)
    right = torch.searchsorted(at, x.detach().contiguous(), right=True).clamp(1, len(at) - 1)
    share = (x.clamp(at[0], at[-1]) - at[right - 1]) / (at[right] - at[right - 1])
    return torch.lerp(to[right - 1], to[right], share)
