"""The stages of a calibration by name; each makes a plan of the best one so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..arguments import kind, one_of
from ..plan import Plan
from .gauss_newton import fit_ends
from .gradient import fit_gradient
from .judge import Loss, measured
from .network import Student
from .regression import fit_rows
from .search import Search
from .table import Table
from .teacher import Teacher


@dataclass(frozen=True)
class Task:
    """What the stages are told; `calibrate` says what the settings are."""

    teacher: Teacher
    search: Search | None
    fit: int
    """The first samples are fitted to, and the others validate."""
    window: int
    loss: Loss
    times: bool
    iterations: int
    steps: int

    def student(self, plan: Plan) -> Student:
        return Student(self.teacher.network, plan)

    def error(self, plan: Plan) -> float:
        """Return the error on the validation samples."""
        return measured(self.student(plan), Table.of(plan), self.teacher, self.fit, self.loss)

    def plan(self, table: Table, like: Plan) -> Plan:
        """Return what was fitted as a plan with the rows and names of another."""
        grid = like.grid if np.array_equal(table.t, like.t) else "fitted times"
        return replace(table.plan(like, self.teacher.sde, f"a model, on {self.fit} samples"), grid=grid)

    def regressed(self, plan: Plan) -> Plan:
        return self.plan(fit_rows(self.student(plan), Table.of(plan), self.teacher, self.fit, self.window)[0], plan)


Stage = Callable[[Task, Plan, Sequence[str]], Plan]
"""(task, the best plan so far, the names of the stages before) -> a plan, better or not."""


def _grid(task: Task, best: Plan, before: Sequence[str]) -> Plan:
    if task.search is None:
        raise ValueError(
            f"stages has 'grid', and the plan's method {best.method!r} is no registered name that builds this plan on its "
            "own times; give method=, the name or the builder it was made with, or leave the stage out"
        )
    return min(task.search.grids, key=task.error)


def _least_squares(task: Task, best: Plan, before: Sequence[str]) -> Plan:
    """Try all grids that were found: the least squares may do better from another than from the best of them."""
    search = task.search if "grid" in before else None
    start = min((best, *(search.grids if search else ())), key=lambda plan: task.error(task.regressed(plan)))
    moved = [search.moved(start, task.fit, task.window)] if search and start.accepts.all() else []
    return min((task.regressed(plan) for plan in (start, *moved)), key=task.error)


def _gauss_newton(task: Task, best: Plan, before: Sequence[str]) -> Plan:
    student, iterations, times = task.student(best), task.iterations, task.times
    table = fit_ends(student, Table.of(best), task.teacher, task.fit, task.window, iterations=iterations, times=times)
    return task.plan(table, best)


def _gradient(task: Task, best: Plan, before: Sequence[str]) -> Plan:
    student, loss, steps, times = task.student(best), task.loss, task.steps, task.times
    table = fit_gradient(student, Table.of(best), task.teacher, task.fit, task.window, loss=loss, steps=steps, times=times)
    return task.plan(table, best)


STAGES: dict[str, Stage] = {
    "grid": _grid,
    "least_squares": _least_squares,
    "gauss_newton": _gauss_newton,
    "gradient": _gradient,
}


def checked_stages(stages: Sequence[str]) -> tuple[str, ...]:
    """Return the names of stages, or raise where they are none."""
    kind("stages", stages, Sequence, "a sequence of names,")
    return tuple(one_of("stages", name, STAGES) for name in ((stages,) if isinstance(stages, str) else stages))
