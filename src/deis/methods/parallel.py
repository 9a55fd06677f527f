"""Exponential Adams with two evaluations side by side: at the state, and where the step from it is predicted to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..arguments import number, shown, whole
from ..arrays import Array, Indices
from ..plan import Plan
from ..quadrature import Clock, Form
from ..sde import Schedule
from .clocks import check_clock, clock_of
from .layout import gaussian_guess, laid_out
from .step import adams_weights, check_form, choose_form, step_degrees, transport


@dataclass(frozen=True)
class ParallelAdams:
    """A parallel predictor-corrector as a builder of plans; see `parallel_adams`."""

    name: str
    form: Form | None
    clock: Clock
    order: int
    corrector: int
    deviation: float

    def split(self, nfe: int, clean: bool) -> list[int]:
        """Return the number of evaluations in each step for a budget: two in one call, and one in the last step or the last two."""
        pairs = (nfe - 1) // 2
        return [2] * pairs + [1] * (nfe - 2 * pairs)

    def __call__(self, sde: Schedule, ts: Array, grid: str, counts: list[int] | None = None) -> Plan:
        """Build the plan of the grid, with the given number of evaluations in each step: 2, ..., 2, 1, ..."""
        n = len(ts) - 1
        pairs = n - 1 if counts is None else counts.count(2)
        form = choose_form(sde, ts, self.form)
        check_clock(sde, ts, self.clock, self.name)
        predictor = adams_weights(sde, ts, step_degrees(sde, ts, self.order, self.clock, form), self.clock, form)
        degrees = step_degrees(sde, ts, self.corrector, self.clock, form, ahead=True)
        corrector = adams_weights(sde, ts, degrees, self.clock, form, ahead=True)
        p, q = _places(n, pairs)
        size = p[-1] + 1
        keep, stage = _Combinations.of(size), _Combinations.of(size)
        for i, psi in enumerate(transport(sde, ts, form)[0]):
            if i >= pairs:
                keep.put(p[i], psi, p[i::-1], predictor[i])
                continue
            stage.put(q[i + 1] - 1, psi, np.append(q[i], p[:i][::-1]), predictor[i])
            # If the clock is infinite at the start, there is no line through p_0, and the first step uses p_0 alone.
            keep.put(q[i + 1], psi, np.append(q[i + 1], p[i::-1]) if degrees[i] else p[:1], corrector[i])
        t, calls, guess = np.full(size + 1, ts[-1]), np.ones(size, dtype=bool), np.zeros(size)
        t[q], t[p] = ts[: len(q)], ts[:-1]
        alpha, sigma = sde.alpha(ts[:1]).item(), sde.sigma(ts[:1]).item()
        calls[q[:1]], guess[q[:1]] = False, gaussian_guess(form, alpha, sigma, self.deviation)
        window = max(keep.window, stage.window)
        columns = {"keep_x": keep.x, "keep_p": keep.p[:, :window], "next_x": stage.x, "next_p": stage.p[:, :window]}
        columns |= {"calls": calls, "guess": guess}
        return laid_out(sde, t, columns, form=form, method=self.name, grid=grid)


def _places(n: int, pairs: int) -> tuple[Indices, Indices]:
    """Return the rows of p_0, ..., p_{n-1} and of q_0, ..., q_pairs: p_0 q_0 q_1, p_1 q_2, p_2 q_3, ..., and then p alone."""
    if pairs == 0:
        return np.arange(n), np.arange(0)
    steps = np.arange(1, n)
    return np.append(0, steps + np.minimum(steps, pairs) + 1), np.append(1, 2 * np.arange(1, pairs + 1))


@dataclass(frozen=True)
class _Combinations:
    """Two columns of a plan, such as keep_x and keep_p; at first they leave base or x as it is."""

    x: Array
    p: Array

    @classmethod
    def of(cls, rows: int) -> _Combinations:
        return cls(np.ones(rows), np.zeros((rows, rows)))

    @property
    def window(self) -> int:
        """The columns that are used."""
        return int(np.nonzero(self.p)[1].max(initial=0)) + 1

    def put(self, row: int, psi: float, nodes: Indices, weights: Array) -> None:
        """Set a row to psi x + sum_j weights[j] * prediction of row nodes[j]; any weights beyond the nodes are 0."""
        self.x[row] = psi
        self.p[row, row - nodes[: len(weights)]] = weights[: len(nodes)]


def parallel_adams(
    form: Form | None = "data",
    clock: str | Callable[[Array], Array] = "vp_t",
    order: int = 2,
    corrector: int | None = None,
    *,
    deviation: float = 0.5,
    name: str | None = None,
) -> ParallelAdams:
    r"""Return the parallel predictor-corrector of Miranker and Liniger (Math. Comp. 21, 1967, 303-320) in exponential form.

    Step i evaluates at (x_i, t_i) and, in the same call, at the end of the step as predicted without p_i::

        y_{i+1} = psi_i x_i + B_i0 q_i + sum_{j>0} B_ij p_{i-j}              p_i = prediction at (x_i, t_i)
        x_{i+1} = psi_i x_i + A_i0 q_{i+1} + sum_{j>0} A_ij p_{i+1-j}        q_i = prediction at (y_i, t_i)

    where B and A are the weights of exponential Adams-Bashforth and Adams-Moulton, as in `deis.adams`. n steps take n calls one
    after the other, the plan's `depth`, and 2 n - 1 evaluations: the last step makes one, and uses p_i in its polynomial. An even
    budget ends with two such steps. q_0 is not evaluated; it is the prediction for Gaussian data, as in the analytical first step.

    Parameters
    ----------
    form, clock
        As for `deis.adams`.
    order : int
        The degree q of the predictor's polynomial, B.
    corrector : int, optional
        The degree of the corrector's polynomial, A; by default q, which makes the order q + 1. The first steps use the predictions
        available so far.
    deviation : float
        The standard deviation of the data, for q_0.

    Raises
    ------
    ValueError
        If an argument is not one of these; and, when a plan is built, if the clock is not monotone on the grid.
    """
    order = whole("order", order)
    corrector = order if corrector is None else whole("corrector", corrector)
    deviation = number("deviation", deviation, above=0, hint="it is the standard deviation of the data")
    if not isinstance(name, str | None):
        raise ValueError(f"name={shown(name)} must be a string")
    label = name or f"parallel_adams({form!r}, {clock if isinstance(clock, str) else 'custom clock'!r}, {order}, {corrector})"
    return ParallelAdams(label, check_form(form), clock_of(clock), order, corrector, deviation)
