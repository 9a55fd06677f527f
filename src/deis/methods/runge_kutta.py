"""rhoRK-DEIS: any explicit Runge-Kutta method on dv/d(rho) = eps-hat, v = x/alpha."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from ..arguments import array, kind, one_of, shown
from ..arrays import Array
from ..sde import Schedule
from .singlestep import SingleStep, Steps

Tree = tuple[Any, ...]
"""A rooted tree: those that hang from its root."""


def density(tree: Tree) -> int:
    """Return the density of a tree: the product over its nodes of the number of nodes from each on."""
    return _size(tree) * math.prod(map(density, tree))


def _size(tree: Tree) -> int:
    return 1 + sum(map(_size, tree))


def _grown(tree: Tree) -> Iterator[Tree]:
    """Yield the trees with one more leaf."""
    yield tuple(sorted((*tree, ())))
    for i, branch in enumerate(tree):
        for grown in _grown(branch):
            yield tuple(sorted((*tree[:i], grown, *tree[i + 1 :])))


TREES: list[set[Tree]] = [{()}]
"""The rooted trees of 1, 2, ..., 5 nodes."""
for _ in range(4):
    TREES.append({grown for tree in TREES[-1] for grown in _grown(tree)})


@dataclass(frozen=True, eq=False)
class ButcherTableau:
    """An explicit Runge-Kutta method of s stages.

    Attributes
    ----------
    a : arrays of shape (1,), (2,), ..., (s - 1,), or one array of shape (s, s) that is strictly lower triangular
        The weights of earlier stages; kept as the square array.
    b : array of shape (s,)
        The weights of the step, of sum 1.
    name : str
        What a plan calls it.

    The nodes c are the row sums of a, as consistency demands.

    Raises
    ------
    ValueError
        Where the shapes disagree, a is not strictly lower triangular, b does not sum to 1, or a node lies outside [0, 1].
    """

    a: Array
    b: Array
    name: str = "tableau"

    def __post_init__(self) -> None:
        b = array("b", self.b)
        a = _square(self.a, b.size)
        kind("name", self.name, str, "a string,")
        if b.ndim != 1 or a.shape != (b.size, b.size) or b.size < 1:
            raise ValueError(f"b must have shape (s,) and a shape (s, s), and they have {b.shape} and {a.shape}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"a and b must be finite, and are {a.tolist()} and {b.tolist()}")
        if np.triu(a).any():
            raise ValueError(f"a must be strictly lower triangular (the method explicit), and is {a.tolist()}")
        if abs(b.sum() - 1) > 1e-12:
            raise ValueError(f"b={b.tolist()} must sum to 1, and sums to {b.sum()!r}")
        c = a.sum(axis=1)
        if not ((c >= 0) & (c <= 1)).all():
            raise ValueError(f"the nodes, the row sums of a, must lie in [0, 1] and are {c.tolist()}")
        for field, values in (("a", a), ("b", b)):
            values.setflags(write=False)
            object.__setattr__(self, field, values)

    @property
    def c(self) -> Array:
        """The nodes, shape (s,)."""
        return np.minimum(self.a.sum(axis=1), 1.0)

    @cached_property
    def order(self) -> int:
        """The order of convergence, up to 5: b . Phi(tree) = 1 / gamma(tree) for all rooted trees of so many nodes (Butcher)."""
        order = 0
        while order < 5 and all(abs(self.b @ self._phi(tree) - 1 / density(tree)) < 1e-10 for tree in TREES[order]):
            order += 1
        return order

    def _phi(self, tree: Tree) -> Array:
        """Return the elementary weights of the stages: a product over the root's branches."""
        return np.prod([self.a @ self._phi(branch) for branch in tree], axis=0) * np.ones(len(self.b))


def _square(a: Sequence[Sequence[float]] | Array, stages: int) -> Array:
    """Return a as a square array, from rows of growing length or from a square."""
    if isinstance(a, np.ndarray):
        return array("a", a)
    if not isinstance(a, Sequence) or isinstance(a, str):
        raise TypeError(f"a must be a sequence of rows or a square array, and is {shown(a)}")
    rows = [array("a", row, "row by row").ravel() for row in a]
    if len(rows) == stages - 1:
        rows = [np.empty(0), *rows]
    if len(rows) != stages or any(len(row) > stages for row in rows):
        raise ValueError(
            f"a must have {stages - 1} or {stages} rows beside b of {stages}, and has rows of {[len(row) for row in rows]}"
        )
    return np.array([np.pad(row, (0, stages - len(row))) for row in rows])


TABLEAUX: dict[str, ButcherTableau] = {
    name: ButcherTableau(a, b, name)  # type: ignore[arg-type]
    for name, a, b in (
        ("1euler", [], [1]),
        ("2heun", [[1]], [1 / 2, 1 / 2]),
        ("2midpoint", [[1 / 2]], [0, 1]),
        ("2ralston", [[2 / 3]], [1 / 4, 3 / 4]),
        ("3kutta", [[1 / 2], [-1, 2]], [1 / 6, 2 / 3, 1 / 6]),
        ("3ral", [[1 / 2], [0, 3 / 4]], [2 / 9, 1 / 3, 4 / 9]),  # Ralston
        ("3bs", [[1 / 2], [0, 3 / 4]], [2 / 9, 1 / 3, 4 / 9]),  # the third order of Bogacki & Shampine's pair, which is Ralston's
        ("3heun", [[1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
        ("3vdh", [[8 / 15], [1 / 4, 5 / 12]], [1 / 4, 0, 3 / 4]),  # van der Houwen
        ("3ssprk", [[1], [1 / 4, 1 / 4]], [1 / 6, 1 / 6, 2 / 3]),  # Shu & Osher
        ("4rk", [[1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        ("4rule38", [[1 / 3], [-1 / 3, 1], [1, -1, 1]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),  # Kutta
        ("4ssprk", [[1 / 2], [1 / 2, 1 / 2], [1 / 6, 1 / 6, 1 / 6]], [1 / 6, 1 / 6, 1 / 6, 1 / 2]),  # order 3, Spiteri & Ruuth
        (
            "6dopri",  # the fifth order of Dormand & Prince's pair
            [
                [1 / 5],
                [3 / 40, 9 / 40],
                [44 / 45, -56 / 15, 32 / 9],
                [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
                [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
            ],
            [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
        ),
    )
}


def rho_rk(tableau: str | ButcherTableau) -> SingleStep:
    """Return rhoRK-DEIS (arXiv 2204.13902, section 4) of a tableau, given by name or as a `ButcherTableau`.

    With h = rho_{i+1} - rho_i, stage k is evaluated at x = alpha (v_i + h sum_j a_kj eps_j) where rho = rho_i + c_k h, and
    v_{i+1} = v_i + h sum_k b_k eps_k. A budget that the stages do not divide ends with a step of 1euler, 2heun, 3kutta or 4rk.

    Raises
    ------
    ValueError
        For an unknown name; it lists the known ones.
    """
    if isinstance(tableau, str):
        tableau = TABLEAUX[one_of("rk_method", tableau, TABLEAUX)]
    kind("tableau", tableau, ButcherTableau, "a name of deis.TABLEAUX or a deis.ButcherTableau,")
    cheaper = [TABLEAUX[name] for name in ("1euler", "2heun", "3kutta", "4rk")]
    family = {len(table.b): partial(tableau_steps, tableau=table) for table in cheaper if len(table.b) < len(tableau.b)}
    family[len(tableau.b)] = partial(tableau_steps, tableau=tableau)
    return SingleStep(f"rhork_{tableau.name}", family)


def tableau_steps(sde: Schedule, start: Array, end: Array, *, tableau: ButcherTableau) -> Steps:
    """Return the steps of a Butcher tableau in rho, eps form."""
    rho, rho_end = sde.rho(start), sde.rho(end)
    if not (np.isfinite(rho).all() and np.isfinite(rho_end).all()):
        t, cure = (start[0], "start later") if np.isinf(rho[0]) else (end[-1], "end earlier")
        raise ValueError(
            f"rhoRK integrates in rho = sigma/alpha, infinite at t={t.item()!r} where alpha is 0; {cure}, or use 'tab3'"
        )
    h = (rho_end - rho)[:, None]
    with np.errstate(divide="ignore"):
        t = sde.t_of_rho(rho[:, None] + h * tableau.c)
    # The ends of a step are the grid's own times, to the bit.
    t = np.where(tableau.c == 0, start[:, None], np.where(tableau.c == 1, end[:, None], t))
    target_alpha = sde.alpha(np.append(t[:, 1:], end[:, None], axis=1))
    weights = np.vstack([tableau.a[1:], tableau.b])
    return Steps("eps", t, target_alpha / sde.alpha(start)[:, None], target_alpha[..., None] * h[..., None] * weights)
