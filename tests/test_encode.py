"""Plans that run upwards in time, from data to noise: the same methods, orders and costs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import deis
from deis.methods.registry import REGISTRY, find

from .oracle import FEW_STEPS, exact_linear, exact_weights, gaussian, two_modes
from .test_convergence import DETERMINISTIC, SMOOTH, STEPS, slope, with_exact_starts

Array = NDArray[np.float64]
SDE = deis.VPSDE.linear()
X_0 = np.linspace(-1.5, 2.0, 5)
BACKENDS: dict[str, Callable[..., Any]] = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}
STOCHASTIC = [
    entry.name for entry in REGISTRY if "<" not in entry.name and deis.make_plan(deis.VPSDE.linear(), entry.name, 30).stochastic
]
pytestmark = FEW_STEPS


def up(sde: deis.Schedule, method: Any, *args: Any, **options: Any) -> deis.Plan:
    return deis.make_plan(sde, method, *args, direction="encode", **options)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_method_has_its_order_upwards(name: str) -> None:
    order = find(name)[0].order_of(name)
    assert order is not None
    eps, solution = two_modes(SMOOTH)
    steps = [60, 84, 120] if name.endswith(("3s_published", "6dopri")) else STEPS
    errors = []
    for num_step in steps:
        plan = up(SMOOTH, name, num_step, "rho" if name.startswith("rhork") else "t", 1)
        exact = solution(plan.ts, X_0)
        multistep = plan.accepts.all()
        x_T = with_exact_starts(plan, eps, exact) if multistep else deis.encode(plan, eps, X_0[:, None])[:, 0]
        errors.append(np.abs(x_T - exact[-1]).max())
    assert abs(slope(errors, steps) - order) < 0.2


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_upwards_a_plan_costs_what_it_costs_downwards(name: str) -> None:
    down, rising = deis.make_plan(SDE, name, 6), up(SDE, name, 6)
    assert (rising.nfe, rising.direction, down.direction) == (down.nfe, "encode", "decode")
    assert (rising.ts == down.ts[::-1]).all()
    calls = []

    def model(x: Array, t: Array) -> Array:
        calls.append(t[0])
        return 0 * x

    deis.encode(rising, model, np.zeros((2, 3)), predicts="x0" if rising.form == "data" else "eps")
    assert len(calls) == rising.nfe


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("clock", ["t", "rho"])
def test_weights_upwards_are_those_of_mpmath(clock: str, degree: int) -> None:
    plan = up(SDE, deis.adams("eps", clock, degree), 6)
    exact = exact_linear(0.1, 20.0)
    for i in range(degree, 6):
        nodes = plan.t[i - np.arange(degree + 1)].tolist()
        # the integral from the greater rho down to the lesser, at alpha of the lesser time: turn it around
        weights = exact_weights(exact, nodes, plan.t[i + 1].item(), plan.t[i].item(), clock)
        ratio = exact.alpha(plan.t[i + 1].item()) / exact.alpha(plan.t[i].item())
        expected = np.array([float(-weight * ratio) for weight in weights])
        np.testing.assert_allclose(plan.keep_p[i, : degree + 1], expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@settings(max_examples=25, deadline=None)
@given(
    ends=st.tuples(st.floats(0.0, 0.3), st.floats(0.5, 1.0)),
    steps=st.integers(1, 8),
    clock=st.sampled_from(["t", "vp_t", "arctan_rho", "sqrt_t"]),
    degree=st.integers(0, 3),
    corrector=st.sampled_from([None, 1, 2]),
)
def test_transport_is_exact_upwards_on_any_part_of_flow_matching(
    ends: tuple[float, float], steps: int, clock: str, degree: int, corrector: int | None
) -> None:
    """From sigma = 0 and to alpha = 0 as well: checked when a plan is made, and by the machine on constant predictions."""
    sde = deis.FlowMatching(*ends)
    plan = up(sde, deis.adams(None, clock, degree, corrector), steps, "t", 1)
    x_0, eps = 0.3, -1.7
    start = np.array([[sde.alpha(ends[0]) * x_0 + sde.sigma(ends[0]) * eps]])
    x_T = deis.encode(plan, lambda x, t: np.full_like(x, eps if plan.form == "eps" else x_0), start, predicts=plan.form)
    np.testing.assert_allclose(x_T, sde.alpha(ends[1]) * x_0 + sde.sigma(ends[1]) * eps, rtol=0, atol=1e-9)


def test_flow_matching_from_clean_data_to_pure_noise_and_back() -> None:
    """Both ends are legal, with the method by default as well; N(mean, std^2) has a known solution."""
    sde, mean, std = deis.FlowMatching(), 0.7, 0.5

    def velocity(x: Array, t: Array) -> Array:
        t = t[:, None]
        variance = ((1 - t) * std) ** 2 + t**2
        x_0 = mean + (1 - t) * std**2 * (x - (1 - t) * mean) / variance
        eps = t * (x - (1 - t) * mean) / variance
        return eps - x_0

    x_0 = X_0[:, None]
    for method in ("auto", "tab3", "bdia"):
        errors = [
            np.abs(
                deis.encode(up(sde, method, n, ts_phase="t", ts_order=1), velocity, x_0, predicts="flow") - (x_0 - mean) / std
            ).max()
            for n in (20, 80)
        ]
        assert errors[1] < errors[0] / 3
        assert errors[1] < 0.02
    there = deis.encode(up(sde, "auto", 40), velocity, x_0, predicts="flow")
    assert np.abs(deis.sample(deis.make_plan(sde, "auto", 40), velocity, there, predicts="flow") - x_0).max() < 1e-2


@pytest.mark.parametrize("method", ["tab3", "auto", "rhork_3kutta", "dpm_solver_2", "unipc2", "bdia"])
@pytest.mark.parametrize("sde", [SDE, deis.VPSDE.discrete(np.linspace(0.99, 0.01, 50))], ids=["continuous", "discrete"])
def test_backends_agree_upwards(method: str, sde: deis.Schedule) -> None:
    def model(x: Any, t: Any) -> Any:
        return x / (1 + x * x) * (1 + t[:, None])

    x_0 = np.random.default_rng(0).standard_normal((4, 6))
    plan = up(sde, method, 7)
    expected = deis.encode(plan, model, x_0)
    scale = np.abs(expected).max()
    assert np.abs(deis.encode(plan, model, torch.tensor(x_0)).numpy() - expected).max() < 1e-12 * scale
    with jax.enable_x64(True):
        found = jax.jit(lambda x: deis.encode(plan, model, x))(jnp.asarray(x_0))
        assert np.abs(np.asarray(found) - expected).max() < 1e-12 * scale


def test_there_and_back_converges_at_the_order_of_the_method() -> None:
    eps, _ = two_modes(SMOOTH)
    errors = []
    for n in (40, 80):
        x_T = deis.encode(up(SMOOTH, "tab1", n, "t", 1), eps, X_0[:, None])
        errors.append(np.abs(deis.sample(deis.make_plan(SMOOTH, "tab1", n, "t", 1), eps, x_T) - X_0[:, None]).max())
    assert 1.8 < np.log2(errors[0] / errors[1]) < 2.2


def test_a_gaussian_is_encoded_to_its_noise() -> None:
    eps, solution = gaussian(SDE)
    x_T = np.linspace(-2, 2, 5)
    x_0 = solution(SDE.t_end, x_T)
    errors = [np.abs(deis.encode(up(SDE, "auto", nfe=n), eps, x_0[:, None])[:, 0] - x_T).max() for n in (20, 40)]
    assert errors[0] < 0.01
    assert errors[1] < errors[0] / 4


def test_a_plan_up_is_kept_in_a_file(tmp_path: Any) -> None:
    plan = up(SDE, "deis_abm", nfe=7)
    plan.save(tmp_path / "plan.json")
    assert deis.load_plan(tmp_path / "plan.json") == plan
    times = [line.split("|")[0].strip() for line in repr(plan).splitlines()[3:]]
    assert (times[0], times[-1]) == ("0.001", "1")


def test_own_times_rise() -> None:
    plan = up(SDE, "tab1", ts=[0.01, 0.3, 1.0])
    assert plan.ts.tolist() == [0.01, 0.3, 1.0]
    assert up(SDE, "tab1", sigmas=SDE.rho(np.array([0.01, 0.3, 1.0]))).ts == pytest.approx([0.01, 0.3, 1.0])
    with pytest.raises(ValueError, match=r"ts must be finite and increase strictly, from data to noise, and is \[1\.0, 0\.3"):
        up(SDE, "tab1", ts=[1.0, 0.3, 0.01])


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_upwards_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"adds noise.*'tab3'"):
        up(SDE, name, 30)


def test_wrong_directions_are_refused() -> None:
    rising, down = up(SDE, "tab1", 4), deis.make_plan(SDE, "tab1", 4)
    x, model = np.zeros((1, 2)), lambda x, t: 0 * x
    with pytest.raises(
        ValueError, match=r"the plan 'tab1' leads from data to noise, which deis\.encode runs; .*direction='decode'"
    ):
        deis.sample(rising, model, x)
    with pytest.raises(
        ValueError, match=r"the plan 'tab1' leads from noise to data, which deis\.sample runs; .*direction='encode'"
    ):
        deis.encode(down, model, x)
    with pytest.raises(ValueError, match="direction='up' is unknown; the known ones are 'decode', 'encode'"):
        deis.make_plan(SDE, direction="up")
    for method in ("dpmpp_2m", "unipc2"):
        with pytest.raises(ValueError, match=r"form='data' has no meaning where sigma is 0, at t=0\.0.*'tab3'"):
            up(deis.EDM(0.0), method, 5)
    for method, t in (("rhork_2heun", 1.0), ("dpm_solver_2", 0.0), ("dpm_solver_2s_published", 0.0)):
        with pytest.raises(ValueError, match=f"infinite at t={t}"):
            up(deis.FlowMatching(), method, 5)
    for method in ("belm", "heunpp2"):
        with pytest.raises(ValueError, match=r"t=1\.0"):
            up(deis.FlowMatching(), method, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_of_another_shape_are_refused(backend: str) -> None:
    denoiser = deis.Denoiser(lambda x, t: 0 * x, SDE, shape=(1, None, 4))
    plan = up(SDE, "tab1", 3)
    assert deis.encode(plan, denoiser, BACKENDS[backend](np.zeros((2, 1, 9, 4)))).shape == (2, 1, 9, 4)
    for shape in ((2, 1, 4, 5), (2, 3, 4, 4), (2, 4, 4), (4, 4)):
        with pytest.raises(ValueError, match=r"x_0 has samples of shape .* the model have \(1, 'any', 4\); resize"):
            deis.encode(plan, denoiser, BACKENDS[backend](np.zeros(shape)))


def test_the_bundled_network_tells_its_shape() -> None:
    network = deis.load_model()
    for model in (network, network.conditional([3]), network.conditional([3], 2.0)):
        with pytest.raises(ValueError, match=r"x_0 has samples of shape \(1, 8, 8\), and those of the model have \(1, 28, 28\)"):
            deis.encode(up(network.sde, "tab1", 9), model, torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("clock", ["rho", "log_rho", "vp_t"])
def test_no_polynomial_is_drawn_out_to_where_its_clock_is_infinite(clock: str) -> None:
    """Beside t, which is finite at alpha = 0: there the last step keeps its degree."""
    sde = deis.FlowMatching(0.01)
    assert np.count_nonzero(up(sde, deis.adams("eps", clock, 2), 8).keep_p[-1]) == 1
    assert np.count_nonzero(up(sde, deis.adams("eps", "t", 2), 8).keep_p[-1]) == 3
