"""Independent references for matrix-valued SDEs: closed forms in mpmath, and a mixture in (x, v) with its exact score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from mpmath import mp, mpf
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

import deis

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Exact:
    """dx = A x dt + B dw with constant A and B in mpmath: Psi = exp(A t), and Sigma from its stationary value."""

    A: Any
    B: Any
    start: Any

    def psi(self, t: Any, s: Any) -> Any:
        return mp.expm(self.A * (mpf(t) - mpf(s)))

    def stationary(self) -> Any:
        """The solution S of A S + S A^T + B B^T = 0."""
        n = self.A.rows
        system, noise = mp.zeros(n * n), self.B * self.B.T
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    system[i * n + j, k * n + j] += self.A[i, k]
                    system[i * n + j, i * n + k] += self.A[j, k]
        found = mp.lu_solve(system, mp.matrix([-noise[i, j] for i in range(n) for j in range(n)]))
        return mp.matrix([[found[i * n + j] for j in range(n)] for i in range(n)])

    def covariance(self, t: Any) -> Any:
        psi, S = self.psi(t, 0), self.stationary()
        return S + psi * (self.start - S) * psi.T

    def weights(self, nodes: list[float], start: float, end: float, pieces: int = 4) -> list[Array]:
        """The integrals of Psi(end, s) 1/2 B B^T L^-T l_j(s) from start to end."""
        half, n = self.B * self.B.T / 2, self.A.rows
        points = mp.linspace(mpf(start), mpf(end), pieces + 1)
        found = []
        for j, node in enumerate(nodes):

            def value(s: Any, j: int = j, node: float = node) -> Any:
                basis = mpf(1)
                for m, other in enumerate(nodes):
                    if m != j:
                        basis *= (s - mpf(other)) / (mpf(node) - mpf(other))
                return basis * self.psi(end, s) * half * (mp.cholesky(self.covariance(s)) ** -1).T

            sums, (x, w) = mp.zeros(n), np.polynomial.legendre.leggauss(40)
            for a, b in pairwise(points):
                for xi, wi in zip(x.tolist(), w.tolist(), strict=True):
                    sums += value((a + b) / 2 + (b - a) / 2 * mpf(xi)) * mpf(wi) * (b - a) / 2
            found.append(to_numpy(sums))
        return found


def to_numpy(matrix: Any) -> Array:
    return np.array(matrix.tolist(), dtype=np.float64)


def mixture(
    sde: deis.LinearSDE, means: Any = (-1.0, 0.8), std: float = 0.3
) -> tuple[Callable[[Array, float], Array], Callable[[Array, Array], Array]]:
    """Positions of two equal Gaussians, and velocities as the SDE starts them: the score at (x, t), and solutions at times.

    States have shape (2, batch). The solutions are those of the probability flow dx/dt = F x - 1/2 G G^T score, at 1e-12.
    """

    def score(x: Array, t: float) -> Array:
        psi = sde.psi(t, 0.0)
        spread = psi @ np.diag([std**2, 0.0]) @ psi.T + sde.Sigma(t)
        inverse = np.linalg.inv(spread)
        away = np.stack([x - (psi @ [m, 0.0])[:, None] for m in means])
        pulls = np.einsum("ij,mjb->mib", inverse, away)
        logs = -0.5 * np.einsum("mib,mib->mb", away, pulls)
        share = np.exp(logs - logs.max(axis=0))
        return -(share / share.sum(axis=0) * pulls.swapaxes(0, 1)).sum(axis=1)

    def solution(ts: Array, x_T: Array) -> Array:
        def slope(t: float, flat: Array) -> Array:
            x, F, G = flat.reshape(x_T.shape), np.asarray(sde.F(t)), np.asarray(sde.G(t))
            return np.asarray(F @ x - 0.5 * G @ G.T @ score(x, t)).ravel()

        out = solve_ivp(slope, (ts[0], ts[-1]), x_T.ravel(), method="DOP853", t_eval=ts, rtol=1e-12, atol=1e-12)
        return out.y.T.reshape(len(ts), *x_T.shape)

    return score, solution


def model_of(sde: deis.LinearSDE, score: Callable[[Array, float], Array], predicts: str = "R") -> Callable[[Array, Array], Array]:
    """Return the network that knows the score, as eps = -K^T score or the score itself."""

    def model(x: Array, t: Array) -> Array:
        found = score(x, float(t[0]))
        return found if predicts == "score" else -sde.K(t[0], predicts).T @ found

    return model
