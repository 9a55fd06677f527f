"""Exactly invertible methods: their recurrences, and the way there and back to rounding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import deis

from .oracle import FEW_STEPS, gaussian, two_modes

Array = NDArray[np.float64]
SDE = deis.VPSDE.linear()
X_T = np.random.default_rng(0).standard_normal((5, 3))
INVERTIBLE = [("bdia", {}), ("bdia", {"gamma": 0.9}), ("bdia", {"form": "data"}), ("belm", {}), ("belm", {"form": "data"})]
pytestmark = FEW_STEPS


def model(x: Any, t: Any) -> Any:
    return x / (1 + x * x) * (1 + t[:, None])


def make(method: str, options: dict[str, Any], n: int = 10, sde: deis.Schedule = SDE, direction: str = "decode") -> deis.Plan:
    return deis.make_plan(sde, method, n, direction=direction, **options)


@pytest.mark.parametrize(("method", "options"), INVERTIBLE)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_there_and_back_is_exact_at_one_call_a_step(method: str, options: dict[str, Any], direction: str) -> None:
    plan, calls = make(method, options, direction=direction), []

    def counted(x: Array, t: Array) -> Array:
        calls.append(t[0])
        return model(x, t)

    states = (deis.sample if direction == "decode" else deis.encode)(plan, counted, X_T, trajectory=True)
    assert (plan.nfe, len(calls)) == (10, 10)
    back = deis.invert(plan, counted, states[-2:])
    assert len(calls) == 19
    tolerance = 1e-10 * max(np.abs(states).max(), 1)  # this rough model drives states to 250
    assert np.abs(back - X_T).max() < tolerance
    np.testing.assert_allclose(deis.invert(plan, model, states[-2:], trajectory=True)[-3:], states[2::-1], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "options"), INVERTIBLE)
def test_the_table_is_the_published_recurrence(method: str, options: dict[str, Any]) -> None:
    """Run state by state, from the papers' formulas."""
    plan = make(method, options, 6)
    ts, form = plan.ts, plan.form
    alpha, sigma = SDE.alpha(ts), SDE.sigma(ts)
    scale, s = (alpha, sigma / alpha) if form == "eps" else (sigma, alpha / sigma)
    gamma = options.get("gamma", 1.0)

    def p(i: int, x: Array) -> Array:
        eps = model(x, np.full(len(x), ts[i]))
        return eps if form == "eps" else (x - sigma[i] * eps) / alpha[i]

    def ddim(i: int, j: int, x: Array) -> Array:
        return scale[j] * (x / scale[i] + (s[j] - s[i]) * p(i, x))

    states = [X_T, ddim(0, 1, X_T)]
    for i in range(1, 6):
        x, before = states[i], states[i - 1]
        if method == "bdia":
            states.append(gamma * before + ddim(i, i + 1, x) - gamma * ddim(i, i - 1, x))
        else:
            h, h_before = s[i + 1] - s[i], s[i] - s[i - 1]
            r = h / h_before
            y = r**2 * before / scale[i - 1] + (1 - r**2) * x / scale[i] + h * (1 + r) * p(i, x)
            states.append(scale[i + 1] * y)
    np.testing.assert_allclose(deis.sample(plan, model, X_T, trajectory=True), np.stack(states), rtol=1e-11, atol=1e-11)


def test_bdia_of_gamma_0_is_ddim() -> None:
    expected = deis.sample(deis.make_plan(SDE, "ddim", 8), model, X_T)
    np.testing.assert_allclose(deis.sample(make("bdia", {"gamma": 0.0}, 8), model, X_T), expected, rtol=1e-12)


@pytest.mark.parametrize("method", ["bdia", "belm"])
def test_backends_agree_on_the_way_back(method: str) -> None:
    plan = make(method, {}, 6)
    states = deis.sample(plan, model, X_T, trajectory=True)[-2:]
    expected, tolerance = deis.invert(plan, model, states), 1e-10 * np.abs(states).max()
    assert np.abs(deis.invert(plan, model, torch.tensor(states)).numpy() - expected).max() < tolerance
    with jax.enable_x64(True):
        found = jax.jit(lambda states: deis.invert(plan, model, states))(jnp.asarray(states))
        assert np.abs(np.asarray(found) - expected).max() < tolerance


@pytest.mark.parametrize("method", ["bdia", "belm"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_bundled_network_gives_back_the_very_noise(method: str, guidance: float) -> None:
    """Ten evaluations, float64, 1e-10 relative, with guidance as well."""
    network = deis.load_model(dtype="float64")
    denoiser = network.conditional([3, 8], guidance)
    x_T = torch.randn(2, *network.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = deis.make_plan(network.sde, method, nfe=10)
    states = deis.sample(plan, denoiser, x_T, trajectory=True)[-2:]
    assert (deis.invert(plan, denoiser, states) - x_T).abs().max() < 1e-10 * x_T.abs().max()


def test_a_picture_survives_the_way_up_and_back() -> None:
    """An encoding by ten evaluations, and back by nine: an edit that changes nothing."""
    network = deis.load_model(dtype="float64")
    x_0 = torch.rand(1, *network.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    plan = deis.make_plan(network.sde, "bdia", nfe=10, direction="encode")
    states = deis.encode(plan, network, x_0, trajectory=True)[-2:]
    assert (deis.invert(plan, network, states) - x_0).abs().max() < 1e-10


DISCRETE = deis.VPSDE.discrete(np.linspace(0.99, 0.01, 99))


@pytest.mark.parametrize("sde", [deis.FlowMatching(), deis.EDM(), deis.VPSDE.cosine(), DISCRETE], ids=lambda s: s.name)
def test_other_schedules_are_inverted_as_well(sde: deis.Schedule) -> None:
    plan = make("bdia", {}, 8, sde)
    predicts = "eps" if plan.form == "eps" else "x0"

    def bounded(x: Array, t: Array) -> Array:
        return x / (1 + x * x)

    x_T = float(sde.sigma(sde.t_start)) * X_T
    states = deis.sample(plan, bounded, x_T, predicts=predicts, trajectory=True)[-2:]
    back = deis.invert(plan, bounded, states, predicts=predicts)
    assert np.abs(back - x_T).max() < 1e-10 * np.abs(x_T).max()


def test_belm_needs_an_end_with_noise_and_bdia_does_not() -> None:
    with pytest.raises(ValueError, match=r"'belm' of the data form cannot end at t=0\.0, where sigma is 0; .*'bdia'"):
        make("belm", {}, 8, deis.FlowMatching())
    make("belm", {}, 8, deis.FlowMatching(1e-3))


@pytest.mark.parametrize("method", ["bdia", "belm"])
def test_the_way_back_of_a_gaussian_is_a_plan_like_any_other(method: str) -> None:
    """It is checked, saved and read, says what it is, and finds the noise of the exact last two states to its own order."""
    eps, solution = gaussian(deis.VPSDE.linear(sampling_eps=0.1, sampling_T=0.6))
    errors = []
    for n in (20, 40):
        plan = make(method, {}, n, deis.VPSDE.linear(sampling_eps=0.1, sampling_T=0.6))
        reverse = plan.reverse()
        assert (reverse.nfe, reverse.num_step, reverse.pair, reverse.direction) == (n - 1, n, True, "encode")
        assert reverse == deis.Plan.from_document(reverse.document())
        x_T = np.linspace(-2, 2, 5)
        states = np.stack([solution(t, x_T) for t in plan.ts[-2:]])[..., None]
        errors.append(np.abs(deis.invert(plan, eps, states)[:, 0] - x_T).max())
    assert errors[1] < errors[0] / 1.8


def test_what_cannot_be_inverted_is_refused() -> None:
    plan = make("bdia", {}, 4)
    states = deis.sample(plan, model, X_T, trajectory=True)
    for wrong in (states[-1], states[-3:], states[-1:]):
        with pytest.raises(ValueError, match=r"states must be the last two, of shape \(2, batch, ...\), and has shape .*one state"):
            deis.invert(plan, model, wrong)
    for other in (deis.make_plan(SDE, "tab3", 4), make("bdia", {"gamma": 0.0}, 4), make("bdia", {}, 1), plan.reverse()):
        with pytest.raises(ValueError, match="cannot be reversed exactly; use 'bdia' or 'belm'"):
            deis.invert(other, model, states[-2:])
    for run in (deis.sample, deis.encode):
        with pytest.raises(ValueError, match=r"begins with two states; give the one that it was made of to deis\.invert"):
            run(plan.reverse(), model, X_T)
    with pytest.raises(ValueError, match=r"gamma=1\.5 must be"):
        make("bdia", {"gamma": 1.5})


def test_their_accuracy_is_of_second_order() -> None:
    """From a first step of DDIM: between 10 and 40 steps of a nonlinear problem the error falls by more than 8."""
    sde = deis.VPSDE.linear(sampling_eps=0.05, sampling_T=0.6)
    eps, solution = two_modes(sde)
    x_T = np.linspace(-1.5, 2, 5)
    x_0 = solution(np.array([0.6, 0.05]), x_T)[-1]
    for method in ("bdia", "belm"):
        errors = [np.abs(deis.sample(make(method, {}, n, sde), eps, x_T[:, None])[:, 0] - x_0).max() for n in (10, 40)]
        assert errors[1] < errors[0] / 8


def test_a_fit_would_lose_the_inverse_and_is_refused() -> None:
    eps, _ = gaussian(SDE)
    denoiser = deis.Denoiser(eps, SDE)
    with pytest.raises(ValueError, match="plan 'belm' uses past states, and a fit would lose its inverse"):
        deis.calibrate(make("belm", {}, 4), denoiser, X_T)
    with pytest.raises(ValueError, match="plan 'tab2' leads from data to noise"):
        deis.calibrate(make("tab2", {}, 4, direction="encode"), denoiser, X_T)


@pytest.mark.parametrize("place", [(3, 0), (3, 3), (2, 1)])
def test_a_table_that_is_more_than_two_steps_is_not_reversed(place: tuple[int, int]) -> None:
    plan = make("bdia", {}, 4)
    assert plan.invertible
    keep_p = plan.keep_p.copy()
    keep_p[place] += 1e-3
    assert not dataclasses.replace(plan, keep_p=keep_p, fitted="a test").invertible
