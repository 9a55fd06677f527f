"""Psi(t, s), Sigma_t and R_t of a linear SDE in float64, by collocation on panels that follow its coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..arguments import shown
from ..arrays import Array, Indices
from .algebra import NODES, TO_LEGENDRE, Algebra, integrals, interpolation

Coefficients = Callable[[Array], tuple[Array, Array]]
"""F and G G^T at an array of times."""
_WIDEST = 1.0  # half width of a panel times the greatest entry of F; to 20 nodes the error of exp(2 F t) is 1e-16
_TAIL = 1e-12  # of the Legendre coefficients of F and G G^T
_NARROWEST = 2.0**-24


@dataclass(frozen=True, eq=False)
class Panel:
    """A stretch of time, and at its nodes Psi(t, start), Sigma, 1/2 G G^T and, from `t_end` on, R."""

    start: float
    end: float
    psi: Array
    Sigma: Array
    half_noise: Array
    R: Array | None

    def at(self, values: Array, t: Array) -> Array:
        """Return the polynomial through values at the nodes, at times within."""
        x = (2 * t - self.start - self.end) / (self.end - self.start)
        return np.tensordot(interpolation(x), values, 1)


@dataclass(frozen=True, eq=False)
class Path:
    """The panels from t = 0 to the start of sampling; the first ends where sampling does."""

    algebra: Algebra
    panels: tuple[Panel, ...]

    def psi(self, t: ArrayLike, s: ArrayLike) -> Array:
        """Return Psi(t, s) for times of one shape, or that broadcast."""
        times, (t, s) = self.algebra.times, np.broadcast_arrays(np.asarray(t, dtype=np.float64), np.asarray(s, dtype=np.float64))
        here, there = self.values("psi", t), self.algebra.inverse(self.values("psi", s))
        pairs, which = np.unique(np.stack([self._place(t).ravel(), self._place(s).ravel()]), axis=1, return_inverse=True)
        between = np.stack([self._between(p, q) for p, q in pairs.T.tolist()])[which.reshape(t.shape)]
        return times(times(here, between), there)

    def values(self, name: str, t: ArrayLike) -> Array:
        """Return a quantity of the panels at times of any shape."""
        t = np.asarray(t, dtype=np.float64)
        place = self._place(t)
        out = np.empty((*t.shape, *self.panels[-1].psi.shape[1:]))
        for p in np.unique(place):
            panel, inside = self.panels[p], place == p
            out[inside] = panel.at(getattr(panel, name), t[inside])
        return out

    def cuts(self, low: float, high: float) -> Array:
        """Return low, the ends of panels in between, and high."""
        ends = np.array([panel.end for panel in self.panels])
        return np.array([low, *ends[(ends > low) & (ends < high)], high])

    def _place(self, t: Array) -> Indices:
        """Return the panel of each time; the end of the first is in the second, which has R."""
        return np.minimum(np.searchsorted([panel.end for panel in self.panels], t, side="right"), len(self.panels) - 1)

    def _between(self, p: int, q: int) -> Array:
        """Return Psi from the start of panel q to that of panel p."""
        product = self.algebra.one(self.panels[0].psi.shape[1:])
        for panel in self.panels[min(p, q) : max(p, q)]:
            product = self.algebra.times(panel.psi[-1], product)
        return self.algebra.inverse(product) if p < q else product


def solve(coefficients: Coefficients, covariance: Array, algebra: Algebra, t_end: float, t_start: float) -> Path:
    """Return the path of an SDE from t = 0, where Sigma is the covariance.

    From the start `a` of each panel, dPsi/dt = F Psi, and then

        Sigma = Psi (Sigma_a + integral of Psi^-1 G G^T Psi^-T) Psi^T
        dR/dt = (F + 1/2 G G^T Sigma^-1) R,   R = L, the Cholesky factor of Sigma, at t_end     (arXiv 2206.05564)

    Panels are at most as wide as they are far from 0, where R has a branch point.

    Raises
    ------
    ValueError
        If F or G is not smooth enough for panels to follow, or Sigma is not positive definite at a time; it names the time.
    """
    count = int(np.ceil(np.log2(t_start / t_end)))
    bounds = np.concatenate([[0.0], t_end * (t_start / t_end) ** (np.arange(count + 1) / count)])
    bounds[1], bounds[-1] = t_end, t_start  # the powers may miss the ends by a rounding
    panels: list[Panel] = []
    Sigma, R = covariance, None
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if low == t_end:
            R = algebra.root(Sigma)
        for start, end, F, noise in _resolved(coefficients, low, high, t_start):
            panel = _panel(algebra, start, end, F, noise, Sigma, R)
            panels.append(panel)
            Sigma, R = panel.Sigma[-1], None if panel.R is None else panel.R[-1]
    return Path(algebra, tuple(panels))


def _panel(algebra: Algebra, start: float, end: float, F: Array, noise: Array, Sigma: Array, R: Array | None) -> Panel:
    half = (end - start) / 2
    psi = algebra.propagate(F, half)
    back = algebra.inverse(psi)
    spread = _around(algebra, psi, Sigma + half * integrals(_around(algebra, back, noise)))
    spread = (spread + algebra.transpose(spread)) / 2
    first = len(NODES) - 1 if R is None else 0  # before the end of sampling the data may be without noise
    _check_positive(algebra, (start + half * (NODES + 1))[first:], spread[first:])
    found = None
    if R is not None:
        rate = F + algebra.times(noise / 2, algebra.inverse(spread))
        found = algebra.times(algebra.propagate(rate, half), R)
    return Panel(start, end, psi, spread, noise / 2, found)


def _around(algebra: Algebra, a: Array, b: Array) -> Array:
    return algebra.times(algebra.times(a, b), algebra.transpose(a))


def _resolved(coefficients: Coefficients, low: float, high: float, span: float) -> Iterator[tuple[float, float, Array, Array]]:
    """Halve a panel until its nodes follow F and G G^T; yield the ends, F and G G^T of each part."""
    half = (high - low) / 2
    F, noise = coefficients(low + half * (NODES + 1))
    if half * np.abs(F).max() <= _WIDEST and _smooth(F) and _smooth(noise):
        yield low, high, F, noise
        return
    if half < _NARROWEST * span:
        raise ValueError(
            f"F or G is not smooth, or very great, at t={low!r}: no polynomial follows it there; give smooth functions, or start "
            "and end where they are"
        )
    middle = low + half
    yield from _resolved(coefficients, low, middle, span)
    yield from _resolved(coefficients, middle, high, span)


def _smooth(values: Array) -> bool:
    """Return whether the last Legendre coefficients of values at the nodes are rounding."""
    size = np.abs(np.tensordot(TO_LEGENDRE, values, 1)).reshape(len(NODES), -1).max(axis=1)
    return bool(size[-3:].max() <= _TAIL * size.max())


def _check_positive(algebra: Algebra, t: Array, Sigma: Array) -> None:
    """Raise ValueError, which names the time, where Sigma is not positive definite."""
    for time, value in zip(t.tolist(), Sigma, strict=True):
        try:
            with np.errstate(all="ignore"):
                root = algebra.root(value)
                positive = bool(np.isfinite(root).all() and np.isfinite(algebra.inverse(root)).all())
        except np.linalg.LinAlgError:
            positive = False
        if not positive:
            raise ValueError(
                f"Sigma at t={time!r} is not positive definite, {shown(value.tolist())}: G must reach every direction, "
                "through F where it is singular; or give the covariance at t=0"
            )
