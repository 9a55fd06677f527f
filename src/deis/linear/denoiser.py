"""What networks of linear SDEs predict; and networks of scalar schedules, which need no training to become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..arguments import function, one_of
from ..arrays import Array
from ..model.predictions import Denoiser, Level, check_model, coefficients
from ..model.pretrained import without_labels
from .plan import PREDICTS, LinearPlan
from .sde import LinearSDE, check_sde

_OF_DATA = ("v", "x0")


@dataclass(frozen=True)
class LinearDenoiser:
    r"""A network with what it predicts and the linear SDE it is for; `deis.sample_linear` takes one as its model.

    The data are one of the k blocks of the state, u = a x_0 + noise of covariance Sigma, with a the first column of Psi(t, 0). Or
    with basis="dct" each frequency has its own numbers a and Sigma. What the plan needs follows from the x_0 that is predicted,
    such as eps = K^-1 (u - a x_0) for both blocks.

    A network of a *scalar* schedule is one of any SDE of blocks, too. Given the state, all that is known of x_0 is in its best
    linear estimate y = w^T u, with w = Sigma^-1 a / s and s = a^T Sigma^-1 a; and y is x_0 with Gaussian noise of deviation
    rho = s^(-1/2). So the network is asked at its own time of this rho, and its answer is the exact one for the state. For this
    the velocity at t = 0 must be noise, as hybrid score matching has it (arXiv 2112.07068). So a network for the VP schedule is
    one for critically damped Langevin.

    Attributes
    ----------
    model : callable, Denoiser or Pretrained
        A Denoiser or Pretrained is a network of a scalar schedule. Else model(x, t) -> an output of the shape of x, where the k
        blocks of c channels each stand one after another, (batch, k c, ...); for "v" and "x0" its first c channels count.
        With basis="dct" x are pixels.
    sde : LinearSDE
    predicts : {"v", "x0", "R", "L", "score"}, optional
        For data of unit variance and S = a a^T + Sigma, v = (a^T S^-1 u - x_0) / c with c^2 = 1 - a^T S^-1 a, which for one block
        is the v of `deis.Denoiser`. The others are those of `deis.make_linear_plan`. A network of a scalar schedule says it itself.
    threshold : callable, optional
        x_0 -> x_0, applied to the predicted data at every evaluation.

    Raises
    ------
    TypeError
        If the model cannot be called with (x, t), or sde is no linear SDE.
    ValueError
        For an unknown `predicts`; for one that a scalar network contradicts; for such a network with basis="dct", where no
        single noise level fits all frequencies; or for a threshold where the output has no x_0.
    """

    model: Callable[[Any, Any], Any]
    sde: LinearSDE
    predicts: str | None = None
    threshold: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        check_model("model", self.model)
        check_sde(self.sde)
        model = without_labels(self.model)
        if isinstance(model, Denoiser):
            if self.predicts is not None:
                raise ValueError(f"predicts={self.predicts!r} is for networks of {self.sde.name}; the model says it itself")
            if self.sde.basis != "block":
                raise ValueError(
                    f"model is a network of the scalar schedule {model.sde.name}, and no single noise level fits all frequencies "
                    f"of {self.sde.name}; train one for it, as training/train_mnist.py --sde blurring does"
                )
        else:
            one_of("predicts", self.predicts, (*_OF_DATA, *PREDICTS), "; say what the network returns")
        object.__setattr__(self, "model", model)
        own = model.threshold if isinstance(model, Denoiser) else None
        if self.threshold is None:
            object.__setattr__(self, "threshold", own)
        elif own is not None:
            raise ValueError("threshold is given, and the model is a Denoiser with another; leave one out")
        if self.threshold is not None:
            function("threshold", self.threshold, "x_0")
            if self.predicts in PREDICTS:
                raise ValueError(f"threshold needs the predicted data, and predicts={self.predicts!r} is eps; leave it out")

    def rows(self, plan: LinearPlan) -> list[Reading] | None:
        """Return how each row of a plan reads the state and the output, in float64; None where the output is what it wants.

        Raises
        ------
        ValueError
            If the plan is of another SDE, or wants another prediction than the network makes.
        """
        if plan.schedule != self.sde.name or not np.allclose(plan.alpha[0], self.sde.psi(plan.t[0], 0.0), rtol=1e-9, atol=0):
            raise ValueError(f"the plan was made for {plan.schedule}, and the model is one of {self.sde.name}; take one SDE")
        if self.predicts in PREDICTS:
            if plan.predicts != self.predicts:
                raise ValueError(
                    f"the model predicts {self.predicts!r}, and the plan takes {plan.predicts!r}; make it with "
                    f"make_linear_plan(..., predicts={self.predicts!r})"
                )
            return None
        t = plan.t[:-1]
        psi, Sigma, rho = self.sde.psi(t, 0.0), self.sde.Sigma(t), self.sde.rho(t)
        root = -Sigma if plan.predicts == "score" else self.sde.K(t, plan.predicts)
        inverse = self.sde.algebra.inverse(root)
        if self.sde.basis == "dct":
            return [self._of_frequencies(*row) for row in zip(t.tolist(), psi, Sigma, inverse, strict=True)]
        return [self._of_blocks(*row) for row in zip(t.tolist(), psi[:, :, 0], Sigma, rho.tolist(), inverse, strict=True)]

    def _of_blocks(self, t: float, a: Array, Sigma: Array, rho: float, inverse: Array) -> Reading:
        pull, s = np.linalg.solve(Sigma, a), rho**-2
        if isinstance(self.model, Denoiser):
            level, c_x, c_m = _scalar_level(self.model, rho)
            see = level.alpha / s * pull
            return Reading(level, see, c_x * see, c_m, inverse, -inverse @ a)
        level = Level(t, (1 + rho**2) ** -0.5, rho * (1 + rho**2) ** -0.5)
        # S^-1 a = Sigma^-1 a / (1 + s)
        linear, gain = (pull / (1 + s), -level.sigma) if self.predicts == "v" else (0 * pull, 1.0)
        return Reading(level, None, linear, gain, inverse, -inverse @ a)

    def _of_frequencies(self, t: float, a: Array, Sigma: Array, inverse: Array) -> Reading:
        S = a**2 + Sigma
        linear, gain = (a / S, -np.sqrt(Sigma / S)) if self.predicts == "v" else (0 * a, np.ones_like(a))
        return Reading(Level(t, a, np.sqrt(Sigma)), None, linear, gain, inverse, -inverse * a)


class Reading(NamedTuple):
    """What a row of a plan does with a network: x_0 = linear . u + gain m, and p = inverse u + data x_0.

    Of blocks, `linear`, `data` and `see` have shape (k,), `inverse` (k, k), and gain is a number; of frequencies, all have theirs.
    """

    level: Level
    """At which the network is asked."""
    see: Any
    """The network is given see . u; None for the whole state."""
    linear: Any
    gain: Any
    inverse: Any
    data: Any


def _scalar_level(model: Denoiser, rho: float) -> tuple[Level, float, float]:
    """Return the level of a scalar network at a rho, with x_0 = c_x x + c_m m; beyond its schedule, that of the nearest time."""
    sde = model.sde
    with np.errstate(divide="ignore"):
        low, high = sde.rho(np.array([sde.t_end, sde.t_start])).tolist()
    if rho > high:  # the network sees as much noise as it knows, which is all there is in x
        t, sigma = sde.t_start, float(sde.sigma(sde.t_start))
        level = Level(t, sigma / rho, sigma)
    else:
        t = sde.t_end if rho < low else float(sde.t_of_rho(rho))
        alpha = float(sde.alpha(t))
        level = Level(t, alpha, alpha * rho)
    return level, *coefficients(model.predicts, "x0", level.alpha, level.sigma)
