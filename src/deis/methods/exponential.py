"""Exponential Runge-Kutta in log rho: tableaux of phi functions; DPM-Solver and DPM-Solver++ of several stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

import numpy as np

from ..arguments import array, kind, number, one_of, shown, whole
from ..arrays import Array
from ..quadrature import Form, lagrange_integrals
from ..sde import Schedule
from .clocks import CLOCKS
from .phi import phi
from .runge_kutta import TABLEAUX, TREES, ButcherTableau, Tree, density
from .singlestep import SingleStep, Steps, stage_times
from .step import check_form, choose_form

Term = tuple[float, int, float]
"""(weight, k, c), which stands for weight * phi_k(c z)."""
Weight = Sequence[Term] | None
"""A sum of terms; None for what the others of its row leave."""


@dataclass(frozen=True)
class ExponentialTableau:
    """An explicit exponential Runge-Kutta method of s stages for y' = L y + N(y), where z = h L.

    Stage i is Y_i = e^(c_i z) y + h sum_j a_ij(z) N(Y_j), and the step e^z y + h sum_j b_j(z) N(Y_j). The weights a_ij and b_j are
    sums of terms (weight, k, c), each weight * phi_k(c z) with the functions of `deis.methods.phi`, of which phi_0 is exp
    (Hochbruck & Ostermann, Acta Numerica 2010, doi 10.1017/S0962492910000048). At z = 0 this is a Runge-Kutta method.

    Attributes
    ----------
    c : sequence of s numbers
        The nodes: 0, and others in [0, 1].
    a : s - 1 sequences of 1, 2, ..., s - 1 weights
        The weights of the stages before each after the first. A weight of no terms is 0. The first of a row may be None: what
        the others leave of c_i phi_1(c_i z), so that the row is exact where N is constant.
    b : sequence of s weights
        Those of the step, with 1 for its node.
    name : str
        What a plan calls it.

    Raises
    ------
    ValueError
        Where the shapes disagree, a node lies outside [0, 1], a term has a c that is no node, 1, or difference of two of them, or
        a row does not sum to its node at z = 0.
    TypeError
        Where a row is no sequence, or a term no triple.
    """

    c: Sequence[float]
    a: Sequence[Sequence[Weight]]
    b: Sequence[Weight]
    name: str = "tableau"

    def __post_init__(self) -> None:
        kind("name", self.name, str, "a string,")
        c = array("c", self.c)
        kind("a", self.a, Sequence, "a sequence of rows")
        labelled = {**{f"a[{i}]": row for i, row in enumerate(self.a)}, "b": self.b}
        for label, row in labelled.items():
            kind(label, row, Sequence, "a sequence of weights")
        lengths = [len(row) for row in labelled.values()]
        if c.ndim != 1 or c.size < 1 or lengths != [*range(1, c.size), c.size]:
            raise ValueError(f"c must have shape (s,), a rows of 1, ..., s - 1 weights and b s; they have {c.shape} and {lengths}")
        if c[0] != 0 or not ((c >= 0) & (c <= 1)).all():
            raise ValueError(f"c={c.tolist()} must begin with 0 and lie in [0, 1]")
        nodes = np.append(c, 1.0)
        spans = np.unique(np.abs(nodes[:, None] - nodes))
        *a, b = (_row(label, row, node, spans) for (label, row), node in zip(labelled.items(), nodes[1:].tolist(), strict=True))
        for field, value in (("c", tuple(c.tolist())), ("a", tuple(a)), ("b", b)):
            object.__setattr__(self, field, value)

    def weights(self, z: Array) -> Array:
        """Return a_ij(z), without the first row, and b_j(z) in the last: shape (n, s, s) for z of shape (n,)."""
        return self._summed(lambda weight, k, c: weight * phi(k, c * z), len(z))[:, 1:]

    def _summed(self, value: Callable[[float, int, float], Array], n: int) -> Array:
        """Return the sums over the terms of a value of shape (n,), as shape (n, s + 1, s): the first row, of no weights, is 0."""
        out = np.zeros((n, len(self.c) + 1, len(self.c)))
        for i, row in enumerate([*self.a, self.b], 1):
            for j, terms in enumerate(row):
                for term in terms or ():
                    out[:, i, j] += value(*term)
        return out

    @cached_property
    def exact(self) -> bool:
        """Whether all rows are exact where N is constant: sum_j a_ij = c_i phi_1(c_i z). Those of Lawson's methods are not."""
        z, c = np.array([-5.0, -1.0, 1.0]), np.append(self.c[1:], 1.0)
        return np.allclose(self.weights(z).sum(axis=2), c * phi(1, np.multiply.outer(z, c)), rtol=1e-12, atol=0)

    @cached_property
    def order(self) -> int:
        """The order of convergence, up to 5, for every L and N; its constant may depend on L (the stiff order may be less).

        The conditions are Butcher's, on the rooted trees whose nodes are N, or L where they have one branch or none.
        """
        order = 0
        while order < 5 and all(
            abs(weights[0, -1] - 1 / density(tree)) < 1e-10 for tree in TREES[order] for weights in self._elementary(tree)
        ):
            order += 1
        return order

    def _elementary(self, tree: Tree) -> list[Array]:
        """Return the elementary weights of a tree for each way to name its nodes: [m, i] in stage i, with m more L below."""
        m, c = np.arange(6), np.append(self.c, 1.0)
        factorial = np.array([float(math.factorial(i)) for i in range(27)])
        taylor = self._summed(lambda weight, k, c: weight * c**m / factorial[m + k], len(m))  # of the weights, in z
        found = [] if tree else [c ** m[1:, None] / factorial[m[1:], None]]
        for branches in product(*map(self._elementary, tree)):
            inner = np.prod([branch[0, :-1] for branch in branches], axis=0) * np.ones(len(self.c))
            found.append(taylor @ inner)
            if len(branches) == 1:
                found.append(branches[0][1:])
        return found


def _row(label: str, row: Sequence[Weight], node: float, spans: Array) -> tuple[tuple[Term, ...], ...]:
    """Return the checked weights of a row, the first of them what the others leave where it is None."""
    rest = [_terms(label, terms, spans) for terms in row[1:]]
    left = ((node, 1, node), *((-weight, k, c) for terms in rest for weight, k, c in terms))
    weights = (left if row[0] is None else _terms(label, row[0], spans), *rest)
    total = sum(weight / math.factorial(k) for terms in weights for weight, k, _ in terms)
    if abs(total - node) > 1e-12:
        raise ValueError(f"{label} must sum to its node {node!r} at z = 0, where phi_k is 1 / k!, and sums to {total!r}")
    return weights


def _terms(label: str, terms: Weight, spans: Array) -> tuple[Term, ...]:
    """Return the checked terms of a weight."""
    kind(f"a weight in {label}", terms, Sequence, "a sequence of terms (weight, k, c)")
    found = []
    for term in terms or ():
        if not isinstance(term, Sequence) or len(term) != 3:
            raise TypeError(f"a term in {label} must be (weight, k, c) and is {shown(term)}")
        weight, k, c = number(f"the weight of a term in {label}", term[0]), whole(f"k in {label}", term[1], least=0), term[2]
        number(f"k in {label}", k, most=20)
        if np.abs(spans - number(f"c in {label}", c)).min() > 1e-12:
            raise ValueError(f"c={c!r} in {label} must be a node, 1, or a difference of two of them: one of {spans.tolist()}")
        found.append((weight, k, float(c)))
    return tuple(found)


def lawson(tableau: ButcherTableau, name: str) -> ExponentialTableau:
    """Return Lawson's method (doi 10.1137/0704033) of a Butcher tableau whose nodes do not fall: the tableau on e^(-L t) y.

    Its weights are a_ij e^((c_i - c_j) z), which hold the integrating factor itself where exact ones hold its integral.
    """
    c = [*tableau.c.tolist(), 1.0]
    *a, b = (
        [[(weight, 0, c[i] - c[j])] if weight else [] for j, weight in enumerate(row[:i].tolist())]
        for i, row in enumerate([*tableau.a[1:], tableau.b], 1)
    )
    return ExponentialTableau(c[:-1], a, b, name)


_COX: tuple[Term, ...] = ((-1, 2, 1), (4, 3, 1))
_SHARE: tuple[Term, ...] = ((1 / 2, 2, 1 / 2), (-1, 3, 1), (1 / 4, 2, 1), (-1 / 2, 3, 1 / 2))
EXPONENTIAL_TABLEAUX: dict[str, ExponentialTableau] = {
    table.name: table
    for table in (
        # Zhang et al., arXiv 2308.02157: c_2 = 1/2, and for three stages Hochbruck & Ostermann's family with c_2 = 1/2, c_3 = 1.
        ExponentialTableau([0, 1 / 2], [[None]], [None, [(2, 2, 1)]], "res_2s"),
        ExponentialTableau(
            [0, 1 / 2, 1],
            [[None], [None, [(2, 2, 1 / 2), (2, 2, 1)]]],
            [None, [(4 / 3, 2, 1)], [(1 / 3, 2, 1)]],
            "res_3s",
        ),
        # Hochbruck & Ostermann, SIAM J. Numer. Anal. 43 (2005), of stiff order 4.
        ExponentialTableau(
            [0, 1 / 2, 1 / 2, 1, 1 / 2],
            [
                [None],
                [None, [(1, 2, 1 / 2)]],
                [None, [(1, 2, 1)], [(1, 2, 1)]],
                [None, _SHARE, _SHARE, [(1 / 4, 2, 1 / 2), *((-weight, k, c) for weight, k, c in _SHARE)]],
            ],
            [None, [], [], _COX, [(4, 2, 1), (-8, 3, 1)]],
            "res_5s",
        ),
        # Cox & Matthews, J. Comput. Phys. 176 (2002): ETD2RK, ETD3RK and ETD4RK.
        ExponentialTableau([0, 1], [[None]], [None, [(1, 2, 1)]], "etdrk2"),
        ExponentialTableau([0, 1 / 2, 1], [[None], [None, [(2, 1, 1)]]], [None, [(4, 2, 1), (-8, 3, 1)], _COX], "etdrk3"),
        ExponentialTableau(
            [0, 1 / 2, 1 / 2, 1],
            [[None], [[], [(1 / 2, 1, 1 / 2)]], [None, [], [(1, 1, 1 / 2)]]],
            [None, [(2, 2, 1), (-4, 3, 1)], [(2, 2, 1), (-4, 3, 1)], _COX],
            "etdrk4",
        ),
        lawson(TABLEAUX["2midpoint"], "lawson2"),
        lawson(TABLEAUX["4rk"], "lawson4"),
    )
}


def exponential_rk(tableau: str | ExponentialTableau, form: Form | None = None) -> SingleStep:
    """Return the exponential Runge-Kutta method of a tableau, given by name or as an `ExponentialTableau`.

    With lambda = -log rho and h = lambda_{i+1} - lambda_i, y = x/alpha has y' = -y + x_0 in lambda, so that z = -h: the weight of a
    prediction is alpha h times that of the tableau, with the alpha that the stage or step goes to. In the eps form y = x/sigma has
    y' = y - eps, so that z = h, and the weight is -sigma h times the tableau's. A budget that the stages do not divide ends with a
    step of etdrk4, res_3s, res_2s or of first order, and so does a grid that ends at sigma = 0, where lambda is infinite.

    Parameters
    ----------
    tableau : str or ExponentialTableau
        One of `deis.EXPONENTIAL_TABLEAUX`, or your own.
    form : {"data", "eps"}, optional
        By default data.

    Raises
    ------
    ValueError
        For an unknown name or form; and, when a plan is built, where log rho is infinite at an end of a step of several stages.
    """
    if isinstance(tableau, str):
        tableau = EXPONENTIAL_TABLEAUX[one_of("tableau", tableau, EXPONENTIAL_TABLEAUX)]
    kind("tableau", tableau, ExponentialTableau, "a name of deis.EXPONENTIAL_TABLEAUX or a deis.ExponentialTableau,")
    form = check_form(form)
    chosen, s = form or "data", len(tableau.c)
    tables = {len(table.c): table for table in map(EXPONENTIAL_TABLEAUX.__getitem__, ("res_2s", "res_3s", "etdrk4"))}
    family = {1: partial(exponential_steps, form=chosen, c=(0.0,), through=((0,),))}
    family |= {size: partial(phi_steps, form=chosen, tableau=table) for size, table in (tables | {s: tableau}).items() if size <= s}
    fitted = "" if tableau.exact else "the integrating factor of short steps"
    return SingleStep(tableau.name, family, clean_end=True, fitted=fitted)


def phi_steps(sde: Schedule, start: Array, end: Array, *, form: Form, tableau: ExponentialTableau) -> Steps:
    """Return the steps of an exponential tableau; see `exponential_rk`."""
    t = stage_times(sde, start, end, tableau.c)
    target = np.append(t[:, 1:], end[:, None], axis=1)
    h = sde.log_rho(start) - sde.log_rho(end)
    kept, gained, sign = (sde.sigma, sde.alpha, 1.0) if form == "data" else (sde.alpha, sde.sigma, -1.0)
    weights = tableau.weights(-sign * h)
    return Steps(form, t, kept(target) / kept(start)[:, None], (sign * h[:, None] * gained(target))[..., None] * weights)


def dpm_singlestep(form: Form | None, name: str, order: int) -> SingleStep:
    """Return the exponential Runge-Kutta method of DPM-Solver (arXiv 2206.00927, algorithm 1 and 2) or DPM-Solver++.

    Stage k lies at log rho = log rho_i + c_k (log rho_{i+1} - log rho_i), and each state comes from x_i by the exact integral of
    the polynomial in log rho through some of the stages before it: order 2 has c = (0, 1/2) and a last polynomial through stage 1
    alone; order 3 c = (0, 1/3, 2/3) and polynomials through (0), (0, 1) and (0, 2). form="eps" is DPM-Solver, "data" DPM-Solver++
    (arXiv 2211.01095).
    """
    tables: dict[int, tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]] = {
        1: ((0.0,), ((0,),)),
        2: ((0.0, 1 / 2), ((0,), (1,))),
        3: ((0.0, 1 / 3, 2 / 3), ((0,), (0, 1), (0, 2))),
    }
    family = {s: partial(exponential_steps, form=form, c=c, through=through) for s, (c, through) in tables.items() if s <= order}
    return SingleStep(name, family, clean_end=True)


def dpm_fast() -> SingleStep:
    """Return DPM-Solver of order 3 with the budgets of DPM-Solver-fast (arXiv 2206.00927), as k-diffusion has it."""
    return replace(dpm_singlestep("eps", "dpm_fast", 3), fast=True)


def exponential_steps(
    sde: Schedule, start: Array, end: Array, *, form: Form | None, c: tuple[float, ...], through: tuple[tuple[int, ...], ...]
) -> Steps:
    """Return the steps of an exponential Runge-Kutta method; see `dpm_singlestep`."""
    chosen, s = choose_form(sde, start, form), len(c)
    t = stage_times(sde, start, end, c)
    target = np.append(t[:, 1:], end[:, None], axis=1)
    scale = sde.alpha if chosen == "eps" else sde.sigma
    c_p = np.zeros((len(start), s, s))
    for k, nodes in enumerate(through):
        weights = lagrange_integrals(sde, CLOCKS["log_rho"], chosen, t[:, nodes], start, target[:, k])
        c_p[:, k, list(nodes)] = weights
    return Steps(chosen, t, scale(target) / scale(start)[:, None], c_p)
