"""Where the states of a plan with matrices or frequencies live, and what its coefficients do to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..backends.record import Backend
from ..machine import Combine, Row
from ..model.predictions import SAME, Predictor
from .dct import from_frequencies, to_frequencies
from .plan import LinearPlan


@dataclass(frozen=True)
class Space:
    """Where the states live.

    Attributes
    ----------
    backend : Backend
    axes : int
        How many of the last axes are transformed to frequencies; 0 for blocks.
    enter, leave : callables
        From the states that the model knows to those that the plan combines, and back.
    samples : callable
        samples(x) -> an array with the batch in front.
    """

    backend: Backend
    axes: int
    enter: Callable[[Any], Any]
    leave: Callable[[Any], Any]
    samples: Callable[[Any], Any]

    def prediction(self, predictor: Predictor, x: Any, t: Any, level: Any) -> Any:
        """Return the network's output at a state, as one; `prediction` of the predictor sees that it owns its memory."""
        seen = self.leave(x)
        return self.enter(predictor.prediction(predictor.output(seen, t, level), seen, SAME))


def space_of(plan: LinearPlan, backend: Backend) -> Space:
    """Return the space of a plan's basis: the states as they are, or their frequencies."""
    axes = len(plan.shape)
    if plan.basis == "block":
        return Space(backend, 0, _same, _same, lambda x: x[0])
    return Space(backend, axes, lambda x: to_frequencies(x, axes), lambda x: from_frequencies(x, axes), _same)


def _same(x: Any) -> Any:
    return x


def flat_rows(plan: LinearPlan) -> list[Row]:
    """Return the rows in NumPy, where c_x of blocks holds the coefficients of a whole sum side by side, and c_p no more than W."""
    if plan.basis == "dct":
        return list(plan.rows)

    def beside(c_x: Any, c_p: Any) -> Any:
        return None if c_x is None else np.hstack([c_x, *c_p])

    none = (None,) * plan.window
    return [
        row._replace(keep_x=beside(row.keep_x, row.keep_p), keep_p=none, next_x=beside(row.next_x, row.next_p), next_p=none)
        for row in plan.rows
    ]


def combine_of(plan: LinearPlan, backend: Backend) -> Combine[Any]:
    """Return the `combine` of `flat_rows`, for coefficients in arrays of the framework."""
    if plan.basis == "dct":
        return combine_frequencies

    def combine(c_x: Any, x: Any, c_p: Any, history: Sequence[Any]) -> Any:
        first, *others = _blocks(x, history)
        return backend.xp.stack([backend.combine(c[0], first, c[1:], others) for c in c_x])

    return combine


def combine_frequencies(c_x: Any, x: Any, c_p: Sequence[Any], history: Sequence[Any]) -> Any:
    """Return c_x x + sum_j c_p[j] history[j], number by number."""
    return sum((c * p for c, p in zip(c_p, history, strict=False)), c_x * x)


class _Table(NamedTuple):
    rows: list[Row]


def prepared_blocks(plan: LinearPlan, backend: Backend, dtype: Any) -> tuple[list[Row], Combine[Any]]:
    """Return the rows of a plan of blocks, and a `combine` for them, as they cost least: the sums of a scalar plan each."""
    flat = flat_rows(plan)

    def line(row: Row, r: int) -> Row:
        """Row r of the matrices beside each other, as a row of numbers for the state (x, *history) of single blocks."""
        keep, next_ = row.keep_x[r].tolist(), [1.0] if row.next_x is None else row.next_x[r].tolist()
        return row._replace(keep_x=keep[0], keep_p=keep[1:], next_x=next_[0], next_p=next_[1:], guess=0.0)

    made = [backend.prepared(_Table([line(row, r) for row in flat]), dtype) for r in range(plan.shape[0])]
    add_up = made[0][1]
    rows = []
    for row, *lines in zip(flat, *(lines for lines, _ in made), strict=True):
        after = None if row.next_x is None else tuple(((None, 0),) if one.next_x is None else one.next_x for one in lines)
        rows.append(row._replace(keep_x=tuple(one.keep_x for one in lines), next_x=after))

    def combine(c_x: Any, x: Any, c_p: Any, history: Sequence[Any]) -> Any:
        first, *others = _blocks(x, history)
        return backend.xp.stack([add_up(total, first, (), others) for total in c_x])

    return rows, combine


def _blocks(x: Any, history: Sequence[Any]) -> list[Any]:
    return [block for state in (x, *history) for block in state]
