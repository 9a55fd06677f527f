"""Editing: the law of added noise, plans that begin in the middle, pixels that are kept, and RePaint's passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deis
from deis.arrays import Array
from deis.backends import backend_of
from deis.edit import edit_plan
from deis.methods.registry import REGISTRY
from deis.repaint import resampled

from .oracle import FEW_STEPS, gaussian
from .test_coefficients import EVERY

SDE = deis.VPSDE.linear()
NAMES = [
    name
    for entry in REGISTRY
    for name in ([entry.name.replace("<q>", q) for q in "123"] if "<q>" in entry.name else [entry.name.replace("<tableau>", "4rk")])
]
X_0 = np.random.default_rng(3).uniform(-1, 1, (3, 2, 4, 4))
MASK = np.zeros((1, 1, 4, 4), bool)
MASK[..., :2] = True
KNOWN = ~np.broadcast_to(MASK, X_0.shape)
MAKERS: dict[str, tuple[Callable[[Any], Any], Callable[[int], Any]]] = {
    "numpy": (np.asarray, lambda n: [np.random.default_rng((7, i)) for i in range(n)]),
    "torch": (torch.tensor, lambda n: [torch.Generator().manual_seed(i) for i in range(n)]),
    "jax": (jnp.asarray, lambda n: jax.random.split(jax.random.key(7), n)),
}


def mixing(x: Any, t: Any) -> Any:
    """A prediction of eps that is nonlinear, and mixes pixels."""
    xp = backend_of(x).xp
    return xp.tanh(x + 0.3 * xp.roll(x, 1, -1) - 0.2 * xp.roll(x, 1, -2))


def pixelwise(x: Any, t: Any) -> Any:
    return backend_of(x).xp.tanh(1.5 * x)


MIXING, PIXELWISE = deis.Denoiser(mixing, SDE), deis.Denoiser(pixelwise, SDE)


class Counted:
    """A network that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Any, t: Any) -> Any:
        self.calls += 1
        return pixelwise(x, t)


def host(x: Any) -> Array:
    return backend_of(x).to_host(x)


# --- strength ----------------------------------------------------------------------------------------------------------


def test_strength_is_a_share_of_the_time_of_the_linear_vp_schedule() -> None:
    for strength in (0.01, 0.3, 0.75, 1.0):
        expected = SDE.t_end + strength * (SDE.t_start - SDE.t_end)
        assert SDE.between(strength=strength).t_start == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sde", EVERY, ids=lambda sde: sde.name)
def test_strength_rises_with_noise_on_every_schedule_and_1_is_its_start(sde: deis.Schedule) -> None:
    starts = [sde.between(strength=strength).t_start for strength in (0.05, 0.3, 0.5, 0.9, 1.0)]
    assert (np.diff(starts) > 0).all()
    assert starts[-1] == sde.t_start
    assert starts[0] > sde.t_end


def test_one_strength_is_one_noise_level_of_schedules_with_the_same_ends() -> None:
    low, high = (float(SDE.rho(t)) for t in (SDE.t_end, SDE.t_start))
    for other in (deis.EDM(low, high), deis.VPSDE.cosine(), deis.FlowMatching()):
        part = other.between(float(other.t_of_rho(high)), float(other.t_of_rho(low)))
        for strength in (0.2, 0.5, 0.8):
            own, its = (sde.rho(sde.between(strength=strength).t_start) for sde in (SDE, part))
            assert own == pytest.approx(its, rel=1e-6)


def test_a_discrete_schedule_starts_at_the_next_of_its_times() -> None:
    sde = deis.VPSDE.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    for strength in (1e-6, 0.3, 0.5001, 0.9999):
        t = sde.between(strength=strength).t_start
        assert t == np.rint(t)
        assert t >= sde.t_end + max(1, strength * (sde.t_start - sde.t_end) - 2)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), "0.5", None, True])
def test_other_strengths_are_refused(strength: Any) -> None:
    plan, rng = deis.make_plan(SDE, "tab2", 4), np.random.default_rng(0)
    with pytest.raises(ValueError, match="strength="):
        deis.image_to_image(plan, MIXING, X_0, strength, rng=rng)
    if strength is not None:
        with pytest.raises(ValueError, match="strength="):
            SDE.between(strength=strength)
    with pytest.raises(ValueError, match="both say where to start"):
        SDE.between(0.5, strength=0.5)


# --- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", MAKERS)
def test_added_noise_has_the_law_of_the_schedule(backend: str) -> None:
    make, streams = MAKERS[backend]
    x_0 = make(np.stack([np.full(40_000, v, np.float32) for v in (-1.0, 0.5)]))
    for t in (0.3, np.array([0.1, 0.8])):
        x = host(deis.add_noise(SDE, x_0, t, streams(2)))
        z = (x - SDE.alpha(t).reshape(-1, 1) * host(x_0)) / SDE.sigma(t).reshape(-1, 1)
        np.testing.assert_allclose(z.mean(1), 0, atol=5 / 200)
        np.testing.assert_allclose(z.std(1), 1, atol=5 / 280)
        assert abs(float((z[0] * z[1]).mean())) < 5 / 200


@pytest.mark.parametrize("backend", MAKERS)
def test_added_noise_is_of_the_sample_alone_and_keeps_the_dtype(backend: str) -> None:
    make, streams = MAKERS[backend]
    x_0 = make(X_0.astype(np.float32))
    whole = deis.add_noise(SDE, x_0, 0.4, streams(3))
    np.testing.assert_array_equal(host(deis.add_noise(SDE, x_0[:1], 0.4, streams(3)[:1])), host(whole)[:1])
    assert whole.dtype == x_0.dtype
    half = deis.add_noise(SDE, make(X_0.astype(np.float16)), [0.1, 0.2, 0.3], streams(3))
    assert "float16" in str(half.dtype)
    each = [deis.add_noise(SDE, x_0[i : i + 1], t, streams(3)[i : i + 1]) for i, t in enumerate((0.1, 0.2, 0.3))]
    np.testing.assert_allclose(host(half), np.concatenate([host(x) for x in each]), atol=4e-3)


def test_no_noise_at_sigma_0() -> None:
    np.testing.assert_array_equal(deis.add_noise(deis.FlowMatching(), X_0, 0.0, np.random.default_rng(0)), X_0)


def test_a_jax_key_makes_other_noise_for_the_picture_than_for_the_plan() -> None:
    key, zeros = jax.random.key(0), jnp.zeros((1, 50))
    z = deis.add_noise(deis.VESDE(), zeros, 1.0, key) / 50
    add_noise = backend_of(zeros).noise(key, 1)
    assert all(float(jnp.abs(add_noise(1.0, zeros, i=i) - z).max()) > 0.5 for i in range(100))


# --- image-to-image ----------------------------------------------------------------------------------------------------


@FEW_STEPS
@pytest.mark.parametrize(("name", "backend"), [(n, b) for b in MAKERS for n in ("tab3", "dpm_solver_2", "ancestral")][:-2])
def test_image_to_image_is_the_cut_plan_by_hand(name: str, backend: str) -> None:
    make, streams = MAKERS[backend]
    plan, x_0 = deis.make_plan(SDE, name, 6), make(X_0)
    part = deis.cut_plan(plan, SDE, SDE.between(strength=0.4).t_start)
    rng = streams(3)
    by_hand = deis.sample(part, MIXING, deis.add_noise(SDE, x_0, float(part.t[0]), rng), rng=rng)
    edited = deis.image_to_image(plan, MIXING, x_0, 0.4, rng=streams(3))
    np.testing.assert_array_equal(host(edited), host(by_hand))
    assert edited.dtype == x_0.dtype


@pytest.mark.parametrize("backend", MAKERS)
def test_at_strength_1_it_is_sampling_from_pure_noise(backend: str) -> None:
    make, streams = MAKERS[backend]
    plan, x_0 = deis.make_plan(SDE, "tab3", 6), make(X_0)
    x_T = deis.add_noise(SDE, 0 * x_0, SDE.t_start, streams(3))
    sampled = host(deis.sample(plan, MIXING, x_T))
    np.testing.assert_array_equal(host(deis.image_to_image(plan, MIXING, x_0, 1, rng=streams(3))), sampled)
    everywhere = np.ones((1, 1, 4, 4))
    np.testing.assert_array_equal(host(deis.inpaint(plan, MIXING, x_0, everywhere, rng=streams(3))), sampled)


def test_a_plan_made_for_the_strength_is_run_as_it_is() -> None:
    part = SDE.between(strength=0.6)
    plan = deis.make_plan(part, "tab2", nfe=5)
    assert edit_plan(plan, SDE, 0.6) is plan
    calibrated = replace(plan, fitted="a test", provenance={"stages": []})
    assert edit_plan(calibrated, SDE, 0.6) is calibrated
    with pytest.raises(ValueError, match=r"strength=0\.7 begins at t=0\.7\d*, and the plan 'tab2' later, at t=0\.6"):
        edit_plan(plan, SDE, 0.7)


def test_a_calibrated_plan_that_is_cut_gives_way_and_says_so() -> None:
    plan = replace(deis.make_plan(SDE, "tab3", 6), fitted="a test", provenance={"stages": []})
    with pytest.warns(UserWarning, match="was calibrated as a whole"):
        deis.image_to_image(plan, MIXING, X_0, 0.4, rng=np.random.default_rng(0))
    with pytest.warns(UserWarning, match="was calibrated as a whole"):
        deis.inpaint(plan, MIXING, X_0, MASK, resample=2, rng=np.random.default_rng(0))
    assert edit_plan(plan, SDE, 1.0) is plan


# --- inpainting --------------------------------------------------------------------------------------------------------


@FEW_STEPS
@pytest.mark.parametrize("name", NAMES)
def test_the_known_pixels_are_noised_exactly_in_every_state_and_clean_at_the_end(name: str) -> None:
    """Under a deterministic plan with one noise a sample; under a stochastic one with that of the diffusion."""
    plan = deis.make_plan(SDE, name, 5)
    states: list[tuple[float, Array]] = []
    hidden = np.where(KNOWN, X_0, np.nan)
    rng = np.random.default_rng(0)
    found = deis.inpaint(plan, MIXING, hidden, MASK, rng=rng, callback=lambda i, t, x: states.append((t, x.copy())))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[KNOWN], X_0[KNOWN])
    noise = np.array([((x - SDE.alpha(t) * X_0) / SDE.sigma(t))[KNOWN] for t, x in states])
    if plan.stochastic:
        assert ((noise**2).mean(axis=1) > 0.5).all()
        assert ((noise**2).mean(axis=1) < 1.7).all()  # of 48 pixels
        assert (np.abs(np.diff(noise, axis=0)).max(axis=1) > 0.1).any()
    else:
        z = deis.add_noise(deis.VESDE(), 0 * X_0, 1.0, np.random.default_rng(0))[KNOWN] / 50
        if plan.fitted:  # Lawson's methods err in constant predictions, too
            return
        np.testing.assert_allclose(noise, np.broadcast_to(z, noise.shape), atol=1e-9)


@FEW_STEPS
def test_the_known_pixels_of_an_ancestral_plan_follow_the_diffusion_that_ends_in_them() -> None:
    """x_s given x_t and x_0 is the posterior of DDPM: cov(x_s, x_t) is that of the forward process, (alpha_t/alpha_s) sigma_s^2."""
    plan, x_0 = deis.make_plan(SDE, "ancestral", 4), np.zeros((1, 100_000, 1))
    states: list[Array] = []
    model = deis.Denoiser(lambda x, t: x, SDE)
    deis.inpaint(
        plan,
        model,
        x_0,
        np.zeros((1, 1, 1)),
        rng=np.random.default_rng(0),
        callback=lambda i, t, x: states.append(x.copy().ravel()),
    )
    for i in range(2):
        s, t = plan.ts[i + 2], plan.ts[i + 1]
        expected = SDE.alpha(t) / SDE.alpha(s) * SDE.sigma(s) ** 2
        assert np.cov(states[i + 1], states[i])[0, 1] == pytest.approx(expected, abs=0.02)


@FEW_STEPS
@pytest.mark.parametrize(
    ("name", "backend"), [(n, b) for b in MAKERS for n in ("ancestral", "tab3", "dpm_solver_3", "unipc2", "edm_heun")][:-4]
)
def test_where_pixels_are_independent_the_others_are_those_of_sampling(name: str, backend: str) -> None:
    make, streams = MAKERS[backend]
    plan, x_0, rng = deis.make_plan(SDE, name, 5), make(X_0), streams(3)
    x_T = deis.add_noise(SDE, 0 * x_0, SDE.t_start, rng)
    sampled = host(deis.sample(plan, PIXELWISE, x_T, rng=rng))
    painted = host(deis.inpaint(plan, PIXELWISE, x_0, MASK, rng=streams(3)))
    np.testing.assert_allclose(painted[~KNOWN], sampled[~KNOWN], rtol=1e-6 if backend == "jax" else 1e-13)
    np.testing.assert_array_equal(painted[KNOWN], host(x_0)[KNOWN])


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "flow"])
@pytest.mark.parametrize("sde", [SDE, deis.FlowMatching()], ids=["vp", "flow"])
def test_every_prediction_and_form_tells_the_same(predicts: str, sde: deis.Schedule) -> None:
    """The same network, told as each of the five, with a threshold that would clip the known pixels."""

    def eps_of(x: Any, t: Any) -> Any:
        return np.tanh(x)

    def model(x: Any, t: Any) -> Any:
        alpha, sigma = float(sde.alpha(t[0])), float(sde.sigma(t[0]))
        eps = eps_of(x, t)
        x_0 = x if alpha == 0 else (x - sigma * eps) / alpha
        return {"eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0, "score": -eps / max(sigma, 1e-30), "flow": eps - x_0}[
            predicts
        ]

    plan = deis.make_plan(sde.between(0.9, 0.01), "dpmpp_2m", 5)
    part = sde.between(0.9)
    x_0 = 3 * X_0
    threshold = deis.static_threshold(1.0)
    states: list[tuple[float, Array]] = []
    for limit in (None, threshold):
        denoiser = deis.Denoiser(model, part, predicts, limit)
        rng = np.random.default_rng(0)
        deis.inpaint(plan, denoiser, x_0, MASK, rng=rng, callback=lambda i, t, x: states.append((t, x.copy())))
    noise = np.array([((x - sde.alpha(t) * x_0) / sde.sigma(t))[KNOWN] for t, x in states])
    np.testing.assert_allclose(noise, np.broadcast_to(noise[0], noise.shape), atol=1e-9)
    plain = deis.inpaint(plan, deis.Denoiser(eps_of, part), x_0, MASK, rng=np.random.default_rng(0))
    found = deis.inpaint(plan, deis.Denoiser(model, part, predicts), x_0, MASK, rng=np.random.default_rng(0))
    np.testing.assert_allclose(found, plain, rtol=1e-9, atol=1e-9)


def test_order_2_survives_in_the_pixels_beside_known_ones() -> None:
    """One z a sample makes a smooth path, so that a multistep method converges at its order; fresh noise in each step does not."""
    x_0, errors = X_0[:1], []
    exact = deis.inpaint(deis.make_plan(SDE, "tab3", 640), MIXING, x_0, MASK, rng=np.random.default_rng(0))
    for steps in (40, 80):
        plan = deis.make_plan(SDE, "tab1", steps)
        errors.append(np.abs(deis.inpaint(plan, MIXING, x_0, MASK, rng=np.random.default_rng(0)) - exact).max())
    assert np.log2(errors[0] / errors[1]) > 1.7


@FEW_STEPS
@pytest.mark.parametrize("name", ["tab3", "ancestral"])
def test_parallel_evaluations_guidance_and_half_precision(name: str) -> None:
    labels = torch.tensor([0, 1, 2])

    def net(x: Any, t: Any, y: Any) -> Any:
        return torch.tanh(x + 0.2 * y[:, None, None, None])

    guided = deis.Denoiser(deis.classifier_free(net, labels, labels * 0, 2.0), SDE)
    x_0 = torch.tensor(X_0)
    for method, mask in ((name, torch.tensor(KNOWN)), ("parallel2", torch.tensor(MASK))):
        plan = deis.make_plan(SDE, method, 5)
        one, other = (
            deis.inpaint(plan, guided, x_0, mask, rng=MAKERS["torch"][1](3), parallel=parallel, resample=2)
            for parallel in (False, True)
        )
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    half = deis.inpaint(plan, guided, x_0.half(), torch.tensor(MASK), rng=MAKERS["torch"][1](3))
    assert half.dtype == torch.float16
    assert bool((half == x_0.half())[torch.tensor(KNOWN)].all())


# --- RePaint -----------------------------------------------------------------------------------------------------------


@FEW_STEPS
@pytest.mark.parametrize("name", NAMES)
def test_every_step_but_the_last_is_made_as_often_as_asked(name: str) -> None:
    """The plan checks itself that every pass carries alpha x_0 + sigma eps, and that a jump adds the noise that is missing."""
    plan = deis.make_plan(SDE, name, 4)
    passes = resampled(plan, SDE, 3)
    last = int(plan.calls[np.flatnonzero(plan.accepts)[-2] + 1 :].sum())
    assert passes.nfe == 3 * plan.nfe - 2 * last
    np.testing.assert_array_equal(passes.ts, plan.ts)
    assert passes.stochastic
    net = Counted()
    deis.inpaint(plan, deis.Denoiser(net, SDE), X_0, MASK, rng=np.random.default_rng(0), resample=3)
    assert net.calls == passes.nfe


def test_evaluations_are_those_of_the_cut_plan() -> None:
    for name, strength in (("tab3", 0.5), ("dpm_solver_3", 0.3), ("auto", 1.0)):
        net, plan = Counted(), deis.make_plan(SDE, name, 6)
        deis.image_to_image(plan, deis.Denoiser(net, SDE), X_0, strength, rng=np.random.default_rng(0))
        assert net.calls == deis.cut_plan(plan, SDE, SDE.between(strength=strength).t_start).nfe


def test_a_jump_goes_back_by_the_forward_diffusion() -> None:
    plan = resampled(deis.make_plan(SDE, "ddim", 3), SDE, 2)
    ts = plan.ts
    jump = plan.rows[1]
    ratio = SDE.alpha(ts[0]) / SDE.alpha(ts[1])
    assert (jump.calls, jump.accepts, jump.t) == (False, False, ts[1])
    assert jump.keep_x == pytest.approx(ratio, rel=1e-13)
    assert jump.keep_z**2 == pytest.approx(SDE.sigma(ts[0]) ** 2 - (ratio * SDE.sigma(ts[1])) ** 2, rel=1e-9)
    np.testing.assert_array_equal(plan.t[:3], [ts[0], ts[1], ts[0]])


def test_the_last_pass_of_a_step_knows_none_of_the_noise_before_it() -> None:
    """Its prediction has all the weight: those of another noise would not cancel."""
    plan = resampled(deis.make_plan(SDE, "tab3", 5), SDE, 2)
    begins = np.flatnonzero(~plan.calls) + 1
    assert len(begins) == 4
    for row in begins:
        assert (plan.keep_p[row, 1:] == 0).all()
        assert plan.keep_p[row + 1, 1] != 0  # the next step goes on from it


def correlated(rho: float) -> Callable[[Any, Any], Any]:
    """Return the exact eps of pairs, along the last axis, of N(0, [[1, rho], [rho, 1]])."""
    covariance = np.array([[1, rho], [rho, 1]])

    def eps(x: Any, t: Any) -> Any:
        alpha, sigma = SDE.alpha(t[0]), SDE.sigma(t[0])
        return sigma * x @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(2))

    return eps


@pytest.mark.parametrize("name", ["ancestral", "tab1"])
def test_resampling_draws_the_mean_to_that_of_the_posterior(name: str) -> None:
    """E[u | k] = rho k. All is linear, so that the mean over noises is a multiple of k; it comes nearer with every doubling."""
    rho, k = 0.9, 2.0
    pairs = np.zeros((1, 60_000, 2))
    pairs[..., 1] = k
    mask = np.zeros((1, 1, 2))
    mask[..., 0] = 1
    plan = deis.make_plan(SDE, name, 10)
    means = []
    for resample in (1, 2, 4, 8):
        found = deis.inpaint(
            plan, deis.Denoiser(correlated(rho), SDE), pairs, mask, rng=np.random.default_rng(5), resample=resample
        )
        means.append(found[..., 0].mean() / k)
    distance, error = rho - np.array(means), 4 / np.sqrt(60_000) / k  # four standard errors, of a variance of at most 1
    assert (distance > -error).all()
    assert (np.diff(distance) < error).all()
    assert distance[0] > 0.15
    assert distance[-1] < 0.5 * distance[0]


def test_a_plan_that_calls_ahead_is_refused_where_a_jump_would_waste_it() -> None:
    flow = deis.FlowMatching()
    with pytest.raises(ValueError, match=r"'parallel2' cannot be resampled \(row \d wastes an evaluation.*give resample=1"):
        resampled(deis.make_plan(flow, "parallel2", 5), flow, 2)


# --- backends ----------------------------------------------------------------------------------------------------------


@FEW_STEPS
@pytest.mark.parametrize("name", ["tab3", "unipc2", "dpm_solver_2"])
def test_backends_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same noise: each backend's own stream is replaced by one."""
    plan = deis.make_plan(SDE, name, 5)
    found = {}
    with jax.enable_x64(True):
        for backend, (make, _) in MAKERS.items():
            x_0 = make(X_0)
            record = backend_of(x_0)
            shared = replace(record, noise=_shared_noise)
            monkeypatch.setattr("deis.edit.backend_of", lambda x, shared=shared: shared)
            monkeypatch.setattr("deis.run.backend_of", lambda x, shared=shared: shared)
            found[backend] = host(deis.inpaint(plan, MIXING, x_0, make(MASK), rng=0, resample=2))
            monkeypatch.undo()
    np.testing.assert_allclose(found["torch"], found["numpy"], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(found["jax"], found["numpy"], rtol=1e-11, atol=1e-11)


def _shared_noise(rng: Any, batch: int) -> Callable[..., Any]:
    z = np.random.default_rng(0).standard_normal(X_0.shape)
    return lambda keep_z, x, i=0: x + keep_z * backend_of(x).like(z, x)


def test_jax_compiles_it_with_a_mask_that_is_traced() -> None:
    plan, x_0, key = deis.make_plan(SDE, "ancestral", 4), jnp.asarray(np.where(KNOWN, X_0, np.nan)), jax.random.key(0)

    def paint(x_0: Any, mask: Any, key: Any) -> Any:
        return deis.inpaint(plan, MIXING, x_0, mask, rng=key, resample=2)

    compiled = host(jax.jit(paint)(x_0, jnp.asarray(MASK), key))
    np.testing.assert_allclose(compiled, host(paint(x_0, MASK, key)), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="dtype float32, and its values cannot be looked at here; give one of bool"):
        jax.jit(paint)(x_0, jnp.asarray(MASK, jnp.float32), key)


@FEW_STEPS
@pytest.mark.parametrize(("name", "backend"), [("tab3", "numpy"), ("ancestral", "numpy"), ("ancestral", "torch"), ("tab2", "jax")])
def test_an_edit_depends_on_its_own_picture_and_stream_alone(name: str, backend: str) -> None:
    make, streams = MAKERS[backend]
    plan, x_0 = deis.make_plan(SDE, name, 4), make(X_0)
    for edit in (
        partial(deis.image_to_image, plan, MIXING, strength=0.5),
        partial(deis.inpaint, plan, MIXING, mask=MASK, strength=0.7, resample=2),
    )[backend == "jax" :]:
        whole, rest = host(edit(x_0=x_0, rng=streams(3))), host(edit(x_0=x_0[1:], rng=streams(3)[1:]))
        np.testing.assert_allclose(whole[1:], rest, rtol=1e-5, atol=1e-5 if backend == "jax" else 1e-12)


# --- guards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", MAKERS)
def test_what_is_no_mask_is_refused(backend: str) -> None:
    make, streams = MAKERS[backend]
    plan, x_0 = deis.make_plan(SDE, "tab2", 4), make(X_0)
    for shape in ((4, 4), (2, 1, 4, 4), (1, 3, 4, 4), (1, 1, 1, 4), ()):
        with pytest.raises(ValueError, match=r"mask of shape \(.*\) must have that of x_0, \(3, 2, 4, 4\)"):
            deis.inpaint(plan, MIXING, x_0, make(np.ones(shape)), rng=streams(3))
    for odd, text in ((0.5, r"mask holds 0\.5"), (np.nan, "mask holds nan"), (255, r"mask holds 255\.0")):
        with pytest.raises(ValueError, match=text):
            deis.inpaint(plan, MIXING, x_0, make(np.full((1, 1, 4, 4), odd)), rng=streams(3))
    for mask in (MASK, make(MASK), make(MASK.astype(np.float32)), make(MASK.astype(np.int32)), MASK.tolist()):
        np.testing.assert_array_equal(host(deis.inpaint(plan, MIXING, x_0, mask, rng=streams(3)))[KNOWN], host(x_0)[KNOWN])


@pytest.mark.parametrize("backend", MAKERS)
def test_pixels_that_are_no_numbers_are_refused_where_they_count(backend: str) -> None:
    make, streams = MAKERS[backend]
    plan = deis.make_plan(SDE, "tab2", 4)
    hidden, broken = make(np.where(KNOWN, X_0, np.nan)), make(np.where(KNOWN, np.inf, X_0))
    with pytest.raises(ValueError, match="in pixels that are known"):
        deis.inpaint(plan, MIXING, broken, MASK, rng=streams(3))
    with pytest.raises(ValueError, match="fill in every pixel"):
        deis.inpaint(plan, MIXING, hidden, MASK, rng=streams(3), strength=0.9)
    with pytest.raises(ValueError, match="fill in every pixel"):
        deis.image_to_image(plan, MIXING, hidden, 0.5, rng=streams(3))


def test_other_mistakes_are_named() -> None:
    plan, rng = deis.make_plan(SDE, "tab2", 4), np.random.default_rng(0)
    eps, _ = gaussian(SDE)
    with pytest.raises(TypeError, match=r"model must be a deis\.Denoiser or what deis\.load_model returns"):
        deis.image_to_image(plan, eps, X_0, 0.5, rng=rng)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plan must be"):
        deis.image_to_image("tab2", MIXING, X_0, 0.5, rng=rng)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rng must be"):
        deis.image_to_image(plan, MIXING, X_0, 0.5, rng=None)
    with pytest.raises(ValueError, match="resample=0 must be a whole number"):
        deis.inpaint(plan, MIXING, X_0, MASK, rng=rng, resample=0)
    with pytest.raises(ValueError, match="was made for the schedule"):
        deis.image_to_image(deis.make_plan(deis.VPSDE.cosine(), nfe=4), MIXING, X_0, 0.5, rng=rng)
    for t in (1.5, -0.1, np.nan, [0.1, 0.2]):
        with pytest.raises(ValueError, match="t="):
            deis.add_noise(SDE, X_0, t, rng)
    with pytest.raises(TypeError, match="x_0 must be"):
        deis.add_noise(SDE, X_0.tolist(), 0.5, rng)
    rising = deis.make_plan(SDE, "tab2", 4, direction="encode")
    for refused in (
        lambda: deis.image_to_image(rising, MIXING, X_0, 0.5, rng=rng),
        lambda: deis.inpaint(rising, MIXING, X_0, MASK, rng=rng),
        lambda: deis.cut_plan(rising, SDE, 0.5),
        lambda: deis.inpaint(deis.make_plan(SDE, "bdia", 4).reverse(), MIXING, X_0, MASK, rng=rng),
    ):
        with pytest.raises(ValueError, match=r"leads from data to noise|begins with two states"):
            refused()
    with pytest.raises(ValueError, match="returned shape"):
        deis.inpaint(plan, deis.Denoiser(lambda x, t: x[:, :1], SDE), X_0, MASK, rng=rng)
