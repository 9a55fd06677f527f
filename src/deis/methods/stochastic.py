"""Stochastic methods that are not exponential Adams: DDIM with eta, and EDM's churn. (`adams(tau=...)` is the third kind.)"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from ..arguments import number
from ..arrays import Array
from ..plan import Plan
from ..quadrature import Form
from ..sde import Schedule
from .ancestral import ddim_noise, one_stage
from .layout import Builder, multistep_plan
from .runge_kutta import TABLEAUX, tableau_steps
from .singlestep import SingleStep
from .step import check_form, first_order


def ddim(eta: float = 0.0, form: Form | None = None) -> Builder:
    """Return DDIM (Song et al., arXiv 2010.02502, eq. 12): eta = 0 is the probability flow, 1 ancestral sampling (DDPM).

    x_{i+1} = alpha_{i+1} x_0 + sqrt(sigma_{i+1}^2 - s^2) eps + s z, where s = eta sigma_{i+1} sqrt(1 - (rho_{i+1} / rho_i)^2).

    Raises
    ------
    ValueError
        If eta lies outside [0, 1].
    """
    eta = number("eta", eta, least=0, most=1)
    form = check_form(form)

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        chosen, psi, c_0 = first_order(sde, ts, form)
        return multistep_plan(sde, ts, chosen, psi, c_0[:, None], "ddim", grid)

    return one_stage(f"ddim(eta={eta:g})", partial(ddim_noise, eta=eta), form) if eta else build


def renoise() -> Builder:
    """Return the method that renews all the noise: x_{i+1} = alpha_{i+1} x_0 + sigma_{i+1} z (Song et al., arXiv 2303.01469)."""
    return one_stage("renoise", lambda sde, start, end: (np.zeros_like(end), sde.sigma(end)), "data")


def edm_heun(churn: float = 0.0, low: float = 0.0, high: float = math.inf, noise: float = 1.0) -> SingleStep:
    """Return EDM's sampler (Karras et al., arXiv 2206.00364, algorithm 2): Heun's method in rho, and noise added before a step.

    Parameters
    ----------
    churn, low, high, noise : float
        S_churn, S_tmin, S_tmax and S_noise of the paper. Before a step from rho in [low, high], rho is raised by the factor
        1 + min(churn / num_step, sqrt(2) - 1), and the noise that this takes is added, multiplied by `noise`. churn = 0 is the
        deterministic sampler.

    Raises
    ------
    ValueError
        If churn is negative, noise is not positive, or low is greater than high.
    """
    churn, noise = number("churn", churn, least=0), number("noise", noise, above=0)
    high = number("high", high, infinite=True)
    low = number("low", low, most=high, infinite=True, hint="high is the greater of the two")
    factor = math.sqrt(2) - 1

    def raised(sde: Schedule, ts: Array) -> Array:
        rho = sde.rho(ts[:-1])
        chosen = (rho >= low) & (rho <= high) & np.isfinite(rho) & (churn > 0)
        gamma = min(churn / len(rho), factor)
        return np.where(chosen, sde.t_of_rho(np.where(chosen, (1 + gamma) * rho, 1.0)), ts[:-1])

    family = {size: partial(tableau_steps, tableau=TABLEAUX[name]) for size, name in ((1, "1euler"), (2, "2heun"))}
    name = f"edm_heun(churn={churn:g})" if churn else "edm_heun"
    return SingleStep(name, family, clean_end=True, raised=raised if churn else None, noise=noise)
