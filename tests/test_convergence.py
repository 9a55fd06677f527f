"""Measured order of convergence on problems with a known solution, in float64: within 0.2 of theory for every method."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

import deis
from deis.backends.numpy import combine
from deis.methods.clocks import CLOCKS
from deis.methods.layout import Builder
from deis.methods.registry import REGISTRY, find

from .oracle import gaussian, two_modes

Array = NDArray[np.float64]
X_T = np.linspace(-1.5, 2.0, 5)
# Names of the families, whose order depends on the number in them.
EXAMPLES = {
    "tab<q>": ["tab0", "tab1", "tab2", "tab3", "tab4"],
    "rhoab<q>": ["rhoab0", "rhoab1", "rhoab2", "rhoab3", "rhoab4"],
    "lms<q>": ["lms1", "lms4"],
    "ipndm<q>": ["ipndm1", "ipndm2", "ipndm3", "ipndm4"],
    "parallel<q>": ["parallel1"],
    "ipndm_v<q>": ["ipndm_v1", "ipndm_v2", "ipndm_v3", "ipndm_v4"],
    "deis_abm<q>": ["deis_abm0", "deis_abm1"],
    "unipc<q>": ["unipc1", "unipc2", "unipc3"],
    "unipc<q>_bh1": ["unipc2_bh1", "unipc3_bh1"],
    "unipc<q>_bh2": ["unipc2_bh2", "unipc3_bh2"],
    "rhork_<tableau>": [f"rhork_{tableau}" for tableau in deis.TABLEAUX],
}
DETERMINISTIC = [
    name for entry in REGISTRY if not entry.weak and entry.order is not None for name in EXAMPLES.get(entry.name, [entry.name])
]


def slope(errors: list[float], steps: list[int]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def with_exact_starts(plan: deis.Plan, eps: Callable[..., Array], exact: Array) -> Array:
    """Run a multistep plan whose first W - 1 states are the exact solution's, so that only the full-order rows err."""
    x = base = exact[0]
    history: tuple[Array, ...] = ()
    corrects = bool((plan.next_p != 0).any())
    for i, row in enumerate(plan.rows):
        p = eps(x[:, None], np.full(len(x), row.t))[:, 0]
        p = p if plan.form == "eps" else (x - row.sigma * p) / row.alpha
        history = (p, *history)[: plan.window]
        if i >= plan.window - 1:
            base = combine(row.keep_x, base, row.keep_p, history)
            x = combine(row.next_x, base, row.next_p, history)
        else:  # with a corrector, base is the corrected state times psi
            x = exact[i + 1]
            base = row.keep_x * exact[i] if corrects else x
    return x


def measure(method: str | Builder, sde: deis.Schedule, steps: list[int], ts_phase: str, ts_order: float) -> float:
    eps, solution = two_modes(sde)
    errors = []
    for num_step in steps:
        plan = deis.make_plan(sde, method, num_step, ts_phase, ts_order)
        exact = solution(plan.ts, X_T)
        multistep = plan.accepts.all()
        x_0 = with_exact_starts(plan, eps, exact) if multistep else deis.sample(plan, eps, X_T[:, None])[:, 0]
        errors.append(np.abs(x_0 - exact[-1]).max())
    return slope(errors, steps)


RK_ORDERS = {
    "1euler": 1, "2heun": 2, "2midpoint": 2, "2ralston": 2, "3kutta": 3, "3ral": 3, "3bs": 3, "3heun": 3, "3vdh": 3, "3ssprk": 3,
    "4rk": 4, "4rule38": 4, "4ssprk": 3, "6dopri": 5,
}  # fmt: skip
# Away from the stiff ends, and with these steps, the asymptotic slope shows well before the rounding does.
SMOOTH = deis.VPSDE.linear(0.1, 20.0, sampling_eps=0.2, sampling_T=0.6)
STEPS = [160, 226, 320]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_method_has_the_order_of_its_entry(name: str) -> None:
    order = find(name)[0].order_of(name)
    assert order is not None
    # Three times to a step, for no lower order at the end; and with six stages of order 5 many steps are at the rounding.
    steps = [60, 84, 120] if name.endswith(("3s_published", "6dopri")) else STEPS
    phase = "rho" if name.startswith("rhork") else "t"  # even steps in their own variable
    assert abs(measure(name, SMOOTH, steps, phase, 1) - order) < 0.2


# At z = 0 the classical rk4, and of order 2 all the same.
TOO_SIMPLE = deis.ExponentialTableau(
    deis.EXPONENTIAL_TABLEAUX["etdrk4"].c,
    deis.EXPONENTIAL_TABLEAUX["etdrk4"].a,
    [[(weight, 1, 1)] for weight in (1 / 6, 1 / 3, 1 / 3, 1 / 6)],
    "too_simple",
)


@pytest.mark.parametrize("form", ["data", "eps"])
@pytest.mark.parametrize("table", [*deis.EXPONENTIAL_TABLEAUX.values(), TOO_SIMPLE], ids=lambda table: table.name)
def test_exponential_tableaux_have_the_order_that_they_compute(
    table: deis.ExponentialTableau, form: Literal["eps", "data"]
) -> None:
    assert abs(measure(deis.exponential_rk(table, form), SMOOTH, STEPS, "t", 1) - table.order) < 0.2


def test_tableaux_know_their_order() -> None:
    assert {name: table.order for name, table in deis.TABLEAUX.items()} == RK_ORDERS
    nearly = deis.ButcherTableau(np.array([[0, 0, 0], [0.51, 0, 0], [-1, 2, 0]]), np.array([1, 4, 1]) / 6)
    assert nearly.order == 1


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("form", ["eps", "data"])
@pytest.mark.parametrize(("order", "corrector"), [(1, None), (3, None), (1, 1), (1, 2), (2, 3)])
def test_adams_has_its_order_in_every_clock_and_form(
    clock: str, form: Literal["eps", "data"], order: int, corrector: int | None
) -> None:
    """Degree q has order q + 1; a corrector of degree c makes it min(c + 1, q + 2)."""
    theory = order + 1 if corrector is None else min(corrector + 1, order + 2)
    assert abs(measure(deis.adams(form, clock, order, corrector), SMOOTH, STEPS, "t", 1) - theory) < 0.2


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_full_order_on_an_even_rho_grid(order: int) -> None:
    assert abs(measure(f"ipndm{order}", SMOOTH, STEPS, "rho", 1) - order) < 0.2


@pytest.mark.parametrize(
    "sde",
    [deis.VPSDE.cosine(), deis.SubVPSDE.linear(), deis.VESDE(0.01, 10.0), deis.EDM(), deis.FlowMatching(1e-3, 0.99)],
    ids=lambda s: s.name,
)
def test_samples_converge_to_the_true_solution_on_every_schedule(sde: deis.Schedule) -> None:
    eps, solution = gaussian(sde)
    x_T = sde.sigma(sde.t_start) * X_T[:, None]
    phase = "t" if sde.name.startswith("Flow") else "log"
    for method in ("tab2", "rhork_3kutta"):
        error: list[float] = []
        for num_step in (80, 320):
            x_0 = deis.sample(deis.make_plan(sde, method, num_step, phase), eps, x_T)
            error.append(np.abs(x_0 - solution(sde.t_end, x_T)).max())
        assert error[1] < error[0] / 12
        assert error[1] < 1e-4


@pytest.mark.parametrize(
    "sde",
    [
        deis.VPSDE.linear(),
        deis.VPSDE.cosine(),
        deis.SubVPSDE.linear(),
        deis.VESDE(0.01, 50.0),
        deis.EDM(),
        deis.EDM(0.0),
        deis.FlowMatching(1e-3, 0.99),
    ],
    ids=lambda s: f"{s.name}-{s.t_end}",
)
def test_auto_is_good_on_every_schedule(sde: deis.Schedule) -> None:
    """Ten evaluations of a Gaussian, whose solution is known, within a twentieth of its deviation, 0.5; and convergence."""
    eps, solution = gaussian(sde)
    x_T = sde.alpha(sde.t_start) * 0.7 + sde.sigma(sde.t_start) * X_T[:, None]
    errors = [np.abs(deis.sample(deis.make_plan(sde, nfe=n), eps, x_T) - solution(sde.t_end, x_T)).max() for n in (10, 40)]
    assert errors[0] < 0.05 * 0.5
    assert errors[1] < errors[0] / 8


def test_flow_matching_from_pure_noise_to_clean_data() -> None:
    """From alpha = 0 to sigma = 0, through the velocity, which both ends determine."""
    sde, mean, std = deis.FlowMatching(), 0.7, 0.5

    def velocity(x: Array, t: Array) -> Array:
        t = t[:, None]
        variance = ((1 - t) * std) ** 2 + t**2
        x_0 = mean + (1 - t) * std**2 * (x - (1 - t) * mean) / variance
        return (x - x_0) / np.where(t > 0, t, 1)

    x_T = X_T[:, None]
    errors = [
        np.abs(deis.sample(deis.make_plan(sde, "tab2", n, ts_order=1), velocity, x_T, predicts="flow") - (mean + std * x_T)).max()
        for n in (40, 80)
    ]
    assert errors[1] < errors[0] / 3.5
    assert errors[1] < 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", ["tab2", "tab3", "dpm_solver_3m", "dpmpp_3m", "unipc3", "deis_abm", "dpmpp_3s"])
def test_a_thousand_steps_of_order_three_do_no_harm(method: str, dtype: type) -> None:
    sde = deis.VPSDE.linear()
    eps, solution = gaussian(sde)
    x_T: Array = X_T[:, None].astype(dtype)
    errors = [
        np.abs(deis.sample(deis.make_plan(sde, method, n), eps, x_T) - solution(sde.t_end, X_T[:, None])).max()
        for n in (30, 100, 1000)
    ]
    assert errors[1] < errors[0]
    assert errors[2] < max(errors[1], 2e-5 if dtype is np.float32 else 0)
