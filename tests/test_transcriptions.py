"""What the transcribed samplers must do by their mathematics: lines and marginals exactly, one another's special cases, orders."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from . import transcriptions as tr
from .test_convergence import slope

Array = NDArray[np.float64]
Sampler = Callable[..., Array]
HIGH, LOW, STEPS = 8.0, 0.2, 7
X = np.linspace(-9.0, 11.0, 7)
NORMALS = np.random.default_rng(0).standard_normal((20, 3, len(X)))


def karras(steps: int, to_zero: bool = False) -> Array:
    """Return a grid of arXiv 2206.00364 with rho = 7 from HIGH to LOW, whose last step may go on to 0."""
    grid = np.linspace(HIGH ** (1 / 7), LOW ** (1 / 7), steps + 1 - to_zero) ** 7
    return np.append(grid, 0.0) if to_zero else grid


def noise(i: int, k: int) -> Array:
    return NORMALS[i, k]


def silent(sampler: Sampler, **options: Any) -> Sampler:
    """Return a sampler without its noise."""
    return lambda denoise, x, sigmas: sampler(denoise, x, sigmas, lambda i, k: np.zeros_like(x), **options)


def fast(denoise: tr.Denoise, x: Array, sigmas: Array, noise: tr.Noise | None = None, eta: float = 0.0, more: int = 2) -> Array:
    """Return dpm_fast on the ends of a grid; `more` is the remainder of nfe by 3."""
    return tr.dpm_fast(denoise, x, sigmas[0], max(sigmas[-1], LOW), 3 * (len(sigmas) - 1) + more, noise, eta)


EPS_FORM: dict[str, Sampler] = {
    "heunpp2": tr.heunpp2,
    **{f"ipndm_v{order}": partial(tr.ipndm_v, order=order) for order in (1, 2, 3)},
    "ipndm_v4 exact": partial(tr.ipndm_v, order=4, exact=True),
    "gradient_estimation": tr.gradient_estimation,
    "dpm_2": silent(tr.dpm_2_ancestral, eta=0.0),
}
DATA_FORM: dict[str, Sampler] = {
    "euler": silent(tr.euler_ancestral, eta=0.0),
    "dpmpp_2s": silent(tr.dpmpp_2s_ancestral, eta=0.0),
    "res_multistep": tr.res_multistep,
    "exp_heun_2_x0": tr.exp_heun_2_x0,
    "seeds_2": silent(tr.seeds_2, eta=0.0, r=0.3),
    "seeds_3": silent(tr.seeds_3, eta=0.0),
    "dpmpp_sde": silent(tr.dpmpp_sde, eta=0.0, r=0.3),
    "dpmpp_2m_sde": silent(tr.dpmpp_2m_sde, eta=0.0),
    "dpmpp_3m_sde": silent(tr.dpmpp_3m_sde, eta=0.0),
    "er_sde": silent(tr.er_sde, scaler=lambda rho: rho),
    "sa_solver": silent(tr.sa_solver, tau=lambda sigma: 0.0),
}
STOCHASTIC: dict[str, Sampler] = {
    f"{sampler.__name__} eta={eta}": partial(sampler, eta=eta)
    for eta in (0.5, 1.0)
    for sampler in (
        tr.euler_ancestral, tr.dpm_2_ancestral, tr.dpmpp_2s_ancestral, tr.res_multistep_ancestral, tr.dpmpp_sde, tr.seeds_2,
        tr.seeds_3, tr.dpmpp_2m_sde, tr.dpmpp_3m_sde,
    )
} | {
    "exp_heun_2_x0_sde": tr.exp_heun_2_x0_sde,
    "sa_solver": partial(tr.sa_solver, tau=lambda sigma: float(sigma > 1)),
    "lcm": tr.lcm,
    "tcd": lambda denoise, x, sigmas, noise: tr.tcd(denoise, x, sigmas, noise, sigmas[1:] / 2),
    "er_sde": tr.er_sde,
    "er_sde exact": partial(tr.er_sde, points=None),
}  # fmt: skip
FLOW: dict[str, Sampler] = {
    **{
        f"{sampler.__name__} eta={eta}": partial(sampler, eta=eta)
        for eta in (0.0, 0.5, 1.0)
        for sampler in (tr.euler_ancestral_flow, tr.dpm_2_ancestral_flow, tr.dpmpp_2s_ancestral_flow)
    },
    "lcm_flow": tr.lcm_flow,
    "seeds_2": tr.in_flow(tr.seeds_2),
}


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("name", [*EPS_FORM, *DATA_FORM])
def test_a_constant_x_0_is_a_straight_line(name: str, to_zero: bool) -> None:
    sigmas, x_0 = karras(STEPS, to_zero), np.arange(7.0)
    x = (EPS_FORM | DATA_FORM)[name](lambda x, sigma: x_0, X, sigmas)
    np.testing.assert_allclose(x, x_0 + sigmas[-1] / HIGH * (X - x_0), atol=1e-12)


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("name", EPS_FORM)
def test_a_constant_eps_is_integrated_exactly(name: str, to_zero: bool) -> None:
    sigmas, eps = karras(STEPS, to_zero), np.arange(7.0)
    x = EPS_FORM[name](lambda x, sigma: x - sigma * eps, X, sigmas)
    np.testing.assert_allclose(x, X + (sigmas[-1] - HIGH) * eps, atol=1e-12)


def loads(sampler: Sampler, sigmas: Array, predict: Callable[[Array, float], Array], start: float, per_step: int = 3) -> Array:
    """Return the factors of the end on the start's normal array and on each noise, for a prediction that is linear in x."""
    size = 1 + per_step * len(sigmas)
    unit = np.eye(size)
    return sampler(predict, start * unit[0], sigmas, lambda i, k: unit[1 + per_step * i + k])


@pytest.mark.parametrize("name", [*STOCHASTIC, "dpm_fast"])
def test_data_at_a_point_keeps_the_noise_level_exactly(name: str) -> None:
    sampler = partial(fast, eta=0.5) if name == "dpm_fast" else STOCHASTIC[name]
    factors = loads(sampler, karras(STEPS), lambda x, sigma: np.zeros_like(x), HIGH)
    np.testing.assert_allclose(np.linalg.norm(factors), LOW, rtol=1e-12)
    assert np.count_nonzero(factors[1:]) > 0


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_last_step_to_zero_is_the_prediction(name: str) -> None:
    seen: list[Array] = []

    def denoise(x: Array, sigma: float) -> Array:
        seen.append(np.tanh(x + sigma))
        return seen[-1]

    sampler = partial(tr.tcd, down=0 * karras(STEPS)[1:]) if name == "tcd" else STOCHASTIC[name]
    x = sampler(denoise, X, karras(STEPS, True), noise=noise)
    np.testing.assert_allclose(x, seen[-1], atol=1e-14)


@pytest.mark.parametrize("name", FLOW)
def test_a_flow_keeps_its_noise_level_exactly(name: str) -> None:
    sigmas = np.linspace(0.98, 0.1, STEPS + 1)
    factors = loads(FLOW[name], sigmas, lambda x, sigma: np.zeros_like(x), sigmas[0])
    np.testing.assert_allclose(np.linalg.norm(factors), sigmas[-1], rtol=1e-12)


@pytest.mark.parametrize("name", ["euler_ancestral_flow eta=1.0", "dpmpp_2s_ancestral_flow eta=1.0", "lcm_flow"])
def test_a_flow_may_start_at_1_and_end_at_0(name: str) -> None:
    x = FLOW[name](lambda x, sigma: 0 * x + 3.0, X, np.linspace(1, 0, STEPS + 1), noise)
    np.testing.assert_allclose(x, 3.0, rtol=1e-14)


# --- special cases ----------------------------------------------------------------------------------------------------------------


def two_modes(x: Array, sigma: float) -> Array:
    """Return the exact x_0 of two equal Gaussians at -1 and 1 of deviation 0.5."""
    variance = 0.25 + sigma**2
    return (0.25 * x + sigma**2 * np.tanh(x / variance)) / variance


def carried(i: int, k: int) -> Array:
    """Return dpmpp_sde's noises, r = 1/2, eta = 1, even lambda, where the step's holds the stage's as on one path."""
    if k == 0:
        return noise(i, 0)
    half = (HIGH / LOW) ** (-0.5 / STEPS)
    old, new = half * np.sqrt(1 - half**2), np.sqrt(1 - half**2)
    return (old * noise(i, 0) + new * noise(i, 1)) / np.hypot(old, new)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (silent(tr.seeds_2, eta=0.0), DATA_FORM["dpmpp_2s"]),
        (DATA_FORM["seeds_2"], DATA_FORM["dpmpp_sde"]),
        (silent(tr.dpmpp_2m_sde, eta=0.0, solver_type="heun"), tr.res_multistep),
        (silent(tr.er_sde, max_stage=1, scaler=lambda rho: rho), DATA_FORM["euler"]),
        (partial(tr.ipndm_v, order=1), DATA_FORM["euler"]),
        (partial(tr.gradient_estimation, ge_gamma=1.0), DATA_FORM["euler"]),
        (partial(tr.ipndm_v, order=2), partial(tr.ipndm_v, order=2, exact=True)),
        (silent(tr.sa_solver, tau=lambda s: 0.0, predictor_order=1, corrector_order=0), DATA_FORM["euler"]),
    ],
)
@pytest.mark.parametrize("to_zero", [True, False])
def test_without_noise_they_are_one_another(one: Sampler, other: Sampler, to_zero: bool) -> None:
    sigmas = karras(STEPS, to_zero)
    np.testing.assert_allclose(one(two_modes, X, sigmas), other(two_modes, X, sigmas), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            partial(tr.dpmpp_2m_sde, solver_type="heun"),
            partial(tr.sa_solver, tau=lambda s: 1.0, predictor_order=2, corrector_order=0),
        ),
        (partial(tr.tcd, down=karras(STEPS)[1:]), lambda d, x, sigmas, noise: DATA_FORM["euler"](d, x, sigmas)),
        (partial(tr.tcd, down=np.zeros(STEPS)), tr.lcm),
        (partial(tr.tcd, down=karras(STEPS)[1:] ** 2 / karras(STEPS)[:-1]), tr.euler_ancestral),
        (partial(tr.er_sde, max_stage=1, scaler=lambda rho: rho**2), tr.euler_ancestral),
    ],
)
def test_with_the_same_noise_they_are_one_another(one: Sampler, other: Sampler) -> None:
    sigmas = karras(STEPS)
    x = one(two_modes, X, sigmas, noise=noise)
    np.testing.assert_allclose(x, other(two_modes, X, sigmas, noise), rtol=1e-11, atol=1e-13)


def test_dpmpp_sde_is_seeds_2_where_its_second_noise_holds_the_first() -> None:
    sigmas = np.geomspace(HIGH, LOW, STEPS + 1)
    np.testing.assert_allclose(tr.dpmpp_sde(two_modes, X, sigmas, carried), tr.seeds_2(two_modes, X, sigmas, noise), rtol=1e-11)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_exact_ipndm_v_integrates_polynomials_and_the_published_one_does_not(order: int) -> None:
    def last_step(degree: int, exact: bool) -> Array:
        def denoise(x: Array, sigma: float) -> Array:
            return x - sigma * (degree + 1) * sigma**degree

        sampler = partial(tr.ipndm_v, denoise, 0 * X, order=order, exact=exact)
        return sampler(karras(STEPS)) - sampler(karras(STEPS)[:-1]) - (LOW ** (degree + 1) - karras(STEPS)[-2] ** (degree + 1))

    for degree in range(order):
        np.testing.assert_allclose(last_step(degree, True), 0, atol=1e-12)
        if degree < {3: 2, 4: 0}.get(order, order):
            np.testing.assert_allclose(last_step(degree, False), 0, atol=1e-12)
        else:
            assert np.abs(last_step(degree, False)).min() > 1e-6


def slope_weights(sampler: Sampler, sigmas: Array) -> Array:
    """Return the factors of the end on the slopes of calls 0, 1, ... which do not depend on x."""
    units = iter(np.eye(12))
    return sampler(lambda x, sigma: x - sigma * next(units), np.zeros(12), sigmas)


@pytest.mark.parametrize(("exact", "weights"), [(True, [-9, 37, -59, 55]), (False, [-11, 43, -65, 57])])
def test_ipndm_v4_on_even_steps(exact: bool, weights: list[int]) -> None:
    sampler, sigmas = partial(tr.ipndm_v, exact=exact), np.linspace(9.0, 4.0, 6)
    last = slope_weights(sampler, sigmas) - slope_weights(sampler, sigmas[:-1])
    np.testing.assert_allclose(-24 * last[1:5], weights, rtol=1e-12)


def test_heunpp2_weighs_slopes_by_sigma_over_the_first() -> None:
    first, middle, last = 3.0, 1.5, 2.0  # -h of the three steps from 8 to 5, 3.5 and 1.5
    found = slope_weights(tr.heunpp2, np.array([8.0, 5.0, 3.5, 1.5]))
    three = [1 - 8.5 / 24, 5 / 24, 3.5 / 24]
    two = [1 - 3.5 / 16, 3.5 / 16]
    np.testing.assert_allclose(-found[:6], np.concatenate([first * np.array(three), middle * np.array(two), [last]]), rtol=1e-12)


def test_er_sde_s_second_derivative_of_a_parabola() -> None:
    """With P = rho the step from 2 to 1 has the integrals log 2 (of 1) and 1 - 2 log 2 (of rho - s)."""

    def last_step(degree: int) -> float:
        run = partial(tr.er_sde, lambda x, sigma: 0 * x + sigma**degree, np.zeros(1), noise=lambda i, k: np.zeros(1), points=None)
        before, after = (float(run(np.array([4.0, 3.0, 2.0, 1.0])[:n], scaler=lambda rho: rho)[0]) for n in (3, 4))
        return after - before / 2

    log = np.log(2.0)
    np.testing.assert_allclose(last_step(1), 1 + (log - 1), rtol=1e-12)
    np.testing.assert_allclose(last_step(2), 2 + (log - 1) * 5 + (1 / 2 + 1 - 2 * log) * 2, rtol=1e-12)


def test_levels_of_the_calls_of_ancestral_sampling_of_a_flow() -> None:
    seen: list[float] = []

    def denoise(x: Array, sigma: float) -> Array:
        seen.append(sigma)
        return 0 * x

    sigmas = np.array([1.0, 0.6, 0.3])
    down = sigmas[1:] ** 2 / sigmas[:-1]  # eta = 1
    for sampler in (tr.dpm_2_ancestral_flow, tr.dpmpp_2s_ancestral_flow):
        sampler(denoise, X, sigmas, noise)
    odds = np.sqrt(0.6 / 0.4 * down[1] / (1 - down[1]))
    expected = [1.0, np.sqrt(down[0]), 0.6, np.sqrt(0.6 * down[1]), 1.0, 0.9999, 0.6, odds / (1 + odds)]
    np.testing.assert_allclose(seen, expected, rtol=1e-12)


def test_er_sde_s_riemann_sum_nears_the_integral() -> None:
    exact = tr.er_sde(two_modes, X, karras(STEPS), noise, points=None)
    errors = [np.abs(tr.er_sde(two_modes, X, karras(STEPS), noise, points=points) - exact).max() for points in (200, 400)]
    assert errors[0] < 5e-3
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.02)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("nfe", range(3, 12))
def test_dpm_fast_spends_its_budget_above_the_end(nfe: int, eta: float) -> None:
    calls: list[float] = []

    def denoise(x: Array, sigma: float) -> Array:
        calls.append(sigma)
        return 0 * x

    tr.dpm_fast(denoise, X, HIGH, LOW, nfe, noise, eta)
    assert len(calls) == nfe
    assert min(calls) >= LOW


# --- orders -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (tr.heunpp2, 1),
        (tr.gradient_estimation, 1),
        (tr.res_multistep, 2),
        (EPS_FORM["dpm_2"], 2),
        (DATA_FORM["dpmpp_2s"], 2),
        (tr.exp_heun_2_x0, 2),
        (DATA_FORM["seeds_2"], 2),
        (DATA_FORM["seeds_3"], 3),
        (silent(tr.seeds_3, eta=0.0, r_1=0.4, r_2=0.8), 2),  # of order 3 where r_2 = 2/3
        (DATA_FORM["dpmpp_3m_sde"], 2),
        (silent(tr.er_sde, scaler=lambda rho: rho, points=None), 2),
        (silent(tr.er_sde, scaler=lambda rho: rho, points=None, max_stage=2), 2),
        (fast, 3),
        (partial(fast, more=0), 2),
    ],
)
def test_order(sampler: Sampler, order: int) -> None:
    true = solve_ivp(lambda s, x: (x - two_modes(x, s)) / s, (HIGH, LOW), X, method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    steps = [40, 80, 160]
    errors = [float(np.abs(sampler(two_modes, X, karras(n)) - true).max()) for n in steps]
    assert abs(slope(errors, steps) - order) < 0.2


def gaussian(x: Array, sigma: float) -> Array:
    """Return the exact x_0 of N(0, 0.25)."""
    return 0.25 / (0.25 + sigma**2) * x


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler_ancestral eta=1.0", 1),
        ("dpmpp_sde eta=1.0", 1),  # of order 2 where the noises of a step are those of one path
        ("seeds_2 eta=1.0", 2),
        ("exp_heun_2_x0_sde", 2),
        ("dpmpp_2s_ancestral eta=1.0", 2),
        ("res_multistep_ancestral eta=1.0", 2),
        ("dpmpp_2m_sde eta=1.0", 2),
        ("er_sde exact", 2),
    ],
)
def test_order_of_the_variance_of_gaussian_data(name: str, order: int) -> None:
    steps = [80, 160, 320]
    errors = []
    for n in steps:
        factors = loads(STOCHASTIC[name], karras(n), gaussian, np.hypot(0.5, HIGH), 2)
        errors.append(abs(float(factors @ factors) - 0.25 - LOW**2))
    assert abs(slope(errors, steps) - order) < 0.2
