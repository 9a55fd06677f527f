"""How far the final states of a plan are from the teacher's: the samples' losses, by which stages are judged, and the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..arguments import array
from ..arrays import Array
from ..backends import backend_of, like
from ..backends.numpy import combine
from ..machine import advance
from ..plan import Plan
from .network import Network, Student, rmse
from .table import Table
from .teacher import Teacher

Loss = Literal["robust", "huber", "l1", "l2"] | Callable[[Any, Any], Any]
LOSSES = ("robust", "huber", "l1", "l2")


def sample_losses(loss: Loss, x: Any, target: Any, c: float) -> Any:
    """Return the loss of each sample, shape (N,), for arrays of any framework.

    With e the root mean square of x - target in a sample: "l2" is e^2, "huber" the pseudo-Huber sqrt(e^2 + c^2) - c, "robust"
    log(e^2 + c^2), and "l1" the mean of |x - target|.
    """
    if callable(loss):
        return loss(x, target)
    xp, d = backend_of(x).xp, (x - target).reshape(len(x), -1)
    if loss == "l1":
        return abs(d).mean(1)
    square = (d * d).mean(1)
    if loss == "l2":
        return square
    return xp.log(square + c**2) if loss == "robust" else xp.sqrt(square + c**2) - c


C = 0.1
"""The constant c of the judge, relative to the median error of the best plan to start from. Fitted plans have some third of that
error, so that this is the fits' own 0.3 of the median for the plans that are hardest to tell apart."""
_EXACT = 1e-12  # errors below are rounding


@dataclass(frozen=True)
class Verdict:
    """The median error of the validation samples, and the loss of each: log(e^2 + c^2), or that of the caller's function."""

    error: float
    losses: Array

    @property
    def loss(self) -> float:
        """The mean loss."""
        return float(self.losses.mean())

    def standard_error(self, other: Verdict) -> float:
        """Return the standard error of the mean difference to another plan's losses of the same samples."""
        return float((self.losses - other.losses).std(ddof=1) / np.sqrt(len(self.losses)))


@dataclass(frozen=True)
class Judge:
    """Compares the plans of one calibration, all on the same samples and with the same c."""

    teacher: Teacher
    first: int
    """The first of the validation samples."""
    loss: Loss
    c: float = 1.0

    @classmethod
    def of(cls, teacher: Teacher, first: int, loss: Loss, ends: Sequence[Array]) -> Judge:
        """Return the judge of a calibration that starts from plans with these final states."""
        judge = cls(teacher, first, loss)
        least = np.inf if callable(loss) else min(judge.of_ends(end).error for end in ends)
        return replace(judge, c=max(C * least, _EXACT)) if np.isfinite(least) else judge

    def of_plan(self, plan: Plan) -> Verdict:
        """Run a plan on the samples, and judge the final states."""
        return self.of_ends(end_of(self.teacher, plan, self.first))

    def of_ends(self, end: Array) -> Verdict:
        """Judge the final states of the samples."""
        target, network = self.teacher.end[self.first :], self.teacher.network
        if not np.isfinite(end).all():
            return Verdict(np.inf, np.full(len(end), np.inf))
        losses = _losses(self.loss, network, end, target, self.c)
        return Verdict(float(np.median(losses if callable(self.loss) else rmse(end, target))), losses)


def end_of(teacher: Teacher, plan: Plan, first: int) -> Array:
    """Return the final states of the samples from `first` on; the teacher's first prediction is reused if the plan begins alike."""
    student, table = Student(teacher.network, plan), Table.of(plan)
    x, p = student.network.numpy()[first:], first_prediction(teacher, plan)
    if p is None:
        return student.run(table, x, first)
    history = (p[first:],)
    return student.run(table, advance(table.rows[0], x, history, combine)[1], first, 1, history)


def first_prediction(teacher: Teacher, plan: Plan) -> Array | None:
    """Return the predictions at the initial noise, which the teacher has for every sample; None if the plan begins otherwise."""
    return teacher.prediction(0, plan.form) if plan.calls[0] and plan.t[0] == teacher.t[0] else None


def robust(error: Array, c: float) -> Array:
    """Return log(e^2 + c^2)."""
    return np.log(error**2 + c**2)


def measured(student: Student, table: Table, teacher: Teacher, first: int, loss: Loss, c: float) -> float:
    """Return the mean loss of the samples from `first` on."""
    x = student.run(table, student.network.numpy()[first:], first)
    return float(_losses(loss, student.network, x, teacher.end[first:], c).mean()) if np.isfinite(x).all() else float("inf")


def _losses(loss: Loss, network: Network, end: Array, target: Array, c: float) -> Array:
    """Return the loss of each sample; the caller's function gets arrays of the model's framework."""
    if not callable(loss):
        return robust(rmse(end, target), c)
    losses = array("the result of loss(x_0, target)", loss(*(like(v, network.x_T) for v in (end, target))))
    if losses.shape != (len(end),):
        raise ValueError(f"loss(x_0, target) must return one number per sample, shape ({len(end)},), and has shape {losses.shape}")
    return losses
