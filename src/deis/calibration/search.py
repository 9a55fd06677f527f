"""The plans that a calibration may start from, on all their grids, and the race that finds the best of them in few evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ..arguments import function, kind
from ..arrays import Array, Indices
from ..methods import ANALYTICAL, get_method
from ..methods.layout import Builder
from ..plan import Plan
from ..quadrature import Form
from .clock import Clock
from .grid import COSTS, Jumps, exchange, teacher_grid
from .judge import first_prediction, robust
from .model_free import model_free_grid
from .network import Student, rmse
from .regression import fit_rows
from .table import Table
from .teacher import Teacher

_ROUNDS = (8, 16, 32)  # samples by which plans are compared; the better half goes on, until so many are left ...
_MOVED = 3  # ... whose times are moved
_MOVES = ((4, 16, 2), (2, 16, 1), (1, 32, 1))  # how far among the teacher's, judged by how many samples, and how many go on
_MOST_PREDICTIONS = 128  # kept from earlier moves


@dataclass(frozen=True)
class Search:
    """A plan to start from, with its analytical first step, and the builder of it on other times, if known."""

    given: Plan
    build: Builder | None
    teacher: Teacher
    jumps: dict[tuple[Form, float | None], Jumps] = field(default_factory=dict)
    """By the form and the guess, for all searches with this teacher."""
    made: dict[str, Plan] = field(default_factory=dict)
    """The grids so far."""

    def plan(self, build: Builder, ts: Array, grid: str) -> Plan:
        """Return the plan of the method on other times, whatever its polynomials do there: they are fitted."""
        plan = build(self.teacher.sde, ts, grid)
        if self.given.calls.all():
            return plan
        return replace(plan, calls=self.given.calls, guess=self.given.guess, method=self.given.method)

    def grids(self, clock: Clock) -> list[Plan]:
        """Return the plans on grids that are made from the jumps of the teacher, and without a model, as far as time allows."""
        teacher, build, given = self.teacher, self.build, self.given
        if build is None:
            return []
        for cost in COSTS if given.accepts.all() else COSTS[:-1]:
            name = f"teacher grid, {cost} cost"
            if name not in self.made and clock.allows():
                ts = teacher_grid(teacher, build, given.form, given.num_step, cost, self._jumps())
                self.made[name] = self.plan(build, ts, name)
        if "model-free grid" not in self.made and clock.allows():
            self.made["model-free grid"] = self.plan(build, model_free_grid(teacher.sde, build, given.num_step), "model-free grid")
        return list(self.made.values())

    def _jumps(self) -> Jumps:
        key = (self.given.form, None if self.given.calls[0] else float(self.given.guess[0]))
        if key not in self.jumps:
            self.jumps[key] = Jumps(self.teacher, *key)
        return self.jumps[key]


class Start(NamedTuple):
    """A plan, and the search that it is one of, if any."""

    plan: Plan
    search: Search | None


@dataclass(frozen=True)
class Race:
    """Compares plans by the final states of a few samples, after a regression on the same; it stops when the time is over.

    Successive halving: all plans on 8 samples, the better half on 16, half of these on 32, until three are left. Then the times of
    these three are moved, those of the better two by less, and those of the best by less still.
    """

    teacher: Teacher
    fit: int
    window: int | None
    c: float
    clock: Clock

    def allows(self, samples: int, plan: Plan) -> bool:
        """Return whether there is time to run a plan on some samples, and for the regression on all of them after it."""
        return self.clock.allows((samples + len(self.teacher.states[0])) * plan.nfe)

    def loss(self, plan: Plan, samples: int, predictions: dict[bytes, Array] | None = None) -> float:
        """Return the mean of log(e^2 + c^2) over the samples; `predictions` are those of `fit_rows`."""
        teacher, table = self.teacher, Table.of(plan)
        predictions, start = {} if predictions is None else predictions, table.t[:1].tobytes()
        p = None if start in predictions else first_prediction(teacher, plan)
        if p is not None:
            predictions[start] = p[:samples]
        window = self.window or len(plan.rows)
        _, end = fit_rows(Student(teacher.network, plan), table, teacher, samples, window, 0, predictions)
        return float(robust(rmse(end, teacher.end[:samples]), self.c).mean()) if np.isfinite(end).all() else np.inf

    def halved(self, starts: Sequence[Start]) -> list[Start]:
        """Return the best few, the best first."""
        starts = list(starts)
        for round_ in _ROUNDS:
            samples = min(round_, self.fit)
            if len(starts) <= _MOVED or not self.allows(samples * len(starts), starts[0].plan):
                break
            starts = sorted(starts, key=lambda start: self.loss(start.plan, samples))[: max(_MOVED, -(-len(starts) // 2))]
        return starts[:_MOVED]

    def moved(self, starts: Sequence[Start]) -> Plan:
        """Return the best plan found by moving single times of these among the teacher's."""
        starts = list(starts)
        for shift, most, left in _MOVES:
            found = [self._moved(start, shift, min(most, self.fit)) for start in starts]
            starts = [start for _, start in sorted(found, key=lambda pair: pair[0])][:left]
        return starts[0].plan

    def _moved(self, start: Start, shift: int, samples: int) -> tuple[float, Start]:
        """Return the lowest loss that moves by so many of the teacher's times reach, and the start they lead to."""
        teacher, (plan, search) = self.teacher, start
        places = np.unique([int(np.argmin(np.abs(teacher.t - t))) for t in plan.ts])
        if search is None or search.build is None or not plan.accepts.all() or len(places) < len(plan.ts):
            return self.loss(plan, samples), start
        build, predictions = search.build, dict[bytes, Array]()

        def at(places: Indices) -> Plan:
            return search.plan(build, teacher.t[places], "teacher grid, by regression")

        def value(places: Indices) -> float:
            if len(predictions) > _MOST_PREDICTIONS:
                predictions.clear()
            return self.loss(at(places), samples, predictions)

        places = exchange(value, places, (shift,), lambda: self.allows(samples, plan))
        return value(places), Start(at(places), search)


def search_of(plan: Plan, method: str | Builder | None, teacher: Teacher, jumps: dict[tuple[Form, float | None], Jumps]) -> Search:
    """Return the plan with its builder for other times, if known.

    Raises
    ------
    ValueError
        If the given method builds another plan.
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
            return Search(plan, None, teacher, jumps)
        raise
    table = Table.of(plan)
    if again.c.shape == table.c.shape and np.allclose(again.c, table.c, 1e-6, 1e-9) and np.allclose(again.a, table.a, 1e-6, 1e-9):
        return Search(plan, build, teacher, jumps)
    if method is None:
        return Search(plan, None, teacher, jumps)
    raise ValueError(f"method={method!r} builds another plan than the one given on the same times; give the one it was made with")
