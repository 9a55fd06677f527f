"""The likelihood of data under a model: the change of variables along an encoding plan, as one more coordinate of its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .arguments import check_state, flag, number, whole
from .backends import backend_of, to_numpy
from .backends.record import Backend
from .foreign import is_jax, is_traced
from .machine import Combine, run_rows
from .methods import ANALYTICAL
from .methods.layout import gaussian_guess
from .model.predictions import Denoiser, Predictor, check_model, check_sample, conversions
from .plan import Plan
from .run import check_direction, told_for_plan

State = tuple[Any, Any]
"""x, and the scaled logarithms of its volume by probe, of shape (batch, k)."""
GREY = 127.5
"""The levels of grey to a unit of data: 256 of them from -1 to 1."""


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    r"""What `log_likelihood` returns, by sample.

    Attributes
    ----------
    nats : array of shape (batch,)
        log p(x_0), the density of the model's data at the plan's first time.
    bits_per_dim : array of shape (batch,)
        -nats / (d log 2) + log2(127.5), with d the size of a sample. Images have 256 grey levels 0 ... 255, and
        x_0 = (level + u - 1/2) / 127.5 - 1, where u is uniform on [0, 1) (uniform dequantisation). Then this is the number of bits
        per grey level, and in the mean over u an upper bound. For other data it has no meaning.
    standard_error : array of shape (batch,), or None
        The standard error of nats due to the probes of its divergence, and no other error; 0 if exact, None for a single probe.
    nfe : int
        The network's evaluations, each for the whole batch and with all its derivatives.
    """

    nats: Any
    bits_per_dim: Any
    standard_error: Any
    nfe: int


def log_likelihood(
    model: Callable[[Any, Any], Any],
    x_0: Any,
    plan: Plan,
    *,
    predicts: str | None = None,
    rng: Any = None,
    probes: int = 1,
    exact: bool = False,
    data_deviation: float = 0.1,
    prior_deviation: float | None = None,
) -> LogLikelihood:
    r"""Return the logarithm of the density that a model gives to data, by encoding.

    The probability flow carries x_0 to x_T, whose density is the prior's, and changes volumes on the way (Chen et al., arXiv
    1806.07366; Song et al., arXiv 2011.13456, section 4.3)::

        log p(x_0) = log N(x_T; 0, prior_deviation^2) + log |det dx_T / dx_0|

    In the eps form v = x / alpha has dv = eps d(rho), and so d log |det dv/dv_0| = alpha tr(d eps/dx) d(rho). That is one more
    coordinate of the same equation: with x goes y = alpha log |det|, whose prediction is alpha tr(d eps/dx), through the same rows
    and weights, at the order of the method. In the data form it is sigma, the data and 1 / rho. Gaussian data of deviation c have
    the volume s_T^d / s_0^d with s^2 = alpha^2 c^2 + sigma^2; the rows carry only what a model has beside that.

    Parameters
    ----------
    model : callable, Denoiser or Pretrained
        As for `deis.encode`, and differentiable in x.
    x_0 : torch.Tensor or jax.Array of shape (batch, ...)
        The data, in float32 or float64. The density is that of the model at plan.t[0], that is, of data with that little noise.
    plan : Plan
        From ``deis.make_plan(sde, method, nfe=..., direction="encode")``, with any method that does not add noise. Volumes change
        most where the noise is least, and so the grid matters: ts_phase="vp_t" and ts_order=5 are good, see docs/likelihood.md.
    predicts
        As for `deis.encode`.
    rng : torch.Generator or jax.random key, or one per sample
        Random numbers for the probes. A sample depends on its own stream alone, see `deis.sample`.
    probes : int
        The divergence is the mean of z . J z over this many z of random signs (Hutchinson), the same ones along the whole path
        (Grathwohl et al., arXiv 1810.01367). Its expectation is the divergence.
    exact : bool
        Use each unit vector in turn in place of random probes: as many derivatives as a sample has numbers.
    data_deviation : float
        The c above. With any c the error has the order of the method. It is small if c is near the local deviation of the data:
        for images in [-1, 1], that of neighbouring pixels, not that of the whole image.
    prior_deviation : float, optional
        The standard deviation of the prior; by default sigma at the plan's end, where alpha x_0 is neglected.

    Returns
    -------
    LogLikelihood
        In JAX also within `jit`. In torch no gradients pass through it.

    Raises
    ------
    TypeError
        For arrays of NumPy, which has no derivatives, and where rng is not of the kind of x_0.
    ValueError
        For a plan that leads to data, is fitted, guesses a prediction, or in the eps form ends at alpha = 0; a model with a
        threshold; half precision; a missing rng; a network that records no derivatives; and a result that is not finite.

    Notes
    -----
    Derivatives are by reverse mode, which every network that was trained has: one evaluation a row, and a pass back for each probe.
    """
    _check_plan(plan)
    backend, vjp = _differentiable(x_0)
    check_model("model", model)
    check_sample("x_0", x_0, model)
    flag("exact", exact)
    probes, c = whole("probes", probes), number("data_deviation", data_deviation, above=0)
    deviation = number("prior_deviation", plan.sigma[-1] if prior_deviation is None else prior_deviation, above=0)
    model, predicts, _ = told_for_plan(model, plan, predicts)
    if _has_threshold(model):
        raise ValueError("model has a threshold, and so no density of its own; make the deis.Denoiser without threshold=")
    size = math.prod(x_0.shape[1:])
    z = _unit_vectors(x_0, size) if exact else _signs(backend, x_0, rng, probes)
    predictor = Predictor(model, backend, x_0.dtype)
    x_T, changes = _Flow(plan, predictor, vjp, z, 1 if exact else size, c).run(x_0, conversions(plan, predicts))
    change, error = _summed(changes, exact)
    spread = np.hypot(plan.alpha * c, plan.sigma)
    known = size * (math.log(spread[-1] / spread[0]) - math.log(deviation) - math.log(2 * math.pi) / 2)
    nats = known + change - ((x_T / deviation) ** 2).reshape(len(x_T), -1).sum(1) / 2
    return _finished(nats, error, size, plan.nfe)


def _has_threshold(model: Any) -> bool:
    """Return whether a denoiser, or one that it guides, has a threshold."""
    if isinstance(model, Denoiser):
        return model.threshold is not None or _has_threshold(model.model)
    inner = getattr(model, "denoiser", getattr(model, "strong", None))
    return isinstance(inner, Denoiser) and _has_threshold(inner)


def _check_plan(plan: Plan) -> None:
    check_direction(plan, "encode")
    if plan.fitted:
        raise ValueError(
            f"the plan {plan.method!r} is fitted to {plan.fitted}, and not to a change of volume; give an unfitted one"
        )
    if (plan.guess[~plan.calls] != 1).any() or plan.method.endswith(ANALYTICAL):  # a guess of 1 is an earlier state
        raise ValueError(f"the plan {plan.method!r} guesses a prediction, and so its change of volume; make it without afs=")
    if plan.form == "eps" and plan.alpha[-1] == 0:
        raise ValueError(
            f"form='eps' has no change of volume where alpha is 0, at t={plan.t[-1].item()!r}; use form='data', or end earlier"
        )


def _differentiable(x_0: Any) -> tuple[Backend, Callable[..., Any]]:
    """Return the framework of data, and its derivatives; see `Backend.vjp`."""
    check_state("x_0", x_0)
    backend = backend_of(x_0)
    if backend.vjp is None:
        raise TypeError(
            "x_0 is a numpy.ndarray, and NumPy has no derivatives; give a torch.Tensor or a jax.Array, and such a model"
        )
    _check_precision("x_0 has", backend, x_0)
    return backend, backend.vjp


def _check_precision(what: str, backend: Backend, x: Any) -> None:
    if backend.carry(x.dtype) != x.dtype:
        raise ValueError(f"{what} dtype {x.dtype}, too coarse for a sum over all dimensions; use float32 or float64")


def _signs(backend: Backend, x: Any, rng: Any, probes: int) -> Any:
    """Return probes of random signs, of shape (probes, *x.shape), each sample's from its own stream."""
    if rng is None:
        raise ValueError(
            "rng is missing, for the probes of the divergence; give a torch.Generator or a jax.random key, or exact=True"
        )
    draw, xp = backend.noise(rng, len(x)), backend.xp
    zero, one = xp.zeros_like(x), xp.ones_like(x)
    return xp.stack([xp.where(draw(1.0, zero, k) < 0, -one, one) for k in range(probes)])


def _unit_vectors(x: Any, size: int) -> Any:
    """Return the unit vectors of a sample, for each sample: shape (size, *x.shape)."""
    vectors = backend_of(x).like(np.eye(size), x).reshape(size, 1, *x.shape[1:])
    return backend_of(x).xp.broadcast_to(vectors, (size, *x.shape))


def _side_by_side(combine: Combine[Any]) -> Combine[State]:
    """Return what adds up states of several arrays, as `combine` adds up each."""

    def combined(c_x: Any, x: State, c_p: Any, history: Sequence[State]) -> State:
        x, y = (combine(c_x, part, c_p, [p[k] for p in history]) for k, part in enumerate(x))
        return x, y

    return combined


@dataclass(frozen=True, eq=False)
class _Flow:
    """A plan with the divergence of its predictions: rows that run on (x, y), where y is the level times log |det| by probe."""

    plan: Plan
    predictor: Predictor
    vjp: Callable[..., Any]
    z: Any
    square: float
    """z . z"""
    c: float

    def run(self, x: Any, factors: Sequence[Sequence[float]]) -> State:
        """Return x at the end of the plan, and the log |det| beside that of Gaussian data, by probe."""
        backend, plan = self.predictor.backend, self.plan
        state = x, backend.like(np.zeros((len(x), len(self.z))), x)
        known = [gaussian_guess(plan.form, row.alpha, row.sigma, self.c) for row in plan.rows]
        numbers = tuple((*pair, slope) for pair, slope in zip(factors, known, strict=True))
        with backend.no_grad():
            x, y = (self._scanned if is_jax(x) else self._eager)(state, numbers)
        return x, y / float(self._level(plan)[-1])

    def _eager(self, state: State, numbers: Sequence[Any]) -> State:
        backend, plan, x = self.predictor.backend, self.plan, state[0]
        rows, combine = plan.once(backend.prepared, x.dtype)
        times = backend.full(x, [row.t for row in plan.rows], x.dtype, plan.discrete)
        return run_rows(rows, lambda i, x: self._predict(x, times[i], rows[i], numbers[i]), _side_by_side(combine), state)

    def _scanned(self, state: State, numbers: Sequence[Any]) -> State:
        from .run.jax import scan_rows

        return scan_rows(self.plan, numbers, self._predict, _side_by_side(self.predictor.backend.combine), state)

    def _predict(self, state: State, t: Any, row: Any, numbers: Any) -> State:
        (x, _), (c_x, c_m, known), predictor = state, numbers, self.predictor

        def output(x: Any, t: Any) -> Any:
            m = predictor.output(x, t, row)
            _check_precision("model(x, t) returned", predictor.backend, m)
            return m

        m, pull = self.vjp(output, x, t)
        products = (predictor.backend.each(pull, self.z) * self.z).reshape(*self.z.shape[:2], -1).sum(-1).T
        divergence = (c_x - known) * self.square + c_m * products
        return predictor.prediction(m, x, (c_x, c_m)), self._level(row) * divergence

    def _level(self, at: Any) -> Any:
        """Return alpha, or sigma in the data form: what x is divided by to be an integral of predictions."""
        return at.alpha if self.plan.form == "eps" else at.sigma


def _summed(changes: Any, exact: bool) -> tuple[Any, Any]:
    """Return log |det| from its parts by unit vector or its estimates by probe, and the standard error."""
    count = changes.shape[1]
    if exact:
        return changes.sum(1), 0 * changes[:, 0]
    mean = changes.sum(1) / count
    if count == 1:
        return mean, None
    return mean, (((changes - mean[:, None]) ** 2).sum(1) / (count * (count - 1))) ** 0.5


def _finished(nats: Any, error: Any, size: int, nfe: int) -> LogLikelihood:
    """Return the result, checked where its numbers are known."""
    if is_jax(nats):
        _register_in_jax()
    if not is_traced(nats):
        wrong = ~np.isfinite(to_numpy(nats))
        if wrong.any():
            raise ValueError(
                f"the log-likelihood of sample {int(np.argmax(wrong))} is not finite; check that x_0 is, and that the model and "
                "its derivatives are at all times of the plan"
            )
    return LogLikelihood(nats, math.log2(GREY) - nats / (size * math.log(2)), error, nfe)


@cache
def _register_in_jax() -> None:
    """Let a function that JAX compiles return the result."""
    import jax

    jax.tree_util.register_dataclass(LogLikelihood, ["nats", "bits_per_dim", "standard_error"], ["nfe"])
