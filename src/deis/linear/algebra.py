"""What a product of coefficients means: of k x k blocks, or of one number a frequency; and collocation on a panel in either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import legendre

from ..arrays import Array

_N = 20
"""Nodes of a panel. Where a function's nearest singularity is as far from the panel as the panel is wide, the error is 5e-16."""
NODES = -np.cos(np.pi * np.arange(_N) / (_N - 1))
"""Chebyshev-Lobatto: both ends of the panel [-1, 1] are among them."""
TO_LEGENDRE = np.linalg.inv(legendre.legvander(NODES, _N - 1))
INTEGRALS = np.stack([legendre.legval(NODES, legendre.legint(e, lbnd=-1)) for e in np.eye(_N)], axis=1) @ TO_LEGENDRE
"""The integrals from -1 to each node, of values at the nodes."""


def interpolation(x: Array) -> Array:
    """Return the weights, of shape (len(x), nodes), of the values at the nodes in the value at each x in [-1, 1]."""
    return legendre.legvander(x, _N - 1) @ TO_LEGENDRE


def integrals(values: Array) -> Array:
    """Return the integrals over [-1, 1] up to each node, of values at the nodes."""
    return np.tensordot(INTEGRALS, values, 1)


@dataclass(frozen=True)
class Algebra:
    """The products of coefficients, arrays whose last axes are those of one coefficient.

    Attributes
    ----------
    axes : int or None
        How many axes a coefficient has, where that is given.
    times, inverse, transpose : callables
    root : callable
        Sigma -> L, lower triangular or positive, with L L^T = Sigma; it raises LinAlgError, or gives NaN, where Sigma is not
        positive definite.
    one : callable
        one(shape) -> the coefficient 1.
    propagate : callable
        propagate(A, half) -> P at the nodes, where dP/dt = A P and P = 1 at the first node, of A at the nodes of a panel of the
        half width given.
    """

    axes: int | None
    times: Callable[[Array, Array], Array]
    inverse: Callable[[Array], Array]
    transpose: Callable[[Array], Array]
    root: Callable[[Array], Array]
    one: Callable[[tuple[int, ...]], Array]
    propagate: Callable[[Array, float], Array]

    def combine(self, c_x: Array, x: Array, c_p: Sequence[Array] | Array, history: Sequence[Array]) -> Array:
        """Return c_x x + sum_j c_p[j] history[j], see `deis.machine`, for states that are coefficients."""
        return sum((self.times(c, p) for c, p in zip(c_p, history, strict=False)), self.times(c_x, x))

    def over(self, a: Array, b: Array) -> Array:
        """Return a b^-T."""
        return self.times(a, self.transpose(self.inverse(b)))

    def square(self, a: Array) -> Array:
        """Return a a^T."""
        return self.times(a, self.transpose(a))


def _propagate_blocks(a: Array, half: float) -> Array:
    """Solve P = 1 + integral of A P at all nodes at once: a polynomial of degree nodes - 1 that solves the ODE at the nodes."""
    n, k, _ = a.shape
    system = np.eye(n * k) - half * np.einsum("nm,mab->namb", INTEGRALS, a).reshape(n * k, n * k)
    return np.linalg.solve(system, np.tile(np.eye(k), (n, 1))).reshape(a.shape)


def _inverse(a: Array) -> Array:
    return np.asarray(np.linalg.inv(a), dtype=np.float64)


def _cholesky(Sigma: Array) -> Array:
    return np.asarray(np.linalg.cholesky(Sigma), dtype=np.float64)


BLOCKS = Algebra(
    axes=2,
    times=np.matmul,
    inverse=_inverse,
    transpose=lambda a: np.swapaxes(a, -1, -2),
    root=_cholesky,
    one=lambda shape: np.eye(shape[0]),
    propagate=_propagate_blocks,
)
NUMBERS = Algebra(
    axes=None,
    times=np.multiply,
    inverse=np.reciprocal,
    transpose=lambda a: a,
    root=np.sqrt,
    one=np.ones,
    propagate=lambda a, half: np.exp(half * integrals(a)),
)
ALGEBRAS = {"block": BLOCKS, "dct": NUMBERS}
"""By basis."""
