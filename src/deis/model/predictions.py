"""What networks predict, as linear functions of each other: eps, x0, v, score and flow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..arguments import check_state, function, number, one_of
from ..backends import backend_of
from ..backends.record import Backend
from ..foreign import is_compiling
from ..host import take
from ..machine import Combine
from ..plan import Plan
from ..sde import Schedule, check_schedule


class Level(NamedTuple):
    """A noise level: t, alpha, sigma as numbers, or as scalars of a JAX trace; a `deis.machine.Row` is one, too."""

    t: Any
    alpha: Any
    sigma: Any


class Levels(NamedTuple):
    """The noise levels of several evaluations in one call: of copies of a batch one after another, or of some of its samples.

    t, alpha and sigma are arrays of shape (copies * batch, 1, ...), of the framework of x. A model with a method `at` gets these
    in place of a `Level`.
    """

    t: Any
    alpha: Any
    sigma: Any
    copies: int = 1
    samples: Any = None
    """The numbers of the evaluated samples within their batch, a NumPy array; None if all are, in order."""
    batch: int | None = None
    """The number of samples of that batch, if only some are evaluated."""

    def picked(self, argument: str, values: Any) -> Any:
        """Return the entries of the evaluated samples, from an array with one per sample of the batch.

        Raises
        ------
        ValueError
            Where there are not as many entries as samples.
        """
        found = check_length(argument, values, self.batch or len(self.t) // self.copies)
        found = found if self.samples is None else take(found, self.samples)
        return found if self.copies == 1 else backend_of(found).xp.concatenate([found] * self.copies)


def check_length(argument: str, values: Any, batch: int) -> Any:
    """Return an array that must have one entry per sample.

    Raises
    ------
    ValueError
        If it does not.
    """
    if len(values) != batch:
        raise ValueError(f"{argument} must have one entry per sample: there are {len(values)} for {batch} samples")
    return values


# predicts -> (k, a, b) of k m = a x_0 + b eps, at (alpha, sigma)
_OUTPUTS: dict[str, Callable[[Any, Any], tuple[Any, Any, Any]]] = {
    "eps": lambda alpha, sigma: (1.0, 0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 1.0, 0.0),
    "v": lambda alpha, sigma: (1.0, -sigma, alpha),
    "score": lambda alpha, sigma: (-sigma, 0.0, 1.0),
    "flow": lambda alpha, sigma: (1.0, -1.0, 1.0),
}


SAME = (0.0, 1.0)
"""The factors of `conversions` if the output is the prediction; there, it is this very tuple."""
_CHECKED: dict[int, weakref.ref[Any]] = {}
"""The models that `check_model` has seen, by their id."""


def check_model(argument: str, model: Any) -> None:
    """Raise TypeError unless a model can be called with (x, t), or has a method at(x, t, level)."""
    known = None if is_compiling() else _CHECKED.get(id(model))
    if known is not None and known() is model:
        return
    at = getattr(model, "at", None)
    if at is None:
        function(argument, model, "x", "t")
    else:
        function(f"{argument}.at", at, "x", "t", "level")
    if not is_compiling():
        _remember(model, id(model))


def _remember(model: Any, key: int) -> None:
    def forget(_: Any) -> None:
        _CHECKED.pop(key, None)

    with suppress(TypeError):  # a model without weak references is checked in each call
        _CHECKED[key] = weakref.ref(model, forget)


def named(predicts: Any) -> Any:
    """Return "x0" for "data", as plans call it for a form; anything else as it is."""
    return "x0" if isinstance(predicts, str) and predicts == "data" else predicts


def coefficients(predicts: str, target: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """Return (c_x, c_m) with target = c_x x + c_m m, for target "x0" (or "data") or "eps" and the output m of a network.

    x = alpha x_0 + sigma eps and k m = a x_0 + b eps, solved; the determinant is 0 where the output does not determine the
    target: eps does not at alpha = 0, nor x0 at sigma = 0.
    """
    predicts, target = named(predicts), named(target)
    if predicts == target:
        return 0.0, 1.0
    k, a, b = _OUTPUTS[predicts](alpha, sigma)
    if (predicts, target) == ("score", "eps"):  # without the determinant, alpha, which may be 0
        return 0.0, k
    determinant = alpha * b - sigma * a
    if target == "eps":
        return -a / determinant, k * alpha / determinant
    return b / determinant, -k * sigma / determinant


def output_of(predicts: str, x_0: Any, x: Any, level: Any) -> Any:
    """Return the output of a network that predicts the clean data x_0 of the state x exactly.

    Where sigma is 0, x is independent of eps, which is taken as 0, as in `Denoiser.predict`. For a level in numbers or arrays.
    """
    k, a, b = _OUTPUTS[predicts](level.alpha, level.sigma)
    clean = 1.0 * (level.sigma == 0)
    eps = (x - level.alpha * x_0) / (level.sigma + clean) * (1.0 - clean)
    return (a * x_0 + b * eps) / (k - clean if predicts == "score" else k)


def response(predicts: str, alpha: Any, sigma: Any) -> Any:
    """Return how much the output of a network changes with the x_0 that it stands for, at the same x.

    At sigma = 0 x is the data, which no output but x0 contradicts: the others change by 0 there.
    """
    if predicts == "x0":
        return 1.0
    k, a, b = _OUTPUTS[predicts](alpha, sigma)
    return quotient(a * sigma - b * alpha, k * sigma)


def quotient(a: Any, b: Any) -> Any:
    """Return a / b, and 0 where b is 0, for numbers or arrays."""
    if isinstance(b, float):
        return a / b if b else 0.0 * a
    xp = backend_of(b).xp
    return xp.where(b == 0, 0.0, a / xp.where(b == 0, 1.0, b))


def conversions(plan: Plan, predicts: str, thresholds: bool = False) -> tuple[tuple[float, ...], ...]:
    """Return, for each row of the plan, the factors with which `convert` makes p of a network's output; in float64.

    Thresholding goes by way of x_0, which does not determine eps at sigma = 0. A row that makes no call has factors of 0.

    Raises
    ------
    ValueError
        For an unknown `predicts`, or where its output does not determine the plan's form at one of the plan's times.
    """
    return plan.once(_conversions, one_of("predicts", named(predicts), _OUTPUTS), thresholds)


def _conversions(plan: Plan, predicts: str, thresholds: bool) -> tuple[tuple[float, ...], ...]:
    rows: list[tuple[float, ...]] = []
    for row in plan.rows:
        try:
            found = factors(predicts, plan.form, row, thresholds)
            rows.append(SAME if found == SAME else found)
        except ZeroDivisionError:
            if row.calls:
                raise ValueError(
                    f"predicts={predicts!r}{' with a threshold' if thresholds else ''} does not determine "
                    f"{'eps' if plan.form == 'eps' else 'x_0'} at t={row.t!r}, where alpha={row.alpha!r} and sigma={row.sigma!r}; "
                    'if the network predicts v or flow, say so by deis.Denoiser(..., predicts="flow") or '
                    'deis.sample(..., predicts="flow"); if not, start or end elsewhere'
                ) from None
            rows.append((0.0,) * (4 if thresholds else 2))
    return tuple(rows)


def factors(predicts: str, form: str, level: Any, thresholds: bool = False) -> tuple[Any, ...]:
    """Return (c_x, c_m), or with a threshold (c_x, c_m, d_x, d_m), for `convert` at one noise level."""
    way = (predicts, "x0", form) if thresholds else (predicts, form)
    pairs = [coefficients(a, b, level.alpha, level.sigma) for a, b in pairwise(way)]
    return tuple(factor for pair in pairs for factor in pair)


def convert(m: Any, x: Any, row: Sequence[Any], threshold: Callable[[Any], Any] | None, combine: Combine[Any] | None = None) -> Any:
    """Return the prediction of the output m at the state x, thresholded as x_0; the factors of a row are those of `conversions`.

    `combine` adds up arrays of one dtype in the way of their framework.
    """
    p = _linear(m, x, row[0], row[1], combine)
    return p if threshold is None else _linear(threshold(p), x, row[2], row[3], combine)


def _linear(m: Any, x: Any, c_x: Any, c_m: Any, combine: Combine[Any] | None = None) -> Any:
    """Return c_x x + c_m m; m itself where the numbers say so."""
    if isinstance(c_x, float):
        if (c_x, c_m) == (0.0, 1.0):
            return m
        if combine is not None:
            return combine(c_x, x, (c_m,), (m,))
    return c_x * x + c_m * m


def evaluate(model: Callable[[Any, Any], Any], x: Any, t: Any, level: Any) -> Any:
    """Call a model, with the noise level in numbers if it has a method `at(x, t, level)`."""
    at = getattr(model, "at", None)
    return call_model(model if at is None else lambda x, t: at(x, t, level), x, t)


def call_model(model: Callable[[Any, Any], Any], x: Any, t: Any) -> Any:
    """Call a model, and check that it leaves x and t unchanged; see `caller` of `deis.backends.record.Backend`."""
    return backend_of(x).caller()(model, x, t)


def prediction(backend: Backend, m: Any, x: Any, factors: Sequence[Any], threshold: Callable[[Any], Any] | None) -> Any:
    """Return `convert`'s prediction in the dtype of the state x, and in memory that no model writes into.

    m may lie in a buffer that the model overwrites later, and so may what a threshold returns.
    """
    p = convert(backend.cast(m, x.dtype), x, factors, threshold, backend.combine)
    return backend.copied(backend.cast(p, x.dtype), m, threshold is not None)


@dataclass(frozen=True)
class Predictor:
    """What every loop over rows needs from a model: it calls the network, checks the output, and converts it to the prediction.

    Attributes
    ----------
    model : callable
    backend : Backend
        Of the states.
    dtype : dtype
        The one in which the network is given x; states may be carried in a higher precision.
    threshold : callable, optional
        See `Denoiser`.
    """

    model: Callable[[Any, Any], Any]
    backend: Backend
    dtype: Any
    threshold: Callable[[Any], Any] | None = None

    def output(self, x: Any, t: Any, level: Any) -> Any:
        """Return the network's output at the state x, the times t of shape (batch,) and their noise level."""
        return self.evaluator()(x, t, level)

    def evaluator(self) -> Callable[[Any, Any, Any], Any]:
        """Return `output` as a fast function for a loop: what every call needs is looked up once."""
        model, at, dtype = self.model, getattr(self.model, "at", None), self.dtype
        call, cast = self.backend.caller(), self.backend.cast

        def output(x: Any, t: Any, level: Any) -> Any:
            x_in = x if x.dtype is dtype else cast(x, dtype)
            m = call(model if at is None else lambda x, t: at(x, t, level), x_in, t)
            return m if type(m) is type(x_in) and m.shape == x_in.shape else checked_output("model(x, t)", m, x_in, level)

        return output

    def outputs(self, states: list[Any], times: Any, levels: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
        """Return the network's outputs at the states of rows, in one call on a batch of them all.

        `times` are given to the network, and `levels` are t, alpha and sigma; each of shape (rows, batch).
        """
        if len(states) == 1:
            return [self.output(states[0], times[0], rows[0])]
        batch, shape = len(states[0]), (-1, *(1,) * (states[0].ndim - 1))
        t, alpha, sigma = (values.reshape(shape) for values in levels)
        level = Levels(t, alpha, sigma, len(states))
        m = self.output(self.backend.xp.concatenate(states), times.reshape(-1), level)
        return [m[k * batch : (k + 1) * batch] for k in range(len(states))]

    def prediction(self, m: Any, x: Any, factors: Any) -> Any:
        """Return p of an output m at the state x; for the factors see `conversions`."""
        return prediction(self.backend, m, x, factors, self.threshold)

    def __call__(self, x: Any, t: Any, level: Any, factors: Sequence[Any]) -> Any:
        """Return p at the state x."""
        return self.prediction(self.output(x, t, level), x, factors)


@dataclass(frozen=True)
class Denoiser:
    r"""A network with what it predicts and the schedule it was trained on; `deis.sample` takes one as its model.

    With x = alpha x_0 + sigma eps a network may predict eps; x0; v = alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512);
    the score -eps/sigma; or the velocity of flow matching, eps - x_0. The choice is independent of the form of a plan.

    Attributes
    ----------
    model : callable
        model(x, t) -> output of the shape of x, with t of shape (batch,); or one with a method `at`, see `deis.model.guidance`.
    sde : Schedule
    predicts : {"eps", "x0", "v", "score", "flow"}
        "data", as plans call their form, is taken as "x0".
    threshold : callable, optional
        x_0 -> x_0, applied to the predicted data at every evaluation, as `deis.static_threshold` and
        `deis.dynamic_threshold` make.
    shape : tuple of int or None, optional
        Of one sample, where it is known, with None for a side that may have any length; given data are compared with it.

    Raises
    ------
    ValueError
        For an unknown `predicts`, or one that contradicts a model that states what it predicts, as a Denoiser does.
    TypeError
        If the model cannot be called with (x, t), or sde is not a schedule.
    """

    model: Callable[[Any, Any], Any]
    sde: Schedule
    predicts: str = "eps"
    threshold: Callable[[Any], Any] | None = None
    shape: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        check_model("model", self.model)
        check_schedule(self.sde)
        object.__setattr__(self, "predicts", one_of("predicts", named(self.predicts), _OUTPUTS))
        if self.threshold is not None:
            function("threshold", self.threshold, "x_0")
        told = getattr(self.model, "predicts", self.predicts)
        if isinstance(told, str) and told != self.predicts:
            raise ValueError(f"predicts={self.predicts!r} contradicts the model, which predicts {told!r}; give predicts={told!r}")
        if isinstance(self.model, Denoiser) and self.model.threshold not in (None, self.threshold):
            raise ValueError("model is a Denoiser with a threshold, which would be dropped; use it itself, or give its threshold=")

    def __call__(self, x: Any, t: Any) -> Any:
        """Return the network's own output."""
        return call_model(self.model, x, t)

    def at(self, x: Any, t: Any, level: Level | Levels) -> Any:
        """Return the network's own output at a noise level known in numbers; the executors call this."""
        return evaluate(self.model, x, t, level)

    def level(self, t: float) -> Level:
        """Return the noise level at a time.

        Raises
        ------
        ValueError
            If t is not a number, or one at which the schedule has no noise level.
        """
        t = number("t", t)
        with np.errstate(all="ignore"):
            level = Level(t, float(self.sde.alpha(t)), float(self.sde.sigma(t)))
        last = np.inf if self.sde.num_times is None else self.sde.num_times - 1
        if not (np.isfinite(level).all() and min(0.0, self.sde.t_end) <= t <= last):
            raise ValueError(f"t={t!r} leaves the schedule {self.sde.name}: it has no alpha and sigma there")
        return level

    def predict(self, x: Any, t: float, target: str = "x0") -> Any:
        """Return the prediction at (x, t) as `target`, one of the five; thresholded.

        Parameters
        ----------
        x : array of shape (batch, ...)
        t : float
            The time of the whole batch, a plain number, not traced.

        Notes
        -----
        If the output does not determine x_0 or eps, that one is 0: at sigma = 0, x is independent of eps, whose mean is 0; at
        alpha = 0 it is independent of x_0, whose mean is 0 for centred data. `deis.sample` refuses a plan that would need either.

        Raises
        ------
        ValueError
            For an unknown target; for a t below 0, beyond the schedule's start or NaN; for an output of another shape than x;
            and for the score at sigma = 0, where the noisy distribution has none, unless the network predicts it.
        """
        target = one_of("target", named(target), _OUTPUTS)
        level = self.level(t)
        if self.sde.num_times is None and level.t > self.sde.t_start:
            raise ValueError(
                f"t={level.t!r} lies beyond the schedule {self.sde.name}, which starts at {self.sde.t_start!r}; give a time within "
                "it, or make the schedule with a greater sampling_T"
            )
        check_state("x", x)
        m = checked_output("model(x, t)", self.at(x, times(x, level.t, self.sde.num_times), level), x)
        if target == self.predicts and self.threshold is None:
            return m
        k, a, b = _OUTPUTS[target](level.alpha, level.sigma)
        if k == 0:
            raise ValueError(f"target='score' is undefined where sigma is 0, at t={t!r}; ask for 'x0' or 'eps'")
        x_0, eps = (self._part(m, x, level, self.predicts, part) for part in ("x0", "eps"))
        if self.threshold is not None:
            x_0 = self.threshold(x_0)
            eps = self._part(x_0, x, level, "x0", "eps")
        return a / k * x_0 + b / k * eps

    @staticmethod
    def _part(m: Any, x: Any, level: Level, predicts: str, target: str) -> Any:
        try:
            return _linear(m, x, *coefficients(predicts, target, level.alpha, level.sigma))
        except ZeroDivisionError:
            return 0 * x


def check_sample(argument: str, x: Any, model: Any) -> None:
    """Raise ValueError if data do not have the shape of the samples of a model that declares it."""
    check_state(argument, x)
    shape = getattr(model, "shape", None)
    if not isinstance(shape, tuple):
        return
    own = tuple(x.shape[1:])
    if len(own) != len(shape) or any(side not in (None, length) for side, length in zip(shape, own, strict=True)):
        wanted = tuple("any" if side is None else side for side in shape)
        raise ValueError(
            f"{argument} has samples of shape {own}, and those of the model have {wanted}; resize them, or add the channel axis"
        )


def checked_output(call: str, m: Any, x: Any, level: Any = None) -> Any:
    """Return what a model returned, checked to be an array like x; an error names the time if the level is in numbers."""
    if (type(m) is type(x) or backend_of(m) is backend_of(x)) and getattr(m, "shape", None) == x.shape:
        return m
    got = f"shape {tuple(m.shape)}" if hasattr(m, "shape") else f"a {type(m).__name__}"
    at = f" at t={level.t!r}" if isinstance(getattr(level, "t", None), float) else ""
    raise ValueError(
        f"{call} returned {got}{at} for x of shape {tuple(x.shape)}; it must return one "
        f"{type(x).__name__} of the shape of x (not a tuple, nor an output object: take its .sample)"
    )


def times(x: Any, t: float, num_times: int | None) -> Any:
    """Return t for each sample, as an integer where the schedule's times are integers and t is one of them."""
    return backend_of(x).full(x, [t], x.dtype, num_times is not None and t == round(t))[0]


def edm_preconditioned(network: Callable[[Any, Any], Any], sigma_data: float = 0.5) -> Callable[[Any, Any], Any]:
    r"""Return the model(x, sigma) -> x_0 of a raw network F that was trained with EDM's preconditioning.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), with c_skip = s^2 / (sigma^2 + s^2), c_out = sigma s / sqrt(sigma^2 + s^2),
    c_in = 1 / sqrt(sigma^2 + s^2), c_noise = log(sigma) / 4 and s = sigma_data (Karras et al., arXiv 2206.00364, table 1). Use it
    as ``deis.Denoiser(deis.edm_preconditioned(network), deis.EDM(), predicts="x0")``.

    Raises
    ------
    ValueError
        Where sigma_data is not positive.
    """
    function("network", network, "x", "c_noise")
    sigma_data = number("sigma_data", sigma_data, above=0, hint="it is the standard deviation of the data")

    def model(x: Any, sigma: Any) -> Any:
        xp = backend_of(x).xp
        s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        total = s**2 + sigma_data**2
        tiny = np.finfo(np.float32).tiny  # at sigma = 0 c_out is 0, and log must only be finite
        output = network(x / xp.sqrt(total), xp.log(sigma.clip(tiny, None)) / 4)
        return sigma_data**2 / total * x + s * sigma_data / xp.sqrt(total) * output

    return model
