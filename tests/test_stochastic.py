"""Stochastic plans: their law on a Gaussian, computed exactly; their deterministic twins; and one random stream a sample."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import deis
from deis.machine import run_rows
from deis.methods.registry import REGISTRY

from .oracle import FEW_STEPS, gaussian
from .test_convergence import slope

Array = NDArray[np.float64]
SDE = deis.VPSDE.linear()
MEAN, STD = 0.7, 0.5


def law(plan: deis.Plan, sde: deis.Schedule, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """Return the exact mean and variance of the plan's samples for data of N(mean, std^2), from the exact law at its start.

    The exact prediction is linear in x, so a state is a vector: its mean, its factor of the start's noise, and its factors of the
    noise of each row.
    """
    noises: list[float] = []
    constant = np.eye(1, len(plan.rows) + 2)[0]

    def predict(i: int, x: Array) -> Array:
        row = plan.rows[i]
        excess = x - row.alpha * mean * constant
        variance = (row.alpha * std) ** 2 + row.sigma**2
        return row.sigma * excess / variance if plan.form == "eps" else mean * constant + row.alpha * std**2 * excess / variance

    def combine(c_x: float, x: Array, c_p: Sequence[float], history: Sequence[Array]) -> Array:
        return c_x * x + sum(c * p for c, p in zip(c_p, history, strict=False))

    def add_noise(keep_z: float, x: Array) -> Array:
        noises.append(keep_z)
        return x + keep_z * np.eye(1, len(x), 1 + len(noises))[0]

    start = plan.alpha[0] * mean * constant
    start[1] = np.hypot(plan.alpha[0] * std, plan.sigma[0])
    x = run_rows(plan.rows, predict, combine, start, None, add_noise)
    return float(x[0]), float((x[1:] ** 2).sum())


SMOOTH = deis.VPSDE.linear(0.1, 20.0, sampling_eps=0.2, sampling_T=0.6)
WEAK_ORDERS: list[tuple[Any, int | None, str]] = [
    *((entry.name, entry.order_of(entry.name), "log") for entry in REGISTRY if entry.weak),
    (deis.get_method("ddim", eta=0.5), 1, "log"),
    (deis.get_method("sa_solver", tau=lambda t: 0.5 + t), 2, "log"),
    (deis.adams("data", "t", 2, tau=0.6), 2, "log"),
    (deis.get_method("edm_heun", churn=5.0), 2, "rho"),
]


@pytest.mark.parametrize(("method", "order", "phase"), WEAK_ORDERS, ids=[str(i) for i in range(len(WEAK_ORDERS))])
def test_weak_order_against_the_exact_marginal(method: Any, order: int, phase: str) -> None:
    """Mean and variance converge to those of the data at the end of the schedule, at the order of theory or faster."""
    sde = deis.EDM(0.05, 5.0) if phase == "rho" else SMOOTH
    exact = sde.alpha(sde.t_end) * MEAN, (sde.alpha(sde.t_end) * STD) ** 2 + sde.sigma(sde.t_end) ** 2
    steps = [640, 905, 1280] if method == "sa_solver" else [160, 226, 320]  # its error changes sign near 100 steps
    errors = np.array([np.abs(np.subtract(law(deis.make_plan(sde, method, n, phase), sde), exact)) for n in steps])
    assert slope(errors.max(axis=1).tolist(), steps) > order - 0.2
    assert errors[-1].max() < 2e-2


def test_ancestral_sampling_has_weak_order_one_and_no_more() -> None:
    errors = [abs(law(deis.make_plan(SMOOTH, "ancestral", n, "log"), SMOOTH)[1] - law(EXACT, SMOOTH)[1]) for n in (160, 226, 320)]
    assert abs(slope(errors, [160, 226, 320]) - 1) < 0.2


EXACT = deis.make_plan(SMOOTH, "tab4", 2000, "log")

TWINS: list[tuple[Any, Any]] = [
    (deis.get_method("ancestral"), None),
    (deis.get_method("ddim", eta=0.0), "ddim"),
    (deis.get_method("ddim", eta=1e-9), "ddim"),
    (deis.get_method("sde_dpmpp_2m", tau=0.0), "dpmpp_2m"),
    (deis.get_method("sde_dpmpp_2m_published", tau=0.0), "dpmpp_2m_published"),
    (deis.get_method("sa_solver", tau=0.0), "unipc2"),
    (deis.get_method("sa_solver", tau=lambda t: 0.0), "unipc2"),
    (deis.get_method("edm_heun", churn=0.0), "rhork_2heun"),
]


@pytest.mark.parametrize(("method", "twin"), TWINS[1:], ids=[str(twin) for _, twin in TWINS[1:]])
def test_without_noise_they_equal_their_deterministic_twin(method: Any, twin: str) -> None:
    first, second = deis.make_plan(SDE, method, 8), deis.make_plan(SDE, twin, 8, "t", 2)
    eps = gaussian(SDE)[0]
    x_T = np.linspace(-2, 2, 5)[:, None]
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(
        deis.sample(first, eps, x_T, rng=rng), deis.sample(second, eps, x_T), rtol=1e-7 if first.stochastic else 1e-12
    )


def test_ddim_with_eta_one_is_the_exponential_sde_step() -> None:
    """Ancestral sampling is SDE-DPM-Solver++ of degree 0, in both forms."""
    sde_1 = deis.make_plan(SDE, deis.adams("data", "log_rho", 0, tau=1.0), 9)
    data, eps = (deis.make_plan(SDE, deis.get_method("ddim", eta=1.0, form=form), 9) for form in ("data", "eps"))
    for column in ("keep_x", "keep_p", "keep_z"):
        np.testing.assert_allclose(getattr(data, column), getattr(sde_1, column), rtol=1e-10, atol=1e-14)
    alpha, sigma = data.alpha[:-1], data.sigma[:-1]
    np.testing.assert_allclose(data.keep_x + data.keep_p[:, 0] / alpha, eps.keep_x, rtol=1e-12)
    np.testing.assert_allclose(-data.keep_p[:, 0] * sigma / alpha, eps.keep_p[:, 0], rtol=1e-11)


def test_edm_churn_is_algorithm_2() -> None:
    """Karras et al., algorithm 2, written out, with the same random numbers."""
    plan = deis.make_plan(deis.EDM(sampling_eps=0.0), "edm_heun", 6, churn=2.0, low=0.05, high=30.0, noise=1.01)
    sigmas = deis.make_grid(deis.EDM(sampling_eps=0.0), 6, "rho", 7)
    x_T = 80 * np.random.default_rng(0).standard_normal((3, 2))

    def eps(x: Array, t: Array) -> Array:
        return (x - 0.3) * t[:, None] / (0.25 + t[:, None] ** 2)

    def slope(x: Array, t: float) -> Array:
        return eps(x, np.full(3, t))

    streams = np.random.default_rng(7).spawn(3)
    x = x_T
    for t, t_next in pairwise(sigmas.tolist()):
        gamma = min(2.0 / 6, 2**0.5 - 1) if 0.05 <= t <= 30 else 0.0
        t_hat = t + gamma * t
        if gamma:
            x = x + np.sqrt(t_hat**2 - t**2) * 1.01 * np.stack([stream.standard_normal(2) for stream in streams])
        d = slope(x, t_hat)
        euler = x + (t_next - t_hat) * d
        x = euler if t_next == 0 else x + (t_next - t_hat) * (d + slope(euler, t_next)) / 2
    np.testing.assert_allclose(deis.sample(plan, eps, x_T, rng=np.random.default_rng(7)), x, rtol=1e-12)
    assert plan.nfe == 11


RNGS: dict[str, tuple[Callable[..., Any], Callable[[int], Any]]] = {
    "numpy": (np.asarray, np.random.default_rng),
    "torch": (torch.tensor, lambda seed: torch.Generator().manual_seed(seed)),
    "jax": (jnp.asarray, jax.random.key),
}
NOISY = ["ancestral", "sde_dpmpp_2m", "sa_solver", deis.get_method("edm_heun", churn=3.0)]


def model(x: Any, t: Any) -> Any:
    return x / (1 + x * x)


@FEW_STEPS
@pytest.mark.parametrize("backend", RNGS)
@pytest.mark.parametrize("method", NOISY, ids=["ancestral", "sde_dpmpp_2m", "sa_solver", "edm_heun"])
def test_a_sample_depends_on_its_own_stream_alone(backend: str, method: Any) -> None:
    convert, make = RNGS[backend]
    plan = deis.make_plan(SDE, method, 5, "t")
    x_T = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)

    def run(rows: list[int]) -> Array:
        rng = [make(seed) for seed in rows]
        return np.asarray(deis.sample(plan, model, convert(x_T[rows]), rng=jnp.stack(rng) if backend == "jax" else rng))

    whole = run([0, 1, 2, 3])
    np.testing.assert_allclose(np.concatenate([run([0]), run([1, 2, 3])]), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run([3, 0, 2, 1]), whole[[3, 0, 2, 1]], rtol=1e-5, atol=1e-6)
    assert np.abs(run([0, 1, 2, 3]) - whole).max() == 0


@pytest.mark.parametrize("backend", RNGS)
def test_a_single_generator_is_split_by_sample(backend: str) -> None:
    convert, make = RNGS[backend]
    plan = deis.make_plan(SDE, "ancestral", 5)
    x_T = np.zeros((4, 3))
    x_T[:] = np.random.default_rng(0).standard_normal(3)  # four times the same noise
    whole = np.asarray(deis.sample(plan, model, convert(x_T), rng=make(1)))
    assert np.abs(np.diff(whole, axis=0)).max(axis=1).min() > 1e-3
    np.testing.assert_allclose(deis.sample(plan, model, convert(x_T[:2]), rng=make(1)), whole[:2], rtol=1e-5, atol=1e-6)
    if backend != "jax":  # a generator goes on where it stopped, a key does not
        generator = make(1)
        halves = [np.asarray(deis.sample(plan, model, convert(x_T[:2]), rng=generator)) for _ in range(2)]
        np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-5, atol=1e-6)


@FEW_STEPS
def test_jax_keys_work_under_jit_and_in_their_old_form() -> None:
    plan = deis.make_plan(SDE, "sa_solver", 5)
    x_T = jnp.ones((2, 3))
    run = jax.jit(lambda x, key: deis.sample(plan, model, x, rng=key))
    new = deis.sample(plan, model, x_T, rng=jax.random.key(0))
    np.testing.assert_allclose(run(x_T, jax.random.key(0)), new, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(deis.sample(plan, model, x_T, rng=jax.random.PRNGKey(0)), new, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", RNGS)
@pytest.mark.parametrize("method", ["ancestral", "sde_dpmpp_2m"])
def test_samples_have_the_law_computed_above(method: str, backend: str) -> None:
    """So the noise of the executors is standard normal, and fresh in every row and place."""
    convert, make = RNGS[backend]
    sde = deis.EDM(0.05, 5.0)
    plan = deis.make_plan(sde, method, 12, "log")
    mean, variance = law(plan, sde)
    x_T = MEAN + np.hypot(STD, 5.0) * np.random.default_rng(0).standard_normal((20, 1000))

    def eps(x: Any, t: Any) -> Any:
        return t[:, None] * (x - MEAN) / (STD**2 + t[:, None] ** 2)

    x_0 = np.asarray(deis.sample(plan, eps, convert(x_T), rng=make(1)))
    assert abs(x_0.mean() - mean) < 5 * (variance / x_0.size) ** 0.5
    assert abs(x_0.var() / variance - 1) < 5 * (2 / x_0.size) ** 0.5


def test_a_stochastic_plan_asks_for_its_random_numbers() -> None:
    plan = deis.make_plan(SDE, "ancestral", 4)
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match="'ddim\\(eta=1\\)' adds noise and rng is missing"):
        deis.sample(plan, model, x)
    with pytest.raises(TypeError, match="rng must be a torch"):
        deis.sample(plan, model, torch.tensor(x), rng=np.random.default_rng(0))
    with pytest.raises(TypeError, match="rng must be a key"):
        deis.sample(plan, model, jnp.asarray(x), rng=0)
    with pytest.raises(ValueError, match="there are 3 for 2 samples"):
        deis.sample(plan, model, x, rng=np.random.default_rng(0).spawn(3))
    with pytest.raises(ValueError, match="one key a sample"):
        deis.sample(plan, model, jnp.asarray(x), rng=jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "ddim", "eta": 1.5}, "eta=1.5"),
        ({"method": "sa_solver", "tau": -1.0}, "tau=.*at least 0"),
        ({"method": "edm_heun", "churn": -1.0}, "churn=-1.0"),
        ({"method": "edm_heun", "churn": 1.0, "noise": 0.0}, "noise=0.0"),
    ],
)
def test_bad_noise_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deis.make_plan(SDE, num_step=5, **options)


def test_the_eps_form_takes_no_noise() -> None:
    with pytest.raises(ValueError, match=r"tau=1\.0 needs form='data'"):
        deis.adams("eps", tau=1.0)


def test_auto_takes_noise_as_well() -> None:
    assert deis.make_plan(deis.VPSDE.linear(), "auto", nfe=20, tau=0.5).stochastic
