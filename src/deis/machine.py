"""The machine that runs every plan: three lines, the same whatever the states and the coefficients are; it knows nothing above it.

A coefficient is whatever `combine` multiplies a state by: a number, one a sample, a block of a matrix-valued diffusion, or one a
frequency. A state is whatever `combine` adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

State = TypeVar("State")
Combine = Callable[[Any, State, Sequence[Any], Sequence[State]], State]
"""(c_x, x, c_p, history) -> c_x x + sum_j c_p[j] history[j]; the history may be shorter than c_p."""
AddNoise = Callable[[Any, State], State]
"""(keep_z, x) -> x + keep_z z, with z new standard normal noise"""


class Row(NamedTuple):
    """One row of a plan, see `deis.Plan`; also a noise level, and with arrays for numbers a pytree that JAX scans."""

    t: Any
    alpha: Any
    sigma: Any
    keep_x: Any
    keep_p: Any
    keep_z: Any
    """0.0 or None where the row adds no noise."""
    next_x: Any
    next_p: Any
    guess: Any
    accepts: Any
    calls: Any


def run_rows(
    rows: Sequence[Row],
    predict: Callable[[int, State], State],
    combine: Combine[State],
    x: State,
    observe: Callable[[int, State], Any] | None = None,
    add_noise: AddNoise[State] | None = None,
    history: tuple[State, ...] = (),
) -> State:
    """Run rows on x; see `deis.Plan` for the equations.

    `predict(i, x)` returns the prediction of row i, which calls, in the plan's form; `observe(i, x)` is told the state after row i;
    `history` holds the predictions of rows before these, newest first, where there were some.

    Raises
    ------
    ValueError
        Where a row adds noise and `add_noise` is missing.
    """
    base: State = x
    window = len(rows[0].keep_p)
    for i, row in enumerate(rows):
        history = (predict(i, x) if row.calls else guessed(row, x, combine), *history)
        base, x = advance(row, base, history, combine, add_noise)
        history = history[: window - 1]  # before the next evaluation, so that no more than W are ever held
        if observe is not None:
            observe(i, x)
    return x


def guessed(row: Row, x: State, combine: Combine[State]) -> State:
    """Return the prediction of a row without a call, a known multiple of x."""
    return combine(row.guess, x, (), ())


def advance(
    row: Row, base: State, history: Sequence[State], combine: Combine[State], add_noise: AddNoise[State] | None = None
) -> tuple[State, State]:
    """Return base and x after a row, whose prediction is the newest of the history.

    Raises
    ------
    ValueError
        Where the row adds noise and `add_noise` is missing.
    """
    base = combine(row.keep_x, base, row.keep_p, history)
    if not (row.keep_z is None or (isinstance(row.keep_z, float) and row.keep_z == 0)):
        if add_noise is None:
            raise ValueError(f"the row at t={row.t!r} adds noise, keep_z={row.keep_z!r}, and add_noise is missing; give it")
        base = add_noise(row.keep_z, base)
    return base, combine(row.next_x, base, row.next_p, history)
