"""All coefficients and times of a plan at once, by Gauss-Newton on the samples' ends; derivatives by differences of runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Flags, Indices
from ..backends.numpy import combine
from ..machine import advance
from .network import Student, rmse, size
from .regression import robust_weights
from .table import Table
from .teacher import Teacher

_DAMPING, _RAISE, _LOWER, _TRIALS = 1e-3, 5.0, 5.0, 7
_INNER = 3  # robust reweightings of one linearisation
_PATIENCE, _WORTH = 3, 1e-2  # a loss smaller by 1e-2 is an error smaller by a half percent
_RIDGE = 1e-4
_NEAR = 0.45  # of the way from a time to the next


@dataclass(frozen=True)
class Direction:
    """One parameter: what adding 1 to it adds to the time, or to the coefficients (a, c_0, ...), of a row."""

    row: int
    time: float
    theta: Array


class _Linear(NamedTuple):
    """The final states of a table, and their derivatives."""

    directions: list[Direction]
    jacobian: NDArray[np.float32]
    """The derivatives of the final states along the directions, shape (N, D, P)."""
    end: Array
    sizes: Array
    """The size of each regressor (x_i, p_i, ...) relative to x_{i+1}, shape (n, n + 1)."""


def fit_ends(
    student: Student, table: Table, teacher: Teacher, fit: int, window: int, *, iterations: Iterable[int], times: bool = True
) -> Table:
    """Return the table whose final states are nearest to the teacher's: it minimises the mean over samples of log(e^2 + c^2).

    e is the root mean square error of a sample's final state, and c is 0.3 times the median of e. A penalty is added: 1e-4 times
    the squares of the changes of the coefficients, each scaled by the size of its prediction relative to the state. Each iteration
    runs the plan once for every coefficient and for every time but the start's, from the row it belongs to. That is some n^3/4
    evaluations for n rows, and no derivative of the model. It then solves the damped (Levenberg-Marquardt), robustly weighted
    normal equations. The directions of a row's coefficients are x_i, p_i and the differences p_j - p_{j+1}, because predictions at
    successive times are almost parallel. Each is perturbed by 5e-4 of the size of the state (1e-5 in float64). In one iteration a
    time moves less than half the way to its neighbours. In a discrete plan it moves by whole numbers, and the coefficients by what
    is best for the rounded move.

    The table with the least loss on the validation samples (those from `fit` on) is returned. The search ends when this loss has
    not improved for three iterations. (A calibration is judged by the median error of these samples, but that is too noisy to
    steer by: with 64 samples its standard error is a twentieth.)
    """
    x_T, end = student.network.numpy(), teacher.end
    h = 5e-4 if student.network.x_T.dtype.itemsize <= 4 else 1e-5
    start, best, damping, since = table, table, _DAMPING, 0
    errors = rmse(student.run(table, x_T[fit:], fit), end[fit:])
    c = 0.3 * float(np.median(errors))
    least = _loss(np.square(errors), c)
    for _ in iterations:
        linear = _linearise(student, table, x_T[:fit], window, h, times)
        moved = _improved(student, table, x_T[:fit], end[:fit], linear, _Ridge(table, start, linear.sizes), damping)
        if moved is None:
            break
        table, damping = moved
        loss = _loss(np.square(rmse(student.run(table, x_T[fit:], fit), end[fit:])), c)
        since = since + 1 if loss > least - _WORTH else 0
        if loss < least:
            best, least = table, loss
        if since >= _PATIENCE:
            break
    return best


def _loss(square: Array, c: float) -> float:
    """Return the mean of log(e^2 + c^2) over samples."""
    return float(np.log(square + max(c, np.finfo(float).tiny) ** 2).mean())


def _linearise(student: Student, table: Table, x: Array, window: int, h: float, times: bool) -> _Linear:
    """Return the final states of a table and their derivatives, by running the rest of the table after each change of a row."""
    directions: list[Direction] = []
    ends: list[Array] = []
    history: tuple[Array, ...] = ()
    sizes = np.ones((len(table.a), len(table.a) + 1))
    for i, row in enumerate(table.rows):
        p = student.predict(i, x, table.t[i])
        if times and i > 0 and student.plan.calls[i]:
            by = _time_step(student, table, i, h)
            moved = (student.predict(i, x, table.t[i] + by), *history)
            directions.append(Direction(i, by, np.zeros(0)))
            ends.append(student.run(table, advance(row, x, moved, combine)[1], 0, i + 1, moved))
        history = (p, *history)
        after = advance(row, x, history, combine)[1]
        sizes[i, : i + 2] = [size(v) / size(after) for v in (x, *history)]
        for theta in _basis(student.free[i, : min(window, i + 1) + 1]):
            push = combine(theta[0], x, theta[1:], history)
            scale = h * size(after) / max(size(push), np.finfo(float).tiny)
            directions.append(Direction(i, 0.0, scale * theta))
            ends.append(student.run(table, after + scale * push, 0, i + 1, history))
        x = after
    jacobian = np.stack([(end - x).reshape(len(x), -1).astype(np.float32) for end in ends], axis=-1)
    return _Linear(directions, jacobian, x, sizes)


def _basis(free: Flags) -> list[Array]:
    """Return x_i, p_i, p_i - p_{i-1}, p_{i-1} - p_{i-2}, ... as coefficients, for the free ones among them."""
    (nodes,) = np.nonzero(free)
    basis = np.eye(len(free))[nodes]
    for j in range(2, len(nodes)):
        basis[j, nodes[j - 1]], basis[j, nodes[j]] = 1.0, -1.0
    return list(basis)


def _time_step(student: Student, table: Table, i: int, h: float) -> float:
    """Return the difference by which the time of row i is varied: a fraction of the way to its neighbours, or 1 if discrete."""
    before, after = table.t[i - 1] - table.t[i], table.t[i] - table.t[i + 1]
    if student.plan.discrete:
        return 1.0 if before > 1 else -1.0
    if i == 1 and not student.plan.calls[0]:  # it may be at the time of the start itself
        before, h = after, -h
    room = min(before, after)
    return float(10 * h * room) if room > 0 else float(-abs(h) * (table.t[i] - table.t[-1]))


@dataclass(frozen=True)
class _Ridge:
    """The penalty of the coefficients' changes since the start, 1e-4 |sizes * change|^2."""

    table: Table
    start: Table
    sizes: Array

    def change(self, table: Table) -> Array:
        return (self.sizes * np.column_stack([table.a - self.start.a, table.c - self.start.c])).ravel()

    def value(self, table: Table) -> float:
        return float(_RIDGE * np.square(self.change(table)).sum())

    def normal(self, directions: list[Direction]) -> tuple[Array, Array]:
        """Return its part of the normal equations: a matrix and a right-hand side."""
        shifts = np.zeros((len(directions), *self.sizes.shape))
        for k, direction in enumerate(directions):
            shifts[k, direction.row, : len(direction.theta)] = direction.theta * self.sizes[direction.row, : len(direction.theta)]
        flat = shifts.reshape(len(directions), -1)
        return _RIDGE * flat @ flat.T, -_RIDGE * flat @ self.change(self.table)


@dataclass(frozen=True)
class _Model:
    """The squared errors of the samples after a step delta, square - 2 right . delta + delta . gram delta; and the ridge."""

    square: Array
    right: Array
    gram: Array
    c: float
    ridge: tuple[Array, Array]

    def step(self, damping: float, fixed: Indices, values: Array) -> Array:
        """Return the damped robust least-squares step, in which the parameters `fixed` have given values."""
        delta = np.zeros(self.right.shape[1])
        delta[fixed] = values
        free = np.setdiff1d(np.arange(len(delta)), fixed)
        for _ in range(_INNER):
            predicted = self.square - 2 * self.right @ delta + np.einsum("p,npq,q->n", delta, self.gram, delta, optimize=True)
            weight = robust_weights(np.sqrt(np.maximum(predicted, 0)), self.c) / len(self.square)
            a, b = np.einsum("n,npq->pq", weight, self.gram, optimize=True) + self.ridge[0], weight @ self.right + self.ridge[1]
            matrix = a[np.ix_(free, free)] + damping * np.diag(np.diag(a)[free] + 1e-12 * np.trace(a))
            delta[free] = np.linalg.solve(matrix, b[free] - a[np.ix_(free, fixed)] @ values)
        return delta


def _improved(
    student: Student, table: Table, x_T: Array, end: Array, linear: _Linear, ridge: _Ridge, damping: float
) -> tuple[Table, float] | None:
    """Return a table with a lower loss, and the damping for the next iteration; None if there is none."""
    directions, residual = linear.directions, (end - linear.end).reshape(len(end), -1)
    square = np.square(residual).mean(axis=1)
    gram = np.stack([j.T @ j for j in linear.jacobian]).astype(np.float64) / residual.shape[1]
    right = np.einsum("ndp,nd->np", linear.jacobian, residual, optimize=True) / residual.shape[1]
    model = _Model(square, right, gram, 0.3 * float(np.median(np.sqrt(square))), ridge.normal(directions))

    def loss(square: Array, table: Table) -> float:
        return _loss(square, model.c) + ridge.value(table)

    for _ in range(_TRIALS):
        delta = _step(model, damping, table, directions, student.plan.discrete)
        moved = _moved(student, table, directions, delta)
        if moved is not None and loss(np.square(rmse(student.run(moved, x_T), end)), moved) < loss(square, table):
            return moved, max(damping / _LOWER, 1e-9)
        damping *= _RAISE
    return None


def _step(model: _Model, damping: float, table: Table, directions: list[Direction], discrete: bool) -> Array:
    """Return the step of the model, in which times move less than half the way to their neighbours; in whole numbers if discrete.

    Near the start a prediction hardly depends on the time that the network is given, and the linear model would move it endlessly.
    """
    (moving,) = np.nonzero([direction.time for direction in directions])
    by = np.array([directions[k].time for k in moving])
    low, high = _room(table.t, np.array([table.t[directions[k].row] for k in moving]))
    fixed, move = np.zeros(len(moving), dtype=bool), np.zeros(len(moving))
    while True:
        delta = model.step(damping, moving[fixed], move[fixed] / by[fixed])
        wanted = np.where(fixed, move, delta[moving] * by)
        move = np.clip(wanted, -low, high)
        if (move == wanted).all():
            return model.step(damping, moving, np.rint(move) / by) if discrete else delta
        fixed |= move != wanted


def _room(t: Array, here: Array) -> tuple[Array, Array]:
    """Return how far down and up times may move, given those of a table."""
    others = np.unique(t)
    below = others[np.maximum(np.searchsorted(others, here) - 1, 0)]
    above = others[np.minimum(np.searchsorted(others, here, side="right"), len(others) - 1)]
    return _NEAR * (here - below), _NEAR * (above - here)


def _moved(student: Student, table: Table, directions: list[Direction], delta: Array) -> Table | None:
    """Return the table moved along the directions; None if its times would make no valid plan."""
    t, a, c = table.t.copy(), table.a.copy(), table.c.copy()
    for direction, by in zip(directions, delta.tolist(), strict=True):
        i, theta = direction.row, direction.theta
        t[i] += by * direction.time
        if len(theta):
            a[i] += by * theta[0]
            c[i, : len(theta) - 1] += by * theta[1:]
    moved = replace(table, t=t, a=a, c=c)
    try:
        moved.plan(student.plan, student.network.sde, "a model")
    except ValueError:
        return None
    return moved
