"""Guidance: models that wrap models. Each predicts what its network predicts, except classifier guidance, which predicts eps.

A wrapper is called like any model, `model(x, t)`; the executors tell it the noise level in plain numbers besides, by its method
`at(x, t, level)`, so that no choice that depends on time waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arguments import flag, function, kind, number, shown
from ..foreign import array_namespace, is_jax, is_torch
from .predictions import Denoiser, Level, call_model, check_model, checked_output, convert, evaluate, factors

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
    weight = number("weight", weight, hint="1 is no guidance")
    rescale = number("rescale", rescale, least=0, most=1, hint="0 is no rescaling")
    if not (isinstance(interval, tuple | list) and len(interval) == 2):
        raise ValueError(f"interval={shown(interval)} must be two times, the lower first")
    low, high = (number(f"interval[{i}]", t, infinite=True) for i, t in enumerate(interval))
    if low > high:
        raise ValueError(f"interval={interval!r} must be two times, the lower first")
    return Guided(strong, both, weight, rescale, (low, high))


def guided(strong: Model, weak: Model, weight: float, *, rescale: float = 0.0, interval: tuple[float, float] = EVERYWHERE) -> Model:
    """Return model(x, t) -> m_weak + weight (m_strong - m_weak), in two calls.

    With the same network without its condition for `weak` it is classifier-free guidance (Ho & Salimans, arXiv 2207.12598); with
    a smaller or less trained network, autoguidance (Karras et al., arXiv 2406.02507).

    Parameters
    ----------
    strong, weak : callable, or both Denoiser
        model(x, t), both predicting the same quantity. Of two Denoisers the result is one, which predicts what they do and has
        the strong one's threshold; of plain functions a plain function.
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
        Where weight is not finite, rescale lies outside [0, 1], the interval is empty, or the Denoisers differ in what they
        predict or in their schedule.
    TypeError
        Where one is a Denoiser and the other a plain function, or either cannot be called with (x, t).
    """
    check_model("strong", strong)
    check_model("weak", weak)
    strong, weak = conditional(strong), conditional(weak)
    alike = _alike(strong, weak)

    def both(x: Any, t: Any, level: Any) -> tuple[Any, Any]:
        return (
            checked_output("strong(x, t)", _evaluate(strong, x, t, level), x),
            checked_output("weak(x, t)", _evaluate(weak, x, t, level), x),
        )

    mixed = _guided(strong, both, weight, rescale, interval)
    return mixed if alike is None else replace(alike, model=mixed)


def conditional(model: Any) -> Any:
    """Return the Denoiser of a Pretrained network without labels; another model itself."""
    from .pretrained import Pretrained

    return model.conditional() if isinstance(model, Pretrained) else model


def _alike(strong: Any, weak: Any) -> Denoiser | None:
    """Return the strong one of two Denoisers that differ in their networks alone, and None for two plain functions."""
    if not (isinstance(strong, Denoiser) or isinstance(weak, Denoiser)):
        return None
    for argument, model in (("strong", strong), ("weak", weak)):
        if not isinstance(model, Denoiser):
            raise TypeError(
                f"{argument} is a plain function and the other a deis.Denoiser: nothing says whether they predict the same; "
                "make both a deis.Denoiser, or give both networks as they are"
            )
    if strong.predicts != weak.predicts:
        raise ValueError(
            f"strong predicts {strong.predicts!r} and weak {weak.predicts!r}, which do not mix; give two that predict the same"
        )
    if weak.threshold not in (None, strong.threshold):
        raise ValueError("weak has a threshold that strong has not; the guided prediction has that of strong, so give it there")
    t = np.linspace(strong.sde.t_end, strong.sde.t_start, 9)
    with np.errstate(all="ignore"):
        pairs = [(getattr(strong.sde, name)(t), getattr(weak.sde, name)(t)) for name in ("alpha", "sigma")]
    if strong.sde.num_times != weak.sde.num_times or not all(np.allclose(a, b, 1e-6, 1e-9) for a, b in pairs):
        raise ValueError(f"strong is of the schedule {strong.sde.name!r} and weak of {weak.sde.name!r}, whose levels differ")
    return strong


def _evaluate(model: Model, x: Any, t: Any, level: Any) -> Any:
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
    function("net", net, "x", "t", "condition")
    flag("batched", batched)
    weight = number("weight", weight, hint="1 is no guidance")
    if null is None and weight != 1:
        raise ValueError(
            f"weight={weight!r} asks for guidance and null is None: give what the network takes for no condition, or weight=1"
        )

    def strong(x: Any, t: Any) -> Any:
        return net(x, t, condition)

    plain = guided(strong, lambda x, t: net(x, t, null), weight, rescale=rescale, interval=interval)
    if weight == 1 or not batched:
        return strong if weight == 1 else plain
    together = _joined(condition, null)

    def both(x: Any, t: Any, level: Any) -> tuple[Any, Any]:
        if len(together) != 2 * len(x):
            raise ValueError(f"condition must have one entry a sample: there are {len(together) // 2} for {len(x)} samples")
        xp = array_namespace(x)
        x_twice = xp.concatenate([x, x])
        m = checked_output("net(x, t, condition)", net(x_twice, xp.concatenate([t, t]), together), x_twice)
        return m[: len(x)], m[len(x) :]

    return _guided(strong, both, weight, rescale, interval)


def _joined(condition: Any, null: Any) -> Any:
    """Return the condition and its absence one after the other."""
    pair = [c if is_torch(c) or is_jax(c) else _as_array(name, c) for name, c in (("condition", condition), ("null", null))]
    shapes = [tuple(c.shape) for c in pair]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"null must have the shape of condition, {shapes[0]}, to be batched with it, and has {shapes[1]}; "
            "repeat it for each sample, or give batched=False"
        )
    xp = array_namespace(pair[0])
    if xp is not array_namespace(pair[1]):
        raise TypeError(
            f"condition and null must be arrays of one framework, and are a {type(pair[0]).__name__} and a {type(pair[1]).__name__}"
        )
    return xp.concatenate(pair)


def _as_array(argument: str, value: Any) -> Any:
    try:
        found = np.asarray(value)
    except ValueError:  # rows of different lengths
        found = np.array(None)
    if found.dtype == object:
        raise TypeError(f"{argument} must be an array, to be batched, and is {shown(value)}; give one, or batched=False")
    return found


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
        checked_output("the denoiser's model(x, t)", m, x)
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
    denoiser = conditional(denoiser)
    kind("denoiser", denoiser, Denoiser, "a deis.Denoiser, which says what it predicts,")
    function("log_prob", log_prob, "x", "t")
    weight = number("weight", weight, hint="0 is no guidance")
    return Denoiser(_ClassifierGuided(denoiser, log_prob, weight), denoiser.sde, "eps")


def _total(found: Any, x: Any) -> Any:
    if getattr(found, "shape", None) != x.shape[:1]:
        raise ValueError(
            f"log_prob(x, t) must return log-probabilities of shape {tuple(x.shape[:1])}, and returned "
            + (f"shape {tuple(found.shape)}" if hasattr(found, "shape") else shown(found))
        )
    return found.sum()


def _gradient(log_prob: Callable[[Any, Any], Any], x: Any, t: Any) -> Any:
    if is_torch(x):
        import torch

        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(_total(log_prob(x, t), x), x)[0]
    if is_jax(x):
        import jax

        return jax.grad(lambda x: _total(log_prob(x, t), x))(x)
    raise TypeError(f"classifier guidance differentiates log_prob, which torch and JAX can, and x is a {type(x).__name__}")
