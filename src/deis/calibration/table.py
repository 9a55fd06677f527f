"""A plan as one recurrence of the states that the network sees, which is what calibration fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays import Array, Flags
from ..groups import waits
from ..machine import Row
from ..plan import Plan
from ..sde import Schedule


@dataclass(frozen=True)
class Table:
    r"""x_{i+1} = a_i x_i + sum_j c_ij p_{i-j}.

    Every deterministic plan is such a recurrence, Runge-Kutta stages and correctors included: base is a combination of x and of
    the predictions since, so that it can be eliminated, at the price of a window wider by one.

    Attributes
    ----------
    t : array of shape (n + 1,)
    a : array of shape (n,)
    c : array of shape (n, n)
        Newest prediction first; row i uses c[i, : i + 1].
    """

    t: Array
    a: Array
    c: Array

    @classmethod
    def of(cls, plan: Plan) -> Table:
        """Return the recurrence of a plan.

        Raises
        ------
        ValueError
            For a plan that is stochastic or exactly invertible, or one in which x does not depend on base, as in no known method.
        """
        if plan.stochastic:
            raise ValueError(f"plan {plan.method!r} adds noise, and only a deterministic plan has a solution to be fitted to")
        if plan.invertible or plan.pair:
            raise ValueError(
                f"plan {plan.method!r} uses past states, and a fit would lose its inverse; fit another, such as 'auto'"
            )
        if (plan.next_x == 0).any():
            raise ValueError(f"plan {plan.method!r} has next_x=0 at row {int(np.argmin(plan.next_x != 0))}, and cannot be fitted")
        n, window = plan.keep_p.shape
        a, c = np.zeros(n), np.zeros((n, n))
        # base = base_x x_i + sum_j base_p[j] p_{i-1-j}
        base_x, base_p = 1.0, np.zeros(n)
        for i in range(n):
            history = np.append(0.0, base_p)[:n] * plan.keep_x[i]  # newest first, p_i in front
            history[: min(window, n)] += plan.keep_p[i, :n]
            stage = np.zeros(n)
            stage[: min(window, n)] = plan.next_p[i, :n]
            a[i] = plan.next_x[i] * plan.keep_x[i] * base_x
            c[i, : i + 1] = (plan.next_x[i] * history + stage)[: i + 1]
            base_x, base_p = 1 / plan.next_x[i], -stage / plan.next_x[i]
        return cls(plan.t, a, c)

    @property
    def theta(self) -> Array:
        """The coefficients (a_i, c_i0, c_i1, ...) of each row, shape (n, n + 1)."""
        return np.column_stack([self.a, self.c])

    @property
    def rows(self) -> list[Row]:
        """The rows for `deis.machine`."""
        return [row_of(theta) for theta in self.theta.tolist()]

    def plan(self, like: Plan, sde: Schedule, fitted: str) -> Plan:
        """Return the recurrence as a plan with the rows and names of another.

        Raises
        ------
        ValueError
            Where the table is no valid plan, such as one whose times do not decrease.
        """
        used = np.flatnonzero((self.c != 0).any(axis=0))
        window = int(used[-1]) + 1 if len(used) else 1
        zeros = np.zeros((len(self.a), window))
        rows: dict[str, Any] = {"t": self.t, "alpha": sde.alpha(self.t), "sigma": sde.sigma(self.t)}
        rows |= {"keep_x": self.a, "keep_p": self.c[:, :window], "keep_z": zeros[:, 0], "next_x": 1 + zeros[:, 0], "next_p": zeros}
        return replace(like, **rows, fitted=fitted)


def row_of(theta: Any) -> Row:
    """Return the row of coefficients (a, c_0, ...) that keeps the state it makes; they may be traced."""
    return Row(None, None, None, theta[0], theta[1:], None, 1.0, (), None, True, True)


def free(plan: Plan) -> Flags:
    """Return which coefficients (a_i, c_i0, c_i1, ...) of a plan's recurrence may be fitted, shape (n, n + 1).

    Three kinds are fixed. The weights of predictions that do not exist yet when row i + 1 is evaluated beside them: the depth would
    grow. The weights of a first prediction without a call: it is a multiple of x_0, and x_i is a combination of x_0 and the
    predictions since, so it would add nothing. And a first row that passes the state on.
    """
    n, (_, predictions) = len(plan.rows), waits(plan.rows)
    found = np.tri(n, n + 1, 1, dtype=bool)
    for group in plan.groups:
        for i in group[:-1]:
            found[i, 1 : i + 2] = [predictions[i - j].isdisjoint(group) for j in range(i + 1)]
    if not plan.calls[0]:
        np.fill_diagonal(found[:, 1:], False)
    found[0] &= not plan.hands_on
    return found


def with_free_start(plan: Plan) -> Plan:
    """Return the plan after a row that makes no call and passes the state on: its first call may then be later than the start."""

    def after(values: Any, first: Any) -> Any:
        return np.concatenate([np.full_like(values[:1], first), values])

    ahead = dict.fromkeys(("keep_x", "next_x"), 1.0) | dict.fromkeys(("keep_p", "next_p", "keep_z", "guess"), 0.0)
    rows = {name: after(getattr(plan, name), first) for name, first in (ahead | {"accepts": False, "calls": False}).items()}
    levels = {name: after(getattr(plan, name), getattr(plan, name)[0]) for name in ("t", "alpha", "sigma")}
    return replace(plan, **levels, **rows)
