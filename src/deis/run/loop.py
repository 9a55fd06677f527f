"""A plan with all that running it needs but arrays, as a function to compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..backends.record import Backend
from ..foreign import is_jax
from ..model.predictions import Predictor, conversions
from ..plan import Plan
from . import told_for_plan
from .eager import run_eager
from .options import Options


@dataclass(frozen=True, eq=False)
class Loop:
    """A plan with all that running it needs but arrays: loop(x, rng, inputs) -> x_0."""

    plan: Plan
    model: Callable[..., Any]
    """The model, or if it takes inputs a function of them that returns one."""
    takes_inputs: bool
    predicts: str | None
    parallel: bool
    backend: Backend
    network_dtype: Any

    def __call__(self, x: Any, rng: Any, inputs: Any) -> Any:
        model, predicts, threshold = told_for_plan(
            self.model(inputs) if self.takes_inputs else self.model, self.plan, self.predicts
        )
        factors = conversions(self.plan, predicts, threshold is not None)
        predictor = Predictor(model, self.backend, self.network_dtype or x.dtype, threshold)
        parallel = self.parallel and self.plan.depth < self.plan.nfe
        options = Options(factors, rng, False, None, False, False, False, parallel)
        if is_jax(x):
            from .jax import run_jax

            return run_jax(self.plan, predictor, x, options)
        return run_eager(self.plan, predictor, x, options)
