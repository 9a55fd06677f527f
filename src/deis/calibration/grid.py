"""Time grids fitted to a teacher: chosen among its times, by dynamic programming and exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal

import numpy as np

from ..arrays import Array, Indices
from ..methods.layout import Builder
from ..plan import Plan
from ..quadrature import Form
from .table import Table
from .teacher import Teacher

Cost = Callable[[list[int], Indices], Array]
"""cost(path, ends) -> shape (len(ends),): the error of the jumps from path[-1], reached by the path, to each of the ends."""
MOST_SAMPLES = 64
MOST_TIMES = 160
_SWEEPS = 3


class Jumps:
    """Errors of single jumps from the teacher's own states, for any weights, by one Gram matrix of all states and predictions.

    The error of a jump from t_b to t_c is the mean over samples of the root mean square of

        (x_c - a x_b - sum_j c_j p_{b_j}) / alpha_c

    that is, in the variable x/alpha, which the flow leaves unchanged where the predicted noise is 0. Jumps are summed without
    discount. The prediction at the initial noise is `guess` times that noise, if this is what a plan's first row assumes.

    Attributes
    ----------
    index : array of shape (M + 1,)
        The teacher's times that take part.
    t : array of shape (M + 1,)
    """

    def __init__(self, teacher: Teacher, form: Form, guess: float | None = None) -> None:
        count = len(teacher.t)
        self.index = np.unique(np.rint(np.linspace(0, count - 1, min(count, MOST_TIMES))).astype(int))
        self.t, self.m, self.form = teacher.t[self.index], len(self.index) - 1, form
        self.sde = teacher.sde
        self.alpha, self.sigma = teacher.sde.alpha(self.t), teacher.sde.sigma(self.t)
        rows = slice(0, MOST_SAMPLES)
        vectors = [teacher.states[i][rows] for i in self.index]
        vectors += [teacher.prediction(0, form)[rows] if guess is None else guess * vectors[0]]
        vectors += [teacher.prediction(i, form)[rows] for i in self.index[1:-1]]
        v = np.stack([vector.reshape(len(vector), -1) for vector in vectors], axis=1).astype(np.float64)
        self.gram = v @ v.transpose(0, 2, 1) / v.shape[2]

    def columns(self, b: int, nodes: list[int]) -> Indices:
        """Return the places of x_b and of the predictions at the nodes."""
        return np.array([b, *(self.m + 1 + node for node in nodes)])

    def errors(self, ends: Indices, columns: Indices, weights: Array) -> Array:
        """Return the errors of jumps to the ends, with weights of shape (len(ends), len(columns))."""
        gram = self.gram[:, columns[:, None], columns]
        cross = self.gram[:, ends[:, None], columns]
        square = self.gram[:, ends, ends] - 2 * np.einsum("ek,nek->ne", weights, cross)
        square += np.einsum("ek,nkl,el->ne", weights, gram, weights, optimize=True)
        return np.sqrt(np.maximum(square, 0)).mean(axis=0) / self.alpha[ends]

    def euler(self, path: list[int], ends: Indices) -> Array:
        """Return the errors of DDIM's jumps: the cost of GITS (arXiv 2405.11326), in x/alpha."""
        b = path[-1]
        if self.form == "eps":
            a = self.alpha[ends] / self.alpha[b]
            c = self.sigma[ends] - a * self.sigma[b]
        else:
            a = self.sigma[ends] / self.sigma[b]
            c = self.alpha[ends] - a * self.alpha[b]
        return self.errors(ends, self.columns(b, [b]), np.stack([a, c], axis=1))

    def fitted(self, path: list[int], ends: Indices) -> Array:
        """Return the errors of jumps whose weights of x and the three newest predictions are fitted by least squares."""
        columns = self.columns(path[-1], path[:-4:-1])
        gram = self.gram[:, columns[:, None], columns].mean(axis=0)
        cross = self.gram[:, ends[:, None], columns].mean(axis=0)
        scale = np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))  # a guess may be 0
        ridge = gram / np.outer(scale, scale) + 1e-8 * np.eye(len(columns))
        return self.errors(ends, columns, np.linalg.solve(ridge, (cross / scale).T).T / scale)

    def of_plan(self, places: Indices, plan: Plan) -> float:
        """Return the sum of the errors of the jumps of a plan whose times are t[places], each from the teacher's own states."""
        total = 0.0
        for i, row in enumerate(Table.of(plan).theta):
            columns = self.columns(int(places[i]), places[i::-1].tolist())
            total += float(self.errors(places[i + 1 : i + 2], columns, np.array([row[: i + 2]]))[0])
        return total


def shortest(cost: Cost, m: int, steps: int) -> Indices:
    """Return the places 0 = b_0 < ... < b_steps = m of the path of the least sum of costs, by dynamic programming.

    The cost of a jump may depend on the path before it. Only the best path to each place is carried on, which is exact if the
    cost does not depend on it.
    """
    best = np.full((steps + 1, m + 1), np.inf)
    best[0, 0] = 0
    paths: dict[tuple[int, int], list[int]] = {(0, 0): [0]}
    for k in range(1, steps + 1):
        origin = np.zeros(m + 1, dtype=int)
        for b in range(k - 1, m - (steps - k)):
            if np.isfinite(best[k - 1, b]):
                ends = np.arange(b + 1, m + 1 - (steps - k)) if k < steps else np.array([m])
                total = best[k - 1, b] + cost(paths[k - 1, b], ends)
                better = total < best[k, ends]
                best[k, ends[better]] = total[better]
                origin[ends[better]] = b
        for c in np.flatnonzero(np.isfinite(best[k])):
            paths[k, int(c)] = [*paths[k - 1, int(origin[c])], int(c)]
    return np.array(paths[steps, m])


def exchange(
    value: Callable[[Indices], float],
    places: Indices,
    shifts: Sequence[int] = (8, 4, 2, 1),
    allowed: Callable[[], bool] = lambda: True,
) -> Indices:
    """Return the places after moving single inner ones, by less and less: up to three times each, as long as the value falls.

    It also ends when no further move is allowed.
    """
    least = value(places)
    for shift in shifts:
        for _ in range(_SWEEPS):
            before = least
            for i, by in product(range(1, len(places) - 1), (-shift, shift)):
                moved = places.copy()
                moved[i] += by
                if moved[i - 1] < moved[i] < moved[i + 1]:
                    if not allowed():
                        return places
                    found = value(moved)
                    if found < least:
                        places, least = moved, found
            if least > before - 1e-3 * abs(before):
                break
    return places


GridCost = Literal["euler", "fitted", "method"]
COSTS: tuple[GridCost, ...] = ("euler", "fitted", "method")


def teacher_grid(
    teacher: Teacher, build: Builder, form: Form, num_step: int, cost: GridCost = "method", jumps: Jumps | None = None
) -> Array:
    """Return the times for a method, chosen among the teacher's, whose jumps from the teacher's states err least.

    Parameters
    ----------
    cost : {"method", "fitted", "euler"}
        "method": the jumps of the method itself. Each depends on all times before it, so the path of the fitted jumps is improved
        by moving single times until none helps. "fitted": jumps with least-squares weights; "euler": DDIM's, as in GITS.
    jumps : Jumps, optional
        Those of the teacher, if they were made before.

    Raises
    ------
    ValueError
        If the teacher has fewer steps than asked for, or the method has stages within its steps and cost is "method".
    """
    jumps = jumps or Jumps(teacher, form)
    if num_step > jumps.m:
        raise ValueError(f"num_step={num_step!r} is more than the teacher's {jumps.m} steps; make one with more steps=")
    places = shortest(jumps.euler if cost == "euler" else jumps.fitted, jumps.m, num_step)
    if cost == "method":

        def value(places: Indices) -> float:
            plan = build(teacher.sde, jumps.t[places], "")
            if not plan.accepts.all():
                raise ValueError(f"cost='method' needs a method without stages, and {plan.method!r} has some; give cost='euler'")
            return jumps.of_plan(places, plan)

        places = exchange(value, places)
    return jumps.t[places]
