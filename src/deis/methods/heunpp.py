"""Heun++: an Euler walk over the next levels of the grid, whose slopes give one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from ..plan import Plan
from ..sde import Schedule
from .layout import laid_out
from .step import choose_form, rises


@dataclass(frozen=True)
class HeunPP2:
    """ComfyUI's heunpp2, a builder of plans: three evaluations a step, two in the last but one, and one in the last.

    From t_i Euler's steps in rho go over t_{i+1} and t_{i+2} and find eps_0, eps_1, eps_2; then x_{i+1} / alpha is x_i / alpha
    + (rho_{i+1} - rho_i) sum_k w_k eps_k, where w_k = rho_{i+k} / (n max rho), k > 0, of n slopes, is relative to the noisiest
    level of the whole grid, and w_0 what is missing of 1. So the weights do not follow the step, and its order is 1. The third
    evaluation lies beyond the end of its step.
    """

    def split(self, nfe: int, clean: bool) -> list[int]:
        """Return the evaluations of each step for a budget: 3, ..., 3, 2, 1, and a rest of 1 or 2 before the last."""
        full, rest = divmod(nfe, 3)
        return [3] * (full - 1) + [2] + [rest] * (rest > 0) + [1] if full else [1] * rest

    def __call__(self, sde: Schedule, ts: Array, grid: str, counts: list[int] | None = None) -> Plan:
        """Build the plan of the grid, with the given number of evaluations in each step."""
        choose_form(sde, ts[[0, -1]][:: -1 if rises(ts) else 1], "eps")
        alpha, rho, n = sde.alpha(ts), sde.rho(ts), len(ts) - 1
        sizes = [min(3, n - i) for i in range(n)] if counts is None else counts
        step = np.repeat(np.arange(n), sizes)
        stage = np.concatenate([np.arange(size) for size in sizes])
        last = np.append(stage[1:] == 0, True)
        c_p = np.zeros((len(step), max(sizes)))
        for row, (i, k) in enumerate(zip(step, stage, strict=True)):
            weights = np.diff(rho[i : i + k + 2])  # of Euler's steps
            if last[row]:
                weights = rho[i : i + k + 1] / ((k + 1) * rho.max())
                weights[0] = 1 - weights[1:].sum()
                weights *= rho[i + 1] - rho[i]
            c_p[row, : k + 1] = weights[::-1]
        end = np.where(last, step + 1, step + stage + 1)
        c_x, c_p = alpha[end] / alpha[step], alpha[end, None] * c_p
        columns = {"keep_x": np.where(last, c_x, 1.0), "keep_p": np.where(last[:, None], c_p, 0.0), "accepts": last}
        columns |= {"next_x": np.where(last, 1.0, c_x), "next_p": np.where(last[:, None], 0.0, c_p)}
        return laid_out(sde, np.append(ts[step + stage], ts[-1]), columns, form="eps", method="heunpp2", grid=grid)
