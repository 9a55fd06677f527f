"""How builders lay rows out as plans, and what a builder is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..arrays import Array
from ..plan import Plan
from ..quadrature import Form
from ..sde import Schedule


class Builder(Protocol):
    """A method: a function that builds the plan of a grid."""

    def __call__(self, sde: Schedule, ts: Array, grid: str, /) -> Plan:
        """Return the plan on the decreasing times ts, one more than there are steps; `grid` is the name of the grid."""


@runtime_checkable
class StagedBuilder(Protocol):
    """A method with several evaluations per step, which can also meet a budget `nfe=` that they do not divide."""

    def split(self, nfe: int, clean: bool, /) -> list[int]:
        """Return the number of evaluations in each step for a budget, on a grid that ends at sigma = 0 (clean) or not."""

    def __call__(self, sde: Schedule, ts: Array, grid: str, counts: list[int] | None = None, /) -> Plan:
        """Return the plan on the times ts, with the given number of evaluations in each step; by default full steps."""


def laid_out(sde: Schedule, t: Array, columns: Mapping[str, Any], *, form: Form, method: str, grid: str, fitted: str = "") -> Plan:
    """Return the plan with these columns at the times t, one more than there are rows; see `deis.Plan` for columns and texts."""
    texts: dict[str, Any] = {"form": form, "method": method, "grid": grid, "schedule": sde.name, "fitted": fitted}
    discrete = sde.num_times is not None and bool((t == np.rint(t)).all())
    return Plan(t=t, alpha=sde.alpha(t), sigma=sde.sigma(t), **columns, discrete=discrete, **texts)


def gaussian_guess(form: Form, alpha: float, sigma: float, c: float) -> float:
    """Return the factor of x in the prediction for Gaussian data of mean 0 and standard deviation c."""
    with np.errstate(over="ignore"):  # the limits for large and for small c are right
        return float(sigma / (np.square(alpha * c) + sigma**2) if form == "eps" else alpha / (alpha**2 + np.square(sigma / c)))


def multistep_plan(
    sde: Schedule,
    ts: Array,
    form: Form,
    psi: Array,
    c_p: Array,
    method: str,
    grid: str,
    *,
    corrector: Array | None = None,
    keep_z: Array | None = None,
    fitted: str = "",
) -> Plan:
    """Lay x_{i+1} = psi_i x_i + sum_j C_ij p_{i-j} (+ keep_z_i z_i) out as a plan with one evaluation per step.

    With a corrector, row i first corrects x_i = base + sum_j corrector[i-1, j] p_{i-j}, where base = psi_{i-1} x_{i-1} + its noise.
    It then carries x_i on as base = psi_i x_i + new noise, to which next_p adds the predictor of x_{i+1}. So both share the noise.
    """
    n = len(psi)
    noise = np.zeros(n) if keep_z is None else keep_z
    if corrector is None:
        keep_p, next_p = c_p, np.zeros_like(c_p)
    else:
        keep_p, next_p = corrected(psi, c_p, corrector)
    columns = {"keep_x": psi, "keep_p": keep_p, "keep_z": noise, "next_x": np.ones(n), "next_p": next_p}
    columns["accepts"] = np.ones(n, dtype=bool)
    return laid_out(sde, ts, columns, form=form, method=method, grid=grid, fitted=fitted)


def corrected(psi: Array, predictor: Array, corrector: Array, times: Callable[..., Array] = np.multiply) -> tuple[Array, Array]:
    """Return keep_p and next_p: row i corrects x_i and carries it on, and then adds the predictor of x_{i+1}.

    `times` is the product of coefficients, which are the last axes of the three arrays: numbers, or see `deis.linear`.
    """
    n, window = len(psi), min(len(psi), max(predictor.shape[1], corrector.shape[1]))
    keep_p, next_p = (np.zeros((n, window, *psi.shape[1:])) for _ in range(2))
    keep_p[1:, : corrector.shape[1]] = times(psi[1:, None], corrector[:-1, :window])
    next_p[:, : predictor.shape[1]] = predictor
    return keep_p, next_p
