"""What a plan checks of its own table when it is made, column by column and as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .arguments import one_of, shown
from .arrays import AnyArray, Array, Indices
from .backends.numpy import combine
from .machine import run_rows
from .plan_file import FLAGS, TABLES

_TEXTS = ("form", "method", "grid", "schedule", "fitted")
_DEEPEST = 100


def check_shapes(plan: Any) -> None:
    """Raise ValueError if a column has another shape than the others ask for, or a number is not finite, or a text is none."""
    for name, ndim in TABLES.items():
        values = getattr(plan, name)
        if values.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimension(s), and has shape {values.shape}")
    if plan.t.size and plan.t[-1] > plan.t[0] and (plan.keep_z != 0).any():
        raise ValueError(
            f"the plan {plan.method!r} rises from t={plan.t[0].item()!r} to {plan.t[-1].item()!r} and adds noise; from data to "
            "noise a plan must be deterministic: use a method without noise, such as 'tab3', or eta=0 or tau=0"
        )
    for name in TABLES:
        values = getattr(plan, name)
        if not np.isfinite(values).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(f"{name}{list(place)}={values[place].item()!r} must be finite")
    n, window = plan.keep_p.shape
    if n < 1 or window < 1:
        raise ValueError(f"keep_p must have at least one row and one column, and has shape {plan.keep_p.shape}")
    shapes: dict[str, tuple[int, ...]] = {"t": (n + 1,), "alpha": (n + 1,), "sigma": (n + 1,), "next_p": (n, window)}
    for name, shape in (shapes | dict.fromkeys(("keep_x", "keep_z", "next_x", "guess"), (n,))).items():
        if getattr(plan, name).shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} beside keep_p of {plan.keep_p.shape}, and has {getattr(plan, name).shape}"
            )
    one_of("form", plan.form, ("eps", "data"))
    if not isinstance(plan.discrete, bool):
        raise ValueError(f"discrete={shown(plan.discrete)} must be True or False")
    for name in _TEXTS:
        if not isinstance(getattr(plan, name), str):
            raise ValueError(f"{name}={shown(getattr(plan, name))} must be a string")


def check_flags(plan: Any) -> None:
    """Raise ValueError if the flags are not bool, no row calls, a row that calls guesses too, or the last reaches no state."""
    for name in FLAGS:
        flags = getattr(plan, name)
        if flags.dtype != np.bool_ or flags.shape != plan.keep_x.shape:
            raise ValueError(f"{name} must be bool of shape {plan.keep_x.shape}, and is {flags.dtype} of shape {flags.shape}")
    if not plan.calls.any():
        raise ValueError("calls is False in every row: a plan must evaluate the network at least once")
    if (plan.guess[plan.calls] != 0).any():
        raise ValueError(f"guess={plan.guess.tolist()} must be 0 in every row that calls the network")
    if not plan.accepts[-1]:
        raise ValueError("accepts is False in the last row, which must reach a state: its keep_x is 1 and its keep_p is 0")


def check_times(plan: Any) -> None:
    """Raise ValueError if the times turn back, go against the noise, or the form has no meaning at the start."""
    if not ((plan.alpha >= 0) & (plan.sigma >= 0) & (plan.alpha + plan.sigma > 0)).all():
        raise ValueError("alpha and sigma must be at least 0, and not both 0 at one time")
    step: Indices = np.cumsum(plan.accepts) - plan.accepts  # of each row
    rises = plan.direction == "encode"
    if rises != bool(plan.sigma[-1] * plan.alpha[0] > plan.sigma[0] * plan.alpha[-1]):
        raise ValueError(
            f"t must {'decrease' if rises else 'increase'} as sigma/alpha does, and runs from {plan.t[0].item()!r} to "
            f"{plan.t[-1].item()!r}; schedules have more noise at later times"
        )
    t, ts = (-plan.t, -plan.ts) if rises else (plan.t, plan.ts)
    within = t[:-1] >= ts[np.minimum(step + 2, plan.num_step)]
    if not plan.stochastic:  # noise may raise the time within a step
        within &= t[:-1] <= ts[step]
    if not (np.diff(ts) < 0).all():
        raise ValueError(f"t must {'increase' if rises else 'decrease'} from step to step, and the steps are at {plan.ts.tolist()}")
    if not within.all():
        raise ValueError(f"t of every stage must lie within its step or the next, and t is {plan.t.tolist()}")
    if plan.discrete and (plan.t != np.rint(plan.t)).any():
        raise ValueError(f"t must be whole numbers in a discrete plan, and is {plan.t.tolist()}")
    first = int(plan.pair)  # a pair only passes through its first state, so the form needs no meaning there
    start = plan.t[first].item()
    for form, other, level in (("eps", "data", "alpha"), ("data", "eps", "sigma")):
        if plan.form == form and getattr(plan, level)[first] == 0:
            raise ValueError(f"form={form!r} has no meaning where {level} is 0, at t={start!r}; use form={other!r}, or start later")


def check_use(plan: Any) -> None:
    """Raise ValueError if a row uses a prediction from before the first, or makes one that nothing uses."""
    n, window = plan.keep_p.shape
    weight = (plan.keep_p != 0) | (plan.next_p != 0)
    for i in range(n):
        if weight[i, i + 1 :].any():
            raise ValueError(
                f"row {i} uses a prediction from before the first: it has {i + 1}, and the weights {plan.keep_p[i].tolist()}"
            )
        if plan.calls[i] and not any(weight[i + j, j] for j in range(min(window, n - i))):
            raise ValueError(f"row {i} wastes an evaluation: no row gives the prediction at t={plan.t[i].item()!r} any weight")


def check_transport(plan: Any) -> None:
    """Run the table on x = alpha x_0 + sigma eps for constant x_0 and eps, as (alpha, sigma). Every consistent method is exact."""
    exact = np.stack([plan.alpha, plan.sigma], axis=1)
    # A polynomial far outside its nodes has weights in the millions. Their rounding is not an inconsistency.
    weight = np.maximum.accumulate(np.abs(plan.keep_p).sum(axis=1) + np.abs(plan.next_p).sum(axis=1))
    for past in {bool((plan.guess == 1).any()), False}:  # a guess of 1 may mean x itself, or a guess at p
        states = _transported(plan, exact, past)
        with np.errstate(all="ignore"):
            error = np.abs(states - exact[1:]) / exact.max(axis=0)
        wrong = ~(error.max(axis=1) < 1e-9 + 1e-13 * weight)
        if not wrong.any():
            break
    else:
        i = int(np.argmax(wrong))
        raise ValueError(
            f"row {i} is inconsistent: from alpha x_0 + sigma eps it goes to {states[i].tolist()} instead of "
            f"(alpha, sigma)={exact[i + 1].tolist()} at t={plan.t[i + 1].item()!r}; check keep_x, keep_p, keep_z, next_x and next_p"
        )


def _transported(plan: Any, exact: Array, past: bool) -> Array:
    """Return the states after each row. Guesses stand for the prediction; with `past`, guesses of 1 stand for x itself."""
    states: list[Array] = []
    p = np.array([0.0, 1.0]) if plan.form == "eps" else np.array([1.0, 0.0])

    def add_noise(keep_z: float, x: Array) -> Array:
        return np.array([x[0], np.hypot(x[1], keep_z)])

    rows = [row._replace(calls=not (past and row.guess == 1)) for row in plan.rows]
    base = exact[1] if plan.pair else None
    with np.errstate(all="ignore"):
        run_rows(rows, lambda i, x: p, combine, exact[0], lambda i, x: states.append(x), add_noise, base=base)
    return np.stack(states)


def as_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of what JSON can hold, not nested too deep for later readers and writers."""
    try:
        copy = json.loads(json.dumps(provenance, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"provenance must hold what JSON can, and does not ({error})") from None
    if not isinstance(copy, dict):
        raise ValueError(f"provenance={shown(provenance)} must be a mapping of names")
    level, depth = [copy], 0
    while level:
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
        level, depth = [part for part in level if isinstance(part, dict | list)], depth + 1
    if depth > _DEEPEST:
        raise ValueError(f"provenance={shown(provenance)} is nested {depth} deep; at most {_DEEPEST} can be kept")
    return copy


def as_flags(name: str, values: Any) -> AnyArray:
    """Return flags as an array of their own; TypeError if they are no array."""
    try:
        return np.asarray(values).copy()
    except ValueError:  # rows of different lengths
        raise TypeError(f"{name} must be an array of bool, and is {shown(values)}") from None
