"""Exponential Runge-Kutta: phi functions, tableaux beside what their papers write out, budgets, and methods of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from mpmath import mp, mpf
from numpy.typing import NDArray

import deis
from deis.methods.clocks import CLOCKS
from deis.methods.exponential import lawson
from deis.methods.phi import phi
from deis.quadrature import lagrange_integrals

from . import transcriptions as tr

# Few steps, on purpose, which plans warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.* of the deviation of Gaussian data:UserWarning")

Array = NDArray[np.float64]
Form = Literal["data", "eps"]
SDE = deis.VPSDE.linear()
TABLES = deis.EXPONENTIAL_TABLEAUX
EXACT = [name for name, table in TABLES.items() if table.exact]
X_T = np.linspace(-2.0, 2.5, 6)[:, None]


def exact_phi(k: int, z: Any) -> Any:
    """phi_k by Kummer's function."""
    return mp.exp(z) if k == 0 else mp.hyp1f1(1, k + 1, z) / mp.factorial(k)


@pytest.mark.parametrize("k", range(7))
def test_phi_to_rounding(k: int) -> None:
    z = np.concatenate([np.linspace(-40, 40, 321), [-1e-3, -1e-9, 0, 1e-300, 1e-3, 12.0, np.nextafter(12, 13), -300, 300]])
    exact = [exact_phi(k, mpf(value)) for value in z.tolist()]
    assert max(abs(mpf(value) / right - 1) for value, right in zip(phi(k, z).tolist(), exact, strict=True)) < 1e-14


# --- the methods as their papers have them, in mpmath: (c, a, b) with the weights of h N at z = h L -------------------------------

Written = tuple[list[Any], list[list[Any]], list[Any]]


def etdrk2(z: Any) -> Written:
    """Cox & Matthews' ETD2RK in exponentials: a_n = u e^z + N (e^z - 1) / L, u = a_n + (N(a_n) - N) (e^z - 1 - z) / (h L^2)."""
    first, second = mp.expm1(z) / z, (mp.expm1(z) - z) / z**2
    return [0, 1], [[first]], [first - second, second]


def etdrk_end(z: Any) -> tuple[Any, Any, Any]:
    """The weights of N at the beginning, the middle and the end that ETD3RK and ETD4RK share."""
    e = mp.exp(z)
    begin, middle, end = -4 - z + e * (4 - 3 * z + z**2), 4 * (2 + z + e * (z - 2)), -4 - 3 * z - z**2 + e * (4 - z)
    return begin / z**3, middle / z**3, end / z**3


def etdrk3(z: Any) -> Written:
    half, whole = mp.expm1(z / 2) / z, mp.expm1(z) / z
    return [0, mpf(1) / 2, 1], [[half], [-whole, 2 * whole]], list(etdrk_end(z))


def etdrk4(z: Any) -> Written:
    half, (begin, middle, end) = mp.expm1(z / 2) / z, etdrk_end(z)
    third = [half * (mp.exp(z / 2) - 1), 0, 2 * half]  # from a_n, which itself is u e^(z / 2) + h N half
    return [0, mpf(1) / 2, mpf(1) / 2, 1], [[half], [0, half], third], [begin, middle / 2, middle / 2, end]


def res_2s(z: Any) -> Written:
    b_2 = 2 * (mp.expm1(z) - z) / z**2
    return [0, mpf(1) / 2], [[mp.expm1(z / 2) / z]], [mp.expm1(z) / z - b_2, b_2]


def res_3s(z: Any) -> Written:
    c_2, c_3 = mpf(1) / 2, mpf(1)
    gamma = (3 * c_3**3 - 2 * c_3) / ((2 - 3 * c_2) * c_2)
    a_32 = gamma * c_2 * exact_phi(2, c_2 * z) + c_3**2 / c_2 * exact_phi(2, c_3 * z)
    b_3 = exact_phi(2, z) / (gamma * c_2 + c_3)
    a = [[c_2 * exact_phi(1, c_2 * z)], [c_3 * exact_phi(1, c_3 * z) - a_32, a_32]]
    return [0, c_2, c_3], a, [exact_phi(1, z) - (gamma + 1) * b_3, gamma * b_3, b_3]


def res_5s(z: Any) -> Written:
    half = mpf(1) / 2
    (one, two, three), (one_half, two_half, three_half) = ([exact_phi(k, w) for k in (1, 2, 3)] for w in (z, z / 2))
    a_52 = two_half / 2 - three + two / 4 - three_half / 2
    a_54 = two_half / 4 - a_52
    a = [
        [one_half / 2],
        [one_half / 2 - two_half, two_half],
        [one - 2 * two, two, two],
        [one_half / 2 - 2 * a_52 - a_54, a_52, a_52, a_54],
    ]
    return [0, half, half, 1, half], a, [one - 3 * two + 4 * three, 0, 0, -two + 4 * three, 4 * two - 8 * three]


def lawson2(z: Any) -> Written:
    return [0, mpf(1) / 2], [[mp.exp(z / 2) / 2]], [0, mp.exp(z / 2)]


def lawson4(z: Any) -> Written:
    e = mp.exp(z / 2)
    return [0, mpf(1) / 2, mpf(1) / 2, 1], [[e / 2], [0, mpf(1) / 2], [0, 0, e]], [e**2 / 6, e / 3, e / 3, mpf(1) / 6]


WRITTEN: dict[str, Callable[[Any], Written]] = {
    f.__name__: f for f in (res_2s, res_3s, res_5s, etdrk2, etdrk3, etdrk4, lawson2, lawson4)
}


def written_out(name: str, form: Form, denoise: tr.Denoise, x: Array, rhos: Array) -> Array:
    """Sample x = x_0 + rho eps: y' = -y + x_0 of y = x, or y' = y - eps of y = x / rho, in lambda = -log rho."""
    for s, t in pairwise(rhos.tolist()):
        h = mp.log(mpf(s) / mpf(t))
        z = -h if form == "data" else h
        c, a, b = WRITTEN[name](z)
        y, slopes = x if form == "data" else x / s, list[Array]()
        for c_i, row in zip([*c, 1], [[], *a, b], strict=True):
            y_i = float(mp.exp(c_i * z)) * y + sum(float(h * weight) * slope for weight, slope in zip(row, slopes, strict=True))
            rho = float(s * mp.exp(-c_i * h))
            x = y_i if form == "data" else rho * y_i
            if len(slopes) < len(c):
                slopes.append(denoise(x, rho) if form == "data" else -(x - denoise(x, rho)) / rho)
    return x


def denoise(x: Array, rho: float) -> Array:
    return np.tanh(x / (0.25 + rho**2)) + 0.1 * np.cos(x) / (1 + rho)


def sample(plan: deis.Plan, sde: deis.Schedule, x_T: Array = X_T) -> Array:
    """Sample x / alpha from x_T."""

    def model(x: Array, t: Array) -> Array:
        return denoise(x / sde.alpha(t[:1]), float(sde.rho(t[:1])[0]))

    return deis.sample(plan, model, sde.alpha(plan.t[0]) * x_T, predicts="x0") / sde.alpha(plan.t[-1])


@pytest.mark.parametrize("form", ["data", "eps"])
@pytest.mark.parametrize("sde", [deis.EDM(0.05, 8.0), SDE], ids=lambda sde: sde.name)
@pytest.mark.parametrize("name", TABLES)
def test_every_tableau_is_its_paper_written_out(name: str, sde: deis.Schedule, form: Form) -> None:
    rhos = np.array([8.0, 3.0, 1.7, 0.4, 0.06])
    plan = deis.make_plan(sde, name, sigmas=rhos, form=form)
    assert (plan.form, plan.method) == (form, name)
    wanted = written_out(name, form, denoise, 8 * X_T, rhos)
    np.testing.assert_allclose(sample(plan, sde, 8 * X_T), wanted, rtol=1e-12, atol=1e-12)


def test_the_tableaux_are_all_written_out() -> None:
    assert set(WRITTEN) == set(TABLES)


@pytest.mark.parametrize("form", ["data", "eps"])
@pytest.mark.parametrize("name", ["res_2s", "etdrk2"])
def test_two_stages_are_the_exact_integral_of_the_line_through_them(name: str, form: Form) -> None:
    plan = deis.make_plan(SDE, name, 1, form=form, ts=[0.7, 0.4])
    ends = np.array([0.7]), np.array([0.4])
    weights = lagrange_integrals(SDE, CLOCKS["log_rho"], form, plan.t[None, 1::-1], *ends)
    np.testing.assert_allclose(plan.keep_p[1], weights[0], rtol=1e-11)


def test_at_z_0_they_are_the_runge_kutta_methods_of_their_nodes() -> None:
    pairs = {
        "res_2s": "2midpoint",
        "etdrk2": "2heun",
        "etdrk3": "3kutta",
        "etdrk4": "4rk",
        "lawson2": "2midpoint",
        "lawson4": "4rk",
    }
    for name, classical in pairs.items():
        weights, table = TABLES[name].weights(np.zeros(1))[0], deis.TABLEAUX[classical]
        np.testing.assert_allclose(weights, np.vstack([table.a[1:], table.b]), atol=1e-15)


def test_tableaux_know_their_order_and_whether_they_are_exact() -> None:
    orders = {"res_2s": 2, "res_3s": 3, "res_5s": 4, "etdrk2": 2, "etdrk3": 3, "etdrk4": 4, "lawson2": 2, "lawson4": 4}
    assert {name: table.order for name, table in TABLES.items()} == orders
    assert {name for name, table in TABLES.items() if not table.exact} == {"lawson2", "lawson4"}
    assert [lawson(deis.TABLEAUX[name], name).order for name in ("1euler", "2ralston", "3heun", "4rule38", "6dopri")] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert deis.ExponentialTableau([0], [], [None]).order == 1


@pytest.mark.parametrize("name", EXACT)
def test_a_changed_coefficient_costs_the_order(name: str) -> None:
    table = TABLES[name]
    rows = [*table.a, table.b]
    for i, row in enumerate(rows):
        for j in range(1, len(row)):
            for place, (weight, k, c) in enumerate(row[j] or ()):
                terms = [*(row[j] or ())]
                terms[place] = (weight * 1.01, k, c)
                others = [*rows[:i], [None, *row[1:j], terms, *row[j + 1 :]], *rows[i + 1 :]]
                changed = deis.ExponentialTableau(table.c, others[:-1], others[-1])
                assert changed.exact
                assert changed.order < table.order


def test_the_stiff_order_conditions_of_four() -> None:
    """Hochbruck & Ostermann 2005, table 2: those of order 4 in z, the last of them at 0, and the rows exact for a linear N."""
    z = np.array([-30.0, -3.0, -0.1, 2.0])
    weights, c = TABLES["res_5s"].weights(z), np.array(TABLES["res_5s"].c)
    b = weights[:, -1]
    for k in (1, 2, 3):
        factorial = (1, 1, 2)[k - 1]
        np.testing.assert_allclose(b @ c ** (k - 1), factorial * phi(k, z), rtol=1e-12)
    np.testing.assert_allclose(TABLES["res_5s"].weights(np.zeros(1))[0, -1] @ c**3, 1 / 4, rtol=1e-12)

    def defect(name: str) -> Array:
        """b_i times how far stage i is from exact for N = lambda."""
        table, own = TABLES[name], TABLES[name].weights(z)
        nodes = np.array(table.c)
        stage = nodes[1:] ** 2 * phi(2, np.multiply.outer(z, nodes[1:])) - own[:, :-1] @ nodes
        return own[:, -1, 1:] * stage

    assert np.abs(defect("res_5s")).max() < 1e-15
    assert np.abs(defect("etdrk4").sum(axis=1)).max() > 1e-3


def test_lawson_is_the_tableau_on_the_state_times_the_integrating_factor() -> None:
    """v = e^lambda x/alpha has v' = e^lambda x_0 in lambda: classical Runge-Kutta on it, with nothing exponential about it."""
    sde = deis.EDM(0.05, 8.0)
    plan = deis.make_plan(sde, "lawson4", 6)
    assert plan.fitted == "the integrating factor of short steps"
    assert "integrating factor" in repr(plan)

    def slope(lam: float, v: Array) -> Array:
        return np.exp(lam) * denoise(np.exp(-lam) * v, np.exp(-lam))

    lam = -np.log(plan.ts)
    v = np.exp(lam[0]) * X_T
    for start, end in pairwise(lam):
        h = end - start
        k_1 = slope(start, v)
        k_2 = slope(start + h / 2, v + h / 2 * k_1)
        k_3 = slope(start + h / 2, v + h / 2 * k_2)
        k_4 = slope(end, v + h * k_3)
        v = v + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    np.testing.assert_allclose(sample(plan, sde), np.exp(-lam[-1]) * v, rtol=1e-11, atol=1e-12)


# --- budgets ---------------------------------------------------------------------------------------------------------------------


def test_budgets_end_in_cheaper_steps() -> None:
    six = deis.ExponentialTableau([0, *[1 / 2] * 5], [[None, *[[]] * i] for i in range(5)], [None, *[[]] * 4, [(2, 2, 1)]])
    for tableau, nfe, clean, counts in (
        ("res_5s", 9, False, [5, 4]),
        ("res_5s", 8, False, [5, 3]),
        ("res_5s", 10, True, [5, 4, 1]),
        ("res_5s", 6, True, [5, 1]),
        ("etdrk4", 6, False, [4, 2]),
        ("lawson2", 5, False, [2, 2, 1]),
        (six, 11, False, [6, 4, 1]),
    ):
        assert deis.exponential_rk(tableau).split(nfe, clean) == counts


def test_the_last_step_to_the_data_is_the_prediction() -> None:
    for name in TABLES:
        for form in ("data", "eps"):
            plan = deis.make_plan(deis.EDM(sampling_eps=0.0), name, 3, form=form)
            assert plan.nfe == 2 * len(TABLES[name].c) + 1
            np.testing.assert_allclose(deis.sample(plan, lambda x, t: 0 * x + 0.7, X_T, predicts="x0"), 0.7, rtol=1e-12)


@pytest.mark.parametrize("nfe", range(1, 12))
def test_dpm_fast_is_that_of_k_diffusion(nfe: int) -> None:
    sde = deis.EDM(0.05, 8.0)
    plan = deis.make_plan(sde, "dpm_fast", nfe=nfe)
    assert plan.nfe == nfe
    np.testing.assert_allclose(sample(plan, sde, 8 * X_T), tr.dpm_fast(denoise, 8 * X_T, 8.0, 0.05, nfe), rtol=1e-11, atol=1e-12)


# --- a user's own ----------------------------------------------------------------------------------------------------------------


def test_a_tableau_of_the_users() -> None:
    mine = deis.ExponentialTableau((0, 0.5), ((None,),), (((1, 1, 1), (-2, 2, 1.0)), ((2, 2, 1),)), "mine")
    plan, named = (deis.make_plan(SDE, method, nfe=7) for method in (deis.exponential_rk(mine), "res_2s"))
    for column in ("keep_p", "next_p"):
        np.testing.assert_allclose(getattr(plan, column), getattr(named, column), rtol=1e-13, atol=1e-15)
    assert plan.method == "mine"
    assert {TABLES["res_2s"]: 1}[deis.ExponentialTableau([0, 0.5], [[None]], [None, [(2, 2, 1)]], "res_2s")] == 1


class EulerFirst:
    """Steps of one stage for a third of a budget, and of two for the rest."""

    late = deis.exponential_rk("etdrk2")

    def __init__(self, too_many: int = 0) -> None:
        self.too_many = too_many

    def split(self, nfe: int, clean: bool) -> list[int]:
        return [1] * (nfe // 3) + self.late.split(nfe - nfe // 3, clean) + [1] * self.too_many

    def __call__(self, sde: deis.Schedule, ts: Array, grid: str, counts: list[int] | None = None) -> deis.Plan:
        return self.late(sde, ts, grid, counts)


@pytest.mark.parametrize("sde", [SDE, deis.EDM(sampling_eps=0.0)], ids=lambda sde: sde.name)
def test_a_builder_of_the_users_with_stages_meets_every_budget(sde: deis.Schedule) -> None:
    for nfe in range(1, 14):
        plan = deis.make_plan(sde, EulerFirst(), nfe=nfe)
        assert plan.nfe == nfe
        assert plan.accepts[: nfe // 3].all()
        assert deis.make_plan(sde, EulerFirst(), nfe=nfe, afs=0.5).nfe == nfe
    assert deis.make_plan(SDE, EulerFirst(), 4).nfe == 8
    with pytest.raises(ValueError, match=r"nfe=6 cannot be met: 'etdrk2' makes 7 evaluations in 5 steps"):
        deis.make_plan(SDE, EulerFirst(too_many=1), nfe=6)


@pytest.mark.parametrize(
    ("c", "a", "b", "error", "match"),
    [
        ([0, 1 / 2], [], [None, []], ValueError, "rows of 1, ..., s - 1 weights"),
        ([0, 1 / 2], [[None, []]], [None, []], ValueError, r"\(2,\) and \[2, 2\]"),
        ([], [], [], ValueError, "rows of 1, ..., s - 1 weights"),
        ([0, 2], [[None]], [None, []], ValueError, r"c=\[0.0, 2.0\] must begin with 0 and lie in \[0, 1\]"),
        ([1 / 2], [], [None], ValueError, "must begin with 0"),
        ([0, np.nan], [[None]], [None, []], ValueError, "must begin with 0"),
        ([0, 1 / 2], [[None]], [None, [(1, 2, 1 / 3)]], ValueError, r"c=0.333\d* in b must be a node, 1, or a difference"),
        ([0, 1 / 2], [[None]], [None, [(1, -1, 1)]], ValueError, "k in b=-1"),
        ([0, 1 / 2], [[None]], [None, [(1, 21, 1)]], ValueError, "k in b=21"),
        ([0, 1 / 2], [[None]], [None, [(np.inf, 1, 1)]], ValueError, "the weight of a term in b=inf"),
        ([0, 1 / 2], [[[(1, 1, 1 / 2)]]], [None, []], ValueError, r"a\[0\] must sum to its node 0.5 at z = 0"),
        ([0, 1 / 2], [[None]], [[(1, 1, 1)], [(1, 2, 1)]], ValueError, r"b must sum to its node 1.0 .* sums to 1.5"),
        ([0, 1 / 2], [[None]], [None, [(1, 2)]], TypeError, r"a term in b must be \(weight, k, c\) and is \(1, 2\)"),
        ([0, 1 / 2], [[None]], [None, [1.0]], TypeError, r"a term in b must be \(weight, k, c\) and is 1.0"),
        ([0, 1 / 2], [[None]], [None, None], TypeError, "a weight in b must be a sequence of terms"),
        ([0, 1 / 2], [None], [None, []], TypeError, r"a\[0\] must be a sequence of weights and is None"),
        ([0, 1 / 2], 3, [None, []], TypeError, "a must be a sequence of rows and is 3"),
    ],
)
def test_bad_tableaux_are_refused(c: Any, a: Any, b: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        deis.ExponentialTableau(c, a, b)


def test_what_has_no_meaning_is_refused() -> None:
    for form in ("data", "eps"):
        with pytest.raises(ValueError, match=r"need a finite one, and it is infinite at t=1\.0; start later"):
            deis.make_plan(deis.FlowMatching(), "res_2s", 5, form=form)
    with pytest.raises(ValueError, match="'etdrk4'"):
        deis.exponential_rk("rk4")
    with pytest.raises(TypeError, match=r"a name of deis\.EXPONENTIAL_TABLEAUX"):
        deis.exponential_rk(deis.TABLEAUX["4rk"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form='v' is unknown"):
        deis.exponential_rk("res_2s", "v")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"c=-0\.5 in a\[1\] must be a node"):
        lawson(deis.TABLEAUX["3ssprk"], "its nodes fall")
    with pytest.raises(ValueError, match="wastes an evaluation"):
        deis.make_plan(SDE, deis.exponential_rk(deis.ExponentialTableau([0, 1], [[None]], [None, []])), 3)
