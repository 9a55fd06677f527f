"""Guidance: models that wrap models. Each predicts what its network predicts, except classifier guidance, which predicts eps.

A wrapper is called like any model, `model(x, t)`; the executors tell it the noise level in plain numbers besides, by its method
`at(x, t, level)`, so that no choice that depends on time waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..foreign import array_namespace, is_jax, is_torch
from .predictions import Denoiser, Level, convert, evaluate, factors

Model = Callable[[Any, Any], Any]
EVERYWHERE = (-math.inf, math.inf)


@dataclass(frozen=True)
class Guided:
    """m = m_weak + weight (m_strong - m_weak) where t lies in the interval, and m_strong elsewhere; see `guided`."""

    strong: Model
    both: Callable[[Any, Any, Any], tuple[Any, Any]]
    weight: float
    rescale: float
    interval: tuple[float, float]

    def __call__(self, x: Any, t: Any) -> Any:
        """Evaluate at times known to the device alone: both predictions are made, and the interval masks their difference."""
        strong, weak = self.both(x, t, None)
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        return array_namespace(x).where(inside.reshape(-1, *(1,) * (x.ndim - 1)), self._mix(strong, weak), strong)

    def at(self, x: Any, t: Any, level: Level) -> Any:
        """Evaluate at a level known in numbers: outside the interval the weak prediction is not made."""

        def inside(x: Any, t: Any) -> Any:
            return self._mix(*self.both(x, t, level))

        def outside(x: Any, t: Any) -> Any:
            return evaluate(self.strong, x, t, level)

        low, high = self.interval
        if self.interval == EVERYWHERE:
            return inside(x, t)
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
        xp = array_namespace(spread)  # a constant prediction has no spread to restore
        ratio = xp.where(spread > 0, strong.std(axes, keepdims=True) / xp.where(spread > 0, spread, 1.0), 1.0)
        return mixed * (self.rescale * ratio + (1 - self.rescale))


def _guided(
    strong: Model, both: Callable[[Any, Any, Any], tuple[Any, Any]], weight: float, rescale: float, interval: tuple[float, float]
) -> Guided:
    if not math.isfinite(weight):
        raise ValueError(f"weight={weight!r} must be finite; 1 is no guidance")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale={rescale!r} must lie in [0, 1]; 0 is no rescaling")
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise ValueError(f"interval={interval!r} must be two times, the lower first")
    return Guided(strong, both, weight, rescale, (float(interval[0]), float(interval[1])))


def guided(strong: Model, weak: Model, weight: float, *, rescale: float = 0.0, interval: tuple[float, float] = EVERYWHERE) -> Model:
    """Return model(x, t) -> m_weak + weight (m_strong - m_weak), in two calls.

    With the same network without its condition for `weak` it is classifier-free guidance (Ho & Salimans, arXiv 2207.12598); with
    a smaller or less trained network, autoguidance (Karras et al., arXiv 2406.02507).

    Parameters
    ----------
    strong, weak : callable
        model(x, t), both predicting the same quantity.
    weight : float
        1 is the strong model alone, greater weights guide.
    rescale : float
        In [0, 1]: how far the standard deviation of each sample's prediction is drawn back to that of the strong one (Lin et
        al., arXiv 2305.08891, section 3.4).
    interval : (float, float)
        The times t within which to guide (Kynkäänniemi et al., arXiv 2404.07724); outside, the weak model is not called.

    Raises
    ------
    ValueError
        Where weight is not finite, rescale lies outside [0, 1], or the interval is empty.
    """

    def both(x: Any, t: Any, level: Any) -> tuple[Any, Any]:
        return _evaluate(strong, x, t, level), _evaluate(weak, x, t, level)

    return _guided(strong, both, weight, rescale, interval)


def _evaluate(model: Model, x: Any, t: Any, level: Any) -> Any:
    return model(x, t) if level is None else evaluate(model, x, t, level)


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
    """Return the classifier-free guidance of net(x, t, condition), as `guided` does for two models.

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
    if null is None and weight != 1:
        raise ValueError(
            f"weight={weight!r} asks for guidance and null is None: give what the network takes for no condition, or weight=1"
        )

    def strong(x: Any, t: Any) -> Any:
        return net(x, t, condition)

    if weight == 1:
        return strong
    if not batched:
        return guided(strong, lambda x, t: net(x, t, null), weight, rescale=rescale, interval=interval)
    if np.shape(null) != np.shape(condition) or len(np.shape(condition)) < 1:
        raise ValueError(
            f"null must have the shape of condition, {np.shape(condition)}, to be batched with it, and has {np.shape(null)}; "
            "repeat it for each sample, or give batched=False"
        )
    xp = array_namespace(condition)
    together = xp.concatenate([condition, null])

    def both(x: Any, t: Any, level: Any) -> tuple[Any, Any]:
        xp = array_namespace(x)
        m = net(xp.concatenate([x, x]), xp.concatenate([t, t]), together)
        return m[: len(x)], m[len(x) :]

    return _guided(strong, both, weight, rescale, interval)


@dataclass(frozen=True)
class _ClassifierGuided:
    denoiser: Denoiser
    log_prob: Callable[[Any, Any], Any]
    weight: float

    def __call__(self, x: Any, t: Any) -> Any:
        return self.at(x, t, self.denoiser.level(float(t[0])))  # one time for the whole batch

    def at(self, x: Any, t: Any, level: Level) -> Any:
        m = self.denoiser.at(x, t, level)
        threshold = self.denoiser.threshold
        eps = convert(m, x, factors(self.denoiser.predicts, "eps", level, threshold is not None), threshold)
        return eps - self.weight * level.sigma * _gradient(self.log_prob, x, t)


def classifier_guided(denoiser: Denoiser, log_prob: Callable[[Any, Any], Any], weight: float = 1.0) -> Denoiser:
    """Return the denoiser guided by a classifier of noisy data: eps - weight sigma grad_x log p(y | x, t).

    (Dhariwal & Nichol, arXiv 2105.05233, section 4.2.)

    Parameters
    ----------
    log_prob : callable
        log_prob(x, t) -> shape (batch,), the log-probability of the class that is wanted, in torch or JAX, which differentiate it.

    Raises
    ------
    ValueError
        Where weight is not finite.
    """
    if not math.isfinite(weight):
        raise ValueError(f"weight={weight!r} must be finite; 0 is no guidance")
    return Denoiser(_ClassifierGuided(denoiser, log_prob, weight), denoiser.sde, "eps")


def _gradient(log_prob: Callable[[Any, Any], Any], x: Any, t: Any) -> Any:
    if is_torch(x):
        import torch

        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(log_prob(x, t).sum(), x)[0]
    if is_jax(x):
        import jax

        return jax.grad(lambda x: log_prob(x, t).sum())(x)
    raise TypeError(f"classifier guidance differentiates log_prob, which torch and JAX can, and x is a {type(x).__name__}")
