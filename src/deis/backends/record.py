"""What the library asks of an array framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..arrays import AnyArray, Array
from ..machine import Combine, Row

AddNoise = Callable[..., Any]
"""add_noise(keep_z, x, i=0) -> x + keep_z z. Each sample's z comes from its own stream. In JAX the row i selects the noise, and may
be an array of one row per sample."""

Call = Callable[..., Any]
"""call(model, x, t, names) -> model(x, t); an error calls these arrays by `names`."""
MODEL = "x or t of model(x, t)"


@dataclass(frozen=True, eq=False)
class Backend:
    """What the library asks of an array framework.

    Attributes
    ----------
    xp : module
        The module whose functions have NumPy's names.
    owns : callable
        owns(x): whether x is an array of this framework.
    carry : callable
        carry(dtype) -> the dtype of states between evaluations: float32 or better.
    cast : callable
        cast(x, dtype) -> x in a dtype; x itself if it already has this dtype.
    full : callable
        full(x, t, dtype, whole) -> the numbers t as times for each sample of x, of shape (len(t), batch), of dtype or, if `whole`,
        integers; on the device of x, in one copy.
    to_host : callable
        to_host(x) -> x as a NumPy array of float64.
    like : callable
        like(values, x) -> a NumPy array as an array of this framework, of the dtype and on the device of x.
    combine : callable
        c_x x + sum_j c_p[j] history[j], see `deis.machine`, for coefficients that are numbers.
    vjp : callable, optional
        vjp(f, x, *others) -> f(x, *others) and pull, with pull(u) = u df/dx, of the shape of x. NumPy has none.
    prepared : callable
        prepared(plan, dtype) -> the plan's rows, and a `combine` for them, in the cheapest form for states of a dtype.
    caller : callable
        caller() -> call, with call(model, x, t) -> model(x, t). The model must not change x or t in place, as the sampler uses
        them afterwards. So call passes copies, or raises the ValueError of `changed`.
    split : callable
        split(rng, batch) -> one rng per sample, in a sequence whose slices `noise` takes; it refuses an rng of another framework.
    noise : callable
        noise(rng, batch) -> `AddNoise`; it refuses an rng of another framework.
    copy : callable
        copy(x) -> x in memory of its own.
    copied : callable
        copied(p, m, always) -> p, in memory not shared with the model's output m, or if `always` with anything.
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
    """Return the error for a user's function that changed its argument in place."""
    return ValueError(
        f"the {names} was changed in place by the function that was given it, and the sampler still needs it; begin the function "
        "with a copy, as in x = x.clone(), or use operations without a trailing underscore"
    )
