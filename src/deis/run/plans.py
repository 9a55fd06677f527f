"""Samples of one batch that follow plans of their own: the plans' rows as arrays, and which of them go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arguments import kind
from ..arrays import Array, Flags, Indices
from ..machine import Row
from ..model.predictions import conversions
from ..plan import Plan
from ..sde import Schedule

KEEP_Z, GUESS, FACTORS = 3, 4, 5
"""The places of columns in `numbers_of`; before them are t, alpha and sigma."""


def numbers_of(plan: Plan, predicts: str, thresholds: bool, window: int) -> Array:
    """Return the rows of a plan as an array of shape (rows, columns), padded with zeros to a window that may exceed the plan's.

    The columns are t, alpha, sigma, keep_z, guess, the factors of `conversions`, keep_x, keep_p, next_x and next_p.
    """
    n = len(plan.keep_x)
    factors = np.array(conversions(plan, predicts, thresholds))
    pad = np.zeros((n, window - plan.window))
    level = (plan.t[:n], plan.alpha[:n], plan.sigma[:n])
    return np.column_stack([*level, plan.keep_z, plan.guess, factors, plan.keep_x, plan.keep_p, pad, plan.next_x, plan.next_p, pad])


def row_of(columns: Any, window: int) -> tuple[Row, Any]:
    """Return columns of `numbers_of`, one number per sample each, as a row for `combine`, and the factors of its predictions."""
    t, alpha, sigma, keep_z, guess = columns[:FACTORS]
    keep, next_ = columns[-2 - 2 * window : -1 - window], columns[-1 - window :]
    row = Row(t, alpha, sigma, keep[0], keep[1:], keep_z, next_[0], next_[1:], guess, True, True)
    return row, columns[FACTORS : -2 - 2 * window]


def rounds_of(plans: Sequence[Plan]) -> tuple[Indices, Flags, Flags]:
    """Return the row of each sample in each round and whether the sample moves, and for each round whether it calls.

    A round without a call moves the samples whose row makes none. The next call then evaluates all samples that are not finished.
    A sample that does not move keeps the number of its current row, or of the last row that it called.
    """
    at, ends = np.zeros(len(plans), dtype=np.intp), np.array([len(plan.rows) for plan in plans])
    last = np.array([np.flatnonzero(plan.calls)[-1] for plan in plans])
    rows, moves, calls = [], [], []
    while (left := at < ends).any():
        now = np.where(left, at, last)
        waits = np.array([plan.calls[i] for plan, i in zip(plans, now.tolist(), strict=True)])
        quiet = left & ~waits
        rows.append(now)
        moves.append(quiet if quiet.any() else left)
        calls.append(not quiet.any())
        at = at + moves[-1]
    return np.stack(rows), np.stack(moves), np.array(calls)


def check_plan(argument: str, plan: Any) -> None:
    """Check that a sample may follow a plan.

    Raises
    ------
    TypeError
        If it is not a plan.
    ValueError
        If it begins with two states.
    """
    kind(argument, plan, Plan, "a deis.Plan, as deis.make_plan returns,")
    if plan.pair:
        raise ValueError(
            f"{argument}, the plan {plan.method!r}, begins with two states; give the one that it was made of to deis.invert"
        )


def check_schedule_of(argument: str, plan: Plan, first: Plan, sde: Schedule | None) -> None:
    """Check that a plan has the schedule of another plan, or the model's if the model has one that the other plan matches.

    Plans carry the name of their schedule and its levels at their own times. These decide if the model has no schedule.

    Raises
    ------
    ValueError
        If it has another schedule.
    """
    if plan is first:
        return
    if sde is not None and (first.matches(sde) or plan.matches(sde)):
        alike = first.matches(sde) and plan.matches(sde)
    else:
        alike = plan.schedule == first.schedule and _levels_agree(plan, first)
    if not alike:
        raise ValueError(
            f"{argument}, the plan {plan.method!r}, was made for the schedule {plan.schedule!r}, and others here for "
            f"{first.schedule!r}; one call of the network can serve only one schedule: run the plans of each separately"
        )


def _levels_agree(plan: Plan, other: Plan) -> bool:
    """Return whether two plans have the same levels where they have the same times."""
    _, here, there = np.intersect1d(plan.t, other.t, return_indices=True)
    pairs = ((plan.alpha[here], other.alpha[there]), (plan.sigma[here], other.sigma[there]))
    return all(np.allclose(a, b, 1e-6, 1e-9) for a, b in pairs)


def check_factors(argument: str, plan: Plan, predicts: str, thresholds: bool) -> None:
    """Raise ValueError, which names the argument, if what the network predicts does not determine the plan's form."""
    try:
        conversions(plan, predicts, thresholds)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None
