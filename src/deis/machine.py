"""The machine that runs every plan: three lines, the same whatever the states and the coefficients are; it knows nothing above it.

A coefficient is whatever `combine` multiplies a state by: a number, one number per sample or per frequency, or a block of a
matrix-valued diffusion. A state is whatever `combine` adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

State = TypeVar("State")
Combine = Callable[[Any, State, Sequence[Any], Sequence[State]], State]
"""(c_x, x, c_p, history) -> c_x x + sum_j c_p[j] history[j]; the history may be shorter than c_p."""
AddNoise = Callable[[Any, State], State]
"""(keep_z, x) -> x + keep_z z, with z new standard normal noise"""
Sum = tuple[tuple[Any, int], ...]
"""The terms (c, j) of a sum over the states (x, *history), without those of weight 0; c is None where it is 1."""


class Row(NamedTuple):
    """One row of a plan, see `deis.Plan`. It also serves as a noise level and, with arrays for numbers, as a pytree for scans."""

    t: Any
    alpha: Any
    sigma: Any
    keep_x: Any
    keep_p: Any
    keep_z: Any
    """0.0 or None where the row adds no noise."""
    next_x: Any
    """None where x is base."""
    next_p: Any
    guess: Any
    accepts: Any
    calls: Any


def terms(c_x: Any, c_p: Any, coefficient: Callable[[Any], Any] = lambda c: c) -> Sum:
    """Return the terms of c_x x + sum_j c_p[j] history[j], each c converted by `coefficient`."""
    return tuple((None if c == 1 else coefficient(c), j) for j, c in enumerate((c_x, *c_p)) if c != 0)


def with_sums(rows: Sequence[Row], coefficient: Callable[[Any], Any]) -> tuple[Row, ...]:
    """Return rows of numbers whose keep_x, next_x and guess are whole sums, for a `combine` that only adds these up."""

    def summed(row: Row) -> Row:
        sums = {"keep_x": (row.keep_x, row.keep_p), "next_x": (row.next_x, row.next_p), "guess": (row.guess, ())}
        made = row._replace(**{name: terms(*pair, coefficient) for name, pair in sums.items()}, keep_z=row.keep_z or None)
        return made._replace(next_x=None) if made.next_x == ((None, 0),) else made

    return tuple(summed(row) for row in rows)


def run_rows(
    rows: Sequence[Row],
    predict: Callable[[int, State], State],
    combine: Combine[State],
    x: State,
    observe: Callable[[int, State], Any] | None = None,
    add_noise: AddNoise[State] | None = None,
    history: tuple[State, ...] = (),
    base: State | None = None,
) -> State:
    """Run rows on x; see `deis.Plan` for the equations.

    `predict(i, x)` returns the prediction of row i, which calls, in the plan's form. `observe(i, x)` receives the state after row
    i. `history` holds the predictions of earlier rows, newest first, if there were any. `base` is x unless it is given.

    Raises
    ------
    ValueError
        If a row adds noise and `add_noise` is missing.
    """
    base = x if base is None else base
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
        If the row adds noise and `add_noise` is missing.
    """
    base = combine(row.keep_x, base, row.keep_p, history)
    if not (row.keep_z is None or (isinstance(row.keep_z, float) and row.keep_z == 0)):
        if add_noise is None:
            raise ValueError(f"the row at t={row.t!r} adds noise, keep_z={row.keep_z!r}, and add_noise is missing; give it")
        base = add_noise(row.keep_z, base)
    return base, base if row.next_x is None else combine(row.next_x, base, row.next_p, history)


def advance_group(
    rows: Sequence[Row],
    predict: Callable[[list[int], list[State]], Sequence[State]],
    base: State,
    x: State,
    history: tuple[State, ...],
    combine: Combine[State],
    unknown: State,
    add_noise: AddNoise[State] | None = None,
) -> tuple[State, list[State], tuple[State, ...]]:
    """Return base, the state after each row, and the history, after rows whose states depend on no evaluation among them.

    `predict(calls, states)` returns the predictions of the rows that call, all at once. Their states come from a first pass in
    which `unknown`, any state, stands in for these predictions, which have weight 0 there. Only the last row may add noise.
    """
    calls, states, ahead, known = [k for k, row in enumerate(rows) if row.calls], [x], base, history
    for row in rows[:-1]:
        known = (unknown if row.calls else guessed(row, states[-1], combine), *known)
        ahead, after = advance(row._replace(keep_z=None), ahead, known, combine)
        states.append(after)
    predictions = dict(zip(calls, predict(calls, [states[k] for k in calls]) if calls else (), strict=True))
    states = [x]
    for k, row in enumerate(rows):
        history = (predictions[k] if row.calls else guessed(row, states[-1], combine), *history)
        base, x = advance(row, base, history, combine, add_noise)
        history = history[: len(row.keep_p) - 1]
        states.append(x)
    return base, states[1:], history
