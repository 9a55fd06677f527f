"""Independent implementations of the same method: diffusers' DDIM, and SciPy on the probability-flow ODE."""

import numpy as np
import torch
from diffusers import DDIMScheduler
from scipy.integrate import solve_ivp

import deis

from .oracle import two_modes


def test_ddim_is_diffusers_ddim() -> None:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod
    x = torch.tensor(np.random.default_rng(0).standard_normal((3, 4)))

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * (1 + t / 1000)[:, None]

    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(eps(theirs, t.repeat(3)), t, theirs).prev_sample
    ts = scheduler.timesteps.tolist()
    # Its last step goes to alphas_cumprod[0], the last time of the "leading" grid itself.
    assert ts[-1] == 0
    plan = deis.make_plan(deis.VPSDE.discrete(alphas), "ddim", ts=ts)
    ours = deis.sample(plan, eps, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


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
