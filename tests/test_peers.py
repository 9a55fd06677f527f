"""Independent implementations of the same methods: diffusers' schedulers, published formulas transcribed, and SciPy's solvers."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from scipy import integrate
from scipy.integrate import solve_ivp

import deis

from .oracle import FEW_STEPS, two_modes

Array = NDArray[np.float64]
# Variance preserving, with t = sigma / alpha itself, so that the sigmas of others are our times.
BY_SIGMA = deis.VPSDE(lambda t: 1 / (1 + t**2), lambda abar: np.sqrt(1 / abar - 1), 0.0, 200.0)
X_T = np.random.default_rng(0).standard_normal((3, 4))


def eps(x: Any, t: Any) -> Any:
    """Nonlinear in x and smooth in log sigma, in NumPy and torch."""
    return (x + 0.3) / (1 + x**2) * (1 + 0.1 * (t[:, None] + 1) ** 0.5)


def theirs(scheduler: Any, steps: int, sigmas: list[float] | None = None, **arguments: Any) -> tuple[Array, Array]:
    """Run one of diffusers' schedulers in float64 throughout; return its sigmas and its sample."""
    scheduler.set_timesteps(steps)
    if sigmas is not None:
        scheduler.sigmas = torch.tensor(sigmas)
    scheduler.sigmas = scheduler.sigmas.double()
    x = torch.tensor(X_T)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(eps(x, scheduler.sigmas[i].repeat(3)), t, x, **arguments).prev_sample
        x = x.double()
    return scheduler.sigmas.numpy(), x.numpy()


def ours(method: Any, sigmas: Array, rng: Any = None, **options: Any) -> Array:
    plan = deis.make_plan(BY_SIGMA, method, sigmas=sigmas, **options)
    return np.asarray(deis.sample(plan, eps, torch.tensor(X_T), rng=rng))


KARRAS = {"use_karras_sigmas": True, "final_sigmas_type": "zero"}
PLAIN = {"final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("solver", "grid"),
    [("bh1", PLAIN), ("bh2", PLAIN), ("bh2", KARRAS)],  # its bh1 returns NaN where sigma ends at 0
    ids=["bh1, to sigma_min", "bh2, to sigma_min", "bh2, karras, to zero"],
)
def test_unipc_is_diffusers_unipc(grid: dict[str, Any], order: int, solver: str) -> None:
    scheduler = UniPCMultistepScheduler(solver_order=order, solver_type=solver, lower_order_final=True, **grid)
    sigmas, x_0 = theirs(scheduler, 9)
    np.testing.assert_allclose(ours(f"unipc{order}_{solver}", sigmas, lower_order_final=True), x_0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [KARRAS, PLAIN], ids=["karras, to zero", "to sigma_min"])
@pytest.mark.parametrize("order", [2, 3])
def test_published_dpmpp_is_diffusers_dpm_solver_multistep(grid: dict[str, Any], order: int) -> None:
    """Its step casts to float32, so that it agrees to that; `test_published_dpmpp_is_its_formula` goes further."""
    scheduler = DPMSolverMultistepScheduler(solver_order=order, lower_order_final=True, **grid)
    sigmas, x_0 = theirs(scheduler, 9)
    np.testing.assert_allclose(ours(f"dpmpp_{order}m_published", sigmas, lower_order_final=True), x_0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [2, 3])
def test_published_dpmpp_is_its_formula(order: int) -> None:
    """arXiv 2211.01095: algorithm 2, and the third order of its code, in float64, step by step."""
    sigmas = np.geomspace(20, 0.05, 8) * (1 + 0.1 * np.sin(np.arange(8)))
    alpha, lam = 1 / np.hypot(1, sigmas), -np.log(sigmas)
    sigma = alpha * sigmas
    x, x_0s = X_T.copy(), []
    for i in range(7):
        x_0s.append((x - sigma[i] * eps(x, np.full(3, sigmas[i]))) / alpha[i])
        h, x_0 = lam[i + 1] - lam[i], x_0s[-1]
        update = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * x_0
        if i >= 1:
            d_0 = (x_0 - x_0s[-2]) * h / (lam[i] - lam[i - 1])
        if i == 1 or (i > 1 and order == 2):
            update -= alpha[i + 1] * math.expm1(-h) * d_0 / 2
        elif i > 1:
            r_0, r_1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            d_1 = (x_0s[-2] - x_0s[-3]) / r_1
            first, second = d_0 + r_0 / (r_0 + r_1) * (d_0 - d_1), (d_0 - d_1) / (r_0 + r_1)
            update += alpha[i + 1] * (math.expm1(-h) / h + 1) * first
            update -= alpha[i + 1] * ((math.expm1(-h) + h) / h**2 - 0.5) * second
        x = update
    np.testing.assert_allclose(ours(f"dpmpp_{order}m_published", sigmas), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [2, 3])
def test_published_dpm_solver_is_its_formula(order: int, solver: str) -> None:
    """arXiv 2206.00927 in its multistep form, in float64, step by step; diffusers' own step casts to float32."""
    sigmas = np.geomspace(20, 0.05, 8) * (1 + 0.1 * np.sin(np.arange(8)))
    alpha, lam = 1 / np.hypot(1, sigmas), -np.log(sigmas)
    sigma = alpha * sigmas
    x, p = X_T.copy(), []
    for i in range(7):
        p.append(eps(x, np.full(3, sigmas[i])))
        h = lam[i + 1] - lam[i]
        update = alpha[i + 1] / alpha[i] * x - sigma[i + 1] * math.expm1(h) * p[-1]
        if i >= 1:
            d_0 = (p[-1] - p[-2]) * h / (lam[i] - lam[i - 1])
        if i == 1 or (i > 1 and order == 2):
            update -= sigma[i + 1] * (math.expm1(h) / 2 if solver == "midpoint" else math.expm1(h) / h - 1) * d_0
        elif i > 1:
            r_0, r_1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            d_1 = (p[-2] - p[-3]) / r_1
            first, second = d_0 + r_0 / (r_0 + r_1) * (d_0 - d_1), (d_0 - d_1) / (r_0 + r_1)
            update -= sigma[i + 1] * (math.expm1(h) / h - 1) * first
            update -= sigma[i + 1] * ((math.expm1(h) - h) / h**2 - 0.5) * second
        x = update
    name = f"dpm_solver_{order}m_published"
    np.testing.assert_allclose(ours(name, sigmas, solver=solver), x, rtol=1e-12, atol=1e-12)
    scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver", solver_order=order, solver_type=solver, **PLAIN)
    sigmas, x = theirs(scheduler, 9)
    np.testing.assert_allclose(ours(name, sigmas, solver=solver, lower_order_final=True), x, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("steps", [7, 8, 9])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("algorithm", "name"), [("dpmsolver", "dpm_solver"), ("dpmsolver++", "dpmpp")])
@pytest.mark.parametrize("lower", [False, True])
def test_published_singlestep_is_diffusers(algorithm: str, name: str, order: int, solver: str, steps: int, lower: bool) -> None:
    scheduler = DPMSolverSinglestepScheduler(
        algorithm_type=algorithm, solver_order=order, solver_type=solver, lower_order_final=lower, **PLAIN
    )
    sigmas, x = theirs(scheduler, steps)
    method = f"{name}_{order}s_published"
    mine = ours(method, sigmas, solver=solver, lower_order_final=lower)
    np.testing.assert_allclose(mine, x, rtol=1e-10, atol=1e-10)


def test_published_methods_say_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="solver='bh1' is unknown; the known ones are 'midpoint', 'heun'"):
        deis.get_method("dpmpp_2s_published", solver="bh1")
    with pytest.raises(ValueError, match="solver='bh1' is unknown"):
        deis.get_method("dpmpp_2m_published", solver="bh1")
    with pytest.raises(ValueError, match="adds noise in its last step, and cannot end at sigma = 0; end at the smallest noise"):
        deis.make_plan(deis.EDM(0.0), "dpm_solver_2m_published", 5, tau=1.0)
    with pytest.raises(ValueError, match=r"'dpmpp_2s_published' has stages in log rho, which is infinite at t=1\.0; use a"):
        deis.make_plan(deis.FlowMatching(), "dpmpp_2s_published", 5)


@FEW_STEPS
def test_published_stochastic_dpmpp_is_diffusers() -> None:
    """The same noise: one stream a sample here, one for the batch there, so a batch of one."""
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", final_sigmas_type="sigma_min", lower_order_final=False
    )
    scheduler.set_timesteps(12)
    sigmas, x = scheduler.sigmas.numpy(), torch.tensor(X_T[:1], dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(eps(x, torch.tensor(sigmas[i : i + 1])), t, x, generator=generator).prev_sample
    plan = deis.make_plan(BY_SIGMA, "sde_dpmpp_2m_published", sigmas=sigmas)
    rng = [torch.Generator().manual_seed(5)]
    mine = deis.sample(plan, eps, torch.tensor(X_T[:1], dtype=torch.float32), rng=rng)
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


ENDS = np.linspace(math.log(20), math.log(0.05), 4)  # of log sigma, of three steps


@pytest.mark.parametrize(("kind", "name"), [("dpmsolver", "dpm_solver_2"), ("dpmsolver++", "dpmpp_2s")])
def test_singlestep_is_diffusers_dpm_solver_singlestep(kind: str, name: str) -> None:
    """Order 2: its order 3 gives the middle stage the weights of order 2, and not those of the paper. It casts to float32."""
    log_sigma = [ENDS[k] + c * (ENDS[k + 1] - ENDS[k]) for k in range(3) for c in (0, 0.5)] + [ENDS[-1]]
    scheduler = DPMSolverSinglestepScheduler(
        solver_order=2, algorithm_type=kind, solver_type="midpoint", lower_order_final=False, final_sigmas_type="sigma_min"
    )
    _, x_0 = theirs(scheduler, 6, np.exp(log_sigma).tolist())
    np.testing.assert_allclose(ours(name, np.exp(ENDS)), x_0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "dpmpp_3s"])
def test_singlestep_is_its_formula(name: str) -> None:
    """arXiv 2206.00927, algorithm 1 and 2, and arXiv 2211.01095, algorithm 1 and appendix B, in float64."""
    data, third = name.startswith("dpmpp"), name[-2:] in ("_3", "3s")
    x = X_T.copy()

    def factors(log_sigma: float) -> tuple[float, float]:
        alpha = 1 / math.hypot(1, math.exp(log_sigma))
        return alpha, alpha * math.exp(log_sigma)

    def predict(x: Array, log_sigma: float) -> Array:
        alpha, sigma = factors(log_sigma)
        e = eps(x, np.full(3, math.exp(log_sigma)))
        return (x - sigma * e) / alpha if data else e

    for start, end in pairwise(ENDS.tolist()):
        h = start - end  # of lambda = -log sigma
        sign = -1 if data else 1
        ratio, scale = (1, 0) if data else (0, 1)  # x is carried by sigma_t / sigma_s, and p weighted by alpha_t; or the reverse

        def carry(r: float, start: float = start, h: float = h, ratio: int = ratio) -> float:
            return factors(start - r * h)[ratio] / factors(start)[ratio]

        def weight(r: float, start: float = start, h: float = h, scale: int = scale, sign: int = sign) -> float:
            return -factors(start - r * h)[scale] * math.expm1(sign * r * h)

        def slope(r: float, start: float = start, h: float = h, scale: int = scale, sign: int = sign) -> float:
            return -factors(start - r * h)[scale] * (math.expm1(sign * r * h) / (sign * r * h) - 1)

        p = predict(x, start)
        if not third:
            u = carry(0.5) * x + weight(0.5) * p
            x = carry(1) * x + weight(1) * predict(u, start - h / 2)
            continue
        r_1, r_2 = 1 / 3, 2 / 3
        u_1 = carry(r_1) * x + weight(r_1) * p
        d_1 = predict(u_1, start - r_1 * h) - p
        u_2 = carry(r_2) * x + weight(r_2) * p + r_2 / r_1 * slope(r_2) * d_1
        d_2 = predict(u_2, start - r_2 * h) - p
        x = carry(1) * x + weight(1) * p + slope(1) / r_2 * d_2
    np.testing.assert_allclose(ours(name, np.exp(ENDS)), x, rtol=1e-12, atol=1e-12)


def test_the_budget_of_a_third_order_method_is_split_as_dpm_solver_fast_does() -> None:
    """The orders of its steps on a grid that ends at sigma = 0; elsewhere a budget of full steps needs no cheaper ones."""
    scheduler = DPMSolverSinglestepScheduler(solver_order=3, lower_order_final=True)
    for nfe in range(4, 16):
        plan = deis.make_plan(deis.EDM(sampling_eps=0.0), "dpmpp_3s", nfe=nfe)
        numbers = np.diff(np.flatnonzero(plan.accepts), prepend=-1)
        assert [k + 1 for n in numbers for k in range(n)] == scheduler.get_order_list(nfe)


def k_diffusion_lms(order: int, sigmas: Array, i: int) -> list[float]:
    """The weights of k-diffusion's LMS: the Lagrange polynomials through sigma, integrated numerically over a step."""

    def basis(sigma: float, j: int) -> float:
        return math.prod((sigma - sigmas[i - k]) / (sigmas[i - j] - sigmas[i - k]) for k in range(order) if k != j)

    return [integrate.quad(basis, sigmas[i], sigmas[i + 1], args=(j,), epsabs=0, epsrel=1e-13)[0] for j in range(order)]


@pytest.mark.parametrize("order", [2, 4])
def test_lms_is_diffusers_and_k_diffusions_lms(order: int) -> None:
    """diffusers' is k-diffusion's, with the integral to 1e-4."""
    scheduler = LMSDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.double().numpy()
    plan = deis.make_plan(deis.EDM(sampling_eps=0.0), f"lms{order}", sigmas=sigmas)
    for i in range(order - 1, 8):
        np.testing.assert_allclose(plan.keep_p[i], k_diffusion_lms(order, sigmas, i), rtol=1e-11, atol=1e-12)
        scheduler.sigmas = torch.tensor(sigmas)
        coefficients = [scheduler.get_lms_coefficient(order, i, j) for j in range(order)]
        np.testing.assert_allclose(plan.keep_p[i], coefficients, rtol=1e-4)
    assert deis.make_plan(deis.EDM(), "lms4", 8) == deis.make_plan(deis.EDM(), deis.adams(clock="rho", name="lms4"), 8, "rho", 7)


def test_edm_heun_is_diffusers_heun_and_rho_rk_in_ve() -> None:
    scheduler = HeunDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(7)
    sigmas = torch.unique_consecutive(scheduler.sigmas).double().numpy()
    sde = deis.EDM(sampling_eps=0.0)
    x = torch.tensor(X_T) * sigmas[0]
    mine = deis.sample(deis.make_plan(sde, "edm_heun", sigmas=sigmas), eps, x)
    scheduler.sigmas = scheduler.sigmas.double()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(eps(x, scheduler.sigmas[i].repeat(3)), t, x).prev_sample
    torch.testing.assert_close(mine, x, rtol=1e-12, atol=1e-12)
    ve, heun = deis.EDM(), (deis.make_plan(deis.EDM(), name, 6, "rho", 7) for name in ("edm_heun", "rhork_2heun"))
    first, second = heun
    assert (first.nfe, ve.t_end) == (12, 0.002)
    for column in ("t", "keep_x", "keep_p", "next_x", "next_p"):
        np.testing.assert_array_equal(getattr(first, column), getattr(second, column))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_diffusers_ddim(eta: float) -> None:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod
    x = torch.tensor(X_T[:1])

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * (1 + t / 1000)[:, None]

    peer, generator = x, torch.Generator().manual_seed(3)
    for t in scheduler.timesteps:
        peer = scheduler.step(model(peer, t[None]), t, peer, eta=eta, generator=generator).prev_sample
    ts = scheduler.timesteps.tolist()
    # Its last step goes to alphas_cumprod[0], the last time of the "leading" grid itself.
    assert ts[-1] == 0
    plan = deis.make_plan(deis.VPSDE.discrete(alphas), "ddim", ts=ts, eta=eta)
    mine = deis.sample(plan, model, x, rng=[torch.Generator().manual_seed(3)])
    torch.testing.assert_close(mine, peer, rtol=2e-5, atol=2e-5)


def test_euler_of_flow_matching_is_ddim() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    x = torch.tensor(X_T, dtype=torch.float32)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * (1 + t)[:, None]

    plan = deis.make_plan(deis.FlowMatching(), "ddim", sigmas=None, ts=scheduler.sigmas.double().numpy())
    mine = deis.sample(plan, velocity, x, predicts="flow")
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, scheduler.sigmas[i].repeat(3)), t, x).prev_sample
    torch.testing.assert_close(mine, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_sa_solver_of_order_one_is_diffusers(tau: float) -> None:
    """Predictor and corrector of one node, which share the noise; its order 2 is not the paper's integral but a variant."""
    scheduler = SASolverScheduler(predictor_order=1, corrector_order=1, algorithm_type="data_prediction", tau_func=lambda t: tau)
    scheduler.set_timesteps(8)
    x, generator = torch.tensor(X_T[:1]), torch.Generator().manual_seed(1)
    sigmas = scheduler.sigmas.double().numpy()
    for i, t in enumerate(scheduler.timesteps[:-1]):
        x = scheduler.step(eps(x, torch.tensor(sigmas[i : i + 1])), t, x, generator=generator).prev_sample
    plan = deis.make_plan(BY_SIGMA, deis.adams("data", "log_rho", 0, 0, tau=tau), sigmas=sigmas[:-1])
    mine = deis.sample(plan, eps, torch.tensor(X_T[:1]), rng=[torch.Generator().manual_seed(1)])
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


def uni_c_weights(lam: Array, i: int, order: int, b_h: Callable[[float], float]) -> Array:
    """The weights of UniC (arXiv 2302.04867, section 3.2) for m(t_{i+1}), m(t_i), m(t_{i-1}), ..., in the data form, over alpha."""
    h = lam[i + 1] - lam[i]
    r = np.array([(lam[i - k] - lam[i]) / h for k in range(1, order)] + [1.0])
    phi = [-math.expm1(-h)]  # psi_k of the paper: integral of e^(-(1 - s) h) s^(k - 1) / (k - 1)! h
    for k in range(1, order + 1):
        value = integrate.quad(lambda s, k=k: h * math.exp(-(1 - s) * h) * s**k, 0, 1, epsabs=0, epsrel=1e-13)[0]
        phi.append(value)
    a = np.linalg.solve(np.vander(r, increasing=True).T, np.array(phi[1:]) / b_h(h))
    share = a * b_h(h) / r
    return np.concatenate([[share[-1], phi[0] - share.sum()], share[:-1]])


@pytest.mark.parametrize("b_h", [lambda h: h, math.expm1], ids=["bh1", "bh2"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_adams_moulton_corrector_is_unic(order: int, b_h: Callable[[float], float]) -> None:
    """Whatever B(h) is: its linear system has the weights of the exact integral for solution."""
    sigmas = np.geomspace(20, 0.05, 9) * (1 + 0.1 * np.sin(np.arange(9)))
    plan = deis.make_plan(BY_SIGMA, f"unipc{order}", sigmas=sigmas)
    for i in range(order - 1, 7):
        weights = uni_c_weights(-np.log(sigmas), i, order, b_h)
        # Row i + 1 corrects the step from t_i, and psi_{i+1} carries it on.
        corrector = plan.keep_p[i + 1, : order + 1] / plan.keep_x[i + 1] / plan.alpha[i + 1]
        np.testing.assert_allclose(corrector, weights, rtol=0, atol=1e-12)


def test_many_steps_are_the_solution_of_an_adaptive_solver() -> None:
    sde = deis.VPSDE.cosine()
    eps = two_modes(sde)[0]
    x_T = np.linspace(-2, 2, 5)

    def slope(log_rho: float, v: np.ndarray) -> np.ndarray:
        t = sde.t_of_log_rho(log_rho)
        return np.exp(log_rho) * eps(sde.alpha(t) * v, np.full(len(v), t))

    span = sde.log_rho([sde.t_start, sde.t_end])
    v_0 = solve_ivp(slope, tuple(span), x_T / sde.alpha(sde.t_start), method="LSODA", rtol=1e-11, atol=1e-12).y[:, -1]
    for method in ("tab3", "rhoab3", "rhork_4rk"):
        x_0 = deis.sample(deis.make_plan(sde, method, 400, ts_phase="log"), eps, x_T[:, None])[:, 0]
        np.testing.assert_allclose(x_0, sde.alpha(sde.t_end) * v_0, rtol=0, atol=2e-6)
