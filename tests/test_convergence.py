"""Measured order of convergence on problems with a known solution, in float64: within 0.2 of theory for every method."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import deis
from deis.run.numpy import combine

from .oracle import gaussian, two_modes

Array = NDArray[np.float64]
X_T = np.linspace(-1.5, 2.0, 5)
RK_ORDERS = {
    "1euler": 1, "2heun": 2, "2midpoint": 2, "3kutta": 3, "3ral": 3, "3heun": 3, "3vdh": 3, "3ssprk": 3, "4rk": 4,
}  # fmt: skip


def slope(errors: list[float], steps: list[int]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def with_exact_starts(plan: deis.Plan, eps: Callable[..., Array], exact: Array) -> Array:
    """Run a multistep plan whose first W - 1 states are the exact solution's, so that only the full-order rows err."""
    x, history = exact[0], ()  # type: tuple[Array, tuple[Array, ...]]
    for i, row in enumerate(plan.rows):
        history = (eps(x[:, None], np.full(len(x), row.t))[:, 0], *history)[: plan.window]
        x = combine(row.keep_x, x, row.keep_p, history) if i >= plan.window - 1 else exact[i + 1]
    return x


def measure(method: str, sde: deis.Schedule, steps: list[int], ts_phase: str, ts_order: float) -> float:
    eps, solution = two_modes(sde)
    errors = []
    for num_step in steps:
        plan = deis.make_plan(sde, method, num_step, ts_phase, ts_order)
        exact = solution(plan.ts, X_T)
        multistep = plan.num_step == plan.nfe
        x_0 = with_exact_starts(plan, eps, exact) if multistep else deis.sample(plan, eps, X_T[:, None])[:, 0]
        errors.append(np.abs(x_0 - exact[-1]).max())
    return slope(errors, steps)


# Away from the stiff ends, and with these steps, the asymptotic slope shows well before the rounding does.
SMOOTH = deis.VPSDE.linear(0.1, 20.0, sampling_eps=0.2, sampling_T=0.6)
STEPS = [160, 226, 320]


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("family", ["tab", "rhoab"])
def test_adams_of_degree_q_has_order_q_plus_1(family: str, order: int) -> None:
    assert abs(measure(f"{family}{order}", SMOOTH, STEPS, "t", 1) - (order + 1)) < 0.2


@pytest.mark.parametrize("name", RK_ORDERS)
def test_rho_rk_has_the_order_of_its_tableau(name: str) -> None:
    assert abs(measure(f"rhork_{name}", SMOOTH, STEPS, "rho", 1) - RK_ORDERS[name]) < 0.2


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_full_order_on_an_even_rho_grid(order: int) -> None:
    assert abs(measure(f"ipndm{order}", SMOOTH, STEPS, "rho", 1) - order) < 0.2


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_has_order_two_on_other_grids(order: int) -> None:
    """Fixed weights integrate eps but not its product with d(rho), whose step changes: an error of h^3 eps' rho'' a step."""
    assert abs(measure(f"ipndm{order}", SMOOTH, STEPS, "t", 1) - 2) < 0.2


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
def test_a_thousand_steps_of_order_three_do_no_harm(dtype: type) -> None:
    sde = deis.VPSDE.linear()
    eps, solution = gaussian(sde)
    x_T: Array = X_T[:, None].astype(dtype)
    errors = [
        np.abs(deis.sample(deis.make_plan(sde, "tab3", n), eps, x_T) - solution(sde.t_end, X_T[:, None])).max()
        for n in (30, 100, 1000)
    ]
    assert errors[1] < errors[0]
    assert errors[2] < max(errors[1], 2e-5 if dtype is np.float32 else 0)
