"""Inverse problems: denoisers of the posterior p(x_0 | y) for measurements y = A x_0 + noise n, made of denoisers of the prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arguments import check_state, kind, number, one_of
from ..backends import backend_of
from ..foreign import is_traced
from ..host import take
from ..operators import LinearOperator, beside
from .predictions import Denoiser, Level, Levels, checked_output, factors, quotient, response
from .pretrained import without_labels

METHODS = ("pigdm", "dps", "replacement")


@dataclass(frozen=True, eq=False)
class _Posterior:
    """A denoiser whose x_0-hat is moved towards the measurements; see `posterior`."""

    denoiser: Denoiser
    operator: LinearOperator
    y: Any
    noise: float
    method: str
    weight: float
    deviation: float

    def __call__(self, x: Any, t: Any) -> Any:
        return self.at(x, t, self.denoiser.level(float(t[0])))  # one time for the whole batch

    def at(self, x: Any, t: Any, level: Level | Levels) -> Any:
        backend, predicts = backend_of(x), self.denoiser.predicts
        dtype = backend.carry(x.dtype)
        m, pull = self._evaluate(x, t, level)
        c_x, c_m = self._factors(level)
        wide = backend.cast(m, dtype)
        step = self._steps(c_x * backend.cast(x, dtype) + c_m * wide, level)
        if pull is not None:
            # The covariance of x_0 given x_t is sigma^2/alpha dx_0-hat/dx, in place of the assumed r^2. At alpha = 0 it is 0/0.
            square = (level.alpha * self.deviation) ** 2 + level.sigma**2
            ratio = quotient(square, level.alpha * self.deviation**2)
            pulled = ratio * (c_x * step + c_m * backend.cast(pull(step), dtype))
            step = pulled if isinstance(level.alpha, float) else backend.xp.where(level.alpha == 0, step, pulled)
        return wide + response(predicts, level.alpha, level.sigma) * step

    def _evaluate(self, x: Any, t: Any, level: Level | Levels) -> tuple[Any, Callable[[Any], Any] | None]:
        """Return the denoiser's output, and its vector-Jacobian product where the method needs it."""

        def output(x: Any, t: Any) -> Any:
            return checked_output("the denoiser's model(x, t)", self.denoiser.at(x, t, level), x)

        if self.method == "replacement" or (isinstance(level.alpha, float) and level.alpha == 0):
            return output(x, t), None
        vjp = backend_of(x).vjp
        if vjp is None:
            raise TypeError(
                f"method={self.method!r} differentiates the network, which torch and JAX can, and x is a {type(x).__name__}; "
                "give an array of one of these, or method='replacement'"
            )
        return vjp(output, x, t)

    def _factors(self, level: Level | Levels) -> tuple[Any, ...]:
        predicts = self.denoiser.predicts
        try:
            return factors(predicts, "x0", level)
        except ZeroDivisionError:
            raise ValueError(
                f"predicts={predicts!r} does not determine x_0 at t={level.t!r}, where alpha={level.alpha!r}, and the posterior "
                "asks for it; start elsewhere, or use a network that predicts v, flow or x0"
            ) from None

    def _steps(self, x_0: Any, level: Level | Levels) -> Any:
        """Return the step in x_0 for each copy of the batch: the operator and y belong to one."""
        if not isinstance(level, Levels):
            return self._step(x_0, level.alpha, level.sigma)
        if level.samples is not None:  # operator and y are of the whole batch: any sample stands for those that are not evaluated
            stand_ins = np.zeros(level.batch or 0, dtype=np.intp)
            stand_ins[level.samples] = np.arange(len(x_0))
            step = self._step(*(take(v, stand_ins) for v in (x_0, level.alpha, level.sigma)))
            return take(step, level.samples)
        size = len(x_0) // level.copies
        parts = [slice(k * size, (k + 1) * size) for k in range(level.copies)]
        return backend_of(x_0).xp.concatenate([self._step(x_0[p], level.alpha[p], level.sigma[p]) for p in parts])

    def _step(self, x_0: Any, alpha: Any, sigma: Any) -> Any:
        """Return the mean of x_0 given x_t and y, if its covariance given x_t were the assumed r^2 I."""
        operator, variance = self.operator, _variance(self.deviation, alpha, sigma)
        residual = self._residual(x_0)
        if self.method == "dps":
            return _along_gradient(operator, residual, x_0, variance, self.noise) * self.weight
        if self.noise == 0:
            return operator.pseudo_inverse(residual, 0.0)
        return operator.pseudo_inverse(residual, quotient(self.noise**2, variance)) * (variance > 0)

    def _residual(self, x_0: Any) -> Any:
        image, y = self.operator(x_0), self.y
        if tuple(y.shape[1:]) != tuple(image.shape[1:]) or len(y) not in (1, len(image)):
            raise ValueError(
                f"y has shape {tuple(y.shape)} and A x has shape {tuple(image.shape)} for x of shape {tuple(x_0.shape)}; give "
                "y of that shape, one for each sample or a batch of one for all"
            )
        residual = beside("y", y, image) - image
        return residual if self.operator.measured is None else residual * self.operator.measured(residual)


def _variance(deviation: float, alpha: Any, sigma: Any) -> Any:
    """Return r^2, the variance of x_0 given x_t for independent Gaussian data of that deviation."""
    return (deviation * sigma) ** 2 / ((deviation * alpha) ** 2 + sigma**2)


def _along_gradient(operator: LinearOperator, residual: Any, x_0: Any, variance: Any, noise: float) -> Any:
    """Return r^2 A^T residual / |residual| sqrt(count) / s, with s^2 the variance of A x_0 + noise n along the residual."""
    xp = backend_of(x_0).xp

    def norm(z: Any) -> Any:
        return xp.sqrt((z * z).reshape(len(z), -1).sum(1)).reshape(-1, *(1,) * (x_0.ndim - 1))

    ones = xp.ones_like(residual) if operator.measured is None else operator.measured(residual)
    direction, length = operator.adjoint(residual), norm(residual)
    spread = xp.sqrt(variance * norm(direction) ** 2 + (noise * length) ** 2)  # |residual| s
    return variance * norm(ones) * quotient(direction, spread)


def posterior(
    denoiser: Denoiser,
    operator: LinearOperator,
    y: Any,
    noise: float,
    method: str = "pigdm",
    *,
    weight: float | None = None,
    deviation: float = 1.0,
) -> Denoiser:
    r"""Return the denoiser of x_0 given measurements y = A x_0 + noise n, with n standard normal, for any plan.

    With x_0-hat the denoiser's prediction at x_t, r^2 = c^2 sigma^2 / (alpha^2 c^2 + sigma^2) and c = `deviation`, x_0-hat becomes

    - "replacement": x_0-hat + u with u = A^T (A A^T + noise^2/r^2 I)^+ (y - A x_0-hat), without gradients (DDNM, Wang et al., arXiv
      2212.00490; without noise u = A^+ (y - A x_0-hat));
    - "pigdm": x_0-hat + sigma^2/(alpha r^2) (dx_0-hat/dx_t)^T u, the gradient of log N(y; A x_0-hat, r^2 A A^T + noise^2 I) with
      the covariance held fixed (Song et al., ICLR 2023);
    - "dps": x_0-hat - sigma^2/alpha zeta grad \|y - A x_0-hat\|, the gradient in x_t (Chung et al., arXiv 2209.14687).

    r^2 is the variance of x_0 given x_t for independent Gaussian data of deviation c; c = 1 on a VP schedule is that of PiGDM,
    sigma^2/(sigma^2 + alpha^2). For such data "pigdm" and "replacement" are exact.

    The paper's zeta is a constant for its own 1,000 steps. Here zeta = weight sqrt(count)/s for `count` measurements, where
    s^2 = r^2 \|A^T e\|^2 + noise^2 is the variance expected along the direction e of the residual. At weight 1 the gradient is that
    of the Gaussian likelihood if the residual is as long as expected, for plans of any number of steps. Its length does not shrink
    with the residual, so a network that magnifies it may overshoot and diverge; the default is therefore 0.5.

    Parameters
    ----------
    denoiser : Denoiser or Pretrained
        Its threshold is that of the result, and is applied after the data have moved.
    operator : LinearOperator
        A; see `deis.operators`.
    y : array of a floating dtype
        Of the shape of A x, or with a batch of 1 for all samples; of NumPy or the framework of x. It is used in the precision of
        the states, float32 or better.
    noise : float
        The standard deviation of the measurements' noise; 0 for none.
    method : {"pigdm", "dps", "replacement"}
    weight : float, optional
        For "dps", 0.5 by default; 0 is the prior.
    deviation : float
        c.

    Returns
    -------
    Denoiser
        It predicts what the given one predicts. A call is one call of the network, and with "pigdm" and "dps" one pass backwards.

    Notes
    -----
    At alpha = 0, x_t is independent of x_0, and the gradient of x_0-hat is replaced by its limit under the assumed prior,
    r^2 alpha / sigma^2. At sigma = 0 only a network of x_0 changes its output.

    Raises
    ------
    TypeError
        If denoiser is not a Denoiser, operator not a LinearOperator, y not a floating array of the framework of x; and, on use,
        for NumPy arrays with a method that needs gradients.
    ValueError
        Where y is not finite, noise negative, method unknown, weight negative or given for another method than "dps", or deviation
        not positive; and, on use, if y does not have the shape of A x, or the operator does not take x.
    """
    denoiser = without_labels(denoiser)
    kind("denoiser", denoiser, Denoiser, "a deis.Denoiser, which says what it predicts,")
    kind("operator", operator, LinearOperator, "a deis.operators.LinearOperator, as deis.operators.linear makes of a function,")
    check_state("y", y)
    if not (is_traced(y) or bool(backend_of(y).xp.isfinite(y).all())):
        raise ValueError("y has NaN or infinity; give finite measurements, and 0 where a mask hides them")
    noise = number("noise", noise, least=0, hint="it is the standard deviation of y about A x_0")
    one_of("method", method, METHODS)
    if weight is not None and method != "dps":
        raise ValueError(f"weight={weight!r} is for method='dps', and method={method!r}; leave it out")
    weight = number("weight", 0.5 if weight is None else weight, least=0, hint="0 is the prior")
    deviation = number("deviation", deviation, above=0, hint="it is the standard deviation of the data")
    if not (math.isfinite(noise * noise) and 0 < deviation * deviation < math.inf):
        raise ValueError(f"noise={noise!r} and deviation={deviation!r} must have squares that a float can hold; scale the data")
    model: Any = _Posterior(denoiser, operator, y, noise, method, weight, deviation)
    return replace(denoiser, model=model)
