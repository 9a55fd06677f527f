"""The likelihood along an encoding plan: closed forms, the order of the plan, both frameworks, probes, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from torch import Tensor

import deis
from benchmarks.methods import digits
from deis.cli import main
from deis.evaluation import likelihood
from deis.methods.registry import find

from .oracle import FEW_STEPS, two_modes

Array = NDArray[np.float64]
SDE = deis.VPSDE.linear()
SMOOTH = deis.VPSDE.linear(0.1, 20.0, sampling_eps=0.2, sampling_T=0.6)
DISCRETE = deis.VPSDE.discrete(SDE.alpha(np.linspace(1e-3, 1, 500)) ** 2)
X_0 = np.random.default_rng(0).standard_normal((4, 3, 2))


def encoding(method: Any, sde: deis.Schedule = SDE, num_step: int = 10, phase: str | None = None, **options: Any) -> deis.Plan:
    return deis.make_plan(sde, method, num_step, phase, None if phase is None else 1.0, direction="encode", **options)


def level(sde: deis.Schedule, t: Any) -> tuple[float, float]:
    return float(sde.alpha(t[0].item())), float(sde.sigma(t[0].item()))


def eps_of_gaussian(sde: deis.Schedule, mean: float = 0.7, std: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = level(sde, t)
        return sigma * (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

    return eps


def coupled(x: Any, t: Any) -> Any:
    """Nonlinear in x, whose numbers it couples, and in t, in any framework."""
    y = x + 0.5 * x.reshape(len(x), -1).sum(1)[:, None, None]
    return y / (1 + y * y) * (1 + t[:, None, None])


# --- closed forms ---------------------------------------------------------------------------------------------------------


def modes_log_density(sde: deis.Schedule, t: float, x: Array) -> Array:
    """Return that of the data of `two_modes`, noised."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return logsumexp([norm(alpha * m, np.hypot(0.5 * alpha, sigma)).logpdf(x) for m in (-1, 1)], axis=0) - math.log(2)


def eps_of_modes(sde: deis.Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = level(sde, t)
        variance = (0.5 * alpha) ** 2 + sigma**2
        return sigma * (x - alpha * torch.tanh(alpha * x / variance)) / variance

    return eps


@pytest.mark.parametrize(
    "method", ["ddim", "tab1", "rhork_2heun", "rhork_3kutta", "rhork_4rk", "dpm_solver_3", "dpmpp_2m", "dpmpp_3s", "auto", "bdia"]
)
def test_the_error_has_the_order_of_the_method(method: str) -> None:
    """On a nonlinear flow, whose volume is known from the densities at both ends."""
    x = np.linspace(-1.5, 2.0, 5)
    ends = np.array([SMOOTH.t_end, SMOOTH.t_start])
    x_T = two_modes(SMOOTH)[1](ends, x)[-1]
    change = modes_log_density(SMOOTH, ends[0], x) - modes_log_density(SMOOTH, ends[1], x_T)
    truth = norm(0, SMOOTH.sigma(ends[1])).logpdf(x_T) + change
    steps, errors, phase = [48, 68, 96], [], "rho" if method.startswith("rhork") else "t"
    for num_step in steps:
        plan = encoding(method, SMOOTH, num_step, phase)
        found = deis.log_likelihood(eps_of_modes(SMOOTH), torch.tensor(x[:, None]), plan, exact=True)
        errors.append(np.abs(found.nats.numpy() - truth).max())
    order = find(method)[0].order_of(method)
    assert order is not None
    assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - order) < 0.2


def test_densities_integrate_to_one() -> None:
    x = np.linspace(-4, 4, 321)
    found = deis.log_likelihood(eps_of_modes(SDE), torch.tensor(x[:, None]), encoding("auto", num_step=40), exact=True)
    assert np.exp(found.nats.numpy()).sum() * (x[1] - x[0]) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    "sde",
    [SDE, deis.VPSDE.cosine(), deis.SubVPSDE.linear(), deis.VESDE(), deis.EDM(), DISCRETE],
    ids=lambda sde: sde.name,
)
def test_every_schedule_finds_the_density_of_gaussian_data(sde: deis.Schedule) -> None:
    x = torch.tensor(X_0 / 2)
    found = deis.log_likelihood(eps_of_gaussian(sde, 0.0), x, encoding("auto", sde, 60), exact=True)
    deviation = float(np.hypot(sde.alpha(sde.t_end) / 2, sde.sigma(sde.t_end)))
    np.testing.assert_allclose(found.nats, norm(0, deviation).logpdf(x.numpy()).sum((1, 2)), atol=2e-2)


def test_flow_matching_reaches_alpha_0() -> None:
    sde = deis.FlowMatching(0.05)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = level(sde, t)
        variance = (alpha / 2) ** 2 + sigma**2
        return sigma * x / variance - alpha / 4 * x / variance

    found = deis.log_likelihood(velocity, torch.tensor(X_0 / 2), encoding("auto", sde, 100), exact=True, predicts="flow")
    truth = norm(0, np.hypot(0.95 / 2, 0.05)).logpdf(X_0 / 2).sum((1, 2))
    np.testing.assert_allclose(found.nats, truth, atol=2e-3)


def test_mixture_of_digits_to_a_thousandth_of_a_nat_per_dimension() -> None:
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture

    data = load_digits().data / 8 - 1
    mixture = GaussianMixture(30, reg_covar=1e-3, random_state=0).fit(data)
    problem, rng = digits(1), np.random.default_rng(1)
    alpha, sigma = (float(f(problem.sde.t_end)) for f in (problem.sde.alpha, problem.sde.sigma))
    x = alpha * data[::300] + sigma * rng.standard_normal((6, 64))
    parts = zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True)
    truth = logsumexp(
        [np.log(w) + multivariate_normal(alpha * m, alpha**2 * c + sigma**2 * np.eye(64)).logpdf(x) for w, m, c in parts], axis=0
    )
    plan = deis.make_plan(problem.sde, deis.adams("data", "t", 2, 3), 40, "t", 5.0, direction="encode")
    found = deis.log_likelihood(problem.model, torch.tensor(x), plan, exact=True, data_deviation=0.1)
    assert (np.abs(found.nats.numpy() - truth) / 64).max() < 1e-3


def test_the_form_and_the_deviation_are_no_part_of_the_answer() -> None:
    found = [
        deis.log_likelihood(coupled, torch.tensor(X_0), encoding(deis.adams(form, "t", 2, 3), SMOOTH, 200, "t"), **options).nats
        for form in ("eps", "data")
        for options in ({"exact": True}, {"exact": True, "data_deviation": 2.0})
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


@FEW_STEPS
def test_the_deviation_of_gaussian_data_makes_the_volume_exact() -> None:
    """And one probe is as good as all of them, since its Jacobian is a multiple of the identity."""
    plan, x = encoding("tab3", num_step=4), torch.tensor(X_0)
    for options in ({"exact": True}, {"rng": torch.Generator().manual_seed(0)}):
        found = deis.log_likelihood(eps_of_gaussian(SDE), x, plan, data_deviation=0.5, **options)
        x_T = deis.encode(plan, eps_of_gaussian(SDE), x)
        spread = np.hypot(plan.alpha[[0, -1]] / 2, plan.sigma[[0, -1]])
        truth = norm(0, plan.sigma[-1]).logpdf(x_T.numpy()).sum((1, 2)) + 6 * np.log(spread[1] / spread[0])
        np.testing.assert_allclose(found.nats, truth, rtol=1e-10)


def test_bits_are_those_of_the_probability_of_a_grey_level() -> None:
    levels = np.array([[100], [127], [180]])
    found = deis.log_likelihood(
        eps_of_gaussian(SDE, 0.0), torch.tensor(levels / 127.5 - 1), encoding("auto", num_step=60), exact=True
    )
    edges = [(levels + side) / 127.5 - 1 for side in (-0.5, 0.5)]
    bits = -np.log2(norm(0, 0.5).cdf(edges[1]) - norm(0, 0.5).cdf(edges[0]))
    np.testing.assert_allclose(found.bits_per_dim, bits[:, 0], atol=5e-3)


def test_the_prior_may_have_a_deviation_of_its_own() -> None:
    plan = encoding("tab2", SMOOTH)
    x_T = deis.encode(plan, coupled, torch.tensor(X_0)).numpy()
    wide, own = (
        deis.log_likelihood(coupled, torch.tensor(X_0), plan, exact=True, prior_deviation=deviation).nats
        for deviation in (2.0, None)
    )
    difference = (norm(0, 2).logpdf(x_T) - norm(0, SMOOTH.sigma(0.6)).logpdf(x_T)).sum((1, 2))
    np.testing.assert_allclose(wide - own, difference, rtol=1e-9)


# --- frameworks and networks ----------------------------------------------------------------------------------------------


@FEW_STEPS
@pytest.mark.parametrize("method", ["tab3", "auto", "rhork_3kutta", "dpmpp_3s", "bdia"])
@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_jax_agrees_with_torch_to_rounding(method: str, predicts: str) -> None:
    plan = encoding(method, num_step=6)
    expected = deis.log_likelihood(coupled, torch.tensor(X_0), plan, exact=True, predicts=predicts)
    with jax.enable_x64(True):
        run = jax.jit(lambda x: deis.log_likelihood(coupled, x, plan, exact=True, predicts=predicts))
        for found in (run(jnp.asarray(X_0)), deis.log_likelihood(coupled, jnp.asarray(X_0), plan, exact=True, predicts=predicts)):
            np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-10)
            np.testing.assert_allclose(found.bits_per_dim, expected.bits_per_dim, rtol=1e-10)
            assert found.nfe == expected.nfe == plan.nfe


def test_float32_is_as_good_as_its_rounding() -> None:
    plan = encoding("auto", num_step=8)
    exact = deis.log_likelihood(coupled, torch.tensor(X_0), plan, exact=True).nats
    for x in (torch.tensor(X_0, dtype=torch.float32), jnp.asarray(X_0, jnp.float32)):
        found = deis.log_likelihood(coupled, x, plan, exact=True)
        assert found.nats.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(found.nats), exact, rtol=2e-4)


@FEW_STEPS
@pytest.mark.parametrize("method", ["tab2", "auto", "rhork_3kutta", "dpm_solver_2", "bdia"])
def test_the_network_is_called_once_an_evaluation_whatever_the_probes(method: str) -> None:
    calls = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return coupled(x, t)

    plan = encoding(method, num_step=6)
    found = deis.log_likelihood(counted, torch.tensor(X_0), plan, probes=3, rng=torch.Generator().manual_seed(0))
    assert (calls, found.nfe) == (plan.nfe, plan.nfe)


def test_guidance_by_a_classifier_is_differentiated_too() -> None:
    eps = eps_of_gaussian(SDE)
    guided = deis.classifier_guided(deis.Denoiser(eps, SDE), lambda x, t: -(x**4).sum((1, 2)), 0.01)

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        return eps(x, t) + 0.01 * level(SDE, t)[1] * 4 * x**3

    plan, x = encoding("auto", num_step=6), torch.tensor(X_0)
    found, expected = (deis.log_likelihood(model, x, plan, exact=True).nats for model in (guided, by_hand))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_network_inside_has_plausible_bits() -> None:
    """Of two of its own samples, which are far likelier than noise."""
    network = deis.load_model()
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *network.shape), dtype=np.float32))
    plan, rng = deis.make_plan(network.sde, nfe=10, direction="encode"), torch.Generator().manual_seed(0)
    samples = deis.sample(network.plan(10), network, noise)
    found, other = (deis.log_likelihood(network, x, plan, probes=2, rng=rng) for x in (samples, noise))
    assert ((found.bits_per_dim > 0) & (found.bits_per_dim < 4)).all()
    assert (other.bits_per_dim > 8).all()


# --- probes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_probes_are_unbiased_and_tell_their_error(backend: str) -> None:
    plan = encoding("auto", num_step=6)
    with jax.enable_x64(True):
        x: Any = torch.tensor(X_0) if backend == "torch" else jnp.asarray(X_0)
        rng: Any = torch.Generator().manual_seed(0) if backend == "torch" else jax.random.key(0)
        found = deis.log_likelihood(coupled, x, plan, probes=60, rng=rng)
        exact = deis.log_likelihood(coupled, x, plan, exact=True)
    assert (np.abs(np.asarray(found.nats - exact.nats)) < 4 * np.asarray(found.standard_error)).all()
    assert (np.asarray(found.standard_error) > 1e-3).all()
    assert (np.asarray(exact.standard_error) == 0).all()


def test_the_standard_error_is_that_of_the_mean_of_single_probes() -> None:
    plan, x = encoding("auto", num_step=4), torch.tensor(X_0[:1])
    rng = torch.Generator().manual_seed(0)
    stream = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=rng)))
    together = deis.log_likelihood(coupled, x, plan, probes=5, rng=torch.Generator().manual_seed(0))
    single = [deis.log_likelihood(coupled, x, plan, rng=[stream]) for _ in range(5)]
    assert single[0].standard_error is None
    nats = np.array([found.nats.item() for found in single])
    assert together.nats.item() == pytest.approx(nats.mean(), rel=1e-12)
    assert together.standard_error.item() == pytest.approx(nats.std(ddof=1) / np.sqrt(5), rel=1e-9)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_sample_depends_on_its_own_stream_alone(backend: str) -> None:
    plan = encoding("auto", num_step=5)

    def nats(numbers: list[int]) -> Array:
        x: Any = X_0[numbers].astype(np.float32)
        if backend == "torch":
            rng: Any = [torch.Generator().manual_seed(i) for i in numbers]
            return np.asarray(deis.log_likelihood(coupled, torch.tensor(x), plan, probes=2, rng=rng).nats)
        rng = jax.random.split(jax.random.key(0), 4)[np.array(numbers)]
        run = jax.jit(lambda x, rng: deis.log_likelihood(coupled, x, plan, probes=2, rng=rng).nats)
        return np.asarray(run(jnp.asarray(x), rng))

    np.testing.assert_allclose(nats([0, 1, 2, 3])[[2, 0]], nats([2, 0]), rtol=1e-5)


# --- what is refused ------------------------------------------------------------------------------------------------------


def detached(x: Tensor, t: Tensor) -> Tensor:
    return coupled(x.detach(), t)


def parametrised(x: Tensor, t: Tensor) -> Tensor:
    return coupled(x.detach(), t) * torch.ones(1, requires_grad=True)


THRESHOLDED = deis.Denoiser(coupled, SDE, threshold=deis.static_threshold())
GUIDED_THRESHOLDED = deis.classifier_guided(THRESHOLDED, lambda x, t: x.sum((1, 2)))
REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "numpy": (TypeError, "NumPy has no derivatives", {"x_0": X_0}),
    "half": (ValueError, "x_0 has dtype torch.float16", {"x_0": torch.tensor(X_0).half()}),
    "half network": (ValueError, r"model\(x, t\) returned dtype torch.bfloat16", {"model": lambda x, t: coupled(x, t).bfloat16()}),
    "falling": (ValueError, "leads from noise to data", {"plan": deis.make_plan(SDE, "tab2", 5)}),
    "no plan": (TypeError, "deis.Plan", {"plan": 5}),
    "two states": (ValueError, "begins with two states", {"plan": deis.make_plan(SDE, "bdia", 5).reverse()}),
    "guess": (ValueError, "without afs=", {"plan": encoding("tab2", afs=0.5)}),
    "threshold": (ValueError, "model has a threshold", {"model": THRESHOLDED}),
    "inner threshold": (
        ValueError, "model has a threshold", {"model": GUIDED_THRESHOLDED},
    ),
    "guided threshold": (
        ValueError, "model has a threshold", {"model": deis.guided(GUIDED_THRESHOLDED, GUIDED_THRESHOLDED, 2.0)},
    ),
    "no stream": (ValueError, "rng is missing", {"exact": False}),
    "another stream": (TypeError, "rng must be a torch", {"exact": False, "rng": np.random.default_rng(0)}),
    "no derivative": (ValueError, "has no derivative in x", {"model": torch.no_grad()(coupled)}),
    "detached": (ValueError, "has no derivative in x", {"model": detached}),
    "detached with parameters": (ValueError, "has no derivative in x", {"model": parametrised}),
    "not finite": (ValueError, "sample 2 is not finite", {"x_0": torch.tensor([1.0, 1.0, np.nan])[:, None, None]}),
    "probes": (ValueError, "probes=0", {"probes": 0}),
    "exact": (ValueError, "exact='yes'", {"exact": "yes"}),
    "data deviation": (ValueError, "data_deviation=0", {"data_deviation": 0}),
    "prior deviation": (ValueError, "prior_deviation=-1", {"prior_deviation": -1}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_likelihood_is_refused_with_the_cure(case: str) -> None:
    error, match, change = REFUSED[case]
    arguments: dict[str, Any] = {"model": coupled, "x_0": torch.tensor(X_0), "plan": encoding("tab2", num_step=5), "exact": True}
    with pytest.raises(error, match=match):
        deis.log_likelihood(**(arguments | change))


@FEW_STEPS
def test_a_fitted_plan_is_refused() -> None:
    norm_plan = encoding(deis.adams("eps", "t", 1, norm=lambda t: 1 + t), num_step=5)
    with pytest.raises(ValueError, match="is fitted to"):
        deis.log_likelihood(coupled, torch.tensor(X_0), norm_plan, exact=True)


def test_clean_data_are_refused_in_the_data_form() -> None:
    with pytest.raises(ValueError, match="sigma is 0"):
        deis.log_likelihood(coupled, torch.tensor(X_0), encoding("dpmpp_2m", deis.FlowMatching()), exact=True, predicts="flow")


@FEW_STEPS
def test_the_eps_form_is_refused_where_it_ends_at_alpha_0() -> None:
    plan = encoding("tab2", deis.FlowMatching(0.05), 5)
    with pytest.raises(ValueError, match=r"alpha is 0, at t=1\.0; use form='data'"):
        deis.log_likelihood(coupled, torch.tensor(X_0), plan, exact=True, predicts="flow")


# --- of images ------------------------------------------------------------------------------------------------------------


GREYS = np.random.default_rng(0).integers(0, 64, (6, 1, 2, 2)).astype(np.uint8)


def test_images_have_the_bits_of_their_grey_levels() -> None:
    model = deis.Denoiser(eps_of_gaussian(SDE, 0.0), SDE)
    images = GREYS.astype(np.float32) / 127.5 - 1
    plan = encoding("auto", num_step=40)
    found = likelihood(plan, model, images, batch=4)
    edges = [(GREYS + side) / 127.5 - 1 for side in (-0.5, 0.5)]
    bits = -np.log2(norm(0, 0.5).cdf(edges[1]) - norm(0, 0.5).cdf(edges[0])).mean((1, 2, 3))
    assert found["bits_per_dim"] == pytest.approx(bits.mean(), abs=5e-3)
    assert found["standard_error"] == pytest.approx(bits.std(ddof=1) / np.sqrt(6), rel=0.05)
    assert found["nfe"] == plan.nfe
    assert likelihood(plan, model, images, batch=1)["nats"] == pytest.approx(found["nats"], rel=1e-5)
    assert likelihood(plan, model, images, batch=4, seed=1)["nats"] != found["nats"]
    for wrong in (images + 1e-3, images[:1]):
        with pytest.raises(ValueError, match="two or more, of 256 levels"):
            likelihood(plan, model, wrong)


@FEW_STEPS
def test_the_command_measures_real_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8))
    arguments = ["evaluate", "--real", str(tmp_path / "real.npz"), "--out", str(tmp_path / "out.json"), "--nfe", "8"]
    made = CliRunner().invoke(main, [*arguments, "--likelihood", "2", "--method", "auto", "--method", "dpmpp_2m"])
    assert made.exit_code == 0, made.output
    rows = json.loads((tmp_path / "out.json").read_text())["plans"]
    assert [(row["nfe"], row["images"]) for row in rows] == [(8, 2), (8, 2)]
    assert all(row["bits_per_dim"] > 7 for row in rows)  # they are noise
    deis.make_plan(deis.load_model().sde, "tab2", 4).save(tmp_path / "plan.json")
    for wrong, match in (
        (["--likelihood", "2", "--plan", str(tmp_path / "plan.json")], "leads from noise to data"),
        (["--likelihood", "9"], "3; give fewer"),
        (["--likelihood", "2", "--lpips", "alex"], "leave out --lpips"),
    ):
        refused = CliRunner().invoke(main, [*arguments, *wrong])
        assert refused.exit_code == 1
        assert match in refused.output
