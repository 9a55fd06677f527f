"""The API of the DEIS paper's reference implementation, which the modules `jax_deis` and `th_deis` offer.

alpha is the cumulative alpha, `eps_fn(x, t)` takes a *scalar* time, and `num_step` counts steps, so that a Runge-Kutta method
of s stages makes s evaluations in each.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import sde as schedules
from .alphas import AlphaFn, AlphaInverse, TimeFn, linear_alpha
from .arrays import Array
from .backends import backend_of, like, to_numpy
from .foreign import call_in_float64, is_jax, is_torch
from .grids import continuous_grid
from .methods import make_plan
from .run import sample

_LAST = 0.1
"""Where the grid of an `IntegerVPSDE` ends before its times are truncated."""


class ExpSDE(schedules.Schedule):
    """The contract of the reference's SDE objects, over a schedule of deis; with abar the cumulative alpha.

    Its methods take times of any framework, 0-d ones and floats too, and return the same, with gradients: v = x / sqrt(abar) and
    rho = sqrt(1 / abar - 1), in which the probability flow is dv/drho = eps(x, t).

    Attributes
    ----------
    vp : deis.VPSDE
    t2alpha_fn, alpha2t_fn : callable
        t -> abar and its inverse.
    alpha_start : float
        abar without noise, 1.
    """

    alpha_start = 1.0

    def __init__(self, vp: schedules.VPSDE) -> None:
        self.vp, self.t2alpha_fn, self.alpha2t_fn = vp, vp.t2alpha_fn, vp.alpha2t_fn
        self.sampling_eps, self.sampling_T, self.num_times, self.name = vp.sampling_eps, vp.sampling_T, vp.num_times, vp.name

    def log_alpha(self, t: ArrayLike) -> Array:
        return self.vp.log_alpha(t)

    def log_sigma(self, t: ArrayLike) -> Array:
        return self.vp.log_sigma(t)

    def t_of_log_rho(self, log_rho: ArrayLike) -> Array:
        return self.vp.t_of_log_rho(log_rho)

    def kinks(self) -> Array:
        return self.vp.kinks()

    @property
    def is_continuous(self) -> bool:
        """Whether the model was trained at all times, not at integers."""
        return self.num_times is None

    def psi(self, t_start: Any, t_end: Any) -> Any:
        """Return the transition sqrt(abar(t_end) / abar(t_start)) of dx = f x dt from t_start to t_end."""
        log_ratio = 0.5 * (_log_abar(self.t2alpha_fn, t_end) - _log_abar(self.t2alpha_fn, t_start))
        return backend_of(log_ratio).xp.exp(log_ratio)

    def d_log_alpha_dtau_fn(self, tau: Any) -> Any:
        """Return d log abar / dt at tau, by automatic differentiation of t2alpha_fn in the framework of tau.

        Raises
        ------
        TypeError
            Where tau is of NumPy or a float, and t2alpha_fn can be differentiated in no framework that is loaded.
        """
        if is_torch(tau) or is_jax(tau):
            return _derivative(self.t2alpha_fn, tau)
        tau = np.asarray(tau, dtype=np.float64)
        return call_in_float64(lambda t: _derivative(self.t2alpha_fn, t), tau, "t2alpha_fn")

    def eps_integrand(self, vec_t: Any) -> Any:
        """Return G^2 / (2 sigma) = -(d log abar / dt) / (2 sqrt(1 - abar)), the factor of eps in the probability flow."""
        log_abar = _log_abar(self.t2alpha_fn, vec_t)
        xp = backend_of(log_abar).xp
        return -0.5 * self.d_log_alpha_dtau_fn(vec_t) / xp.sqrt(-xp.expm1(log_abar))

    def t2rho(self, t: Any) -> Any:
        """Return rho(t) = sqrt(1 / abar - 1)."""
        log_abar = _log_abar(self.t2alpha_fn, t)
        xp = backend_of(log_abar).xp
        return xp.sqrt(xp.expm1(-log_abar))

    def rho2t(self, rho: Any) -> Any:
        """Return the time at which rho(t) = rho."""
        return self.alpha2t_fn(1 / (1 + rho**2))

    def x2v(self, x: Any, t: Any) -> Any:
        """Return v = x / sqrt(abar(t)), in the framework of x."""
        return x / self._root(t, x)

    def v2x(self, v: Any, t: Any) -> Any:
        """Return x = sqrt(abar(t)) v, in the framework of v."""
        return v * self._root(t, v)

    def _root(self, t: Any, x: Any) -> Any:
        abar = self.t2alpha_fn(t)
        if backend_of(abar).xp is not backend_of(x).xp:
            abar = like(to_numpy(abar), x)
        return abar**0.5


class VPSDE(ExpSDE):
    """The variance preserving SDE of a cumulative alpha; parameters as for `deis.VPSDE`."""

    def __init__(self, t2alpha_fn: TimeFn, alpha2t_fn: TimeFn, sampling_eps: float = 1e-3, sampling_T: float = 1.0) -> None:
        super().__init__(schedules.VPSDE(t2alpha_fn, alpha2t_fn, float(sampling_eps), float(sampling_T)))


class DiscreteVPSDE(ExpSDE):
    """The SDE of a model trained at the integer times 0, 1, ..., N - 1: `deis.VPSDE.discrete` of its cumulative alphas.

    Between the integers abar is linear. `get_sampler` calls the network between them, too, as `th_deis` does.
    """

    def __init__(self, discrete_alpha: Any) -> None:
        super().__init__(schedules.VPSDE.discrete(discrete_alpha))


class IntegerVPSDE(ExpSDE):
    """As `DiscreteVPSDE`, but `get_sampler` calls the network at integers only, as `jax_deis` does."""

    def __init__(self, discrete_alpha: Any) -> None:
        super().__init__(schedules.VPSDE.discrete(discrete_alpha))


def _log_abar(t2alpha_fn: TimeFn, t: Any) -> Any:
    """Return log abar(t) in the framework of t."""
    if isinstance(t2alpha_fn, AlphaFn):
        return t2alpha_fn.log(t)
    abar = t2alpha_fn(t)
    return backend_of(abar).xp.log(abar)


def _derivative(t2alpha_fn: TimeFn, t: Any) -> Any:
    """Return d log abar / dt at each of the times."""
    xp, t = backend_of(t).xp, 1.0 * t  # integer times have no tangents
    if xp is np:
        raise TypeError("NumPy has no derivatives; import torch or jax, in which t2alpha_fn is written")
    jvp = sys.modules["torch"].func.jvp if is_torch(t) else sys.modules["jax"].jvp
    return jvp(lambda t: _log_abar(t2alpha_fn, t), (t,), (xp.ones_like(t),))[1]


def get_linear_alpha_fns(beta_0: float, beta_1: float) -> tuple[AlphaFn, AlphaInverse]:
    """Return t -> alpha(t), cumulative, and its inverse, for beta linear in t; see `deis.alphas.linear_alpha`."""
    return linear_alpha(beta_0, beta_1)


def get_cos_alpha_fns() -> tuple[AlphaFn, AlphaInverse]:
    r"""Return t -> alpha(t) = cos^2((t + 0.008) / 1.008 * pi / 2), cumulative, and its inverse.

    alpha(0) is 0.99984 and not 1: unlike `deis.VPSDE.cosine`, the reference does not divide by it.
    """
    s, scale = 0.008, math.pi / 2 / 1.008

    def abar(t: Any) -> Any:
        return backend_of(t).xp.cos((t + s) * scale) ** 2

    def log_abar(t: Any) -> Any:
        # sin^2 keeps the digits of 1 - abar near t = 0, and cos(angle) = sin(scale (1 - t)) those of abar near t = 1.
        xp = backend_of(t).xp
        noise = xp.clip(xp.sin((t + s) * scale) ** 2, None, 0.5)
        return xp.where(noise < 0.5, xp.log1p(-noise), 2 * xp.log(abs(xp.sin(scale * (1 - t)))))

    def t_of_log(log_abar: Any) -> Any:
        xp = backend_of(log_abar).xp
        return xp.arctan(xp.sqrt(xp.expm1(-log_abar))) / scale - s

    return AlphaFn(log_abar, abar), AlphaInverse(t_of_log)


def get_sampler(
    sde: schedules.Schedule,
    eps_fn: Callable[[Any, Any], Any],
    ts_phase: str = "t",
    ts_order: float = 2.0,
    num_step: int = 10,
    method: str = "rho_rk",
    ab_order: int = 3,
    rk_method: str = "3kutta",
) -> Callable[[Any], Any]:
    """Return sampler_fn(x_T) -> x_0.

    Parameters
    ----------
    sde : VPSDE or DiscreteVPSDE
    eps_fn : callable
        eps_fn(x, scalar_t) -> eps of the shape of x.
    ts_phase, ts_order, num_step
        The grid, see `get_rev_ts`; `ipndm` always uses times evenly spaced, and "log" takes no order.
    method : {"rho_rk", "rho_ab", "t_ab", "ipndm"}
    ab_order : int
        The polynomial degree of rho_ab and t_ab.
    rk_method : str
        The tableau of rho_rk, one of `deis.TABLEAUX`.

    Raises
    ------
    ValueError
        For an unknown method, tableau or grid; it lists the known ones.
    """
    names = {"rho_rk": f"rhork_{rk_method}", "rho_ab": f"rhoab{ab_order}", "t_ab": f"tab{ab_order}", "ipndm": "ipndm"}
    if method not in names:
        raise ValueError(f"method={method!r} is unknown; the known ones are {', '.join(map(repr, names))}")
    if method == "ipndm":
        ts_phase, ts_order = "t", 1.0
    plan = make_plan(sde, names[method], ts=get_rev_ts(sde, num_step, ts_order, ts_phase))

    def model(x: Any, t: Any) -> Any:
        return eps_fn(x, t[0])

    def sampler_fn(x_T: Any) -> Any:
        return sample(plan, model, x_T)

    return sampler_fn


def get_rev_ts(exp_sde: schedules.Schedule, num_step: int, ts_order: float, ts_phase: str = "t") -> Array:
    """Return the num_step + 1 decreasing times at which the reference samples.

    Those of `deis.make_grid` for a continuous schedule. For a discrete one they stay fractional, unless two of them truncate to one
    integer. Then they are the truncated times, and the smallest unused integers fill them up to the count. An `IntegerVPSDE` always
    takes the truncated times of a grid that ends at 0.1.
    """
    whole = isinstance(exp_sde, IntegerVPSDE)
    sde = exp_sde.between(end=_LAST) if whole else exp_sde
    ts = continuous_grid(sde, num_step, ts_phase, None if ts_phase == "log" else ts_order)  # log has no order
    if sde.num_times is None:
        return ts
    integers = np.unique(np.trunc(ts))
    if len(integers) == len(ts):
        return integers[::-1] if whole else ts
    if len(ts) > sde.num_times:
        raise ValueError(
            f"num_step={num_step!r} asks for {len(ts)} distinct times, and the schedule has {sde.num_times}; use fewer steps"
        )
    unused = np.setdiff1d(np.arange(sde.num_times), integers)
    return np.union1d(integers, unused[: len(ts) - len(integers)])[::-1].astype(np.float64)
