"""Guidance: models that wrap models. Each predicts what its network predicts, except classifier guidance, which predicts eps.

A wrapper is called like any model, `model(x, t)`. The executors call its method `at(x, t, level)` instead, with the noise level in
plain numbers, so that no choice that depends on time waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arguments import function, kind, number, shown
from ..backends import backend_of
from .mixture import EVERYWHERE, Mixture, Model, two_calls
from .predictions import Denoiser, Level, check_model, checked_output, convert, factors
from .pretrained import without_labels


def guided(strong: Model, weak: Model, weight: Any, *, rescale: float = 0.0, interval: tuple[float, float] = EVERYWHERE) -> Model:
    """Return model(x, t) -> m_weak + weight (m_strong - m_weak), in two calls.

    With the same network without its condition as `weak`, it is classifier-free guidance (Ho & Salimans, arXiv 2207.12598); with
    a smaller or less trained network, autoguidance (Karras et al., arXiv 2406.02507).

    Parameters
    ----------
    strong, weak : callable, or both Denoiser
        model(x, t), both predicting the same quantity. Of two Denoisers the result is a Denoiser, with the same prediction and the
        strong one's threshold; from plain functions it is a plain function.
    weight : float or array of shape (batch,)
        1 is the strong model alone, and larger weights guide more; an array has one per sample.
    rescale : float
        In [0, 1]: how far the standard deviation of each sample's prediction is drawn back to that of the strong one (Lin et
        al., arXiv 2305.08891, section 3.4).
    interval : (float, float)
        The times t within which to guide (Kynkäänniemi et al., arXiv 2404.07724); outside, the weak model is not called.

    Raises
    ------
    ValueError
        If weight is not finite or does not have one entry per sample, rescale lies outside [0, 1], the interval is empty, or the
        Denoisers differ in what they predict or in their schedule.
    TypeError
        If one is a Denoiser and the other a plain function, or either cannot be called with (x, t).
    """
    check_model("strong", strong)
    check_model("weak", weak)
    strong, weak = without_labels(strong), without_labels(weak)
    alike = _alike(strong, weak)
    mixed = Mixture(strong, two_calls(strong, weak), weight, rescale, interval)
    return mixed if alike is None else replace(alike, model=mixed)


def _alike(strong: Any, weak: Any) -> Denoiser | None:
    """Return the strong one of two Denoisers that differ in their networks alone, and None for two plain functions."""
    if not (isinstance(strong, Denoiser) or isinstance(weak, Denoiser)):
        return None
    for argument, model in (("strong", strong), ("weak", weak)):
        if not isinstance(model, Denoiser):
            raise TypeError(
                f"{argument} is a plain function and the other a deis.Denoiser, so it is unknown whether they predict the same; "
                "make both a deis.Denoiser, or give both networks as they are"
            )
    if strong.predicts != weak.predicts:
        raise ValueError(
            f"strong predicts {strong.predicts!r} and weak {weak.predicts!r}, which do not mix; give two that predict the same"
        )
    if weak.threshold not in (None, strong.threshold):
        raise ValueError("weak has a threshold, and strong has none; the guided prediction takes that of strong, so give it there")
    t = np.linspace(strong.sde.t_end, strong.sde.t_start, 9)
    with np.errstate(all="ignore"):
        pairs = [(getattr(strong.sde, name)(t), getattr(weak.sde, name)(t)) for name in ("alpha", "sigma")]
    if strong.sde.num_times != weak.sde.num_times or not all(np.allclose(a, b, 1e-6, 1e-9) for a, b in pairs):
        raise ValueError(f"strong has the schedule {strong.sde.name!r} and weak has {weak.sde.name!r}, whose levels differ")
    return strong


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
        log_prob(x, t) -> shape (batch,), the log-probability of the wanted class, in torch or JAX, which differentiate it.

    Raises
    ------
    ValueError
        Where weight is not finite.
    """
    denoiser = without_labels(denoiser)
    kind("denoiser", denoiser, Denoiser, "a deis.Denoiser, which says what it predicts,")
    function("log_prob", log_prob, "x", "t")
    weight = number("weight", weight, hint="0 is no guidance")
    return replace(denoiser, model=_ClassifierGuided(denoiser, log_prob, weight), predicts="eps", threshold=None)


def _total(found: Any, x: Any) -> Any:
    if getattr(found, "shape", None) != x.shape[:1]:
        raise ValueError(
            f"log_prob(x, t) must return log-probabilities of shape {tuple(x.shape[:1])}, and returned "
            + (f"shape {tuple(found.shape)}" if hasattr(found, "shape") else shown(found))
        )
    return found.sum()


def _gradient(log_prob: Callable[[Any, Any], Any], x: Any, t: Any) -> Any:
    vjp = backend_of(x).vjp
    if vjp is None:
        raise TypeError(f"classifier guidance differentiates log_prob, which torch and JAX can, and x is a {type(x).__name__}")
    total, pull = vjp(lambda x, t: _total(log_prob(x, t), x), x, t)
    return pull(backend_of(x).xp.ones_like(total))
