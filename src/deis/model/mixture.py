"""Guidance as a mixture of two predictions, and the classifier-free guidance of one network by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import flag, function, number, shown
from ..backends import backend_of
from ..foreign import is_jax, is_torch
from .predictions import Level, Levels, call_model, checked_output, evaluate

Model = Callable[[Any, Any], Any]
Both = Callable[[Any, Any, Level | Levels | None], tuple[Any, Any]]
"""(x, t, level) -> the strong and the weak prediction; without a level at times that the device alone knows."""
EVERYWHERE = (-math.inf, math.inf)


@dataclass(frozen=True)
class Mixture:
    """m = m_weak + weight (m_strong - m_weak) where t lies in the interval, and m_strong elsewhere; see `deis.guided`."""

    strong: Model
    both: Both
    weight: float
    rescale: float
    interval: tuple[float, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", number("weight", self.weight, hint="1 is no guidance"))
        object.__setattr__(self, "rescale", number("rescale", self.rescale, least=0, most=1, hint="0 is no rescaling"))
        if not (isinstance(self.interval, tuple | list) and len(self.interval) == 2):
            raise ValueError(f"interval={shown(self.interval)} must be two times, the lower first")
        low, high = (number(f"interval[{i}]", t, infinite=True) for i, t in enumerate(self.interval))
        if low > high:
            raise ValueError(f"interval={self.interval!r} must be two times, the lower first")
        object.__setattr__(self, "interval", (low, high))

    def __call__(self, x: Any, t: Any) -> Any:
        """Evaluate at times known to the device alone: both predictions are made, and the interval masks their difference."""
        return self._masked(x, t, t.reshape(-1, *(1,) * (x.ndim - 1)), None)

    def _masked(self, x: Any, t: Any, time: Any, level: Levels | None) -> Any:
        strong, weak = self.both(x, t, level)
        inside = (time >= self.interval[0]) & (time <= self.interval[1])
        return backend_of(x).xp.where(inside, self._mix(strong, weak), strong)

    def at(self, x: Any, t: Any, level: Level | Levels) -> Any:
        """Evaluate at a level known in numbers: outside the interval the weak prediction is not made; at several, as `__call__`."""

        def inside(x: Any, t: Any) -> Any:
            return self._mix(*self.both(x, t, level))

        def outside(x: Any, t: Any) -> Any:
            return evaluate(self.strong, x, t, level)

        low, high = self.interval
        if self.interval == EVERYWHERE:
            return inside(x, t)
        if isinstance(level, Levels):
            return self._masked(x, t, level.t, level)
        if is_jax(level.t):
            from jax import lax

            return lax.cond((level.t >= low) & (level.t <= high), inside, outside, x, t)
        return inside(x, t) if low <= level.t <= high else outside(x, t)

    def _mix(self, strong: Any, weak: Any) -> Any:
        mixed = weak + self.weight * (strong - weak)
        if self.rescale == 0:
            return mixed
        axes = tuple(range(1, strong.ndim))
        spread = mixed.std(axes, keepdims=True)
        xp = backend_of(spread).xp  # a constant prediction has no spread to restore
        ratio = xp.where(spread > 0, strong.std(axes, keepdims=True) / xp.where(spread > 0, spread, 1.0), 1.0)
        return mixed * (self.rescale * ratio + (1 - self.rescale))


def two_calls(strong: Model, weak: Model) -> Both:
    """Return what makes the predictions of two models."""

    def both(x: Any, t: Any, level: Level | Levels | None) -> tuple[Any, Any]:
        return (
            checked_output("strong(x, t)", _evaluate(strong, x, t, level), x),
            checked_output("weak(x, t)", _evaluate(weak, x, t, level), x),
        )

    return both


def _evaluate(model: Model, x: Any, t: Any, level: Level | Levels | None) -> Any:
    return call_model(model, x, t) if level is None else evaluate(model, x, t, level)


def classifier_free(
    net: Callable[[Any, Any, Any], Any],
    condition: Any,
    null: Any,
    weight: float,
    *,
    batched: bool = True,
    rescale: float = 0.0,
    interval: tuple[float, float] = EVERYWHERE,
) -> Model:
    """Return the classifier-free guidance of net(x, t, condition), as `deis.guided` does for two models.

    Parameters
    ----------
    net : callable
        net(x, t, condition) -> output.
    condition, null : array of shape (batch, ...)
        The condition of each sample, and what the network was trained to take for none; with batched=False anything.
    batched : bool
        Make one call on a batch of twice the size; else two calls.

    Raises
    ------
    ValueError
        Where null is None: a model that was not trained without its condition has no such guidance.
    """
    function("net", net, "x", "t", "condition")
    flag("batched", batched)
    weight = number("weight", weight, hint="1 is no guidance")
    if null is None and weight != 1:
        raise ValueError(
            f"weight={weight!r} asks for guidance and null is None: give what the network takes for no condition, or weight=1"
        )

    strong, weak = (_Conditioned(net, c, batched) for c in (condition, null))
    both = _one_call(net, condition, null) if batched and weight != 1 else two_calls(strong, weak)
    mixture = Mixture(strong, both, weight, rescale, interval)
    return strong if weight == 1 else mixture


@dataclass(frozen=True)
class _Conditioned:
    """net(x, t, condition) as a model, which repeats the condition for copies of its batch."""

    net: Callable[[Any, Any, Any], Any]
    condition: Any
    batched: bool

    def __call__(self, x: Any, t: Any) -> Any:
        return self.net(x, t, self.condition)

    def at(self, x: Any, t: Any, level: Level | Levels) -> Any:
        if not isinstance(level, Levels):
            return self.net(x, t, self.condition)
        if not self.batched:
            raise ValueError(
                "condition is not batched, and cannot be repeated for parallel=True; give batched=True, or leave it out"
            )
        return self.net(x, t, _repeated(level.copies, _lifted("condition", self.condition)))


def _repeated(copies: int, *conditions: Any) -> Any:
    """Return conditions one after the other, each for copies of its batch."""
    return backend_of(conditions[0]).xp.concatenate([c for c in conditions for _ in range(copies)])


def _one_call(net: Callable[[Any, Any, Any], Any], condition: Any, null: Any) -> Both:
    """Return what makes the predictions with the condition and without it in one call, on a batch of twice the size."""
    pair = _paired(condition, null)
    together = _repeated(1, *pair)

    def both(x: Any, t: Any, level: Level | Levels | None) -> tuple[Any, Any]:
        copies = level.copies if isinstance(level, Levels) else 1
        if copies * len(pair[0]) != len(x):
            raise ValueError(f"condition must have one entry a sample: there are {len(pair[0])} for {len(x) // copies} samples")
        xp = backend_of(x).xp
        x_twice = xp.concatenate([x, x])
        conditions = together if copies == 1 else _repeated(copies, *pair)
        m = checked_output("net(x, t, condition)", net(x_twice, xp.concatenate([t, t]), conditions), x_twice)
        return m[: len(x)], m[len(x) :]

    return both


def _paired(condition: Any, null: Any) -> tuple[Any, Any]:
    """Return the condition and its absence as arrays that go together."""
    pair = _lifted("condition", condition), _lifted("null", null)
    shapes = [tuple(c.shape) for c in pair]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"null must have the shape of condition, {shapes[0]}, to be batched with it, and has {shapes[1]}; "
            "repeat it for each sample, or give batched=False"
        )
    if backend_of(pair[0]) is not backend_of(pair[1]):
        raise TypeError(
            f"condition and null must be arrays of one framework, and are a {type(pair[0]).__name__} and a {type(pair[1]).__name__}"
        )
    return pair


def _lifted(argument: str, value: Any) -> Any:
    """Return an array, which a list may be made."""
    if is_torch(value) or is_jax(value):
        return value
    try:
        found = np.asarray(value)
    except ValueError:  # rows of different lengths
        found = np.array(None)
    if found.dtype == object:
        raise TypeError(f"{argument} must be an array, to be batched, and is {shown(value)}; give one, or batched=False")
    return found
