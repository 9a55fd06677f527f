"""The size of a network's predictions over time, which DEIS-SN divides by before it extrapolates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arguments import kind
from .arrays import Array
from .model.predictions import Denoiser
from .model.pretrained import without_labels
from .plan import Plan
from .quadrature import Form
from .run import sample
from .sde import Schedule


@dataclass(frozen=True)
class MeasuredNorm:
    """c(t), interpolated monotonically in arctan rho (log c against it) and constant beyond its ends; see `measure_norm`.

    Attributes
    ----------
    sde : Schedule
    form : {"eps", "data"}
        What the predictions are.
    times, values : tuple of float
        c at the measured times.
    """

    sde: Schedule
    form: Form
    times: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def source(self) -> str:
        """What a plan says that it was fitted to."""
        return f"the mean norm of {self.form} at {len(self.times)} times"

    def __call__(self, t: Array) -> Array:
        from scipy.interpolate import PchipInterpolator

        nodes = self._angle(np.array(self.times))[::-1]
        curve = PchipInterpolator(nodes, np.log(self.values)[::-1])
        return np.exp(curve(np.clip(self._angle(t), nodes[0], nodes[-1])))

    def _angle(self, t: Array) -> Array:
        return np.arctan2(self.sde.sigma(t), self.sde.alpha(t))


def measure_norm(plan: Plan, denoiser: Denoiser, x_T: Any, rng: Any = None) -> MeasuredNorm:
    """Measure c(t), the mean over samples of the root mean square of the predictions along a plan's trajectories.

    For ``deis.make_plan(sde, "tab3", nfe=8, norm=deis.measure_norm(plan, denoiser, x_T))``: DEIS-SN (arXiv 2311.00157), which
    extrapolates eps / c(t). A plan of some twenty steps and a few dozen samples suffice; it takes two evaluations a step.

    Parameters
    ----------
    plan : Plan
        Its form is that of the norm, and of the plans that may be made with it.
    x_T, rng
        As for `deis.sample`.

    Raises
    ------
    ValueError
        For a plan of one step; or where the predictions of a time are all 0 or not finite.
    """
    kind("plan", plan, Plan, "a deis.Plan, as deis.make_plan returns,")
    denoiser = without_labels(denoiser)
    kind("denoiser", denoiser, Denoiser, "a deis.Denoiser, which says what it predicts,")
    if plan.num_step < 2:
        raise ValueError(f"plan has {plan.num_step} step; give one of at least 2, between which to interpolate")
    states = sample(plan, denoiser, x_T, trajectory=True, rng=rng)
    times, values = plan.ts[:-1].tolist(), []
    for t, x in zip(times, states[:-1], strict=True):
        p = denoiser.predict(x, t, plan.form).reshape(len(x), -1)
        values.append(float(((p**2).mean(1) ** 0.5).mean()))
        if not 0 < values[-1] < np.inf:
            raise ValueError(f"the predictions at t={t!r} have the mean norm {values[-1]!r}, which must be positive and finite")
    return MeasuredNorm(denoiser.sde, plan.form, tuple(times), tuple(values))
