"""Guidance as a mixture of two predictions, and the classifier-free guidance of one network by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import array, flag, function, number, shown
from ..backends import backend_of
from ..foreign import is_jax, is_torch
from ..host import take
from .predictions import Level, Levels, call_model, check_length, checked_output, evaluate

Model = Callable[[Any, Any], Any]
Both = Callable[[Any, Any, Level | Levels | None], tuple[Any, Any]]
"""(x, t, level) -> the strong and the weak prediction; the level is None at times that only the device has."""
EVERYWHERE = (-math.inf, math.inf)


def weights(value: Any) -> float | tuple[float, ...]:
    """Return the guidance weight, or one per sample; 1.0 if all are 1.

    Raises
    ------
    ValueError
        Where one is not finite, or they are neither a number nor of shape (batch,).
    """
    if not (isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0):
        return number("weight", value, hint="1 is no guidance")
    found = array("weight", value, "one per sample")
    if found.ndim != 1 or not found.size or not np.isfinite(found).all():
        raise ValueError(f"weight={shown(value)} must be a finite number, or an array of them of shape (batch,)")
    return 1.0 if (found == 1).all() else tuple(found.tolist())


def _picked(argument: str, level: Level | Levels | None, values: Any, x: Any) -> Any:
    """Return the entries of the samples that are evaluated, from an array with one per sample."""
    return level.picked(argument, values) if isinstance(level, Levels) else check_length(argument, values, len(x))


@dataclass(frozen=True)
class Mixture:
    """m = m_weak + weight (m_strong - m_weak) where t lies in the interval, and m_strong elsewhere; see `deis.guided`."""

    strong: Model
    both: Both
    weight: float | tuple[float, ...]
    rescale: float
    interval: tuple[float, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", weights(self.weight))
        object.__setattr__(self, "rescale", number("rescale", self.rescale, least=0, most=1, hint="0 is no rescaling"))
        if not (isinstance(self.interval, tuple | list) and len(self.interval) == 2):
            raise ValueError(f"interval={shown(self.interval)} must be two times, the lower first")
        low, high = (number(f"interval[{i}]", t, infinite=True) for i, t in enumerate(self.interval))
        if low > high:
            raise ValueError(f"interval={self.interval!r} must be two times, the lower first")
        object.__setattr__(self, "interval", (low, high))

    def __call__(self, x: Any, t: Any) -> Any:
        """Evaluate at times that only the device has: both predictions are made, and the interval masks their difference."""
        return self._masked(x, t, t.reshape(-1, *(1,) * (x.ndim - 1)), None)

    def _masked(self, x: Any, t: Any, time: Any, level: Levels | None) -> Any:
        strong, weak = self.both(x, t, level)
        inside = (time >= self.interval[0]) & (time <= self.interval[1])
        return backend_of(x).xp.where(inside, self._mix(strong, weak, level), strong)

    def at(self, x: Any, t: Any, level: Level | Levels) -> Any:
        """Evaluate at a level known in numbers: outside the interval the weak prediction is not made; at several, as `__call__`."""

        def inside(x: Any, t: Any) -> Any:
            return self._mix(*self.both(x, t, level), level)

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

    def _mix(self, strong: Any, weak: Any, level: Level | Levels | None) -> Any:
        weight: Any = self.weight
        if isinstance(weight, tuple):
            weight = backend_of(strong).like(_picked("weight", level, np.array(weight), strong), strong)
            weight = weight.reshape(-1, *(1,) * (strong.ndim - 1))
        mixed = weak + weight * (strong - weak)
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
    weight: Any,
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
        The condition of each sample, and the one that stands for none in the training of the network; with batched=False anything.
    weight : float or array of shape (batch,)
        See `deis.guided`.
    batched : bool
        Make one call on a batch of twice the size, whose second half leaves out the samples of weight 1; otherwise two calls.

    Raises
    ------
    ValueError
        Where null is None: a model that was not trained without its condition has no such guidance.
    """
    function("net", net, "x", "t", "condition")
    flag("batched", batched)
    weight = weights(weight)
    if null is None and weight != 1:
        raise ValueError(
            f"weight={weight!r} asks for guidance and null is None: give the condition that means none to the network, or weight=1"
        )

    strong, weak = (_Conditioned(net, c, batched) for c in (condition, null))
    both = _one_call(net, condition, null, weight) if batched and weight != 1 else two_calls(strong, weak)
    mixture = Mixture(strong, both, weight, rescale, interval)
    return strong if weight == 1 else mixture


@dataclass(frozen=True)
class _Conditioned:
    """net(x, t, condition) as a model, which gives each of the evaluated samples its own condition."""

    net: Callable[[Any, Any, Any], Any]
    condition: Any
    batched: bool

    def __call__(self, x: Any, t: Any) -> Any:
        return self.net(x, t, self.condition)

    def at(self, x: Any, t: Any, level: Level | Levels) -> Any:
        if not isinstance(level, Levels):
            return self.net(x, t, self.condition)
        if not self.batched and (level.copies > 1 or level.samples is not None):
            raise ValueError(
                "condition is not batched, and cannot be repeated for parallel=True, nor selected where each sample has its own "
                "plan; give batched=True, or leave that out"
            )
        return self.net(x, t, level.picked("condition", lifted("condition", self.condition)) if self.batched else self.condition)


def _one_call(net: Callable[[Any, Any, Any], Any], condition: Any, null: Any, weight: float | tuple[float, ...]) -> Both:
    """Return what makes the predictions with the condition and without it in one call, the latter of samples of weight not 1."""
    pair = _paired(condition, null)
    concatenate = backend_of(pair[0]).xp.concatenate
    together = concatenate(pair)

    def both(x: Any, t: Any, level: Level | Levels | None) -> tuple[Any, Any]:
        xp, now = backend_of(x).xp, tuple(_picked("condition", level, c, x) for c in pair)
        again = _guided(weight, level, x)
        if again is None:
            x_now, t_now, conditions = [x, x], [t, t], together if now[0] is pair[0] else concatenate(now)
        else:
            x_now, t_now, conditions = [x, take(x, again)], [t, take(t, again)], concatenate([now[0], take(now[1], again)])
        x_all = xp.concatenate(x_now)
        m = checked_output("net(x, t, condition)", net(x_all, xp.concatenate(t_now), conditions), x_all)
        if again is None:
            return m[: len(x)], m[len(x) :]
        weak = np.arange(len(x))  # where the weight is 1, the strong prediction is also the weak one
        weak[again] = len(x) + np.arange(len(again))
        return m[: len(x)], take(m, weak)

    return both


def _guided(weight: float | tuple[float, ...], level: Level | Levels | None, x: Any) -> Any:
    """Return the numbers of the evaluated samples whose weight is not 1; None where it is so for all."""
    if not isinstance(weight, tuple):
        return None
    again = np.flatnonzero(_picked("weight", level, np.array(weight), x) != 1)
    return None if len(again) == len(x) else again


def _paired(condition: Any, null: Any) -> tuple[Any, Any]:
    """Return the condition and its absence as arrays that go together."""
    pair = lifted("condition", condition), lifted("null", null)
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


def lifted(argument: str, value: Any) -> Any:
    """Return a value as an array, made from a list if need be."""
    if is_torch(value) or is_jax(value):
        return value
    try:
        found = np.asarray(value)
    except ValueError:  # rows of different lengths
        found = np.array(None)
    if found.dtype == object:
        raise TypeError(f"{argument} must be an array, to be batched, and is {shown(value)}; give one, or batched=False")
    return found
