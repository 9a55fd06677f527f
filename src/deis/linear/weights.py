"""The integrals behind the coefficients of linear SDEs, and the columns that builders make of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Array, Flags
from ..quadrature import lagrange
from .algebra import Algebra
from .sde import LinearSDE

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(20)


@dataclass(frozen=True)
class Columns:
    """What a method gives for each of n rows, for predictions that are eps of the plan's own K.

    Attributes
    ----------
    t : array of shape (n + 1,)
    psi : array of shape (n, *c)
        What carries the state of the step's start to the next time: keep_x of a row that ends a step, next_x of a stage.
    constant : array of shape (n, *c)
        What a constant eps adds on the way.
    keep_p, next_p : arrays of shape (n, W, *c)
    accepts : array of bool of shape (n,)
    """

    t: Array
    psi: Array
    constant: Array
    keep_p: Array
    next_p: Array
    accepts: Flags

    def of_eps(self, algebra: Algebra, start: Array) -> Array:
        """Return what becomes of a constant eps, from its entry at the start on."""
        states, base = [start], start
        for step, weight, accepts in zip(self.psi, self.constant, self.accepts.tolist(), strict=True):
            states.append(algebra.times(step, base) + weight)
            base = states[-1] if accepts else base
        return np.stack(states)


def integrand(sde: LinearSDE, K: str, start: float, end: float) -> tuple[Array, Array]:
    """Return the Gauss-Legendre points of a step, in each panel of the SDE's path, and Psi 1/2 G G^T K^-T ds at them."""
    cuts = sde.path.cuts(min(start, end), max(start, end))
    half = np.diff(cuts)[:, None] / 2
    s = ((cuts[:-1] + cuts[1:])[:, None] / 2 + half * _POINTS).ravel()
    weights = (half * _WEIGHTS).ravel() * np.sign(end - start)
    algebra = sde.algebra
    rate = algebra.over(algebra.times(sde.psi(end, s), sde.path.values("half_noise", s)), sde.K(s, K))
    return s, weights.reshape(-1, *(1,) * len(sde.shape)) * rate


def through(nodes: Array, s: Array, rate: Array) -> Array:
    """Return the weights, of shape (nodes, *c), of predictions at the nodes: the integrals of their Lagrange polynomials."""
    return np.tensordot(lagrange(s[None], nodes[None])[0].T, rate, 1)
