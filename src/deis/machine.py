"""The machine that runs every plan: three lines, the same whatever the arrays are. NumPy's executor is the specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .plan import Plan

State = TypeVar("State")


def run_rows(
    plan: Plan,
    predict: Callable[[int, State], State],
    combine: Callable[[float, State, tuple[float, ...], tuple[State, ...]], State],
    x: State,
    observe: Callable[[int, State], Any] | None = None,
    add_noise: Callable[[float, State], State] | None = None,
) -> State:
    """Run the plan's rows on x; see `Plan` for the equations.

    `predict(i, x)` returns the prediction of row i in the plan's form, `combine(c_x, x, c_p, history)` the linear combination
    c_x x + sum_j c_p[j] history[j] (the history may be shorter than c_p), `observe(i, x)` is told the state after row i, and
    `add_noise(keep_z, x)` returns x + keep_z z, which only a stochastic plan asks for.
    """
    base: State = x
    history: tuple[State, ...] = ()
    for i, row in enumerate(plan.rows):
        history = (predict(i, x), *history)
        base = combine(row.keep_x, base, row.keep_p, history)
        if row.keep_z != 0 and add_noise is not None:
            base = add_noise(row.keep_z, base)
        x = combine(row.next_x, base, row.next_p, history)
        history = history[: plan.window - 1]  # before the next evaluation, so that no more than W are ever held
        if observe is not None:
            observe(i, x)
    return x
