"""One batch whose samples have a plan each: `deis.sample` of a sequence of plans."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..foreign import is_jax
from ..model.predictions import Predictor
from ..plan import Plan
from ..sde import Schedule
from .plans import check_factors, check_plan, check_schedule_of
from .underway import Request, UnderWay


def check_several(plans: Sequence[Any], x: Any) -> None:
    """Check that there is a plan for each sample.

    Raises
    ------
    TypeError
        If one of them is not a plan.
    ValueError
        If there are not as many plans as samples, or one begins with two states.
    """
    for i, plan in enumerate(plans):
        check_plan(f"plan[{i}]", plan)
    if len(plans) != len(x):
        raise ValueError(f"plan must have one plan a sample: there are {len(plans)} for x_T of shape {tuple(x.shape)}")


def check_together(plans: Sequence[Plan], predicts: str, thresholds: bool, sde: Schedule | None, rng: Any) -> None:
    """Check that plans can be run in one batch.

    Raises
    ------
    ValueError
        If they have different schedules, the form of one is not determined, or one is stochastic and rng is missing.
    """
    for i, plan in enumerate(plans):
        check_factors(f"plan[{i}]", plan, predicts, thresholds)
        check_schedule_of(f"plan[{i}]", plan, plans[0], sde)
        if plan.stochastic and rng is None:
            raise ValueError(
                f"plan[{i}], {plan.method!r}, adds noise and rng is missing; give a torch.Generator, a jax.random key or a "
                "numpy.random.Generator, like x_T, or one per sample"
            )


def run_several(
    plans: Sequence[Plan], predictor: Predictor, predicts: str, x_T: Any, rng: Any, check_finite: bool, grad: bool
) -> Any:
    """Run a plan for each sample, on its device; see `deis.sample`."""
    if is_jax(x_T):
        from .jax_several import run_jax_several

        return run_jax_several(plans, predictor, predicts, x_T, rng, check_finite)
    backend, batch = predictor.backend, len(x_T)
    rngs = backend.split(rng, batch) if any(plan.stochastic for plan in plans) else None
    requests = [
        Request(plan, 1, i, backend.noise(rngs[i : i + 1], 1) if plan.stochastic and rngs is not None else None)
        for i, plan in enumerate(plans)
    ]
    done: dict[int, Any] = {}
    with nullcontext() if grad else backend.no_grad():
        way = UnderWay(backend, predicts, predictor.threshold is not None)
        way.enter(requests, backend.cast(x_T, backend.carry(x_T.dtype)))
        while True:
            way.settle()
            done |= {request.name: x for request, x in way.leave()}
            if not way.requests:
                break
            way.evaluate(predictor, np.array([request.name for request in way.requests]), batch, check_finite)
        return backend.cast(backend.xp.concatenate([done[i] for i in range(batch)]), x_T.dtype)
