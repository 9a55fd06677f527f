"""What a plan does to Gaussian data, exactly: extrapolation may multiply the noise it adds, or go astray on a coarse grid."""

from __future__ import annotations

import warnings

import numpy as np

from ..arrays import Array
from ..backends.numpy import combine
from ..machine import run_rows
from ..plan import Plan

DEVIATIONS = (0.25, 0.5, 1.0)
"""Standard deviations of the data that the check assumes: images in [-1, 1], and data scaled to 1."""
WARN, REFUSE = 1.25, 3.0
"""Exact is below 1. A quarter too far is visible; three times too far, eight ninths of the variance are spurious."""


def noise_left(plan: Plan, c: float) -> float:
    """Return the standard deviation at the end that comes from the added noise, for Gaussian data of standard deviation c.

    It is relative to the total deviation that the samples should have, and so should be less than 1. Exact predictions and rows
    are linear in the state. The state is kept as its coefficients on the independent noises that were added, not on the initial
    one.
    """
    return _end(plan, c, np.zeros(np.count_nonzero(plan.keep_z)))


def _end(plan: Plan, c: float, start: Array) -> float:
    """Run the rows on a state of such coefficients; return its final size relative to the deviation the samples should have."""
    spread = np.hypot(plan.alpha * c, plan.sigma)
    used = iter(range(len(start)))

    def predict(i: int, x: Array) -> Array:
        share = plan.sigma[i] if plan.form == "eps" else plan.alpha[i] * c**2
        return x * (share / spread[i] ** 2)

    def add_noise(keep_z: float, x: Array) -> Array:
        own = np.zeros_like(x)
        own[next(used)] = keep_z
        return x + own

    with np.errstate(all="ignore"):
        end = run_rows(plan.rows, predict, combine, start, None, add_noise)
        return float(np.linalg.norm(end) / spread[-1])


def check_steps(plan: Plan) -> Plan:
    """Return a plan, and warn if its polynomials do harm on its times.

    Without noise, each sample of Gaussian data is multiplied by a number that should be 1. In a step of first order it is
    cos(angle - angle'), where the angle is arctan(rho / c). A polynomial extrapolated far beyond its nodes is much worse.

    Raises
    ------
    UserWarning
        If the deviation is off by more than a quarter, and by more than three times as much as at first order.
    """
    if plan.stochastic:
        return plan
    rows = np.append(0, np.flatnonzero(plan.accepts) + 1)
    for c in DEVIATIONS:
        first = 1 - np.cos(np.diff(np.arctan2(plan.sigma[rows], c * plan.alpha[rows]))).prod()
        found = abs(_end(plan, c, np.hypot(plan.alpha[:1] * c, plan.sigma[:1])) - 1)
        if found > max(WARN - 1, 3 * first):
            warnings.warn(
                f"{plan.method!r} with the {plan.grid} in {plan.num_step} steps is off by {found:.0%} of the deviation of Gaussian "
                f"data of deviation {c:g}, and 'ddim' by {first:.0%}; use the default grid, more steps or a lower order",
                stacklevel=3,
            )
            break
    return plan


def check_noise(plan: Plan, tau: str, option: str = "tau") -> Plan:
    """Return a plan whose noise does not grow; `tau` is the rate of the noise as the user gave it, and `option` its name.

    A polynomial through past predictions amplifies their independent parts, up to 2^q times at degree q, and new noise between the
    evaluations makes them independent. With much noise per step, it grows from step to step; more so at a higher degree.

    Raises
    ------
    ValueError
        If the noise alone spreads the samples three times as far as they should be in total, for any of three data deviations.
    UserWarning
        If it spreads them a quarter further than they should be.
    """
    if not plan.stochastic:
        return plan
    c, excess = max(((c, noise_left(plan, c)) for c in DEVIATIONS), key=lambda pair: pair[1])
    if excess <= WARN:
        return plan
    text = (
        f"{option}={tau} adds more noise than {plan.method!r} can carry in {plan.num_step} steps: it would spread samples of "
        f"Gaussian data of deviation {c:g} {excess:.2g} times too far; give more steps, a lower {option} or a lower order"
    )
    if excess > REFUSE:
        raise ValueError(text)
    warnings.warn(text, stacklevel=4)
    return plan
