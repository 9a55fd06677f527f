"""Inverse problems: the posterior of Gaussian data in closed form, a mixture, and everything a denoiser is put through."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import deis
from benchmarks import digits_posterior
from deis import operators
from deis.operators import LinearOperator

from .oracle import FEW_STEPS

Array = NDArray[np.float64]
RNG = np.random.default_rng(0)
SHAPE = (1, 4, 6)
SIZE = 24
C = 0.7  # the deviation of the data
KNOWN = RNG.random((3, *SHAPE)) > 0.5  # a mask for each sample
MATRIX = RNG.standard_normal((5, SIZE))
MATRIX[4] = MATRIX[3]  # A A^T is singular


def product(x: Any) -> Any:
    a = torch.tensor(MATRIX, dtype=x.dtype) if isinstance(x, torch.Tensor) else jnp.asarray(MATRIX, x.dtype)
    return (x.reshape(len(x), 1, -1) * a).sum(-1)


OPERATORS: dict[str, LinearOperator] = {
    "mask": operators.mask(KNOWN[0]),
    "mask for each": operators.mask(KNOWN),
    "downsample": operators.downsample(2),
    "blur": operators.blur(np.outer([1, 2, 1], [1, 3, 2]) / 24),
    "singular blur": operators.blur(np.ones((2, 2)) / 4),
    "linear": operators.linear(product, SHAPE),
}
SCHEDULES = {
    "vp": deis.VPSDE.linear(),
    "discrete": deis.VPSDE.discrete(np.linspace(0.999, 0.005, 100)),
    "edm": deis.EDM(),
    "flow": deis.FlowMatching(),
}
KINDS = ["eps", "x0", "v", "score", "flow"]
BACKENDS: dict[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": torch.as_tensor,
    "jax": lambda x: jnp.asarray(x, jnp.float32),
}
X = RNG.standard_normal((3, *SHAPE))
CALLS: list[tuple[int, ...]] = []


def gaussian(sde: deis.Schedule, predicts: str, x: Any, t: Any, deviation: float = C) -> Any:
    """Return the exact output for data of N(0, deviation^2), at times known to the host."""
    CALLS.append(tuple(x.shape))
    times = np.asarray(t, dtype=np.float64).reshape(-1, *(1,) * (x.ndim - 1))
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    square = (deviation * alpha) ** 2 + sigma**2
    parts = {"x0": alpha * deviation**2 / square, "eps": sigma / square, "score": -1 / square}
    parts |= {"v": alpha * parts["eps"] - sigma * parts["x0"], "flow": parts["eps"] - parts["x0"]}
    factor = np.broadcast_to(parts[predicts], (len(x), *(1,) * (x.ndim - 1)))
    return x * torch.tensor(factor, dtype=x.dtype) if isinstance(x, torch.Tensor) else x * np.asarray(factor, x.dtype)


def prior(sde: deis.Schedule, predicts: str = "v", deviation: float = C) -> deis.Denoiser:
    return deis.Denoiser(partial(gaussian, sde, predicts, deviation=deviation), sde, predicts)


@cache
def matrices(name: str) -> list[Array]:
    """Return the matrix of the operator for each of three samples."""
    basis = torch.eye(SIZE, dtype=torch.float64).reshape(SIZE, 1, *SHAPE)
    if name == "mask for each":
        return [np.diag(known.ravel().astype(float)) for known in KNOWN]
    return [OPERATORS[name](basis[:, 0]).reshape(SIZE, -1).numpy().T] * 3


def conditional(a: Array, mean: Array, variance: float, y: Array, noise: float) -> tuple[Array, Array]:
    """Return mean and covariance of N(mean, variance I) given y = A x_0 + noise n: the textbook's, with a pseudo-inverse."""
    gain = variance * a.T @ np.linalg.pinv(variance * a @ a.T + noise**2 * np.eye(len(a)), rcond=1e-10)
    return mean + gain @ (y - a @ mean), variance * (np.eye(len(mean)) - gain @ a)


def measurements(name: str, noise: float) -> Array:
    x_0 = torch.tensor(C * np.random.default_rng(1).standard_normal((3, *SHAPE)))
    y = OPERATORS[name](x_0).numpy()
    return y + noise * np.random.default_rng(2).standard_normal(y.shape)


def expected_mean(name: str, sde: deis.Schedule, t: float, x: Array, y: Array, noise: float) -> Array:
    """Return E[x_0 | x_t, y], by two updates of a Gaussian: by x_t, then by y."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    variance = (C * sigma) ** 2 / ((C * alpha) ** 2 + sigma**2)
    means = alpha * C**2 / ((C * alpha) ** 2 + sigma**2) * x
    variance = variance if noise else 1.0  # without noise it cancels, also where it is 0
    parts = zip(matrices(name), means, y, strict=True)
    return np.stack([conditional(a, m.ravel(), variance, v.ravel(), noise)[0].reshape(SHAPE) for a, m, v in parts])


# --- Gaussian data: exact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pigdm", "replacement"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_denoiser_of_gaussian_data_is_exact(name: str, noise: float, method: str) -> None:
    """At every noise level, pure noise (alpha = 0) included, for all five predictions and on every schedule."""
    y = measurements(name, noise)
    for sde in SCHEDULES.values():
        for predicts in KINDS:
            denoiser = deis.posterior(prior(sde, predicts), OPERATORS[name], y, noise, method, deviation=C)
            for t in (sde.t_start, float(round(0.5 * sde.t_start)), 0.3 * sde.t_start, sde.t_end):
                alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
                if (alpha == 0 and predicts in ("eps", "score")) or (sigma == 0 and predicts != "x0"):
                    continue
                if sde.num_times and t != round(t):
                    continue
                x = np.sqrt((C * alpha) ** 2 + sigma**2) * X
                expected = expected_mean(name, sde, t, x, y, noise)
                found = denoiser.predict(torch.tensor(x), t, "x0").numpy()
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
                if sigma > 0:
                    eps = denoiser.predict(torch.tensor(x), t, "eps").numpy()
                    np.testing.assert_allclose(eps, (x - alpha * expected) / sigma, rtol=0, atol=1e-6 / min(sigma, 1))


@pytest.mark.parametrize("method", ["pigdm", "replacement"])
@pytest.mark.parametrize(("name", "noise"), [("mask", 0.2), ("downsample", 0.1), ("blur", 0.2), ("linear", 0.3)])
def test_samples_of_gaussian_data_have_the_mean_and_the_covariance_of_the_posterior(name: str, noise: float, method: str) -> None:
    """From pure noise; samples are an affine map of the noise, so that a basis gives both exactly, but for the steps."""
    sde = SCHEDULES["flow"]
    y = measurements(name, noise)[:1]
    denoiser = deis.posterior(prior(sde, "flow"), OPERATORS[name], y, noise, method, deviation=C)
    x_T = torch.cat([torch.zeros(1, SIZE), torch.eye(SIZE)]).double().reshape(-1, *SHAPE)
    x_0 = deis.sample(deis.make_plan(sde, "dpmpp_3m", 150), denoiser, x_T).reshape(1 + SIZE, SIZE).numpy()
    mean, covariance = conditional(matrices(name)[0], np.zeros(SIZE), C**2, y.ravel(), noise)
    np.testing.assert_allclose(x_0[0], mean, rtol=0, atol=2e-3)
    columns = x_0[1:] - x_0[0]
    np.testing.assert_allclose(columns.T @ columns, covariance, rtol=0, atol=2e-3)


def test_dps_is_the_gaussian_likelihood_where_the_residual_is_as_long_as_expected() -> None:
    """And twice as much of it at twice the weight; a residual of 0 has no direction, and moves nothing."""
    sde, t, noise = SCHEDULES["vp"], 0.4, 0.2
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    square = (C * alpha) ** 2 + sigma**2
    x = torch.tensor(X)
    mean = alpha * C**2 / square * X
    for name in ("mask for each", "downsample"):
        operator, spread = OPERATORS[name], (C * sigma) ** 2 / square
        image = operator(torch.tensor(mean))
        rest = torch.tensor(RNG.standard_normal(tuple(image.shape)))
        counted = torch.ones_like(rest) if name == "downsample" else torch.tensor(KNOWN).double()
        rest, count = rest * counted, counted.sum((1, 2, 3), keepdim=True)
        total = spread * (0.25 if name == "downsample" else 1.0) + noise**2
        y = image + rest * (count * total / (rest**2).sum((1, 2, 3), keepdim=True)) ** 0.5
        one, two, pigdm = (
            deis.posterior(prior(sde), operator, y, noise, method, weight=weight, deviation=C).predict(x, t)
            for method, weight in (("dps", 1.0), ("dps", 2.0), ("pigdm", None))
        )
        torch.testing.assert_close(one, pigdm, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(two - torch.tensor(mean), 2 * (pigdm - torch.tensor(mean)), rtol=1e-9, atol=1e-9)
        still = deis.posterior(prior(sde), operator, 0 * image, noise, "dps", deviation=C).predict(0 * x, t)
        assert torch.equal(still, 0 * x)


def test_dps_goes_down_the_gradient_of_the_norm() -> None:
    """By finite differences through a network that is not linear; and PiGDM down that of its quadratic form."""
    sde, t, noise = SCHEDULES["vp"], 0.4, 0.2
    network = deis.Denoiser(lambda x, t: torch.tanh(2 * x) + 0.1 * x**2, sde, "x0")
    x, level = torch.tensor(X[:1]), network.level(t)
    variance = level.sigma**2 / (level.alpha**2 + level.sigma**2)
    z, h = torch.tensor(RNG.standard_normal((1, *SHAPE))), 1e-5
    slope = (network.predict(x + h * z, t) - network.predict(x - h * z, t)) / (2 * h)
    for name in ("mask", "downsample", "blur"):
        operator, y = OPERATORS[name], torch.tensor(measurements(name, noise)[:1])
        residual = y - operator(network.predict(x, t))
        residual = residual if operator.measured is None else residual * operator.measured(residual)
        count = residual.numel() if operator.measured is None else float(operator.measured(residual).sum())
        e = residual / residual.norm()
        zeta = (count / (variance * operator.adjoint(e).square().sum() + noise**2)).sqrt()
        pulls = {
            "dps": 0.5 * zeta * operator.adjoint(e),
            "pigdm": operator.pseudo_inverse(residual, noise**2 / variance) / variance,
        }
        for method, pull in pulls.items():
            moved = deis.posterior(network, operator, y, noise, method).predict(x, t) - network.predict(x, t)
            assert float((moved * z).sum()) == pytest.approx(level.sigma**2 / level.alpha * float((slope * pull).sum()), rel=1e-6)


# --- a mixture: not exact --------------------------------------------------------------------------------------------------

MEANS = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.2, 0.0]])
STD = 0.25


def mixture(sde: deis.Schedule, x: Any, t: Any) -> Any:
    """Return the exact v of three equal Gaussians of deviation STD."""
    alpha, sigma = float(sde.alpha(float(t[0]))), float(sde.sigma(float(t[0])))
    square, means = (alpha * STD) ** 2 + sigma**2, torch.tensor(MEANS)
    share = torch.softmax(-((x[:, None] - alpha * means) ** 2).sum(-1) / (2 * square), dim=1)
    eps = sigma / square * (x - alpha * share @ means)
    return eps / alpha - sigma / alpha * x  # v = alpha eps - sigma x_0 with x_0 = (x - sigma eps) / alpha


@pytest.mark.parametrize(("method", "shares", "means"), [("pigdm", 0.07, 0.2), ("dps", 0.14, 0.35), ("replacement", 0.25, 0.6)])
def test_of_a_mixture_each_mode_has_nearly_its_share(method: str, shares: float, means: float) -> None:
    """The bounds are what was found, rounded up: none of the methods is exact for data of more than one mode."""
    sde, noise, y = SCHEDULES["vp"], 0.3, -0.2
    operator = operators.mask([1, 0])
    model = deis.posterior(deis.Denoiser(partial(mixture, sde), sde, "v"), operator, np.array([[y, 0.0]]), noise, method)
    x_T = torch.tensor(np.random.default_rng(3).standard_normal((4000, 2)))
    x_0 = deis.sample(deis.make_plan(sde, "dpmpp_2m", 100), model, x_T).numpy()
    weights = np.exp(-((y - MEANS[:, 0]) ** 2) / (2 * (STD**2 + noise**2)))
    weights /= weights.sum()
    nearest = ((x_0[:, None] - MEANS) ** 2).sum(-1).argmin(1)
    found = np.bincount(nearest, minlength=3) / len(x_0)
    expected = MEANS.copy()
    expected[:, 0] += STD**2 / (STD**2 + noise**2) * (y - MEANS[:, 0])
    mean = weights @ expected
    assert abs(found - weights).max() < shares
    assert abs(x_0.mean(0) - mean).max() < means


@pytest.mark.parametrize(("method", "share"), [("pigdm", 0.5), ("dps", 0.6), ("replacement", 0.6)])
def test_of_digits_most_of_what_the_measurements_say_is_found(method: str, share: float) -> None:
    """A mixture of 30 Gaussians, whose posterior is known; the median over digits, as docs/inverse-problems.md has it."""
    denoiser, mixture, digits = digits_posterior.problem()
    rows = [digits_posterior.measure(denoiser, mixture, x_0, i, method) for i, x_0 in enumerate(digits[:4])]
    found, unmeasured, spread, exact = np.median(rows, axis=0)
    assert found < share * unmeasured
    assert exact < spread < 2.2 * exact


def test_the_exact_posterior_of_a_mixture_is_that_of_its_own_samples() -> None:
    """Of one component the Gaussian formula; of two far apart, that of the nearer one."""
    covariance = np.array([[1.0, 0.6], [0.6, 0.5]])
    a, y = np.array([[1.0, 0.0]]), np.array([0.8])
    one = digits_posterior.Mixture(np.ones(1), np.zeros((1, 2)), covariance[None])
    gain = covariance[:, 0] / (covariance[0, 0] + 0.3**2)
    mean, deviation = one.posterior(a, y, 0.3)
    np.testing.assert_allclose(mean, gain * 0.8, rtol=1e-12)
    assert deviation**2 * 2 == pytest.approx(np.trace(covariance) - gain @ covariance[0])
    two = digits_posterior.Mixture(np.full(2, 0.5), np.array([[0.0, 0.0], [1e3, 0.0]]), np.stack([covariance] * 2))
    np.testing.assert_allclose(two.posterior(a, y, 0.3)[0], mean, rtol=1e-12)


# --- what a denoiser is put through ----------------------------------------------------------------------------------------

METHODS = ["pigdm", "dps", "replacement"]


def curved(x: Any, t: Any) -> Any:
    """Return the output of a network in any framework, not linear in x."""
    CALLS.append(tuple(x.shape))
    xp = torch if isinstance(x, torch.Tensor) else jnp if isinstance(x, jax.Array) else np
    return xp.tanh(x) * 0.8 - 0.1 * x * t.reshape(-1, *(1,) * (x.ndim - 1))


def run(model: Any, sde: deis.Schedule, x_T: Any, method: str = "tab2", nfe: int = 6, **options: Any) -> Any:
    return deis.sample(deis.make_plan(sde, method, nfe=nfe), model, x_T, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPERATORS)
def test_frameworks_agree_and_jax_runs_under_jit(name: str, method: str) -> None:
    sde = SCHEDULES["vp"]
    y = measurements(name, 0.1)
    model = deis.posterior(deis.Denoiser(curved, sde, "v"), OPERATORS[name], y, 0.1, method)
    expected = run(model, sde, torch.tensor(X)).numpy()
    with jax.enable_x64(True):
        inside = jax.jit(lambda x, y: run(deis.posterior(deis.Denoiser(curved, sde, "v"), OPERATORS[name], y, 0.1, method), sde, x))
        np.testing.assert_allclose(inside(jnp.asarray(X), jnp.asarray(y)), expected, rtol=0, atol=1e-9)
    if name == "blur":
        single = run(model, sde, jnp.asarray(X, jnp.float32))
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, expected, rtol=0, atol=2e-3)
    if method == "replacement" and name != "linear":
        np.testing.assert_allclose(run(model, sde, X), expected, rtol=0, atol=1e-9)


def test_pure_noise_is_the_same_in_jax_where_the_level_is_traced() -> None:
    """One step from alpha = 0 is x_0 there, E[x_0 | y] of Gaussian data, whose x_0-hat does not change with x."""
    sde, y = SCHEDULES["flow"], measurements("mask for each", 0.1)
    expected = expected_mean("mask for each", sde, 1.0, X, y, 0.1)
    model = deis.posterior(deis.Denoiser(lambda x, t: x / t[0], sde, "flow"), OPERATORS["mask for each"], y, 0.1, deviation=C)
    plan = deis.make_plan(sde, "ddim", 1)
    with jax.enable_x64(True):
        for x_T in (torch.tensor(X), jnp.asarray(X)):
            np.testing.assert_allclose(np.asarray(deis.sample(plan, model, x_T)), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("method", METHODS)
def test_calls_side_by_side_are_the_same(method: str, backend: str) -> None:
    """With a mask for each sample and, in JAX, levels that are traced; from pure noise as well."""
    with jax.enable_x64(True):
        x_T = torch.tensor(X) if backend == "torch" else jnp.asarray(X)
        for key, predicts, name in (("vp", "v", "linear"), ("flow", "flow", "mask for each"))[backend == "jax" :]:
            sde = SCHEDULES[key]
            model = deis.posterior(deis.Denoiser(curved, sde, predicts), OPERATORS[name], measurements(name, 0.1), 0.1, method)
            alone, beside = (run(model, sde, x_T, "parallel2", 5, parallel=parallel) for parallel in (False, True))
            np.testing.assert_allclose(np.asarray(beside), np.asarray(alone), rtol=0, atol=1e-9)
            assert np.isfinite(np.asarray(alone)).all()


@FEW_STEPS
@pytest.mark.parametrize("key", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_one_posterior_runs_under_every_kind_of_plan_in_one_call_an_evaluation(method: str, key: str) -> None:
    """It carries no state from one plan to the next, and all its noise levels are finite."""
    sde, shared = SCHEDULES[key], torch.tensor(float(SCHEDULES[key].sigma(SCHEDULES[key].t_start)) * X)
    predicts = "x0" if key == "edm" else "flow" if key == "flow" else "v"
    model = deis.posterior(prior(sde, predicts), OPERATORS["blur"], measurements("blur", 0.1), 0.1, method)
    names = ("auto", "dpmpp_2m", "unipc2", "ancestral") + (() if key == "flow" else ("res_2s",))  # whose stages need alpha > 0
    for plan in (deis.make_plan(sde, name, nfe=6) for name in names):
        CALLS.clear()
        first = deis.sample(plan, model, shared, rng=torch.Generator().manual_seed(0))
        assert len(CALLS) == plan.nfe
        assert torch.isfinite(first).all()
        assert torch.equal(first, deis.sample(plan, model, shared, rng=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("method", METHODS)
def test_the_five_predictions_of_one_network_give_the_same_samples(method: str) -> None:
    sde, x_T = SCHEDULES["vp"], torch.tensor(X)
    samples = [
        run(deis.posterior(prior(sde, predicts), OPERATORS["mask"], measurements("mask", 0.1), 0.1, method), sde, x_T)
        for predicts in KINDS
    ]
    for sample in samples[1:]:
        torch.testing.assert_close(sample, samples[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_networks_in_half_precision_with_measurements_in_another(method: str, dtype: torch.dtype) -> None:
    sde, seen = SCHEDULES["vp"], []

    def network(x: Any, t: Any) -> Any:
        seen.append(x.dtype)
        return (torch.tanh(x) * 0.8).to(x.dtype)

    for name, operator in OPERATORS.items():
        y = measurements(name, 0.1)
        model = deis.posterior(deis.Denoiser(network, sde, "v"), operator, torch.tensor(y), 0.1, method)
        expected = run(model, sde, torch.tensor(X).to(dtype).double())
        seen.clear()
        for given in (torch.tensor(y), torch.tensor(y).to(dtype), y):
            model = deis.posterior(deis.Denoiser(network, sde, "v"), operator, given, 0.1, method)
            found = run(model, sde, torch.tensor(X).to(dtype))
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.3 if dtype == torch.bfloat16 else 0.05)
        assert set(seen) == {dtype}


def test_a_threshold_is_applied_to_the_data_that_have_moved() -> None:
    sde, y, x = SCHEDULES["vp"], 3 * np.ones((1, *SHAPE)), torch.tensor(X)
    plain = deis.Denoiser(curved, sde, "v")
    clipped = deis.Denoiser(curved, sde, "v", deis.static_threshold(0.6))
    for method in METHODS:
        free, bound = (deis.posterior(model, OPERATORS["mask"], y, 0.0, method) for model in (plain, clipped))
        torch.testing.assert_close(bound.predict(x, 0.3), free.predict(x, 0.3).clip(-0.6, 0.6))
        assert free.predict(x, 0.3).abs().max() > 1


@pytest.mark.parametrize("method", METHODS)
def test_it_wraps_guidance_by_a_model_and_by_a_classifier(method: str) -> None:
    """The classifier's own derivative counts, in torch as in JAX."""
    sde, y = SCHEDULES["vp"], measurements("mask", 0.1)
    strong, weak = deis.Denoiser(curved, sde, "v"), deis.Denoiser(lambda x, t: 0.5 * curved(x, t), sde, "v")
    mixed: Any = deis.guided(strong, weak, 2.0, interval=(0.2, 0.7))
    for inner in (mixed, deis.classifier_guided(mixed, lambda x, t: -(x**2).sum((1, 2, 3)) * t, 0.1)):
        model = deis.posterior(inner, OPERATORS["mask"], y, 0.1, method)
        expected = run(model, sde, torch.tensor(X))
        torch.testing.assert_close(
            run(model, sde, torch.tensor(X), "parallel2", parallel=True), run(model, sde, torch.tensor(X), "parallel2")
        )
        with torch.inference_mode():
            torch.testing.assert_close(run(model, sde, torch.tensor(X)), expected)
    with jax.enable_x64(True):
        np.testing.assert_allclose(run(model, sde, jnp.asarray(X)), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_go_through_it_and_inference_mode_does_not_matter(method: str) -> None:
    sde, y = SCHEDULES["vp"], torch.tensor(measurements("mask", 0.1))
    model = deis.posterior(deis.Denoiser(curved, sde, "v"), OPERATORS["mask"], y, 0.1, method)
    x_T = torch.tensor(X, requires_grad=True)
    x_0 = run(model, sde, x_T, grad=True)
    (slope,) = torch.autograd.grad(x_0.square().sum(), x_T)
    with jax.enable_x64(True):
        inner = deis.posterior(deis.Denoiser(curved, sde, "v"), OPERATORS["mask"], y.numpy(), 0.1, method)
        expected = jax.grad(lambda x: (run(inner, sde, x) ** 2).sum())(jnp.asarray(X))
    np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-8)
    assert not run(model, sde, x_T).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(run(model, sde, torch.tensor(X)), x_0.detach())


def test_a_call_by_time_alone_is_that_at_its_level() -> None:
    sde = SCHEDULES["vp"]
    model = deis.posterior(deis.Denoiser(curved, sde, "v"), OPERATORS["mask"], measurements("mask", 0.1), 0.1)
    x, t = torch.tensor(X), torch.full((3,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(model(x, t), model.at(x, t, model.level(0.5)))


def test_pretrained_networks_and_measurements_of_one_sample_for_all() -> None:
    network = deis.Pretrained(lambda x, t, labels: curved(x, t), SCHEDULES["vp"], "v", SHAPE, None, None, 1.0)
    one = measurements("mask", 0.1)[:1]
    x_T = torch.tensor(X)
    found = [run(deis.posterior(network, OPERATORS["mask"], y, 0.1), network.sde, x_T) for y in (one, np.repeat(one, 3, 0))]  # type: ignore[arg-type]
    assert torch.equal(*found)


# --- bad input -------------------------------------------------------------------------------------------------------------

BASE = deis.Denoiser(curved, SCHEDULES["vp"], "v")
MASK = OPERATORS["mask"]
Y = np.zeros((3, *SHAPE))


def sampled(operator: LinearOperator, y: Any, x_T: Any = X, method: str = "replacement", base: deis.Denoiser = BASE) -> Any:
    return run(deis.posterior(base, operator, y, 0.1, method), base.sde, x_T)


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: deis.posterior(BASE, MASK, Y, -0.1), ValueError, "noise=-0.1 must be a finite number, at least 0"),
    (lambda: deis.posterior(BASE, MASK, Y, float("nan")), ValueError, "noise=nan"),
    (lambda: deis.posterior(BASE, MASK, Y, 1e300), ValueError, r"noise=1e\+300 and deviation=1.0 must have squares"),
    (lambda: deis.posterior(BASE, MASK, Y, 0.1, "ddrm"), ValueError, "method='ddrm' is unknown; the known ones are 'pigdm', 'dps'"),
    (lambda: deis.posterior(BASE, MASK, Y, 0.1, weight=2.0), ValueError, "weight=2.0 is for method='dps', and method='pigdm'"),
    (lambda: deis.posterior(BASE, MASK, Y, 0.1, "dps", weight=-1.0), ValueError, "weight=-1.0"),
    (lambda: deis.posterior(BASE, MASK, Y, 0.1, deviation=0), ValueError, "deviation=0 must be a finite number, greater than 0"),
    (lambda: deis.posterior(BASE, MASK, Y + np.nan, 0.1), ValueError, "y has NaN or infinity; give finite measurements"),
    (lambda: deis.posterior(BASE, MASK, Y.astype(int), 0.1), TypeError, "y has dtype int64; give an array of a floating dtype"),
    (lambda: deis.posterior(BASE, MASK, "y", 0.1), TypeError, "y must be a torch.Tensor"),
    (lambda: deis.posterior(BASE, lambda x: x, Y, 0.1), TypeError, "operator must be a deis.operators.LinearOperator"),  # type: ignore[arg-type]
    (lambda: deis.posterior(curved, MASK, Y, 0.1), TypeError, "denoiser must be a deis.Denoiser"),  # type: ignore[arg-type]
    (lambda: sampled(MASK, Y[:2]), ValueError, r"y has shape \(2, 1, 4, 6\) and A x has shape \(3, 1, 4, 6\)"),
    (lambda: sampled(operators.downsample(2), Y), ValueError, r"y has shape \(3, 1, 4, 6\) and A x has shape \(3, 1, 2, 3\)"),
    (lambda: sampled(operators.downsample(5), Y), ValueError, "factor=5 must divide"),
    (lambda: sampled(operators.mask(np.ones((1, 4, 5))), Y), ValueError, r"known has shape \(1, 4, 5\)"),
    (lambda: sampled(operators.linear(product, (9,)), Y, torch.tensor(X)), ValueError, r"the operator takes \(batch, 9\)"),
    (lambda: sampled(MASK, torch.zeros(3, *SHAPE)), TypeError, "y is a Tensor and x a ndarray; make y one, or a numpy.ndarray"),
    (lambda: sampled(MASK, Y, method="pigdm"), TypeError, "method='pigdm' differentiates the network, which torch and JAX can"),
    (lambda: sampled(MASK, Y, method="dps"), TypeError, "give an array of one of these, or method='replacement'"),
    (lambda: sampled(MASK, Y, torch.tensor(X), "pigdm", deis.Denoiser(lambda x, t: x.detach(), SCHEDULES["vp"])), ValueError,
     "no derivative in x"),
    (lambda: sampled(MASK, Y, torch.tensor(X), "pigdm", deis.Denoiser(lambda x, t: x[0], SCHEDULES["vp"])), ValueError,
     r"the denoiser's model\(x, t\) returned shape"),
    (lambda: sampled(MASK, Y, torch.tensor(X), "pigdm", deis.Denoiser(curved, SCHEDULES["flow"])), ValueError,
     "predicts='eps' does not determine x_0 at t=1.0"),
    (lambda: deis.posterior(deis.Denoiser(curved, SCHEDULES["flow"]), MASK, Y, 0.1).predict(torch.tensor(X), 1.0), ValueError,
     "predicts='eps' does not determine x_0 at t=1.0, where alpha=0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), REFUSED)
def test_bad_input_is_refused_by_name(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("method", METHODS)
def test_of_samples_with_a_plan_each_every_one_has_its_own_measurements(method: str) -> None:
    """The samples leave the batch one by one; a mask and a y for each stay with theirs."""
    sde = SCHEDULES["vp"]
    y = measurements("mask for each", 0.1)
    model = deis.posterior(deis.Denoiser(curved, sde, "v"), OPERATORS["mask for each"], y, 0.1, method)
    plans = [deis.make_plan(sde, "tab2", nfe=n) for n in (6, 3, 5)]
    x_T = torch.tensor(X)
    found = deis.sample(plans, model, x_T)
    for i, plan in enumerate(plans):
        torch.testing.assert_close(found[i], deis.sample(plan, model, x_T)[i], rtol=0, atol=1e-12)


def test_a_posterior_tells_the_shape_of_its_samples() -> None:
    denoiser = deis.Denoiser(curved, SCHEDULES["vp"], "v", shape=SHAPE)
    assert deis.posterior(denoiser, OPERATORS["downsample"], measurements("downsample", 0.1), 0.1).shape == SHAPE
    assert deis.classifier_guided(denoiser, lambda x, t: x.sum((1, 2, 3))).shape == SHAPE
