"""The machine that runs every plan: three lines, the same whatever the arrays are. NumPy's executor is the specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .plan import Plan, Row

State = TypeVar("State")
Combine = Callable[[float, State, tuple[float, ...], tuple[State, ...]], State]
"""(c_x, x, c_p, history) -> c_x x + sum_j c_p[j] history[j]; the history may be shorter than c_p."""
AddNoise = Callable[[float, State], State]
"""(keep_z, x) -> x + keep_z z"""


def run_rows(
    plan: Plan,
    predict: Callable[[int, State], State],
    combine: Combine[State],
    x: State,
    observe: Callable[[int, State], Any] | None = None,
    add_noise: AddNoise[State] | None = None,
) -> State:
    """Run the plan's rows on x; see `Plan` for the equations.

    `predict(i, x)` returns the prediction of row i in the plan's form, `observe(i, x)` is told the state after row i, and only a
    stochastic plan asks for `add_noise`.
    """
    base: State = x
    history: tuple[State, ...] = ()
    for i, row in enumerate(plan.rows):
        history = (predict(i, x), *history)
        base, x = advance(row, base, history, combine, add_noise)
        history = history[: plan.window - 1]  # before the next evaluation, so that no more than W are ever held
        if observe is not None:
            observe(i, x)
    return x


def advance(
    row: Row, base: State, history: tuple[State, ...], combine: Combine[State], add_noise: AddNoise[State] | None = None
) -> tuple[State, State]:
    """Return base and x after a row, whose prediction is the newest of the history."""
    base = combine(row.keep_x, base, row.keep_p, history)
    if row.keep_z != 0 and add_noise is not None:
        base = add_noise(row.keep_z, base)
    return base, combine(row.next_x, base, row.next_p, history)
