"""How far the ends of a plan are from the teacher's: the error by which every stage is judged, and the losses of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ..arguments import array
from ..backends import backend_of, like
from .network import Student, rmse
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


def measured(student: Student, table: Table, teacher: Teacher, first: int, loss: Loss) -> float:
    """Return the error of the samples from `first` on: the median of their differences, or of the losses of a function."""
    x = student.run(table, student.network.numpy()[first:], first)
    if not np.isfinite(x).all():
        return float("inf")
    if not callable(loss):
        return float(np.median(rmse(x, teacher.end[first:])))
    ends = (like(v, student.network.x_T) for v in (x, teacher.end[first:]))
    return float(np.median(array("the result of loss(x_0, target)", loss(*ends))))
