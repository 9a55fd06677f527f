"""The coefficients of a plan by regression, step by step: no derivatives of the model, and no evaluation beyond the plan's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..arrays import Array, Indices
from ..backends.numpy import combine
from ..machine import advance
from .network import Student
from .table import Table, row_of
from .teacher import Teacher

SHRINKAGE = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
_USUAL = 1e-4
_WORTH = 0.99  # of the error, for less shrinkage: large weights of opposite signs generalise badly to other samples
_EXACT = 1e-12  # errors below are rounding
_REWEIGHTINGS = 4


def fit_rows(
    student: Student,
    prior: Table,
    teacher: Teacher,
    fit: int,
    window: int,
    validating: int | None = None,
    predictions: dict[bytes, Array] | None = None,
) -> tuple[Table, Array]:
    """Fit rows that carry the student's own states to the teacher's at each time, by regularised least squares.

    Row i minimises, over the coefficients theta = (a, c_0, ..., c_{W-1}) of (x_i, p_i, ..., p_{i-W+1}),

        sum over samples of w |x(t_{i+1}) - theta . (x_i, p_i, ...)|^2 + shrinkage * sum_k g_k (theta_k - prior_k)^2

    where g_k is the mean square of the k-th regressor. The weights w = 1 / (e^2 + c^2) of the samples' errors e, with c = 0.3 times
    their median, make it a robust loss, the mean of log(e^2 + c^2), which a bifurcation of a few trajectories does not dominate.
    The shrinkage is the strongest whose error on the validation samples is within a percent of the best. The prior itself is a
    candidate, so that no step is made worse.

    Parameters
    ----------
    fit : int
        The fit uses the first `fit` samples.
    window : int
        The number of predictions that a row may use.
    validating : int, optional
        The number of samples after these for validation, by default all; with 0 the shrinkage is 1e-4.
    predictions : dict, optional
        Those of earlier fits of the same method and samples, by the times so far. They are reused, and new ones are added.

    Returns
    -------
    Table
    array of shape (N, ...)
        The final states of all these samples.
    """
    x = student.network.numpy()[: None if validating is None else fit + validating]
    a, c, history = prior.a.copy(), prior.c.copy(), tuple[Array, ...]()
    predictions = {} if predictions is None else predictions
    for i in range(len(a)):
        so_far = prior.t[: i + 1].tobytes()
        if so_far not in predictions:
            predictions[so_far] = student.predict(i, x, prior.t[i])
        history = (predictions[so_far], *history)
        used = min(window, i + 1)
        if (c[i, used:] != 0).any():
            raise ValueError(f"window={window!r} is narrower than that of the plan, which uses {int(np.flatnonzero(c[i])[-1]) + 1}")
        theta, (nodes,) = np.append(a[i], c[i, :used]), np.nonzero(student.free[i, : used + 1])
        if len(nodes):
            theta[nodes] += _change(x, history[:used], teacher.state(prior.t[i + 1])[: len(x)], theta, nodes, fit)
        a[i], c[i, :used] = theta[0], theta[1:]
        x = advance(row_of(theta), x, history, combine)[1]
    return replace(prior, a=a, c=c), x


def _change(x: Array, history: tuple[Array, ...], target: Array, prior: Array, nodes: Indices, fit: int) -> Array:
    """Return the change of those coefficients of one row that are to be fitted."""
    regressors, residual = (x, *history), target - combine(prior[0], x, prior[1:], history)
    columns = [v.reshape(len(v), -1) for v in (*(regressors[k] for k in nodes), residual)]
    gram = np.stack([np.stack([np.einsum("nd,nd->n", u, v) for v in columns], axis=1) for u in columns], axis=1)
    gram /= columns[0].shape[1]
    if len(x) == fit:
        return _solve(gram, _USUAL)
    best, least = np.zeros(len(nodes)), np.inf
    for shrinkage in (np.inf, *SHRINKAGE):
        delta = np.zeros(len(nodes)) if np.isinf(shrinkage) else _solve(gram[:fit], shrinkage)
        found = float(np.median(_errors(gram[fit:], delta)))
        if found < _WORTH * least:
            best, least = delta, found
    return best


def _solve(gram: Array, shrinkage: float) -> Array:
    """Return the change of the coefficients, from per-sample Gram matrices of the regressors and, last, the residual."""
    delta = np.zeros(gram.shape[1] - 1)
    for _ in range(_REWEIGHTINGS):
        weight = robust_weights(_errors(gram, delta))
        mean = np.einsum("n,nij->ij", weight, gram) / weight.sum()
        scale = np.sqrt(np.maximum(np.diag(mean)[:-1], np.finfo(float).tiny))
        matrix = mean[:-1, :-1] / np.outer(scale, scale) + shrinkage * np.eye(len(delta))
        delta = np.linalg.solve(matrix, mean[:-1, -1] / scale) / scale
    return delta


def _errors(gram: Array, delta: Array) -> Array:
    """Return the root mean square residual of each sample."""
    v = np.append(-delta, 1.0)
    return np.sqrt(np.maximum(np.einsum("i,nij,j->n", v, gram, v), 0))


def robust_weights(errors: Array, c: float | None = None) -> Array:
    """Return 1 / (e^2 + c^2), by default with c = 0.3 times the median of the errors e."""
    c = 0.3 * float(np.median(errors)) if c is None else c
    return 1 / (errors**2 + max(c, _EXACT) ** 2)
