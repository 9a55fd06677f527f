"""Linear SDEs against closed forms in mpmath, their own differential equations, and the scalar schedules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpmath import mp
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

import deis
from deis.linear.dct import from_frequencies, to_frequencies

from .linear_oracle import Exact, to_numpy

Array = NDArray[np.float64]
TIMES = np.array([1e-3, 0.02, 0.31, 0.5, 0.97, 1.0])
CLD = deis.CLD()
TURNING = deis.LinearSDE(
    lambda t: [[-1.0 - t, 3 * t], [np.sin(5 * t), -2.0]],
    lambda t: [[1.0, 0.3], [t, 1 + t**2]],
    name="F(t) that does not commute with F(s)",
)
BLOCKS = [CLD, deis.PSLD(), deis.CLD(lambda t: 1 + 6 * t, 0.5, 0.4), TURNING]


def random_stable() -> tuple[deis.LinearSDE, Exact]:
    rng = np.random.default_rng(3)
    A = rng.standard_normal((3, 3)) - 3 * np.eye(3)
    B, start = rng.standard_normal((3, 3)), np.diag([0.0, 0.2, 0.1])
    return deis.LinearSDE(lambda t: A, lambda t: B, start), Exact(
        mp.matrix(A.tolist()), mp.matrix(B.tolist()), mp.matrix(start.tolist())
    )


def exact_cld() -> Exact:
    """beta = 4, M = 1/4 and Gamma = 1, critically damped, and gamma M = 1/100."""
    return Exact(mp.matrix([[0, 16], [-4, -16]]), mp.matrix([[0, 0], [0, mp.sqrt(8)]]), mp.matrix([[0, 0], [0, mp.mpf(0.04) / 4]]))


CLOSED = {"CLD": (CLD, exact_cld()), "random": random_stable()}


@pytest.mark.parametrize("name", CLOSED)
def test_psi_and_sigma_are_those_of_mpmath(name: str) -> None:
    sde, exact = CLOSED[name]
    for t in TIMES.tolist():
        Sigma = to_numpy(exact.covariance(t))
        np.testing.assert_allclose(sde.Sigma(t), Sigma, rtol=0, atol=1e-13 * np.abs(Sigma).max())
        np.testing.assert_allclose(sde.K(t, "L"), np.linalg.cholesky(Sigma), rtol=1e-10, atol=1e-12)
        for s in (0.0, 0.02, 1.0):
            psi = to_numpy(exact.psi(t, s))
            np.testing.assert_allclose(sde.psi(t, s), psi, atol=1e-12 * np.abs(psi).max())


def test_psi_of_cld_is_the_critically_damped_closed_form() -> None:
    """exp(A tau) = e^(lambda tau) (1 + (A - lambda) tau) with lambda = -1/sqrt(M), of the double eigenvalue (arXiv 2112.07068)."""
    A, tau = np.array([[0.0, 4], [-1, -4]]), 4 * 0.6
    closed = np.exp(-2 * tau) * (np.eye(2) + (A + 2 * np.eye(2)) * tau)
    np.testing.assert_allclose(CLD.psi(0.9, 0.3), closed, rtol=1e-12)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("ts", [[0.9, 0.55, 0.4], [0.2, 0.3, 0.45]], ids=["decode", "encode"])
def test_weights_are_those_of_mpmath(name: str, ts: list[float]) -> None:
    sde, exact = CLOSED[name]
    with mp.workdps(20):
        plan = deis.make_linear_plan(sde, "tab1", ts=ts, K="L", direction="encode" if ts[0] < ts[1] else "decode")
        wanted = exact.weights([ts[1], ts[0]], ts[1], ts[2], 2)
    np.testing.assert_allclose(plan.keep_p[1], wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("sde", BLOCKS, ids=lambda sde: sde.name)
def test_psi_is_a_semigroup_and_roots_are_roots(sde: deis.LinearSDE) -> None:
    one = np.eye(2)
    np.testing.assert_allclose(sde.psi(TIMES, TIMES), np.broadcast_to(one, (6, 2, 2)), atol=1e-13)
    product = sde.psi(TIMES, 0.31) @ sde.psi(0.31, 0.05)
    np.testing.assert_allclose(sde.psi(TIMES, 0.05), product, rtol=1e-12, atol=1e-12 * np.abs(product).max())
    np.testing.assert_allclose(sde.psi(0.2, 0.9) @ sde.psi(0.9, 0.2), one, atol=1e-11)
    for root in ("R", "L"):
        K = sde.K(TIMES, root)
        Sigma = sde.Sigma(TIMES)
        assert (np.abs(K @ K.swapaxes(1, 2) - Sigma).max(axis=(1, 2)) < 1e-12 * Sigma.max(axis=(1, 2))).all()
    assert not sde.K(TIMES, "L")[:, 0, 1].any()


@pytest.mark.parametrize("sde", BLOCKS, ids=lambda sde: sde.name)
def test_sigma_and_r_solve_their_equations(sde: deis.LinearSDE) -> None:
    start, end = 0.01, 0.8

    def slope(t: float, flat: Array) -> Array:
        Sigma, R = flat.reshape(2, 2, 2)
        F, G = np.asarray(sde.F(t)), np.asarray(sde.G(t))
        return np.stack([F @ Sigma + Sigma @ F.T + G @ G.T, (F + 0.5 * G @ G.T @ np.linalg.inv(Sigma)) @ R]).ravel()

    y = np.stack([sde.Sigma(start), sde.K(start)]).ravel()
    found = solve_ivp(slope, (start, end), y, method="DOP853", rtol=1e-13, atol=1e-15).y[:, -1].reshape(2, 2, 2)
    np.testing.assert_allclose(sde.Sigma(end), found[0], rtol=1e-10)
    np.testing.assert_allclose(sde.K(end), found[1], rtol=1e-10, atol=1e-11)


def one_block(sampling_eps: float = 1e-3) -> deis.LinearSDE:
    def beta(t: float) -> float:
        return 0.1 + 19.9 * t

    return deis.LinearSDE(lambda t: [[-beta(t) / 2]], lambda t: [[beta(t) ** 0.5]], sampling_eps=sampling_eps)


@pytest.mark.parametrize("sde", [one_block(), deis.FrequencyVP(np.ones((2, 3)))], ids=["k=1", "rates of 1"])
def test_one_block_is_the_scalar_schedule(sde: deis.LinearSDE) -> None:
    vp, ts = deis.VPSDE.linear(), np.linspace(1e-3, 1, 40)
    size = (-1, *(1,) * len(sde.shape))
    for found, wanted in (
        (sde.psi(ts, 0.0), vp.alpha(ts)),
        (sde.psi(0.3, ts), vp.alpha(0.3) / vp.alpha(ts)),
        (sde.K(ts), vp.sigma(ts)),
        (sde.K(ts, "L"), vp.sigma(ts)),
        (sde.Sigma(ts), vp.sigma(ts) ** 2),
    ):
        np.testing.assert_allclose(found, np.broadcast_to(wanted.reshape(size), found.shape), rtol=1e-12)


def test_blurring_has_the_marginals_of_its_paper() -> None:
    sde, n = deis.Blurring((6, 4), blur=3.0, least=0.01), (np.arange(6)[:, None] / 6, np.arange(4) / 4)
    for t in (1e-3, 0.4, 0.9946):
        sine = np.sin(np.pi * t / 2)
        d = 0.01 + 0.99 * np.exp(-(np.pi**2) * (n[0] ** 2 + n[1] ** 2) * (3 * sine**2) ** 2 / 2)
        np.testing.assert_allclose(sde.psi(t, 0.0), np.cos(np.pi * t / 2) * d, rtol=1e-12)
        np.testing.assert_allclose(sde.K(t), np.full((6, 4), sine), rtol=1e-12)


def test_phase_spaces_relax_to_their_equilibrium() -> None:
    for sde in (deis.CLD(20.0), deis.PSLD(40.0)):
        np.testing.assert_allclose(sde.Sigma(1.0), np.diag([1, 0.25]), atol=1e-9)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (5, 4)])
def test_the_transform_is_orthonormal_and_the_same_everywhere(shape: tuple[int, ...]) -> None:
    import jax
    import torch

    x, axes = np.random.default_rng(0).standard_normal((3, 2, *shape)), len(shape)
    y = to_frequencies(x, axes)
    n = shape[-1]
    matrix = np.sqrt(2 / n) * np.cos(np.pi * np.outer(np.arange(n), 2 * np.arange(n) + 1) / (2 * n))
    matrix[0] /= np.sqrt(2)
    np.testing.assert_allclose(to_frequencies(x, 1), x @ matrix.T, atol=1e-14)
    np.testing.assert_allclose(np.square(y).sum(), np.square(x).sum())
    with jax.enable_x64(True):
        for v in (torch.tensor(x), jax.numpy.asarray(x), x):
            found: Any = to_frequencies(v, axes)
            assert type(found) is type(v)
            np.testing.assert_allclose(np.asarray(found), y, atol=1e-14)
            np.testing.assert_allclose(np.asarray(from_frequencies(found, axes)), x, atol=1e-14)
    assert to_frequencies(torch.tensor(x, dtype=torch.float32), axes).dtype == torch.float32


def test_noise_has_the_covariance_of_the_start() -> None:
    z = np.eye(2)[:, :, None]  # two samples: each a unit of one block
    L = CLD.noise(z)[:, :, 0]
    np.testing.assert_allclose(L @ L.T, CLD.Sigma(1.0), rtol=1e-12)
    sde = deis.FrequencyVP(1 + np.arange(6.0).reshape(2, 3))
    x = sde.noise(from_frequencies(np.ones((1, 2, 3)), 2))
    np.testing.assert_allclose(to_frequencies(x, 2)[0], sde.K(1.0), rtol=1e-12)


ONE = np.eye(2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: deis.LinearSDE(lambda t: np.ones((2, 3)), lambda t: ONE), r"F must return .*\(k, k\).* shape \(2, 3\) at t=1.0"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: np.ones(2)), r"G must return the shape \(2, 2\) of F.*\(2,\) at t=0.0"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: ONE * (t or np.nan)), r"G is not finite at t=0.0"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: ONE * (1 + (t > 0.3))), r"not smooth, or very great, at t=0\.(29|30)"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: np.diag([1.0, 0])), r"Sigma at t=0.001 is not positive definite"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: ONE, np.ones((3, 3))), r"covariance must have the shape \(2, 2\)"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: ONE, -ONE), r"covariance=.* positive semi-definite"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: ONE, [[0, 1], [0, 0]]), r"covariance=.* symmetric"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: ONE, basis="dft"), "basis='dft' is unknown"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: ONE, sampling_eps=0.0), "sampling_eps=0.0 must be"),
        (lambda: deis.LinearSDE(lambda t: -ONE, lambda t: ONE, sampling_T=1e-4), "sampling_T=0.0001 must be"),
        (lambda: deis.CLD(lambda t: t - 0.5), r"beta\(0.0\)=-0.5 must be"),
        (lambda: deis.CLD(mass=0), "mass=0 must be"),
        (lambda: deis.CLD(friction=-1.0), "friction=-1.0 must be"),
        (lambda: deis.PSLD(nu=-1.0), "nu=-1.0 must be"),
        (lambda: deis.FrequencyVP([1.0, 0.0]), r"rates=\[1.0, 0.0\] must be"),
        (lambda: deis.Blurring(28), "shape=28 must be"),  # type: ignore[arg-type]
        (lambda: deis.Blurring((28, 28), sampling_T=1.0), "sampling_T=1.0 must be"),
        (lambda: CLD.psi(1.2, 0.0), r"t=1.2 leaves \[0.0, 1.0\]"),
        (lambda: CLD.Sigma(np.nan), r"t=nan leaves \[0.001, 1.0\]"),
        (lambda: CLD.psi([0.5, 0.6], [0.1, 0.2, 0.3]), r"t and s must have one shape"),
        (lambda: CLD.Sigma([]), r"t has shape \(0,\)"),
        (lambda: CLD.K(0.5, "M"), "root='M' is unknown"),
        (lambda: CLD.noise(np.ones((3, 5))), r"z must have shape \(2, batch, ...\)"),
    ],
)
def test_bad_input_is_refused_with_the_reason(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"F must be a function of \(t\)"):
        deis.LinearSDE(ONE, lambda t: ONE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"deis.make_linear_plan takes a deis.LinearSDE"):
        deis.make_plan(CLD, "ipndm")  # type: ignore[arg-type]
