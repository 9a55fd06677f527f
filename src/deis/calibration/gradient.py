"""All coefficients and times of a plan by Adam, with derivatives through the model; for any loss of the ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..arguments import array
from ..arrays import AnyArray as Array
from ..extras import needs
from ..foreign import array_namespace, is_jax, is_torch, like
from ..model.predictions import Denoiser, Level, convert, evaluate, factors
from .network import Student, rmse
from .table import Table
from .teacher import Teacher

Loss = Literal["robust", "huber", "l1", "l2"] | Callable[[Any, Any], Any]
LOSSES = ("robust", "huber", "l1", "l2")
_EVERY = 10  # steps between looks at the validation samples
_PATIENCE = 8
_RATE = 2e-3


def sample_losses(loss: Loss, x: Any, target: Any, c: float) -> Any:
    """Return the loss of each sample, shape (N,), for arrays of any framework.

    With e the root mean square of x - target in a sample: "l2" is e^2, "huber" the pseudo-Huber sqrt(e^2 + c^2) - c, "robust"
    log(e^2 + c^2), and "l1" the mean of |x - target|.
    """
    if callable(loss):
        return loss(x, target)
    xp, d = array_namespace(x), (x - target).reshape(len(x), -1)
    if loss == "l1":
        return abs(d).mean(1)
    square = (d * d).mean(1)
    if loss == "l2":
        return square
    return xp.log(square + c**2) if loss == "robust" else xp.sqrt(square + c**2) - c


def measured(student: Student, table: Table, teacher: Teacher, first: int, loss: Loss) -> float:
    """Return the error of the samples from `first` on: the median of their differences, or of the losses of a function."""
    x = student.run(table, student.network.numpy()[first:], first)
    if not np.isfinite(x).all():
        return float("inf")
    if not callable(loss):
        return float(np.median(rmse(x, teacher.end[first:])))
    ends = (like(v, student.network.x_T) for v in (x, teacher.end[first:]))
    return float(np.median(array("the result of loss(x_0, target)", loss(*ends))))


def fit_gradient(
    student: Student, table: Table, teacher: Teacher, fit: int, window: int, *, loss: Loss, steps: int, times: bool = True
) -> Table:
    """Return the table after at most `steps` steps of Adam on the loss of the ends, by back-propagation through the whole sampler.

    The model is called again in the backward pass (checkpointed row by row), so that memory grows with the evaluations by the
    states only. The inner times are t_0 - (t_0 - t_n) cumsum(softmax(z)), in order whatever z is; those of a discrete plan, or of
    stages within steps, are left alone. The rate falls from 2e-3 to 0, where 1 is a change of the state by its own size. Each step
    takes one batch of the samples. The table that did best on the validation samples is returned.

    Raises
    ------
    TypeError
        For a model in NumPy, which has no derivatives.
    ImportError
        Where JAX is the framework and optax is missing.
    """
    x_T = student.network.x_T
    if is_torch(x_T):
        adam: Any = _TorchAdam
    elif is_jax(x_T):
        adam = _JaxAdam
    else:
        raise TypeError("stages has 'gradient', and a model in NumPy has no derivatives; leave the stage out")
    errors = rmse(student.run(table, student.network.numpy()[:fit]), teacher.end[:fit])
    parameters = _Parameters.of(student, table, window, times)
    batch = min(student.network.batch, fit)
    rows = [(first, min(first + batch, fit)) for first in range(0, fit, batch)]
    descent = adam(student, teacher, parameters, loss, max(0.3 * float(np.median(errors)), 1e-12))
    best, least, since = table, measured(student, table, teacher, fit, loss), 0
    for step in range(steps):
        descent.step(_RATE * (1 - step / steps), *rows[step % len(rows)])
        student.network.evaluations += 3 * len(table.a) * (rows[step % len(rows)][1] - rows[step % len(rows)][0])
        if step % _EVERY == _EVERY - 1 or step == steps - 1:
            now = parameters.table(*descent.numpy())
            error = measured(student, now, teacher, fit, loss)
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
        for i in range(n):
            history = (student.predict(i, x, table.t[i]), *history)
            basis[i, 0, 0] = 1.0
            for j in range(min(window, i + 1)):
                push = history[j] - history[j + 1] if 0 < j < min(window, i + 1) - 1 else history[j]
                scale = np.sqrt(np.square(x).mean() / max(np.square(push).mean(), 1e-12))
                basis[i, 1 + j, 1 + j] = scale
                if push is not history[j]:
                    basis[i, 1 + j, 2 + j] = -scale
            x = table.a[i] * x + sum(c * p for c, p in zip(table.c[i].tolist(), history, strict=False))
        falling = times and (np.diff(table.t) < 0).all() and student.plan.accepts.all() and not student.plan.discrete and n > 1
        return cls(table, basis, np.log(-np.diff(table.t)) if falling else np.zeros(0))

    def coefficients(self, theta: Any, xp: Any) -> Any:
        """Return (a, c) as an array of shape (n, n + 1)."""
        start = np.concatenate([self.start.a[:, None], self.start.c], axis=1)
        return xp.asarray(start) + (theta[:, :, None] * xp.asarray(self.basis)).sum(1)

    def times(self, z: Any, xp: Any) -> Any:
        """Return the n times of the evaluations."""
        t = self.start.t
        if len(self.logits) == 0:
            return xp.asarray(t[:-1])
        share = xp.exp(xp.asarray(self.logits) + z)
        place = xp.cumsum(share / share.sum(), 0)
        return t[0] - (t[0] - t[-1]) * (place - share / share.sum())

    def table(self, theta: Array, z: Array) -> Table:
        numbers = self.coefficients(theta, np)
        t = np.append(self.times(z, np), self.start.t[-1])
        t[0] = self.start.t[0]
        return Table(t, numbers[:, 0], numbers[:, 1:])


def _levels(student: Student, t: Array) -> Array:
    """Return alpha, sigma and their derivatives at the times, shape (4, n); by central differences."""
    sde = student.network.sde
    low, high = sorted((sde.t_end, sde.t_start))
    before, after = np.clip(t - 1e-5 * (high - low), low, high), np.clip(t + 1e-5 * (high - low), low, high)
    slopes = [(f(after) - f(before)) / (after - before) for f in (sde.alpha, sde.sigma)]
    return np.stack([sde.alpha(t), sde.sigma(t), *slopes])


def _end(
    student: Student, numbers: Any, t: Any, levels: Any, held: Any, x: Any, denoiser: Denoiser, checkpoint: Callable[..., Any]
) -> Any:
    """Run a table whose numbers may be traced; `held` are the times without their derivatives."""
    plan, history = student.plan, tuple[Any, ...]()

    def predict(x: Any, t: Any, alpha: Any, sigma: Any) -> Any:
        level = Level(t, alpha, sigma)
        m = evaluate(denoiser, x, t + 0 * x.reshape(len(x), -1)[:, 0], level)
        row = factors(denoiser.predicts, plan.form, level, denoiser.threshold is not None)
        return convert(m, x, row, denoiser.threshold)

    for i in range(len(plan.rows)):
        if plan.calls[i]:
            # The schedule is NumPy's: its value, and its derivative times a difference whose value is 0.
            alpha, sigma = (levels[k][i] + levels[k + 2][i] * (t[i] - held[i]) for k in (0, 1))
            p = checkpoint(predict)(x, t[i], alpha, sigma)
        else:
            p = plan.guess[i] * x
        history = (p, *history)
        x = numbers[i, 0] * x + sum(numbers[i, 1 + j] * p for j, p in enumerate(history))
    return x


class _TorchAdam:
    def __init__(self, student: Student, teacher: Teacher, parameters: _Parameters, loss: Loss, c: float) -> None:
        import torch

        self.student, self.teacher, self.parameters, self.loss, self.c = student, teacher, parameters, loss, c
        n = len(parameters.start.a)
        self.theta = torch.zeros(n, n + 1, dtype=torch.float64, requires_grad=True)
        self.z = torch.zeros(len(parameters.logits), dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.theta, self.z])

    def step(self, rate: float, first: int, last: int) -> None:
        import torch
        from torch.utils.checkpoint import checkpoint

        x_T = self.student.network.x_T[first:last]
        target = like(self.teacher.end[first:last], x_T)
        with torch.enable_grad():
            t = self.parameters.times(self.z, torch)
            levels = torch.from_numpy(_levels(self.student, t.detach().numpy()))
            numbers = self.parameters.coefficients(self.theta, torch)
            numbers, t, levels = (v.to(x_T) for v in (numbers, t, levels))
            denoiser = self.student.network.denoiser(first, last)
            end = _end(
                self.student, numbers, t, levels, t.detach(), x_T, denoiser,
                lambda predict: lambda *inputs: checkpoint(predict, *inputs, use_reentrant=False),
            )  # fmt: skip
            loss = sample_losses(self.loss, end, target, self.c).mean()
            self.adam.zero_grad()
            loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()

    def numpy(self) -> tuple[Array, Array]:
        return self.theta.detach().numpy().copy(), self.z.detach().numpy().copy()


class _JaxAdam:
    def __init__(self, student: Student, teacher: Teacher, parameters: _Parameters, loss: Loss, c: float) -> None:
        with needs("jax", "the stage 'gradient' in JAX"):
            import optax
        import jax
        import jax.numpy as jnp

        self.student, self.teacher, self.parameters, self.loss, self.c = student, teacher, parameters, loss, c
        n, dtype = len(parameters.start.a), student.network.x_T.dtype
        self.values = (jnp.zeros((n, n + 1), dtype), jnp.zeros(len(parameters.logits), dtype))
        self.adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
        self.state = self.adam.init(self.values)
        self.compiled: dict[tuple[int, int], Any] = {}

        def gradient(first: int, last: int) -> Any:
            denoiser = student.network.denoiser(first, last)

            def loss_of(values: Any, levels: Any, x_T: Any, target: Any) -> Any:
                numbers, t = parameters.coefficients(values[0], jnp).astype(dtype), parameters.times(values[1], jnp).astype(dtype)
                end = _end(student, numbers, t, levels, jax.lax.stop_gradient(t), x_T, denoiser, jax.checkpoint)
                return sample_losses(loss, end, target, c).mean()

            return jax.jit(jax.grad(loss_of))

        self.gradient = gradient

    def step(self, rate: float, first: int, last: int) -> None:
        import jax.numpy as jnp
        import optax

        x_T = self.student.network.x_T[first:last]
        t = self.parameters.table(*self.numpy()).t[:-1]
        if (first, last) not in self.compiled:
            self.compiled[first, last] = self.gradient(first, last)
        target = like(self.teacher.end[first:last], x_T)
        gradients = self.compiled[first, last](self.values, jnp.asarray(_levels(self.student, t), x_T.dtype), x_T, target)
        self.state.hyperparams["learning_rate"] = jnp.asarray(rate, x_T.dtype)
        updates, self.state = self.adam.update(gradients, self.state)
        self.values = optax.apply_updates(self.values, updates)

    def numpy(self) -> tuple[Array, Array]:
        theta, z = (np.asarray(value, dtype=np.float64) for value in self.values)
        return theta, z
