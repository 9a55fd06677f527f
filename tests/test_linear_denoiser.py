"""Networks of linear SDEs: what they predict, scalar networks as networks of Langevin diffusion, folders, and refusals."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
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
from scipy import ndimage

import deis
from deis.backends import backend_of
from deis.cli import main
from deis.linear.dct import from_frequencies, to_frequencies
from deis.linear.pretrained import PretrainedLinear
from deis.linear.reader import reader_of
from deis.linear.space import space_of
from deis.model.predictions import output_of

from .linear_oracle import mixture, model_of

Array = NDArray[np.float64]
ROOT = Path(__file__).parents[1]
MEANS, STD = (-1.0, 0.8), 0.3
Z = np.random.default_rng(0).standard_normal((2, 6, 1, 1))
CLD, PSLD = deis.CLD(), deis.PSLD()
UNCHECKED: Any = deis.LinearDenoiser
FREQUENCIES = deis.FrequencyVP(1 + np.arange(12.0).reshape(3, 4) / 12)


def posterior_mean(x: Any, alpha: Any, sigma: Any) -> Any:
    """E[x_0 | x] for two equal Gaussians at MEANS and x = alpha x_0 + sigma eps."""
    xp, spread = backend_of(x).xp, alpha**2 * STD**2 + sigma**2
    logs = [-0.5 * (x - alpha * m) ** 2 / spread for m in MEANS]
    share = 1 / (1 + xp.exp(logs[1] - logs[0]))
    first, second = (m + alpha * STD**2 / spread * (x - alpha * m) for m in MEANS)
    return share * first + (1 - share) * second


class Scalar:
    """The exact network of the two Gaussians on a scalar schedule, by the level."""

    def __init__(self, predicts: str) -> None:
        self.predicts = predicts

    def __call__(self, x: Any, t: Any) -> Any:
        raise AssertionError("executors give the level")

    def at(self, x: Any, t: Any, level: Any) -> Any:
        return output_of(self.predicts, posterior_mean(x, level.alpha, level.sigma), x, level)


def flat(model: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """A model of states (2, batch) as one of (2, batch, 1, 1)."""
    return lambda x, t: model(x[:, :, 0, 0], t)[:, :, None, None]


# --- a scalar network is one of Langevin diffusion ------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["R", "L", "score"])
@pytest.mark.parametrize("sde", [CLD, PSLD], ids=lambda sde: sde.name)
def test_a_network_of_a_scalar_schedule_knows_the_score_in_position_and_velocity(sde: deis.LinearSDE, predicts: str) -> None:
    """The statistic y = a^T Sigma^-1 u / s is all that the state says of x_0; the velocity starts as noise."""
    score, _ = mixture(sde)
    plan = deis.make_linear_plan(sde, "tab2", 8, predicts=predicts)
    wanted = deis.sample_linear(plan, flat(model_of(sde, score, predicts)), sde.noise(Z), velocity=True)
    for schedule, network in [
        (deis.VPSDE.linear(), Scalar("eps")),
        (deis.VPSDE.cosine(), Scalar("v")),
        (deis.FlowMatching(), Scalar("flow")),
        (deis.EDM(), Scalar("x0")),
        (deis.VPSDE.discrete(np.linspace(0.9999, 0.01, 100)), Scalar("eps")),
    ]:
        model = deis.LinearDenoiser(deis.Denoiser(network, schedule, network.predicts), sde)
        found = deis.sample_linear(plan, model, sde.noise(Z), velocity=True)
        np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-9)


def test_it_is_asked_at_the_noise_level_of_the_best_linear_estimate() -> None:
    """rho = (a^T Sigma^-1 a)^(-1/2), at the schedule's own time; beyond its ends at the nearest, and rho stays."""
    asked: list[Any] = []

    class Spy(Scalar):
        def at(self, x: Any, t: Any, level: Any) -> Any:
            asked.append((level, t.copy(), x.std()))
            return super().at(x, t, level)

    schedule = deis.VPSDE.linear(sampling_eps=0.2, sampling_T=0.8)
    plan = deis.make_linear_plan(CLD, "tab0", 12)
    noise = CLD.noise(np.random.default_rng(1).standard_normal((2, 4000, 1, 1)))
    deis.sample_linear(plan, deis.LinearDenoiser(deis.Denoiser(Spy("eps"), schedule), CLD), noise)
    a, Sigma = CLD.psi(plan.t[:-1], 0.0)[:, :, 0], CLD.Sigma(plan.t[:-1])
    rho = np.einsum("ti,tij,tj->t", a, np.linalg.inv(Sigma), a) ** -0.5
    low, high = schedule.rho(0.2), schedule.rho(0.8)
    assert rho.min() < low
    assert rho.max() > high
    for (level, t, spread), wanted in zip(asked, rho, strict=True):
        assert level.sigma / level.alpha == pytest.approx(wanted, rel=1e-12)
        assert (t == level.t).all()
        assert schedule.rho(level.t) == pytest.approx(np.clip(wanted, low, high), rel=1e-9)
        assert spread < 1.2  # never more noise than the network knows
    assert asked[0][0].sigma == pytest.approx(float(schedule.sigma(0.8)), rel=1e-12)


@pytest.mark.parametrize(("basis", "shape"), [("block", (1, 1)), ("dct", (3,))])
def test_rho_of_one_block_is_sigma_over_alpha(basis: str, shape: tuple[int, ...]) -> None:
    def beta(t: float) -> Array:
        return np.full(shape, 0.1 + 19.9 * t)

    vp, t = deis.VPSDE.linear(0.1, 20), np.geomspace(2e-3, 1, 7)
    found = deis.LinearSDE(lambda t: -beta(t) / 2, lambda t: beta(t) ** 0.5, basis=basis).rho(t)
    assert found.shape == (7, *(shape if basis == "dct" else ()))
    np.testing.assert_allclose(found, np.broadcast_to(vp.rho(t).reshape(7, *(1,) * (found.ndim - 1)), found.shape), rtol=1e-11)


def test_frameworks_agree_inside_jit_too() -> None:
    plan = deis.make_linear_plan(CLD, "tab2", 6)
    model = deis.LinearDenoiser(deis.Denoiser(Scalar("v"), deis.VPSDE.linear(), "v"), CLD)
    x_T = CLD.noise(Z)
    wanted = deis.sample_linear(plan, model, x_T)
    assert wanted.shape == Z.shape[1:]
    np.testing.assert_allclose(deis.sample_linear(plan, model, torch.from_numpy(x_T)), wanted, rtol=1e-9, atol=1e-9)
    with jax.enable_x64(True):
        run = jax.jit(lambda x: deis.sample_linear(plan, model, x))
        np.testing.assert_allclose(run(jnp.asarray(x_T)), wanted, rtol=1e-9, atol=1e-9)


# --- networks of the SDE itself -------------------------------------------------------------------------------------------


def v_of(sde: deis.LinearSDE) -> Callable[[Array, Array], Array]:
    """The exact v of the two Gaussians for a state as channels: (a^T S^-1 u - x_0) / c, straight from S = a a^T + Sigma."""

    def model(x: Array, t: Array) -> Array:
        a, Sigma = sde.psi(t[0], 0.0)[:, 0], sde.Sigma(t[0])
        linear = np.linalg.solve(np.outer(a, a) + Sigma, a)
        pull = np.linalg.solve(Sigma, a)
        y, rho = np.einsum("i,bi...->b...", pull / (a @ pull), x)[:, None], (a @ pull) ** -0.5
        v = (np.einsum("i,bi...->b...", linear, x)[:, None] - posterior_mean(y, 1.0, rho)) / np.sqrt(1 - a @ linear)
        return np.concatenate([v, np.full_like(v, np.nan)], axis=1)  # the second channel counts for nothing

    return model


@pytest.mark.parametrize("sde", [CLD, PSLD], ids=lambda sde: sde.name)
def test_v_of_a_state_as_channels(sde: deis.LinearSDE) -> None:
    score, _ = mixture(sde)
    plan = deis.make_linear_plan(sde, "tab2", 8)
    wanted = deis.sample_linear(plan, flat(model_of(sde, score, "R")), sde.noise(Z), velocity=True)
    found = deis.sample_linear(plan, deis.LinearDenoiser(v_of(sde), sde, "v"), sde.noise(Z), velocity=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-9)


def test_eps_of_both_blocks_as_channels() -> None:
    """Of two colours: the channels of the position, then those of the velocity."""
    plan = deis.make_linear_plan(CLD, "tab1", 5, K="L")
    x_T = np.random.default_rng(1).standard_normal((2, 3, 2, 4, 4))
    weights = np.random.default_rng(2).standard_normal((4, 4)) / 4
    wanted = deis.sample_linear(
        plan, lambda x, t: np.einsum("ij,jbhw->ibhw", weights, np.concatenate([x[0], x[1]], 1).swapaxes(0, 1))
        .swapaxes(0, 1).reshape(3, 2, 2, 4, 4).swapaxes(0, 1), x_T, velocity=True
    )  # fmt: skip
    model = deis.LinearDenoiser(lambda x, t: np.einsum("ij,bjhw->bihw", weights, x), CLD, "L")
    np.testing.assert_allclose(deis.sample_linear(plan, model, x_T, velocity=True), wanted, rtol=1e-12)


@pytest.mark.parametrize("predicts", ["v", "x0"])
def test_a_network_of_frequencies(predicts: str) -> None:
    """Gaussian data with a variance a frequency: x_0 and eps are linear in each, whatever the network names."""
    variance = 0.1 + np.arange(12.0).reshape(3, 4) / 6

    def predictions(x: Array, t: Array) -> dict[str, Array]:
        a, K = FREQUENCIES.psi(t[0], 0.0), FREQUENCIES.K(t[0])
        state = to_frequencies(x, 2)
        x_0 = a * variance / (a**2 * variance + K**2) * state
        eps = (state - a * x_0) / K
        S = a**2 + K**2
        return {"x0": x_0, "eps": eps, "v": (a * eps - K * x_0) / np.sqrt(S)}

    plan = deis.make_linear_plan(FREQUENCIES, "tab2", 7)
    x_T = FREQUENCIES.noise(np.random.default_rng(0).standard_normal((5, 2, 3, 4)))
    wanted = deis.sample_linear(plan, lambda x, t: from_frequencies(predictions(x, t)["eps"], 2), x_T)
    model = deis.LinearDenoiser(lambda x, t: from_frequencies(predictions(x, t)[predicts], 2), FREQUENCIES, predicts)
    np.testing.assert_allclose(deis.sample_linear(plan, model, x_T), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("basis", ["block", "dct"])
def test_a_threshold_bounds_the_predicted_data(basis: str) -> None:
    sde = CLD if basis == "block" else FREQUENCIES
    x_T = sde.noise(np.random.default_rng(0).standard_normal((2, 3, 1, 3, 4)[basis == "dct" :]))
    bounded: list[Array] = []

    def threshold(x_0: Array) -> Array:
        bounded.append(np.clip(x_0, -0.5, 0.5))
        return bounded[-1]

    plan = deis.make_linear_plan(sde, "tab0", 5)
    model = deis.LinearDenoiser(lambda x, t: 2 + 0 * x, sde, "x0", threshold)
    x = deis.sample_linear(plan, model, x_T)
    assert len(bounded) == plan.nfe
    assert bounded[0].shape == (3, 1, 3, 4)
    assert np.abs(x).max() < 0.55  # the noise at the end of sampling is left
    free = deis.sample_linear(plan, deis.LinearDenoiser(lambda x, t: 2 + 0 * x, sde, "x0"), x_T)
    assert np.abs(free).min() > 1.9
    if basis == "block":  # that of a scalar Denoiser is its own
        scalar = deis.Denoiser(Scalar("v"), deis.VPSDE.linear(), "v", threshold)
        assert np.abs(deis.sample_linear(plan, deis.LinearDenoiser(scalar, sde), x_T)).max() < 0.51


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: deis.LinearDenoiser(lambda x, t: x, CLD), "predicts=None is unknown"),
        (lambda: deis.LinearDenoiser(lambda x, t: x, CLD, "eps"), "predicts='eps' is unknown"),
        (lambda: UNCHECKED(lambda x: x, CLD, "v"), "model"),
        (lambda: UNCHECKED(lambda x, t: x, deis.VPSDE.linear(), "v"), "deis.LinearSDE"),
        (lambda: deis.LinearDenoiser(lambda x, t: x, CLD, "R", lambda x_0: x_0), "threshold needs the predicted data"),
        (lambda: deis.LinearDenoiser(deis.Denoiser(lambda x, t: x, deis.VPSDE.linear()), FREQUENCIES), "no single noise level"),
        (lambda: deis.LinearDenoiser(deis.Denoiser(lambda x, t: x, deis.VPSDE.linear()), CLD, "v"), "the model says it itself"),
        (
            lambda: deis.LinearDenoiser(
                deis.Denoiser(lambda x, t: x, deis.VPSDE.linear(), threshold=np.sin), CLD, threshold=lambda x_0: x_0
            ),
            "leave one out",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused(make: Callable[[], Any], problem: str) -> None:
    with pytest.raises((TypeError, ValueError), match=problem):
        make()


def test_plans_and_states_that_do_not_fit_are_refused() -> None:
    model = deis.LinearDenoiser(lambda x, t: x, CLD, "L")
    with pytest.raises(ValueError, match="made for PSLD"):
        deis.sample_linear(deis.make_linear_plan(PSLD, "tab0", 2), model, Z)
    faster = deis.CLD(lambda t: 5.0)  # whose name says no more of its speed than that of any other function
    with pytest.raises(ValueError, match="take one SDE"):
        deis.sample_linear(
            deis.make_linear_plan(deis.CLD(lambda t: 4.0), "tab0", 2), deis.LinearDenoiser(lambda x, t: x, faster, "v"), Z
        )
    with pytest.raises(ValueError, match=r"make it with make_linear_plan\(..., predicts='L'\)"):
        deis.sample_linear(deis.make_linear_plan(CLD, "tab0", 2), model, Z)
    with pytest.raises(ValueError, match=r"takes \(k, batch, channels, ...\)"):
        deis.sample_linear(deis.make_linear_plan(CLD, "tab0", 2, K="L"), model, Z[:, :, 0, 0])
    with pytest.raises(ValueError, match="returned shape"):  # half of the blocks
        deis.sample_linear(deis.make_linear_plan(CLD, "tab0", 2, K="L"), deis.LinearDenoiser(lambda x, t: x[:, :1], CLD, "L"), Z)
    scalar = deis.Denoiser(Scalar("v"), deis.VPSDE.linear(), "v")
    with pytest.raises(TypeError, match=r"give deis.LinearDenoiser\(model, sde\)"):
        deis.sample_linear(deis.make_linear_plan(CLD, "tab0", 2), scalar, Z)


# --- trained ones ---------------------------------------------------------------------------------------------------------


def test_the_bundled_network_samples_by_langevin_diffusion() -> None:
    """It ends where its own eps in position and velocity ends, by the flow, with labels and guidance."""
    network, noise = (
        deis.load_model(),
        CLD.noise(torch.from_numpy(np.random.default_rng(3).standard_normal((2, 2, 1, 28, 28))).float()),
    )
    model = deis.LinearDenoiser(network.conditional([3, 1], guidance=2.0), CLD)
    fine = deis.sample_linear(deis.make_linear_plan(CLD, "tab3", 40), model, noise)
    coarse = deis.sample_linear(deis.make_linear_plan(CLD, "tab2", 20), model, noise)
    assert (fine - coarse).square().mean().sqrt() < 0.15
    assert ((fine.abs() - 1).abs() < 0.2).float().mean() > 0.8  # ink and paper


def test_the_bundled_network_of_frequencies_draws_digits() -> None:
    network = deis.load_model("mnist-blurring")
    assert network.sde.name == deis.Blurring((28, 28), 10.0, 0.01).name
    z = torch.from_numpy(np.random.default_rng(3).standard_normal((3, 1, 28, 28))).float()
    plan, labels = deis.make_linear_plan(network.sde, "tab2", 10), [0, 1, 7]
    digits = deis.sample_linear(plan, network.conditional(labels), network.noise(z))
    assert ((digits.abs() - 1).abs() < 0.2).float().mean() > 0.8  # ink and paper
    parts_of_paper = [ndimage.label(digit[0] < 0)[1] for digit in digits.numpy()]
    assert parts_of_paper == [2, 1, 1]  # a zero has a hole
    in_jax = deis.load_model("mnist-blurring", backend="jax")
    found = deis.sample_linear(plan, in_jax.conditional(labels), in_jax.noise(jnp.asarray(z.numpy())))
    np.testing.assert_allclose(found, digits, rtol=0, atol=2e-3)


def test_a_trained_folder_runs_in_torch_and_jax(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 28, 28), np.uint8), rng.integers(0, 10, 64)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    script, model = ROOT / "training" / "train_mnist.py", tmp_path / "model"
    files: list[str | Path] = ["--data", tmp_path / "data.npz", "--out", model]
    files += ["--state", tmp_path / "state.pt", "--log", tmp_path / "log.csv"]
    subprocess.run(
        [sys.executable, script, *files, "--sde", "cld", "--batch", "8", "--steps", "2"], check=True, capture_output=True
    )
    in_torch, in_jax = (deis.load_model(model, backend=backend) for backend in ("torch", "jax"))
    assert isinstance(in_torch, PretrainedLinear)
    assert in_torch.shape == (1, 28, 28)
    assert in_torch.sde.name == CLD.name
    z = rng.standard_normal((3, 2, 28, 28)).astype(np.float32)
    outputs = [model.conditional().model(*values) for model, *values in [
        (in_torch, torch.from_numpy(z), torch.full((3,), 0.3)), (in_jax, jnp.asarray(z), jnp.full(3, 0.3))
    ]]  # fmt: skip
    assert outputs[0].shape == (3, 2, 28, 28)
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=0, atol=1e-4)
    plan = deis.make_linear_plan(in_torch.sde, "tab1", 2)
    wanted = deis.sample_linear(plan, in_torch.conditional([0, 1, 2], 1.5), in_torch.noise(torch.from_numpy(z)))
    assert wanted.shape == (3, 1, 28, 28)
    with pytest.raises(ValueError, match="labels"):
        in_torch.conditional([0, 10])
    with pytest.raises(ValueError, match="needs labels"):
        in_torch.conditional(guidance=2.0)


def test_a_network_of_frequencies_is_refused_where_scalar_schedules_are_wanted(tmp_path: Path) -> None:
    network, z = deis.load_model("mnist-blurring"), torch.zeros(1, 1, 28, 28)
    plan = deis.make_plan(deis.VPSDE.linear(), nfe=2)
    for model in (network, network.conditional()):
        with pytest.raises(TypeError, match="model must be a function"):
            deis.sample(plan, model, z)
    with pytest.raises(ValueError, match=r"a linear SDE, which runs in Python only, by deis.sample_linear"):
        deis.generate(tmp_path / "samples", 2, model="mnist-blurring")
    for command in (["sample", "--out", str(tmp_path / "x.png")], ["serve", "--port", "0"], ["evaluate"]):
        told = CliRunner().invoke(main, [*command, "--model", "mnist-blurring"])
        assert told.exit_code != 0
        assert "a linear SDE, which runs in Python only, by deis.sample_linear" in told.output


@pytest.mark.parametrize("name", ["cld", "psld", "blurring"])
def test_the_target_of_the_training_is_the_v_that_a_denoiser_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that returned the target exactly would have the x_0 that was drawn, at every noise level."""
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    diffusions: Any = importlib.import_module("diffusions")
    torch.manual_seed(0)
    diffusion = diffusions.DIFFUSIONS[name]()
    log_rho = torch.linspace(diffusion.low, diffusion.high, 9, dtype=torch.float64)[1:-1]
    x_0 = torch.randn(7, 1, 28, 28)
    u, t, v = diffusion.pair(log_rho, x_0)
    assert u.shape == (7, diffusion.channels, 28, 28)
    assert v.square().mean((1, 2, 3)).sqrt().numpy() == pytest.approx(1.0, abs=0.1)  # at unit scale for data of unit variance
    sde = {"cld": CLD, "psld": PSLD}.get(name) or deis.Blurring((28, 28), 10.0, 0.01)
    for i in range(7):
        times = np.array([float(t[i]), sde.t_end])
        plan = deis.make_linear_plan(sde, "tab0", 1, ts=times)
        state = u[i : i + 1].double().transpose(0, 1)[..., None, :, :] if sde.basis == "block" else u[i : i + 1].double()
        space = space_of(plan, backend_of(state))
        seen: list[Any] = []

        def threshold(found: Any, seen: list[Any] = seen) -> Any:
            seen.append(found)
            return found

        def network(x: Any, now: Any, i: int = i) -> Any:
            rest = torch.zeros_like(x[:, 1:])
            return torch.cat([v[i : i + 1].double(), rest], dim=1)

        model = deis.LinearDenoiser(network, sde, "v", threshold)
        reader = reader_of(plan, model, space, torch.float64)
        deis.sample_linear(plan, model, state)
        assert reader.rows[0].level.t == pytest.approx(float(t[i]))
        tolerance = 1e-3 * (1 + float(torch.exp(log_rho[i])))
        torch.testing.assert_close(seen[0], x_0[i : i + 1].double(), rtol=0, atol=min(tolerance, 0.02))


def test_a_deis_json_of_an_unknown_diffusion_is_refused(tmp_path: Path) -> None:
    for name, content in (
        ("config.json", {}),
        ("deis.json", {"schedule": {"type": "odd"}}),
        ("diffusion_pytorch_model.safetensors", {}),
    ):
        (tmp_path / name).write_text(
            json.dumps(
                content | ({"predicts": "v", "num_classes": 10, "null_class": 10, "time_scale": 1} if "schedule" in content else {})
            )
        )
    with pytest.raises(ValueError, match=r"schedule type 'odd' is unknown; the known ones are 'vp_linear'.*'blurring'"):
        deis.load_model(tmp_path)
