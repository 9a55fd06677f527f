"""Singlestep methods: steps of several stages that use no prediction from before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..arrays import AnyArray, Array
from ..plan import Plan
from ..quadrature import Form
from ..sde import Schedule
from .layout import laid_out


class Steps(NamedTuple):
    """n steps of s stages each: after the evaluation of stage k, x becomes c_x[k] x_i + sum_m c_p[k, m] p_m, m <= k."""

    form: Form
    t: Array
    """The times of the stages, shape (n, s)."""
    c_x: Array
    """Shape (n, s)."""
    c_p: Array
    """Shape (n, s, s), by stage: c_p[:, k, m] = 0 for m > k."""
    c_z: Array | None = None
    """The standard deviation of the new noise of each stage k, shape (n, s); a stage m > k has c_x[m] / c_x[k] times this noise."""


StepBuilder = Callable[[Schedule, Array, Array], Steps]
"""steps(sde, start, end), of times of shape (n,)."""


def stage_times(sde: Schedule, start: Array, end: Array, c: Sequence[float]) -> Array:
    """Return the times of stages at c between start and end in log rho, shape (n, s); at c = 0 and 1 they are exactly these ends.

    Raises
    ------
    ValueError
        If log rho is infinite and there is a second stage.
    """
    high, low = sde.log_rho(start), sde.log_rho(end)
    if len(c) > 1 and not (np.isfinite(high).all() and np.isfinite(low).all()):
        t_infinite = (start[0] if np.isinf(high).any() else end[-1]).item()
        raise ValueError(
            f"stages in log rho need a finite one, and it is infinite at t={t_infinite!r}; start later or end earlier, or use "
            "a multistep method such as 'tab3' or 'dpmpp_2m', or 'sde_dpmpp_2m' if it is to add noise"
        )
    ends = {0.0: start, 1.0: end}
    return np.stack([ends[c_k] if c_k in ends else sde.t_of_log_rho(high + c_k * (low - high)) for c_k in c], axis=1)


def split_budget(family: Collection[int], nfe: int) -> list[int]:
    """Return the number of stages in each step for a budget: full steps first, and cheaper ones of the family for the rest."""
    counts = [max(family)] * (nfe // max(family))
    rest = nfe % max(family)
    while rest:
        counts.append(max(size for size in family if size <= rest))
        rest -= counts[-1]
    return counts


@dataclass(frozen=True)
class SingleStep:
    """A singlestep method as a builder of plans.

    Attributes
    ----------
    name : str
    family : mapping of int to StepBuilder
        The steps by their number of stages. The largest is the method's own; the smaller ones meet a budget of evaluations that
        it does not divide.
    clean_end : bool
        Use a single stage in the last step if it ends at sigma = 0. There log rho is infinite, and a network that predicts x_0
        does not determine eps.
    raised : callable, optional
        raised(sde, ts) -> the times from which the steps start, shape (n,), if noise is added to reach them.
    noise : float
        A factor of that noise.
    fast : bool
        If the stages divide the budget, end with two cheaper steps: one with one stage less, and one with a single stage.
    fitted : str
        What the coefficients are right for, if they do not carry constants exactly; see `deis.Plan`.
    """

    name: str
    family: Mapping[int, StepBuilder]
    clean_end: bool = False
    raised: Callable[[Schedule, Array], Array] | None = None
    noise: float = 1.0
    fast: bool = False
    fitted: str = ""

    @property
    def stages(self) -> int:
        """The number of evaluations in a full step."""
        return max(self.family)

    def split(self, nfe: int, clean: bool) -> list[int]:
        """Return the number of stages in each step for a budget: full steps first, and cheaper ones at the end for the rest.

        `clean` is whether the grid ends at sigma = 0. For three stages this is what DPM-Solver calls "fast": ..., 3, 2, 1 or
        ..., 3, 1 or ..., 3, 2.
        """
        counts = split_budget(self.family, nfe)
        if counts[-1] > 1 and ((clean and self.clean_end) or (self.fast and counts[-1] == self.stages)):
            counts[-1:] = [*self.split(counts[-1] - 1, False), 1] if counts[-1] - 1 in self.family else [1] * counts[-1]
        return counts

    def __call__(self, sde: Schedule, ts: Array, grid: str, counts: list[int] | None = None) -> Plan:
        """Build the plan of the grid, with the given number of stages in each step; by default full steps."""
        n = len(ts) - 1
        if counts is None:
            clean = self.clean_end and sde.sigma(ts[-1]) == 0
            counts = [self.stages] * (n - 1) + [1 if clean else self.stages]
        start = ts[:-1] if self.raised is None else self.raised(sde, ts)
        is_raised = start != ts[:-1]
        cuts = [0, *(i for i in range(1, n) if counts[i] != counts[i - 1] or is_raised[i]), n]
        parts = []
        for first, last in pairwise(cuts):
            if is_raised[first]:
                parts.append(_noise_row(sde, ts[first], start[first], self.noise))
            steps = self.family[counts[first]](sde, start[first:last], ts[first + 1 : last + 1])
            parts.append(_stage_rows(steps))
        fitted = self.fitted if self.noise == 1 or not is_raised.any() else f"noise increased by {self.noise:g}"
        columns = _stack(parts)
        t = np.append(columns.pop("t"), ts[-1])
        return laid_out(sde, t, columns, form=steps.form, method=self.name, grid=grid, fitted=fitted)


Rows = dict[str, AnyArray]
"""Columns of a plan by name."""


def _stage_rows(steps: Steps) -> Rows:
    """Lay consecutive steps out with a row for each stage; the last stage of a step accepts the state.

    Until then base stays x_i, except that it gets the noise of a stage, at the scale of x_i.
    """
    n, s = steps.t.shape
    c_p = np.zeros((n, s, s))
    for k in range(s):
        c_p[:, k, : k + 1] = steps.c_p[:, k, k::-1]  # newest first
    last = np.arange(s) == s - 1
    return {
        "t": steps.t.ravel(),
        "keep_x": np.where(last, steps.c_x, 1.0).ravel(),
        "keep_p": np.where(last[:, None], c_p, 0.0).reshape(n * s, s),
        "keep_z": np.zeros(n * s) if steps.c_z is None else (steps.c_z / np.where(last, 1.0, steps.c_x)).ravel(),
        "next_x": np.where(last, 1.0, steps.c_x).ravel(),
        "next_p": np.where(last[:, None], 0.0, c_p).reshape(n * s, s),
        "accepts": np.tile(last, n),
        "calls": np.ones(n * s, dtype=bool),
    }


def _noise_row(sde: Schedule, t: float, up: float, noise: float) -> Rows:
    """Return the row, without an evaluation, that adds the noise from rho(t) up to rho(up)."""
    alpha, rho = sde.alpha(np.array([t, up])), sde.rho(np.array([t, up]))
    keep_z = noise * alpha[1] * np.sqrt((rho[1] - rho[0]) * (rho[1] + rho[0]))
    numbers = {"t": t, "keep_x": alpha[1] / alpha[0], "keep_z": keep_z, "next_x": 1.0}
    nothing = {"keep_p": np.zeros((1, 1)), "next_p": np.zeros((1, 1)), "accepts": np.array([False]), "calls": np.array([False])}
    return {name: np.array([value]) for name, value in numbers.items()} | nothing


def _stack(parts: list[Rows]) -> Rows:
    """Return the rows of all parts one after the other, widened to a common window."""
    window = max(part["keep_p"].shape[1] for part in parts)
    for part in parts:
        for name in ("keep_p", "next_p"):
            part[name] = np.pad(part[name], ((0, 0), (0, window - part[name].shape[1])))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
