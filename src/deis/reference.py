"""The API of the DEIS paper's reference implementation, which the modules `jax_deis` and `th_deis` offer.

alpha is the cumulative alpha, `eps_fn(x, t)` takes a *scalar* time, and `num_step` counts steps, so that a Runge-Kutta method
of s stages makes s evaluations in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .alphas import AlphaFn, AlphaInverse, cosine_alpha, linear_alpha
from .grids import continuous_grid
from .methods import make_plan
from .run import sample
from .sde import VPSDE, Schedule

DiscreteVPSDE = VPSDE.discrete


def get_linear_alpha_fns(beta_0: float, beta_1: float) -> tuple[AlphaFn, AlphaInverse]:
    """Return t -> alpha(t), cumulative, and its inverse, for beta linear in t; see `deis.alphas.linear_alpha`."""
    return linear_alpha(beta_0, beta_1)


def get_cos_alpha_fns() -> tuple[AlphaFn, AlphaInverse]:
    """Return t -> alpha(t), cumulative, and its inverse, of the cosine schedule; see `deis.alphas.cosine_alpha`."""
    return cosine_alpha()


def get_sampler(
    sde: Schedule,
    eps_fn: Callable[[Any, Any], Any],
    ts_phase: str = "t",
    ts_order: float = 2.0,
    num_step: int = 10,
    method: str = "t_ab",
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
        The grid, see `deis.make_grid`; `ipndm` always uses times evenly spaced. A discrete schedule is sampled at the grid's
        own, fractional times, unless two of them truncate to one integer.
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
    plan = make_plan(sde, names[method], ts=_reference_grid(sde, num_step, ts_phase, ts_order))

    def model(x: Any, t: Any) -> Any:
        return eps_fn(x, t[0])

    def sampler_fn(x_T: Any) -> Any:
        return sample(plan, model, x_T)

    return sampler_fn


def _reference_grid(sde: Schedule, num_step: int, ts_phase: str, ts_order: float) -> NDArray[np.float64]:
    """Return the grid as it is, and for a discrete schedule of which two times truncate to one integer, distinct integers.

    These are the truncated times, filled up to the count with the smallest unused integers.
    """
    ts = continuous_grid(sde, num_step, ts_phase, ts_order)
    if sde.num_times is None:
        return ts
    whole = np.unique(np.trunc(ts))
    if len(whole) == len(ts):
        return ts
    if len(ts) > sde.num_times:
        raise ValueError(
            f"num_step={num_step!r} asks for {len(ts)} distinct times, and the schedule has {sde.num_times}; use fewer steps"
        )
    unused = np.setdiff1d(np.arange(sde.num_times), whole)
    return np.union1d(whole, unused[: len(ts) - len(whole)])[::-1].astype(np.float64)
