"""What the library asks of an array framework."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..arrays import AnyArray, Array
from ..machine import Combine

AddNoise = Callable[..., Any]
"""add_noise(keep_z, x, i=0) -> x + keep_z z, for row i, which tells JAX's noises apart; each sample's z is from its own stream."""


@dataclass(frozen=True)
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
    noise : callable
        noise(rng, batch) -> `AddNoise`; it refuses an rng of another kind.
    copied : callable
        copied(p, m, always) -> p, in memory that the model's output m does not share, and nobody at all if `always`.
    no_grad : callable
        no_grad() -> a context in which no gradients are recorded.
    """

    xp: Any
    owns: Callable[[object], bool]
    carry: Callable[[Any], Any]
    cast: Callable[[Any, Any], Any]
    full: Callable[[Any, Any, Any, bool], Any]
    to_host: Callable[[Any], Array]
    like: Callable[[AnyArray, Any], Any]
    combine: Combine[Any]
    noise: Callable[[Any, int], AddNoise]
    copied: Callable[[Any, Any, bool], Any]
    no_grad: Callable[[], AbstractContextManager[Any]]
