"""The plans of a method on other grids: those that a teacher suggests, and what moving single times of one leads to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..arguments import function, kind
from ..arrays import Array, Indices
from ..methods import ANALYTICAL, get_method, make_plan
from ..methods.layout import Builder
from ..plan import Plan
from .grid import COSTS, Jumps, exchange, teacher_grid
from .model_free import model_free_grid
from .network import Student, rmse
from .regression import fit_rows
from .table import Table
from .teacher import Teacher

_JUDGING = 32  # samples by which a move is judged
_MOST_PREDICTIONS = 128  # that are kept of earlier moves


@dataclass(frozen=True)
class Search:
    """What builds a plan on other times; with the analytical first step of the one that was given."""

    given: Plan
    build: Builder
    teacher: Teacher

    def plan(self, ts: Array, grid: str) -> Plan:
        """Return the plan of the method on other times."""
        plan = replace(make_plan(self.teacher.sde, self.build, ts=ts), grid=grid)
        if self.given.calls.all():
            return plan
        return replace(plan, calls=self.given.calls, guess=self.given.guess, method=self.given.method)

    @cached_property
    def grids(self) -> list[Plan]:
        """The plans on grids that are made from the jumps of the teacher, and without a model."""
        teacher, build, form, num_step = self.teacher, self.build, self.given.form, self.given.num_step
        jumps, costs = Jumps(teacher, form), COSTS if self.given.accepts.all() else COSTS[:-1]
        grids = {f"teacher grid, {cost} cost": teacher_grid(teacher, build, form, num_step, cost, jumps) for cost in costs}
        grids["model-free grid"] = model_free_grid(teacher.sde, build, num_step)
        return [self.plan(ts, name) for name, ts in grids.items()]

    def moved(self, plan: Plan, fit: int, window: int) -> Plan:
        """Return the plan on those of the teacher's times that are best after the regression of a few samples."""
        teacher, judging = self.teacher, min(fit, _JUDGING)
        places = np.unique([int(np.argmin(np.abs(teacher.t - t))) for t in plan.ts])
        if len(places) < len(plan.ts):
            return plan
        predictions: dict[bytes, Array] = {}

        def value(places: Indices) -> float:
            if len(predictions) > _MOST_PREDICTIONS:
                predictions.clear()
            moved = self.plan(teacher.t[places], "")
            _, end = fit_rows(Student(teacher.network, moved), Table.of(moved), teacher, judging, window, 0, predictions)
            return float(np.log(np.maximum(rmse(end, teacher.end[:judging]), 1e-12)).mean())

        return self.plan(teacher.t[exchange(value, places, (4, 2, 1))], "teacher grid, by regression")


def search_of(plan: Plan, method: str | Builder | None, teacher: Teacher) -> Search | None:
    """Return what builds the plan on other times, where it is known; None else.

    Raises
    ------
    ValueError
        Where the method that was given builds another plan.
    """
    if method is not None and not isinstance(method, str):
        function("method, where it is no name,", method, "sde", "ts", "grid")
    try:
        build = method if callable(method) else get_method(plan.method.removesuffix(ANALYTICAL) if method is None else method)
        rebuilt = build(teacher.sde, plan.ts, "")
        kind("the result of method", rebuilt, Plan, "a deis.Plan,")
        again = Table.of(rebuilt)
    except ValueError:
        if method is None:
            return None
        raise
    table = Table.of(plan)
    if again.c.shape == table.c.shape and np.allclose(again.c, table.c, 1e-6, 1e-9) and np.allclose(again.a, table.a, 1e-6, 1e-9):
        return Search(plan, build, teacher)
    if method is None:
        return None
    raise ValueError(f"method={method!r} builds another plan than the one given on the same times; give the one it was made with")
