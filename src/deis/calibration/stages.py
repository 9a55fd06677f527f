"""The stages of a calibration by name; each makes a plan of the best one so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..arguments import kind, one_of
from ..plan import Plan
from .clock import Clock
from .gauss_newton import fit_ends
from .gradient import fit_gradient
from .judge import Judge, first_prediction
from .network import Student
from .regression import fit_rows
from .search import Race, Search, Start
from .table import Table, with_free_start
from .teacher import Teacher


@dataclass(frozen=True)
class Task:
    """The input of the stages; the settings are those of `calibrate`."""

    teacher: Teacher
    searches: Sequence[Search]
    fit: int
    """The fit uses the first samples, and the others validate."""
    window: int | None
    judge: Judge
    clock: Clock
    times: bool
    iterations: int
    steps: int

    def student(self, plan: Plan) -> Student:
        return Student(self.teacher.network, plan)

    def width(self, plan: Plan) -> int:
        """Return the number of predictions that a row of the plan may use."""
        return self.window or len(plan.rows)

    def plan(self, table: Table, like: Plan) -> Plan:
        """Return what was fitted as a plan with the rows and names of another."""
        grid = like.grid if np.array_equal(table.t, like.t) else "fitted times"
        return replace(table.plan(like, self.teacher.sde, f"a model, on {self.fit} samples"), grid=grid)

    def with_free_start(self, plan: Plan) -> Plan:
        """Return the plan with its first call at a later time, found by regression, after a row that only passes the state on.

        At the start itself a prediction may hardly depend on the time that the network is given, and Gauss-Newton would stay there.
        """
        ahead = with_free_start(plan)
        t = ahead.t.copy()
        t[1] -= _SHARE * (t[1] - t[2])
        prior = replace(Table.of(ahead), t=np.rint(t) if plan.discrete else t)
        return self.plan(fit_rows(self.student(ahead), prior, self.teacher, self.fit, self.width(ahead))[0], ahead)

    def regressed(self, plan: Plan) -> tuple[float, Plan]:
        """Return the loss of a plan with its rows fitted to all samples, and that plan."""
        first = first_prediction(self.teacher, plan)
        known = {} if first is None else {plan.t[:1].tobytes(): first}
        width = self.width(plan)
        table, end = fit_rows(self.student(plan), Table.of(plan), self.teacher, self.fit, width, predictions=known)
        return self.judge.of_ends(end[self.fit :]).loss, self.plan(table, plan)


_SHARE = 0.3  # of the way from the start to the second call: the time of the first call before Gauss-Newton
_MOVING = 32  # the least number of samples for moving the times of one start
Stage = Callable[[Task, Plan, Sequence[str]], Plan]
"""(task, the best plan so far, the names of the stages before) -> a plan, better or not."""


def _grid(task: Task, best: Plan, before: Sequence[str]) -> Plan:
    if all(search.build is None for search in task.searches):
        raise ValueError(
            f"stages has 'grid', and the plan's method {best.method!r} is not a registered name that builds this plan on its "
            "own times; give method=, the name or builder it was made with, or leave the stage out"
        )
    grids = [plan for search in task.searches for plan in search.grids(task.clock)]
    judged = [(task.judge.of_plan(plan).loss, plan) for plan in grids if task.clock.allows(NEEDS["grid"](task, plan))]
    return min(judged, key=lambda pair: pair[0], default=(0.0, best))[1]


def _least_squares(task: Task, best: Plan, before: Sequence[str]) -> Plan:
    """Race the starts on all grids found, and fit the rows of the best few: only the fitted plans show which is best."""
    moves = "grid" in before
    plans = ((search, plan) for search in task.searches for plan in (search.given, *(search.grids(task.clock) if moves else ())))
    starts = {_numbers(plan): Start(plan, search) for search, plan in plans}
    first = starts.pop(_numbers(best), Start(best, None))
    race = Race(task.teacher, task.fit, task.window, task.judge.c, task.clock)
    few = race.halved([first, *starts.values()])
    found = [task.regressed(few[0].plan)]
    moved = [race.moved(few)] if moves and race.allows(_MOVING * len(few), few[0].plan) else []
    for plan in [*moved, *(start.plan for start in few[1:])]:
        if task.clock.allows(len(task.teacher.states[0]) * plan.nfe):
            found.append(task.regressed(plan))
    return min(found, key=lambda pair: pair[0])[1]


def _numbers(plan: Plan) -> bytes:
    """Return what tells the plans of different tables apart."""
    return plan.t.tobytes() + Table.of(plan).theta.tobytes() + plan.calls.tobytes()


def _gauss_newton(task: Task, best: Plan, before: Sequence[str]) -> Plan:
    best = task.with_free_start(best) if task.times and best.calls[0] else best
    turns = task.clock.turns(task.iterations, NEEDS["gauss_newton"](task, best))
    student, width = task.student(best), task.width(best)
    return task.plan(fit_ends(student, Table.of(best), task.teacher, task.fit, width, iterations=turns, times=task.times), best)


def _gradient(task: Task, best: Plan, before: Sequence[str]) -> Plan:
    turns = task.clock.turns(task.steps, NEEDS["gradient"](task, best))
    student, fit, width, loss = task.student(best), task.fit, task.width(best), task.judge.loss
    table = fit_gradient(
        student, Table.of(best), task.teacher, fit, width, loss=loss, steps=task.steps, turns=turns, times=task.times
    )
    return task.plan(table, best)


STAGES: dict[str, Stage] = {
    "grid": _grid,
    "least_squares": _least_squares,
    "gauss_newton": _gauss_newton,
    "gradient": _gradient,
}
SHARES = {"grid": 1.0, "least_squares": 4.0, "gauss_newton": 6.0, "gradient": 6.0}
"""How they share a limited time; what one stage leaves goes to the later ones."""
NEEDS: dict[str, Callable[[Task, Plan], float]] = {
    "grid": lambda task, plan: plan.nfe * (len(task.teacher.states[0]) - task.fit),
    "least_squares": lambda task, plan: plan.nfe * len(task.teacher.states[0]),
    "gauss_newton": lambda task, plan: task.fit * _turn(len(plan.rows) - plan.hands_on),
    "gradient": lambda task, plan: 3.0 * plan.nfe * min(task.fit, task.teacher.network.batch),
}
"""The fewest evaluations, of one sample each, with which a stage can find anything."""


def _turn(n: int) -> int:
    """Return the evaluations per sample of one Gauss-Newton iteration: each of the i + 3 numbers of row i reruns the later rows."""
    return n + sum((i + 3) * (n - i - 1) for i in range(n))


def checked_stages(stages: Sequence[str]) -> tuple[str, ...]:
    """Return the names of stages, or raise if one is unknown."""
    kind("stages", stages, Sequence, "a sequence of names,")
    return tuple(one_of("stages", name, STAGES) for name in ((stages,) if isinstance(stages, str) else stages))
