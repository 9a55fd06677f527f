"""The executor of frameworks that compute at once, NumPy (the specification) and torch: no step waits for the device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ..machine import run_rows
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
    output, copy, factors, check_finite = predictor.outputs(), backend.copy, options.factors, options.check_finite

    def predict(i: int, x: Any) -> Any:
        m = output(x, times[i], rows[i])
        if check_finite and not bool(backend.xp.isfinite(m).all()):
            raise not_finite(i, plan)
        return copy(m) if factors[i] is SAME and m.dtype is carry else predictor.prediction(m, x, factors[i])

    with nullcontext() if options.grad else backend.no_grad():
        keep = [backend.cast(x_T, carry)]
        x = run_rows(rows, predict, combine, keep[0], observer(plan, options, keep), add_noise)
        return backend.cast(backend.xp.stack(keep) if options.trajectory else x, x_T.dtype)
