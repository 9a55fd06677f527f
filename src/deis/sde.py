"""Noise schedules: alpha, sigma, rho = sigma/alpha and the inverse of rho, of x_t = alpha(t) x_0 + sigma(t) eps.

Everything is computed from two logarithms, log alpha and log rho, so that nothing cancels near t = 0, where
1 - alpha^2 would lose every digit.
"""

from __future__ import annotations

import abc
import copy
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from .alphas import (
    AlphaFn,
    TimeFn,
    check_functions,
    cosine_alpha,
    inner_times,
    linear_alpha,
    log_abar,
    t_of_log_abar,
    table_alpha,
)
from .arguments import array, kind, number, whole
from .arrays import Array

_ZERO_SNR = 2.0**-24
"""The cumulative alpha that libraries write for a terminal signal-to-noise ratio of 0."""


class Schedule(abc.ABC):
    """The contract of a noise schedule; time runs from `t_start` (noise) down to `t_end` (data).

    `log_alpha`, `log_sigma` and `t_of_log_rho` take and return float64 arrays of any shape. rho increases with t. alpha = 0
    at the start and sigma = 0 at the end (logarithms of -inf) are allowed.

    Attributes
    ----------
    sampling_eps, sampling_T : float
        The times at which sampling ends and starts: `t_end` and `t_start`.
    num_times : int or None
        For a discrete schedule, the number of its times 0, 1, ..., num_times - 1; None for a continuous one.
    name : str
        How the schedule was made, as recorded in a plan.
    default_grid : tuple of (str, float)
        The ts_phase and ts_order that `deis.make_plan` uses where neither the caller nor the method asks for others.
    """

    default_grid: ClassVar[tuple[str, float]] = ("t", 2.0)
    sampling_eps: float
    sampling_T: float
    num_times: int | None
    name: str

    @abc.abstractmethod
    def log_alpha(self, t: ArrayLike) -> Array:
        """Return log alpha(t)."""

    @abc.abstractmethod
    def log_sigma(self, t: ArrayLike) -> Array:
        """Return log sigma(t)."""

    @abc.abstractmethod
    def t_of_log_rho(self, log_rho: ArrayLike) -> Array:
        """Return the time at which log(sigma/alpha) has the given finite value."""

    @property
    def t_start(self) -> float:
        """The time at which sampling starts."""
        return self.sampling_T

    @property
    def t_end(self) -> float:
        """The time at which sampling ends."""
        return self.sampling_eps

    def alpha(self, t: ArrayLike) -> Array:
        """Return alpha(t), the factor of x_0."""
        return np.exp(self.log_alpha(t))

    def sigma(self, t: ArrayLike) -> Array:
        """Return sigma(t), the factor of eps."""
        return np.exp(self.log_sigma(t))

    def log_rho(self, t: ArrayLike) -> Array:
        """Return log rho(t) = log sigma(t) - log alpha(t)."""
        return self.log_sigma(t) - self.log_alpha(t)

    def rho(self, t: ArrayLike) -> Array:
        """Return rho(t) = sigma(t) / alpha(t)."""
        return np.exp(self.log_rho(t))

    def t_of_rho(self, rho: ArrayLike) -> Array:
        """Return the time at which sigma/alpha = rho."""
        return self.t_of_log_rho(_log(rho))

    def between(self, start: float | None = None, end: float | None = None, *, strength: float | None = None) -> Schedule:
        """Return the same schedule with sampling only from `start` to `end`; image-to-image starts in the middle.

        Parameters
        ----------
        start, end : float, optional
            Times; by default the schedule's own.
        strength : float in (0, 1], optional
            Instead of start: the fraction of the way from the schedule's end to its start. It is measured in the time of the
            linear VP schedule at the same noise level, as in `deis.make_grid`. For that schedule it gives
            t_end + strength (t_start - t_end). One strength is one noise level for every schedule with the same ends. A discrete
            schedule starts at the next integer time.

        Raises
        ------
        ValueError
            If the schedule is not defined there, start is not greater than end, strength lies outside (0, 1], or both start and
            strength are given.
        """
        if strength is not None:
            if start is not None:
                raise ValueError(f"start={start!r} and strength={strength!r} both say where to start; give one of them")
            start = _time_of_strength(self, number("strength", strength, above=0, most=1, hint="1 is the whole way"))
        part = copy.copy(self)
        for argument, name, value in (("start", "sampling_T", start), ("end", "sampling_eps", end)):
            if value is None:
                continue
            t = number(argument, value)
            if self.num_times is not None and not 0 <= t <= self.num_times - 1:
                raise ValueError(f"{argument}={value!r} must lie in [0, {self.num_times - 1}], the times of {self.name}")
            _keep(part, name, t)
        _check_span(part)
        return part

    def even_of_t(self, t: ArrayLike) -> Array:
        """Return the quantity whose powers a "t" grid spaces evenly: t itself, unless the schedule shifts it."""
        return np.asarray(t, dtype=np.float64)

    def t_of_even(self, even: ArrayLike) -> Array:
        """Return the inverse of `even_of_t`."""
        return np.asarray(even, dtype=np.float64)

    def kinks(self) -> Array:
        """Return the increasing values of log rho between which t(log rho) is smooth; empty if it is smooth throughout."""
        return np.empty(0)


def _log(x: ArrayLike) -> Array:
    """Return log x in float64; -inf at 0 is allowed."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(x, dtype=np.float64))


def check_schedule(sde: object) -> None:
    """Raise TypeError unless `sde` is a noise schedule."""
    kind("sde", sde, Schedule, "a noise schedule such as deis.VPSDE.linear() (deis.make_linear_plan takes a deis.LinearSDE),")


def _keep(schedule: Schedule, argument: str, value: float | str) -> None:
    """Set a field of a frozen schedule."""
    object.__setattr__(schedule, argument, value)


def _check_span(schedule: Schedule, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise ValueError unless sampling_T > sampling_eps, and rho is defined at both and greater at sampling_T."""
    for argument in ("sampling_eps", "sampling_T"):
        _keep(schedule, argument, number(argument, getattr(schedule, argument), least=least, most=most))
    start, end = schedule.t_start, schedule.t_end
    if not start > end:
        raise ValueError(f"sampling_T={start!r} must be greater than sampling_eps={end!r}: sampling runs from noise to data")
    with np.errstate(all="ignore"):
        low, high = schedule.log_rho(np.array([end, start]))
    if not high > low:
        raise ValueError(
            f"sigma/alpha must increase from sampling_eps={end!r} to sampling_T={start!r}, and its logarithm goes from "
            f"{low:.6g} to {high:.6g}: choose times at which the schedule is defined and alpha decreases"
        )


def _time_of_strength(sde: Schedule, strength: float) -> float:
    """Return the time at which sampling starts at a strength; see `Schedule.between`."""
    if strength == 1:
        return sde.t_start
    common = VPSDE.linear()
    with np.errstate(divide="ignore"):
        log_rho = sde.log_rho(np.array([sde.t_end, sde.t_start]))
    high = common.t_start if np.isinf(log_rho[1]) else float(common.t_of_log_rho(log_rho[1]))  # alpha = 0, as of a "vp_t" grid
    low = float(common.t_of_log_rho(log_rho[0]))
    t = float(sde.t_of_log_rho(common.log_rho(low + strength * (high - low))))
    return t if sde.num_times is None else min(max(math.ceil(t - 1e-9), sde.t_end + 1), sde.t_start)


def _check_inverse(schedule: VPSDE | SubVPSDE) -> None:
    """Raise ValueError unless the user's own alpha2t_fn inverts t2alpha_fn to a thousandth of the span."""
    if isinstance(schedule.t2alpha_fn, AlphaFn):
        return
    t = 0.5 * (schedule.t_start + schedule.t_end)
    with np.errstate(all="ignore"):
        found = float(schedule.t_of_log_rho(schedule.log_rho(t)))
    if not abs(found - t) <= 1e-3 * (schedule.t_start - schedule.t_end):
        raise ValueError(f"alpha2t_fn must be the inverse of t2alpha_fn, and gives t={found!r} for the alpha of t={t!r}")


@dataclass(frozen=True)
class VPSDE(Schedule):
    r"""Variance preserving: alpha = sqrt(abar(t)), sigma = sqrt(1 - abar(t)).

    Parameters
    ----------
    t2alpha_fn : callable
        t -> abar(t), the *cumulative* alpha in (0, 1], decreasing; written in NumPy, torch or jax.numpy. It is called in
        float64 (torch.float64, JAX's x64 context), whatever the process uses elsewhere.
    alpha2t_fn : callable
        Its inverse, abar -> t.
    sampling_eps, sampling_T : float
        The times at which sampling ends and starts.
    num_times : int, optional
        The number of integer times of a discrete schedule; `VPSDE.discrete` sets it.

    Raises
    ------
    ValueError
        If sampling_T <= sampling_eps, or alpha does not decrease between them.

    Notes
    -----
    Prefer `VPSDE.linear` or `VPSDE.cosine` where they apply: they compute log abar directly. 1 - abar computed from a user's
    abar carries the rounding of abar, a relative error of 1e-16 / (1 - abar).
    """

    t2alpha_fn: TimeFn
    alpha2t_fn: TimeFn
    sampling_eps: float = 1e-3
    sampling_T: float = 1.0
    num_times: int | None = None
    name: str = field(default="VPSDE(t2alpha_fn, alpha2t_fn)", repr=False)

    def __post_init__(self) -> None:
        check_functions(self.t2alpha_fn, self.alpha2t_fn)
        if self.num_times is not None:
            whole("num_times", self.num_times, 2)
        _check_span(self)
        _check_inverse(self)

    def log_alpha(self, t: ArrayLike) -> Array:
        return 0.5 * log_abar(self.t2alpha_fn, t)

    def log_sigma(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return 0.5 * np.log(-np.expm1(log_abar(self.t2alpha_fn, t)))

    def t_of_log_rho(self, log_rho: ArrayLike) -> Array:
        return t_of_log_abar(self.alpha2t_fn, -np.logaddexp(0.0, 2 * np.asarray(log_rho, dtype=np.float64)))

    def kinks(self) -> Array:
        if self.num_times is None:
            return np.empty(0)
        log_rho = np.unique(self.log_rho(np.arange(self.num_times)))
        return log_rho[np.isfinite(log_rho)]

    @classmethod
    def linear(cls, beta_0: float = 0.1, beta_1: float = 20.0, sampling_eps: float = 1e-3, sampling_T: float = 1.0) -> VPSDE:
        """Return the schedule whose beta(t) is linear from beta_0 to beta_1 for t in [0, 1]; see `deis.alphas.linear_alpha`."""
        return cls(*linear_alpha(beta_0, beta_1), sampling_eps, sampling_T, name=f"VPSDE.linear({beta_0!r}, {beta_1!r})")

    @classmethod
    def cosine(cls, s: float = 0.008, sampling_eps: float = 1e-3, sampling_T: float = 0.9946) -> VPSDE:
        """Return the cosine schedule; see `deis.alphas.cosine_alpha`.

        alpha(1) = 0: there a network that predicts eps says nothing about x_0, and the eps form has no meaning. So sampling
        starts at 0.9946 by default, as in DPM-Solver (arXiv 2206.00927, appendix D).
        """
        return cls(*cosine_alpha(s), sampling_eps, sampling_T, name=f"VPSDE.cosine({s!r})")

    @classmethod
    def discrete(cls, alphas_cumprod: Any) -> VPSDE:
        """Return the schedule of a model trained at the integer times 0, 1, ..., N-1.

        Parameters
        ----------
        alphas_cumprod : array of shape (N,)
            Cumulative alphas in [0, 1] that never rise; NumPy, torch or JAX, of any floating dtype. Between the integer times
            alpha is linear. Clamped tables repeat their extreme values, so sampling starts at the first time of the smallest
            alpha and ends at the last time of the greatest. A last alpha of 0 is a terminal signal-to-noise ratio of zero (arXiv
            2305.08891): plans start there in the data form, and the network must predict v, x_0 or the like. Some libraries write
            2^-24 in place of this 0. It may then lie above the alphas before it, which also count as 2^-24.

        Raises
        ------
        ValueError
            If the alphas are not such an array with at least two different entries.
        """
        alphas = array("alphas_cumprod", alphas_cumprod)
        if alphas.ndim != 1 or len(alphas) < 2:
            raise ValueError(f"alphas_cumprod must have shape (N,) with N of at least 2, and has shape {alphas.shape}")
        if 0 < alphas[-1] <= _ZERO_SNR:
            alphas = np.maximum(alphas, alphas[-1])
        wrong = ~((alphas >= 0) & (alphas <= 1) & (np.diff(alphas, prepend=np.inf) <= 0))
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"alphas_cumprod must lie in [0, 1] and never rise, and alphas_cumprod[{i}]={alphas[i].item()!r} does not; "
                "give the cumulative products of 1 - beta, in the order of training times"
            )
        if alphas[0] == alphas[-1]:
            raise ValueError(f"alphas_cumprod is {alphas[0].item()!r} at every time: there is no noise to remove")
        alphas.setflags(write=False)
        n, (first, stop) = len(alphas), inner_times(alphas)
        return cls(*table_alpha(alphas), float(first), stop - 1.0, num_times=n, name=f"VPSDE.discrete({n} times)")


@dataclass(frozen=True)
class SubVPSDE(Schedule):
    r"""Sub-VP (arXiv 2011.13456, eq. 29): alpha = sqrt(abar(t)), sigma = 1 - abar(t); parameters as for `VPSDE`."""

    t2alpha_fn: TimeFn
    alpha2t_fn: TimeFn
    sampling_eps: float = 1e-3
    sampling_T: float = 1.0
    name: str = field(default="SubVPSDE(t2alpha_fn, alpha2t_fn)", repr=False)
    num_times: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_functions(self.t2alpha_fn, self.alpha2t_fn)
        _check_span(self)
        _check_inverse(self)

    def log_alpha(self, t: ArrayLike) -> Array:
        return 0.5 * log_abar(self.t2alpha_fn, t)

    def log_sigma(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(-np.expm1(log_abar(self.t2alpha_fn, t)))

    def t_of_log_rho(self, log_rho: ArrayLike) -> Array:
        # rho = (1 - abar) / sqrt(abar) = 2 sinh(-log(abar) / 2)
        return t_of_log_abar(self.alpha2t_fn, -2 * np.arcsinh(np.exp(np.asarray(log_rho, dtype=np.float64)) / 2))

    @classmethod
    def linear(cls, beta_0: float = 0.1, beta_1: float = 20.0, sampling_eps: float = 1e-3, sampling_T: float = 1.0) -> SubVPSDE:
        """Return the schedule whose beta(t) is linear from beta_0 to beta_1 for t in [0, 1]; see `deis.alphas.linear_alpha`."""
        return cls(*linear_alpha(beta_0, beta_1), sampling_eps, sampling_T, name=f"SubVPSDE.linear({beta_0!r}, {beta_1!r})")


@dataclass(frozen=True)
class VESDE(Schedule):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (arXiv 2011.13456)."""

    default_grid: ClassVar[tuple[str, float]] = ("vp_t", 2.0)  # a power of t would crowd the steps at the smallest noise
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    sampling_eps: float = 1e-3
    sampling_T: float = 1.0
    name: str = field(default="VESDE", init=False, repr=False)
    num_times: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for argument in ("sigma_min", "sigma_max"):
            _keep(self, argument, number(argument, getattr(self, argument), above=0))
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min!r} must be less than sigma_max={self.sigma_max!r}")
        _keep(self, "name", f"VESDE({self.sigma_min!r}, {self.sigma_max!r})")
        _check_span(self)

    def log_alpha(self, t: ArrayLike) -> Array:
        return np.zeros(np.shape(t))

    def log_sigma(self, t: ArrayLike) -> Array:
        return math.log(self.sigma_min) + math.log(self.sigma_max / self.sigma_min) * np.asarray(t, dtype=np.float64)

    def t_of_log_rho(self, log_rho: ArrayLike) -> Array:
        log_rho = np.asarray(log_rho, dtype=np.float64)
        return (log_rho - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Schedule):
    """Karras et al. 2022 (arXiv 2206.00364): alpha = 1, sigma = t; time is the noise level itself, from 80 to 0.002."""

    default_grid: ClassVar[tuple[str, float]] = ("vp_t", 2.0)  # a power of t would spend its steps at high noise
    sampling_eps: float = 0.002
    sampling_T: float = 80.0
    name: str = field(default="EDM()", init=False, repr=False)
    num_times: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_span(self, least=0)  # time is a noise level

    def log_alpha(self, t: ArrayLike) -> Array:
        return np.zeros(np.shape(t))

    def log_sigma(self, t: ArrayLike) -> Array:
        return _log(t)

    def t_of_log_rho(self, log_rho: ArrayLike) -> Array:
        return np.exp(np.asarray(log_rho, dtype=np.float64))


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """Flow matching on straight paths, rectified flow: alpha = 1 - t, sigma = t, from t = 1 (alpha = 0) to t = 0 (sigma = 0).

    Parameters
    ----------
    sampling_eps, sampling_T : float
        The times at which sampling ends and starts, within [0, 1].
    shift : float
        Where "t" grids put their steps: evenly in powers of u, with t = shift u / (1 + (shift - 1) u) (arXiv 2403.03206, eq. 23).
        The network still gets t, the noise level. A shift above 1 puts more steps at high noise, as large images need.

    Raises
    ------
    ValueError
        If a time lies outside [0, 1], sampling_T is not greater than sampling_eps, or shift is not positive.
    """

    sampling_eps: float = 0.0
    sampling_T: float = 1.0
    shift: float = 1.0
    name: str = field(default="FlowMatching()", init=False, repr=False)
    num_times: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        _keep(self, "shift", number("shift", self.shift, above=0, hint="1 is none"))
        if self.shift != 1:
            _keep(self, "name", f"FlowMatching(shift={self.shift!r})")
        _check_span(self, least=0, most=1)

    def log_alpha(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return np.log1p(-np.asarray(t, dtype=np.float64))

    def log_sigma(self, t: ArrayLike) -> Array:
        return _log(t)

    def t_of_log_rho(self, log_rho: ArrayLike) -> Array:
        log_rho = np.asarray(log_rho, dtype=np.float64)
        small = np.exp(-np.abs(log_rho))  # the logistic function of log rho, without overflow
        return np.where(log_rho < 0, small, 1.0) / (1 + small)

    def even_of_t(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return t / (self.shift + (1 - self.shift) * t)

    def t_of_even(self, even: ArrayLike) -> Array:
        even = np.asarray(even, dtype=np.float64)
        return self.shift * even / (1 + (self.shift - 1) * even)
