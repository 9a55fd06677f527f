"""Linear SDEs dx = F_t x dt + G_t dw: the transition matrix Psi, the covariance Sigma and its roots K = R or L."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..arguments import array, check_state, function, kind, number, one_of, shown
from ..arrays import Array
from ..backends import backend_of
from .algebra import ALGEBRAS, Algebra
from .dct import from_frequencies, to_frequencies
from .path import Path, solve

ROOTS = ("R", "L")


@dataclass(frozen=True, eq=False, repr=False)
class LinearSDE:
    r"""A linear SDE, dx = F_t x dt + G_t dw from t = 0 up, with matrices F_t and G_t (arXiv 2204.13902).

    Given x_0, the state x_t has the mean Psi(t, 0) x_0 and the covariance Sigma_t::

        d Psi(t, s)/dt = F Psi,   Psi(s, s) = 1;     d Sigma/dt = F Sigma + Sigma F^T + G G^T

    A network predicts eps = -K_t^T score, with K K^T = Sigma: the noise in x_t = Psi(t, 0) x_0 + K_t eps. K is either the Cholesky
    factor L_t, or R_t with dR/dt = (F + 1/2 G G^T Sigma^-1) R (gDDIM, arXiv 2206.05564), by which eps of data at a single point is
    constant along the probability flow. R is L at sampling_eps, which fixes its rotation; another rotation changes what a network
    is to predict, but no sample.

    Parameters
    ----------
    F, G : callables
        t, a float, -> array of shape (k, k), which acts on the k blocks of the state, such as position and velocity; or with
        basis="dct" of the shape of the last axes of the data, such as (height, width), one number a frequency.
    covariance : array of the same shape, optional
        Sigma at t = 0, symmetric and positive semi-definite, such as that of the velocity; 0 by default.
    basis : {"block", "dct"}
        "dct" is the orthonormal discrete cosine transform of the last axes.
    sampling_eps, sampling_T : float
        The times at which sampling ends and starts, 0 < sampling_eps < sampling_T. F and G must be smooth from 0 to sampling_T.
    name : str, optional
        For plans and errors.

    Raises
    ------
    TypeError
        If F or G is no function of t.
    ValueError
        If they return another shape or what is not finite, at a time that is named; if they are not smooth; or if Sigma
        is not positive definite at a time between sampling_eps and sampling_T.

    Notes
    -----
    Psi, Sigma and R come from collocation in float64 when the SDE is made, to 1e-13 of the largest entry.
    """

    F: Callable[[float], ArrayLike]
    G: Callable[[float], ArrayLike]
    covariance: ArrayLike = 0.0
    basis: str = "block"
    sampling_eps: float = 1e-3
    sampling_T: float = 1.0
    name: str = "LinearSDE(F, G)"
    shape: tuple[int, ...] = field(init=False)
    """Of a coefficient."""
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        one_of("basis", self.basis, ALGEBRAS)
        for argument in ("F", "G"):
            function(argument, getattr(self, argument), "t")
        kind("name", self.name, str, "a string,")
        self._keep("sampling_eps", number("sampling_eps", self.sampling_eps, above=0))
        self._keep("sampling_T", number("sampling_T", self.sampling_T, above=self.sampling_eps, hint="sampling starts there"))
        self._keep("shape", self._shape())
        coefficients, algebra = self._coefficients, self.algebra
        self._keep("path", solve(coefficients, self._start(), algebra, self.sampling_eps, self.sampling_T))

    def __repr__(self) -> str:
        return self.name

    def _keep(self, argument: str, value: Any) -> None:
        object.__setattr__(self, argument, value)

    @property
    def algebra(self) -> Algebra:
        """What a product of coefficients means."""
        return ALGEBRAS[self.basis]

    @property
    def t_start(self) -> float:
        """The time at which sampling starts."""
        return self.sampling_T

    @property
    def t_end(self) -> float:
        """The time at which sampling ends."""
        return self.sampling_eps

    def psi(self, t: ArrayLike, s: ArrayLike) -> Array:
        """Return the transition matrix Psi(t, s), for times in [0, t_start] of one shape, or one of them a number."""
        here, there = self._times("t", t, 0.0), self._times("s", s, 0.0)
        if not (here.shape == there.shape or here.ndim == 0 or there.ndim == 0):
            raise ValueError(f"t and s must have one shape, or one of them be a number, and have {here.shape} and {there.shape}")
        return self.path.psi(here, there)

    def Sigma(self, t: ArrayLike) -> Array:
        """Return the covariance of x_t given x_0, for times in [t_end, t_start] of any shape."""
        return self.path.values("Sigma", self._times("t", t, self.t_end))

    def K(self, t: ArrayLike, root: str = "R") -> Array:
        """Return K_t, with K K^T = Sigma: "R" or "L", for times in [t_end, t_start] of any shape."""
        if one_of("root", root, ROOTS) == "R":
            return self.path.values("R", self._times("t", t, self.t_end))
        return self.algebra.root(self.Sigma(t))

    def rho(self, t: ArrayLike) -> Array:
        """Return (a^T Sigma^-1 a)^(-1/2), the deviation of the noise in the best linear estimate of x_0, of the shape of t.

        The data are the first block, and a is the first column of Psi(t, 0); with basis="dct" each frequency has its own. Of one
        block it is sigma/alpha.
        """
        Sigma, psi = self.Sigma(t), self.psi(t, 0.0)
        if self.basis == "dct":
            return np.asarray(np.sqrt(Sigma) / np.abs(psi))
        a = psi[..., :, 0]
        return np.asarray((a * np.linalg.solve(Sigma, a[..., None])[..., 0]).sum(axis=-1) ** -0.5)

    def noise(self, z: Any) -> Any:
        """Return L z at the start of sampling: the state x_T of standard normal noise z, of any framework.

        Parameters
        ----------
        z : array of shape (k, batch, ...), or with basis="dct" (batch, ..., *shape)

        Raises
        ------
        TypeError, ValueError
            If z is no such array.
        """
        check_blocks("z", z, self.basis, self.shape)
        L = backend_of(z).like(self.K(self.t_start, "L"), z)
        if self.basis == "dct":
            return from_frequencies(L * to_frequencies(z, len(self.shape)), len(self.shape))
        return backend_of(z).xp.stack([sum(L[i, j] * z[j] for j in range(i + 1)) for i in range(len(z))])

    def _shape(self) -> tuple[int, ...]:
        shape = _value("F", self.F, self.sampling_T).shape
        square = len(shape) == 2 and shape[0] == shape[1]
        if not shape or 0 in shape or (self.basis == "block" and not square):
            wanted = "(k, k), one row a block of the state" if self.basis == "block" else "that of the data's last axes"
            raise ValueError(f"F must return an array of shape {wanted}, and returns one of shape {shape} at t={self.sampling_T!r}")
        return shape

    def _start(self) -> Array:
        """Return the covariance at t = 0, checked."""
        found = array("covariance", self.covariance)
        Sigma = np.zeros(self.shape) if found.ndim == 0 and found == 0 else found
        if Sigma.shape != self.shape:
            raise ValueError(f"covariance must have the shape {self.shape} of F, and has {Sigma.shape}")
        as_blocks = Sigma if self.basis == "block" else Sigma[..., None, None]
        symmetric = np.isfinite(Sigma).all() and np.allclose(as_blocks, np.swapaxes(as_blocks, -1, -2))
        if not (symmetric and (np.linalg.eigvalsh(as_blocks) >= -1e-12 * np.abs(Sigma).max()).all()):
            raise ValueError(f"covariance={shown(Sigma.tolist())} must be finite, symmetric and positive semi-definite")
        return Sigma

    def _coefficients(self, times: Array) -> tuple[Array, Array]:
        F, G = (
            np.stack([_checked(argument, f, t, self.shape) for t in times.tolist()])
            for argument, f in (("F", self.F), ("G", self.G))
        )
        return F, self.algebra.square(G)

    def _times(self, argument: str, t: ArrayLike, least: float) -> Array:
        found = array(argument, t)
        if not found.size:
            raise ValueError(f"{argument} has shape {found.shape}, without a single time; give at least one")
        inside = (found >= least) & (found <= self.t_start)
        if not inside.all():
            raise ValueError(
                f"{argument}={found[~inside][0].item()!r} leaves [{least!r}, {self.t_start!r}], the times of {self.name}; give one "
                "within, or make the SDE with another sampling_eps or sampling_T"
            )
        return found


def _value(argument: str, f: Callable[[float], ArrayLike], t: float) -> Array:
    return array(f"{argument}({t!r})", f(t))


def _checked(argument: str, f: Callable[[float], ArrayLike], t: float, shape: tuple[int, ...]) -> Array:
    found = _value(argument, f, t)
    if found.shape != shape:
        raise ValueError(f"{argument} must return the shape {shape} of F, and returns {found.shape} at t={t!r}")
    if not np.isfinite(found).all():
        raise ValueError(f"{argument} is not finite at t={t!r}: {shown(found.tolist())}; end or start sampling elsewhere")
    return found


def check_sde(sde: object) -> None:
    """Raise TypeError unless it is a linear SDE."""
    kind("sde", sde, LinearSDE, "a deis.LinearSDE, such as deis.CLD() (deis.make_plan takes the scalar schedules),")


def check_blocks(argument: str, x: Any, basis: str, shape: tuple[int, ...]) -> None:
    """Check that an array is a state of coefficients of a basis and shape.

    Raises
    ------
    TypeError, ValueError
        As `check_state`; and ValueError where it has not the blocks or the frequencies.
    """
    check_state(argument, x)
    found = tuple(x.shape)
    if basis == "block" and (x.ndim < 2 or found[0] != shape[0]):
        raise ValueError(
            f"{argument} must have shape ({shape[0]}, batch, ...), the blocks of the state first, and has shape {found}; stack "
            "position and velocity along a new first axis"
        )
    if basis == "dct" and (x.ndim <= len(shape) or found[-len(shape) :] != shape):
        raise ValueError(
            f"{argument} must have shape (batch, ..., {', '.join(map(str, shape))}), the frequencies of the basis last, and has "
            f"shape {found}; make the SDE for data of this size"
        )
