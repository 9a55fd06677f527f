"""RePaint's resampling as a plan: every step is made several times, with a jump back by the forward diffusion between.

A jump is an ordinary row that makes no call and adds noise, so every executor can run it, and `nfe` still counts the calls. After
a jump, the earlier predictions belong to another trajectory, and a polynomial through old and new ones would not converge. So each
further pass begins like a cut plan, with a step of first order, and the next step continues from the last pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .arrays import Array
from .cut import from_row, made_again
from .machine import Row
from .plan import Plan
from .sde import Schedule


def resampled(plan: Plan, sde: Schedule, passes: int) -> Plan:
    """Return the plan that makes each step but the last `passes` times (Lugmayr et al., arXiv 2201.09865, algorithm 1).

    Raises
    ------
    UserWarning
        If the plan is a calibrated one. It is replaced by "auto" with as many evaluations per pass; see `deis.cut_plan`.
    ValueError
        If a pass makes evaluations for the next step, which a jump would waste.
    """
    if passes == 1 or plan.num_step == 1:
        return plan
    if plan.provenance:
        plan = made_again(plan, sde)
    rows = _rows(plan, passes)
    columns: dict[str, Any] = {name: np.array([getattr(row, name) for row in rows]) for name in Row._fields}
    for name in ("t", "alpha", "sigma"):
        columns[name] = np.append(columns[name], getattr(plan, name)[-1])
    try:
        return replace(plan, **columns, method=f"{plan.method}, {passes} passes a step")
    except ValueError as error:
        raise ValueError(f"the plan {plan.method!r} cannot be resampled ({error}); give resample=1, or another method") from None


def _rows(plan: Plan, passes: int) -> list[Row]:
    """Return the rows of all passes."""
    stops = (np.flatnonzero(plan.accepts) + 1).tolist()
    starts = [0, *stops[:-1]]
    part, before, rows = plan, 0, list[Row]()  # part: the plan being followed, without the first `before` rows of the whole one
    for start, stop in zip(starts, stops, strict=True):
        step = part.rows[start - before : stop - before]
        if stop < stops[-1]:
            part, before = from_row(plan, start), start
            again = part.rows[: stop - start]
            for made in (step, *[again] * (passes - 2)):
                rows += [*made[:-1], made[-1]._replace(accepts=False), _jump(plan, made[-1], start, stop)]
            step = again
        rows += step
    width = max(len(row.keep_p) for row in rows)
    return [row._replace(keep_p=_wide(row.keep_p, width), next_p=_wide(row.next_p, width)) for row in rows]


def _jump(plan: Plan, last: Row, start: int, stop: int) -> Row:
    """Return the row after the last one of a step, which adds the noise of the forward diffusion from its end to its start.

    The state is x = next_x base + sum_j next_p[j] p_j of that last row, with the machine's own base.
    """
    ratio = float(plan.alpha[start] / plan.alpha[stop])
    keep_z = float(np.sqrt(max(plan.sigma[start] ** 2 - (ratio * plan.sigma[stop]) ** 2, 0.0)))
    keep_p = (0.0, *(ratio * weight for weight in last.next_p))
    t, alpha, sigma = (float(values[stop]) for values in (plan.t, plan.alpha, plan.sigma))
    return Row(
        t, alpha, sigma, keep_x=ratio * last.next_x, keep_p=keep_p if any(keep_p) else (0.0,), keep_z=keep_z,
        next_x=1.0, next_p=(0.0,), guess=0.0, accepts=False, calls=False,
    )  # fmt: skip


def _wide(weights: tuple[float, ...], width: int) -> Array:
    return np.pad(weights, (0, width - len(weights)))
