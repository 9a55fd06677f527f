"""What becomes of the noise that a stochastic plan adds: extrapolation multiplies it, and the samples spread too far."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from ..machine import run_rows
from ..plan import Plan

Array = NDArray[np.float64]

DEVIATIONS = (0.25, 0.5, 1.0)
"""Of the data that the check supposes: images in [-1, 1], and data scaled to 1."""
WARN, REFUSE = 1.25, 3.0
"""Exact is below 1. A quarter too far can be seen; three times too far, eight parts of nine of the variance are spurious."""


def noise_left(plan: Plan, c: float) -> float:
    """Return the deviation of what the added noise has become at the end, for Gaussian data of deviation c.

    It is relative to the deviation that the samples should have in all, and so should be less than 1. Exact predictions and the
    rows are linear in the state, which is kept as its coefficients on the independent noises that were added, not the first.
    """
    spread = np.hypot(plan.alpha * c, plan.sigma)
    noises = np.flatnonzero(plan.keep_z)
    used = iter(range(len(noises)))

    def predict(i: int, x: Array) -> Array:
        share = plan.sigma[i] if plan.form == "eps" else plan.alpha[i] * c**2
        return x * (share / spread[i] ** 2 if plan.calls[i] else plan.guess[i])

    def add_noise(keep_z: float, x: Array) -> Array:
        own = np.zeros_like(x)
        own[next(used)] = keep_z
        return x + own

    def combine(c_x: float, x: Array, c_p: tuple[float, ...], history: tuple[Array, ...]) -> Array:
        total = c_x * x
        for weight, p in zip(c_p, history, strict=False):
            total = total + weight * p
        return total

    with np.errstate(all="ignore"):
        end = run_rows(plan, predict, combine, np.zeros(len(noises)), None, add_noise)
        return float(np.linalg.norm(end) / spread[-1])


def check_noise(plan: Plan, tau: str) -> Plan:
    """Return a plan whose noise does not grow; `tau` is how the rate of the noise was given.

    A polynomial through past predictions multiplies their independent parts, up to 2^q times at degree q, and new noise between the
    evaluations makes them independent: with much noise a step, and the more the higher the degree, it grows from step to step.

    Raises
    ------
    ValueError
        Where the noise alone spreads the samples three times as far as they should in all, for data of any of three deviations.
    UserWarning
        Where it spreads them a quarter further than they should.
    """
    if not plan.stochastic:
        return plan
    c, excess = max(((c, noise_left(plan, c)) for c in DEVIATIONS), key=lambda pair: pair[1])
    if excess <= WARN:
        return plan
    text = (
        f"tau={tau} adds more noise than {plan.method!r} can carry in {plan.num_step} steps: it would spread samples of Gaussian "
        f"data of deviation {c:g} {excess:.2g} times too far; give more steps, a lower tau or a lower order"
    )
    if excess > REFUSE:
        raise ValueError(text)
    warnings.warn(text, stacklevel=4)
    return plan
