"""Networks of linear SDEs by what they predict; and networks of scalar schedules, which need no training to become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..arguments import function, one_of
from ..arrays import Array
from ..backends import backend_of
from ..model.mixture import EVERYWHERE
from ..model.predictions import Denoiser, Level, Predictor, check_model, coefficients
from ..model.pretrained import Network, Pretrained, check_unguided, classes, guided_classes, unlabelled, without_labels
from .plan import PREDICTS, LinearPlan
from .sde import LinearSDE, check_sde
from .space import Space

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
        if plan.schedule != self.sde.name:
            raise ValueError(f"the plan was made for {plan.schedule}, and the model is one of {self.sde.name}; take one SDE")
        if self.predicts in PREDICTS:
            if plan.predicts != self.predicts:
                raise ValueError(
                    f"the model predicts {self.predicts!r}, and the plan takes {plan.predicts!r}; make it with "
                    f"make_linear_plan(..., predicts={self.predicts!r})"
                )
            return None
        t = plan.t[:-1]
        psi, Sigma = self.sde.psi(t, 0.0), self.sde.Sigma(t)
        root = -Sigma if plan.predicts == "score" else self.sde.K(t, plan.predicts)
        inverse = self.sde.algebra.inverse(root)
        if self.sde.basis == "dct":
            return [self._of_frequencies(*row) for row in zip(t.tolist(), psi, Sigma, inverse, strict=True)]
        return [self._of_blocks(*row) for row in zip(t.tolist(), psi[:, :, 0], Sigma, inverse, strict=True)]

    def _of_blocks(self, t: float, a: Array, Sigma: Array, inverse: Array) -> Reading:
        pull = np.linalg.solve(Sigma, a)
        s = float(a @ pull)
        rho = s**-0.5
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


@dataclass(frozen=True)
class PretrainedLinear:
    """A trained network of a linear SDE, which `deis.load_model` returns; `conditional` makes a model for `deis.sample_linear`.

    Attributes
    ----------
    net : callable
        net(x, t, labels) -> an output of the shape of x, for x as the model of a `LinearDenoiser` takes it.
    sde : LinearSDE
    predicts : str
        See `LinearDenoiser`.
    shape : tuple of int
        (channels, height, width) of one sample.
    num_classes, null_class, time_scale
        As of `deis.model.pretrained.Pretrained`.
    """

    net: Network
    sde: LinearSDE
    predicts: str
    shape: tuple[int, int, int]
    num_classes: int | None
    null_class: int | None
    time_scale: float

    def conditional(
        self,
        labels: Any = None,
        guidance: Any = 1.0,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = EVERYWHERE,
        threshold: Callable[[Any], Any] | None = None,
    ) -> LinearDenoiser:
        """Return the network for given labels of shape (batch,), as `Pretrained.conditional` does.

        Raises
        ------
        ValueError
            If the network has no classes, a label lies outside them, or guidance was given without labels.
        """
        if labels is None:
            check_unguided(guidance)
            model: Any = partial(unlabelled, self)
        else:
            model = guided_classes(self, *classes(self, labels), guidance, rescale=rescale, interval=interval)
        return LinearDenoiser(model, self.sde, self.predicts, threshold)

    def noise(self, z: Any) -> Any:
        """Return the state at which sampling starts, of standard normal z of shape (batch, channels k, height, width)."""
        if self.sde.basis == "dct":
            return self.sde.noise(z)
        blocks = z.reshape(len(z), self.sde.shape[0], -1, *z.shape[2:])
        return self.sde.noise(backend_of(z).xp.moveaxis(blocks, 1, 0))


def scalar_only(model: Pretrained | PretrainedLinear) -> Pretrained:
    """Return a network, for what takes those of scalar schedules alone.

    Raises
    ------
    ValueError
        If it is one of a linear SDE.
    """
    if isinstance(model, PretrainedLinear):
        raise ValueError(
            f"model is a network of {model.sde.name}, a linear SDE, which runs in Python only, by deis.sample_linear (see "
            "docs/linear.md); name one of a scalar schedule"
        )
    return model


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


@dataclass(frozen=True)
class Reader:
    """What the loops need from a model: reader(row, x, t) is the prediction that the plan takes.

    Attributes
    ----------
    predictor : Predictor
    space : Space
    rows : list of Reading or Level
        How each row reads the network, in float64; a Level where its output is what the plan takes.
    as_channels : bool
        Whether the network has the blocks one after another as channels.
    """

    predictor: Predictor
    space: Space
    rows: list[Any]
    as_channels: bool

    def __call__(self, row: Any, x: Any, t: Any) -> Any:
        """Return the prediction at a state as the plan combines it, with t of shape (batch,) the time of the row's level."""
        if isinstance(row, Reading):
            return (self._of_frequencies if self.space.axes else self._of_blocks)(row, x, t)
        if not self.as_channels:
            return self.space.prediction(self.predictor, x, t, row)
        return self._stacked(self._output(self._channels(x), t, row, x.dtype), x)

    def _of_blocks(self, row: Reading, x: Any, t: Any) -> Any:
        combine, (first, *others) = self.space.backend.combine, list(x)
        seen = self._channels(x) if row.see is None else combine(row.see[0], first, row.see[1:], others)
        m = self._output(seen, t, row.level, x.dtype)[:, : first.shape[1]]
        x_0 = self._clean(combine(row.linear[0], first, [*row.linear[1:], row.gain], [*others, m]))
        weights = zip(row.inverse, row.data, strict=True)
        return self.space.backend.xp.stack([combine(c[0], first, [*c[1:], d], [*others, x_0]) for c, d in weights])

    def _of_frequencies(self, row: Reading, x: Any, t: Any) -> Any:
        m = self.space.enter(self._output(self.space.leave(x), t, row.level, x.dtype))
        x_0 = row.linear * x + row.gain * m
        if self.predictor.threshold is not None:
            x_0 = self.space.enter(self._clean(self.space.leave(x_0)))
        return row.inverse * x + row.data * x_0

    def _output(self, seen: Any, t: Any, level: Any, dtype: Any) -> Any:
        return self.space.backend.cast(self.predictor.output(seen, t, level), dtype)

    def _clean(self, x_0: Any) -> Any:
        threshold = self.predictor.threshold
        return x_0 if threshold is None else self.space.backend.cast(threshold(x_0), x_0.dtype)

    def _channels(self, x: Any) -> Any:
        return self.space.backend.xp.concatenate(list(x), axis=1)

    def _stacked(self, m: Any, x: Any) -> Any:
        channels = x.shape[2]
        return self.space.backend.xp.stack([m[:, i * channels : (i + 1) * channels] for i in range(len(x))])


def reader_of(plan: LinearPlan, model: Any, space: Space, dtype: Any) -> Reader:
    """Return the reader of a model, a LinearDenoiser or a function, which is given states of a dtype."""
    if isinstance(model, LinearDenoiser):
        rows, as_channels = model.rows(plan), plan.basis == "block"
        predictor = Predictor(model.model, space.backend, dtype, model.threshold)
    else:
        rows, as_channels, predictor = None, False, Predictor(model, space.backend, dtype)
    return Reader(predictor, space, [Level(*row[:3]) for row in plan.rows] if rows is None else rows, as_channels)


def level_of(row: Any) -> Level:
    """Return the level at which a row of a reader asks the network."""
    return row.level if isinstance(row, Reading) else row
