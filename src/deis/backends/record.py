"""What the library asks of an array framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..arrays import AnyArray, Array
from ..machine import Combine, Row

AddNoise = Callable[..., Any]
"""add_noise(keep_z, x, i=0) -> x + keep_z z, for row i, which tells JAX's noises apart; each sample's z is from its own stream,
and in JAX i may be one row a sample."""

Call = Callable[..., Any]
"""call(model, x, t, names) -> model(x, t); `names` says in an error which arrays these are."""
MODEL = "x or t of model(x, t)"


@dataclass(frozen=True, eq=False)
class Backend:
    """What the library asks of an array framework.

    Attributes
    ----------
    xp : module
        The functions that go by NumPy's names.
    owns : callable
        owns(x): whether x is an array of this framework.
    carry : callable
        carry(dtype) -> the dtype of states between evaluations: float32 or better.
    cast : callable
        cast(x, dtype) -> x in a dtype; x itself where it has it.
    full : callable
        full(x, t, dtype, whole) -> the times t, numbers, for each sample of x, shape (len(t), batch) and of dtype, or integers if
        `whole`; on the device of x, in one copy.
    to_host : callable
        to_host(x) -> float64 of NumPy.
    like : callable
        like(values, x) -> an array of NumPy in this framework, and in the dtype and on the device of x.
    combine : callable
        c_x x + sum_j c_p[j] history[j], see `deis.machine`, for coefficients that are numbers.
    vjp : callable, optional
        vjp(f, x, *others) -> f(x, *others) and pull, with pull(u) = u df/dx, of the shape of x. NumPy has none.
    prepared : callable
        prepared(plan, dtype) -> the plan's rows, and a `combine` for them, as they cost least for states of a dtype.
    caller : callable
        caller() -> call, and call(model, x, t) -> model(x, t) of a model that must not change in place what it is given, as the
        caller goes on from it: call gives copies, or raises the ValueError of `changed`.
    split : callable
        split(rng, batch) -> one rng a sample, in a sequence whose slices `noise` takes; it refuses an rng of another kind.
    noise : callable
        noise(rng, batch) -> `AddNoise`; it refuses an rng of another kind.
    copy : callable
        copy(x) -> x in memory of its own.
    copied : callable
        copied(p, m, always) -> p, in memory that the model's output m does not share, and nobody at all if `always`.
    no_grad : callable
        no_grad() -> a context in which no gradients are recorded.
    each : callable
        each(f, z) -> f of each of z, stacked.
    """

    xp: Any
    owns: Callable[[object], bool]
    carry: Callable[[Any], Any]
    cast: Callable[[Any, Any], Any]
    full: Callable[[Any, Any, Any, bool], Any]
    to_host: Callable[[Any], Array]
    like: Callable[[AnyArray, Any], Any]
    combine: Combine[Any]
    vjp: Callable[..., tuple[Any, Callable[[Any], Any]]] | None
    prepared: Callable[[Any, Any], tuple[Sequence[Row], Combine[Any]]]
    caller: Callable[[], Call]
    split: Callable[[Any, int], Any]
    noise: Callable[[Any, int], AddNoise]
    copy: Callable[[Any], Any]
    copied: Callable[[Any, Any, bool], Any]
    no_grad: Callable[[], AbstractContextManager[Any]]
    each: Callable[[Callable[[Any], Any], Any], Any]


def changed(names: str) -> ValueError:
    """Return the error for a function of the user's that changed in place an array that it was given."""
    return ValueError(
        f"the {names} was changed in place by the function that was given it, and the sampler goes on from it; begin the function "
        "with a copy, as x = x.clone(), or use operations without a trailing underscore"
    )
