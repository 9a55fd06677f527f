"""Predictions, guidance and thresholding: what stands between a network and a plan."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deis

from .oracle import gaussian
from .test_coefficients import EVERY

SDE = deis.VPSDE.linear()
X = np.random.default_rng(0).standard_normal((3, 2, 4))
KINDS = ["eps", "x0", "v", "score", "flow"]
BACKENDS: dict[str, Callable[..., Any]] = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


def exact_outputs(sde: deis.Schedule, x: Any, t: float, kind: str, std: float = 0.5) -> Any:
    """What a perfect network predicts for data of N(0, std^2): E[x_0 | x] and E[eps | x] written out, finite at both ends."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    variance = (alpha * std) ** 2 + sigma**2
    x_0, eps = alpha * std**2 * x / variance, sigma * x / variance
    return {"eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0, "score": -x / variance, "flow": eps - x_0}[kind]


def at_time(sde: deis.Schedule, time: float, kind: str, x: Any, t: Any) -> Any:
    return exact_outputs(sde, x, time, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sde", [*EVERY, deis.VPSDE(lambda t: np.cos(t) ** 2, lambda a: np.arccos(np.sqrt(a)), 0.0, np.pi / 2)],
                         ids=lambda s: s.name)  # fmt: skip
@pytest.mark.parametrize("predicts", KINDS)
def test_every_prediction_is_finite_and_right_at_both_ends(backend: str, sde: deis.Schedule, predicts: str) -> None:
    """At alpha = 0 and sigma = 0 as well; where a network's output does not determine x_0 or eps, that one is 0, its mean."""
    middle = 0.5 * (sde.t_start + sde.t_end)
    for t in (sde.t_start, float(round(middle)) if sde.num_times else middle, sde.t_end):
        denoiser = deis.Denoiser(partial(at_time, sde, t, predicts), sde, predicts)
        for target in KINDS:
            if target == "score" and sde.sigma(t) == 0 and predicts != "score":
                with pytest.raises(ValueError, match="target='score' is undefined"):
                    denoiser.predict(BACKENDS[backend](X), t, target)
                continue
            p = np.asarray(denoiser.predict(BACKENDS[backend](X), t, target))
            assert np.isfinite(p).all()
            tolerance = 1e-9 if np.asarray(BACKENDS[backend](X)).dtype == np.float64 else 2e-3
            scale = max(1.0, np.abs(p).max(), float(sde.rho(t)) if np.isfinite(sde.rho(t)) else 1.0, 1 / float(sde.rho(t) or 1))
            np.testing.assert_allclose(p, exact_outputs(sde, X, t, target), rtol=0, atol=tolerance * scale)


def test_the_form_of_a_plan_is_independent_of_the_prediction() -> None:
    """A network that predicts any of the five gives the same sample, through plans of either form and a plain function."""
    x_T = np.linspace(-2, 2, 6).reshape(3, 2)
    for form in ("eps", "data"):
        plan = deis.make_plan(SDE, deis.adams(form, "t", 2), 8)
        samples = []
        for kind in KINDS:

            def model(x: Any, t: Any, kind: str = kind) -> Any:
                return exact_outputs(SDE, x, float(t[0]), kind)

            samples.append(deis.sample(plan, deis.Denoiser(model, SDE, kind), x_T))
            np.testing.assert_array_equal(samples[-1], deis.sample(plan, model, x_T, predicts=kind))
        for other in samples[1:]:
            np.testing.assert_allclose(other, samples[0], rtol=1e-9)


def test_bad_denoisers_are_refused() -> None:
    with pytest.raises(ValueError, match="predicts='noise' is unknown"):
        deis.Denoiser(lambda x, t: x, SDE, "noise")
    with pytest.raises(TypeError, match="sde must be a noise schedule"):
        deis.Denoiser(lambda x, t: x, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contradicts the Denoiser"):
        deis.sample(deis.make_plan(SDE, "ddim", 2), deis.Denoiser(lambda x, t: x, SDE, "v"), X, predicts="eps")
    with pytest.raises(ValueError, match="target='noise'"):
        deis.Denoiser(lambda x, t: x, SDE).predict(X, 0.5, "noise")


@pytest.mark.parametrize("backend", BACKENDS)
def test_edm_preconditioning_of_the_best_raw_network_is_the_denoiser(backend: str) -> None:
    """For data of N(0, s^2), D = s^2 / (sigma^2 + s^2) x: the raw network of the best denoiser is 0."""
    model = deis.edm_preconditioned(lambda x, t: 0 * x, 0.5)
    sde = deis.EDM(sampling_eps=0.0)
    denoiser = deis.Denoiser(model, sde, "x0")
    for t in (80.0, 1.0, 0.0):
        np.testing.assert_allclose(denoiser.predict(BACKENDS[backend](X), t), exact_outputs(sde, X, t, "x0"), rtol=1e-6)
    seen: list[Any] = []

    def identity(x: Any, t: Any) -> Any:
        seen.extend((x, t))
        return x

    out = deis.edm_preconditioned(identity, 0.5)(BACKENDS[backend](X), BACKENDS[backend](np.full(3, 2.0)))
    np.testing.assert_allclose(seen[0], X / np.sqrt(4.25), rtol=1e-6)
    np.testing.assert_allclose(seen[1], np.log(2.0) / 4, rtol=1e-6)
    np.testing.assert_allclose(out, 0.25 / 4.25 * X + 1.0 / 4.25 * X, rtol=1e-5)
    with pytest.raises(ValueError, match="sigma_data=0"):
        deis.edm_preconditioned(lambda x, t: x, 0)


# --- guidance ----------------------------------------------------------------------------------------------------------


def network(x: Any, t: Any, condition: Any) -> Any:
    """A conditional network, nonlinear, in any framework."""
    xp = torch if isinstance(x, torch.Tensor) else jnp if isinstance(x, jax.Array) else np
    c = condition if isinstance(condition, (int, float)) else xp.asarray(condition)[:, None, None]
    return 0.5 * xp.sin(x + c) * (1 + t[:, None, None]) + 0.3 * x


CONDITION, NULL = np.array([1.0, 2.0, 3.0]), np.zeros(3)


def call(model: Callable[[Any, Any], Any], x: Any, t: Any) -> Any:
    return model(x, t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"rescale": 0.7}, {"interval": (0.3, 0.7)}], ids=str)
def test_one_batched_call_or_two_or_autoguidance_are_one_formula(backend: str, options: dict[str, Any]) -> None:
    plan = deis.make_plan(SDE, "tab2", 6)
    x_T = BACKENDS[backend](X)
    batched = deis.classifier_free(network, CONDITION, NULL, 3.0, **options)
    two = deis.classifier_free(network, CONDITION, NULL, 3.0, batched=False, **options)
    auto = deis.guided(lambda x, t: network(x, t, CONDITION), lambda x, t: network(x, t, NULL), 3.0, **options)

    def by_hand(x: Any, t: Any) -> Any:
        strong, weak = network(x, t, CONDITION), network(x, t, NULL)
        low, high = options.get("interval", (-np.inf, np.inf))
        if not low <= float(t[0]) <= high:
            return strong
        m = weak + 3.0 * (strong - weak)
        phi = options.get("rescale", 0.0)
        return (
            m if phi == 0 else phi * m * strong.std(axis=(1, 2), keepdims=True) / m.std(axis=(1, 2), keepdims=True) + (1 - phi) * m
        )

    expected = deis.sample(plan, by_hand, X)
    tolerance = 1e-9 if backend != "jax" else 1e-4
    for model in (batched, two, auto):
        np.testing.assert_allclose(deis.sample(plan, model, x_T), expected, rtol=tolerance, atol=tolerance)
        # Called as a plain function, with a time known to the device alone, it masks instead of choosing.
        plain = partial(call, model)
        np.testing.assert_allclose(deis.sample(plan, plain, x_T), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_costs_what_it_says(batched: bool) -> None:
    """Samples evaluated: twice as many within the interval, and outside it no weak prediction at all."""
    evaluated: list[int] = []

    def counting(x: Any, t: Any, condition: Any) -> Any:
        evaluated.append(len(x))
        return 0.1 * x

    plan = deis.make_plan(SDE, "tab2", 8, ts_order=1)
    inside = int(((plan.t[:-1] >= 0.3) & (plan.t[:-1] <= 0.7)).sum())
    model = deis.classifier_free(counting, CONDITION, NULL, 2.0, interval=(0.3, 0.7), batched=batched)
    deis.sample(plan, model, torch.tensor(X))
    assert len(evaluated) == 8 + (0 if batched else inside)
    assert sum(evaluated) == 3 * (8 + inside)
    evaluated.clear()
    deis.sample(plan, deis.classifier_free(counting, CONDITION, None, 1.0), torch.tensor(X))
    assert evaluated == [3] * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_rescaling_a_constant_prediction_is_not_nan(backend: str) -> None:
    model = deis.guided(lambda x, t: 0 * x + 1, lambda x, t: 0 * x, 2.0, rescale=0.5)
    assert np.asarray(model(BACKENDS[backend](X), BACKENDS[backend](np.full(3, 0.5)))).tolist() == np.full(X.shape, 2.0).tolist()


def test_autoguidance_takes_a_second_network() -> None:
    plan = deis.make_plan(SDE, "ddim", 4)
    model = deis.guided(lambda x, t: 0.2 * x, lambda x, t: 0.1 * x, 2.0)
    np.testing.assert_allclose(deis.sample(plan, model, X), deis.sample(plan, lambda x, t: 0.3 * x, X), rtol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_classifier_guidance_samples_the_product_of_gaussians(backend: str, predicts: str) -> None:
    """Data of N(0, s^2) with a likelihood N(1; x_0, r^2) is N(m, 1/(1/s^2 + 1/r^2)): its probability flow is known.

    p(y | x_t) is Gaussian, as x_0 given x_t is.
    """
    s, r = 0.5, 0.4
    variance = 1 / (1 / s**2 + 1 / r**2)

    def log_prob(x: Any, t: Any) -> Any:
        alpha, sigma = float(SDE.alpha(float(t[0]))), float(SDE.sigma(float(t[0])))
        total = (alpha * s) ** 2 + sigma**2
        mean, spread = alpha * s**2 * x / total, s**2 * sigma**2 / total + r**2
        return (-((1 - mean) ** 2) / (2 * spread)).sum(1)

    x_T = BACKENDS[backend](np.linspace(-1.5, 1.5, 6).reshape(3, 2))
    plan = deis.make_plan(SDE, "tab3", 200, "log")
    base = deis.Denoiser(lambda x, t: exact_outputs(SDE, x, float(t[0]), predicts, s), SDE, predicts)
    guided = deis.classifier_guided(base, log_prob, 1.0)
    if backend == "torch":
        x_0 = deis.sample(plan, guided, x_T)
        eps, solution = gaussian(SDE, variance / r**2, variance**0.5)
        np.testing.assert_allclose(x_0, solution(SDE.t_end, x_T.numpy()), rtol=0, atol=1e-4)
        np.testing.assert_allclose(guided.predict(x_T, 0.4, "eps"), eps(x_T.numpy(), np.full(3, 0.4)), rtol=1e-6)
        np.testing.assert_allclose(guided(x_T, torch.full((3,), 0.4)), eps(x_T.numpy(), np.full(3, 0.4)), rtol=1e-6)
    else:
        eps = gaussian(SDE, variance / r**2, variance**0.5)[0]
        expected = eps(np.asarray(x_T), np.full(3, 0.4))
        np.testing.assert_allclose(guided.predict(x_T, 0.4, "eps"), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: deis.classifier_free(network, CONDITION, None, 2.0), "null is None"),
        (lambda: deis.classifier_free(network, CONDITION, 0.0, 2.0), "repeat it for each sample"),
        (lambda: deis.classifier_free(network, CONDITION, NULL, 2.0, rescale=2.0), "rescale=2.0"),
        (lambda: deis.classifier_free(network, CONDITION, NULL, float("nan")), "weight=nan"),
        (lambda: deis.classifier_free(network, CONDITION, NULL, 2.0, interval=(0.7, 0.3)), "the lower first"),
        (lambda: deis.classifier_guided(deis.Denoiser(lambda x, t: x, SDE), lambda x, t: x, float("inf")), "weight=inf"),
        (lambda: deis.static_threshold(0), "limit=0"),
        (lambda: deis.dynamic_threshold(1.5), "quantile=1.5"),
        (lambda: deis.dynamic_threshold(0.9, limit=-1.0), "limit=-1.0"),
        (lambda: deis.dynamic_threshold(0.9, limit=1.0, most=0.5), "most=0.5"),
    ],
)
def test_bad_guidance_and_thresholds_are_refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_classifier_guidance_needs_a_framework_that_differentiates() -> None:
    guided = deis.classifier_guided(deis.Denoiser(lambda x, t: x, SDE), lambda x, t: x.sum(axis=(1, 2)))
    with pytest.raises(TypeError, match="torch and JAX can"):
        deis.sample(deis.make_plan(SDE, "ddim", 2), guided, X)


# --- thresholding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 40), (3, 4, 10), (3, 2, 4, 5), (3, 1, 2, 4, 5)])
def test_dynamic_thresholding_is_imagens_for_each_sample(backend: str, shape: tuple[int, ...]) -> None:
    x_0 = np.random.default_rng(0).standard_normal(shape) * np.array([0.3, 1.0, 4.0]).reshape(-1, *(1,) * (len(shape) - 1))
    out = np.asarray(deis.dynamic_threshold(0.9, most=2.0)(BACKENDS[backend](x_0)))
    for one, result in zip(x_0, out, strict=True):
        s = min(max(np.quantile(np.abs(one), 0.9), 1.0), 2.0)
        np.testing.assert_allclose(result, np.clip(one, -s, s) / s, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("form", ["eps", "data"])
@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_thresholding_acts_on_the_predicted_data_whatever_the_form(backend: str, form: Any, predicts: str) -> None:
    """A model whose x_0 is 1.5 everywhere, thresholded at 1, samples like one whose x_0 is 1."""

    def model(value: float) -> Callable[[Any, Any], Any]:
        def output(x: Any, t: Any) -> Any:
            shape = (-1, 1, 1)
            time = np.asarray(t, dtype=np.float64)
            alpha, sigma = SDE.alpha(time).reshape(shape), SDE.sigma(time).reshape(shape)
            eps = (np.asarray(x) - alpha * value) / sigma
            return BACKENDS[backend](eps if predicts == "eps" else alpha * eps - sigma * value)

        return output

    plan = deis.make_plan(SDE, deis.adams(form, "t", 1), 5)
    x_T = BACKENDS[backend](X)
    clipped = deis.sample(plan, deis.Denoiser(model(1.5), SDE, predicts, threshold=deis.static_threshold(1.0)), x_T)
    np.testing.assert_allclose(clipped, deis.sample(plan, model(1.0), x_T, predicts=predicts), rtol=1e-8, atol=1e-8)
    denoiser = deis.Denoiser(model(1.5), SDE, predicts, threshold=deis.static_threshold(1.0))
    np.testing.assert_allclose(denoiser.predict(x_T, 0.5), 1.0, rtol=1e-10)
    np.testing.assert_allclose(denoiser.predict(x_T, 0.5, "eps"), (X - SDE.alpha(0.5)) / SDE.sigma(0.5), rtol=1e-10)


def test_a_threshold_that_would_divide_by_zero_is_refused() -> None:
    plan = deis.make_plan(deis.EDM(sampling_eps=0.0), "rhork_2heun", 6, "rho")  # its last stage is at sigma = 0
    x = 80 * X
    assert np.isfinite(deis.sample(plan, lambda x, t: 0.1 * x, x)).all()
    clipped = deis.Denoiser(lambda x, t: 0.1 * x, deis.EDM(), threshold=deis.static_threshold())
    with pytest.raises(ValueError, match="with a threshold does not determine eps"):
        deis.sample(plan, clipped, x)


def test_thresholds_and_guidance_run_under_jit() -> None:
    plan = deis.make_plan(SDE, "unipc2", 5)
    model = deis.classifier_free(network, CONDITION, NULL, 3.0, interval=(0.2, 0.8), rescale=0.5)
    denoiser = deis.Denoiser(model, SDE, "v", threshold=deis.dynamic_threshold(0.95))
    x = jnp.asarray(X)
    jitted = jax.jit(lambda x: deis.sample(plan, denoiser, x))(x)
    np.testing.assert_allclose(jitted, deis.sample(plan, denoiser, torch.tensor(X)), rtol=1e-3, atol=1e-4)


def test_the_data_have_two_names_and_one_meaning() -> None:
    """Plans call their form "data" what networks predict as "x0"; each is taken for the other."""
    sde = deis.VPSDE.linear()
    x_T = np.random.default_rng(0).standard_normal((2, 3))
    plan = deis.make_plan(sde, deis.adams("x0", order=2), 5)  # type: ignore[arg-type]
    assert plan.form == "data"
    assert (plan.keep_p == deis.make_plan(sde, deis.adams("data", order=2), 5).keep_p).all()
    denoiser = deis.Denoiser(lambda x, t: np.tanh(x), sde, "data")
    assert denoiser.predicts == "x0"
    expected = deis.sample(plan, denoiser, x_T)
    np.testing.assert_array_equal(deis.sample(plan, denoiser.model, x_T, predicts="data"), expected)
    np.testing.assert_array_equal(denoiser.predict(x_T, 0.5, "data"), denoiser.predict(x_T, 0.5, "x0"))
