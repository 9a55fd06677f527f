"""The executor of frameworks that compute at once, NumPy (the specification) and torch: no step waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

from ..backends.record import AddNoise
from ..machine import advance_group, run_rows
from ..model.predictions import SAME, Predictor
from ..plan import Plan
from .options import Options, not_finite, observer


def run_eager(plan: Plan, predictor: Predictor, x_T: Any, options: Options) -> Any:
    """Run a plan on an array, on its device; see `deis.sample`."""
    backend = predictor.backend
    carry = backend.carry(x_T.dtype)
    times = [*backend.full(x_T, [row.t for row in plan.rows], carry, plan.discrete)]
    rows, combine = plan.once(backend.prepared, carry)
    add_noise = backend.noise(options.rng, len(x_T)) if plan.stochastic else None
    output, copy, factors, check_finite = predictor.evaluator(), backend.copy, options.factors, options.check_finite

    def predict(i: int, x: Any) -> Any:
        m = output(x, times[i], rows[i])
        if check_finite and not bool(backend.xp.isfinite(m).all()):
            raise not_finite(i, plan)
        return copy(m) if factors[i] is SAME and m.dtype is carry else predictor.prediction(m, x, factors[i])

    with nullcontext() if options.grad else backend.no_grad():
        keep = [backend.cast(x_T, carry)]
        observe = observer(plan, options, keep)
        if options.parallel:
            x = _run_groups(plan, predictor, keep[0], options, observe, add_noise)
        else:
            base = None if options.base is None else backend.cast(options.base, carry)
            x = run_rows(rows, predict, combine, keep[0], observe, add_noise, base=base)
        return backend.cast(backend.xp.stack(keep) if options.trajectory else x, x_T.dtype)


def _run_groups(
    plan: Plan,
    predictor: Predictor,
    x: Any,
    options: Options,
    observe: Callable[[int, Any], None] | None,
    add_noise: AddNoise | None,
) -> Any:
    """Run a plan group by group, with one call for each."""
    backend = predictor.backend
    rows, combine = plan.once(backend.prepared, backend.carry(x.dtype))
    calling, place = [row for row in plan.rows if row.calls], list(accumulate(row.calls for row in plan.rows))
    times = backend.full(x, [row.t for row in calling], x.dtype, plan.discrete)
    levels = [backend.full(x, values, x.dtype, False) for values in zip(*(row[:3] for row in calling), strict=True)]

    def predict(calls: list[int], states: list[Any]) -> list[Any]:
        numbers = [group[k] for k in calls]
        now = slice(place[numbers[0]] - 1, place[numbers[-1]])
        outputs = predictor.outputs(states, times[now], [level[now] for level in levels], calling[now])
        for i, m in zip(numbers, outputs, strict=True):
            if options.check_finite and not bool(backend.xp.isfinite(m).all()):
                raise not_finite(i, plan)
        return [predictor.prediction(m, x, options.factors[i]) for i, m, x in zip(numbers, outputs, states, strict=True)]

    base: Any = x
    history: tuple[Any, ...] = ()
    for group in plan.groups:
        group_rows = rows[group.start : group.stop]
        base, after, history = advance_group(group_rows, predict, base, x, history, combine, x, add_noise)
        x = after[-1]
        for i, state in zip(group, after, strict=True):
            if observe is not None:
                observe(i, state)
    return x
