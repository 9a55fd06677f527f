"""Tableaux: their order conditions, and independent Runge-Kutta codes."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import RK23, RK45
from torchdiffeq import odeint

import deis

from .oracle import FEW_STEPS, gaussian
from .test_convergence import RK_ORDERS


@pytest.mark.parametrize("name", deis.TABLEAUX)
def test_order_conditions(name: str) -> None:
    tableau, order = deis.TABLEAUX[name], RK_ORDERS[name]
    a, b, c = tableau.a, tableau.b, tableau.c
    conditions: list[list[tuple[Any, float]]] = [
        [(b.sum(), 1)],
        [(b @ c, 1 / 2)],
        [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        [(b @ c**3, 1 / 4), (b @ (c * (a @ c)), 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
        [
            (b @ c**4, 1 / 5), (b @ (c**2 * (a @ c)), 1 / 10), (b @ (c * (a @ c**2)), 1 / 15), (b @ (c * (a @ a @ c)), 1 / 30),
            (b @ (a @ c) ** 2, 1 / 20), (b @ a @ c**3, 1 / 20), (b @ a @ (c * (a @ c)), 1 / 40), (b @ a @ a @ c**2, 1 / 60),
            (b @ a @ a @ a @ c, 1 / 120),
        ],
    ]  # fmt: skip
    for group in conditions[:order]:
        for value, exact in group:
            assert abs(value - exact) < 1e-12
    if order < len(conditions):
        assert max(abs(value - exact) for value, exact in conditions[order]) > 1e-3


@pytest.mark.parametrize(("name", "pair"), [("3bs", RK23), ("6dopri", RK45)])
def test_pairs_are_those_of_scipy(name: str, pair: Any) -> None:
    tableau = deis.TABLEAUX[name]
    np.testing.assert_allclose(tableau.a[:, : pair.A.shape[1]], pair.A, rtol=1e-14)
    np.testing.assert_allclose(tableau.b, pair.B, rtol=1e-14)
    np.testing.assert_allclose(tableau.c, pair.C, rtol=1e-14)


def test_bogacki_and_shampine_advance_with_the_third_order_of_ralston() -> None:
    np.testing.assert_array_equal(deis.TABLEAUX["3bs"].a, deis.TABLEAUX["3ral"].a)
    np.testing.assert_array_equal(deis.TABLEAUX["3bs"].b, deis.TABLEAUX["3ral"].b)


@FEW_STEPS
def test_budgets_of_six_stages_end_in_the_shipped_ones() -> None:
    for nfe, counts in ((6, [6]), (9, [6, 3]), (11, [6, 4, 1])):
        assert deis.rho_rk("6dopri").split(nfe, False) == counts
        assert deis.make_plan(deis.VPSDE.linear(), "rhork_6dopri", nfe=nfe).nfe == nfe


@pytest.mark.parametrize(("name", "method"), [("1euler", "euler"), ("2midpoint", "midpoint")])
def test_rho_rk_is_torchdiffeq_on_v(name: str, method: str) -> None:
    sde = deis.VPSDE.linear()
    eps = gaussian(sde)[0]
    ts = deis.make_grid(sde, 8)
    x_T = np.linspace(-2, 2, 4)[:, None]

    def slope(rho: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        t = sde.t_of_rho(rho.numpy())
        return torch.from_numpy(eps(sde.alpha(t) * v.numpy(), np.full(len(v), t)))

    v_T = torch.from_numpy(x_T / sde.alpha(ts[0]))
    v_0 = odeint(slope, v_T, torch.from_numpy(sde.rho(ts)), method=method)[-1]
    x_0 = deis.sample(deis.make_plan(sde, f"rhork_{name}", ts=ts), eps, x_T)
    np.testing.assert_allclose(x_0, sde.alpha(ts[-1]) * v_0.numpy(), rtol=1e-11)


def test_a_tableau_of_the_users() -> None:
    kutta = deis.ButcherTableau([[1 / 2], [-1, 2]], [1 / 6, 2 / 3, 1 / 6], "mine")  # type: ignore[arg-type]
    square = deis.ButcherTableau(kutta.a, kutta.b, "square")
    plan = deis.make_plan(deis.VPSDE.linear(), deis.rho_rk(kutta), 4)
    for other in ("rhork_3kutta", deis.rho_rk(square)):
        np.testing.assert_array_equal(plan.next_p, deis.make_plan(deis.VPSDE.linear(), other, 4).next_p)
    assert plan.nfe == 12
    assert plan.num_step == 4
    assert "rhork_mine" in repr(plan)


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        ([[1]], [0.5, 0.6], "sum to 1"),
        ([[0.5, 0.5], [1, 0]], [0.5, 0.5], "explicit"),
        ([[2]], [0.5, 0.5], r"\[0, 1\]"),
        ([[1], [0.5]], [0.5, 0.5, 0, 0], "rows"),
        ([[np.nan]], [0.5, 0.5], "finite"),
    ],
)
def test_bad_tableaux_are_refused(a: list[list[float]], b: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deis.ButcherTableau(a, b)  # type: ignore[arg-type]


def test_a_stage_that_nothing_uses_is_refused() -> None:
    wasteful = deis.ButcherTableau([[0.5], [0.5, 0.0]], [1.0, 0.0, 0.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wastes an evaluation"):
        deis.make_plan(deis.VPSDE.linear(), deis.rho_rk(wasteful), 4)
