"""Samplers of ComfyUI, k-diffusion and diffusers, each in a few lines of float64 NumPy: what the builders are checked against.

The state is k-diffusion's, x = x_0 + sigma eps, whose sigma is our rho; where a name ends in `_flow` it is x = (1 - sigma) x_0 +
sigma eps. `denoise(x, sigma)` is the network's x_0, `sigmas` fall to the end, which may be 0, and `noise(i, k)` is the k-th
standard normal array of step i, from 0. Nothing here calls `deis`: each follows the formulas of its paper, lambda = -log sigma.

All were run beside ComfyUI 0.29.0 (commit 4f874c5e3a2fafb9938273c5f3fc47d2da017667) in float64, and beside the LCM and TCD
schedulers of diffusers 0.42.1, on grids of 5 and 8 steps that end at 0 and above it, and agree to 1e-12 of the largest value.
Where a sampler departs from its paper or its order so does this one; `exact=True` and `points=None` mend it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad

Array = NDArray[np.float64]
Denoise = Callable[[Array, float], Array]
Noise = Callable[[int, int], Array]


def ddim(x: Array, x_0: Array, s: float, t: float) -> Array:
    """Return the state at level t on the line through x at level s and x_0: true of both states, for their alphas are linear."""
    return t / s * x + (1 - t / s) * x_0


def ancestral(s: float, t: float, eta: float) -> tuple[float, float]:
    """Return (down, up): the level that DDIM goes to, and the deviation of the noise from there to t (arXiv 2010.02502)."""
    up = min(t, eta * t * np.sqrt((s - t) * (s + t)) / s)
    return np.sqrt((t - up) * (t + up)), up


def in_flow(sampler: Callable[..., Array]) -> Callable[..., Array]:
    """Return a sampler of the state (1 - sigma) x_0 + sigma eps, by scaling to that of x_0 + rho eps: what lambda's samplers do.

    The first sigma is below 1: ComfyUI lowers a first 1 to the sigma of 1e-4 of the way, and leaves x.
    """

    def run(denoise: Denoise, x: Array, sigmas: Array, *noise: Noise, **options: Any) -> Array:
        def scaled(y: Array, rho: float) -> Array:
            return denoise(y / (1 + rho), rho / (1 + rho))

        alphas = 1 - sigmas
        return alphas[-1] * sampler(scaled, x / alphas[0], sigmas / alphas, *noise, **options)

    return run


# --- deterministic, in k-diffusion's derivative d = (x - x_0) / sigma; the same lines sample a flow, whose velocity d then is -----


def heunpp2(denoise: Denoise, x: Array, sigmas: Array) -> Array:
    """Return sample_heunpp2: an Euler walk over up to three levels, whose slopes count by sigma over the *first* sigma.

    Three calls a step, two in the last but one, one in the last. The weights do not follow the step, so its order is 1.
    """
    last = len(sigmas) - 1
    for i in range(last):
        size = min(3, last - i)
        levels, y, slopes = sigmas[i : i + size + 1], x, []
        for s, t in pairwise(levels):
            slopes.append((y - denoise(y, s)) / s)
            y = y + (t - s) * slopes[-1]
        weights = levels[:size] / (size * sigmas[0])
        weights[0] = 1 - weights[1:].sum()
        x = x + (levels[1] - levels[0]) * np.tensordot(weights, slopes, 1)
    return x


def ipndm_v(denoise: Denoise, x: Array, sigmas: Array, order: int = 4, exact: bool = False) -> Array:
    """Return sample_ipndm_v: Adams-Bashforth on uneven sigmas; `exact` gives the true weights (linear multistep in sigma).

    In Newton's form x' = x + h (d[i] + m_1 d[i, i-1] + m_2 d[i, i-1, i-2] + ...), where m_k is the mean over u in [0, h] of
    prod_{j<k} (u + H_j) and H_j the way back to node j. As published m_2 and m_3 are off, and so is the oldest weight of order 4,
    so that the weights add up to 1 only on geometric steps. A step to 0 is Euler's.
    """
    slopes: list[Array] = []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        slopes = [(x - denoise(x, s)) / s, *slopes][:order]
        size, h = len(slopes) if t > 0 else 1, t - s
        H = s - sigmas[i - np.arange(size)]
        m = [sum(c / (k + 1) * h**k for k, c in enumerate(np.poly1d(-H[:j], r=True).coef[::-1])) for j in range(size)]
        if not exact and size > 2:
            m[2] = (H[1] * H[2] - h**2 / 3) / 2
        if not exact and size > 3:
            m[3] += h**2 * (h + H[1]) / 3 - h**3 / 6
        table, total = list(slopes[:size]), slopes[0]
        for k in range(1, size):
            table = [(table[j] - table[j + 1]) / (H[j + k] - H[j]) for j in range(size - k)]
            total = total + m[k] * table[0]
        if not exact and size > 3:
            h_1, h_2, h_3 = np.diff(H)
            total = total + m[3] / (h_2 * (h_2 + h_3) * H[3]) * (h_2 / h_3 - h_1 / h_2) * slopes[3]
        x = x + h * total
    return x


def gradient_estimation(denoise: Denoise, x: Array, sigmas: Array, ge_gamma: float = 2.0) -> Array:
    """Return sample_gradient_estimation (arXiv 2306.04848): Euler along gamma d_i + (1 - gamma) d_{i-1}; plain Euler to 0."""
    old = None
    for s, t in pairwise(sigmas):
        d = (x - denoise(x, s)) / s
        mixed = d if old is None or t == 0 else ge_gamma * d + (1 - ge_gamma) * old
        x, old = x + (t - s) * mixed, d
    return x


def dpm_fast(
    denoise: Denoise, x: Array, sigma_max: float, sigma_min: float, nfe: int, noise: Noise | None = None, eta: float = 0.0
) -> Array:
    """Return sample_dpm_fast: singlestep DPM-Solver (arXiv 2206.00927) of orders 3, ..., 3 and the rest of nfe, on even lambda.

    nfe = 3 k + q is k steps of order 3 and one of order q; where q = 0, it is k - 1 of order 3, one of 2 and one of 1. With eta a
    step goes to the ancestral `down`, but never below the end, and noise follows.
    """
    orders = [3] * (nfe // 3 - 1) + [2, 1] if nfe % 3 == 0 else [3] * (nfe // 3) + [nfe % 3]
    levels = np.geomspace(sigma_max, sigma_min, len(orders) + 1)
    for i, (order, s, t) in enumerate(zip(orders, levels[:-1], levels[1:], strict=True)):
        down = max(ancestral(s, t, eta)[0], sigma_min) if eta else t
        x = dpm_solver_step(denoise, x, s, down, order)
        if eta:
            assert noise is not None
            x = x + np.sqrt(max(t**2 - down**2, 0.0)) * noise(i, 0)
    return x


def dpm_solver_step(denoise: Denoise, x: Array, s: float, t: float, order: int) -> Array:
    """Return one step of DPM-Solver of order 1, 2 (r_1 = 1/2) or 3 (r_1 = 1/3, r_2 = 2/3): arXiv 2206.00927, algorithms 1 and 2."""

    def eps(y: Array, sigma: float) -> Array:
        return (y - denoise(y, sigma)) / sigma

    def second(c: float) -> float:
        """Return the weight of the eps' growth per unit of c h, integrated from s to the level at c h."""
        return s * (t / s) ** c * (1 - np.expm1(c * h) / (c * h))

    h, e = np.log(s / t), eps(x, s)
    if order == 1:
        return x + (t - s) * e
    r_1 = 1 / order
    middle = s * (t / s) ** r_1
    e_1 = eps(x + (middle - s) * e, middle)
    if order == 2:
        return x + (t - s) * e_1
    late = s * (t / s) ** (2 / 3)
    e_2 = eps(x + (late - s) * e + second(2 / 3) * 2 * (e_1 - e), late)
    return x + (t - s) * e + second(1.0) * 1.5 * (e_2 - e)


# --- noise over and over: consistency models --------------------------------------------------------------------------------------


def lcm(denoise: Denoise, x: Array, sigmas: Array, noise: Noise) -> Array:
    """Return sample_lcm, multistep consistency sampling (arXiv 2303.01469, algorithm 1): x_0, and all the noise anew.

    diffusers' scheduler is this with the denoiser c_out x_0 + c_skip x_t of its boundary scalings, where x_t is its own VP state.
    """
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x = denoise(x, s) + t * noise(i, 0)
    return x


def lcm_flow(denoise: Denoise, x: Array, sigmas: Array, noise: Noise) -> Array:
    """Return sample_lcm for flow matching: (1 - sigma) x_0 + sigma z."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x = (1 - t) * denoise(x, s) + t * noise(i, 0)
    return x


def tcd(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, down: Array) -> Array:
    """Return diffusers' TCDScheduler (arXiv 2402.19159, algorithm 4): DDIM to down[i], then diffusion up to sigmas[i + 1].

    down[i] is rho of the training time floor((1 - gamma) t_{i+1}); diffusers calls gamma eta, and ends at rho of time 0, not at 0.
    """
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x = ddim(x, denoise(x, s), s, down[i]) + np.sqrt((t - down[i]) * (t + down[i])) * noise(i, 0)
    return x


# --- ancestral: a deterministic step too far, and noise back up -------------------------------------------------------------------


def euler_ancestral(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, eta: float = 1.0) -> Array:
    """Return sample_euler_ancestral: DDIM of arXiv 2010.02502 with its eta."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        down, up = ancestral(s, t, eta)
        x = ddim(x, denoise(x, s), s, down) + up * noise(i, 0)
    return x


def dpm_2_step(denoise: Denoise, x: Array, s: float, t: float) -> Array:
    """Return k-diffusion's DPM-Solver-2 step: the derivative in the middle of log sigma, for both states; Euler's to 0."""
    x_0 = denoise(x, s)
    if t == 0:
        return x_0
    middle = np.sqrt(s * t)
    y = ddim(x, x_0, s, middle)
    return x + (t - s) * (y - denoise(y, middle)) / middle


def dpm_2_ancestral(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, eta: float = 1.0) -> Array:
    """Return sample_dpm_2_ancestral: DPM-Solver-2 to `down`, and noise."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        down, up = ancestral(s, t, eta)
        x = dpm_2_step(denoise, x, s, down) + up * noise(i, 0)
    return x


def dpmpp_2s_ancestral(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, eta: float = 1.0) -> Array:
    """Return sample_dpmpp_2s_ancestral: DPM-Solver++(2S) (arXiv 2211.01095) of the middle in lambda to `down`, and noise."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        down, up = ancestral(s, t, eta)
        x_0 = denoise(x, s)
        if down > 0:
            middle = np.sqrt(s * down)
            x_0 = denoise(ddim(x, x_0, s, middle), middle)
        x = ddim(x, x_0, s, down) + up * noise(i, 0)
    return x


def flow_down(s: float, t: float, eta: float) -> float:
    """Return the level that ancestral sampling of a flow goes to from s: t (1 - eta (1 - t / s))."""
    return t * (1 - eta * (1 - t / s))


def flow_up(x: Array, down: float, t: float, z: Array) -> Array:
    """Return a flow's state carried from level `down` up to t: by the ratio of the alphas, and noise for what is missing of t."""
    shrink = (1 - t) / (1 - down)
    return shrink * x + np.sqrt(max(t**2 - (shrink * down) ** 2, 0.0)) * z


def euler_ancestral_flow(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, eta: float = 1.0) -> Array:
    """Return sample_euler_ancestral_RF."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        down = flow_down(s, t, eta)
        x = flow_up(ddim(x, denoise(x, s), s, down), down, t, noise(i, 0))
    return x


def dpm_2_ancestral_flow(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, eta: float = 1.0) -> Array:
    """Return sample_dpm_2_ancestral_RF: the velocity in the middle of log sigma (of sigma, not of sigma / alpha)."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        down = flow_down(s, t, eta)
        x = flow_up(dpm_2_step(denoise, x, s, down), down, t, noise(i, 0))
    return x


def dpmpp_2s_ancestral_flow(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, eta: float = 1.0) -> Array:
    """Return sample_dpmpp_2s_ancestral_RF: x_0 in the middle of lambda = log((1 - sigma) / sigma); at 0.9999 from sigma = 1."""
    for i, (s, t) in enumerate(pairwise(sigmas)):
        down = flow_down(s, t, eta)
        x_0 = denoise(x, s)
        if t > 0:
            middle = 0.9999 if s == 1 else 1 / (1 + np.sqrt((1 - s) * (1 - down) / (s * down)))
            x_0 = denoise(ddim(x, x_0, s, middle), middle)
        x = flow_up(ddim(x, x_0, s, down), down, t, noise(i, 0))
    return x


def res_multistep_ancestral(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, eta: float = 1.0) -> Array:
    """Return sample_res_multistep_ancestral (arXiv 2308.02157): the exponential Adams-Bashforth step of two nodes, to `down`.

    Where eta > 0 both its lengths are those of steps to `down`, h = log(sigma_i / down_i), so the older node is at the distance of
    the step before and not at the last level. Their ratio is that of the steps in the limit.
    """
    old = None
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x_0 = denoise(x, s)
        down, up = ancestral(s, t, eta)
        new = ddim(x, x_0, s, down)
        if old is not None and down > 0:
            x_old, gap = old
            new = new + phi_2(np.log(s / down)) * np.log(s / down) / gap * (x_0 - x_old)
        x, old = new + up * noise(i, 0), (x_0, np.log(s / down) if down > 0 else np.inf)
    return x


def res_multistep(denoise: Denoise, x: Array, sigmas: Array) -> Array:
    """Return sample_res_multistep: the same without noise."""
    return res_multistep_ancestral(denoise, x, sigmas, lambda i, k: np.zeros_like(x), eta=0.0)


# --- the reverse SDE in lambda, whose rate of noise is eta: x / alpha has coefficient (t / s)^(1 + eta) on itself -----------------


def phi_1(z: float) -> float:
    """Return the integral over u in [0, 1] of z e^{-z (1 - u)}."""
    return float(-np.expm1(-z))


def phi_2(z: float) -> float:
    """Return that of u z e^{-z (1 - u)}."""
    return 1 - phi_1(z) / z


def sde_step(x: Array, x_0: Array, s: float, t: float, eta: float, z: Array) -> Array:
    """Return the exact step of the SDE for a constant x_0: SEEDS-1 (arXiv 2305.14267), SDE-DPM-Solver++(1) at eta = 1."""
    h = np.log(s / t)
    return t / s * np.exp(-eta * h) * x + phi_1((1 + eta) * h) * x_0 + t * np.sqrt(phi_1(2 * eta * h)) * z


def seeds(
    denoise: Denoise,
    x: Array,
    sigmas: Array,
    noise: Noise,
    nodes: tuple[float, ...],
    weights: Callable[[float], list[list[float]]],
    eta: float,
) -> Array:
    """Return an explicit exponential Runge-Kutta method whose stages lie on one path of the noise; the last node is 1.

    Stage k is (sigma_k / sigma_s) e^{-eta c_k h} x + sum_j a_kj x_0j + sigma_k w_k, where w_0 = 0 and w_k = e^{-g} w_{k-1} +
    sqrt(1 - e^{-2 g}) z_k, g = eta (c_k - c_{k-1}) h: one noise more a stage, and the former carried on. The step to 0 gives x_0.
    """
    for i, (s, t) in enumerate(pairwise(sigmas)):
        stages, y, w = [denoise(x, s)], x, np.zeros_like(x)
        if t == 0:
            return stages[0]
        h, before = np.log(s / t), 0.0
        for k, (c, row) in enumerate(zip(nodes, weights((1 + eta) * h), strict=True)):
            gap = eta * (c - before) * h
            w = np.exp(-gap) * w + np.sqrt(phi_1(2 * gap)) * noise(i, k)
            y = np.exp(-(1 + eta) * c * h) * x + np.tensordot(row, stages, 1) + s * np.exp(-c * h) * w
            before = c
            if k < len(nodes) - 1:
                stages.append(denoise(y, s * np.exp(-c * h)))
        x = y
    return x


def seeds_2(
    denoise: Denoise,
    x: Array,
    sigmas: Array,
    noise: Noise,
    r: float = 0.5,
    eta: float = 1.0,
    solver_type: Literal["phi_1", "phi_2"] = "phi_1",
) -> Array:
    """Return sample_seeds_2 (arXiv 2305.14267); its weights are phi_1(z) (1 - 1/2r, 1/2r), or phi_1(z) - b, b = phi_2(z) / r."""

    def weights(z: float) -> list[list[float]]:
        b = phi_1(z) / (2 * r) if solver_type == "phi_1" else phi_2(z) / r
        return [[phi_1(r * z)], [phi_1(z) - b, b]]

    return seeds(denoise, x, sigmas, noise, (r, 1.0), weights, eta)


exp_heun_2_x0_sde = partial(seeds_2, r=1.0, solver_type="phi_2")
"""sample_exp_heun_2_x0_sde: the second stage is at the end of the step, and so has the whole of its noise."""


def exp_heun_2_x0(denoise: Denoise, x: Array, sigmas: Array) -> Array:
    """Return sample_exp_heun_2_x0: the same without noise."""
    return exp_heun_2_x0_sde(denoise, x, sigmas, lambda i, k: np.zeros_like(x), eta=0.0)


def seeds_3(
    denoise: Denoise, x: Array, sigmas: Array, noise: Noise, r_1: float = 1 / 3, r_2: float = 2 / 3, eta: float = 1.0
) -> Array:
    """Return sample_seeds_3 (arXiv 2305.14267): three noises a step."""

    def weights(z: float) -> list[list[float]]:
        a, b = r_2 / r_1 * phi_2(r_2 * z), phi_2(z) / r_2
        return [[phi_1(r_1 * z)], [phi_1(r_2 * z) - a, a], [phi_1(z) - b, 0.0, b]]

    return seeds(denoise, x, sigmas, noise, (r_1, r_2, 1.0), weights, eta)


def dpmpp_sde(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, r: float = 0.5, eta: float = 1.0) -> Array:
    """Return sample_dpmpp_sde: an ancestral step to r h, and one of the mixed x_0 over the whole of h.

    noise(i, 0) is the stage's and noise(i, 1) that of the whole step: the end holds nothing of the stage's own. k-diffusion's
    Brownian tree correlates the two, by the root of the ratio of their lengths in sigma.
    """
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x_0 = denoise(x, s)
        if t == 0:
            return x_0
        middle = s * (t / s) ** r
        down, up = ancestral(s, middle, eta)
        other = denoise(ddim(x, x_0, s, down) + up * noise(i, 0), middle)
        down, up = ancestral(s, t, eta)
        x = ddim(x, x_0 + (other - x_0) / (2 * r), s, down) + up * noise(i, 1)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Array,
    sigmas: Array,
    noise: Noise,
    eta: float = 1.0,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
) -> Array:
    """Return sample_dpmpp_2m_sde: "heun" is the exact integral of the line through two predictions, "midpoint" half of phi_1."""
    x_old, before = x, np.nan
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x_0 = denoise(x, s)
        if t == 0:
            return x_0
        h = np.log(s / t)
        x = sde_step(x, x_0, s, t, eta, noise(i, 0))
        if i > 0:
            z = (1 + eta) * h
            x = x + (phi_2(z) if solver_type == "heun" else phi_1(z) / 2) * h / before * (x_0 - x_old)
        x_old, before = x_0, h
    return x


def dpmpp_3m_sde(denoise: Denoise, x: Array, sigmas: Array, noise: Noise, eta: float = 1.0) -> Array:
    """Return sample_dpmpp_3m_sde: DPM-Solver++(3M) with noise; of the parabola's last term half, as published."""
    past: list[Array] = []
    lambdas: list[float] = []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        past, lambdas = [denoise(x, s), *past][:3], [-np.log(s), *lambdas][:3]
        if t == 0:
            return past[0]
        h = np.log(s / t)
        z = (1 + eta) * h
        x = sde_step(x, past[0], s, t, eta, noise(i, 0))
        if i > 0:
            first = (past[0] - past[1]) / (lambdas[0] - lambdas[1])
            x = x + phi_2(z) * h * first
        if i > 1:
            second = (first - (past[1] - past[2]) / (lambdas[1] - lambdas[2])) / (lambdas[0] - lambdas[2])
            x = x + (phi_2(z) * h * (lambdas[0] - lambdas[1]) + (1 / 2 - phi_2(z) / z) * h**2) * second
    return x


def er_scaler(rho: Array | float) -> Array | float:
    """Return ER-SDE's default noise scale function, rho (e^{rho^0.3} + 10)."""
    return rho * (np.exp(rho**0.3) + 10)


def er_sde(
    denoise: Denoise,
    x: Array,
    sigmas: Array,
    noise: Noise,
    max_stage: int = 3,
    scaler: Callable[[Any], Any] = er_scaler,
    points: int | None = 200,
) -> Array:
    """Return sample_er_sde (arXiv 2309.06169, algorithms 1 to 3): Taylor's polynomial of x_0 in rho, from backward differences.

    With P the scaler, r = P(t) / P(s): x' = r x + (1 - r) x_0 + sum_{k=1,2} ((t - s)^k / k + P(t) int_t^s (rho - s)^(k-1) / P drho)
    x_0^(k) + sqrt(t^2 - (r s)^2) z. `points` is the number of the left Riemann sum for the integral; None has it exact. The second
    derivative is that of the differences at s and s_{-1}, twice over s - s_{-2}.
    """
    derivatives: list[Array] = []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        before, derivatives = derivatives, [denoise(x, s)]
        if t == 0:
            return derivatives[0]
        for k in range(1, min(max_stage, i + 1)):
            derivatives.append((derivatives[-1] - before[k - 1]) / ((s - sigmas[i - k]) / k))
        r = scaler(t) / scaler(s)
        x = r * x + (1 - r) * derivatives[0] + np.sqrt(max(t**2 - (r * s) ** 2, 0.0)) * noise(i, 0)
        for k, derivative in enumerate(derivatives[1:], 1):

            def integrand(rho: Any, s: float = s, k: int = k) -> Any:
                return (rho - s) ** (k - 1) / scaler(rho)

            if points is None:
                integral = quad(integrand, t, s, epsabs=0, epsrel=1e-13)[0]
            else:
                integral = float(integrand(t + (s - t) * np.arange(points) / points).mean()) * (s - t)
            x = x + ((t - s) ** k / k + scaler(t) * integral) * derivative
    return x


def sa_solver(
    denoise: Denoise,
    x: Array,
    sigmas: Array,
    noise: Noise,
    tau: Callable[[float], float],
    predictor_order: int = 3,
    corrector_order: int = 4,
) -> Array:
    """Return sample_sa_solver (arXiv 2309.05019, algorithm 1) as ComfyUI has it.

    The rate of a step is tau(sigma) at its end, for the predictor and for the corrector, which shares its noise. On a grid to 0 the
    orders fall to 1 (predictor) and 2 (corrector) in the last step above 0; the step to 0 gives x_0 and corrects nothing.
    """
    lambdas = -np.log(np.maximum(sigmas, np.finfo(float).tiny))
    u, weights = np.polynomial.legendre.leggauss(24)
    past: list[Array] = []

    def adams(i: int, nodes: Array) -> Array:
        """Return the integral over the step from level i of the polynomial through the newest of `past`."""
        h = lambdas[i + 1] - lambdas[i]
        at, rate = lambdas[i] + h * (1 + u) / 2, 1 + tau(sigmas[i + 1]) ** 2
        measure = weights * h / 2 * rate * np.exp(-rate * (lambdas[i + 1] - at))
        basis = [np.prod([(at - b) / (a - b) for b in nodes if b != a], axis=0) for a in nodes]
        return np.tensordot([measure @ (one * np.ones_like(at)) for one in basis], past[: len(nodes)], 1)

    accepted, carried = x, x
    last, to_zero = len(sigmas) - 1, sigmas[-1] == 0
    for i in range(last):
        past = [denoise(x, sigmas[i]), *past]
        if sigmas[i + 1] == 0:
            return past[0]
        if i > 0 and corrector_order > 0:
            size = min(corrector_order, i + 1, last - i if to_zero else i + 1)
            accepted = carried + adams(i - 1, lambdas[i - np.arange(size)])
        else:
            accepted = x
        size = min(predictor_order, i + 1, last - 1 - i if to_zero else i + 1)
        h, rate = lambdas[i + 1] - lambdas[i], tau(sigmas[i + 1]) ** 2
        carried = np.exp(-(1 + rate) * h) * accepted + sigmas[i + 1] * np.sqrt(phi_1(2 * rate * h)) * noise(i, 0)
        x = carried + adams(i, lambdas[i - np.arange(size)])
    return x
