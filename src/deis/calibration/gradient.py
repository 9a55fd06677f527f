"""All coefficients and times of a plan by Adam, with derivatives through the model; for any loss of the ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from ..arrays import Array
from ..backends import backend_of, like, to_numpy
from ..backends.numpy import combine
from ..extras import needs
from ..foreign import is_jax, is_torch
from ..machine import advance, guessed, run_rows
from ..model.predictions import Denoiser, Level, Predictor, factors
from .judge import Loss, measured, sample_losses
from .network import Student, rmse
from .table import Table, row_of
from .teacher import Teacher

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes a function run again in the backward pass, so that only its inputs are kept."""
_EVERY = 10  # steps between looks at the validation samples
_PATIENCE = 8
_RATE = 2e-3


def fit_gradient(
    student: Student,
    table: Table,
    teacher: Teacher,
    fit: int,
    window: int,
    *,
    loss: Loss,
    steps: int,
    turns: Iterable[int],
    times: bool = True,
) -> Table:
    """Return the table after at most `steps` steps of Adam on the loss, by back-propagation through the whole sampler.

    The model is called again in the backward pass (checkpointed row by row), so that each evaluation adds only its state to the
    memory. The inner times are t_0 - (t_0 - t_n) cumsum(softmax(z)), in order whatever z is. The times of a discrete plan, or of
    stages within steps, are left alone. The learning rate falls from 2e-3 to 0, where 1 changes the state by its own size. Each
    step takes one batch of the samples. The table that did best on the validation samples is returned.

    Raises
    ------
    TypeError
        For a model in NumPy, which has no derivatives.
    ImportError
        Where JAX is the framework and optax is missing.
    """
    x_T, end = student.network.x_T, teacher.end
    if not (is_torch(x_T) or is_jax(x_T)):
        raise TypeError("stages has 'gradient', and a model in NumPy has no derivatives; leave the stage out")
    parameters = _Parameters.of(student, table, window, times)
    errors = rmse(student.run(table, student.network.numpy()[:fit]), end[:fit])
    objective = _Objective(student, parameters, loss, max(0.3 * float(np.median(errors)), 1e-12))
    adam = (_TorchAdam if is_torch(x_T) else _JaxAdam)(objective, student.network.denoiser, *parameters.zeros(), x_T)
    batches = [(first, min(first + student.network.batch, fit)) for first in range(0, fit, student.network.batch)]
    best, least, since = table, measured(student, table, teacher, fit, loss, objective.c), 0
    for k in turns:
        first, last = batches[k % len(batches)]
        adam.step(_RATE * (1 - k / steps), first, last, end[first:last], _noise_levels(student, parameters.table(*adam.numpy())))
        student.network.evaluations += 3 * len(table.a) * (last - first)
        if k % _EVERY == _EVERY - 1 or k == steps - 1:
            now = parameters.table(*adam.numpy())
            error = measured(student, now, teacher, fit, loss, objective.c)
            best, least, since = (now, error, 0) if error < least else (best, least, since + 1)
            if since >= _PATIENCE:
                break
    return best


@dataclass(frozen=True)
class _Parameters:
    """A table as a function of a vector: its coefficients along state-sized directions, and the logits of its increments of t."""

    start: Table
    basis: Array
    """Shape (n, n + 1, n + 1): the change of (a, c_0, ...) of each row by a unit of each of its parameters."""
    logits: Array
    """Shape (n,), or (0,) where the times stay."""

    @classmethod
    def of(cls, student: Student, table: Table, window: int, times: bool) -> _Parameters:
        n, x, history = len(table.a), student.network.numpy()[: student.network.batch], tuple[Array, ...]()
        basis = np.zeros((n, n + 1, n + 1))
        for i, row in enumerate(table.rows):
            history = (student.predict(i, x, table.t[i]), *history)
            basis[i, 0, 0] = student.free[i, 0]
            nodes = np.flatnonzero(student.free[i, 1 : min(window, i + 1) + 1]).tolist()
            for k, j in enumerate(nodes):
                differs = 0 < k < len(nodes) - 1
                push = history[j] - history[nodes[k + 1]] if differs else history[j]
                scale = np.sqrt(np.square(x).mean() / max(np.square(push).mean(), 1e-12))
                basis[i, 1 + j, 1 + j] = scale
                if differs:
                    basis[i, 1 + j, 1 + nodes[k + 1]] = -scale
            x = advance(row, x, history, combine)[1]
        steps, plan = -np.diff(table.t), student.plan
        falling = times and plan.accepts[plan.calls].all() and (steps >= 0).all() and not plan.discrete and n > 1
        with np.errstate(divide="ignore"):  # of a first call that is still at the time of the start
            return cls(table, basis, np.log(steps) if falling else np.zeros(0))

    def zeros(self) -> tuple[Array, Array]:
        """Return the parameters (theta, z) of the table it starts from."""
        return np.zeros(self.basis.shape[:2]), np.zeros(len(self.logits))

    def coefficients(self, theta: Any, xp: Any) -> Any:
        """Return (a, c) as an array of shape (n, n + 1)."""
        return xp.asarray(self.start.theta) + (theta[:, :, None] * xp.asarray(self.basis)).sum(1)

    def times(self, z: Any, xp: Any) -> Any:
        """Return the n times of the evaluations."""
        t = self.start.t
        if len(self.logits) == 0:
            return xp.asarray(t[:-1])
        share = xp.exp(xp.asarray(self.logits) + z)
        place = xp.cumsum(share / share.sum(), 0)
        return t[0] - (t[0] - t[-1]) * (place - share / share.sum())

    def table(self, theta: Array, z: Array) -> Table:
        """Return the table of the parameters."""
        numbers = self.coefficients(theta, np)
        t = np.append(self.times(z, np), self.start.t[-1])
        t[0] = self.start.t[0]
        return Table(t, numbers[:, 0], numbers[:, 1:])


def _noise_levels(student: Student, table: Table) -> Array:
    """Return the times of a table, alpha and sigma there, and the derivatives of these; shape (5, n), by central differences."""
    sde, t = student.network.sde, table.t[:-1]
    low, high = sorted((sde.t_end, sde.t_start))
    before, after = np.clip(t - 1e-5 * (high - low), low, high), np.clip(t + 1e-5 * (high - low), low, high)
    slopes = [(f(after) - f(before)) / (after - before) for f in (sde.alpha, sde.sigma)]
    return np.stack([t, sde.alpha(t), sde.sigma(t), *slopes])


def _predict(denoiser: Denoiser, form: str, x: Any, t: Any, alpha: Any, sigma: Any) -> Any:
    """Call a model at a traced noise level, and convert its output."""
    level, predictor = Level(t, alpha, sigma), Predictor(denoiser, backend_of(x), x.dtype, denoiser.threshold)
    row = factors(denoiser.predicts, form, level, denoiser.threshold is not None)
    return predictor(x, t + 0 * x.reshape(len(x), -1)[:, 0], level, row)


@dataclass(frozen=True)
class _Objective:
    """The mean loss of the final states as a function of the parameters, in torch or JAX, and traced."""

    student: Student
    parameters: _Parameters
    loss: Loss
    c: float

    def __call__(self, values: Any, x_T: Any, target: Any, levels: Any, denoiser: Denoiser, checkpoint: Wrap) -> Any:
        """Return the loss of the final states from x_T; `levels` are those of `_noise_levels` at the same parameters."""
        return sample_losses(self.loss, self.end(values, x_T, levels, denoiser, checkpoint), target, self.c).mean()

    def end(self, values: Any, x_T: Any, levels: Any, denoiser: Denoiser, checkpoint: Wrap) -> Any:
        """Return the final states from x_T for the parameters (theta, z)."""
        plan, xp = self.student.plan, backend_of(x_T).xp
        rows, t = (_cast(v, x_T) for v in (self.parameters.coefficients(values[0], xp), self.parameters.times(values[1], xp)))
        predict, multiply = checkpoint(partial(_predict, denoiser, plan.form)), backend_of(x_T).combine

        def predicted(i: int, x: Any) -> Any:
            if not plan.calls[i]:
                return guessed(plan.rows[i], x, multiply)
            # The schedule is NumPy's: its value, and its derivative times a difference whose value is 0.
            alpha, sigma = (levels[k][i] + levels[k + 2][i] * (t[i] - levels[0][i]) for k in (1, 2))
            return predict(x, t[i], alpha, sigma)

        return run_rows([row_of(theta) for theta in rows], predicted, multiply, x_T)


def _cast(v: Any, x: Any) -> Any:
    return v.to(x) if is_torch(x) else v.astype(x.dtype)


class _TorchAdam:
    """Adam on the parameters in float64, whatever the model computes in."""

    def __init__(self, objective: _Objective, denoiser: Callable[[int, int], Denoiser], theta: Array, z: Array, x_T: Any) -> None:
        import torch

        self.objective, self.denoiser, self.x_T = objective, denoiser, x_T
        self.values = [torch.from_numpy(value).requires_grad_() for value in (theta, z)]
        self.adam = torch.optim.Adam(self.values)

    def step(self, rate: float, first: int, last: int, target: Array, levels: Array) -> None:
        import torch
        from torch.utils.checkpoint import checkpoint

        def wrap(predict: Callable[..., Any]) -> Callable[..., Any]:
            return partial(checkpoint, predict, use_reentrant=False)

        x_T = self.x_T[first:last]
        self.adam.zero_grad()
        with torch.enable_grad():
            self.objective(self.values, x_T, like(target, x_T), like(levels, x_T), self.denoiser(first, last), wrap).backward()
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()

    def numpy(self) -> tuple[Array, ...]:
        return tuple(to_numpy(value).copy() for value in self.values)


class _JaxAdam:
    """Adam on the parameters in the precision of the model; its gradient is compiled for each batch."""

    def __init__(self, objective: _Objective, denoiser: Callable[[int, int], Denoiser], theta: Array, z: Array, x_T: Any) -> None:
        with needs("jax", "the stage 'gradient' in JAX"):
            import optax
        import jax

        self.x_T, self.values = x_T, (like(theta, x_T), like(z, x_T))
        self.adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
        self.state = self.adam.init(self.values)

        @cache
        def gradient(first: int, last: int) -> Any:
            return jax.jit(jax.grad(partial(objective, denoiser=denoiser(first, last), checkpoint=jax.checkpoint)))

        self.gradient = gradient

    def step(self, rate: float, first: int, last: int, target: Array, levels: Array) -> None:
        import optax

        x_T = self.x_T[first:last]
        gradients = self.gradient(first, last)(self.values, x_T, like(target, x_T), like(levels, x_T))
        self.state.hyperparams["learning_rate"] = like(np.array(rate), x_T)
        updates, self.state = self.adam.update(gradients, self.state)
        self.values = optax.apply_updates(self.values, updates)

    def numpy(self) -> tuple[Array, ...]:
        return tuple(to_numpy(value) for value in self.values)
