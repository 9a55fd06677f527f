"""Ancestral steps: a deterministic step to less noise than the end of the step has, and fresh noise for the rest.

A `Noise` says how the noise at the end of a step, of standard deviation sigma(end), is split: sigma(end)^2 = kept^2 + fresh^2. The
deterministic step goes to the noise level rho = kept / alpha(end), which k-diffusion calls sigma_down. No state of the plan lies
there. The step carries the law at the start to the law at that level, up to the error of its order. The fresh noise carries the
latter exactly to the law at the end. So the order of the samples' law is that of the deterministic step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..arguments import number
from ..arrays import Array
from ..plan import Plan
from ..quadrature import Form
from ..sde import Schedule
from .clocks import CLOCKS
from .layout import Builder, multistep_plan
from .noise import check_noise
from .published import multistep_weights
from .singlestep import SingleStep, Steps
from .step import check_form, choose_form, step_degrees

Noise = Callable[[Schedule, Array, Array], tuple[Array, Array]]
"""noise(sde, start, end) -> (kept, fresh), of times and deviations of shape (n,)."""
FROM_INFINITY = float(np.log(9999.0))
"""The log rho of the stage in a step from alpha = 0: that of sigma = 0.9999 in flow matching, as in ComfyUI."""


def ddim_noise(sde: Schedule, start: Array, end: Array, *, eta: float) -> tuple[Array, Array]:
    """Return DDIM's parts: fresh = eta sigma_t sqrt(1 - (rho_t / rho_s)^2) (arXiv 2010.02502, eq. 16)."""
    sigma = sde.sigma(end)
    fresh = eta * np.sqrt(-np.expm1(2 * (sde.log_rho(end) - sde.log_rho(start))))  # as a share of sigma
    return sigma * np.sqrt((1 - fresh) * (1 + fresh)), sigma * fresh


def flow_noise(sde: Schedule, start: Array, end: Array, *, eta: float) -> tuple[Array, Array]:
    """Return the parts for flow matching in ComfyUI ("RF"): down to the sigma of sigma_t (1 - eta (1 - sigma_t / sigma_s)).

    sigma is that of flow matching at the same noise level, sigma / (alpha + sigma), so that these steps exist for every schedule.
    """
    (alpha_s, sigma_s), (alpha, sigma) = flow_levels(sde, start), flow_levels(sde, end)
    gap = eta * sigma * (alpha - alpha_s) / sigma_s  # of the way from sigma down
    kept = sde.alpha(end) * (sigma - gap) / (alpha + gap)
    fall = sde.alpha(end) / alpha * gap / (alpha + gap)  # from the deviation sigma(end) to kept
    return kept, np.sqrt(fall * (sde.sigma(end) + kept))


def tcd_noise(sde: Schedule, start: Array, end: Array, *, gamma: float) -> tuple[Array, Array]:
    """Return the parts for trajectory consistency distillation: down to the time (1 - gamma) t (arXiv 2402.19159, algorithm 4)."""
    down = (1 - gamma) * end
    low, sigma = sde.log_rho(down if sde.num_times is None else np.floor(down)), sde.sigma(end)
    fall = np.where(np.isneginf(low), low, low - np.where(sigma > 0, sde.log_rho(end), 0.0))
    return sigma * np.exp(fall), sigma * np.sqrt(-np.expm1(2 * fall))


def flow_levels(sde: Schedule, t: Array) -> tuple[Array, Array]:
    """Return alpha and sigma of flow matching, whose sum is 1, at the noise level of a time."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return alpha / (alpha + sigma), sigma / (alpha + sigma)


def step_to(sde: Schedule, form: Form, start: Array, end: Array, kept: Array) -> tuple[Array, Array]:
    """Return c_x and c_p of DDIM's step c_x x + c_p p, to a state at `end` whose noise has the deviation `kept`."""
    if form == "eps":
        c_x = sde.alpha(end) / sde.alpha(start)
        return c_x, kept - c_x * sde.sigma(start)
    c_x = kept / sde.sigma(start)
    return c_x, sde.alpha(end) - c_x * sde.alpha(start)


def one_stage(name: str, noise: Noise, form: Form | None = None) -> Builder:
    """Return the ancestral method with one evaluation per step: DDIM's step, and noise."""

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        chosen = choose_form(sde, ts, form)
        kept, fresh = noise(sde, ts[:-1], ts[1:])
        psi, c_0 = step_to(sde, chosen, ts[:-1], ts[1:], kept)
        return multistep_plan(sde, ts, chosen, psi, c_0[:, None], name, grid, keep_z=fresh)

    return build


def tcd(gamma: float = 0.3, form: Form | None = None) -> Builder:
    """Return trajectory consistency sampling (Zheng et al., arXiv 2402.19159, algorithm 4): DDIM to (1 - gamma) t, and noise.

    gamma = 0 is DDIM and 1 nearly `renoise`. diffusers calls gamma eta.

    Raises
    ------
    ValueError
        If gamma lies outside [0, 1].
    """
    form = check_form(form)
    gamma = number("gamma", gamma, least=0, most=1)
    return one_stage(f"tcd(gamma={gamma:g})", partial(tcd_noise, gamma=gamma), form)


def ancestral_rf(eta: float = 1.0, form: Form | None = None) -> Builder:
    """Return ComfyUI's ancestral sampling of flow matching, see `flow_noise`; eta = 0 is DDIM.

    Raises
    ------
    ValueError
        If eta lies outside [0, 1].
    """
    form = check_form(form)
    eta = number("eta", eta, least=0, most=1)
    return one_stage(f"ancestral_rf(eta={eta:g})", partial(flow_noise, eta=eta), form)


def res_multistep_ancestral(eta: float = 1.0) -> Builder:
    """Return ComfyUI's ancestral form of RES (Zhang et al., arXiv 2308.02157): the line through two predictions, to kept noise.

    Its step lengths are h_i = log(rho_i / down_i), with down = kept / alpha, instead of those in log rho. In the limit of short
    steps they are 1 + eta^2 times as long. eta = 0 is `dpmpp_2m`, and eta = 1 is `sde_dpmpp_2m`.

    Raises
    ------
    ValueError
        If eta lies outside [0, 1].
    """
    eta = number("eta", eta, least=0, most=1)

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        kept, fresh = ddim_noise(sde, ts[:-1], ts[1:], eta=eta)
        psi, c_0 = step_to(sde, "data", ts[:-1], ts[1:], kept)
        with np.errstate(divide="ignore"):
            h = sde.log_rho(ts[:-1]) - np.log(kept / sde.alpha(ts[1:]))
        degrees = step_degrees(sde, ts, 1, CLOCKS["log_rho"], "data")
        c_p = np.zeros((len(psi), degrees.max() + 1))
        for i, degree in enumerate(degrees.tolist()):
            c_p[i, : degree + 1] = c_0[i] * multistep_weights(-h[i], h[i - degree : i] / h[i], "heun")
        name = f"res_multistep_ancestral(eta={eta:g})"
        return check_noise(multistep_plan(sde, ts, "data", psi, c_p, name, grid, keep_z=fresh), repr(eta), "eta")

    return build


def two_stage(name: str, form: Form, steps: Callable[..., Steps], noise: Callable[..., Any], eta: float = 1.0) -> SingleStep:
    """Return the ancestral method of the two-stage steps(sde, start, end, form, noise); its one-stage steps are DDIM's, and noise.

    Raises
    ------
    ValueError
        If eta lies outside [0, 1].
    """
    eta = number("eta", eta, least=0, most=1)
    parted: Noise = partial(noise, eta=eta)
    family = {1: partial(single, form=form, noise=parted), 2: partial(steps, form=form, noise=parted)}
    return SingleStep(f"{name}(eta={eta:g})", family, clean_end=True)


def single(sde: Schedule, start: Array, end: Array, form: Form, noise: Noise) -> Steps:
    """Return DDIM's steps, and noise."""
    kept, fresh = noise(sde, start, end)
    c_x, c_p = step_to(sde, choose_form(sde, start, form), start, end, kept)
    return Steps(form, start[:, None], c_x[:, None], c_p[:, None, None], fresh[:, None])


def double(
    sde: Schedule,
    times: tuple[Array, Array, Array],
    form: Form,
    middle_noise: tuple[Array, Array],
    end_noise: tuple[Array, Array],
    share: Array | float,
) -> Steps:
    """Return steps to the end with stages at times (start, middle): DDIM's along p_0, and along share p_1 + (1 - share) p_0.

    The fresh noise of the stage is carried on, and new noise is added at the end for what is still missing there.
    """
    start, middle, end = times
    choose_form(sde, start, form)
    c_p = np.zeros((len(start), 2, 2))
    c_x0, c_p[:, 0, 0] = step_to(sde, form, start, middle, middle_noise[0])
    c_x1, c_0 = step_to(sde, form, start, end, end_noise[0])
    c_p[:, 1, 0], c_p[:, 1, 1] = c_0 * (1 - share), c_0 * share
    old, new = middle_noise[1] / sde.sigma(middle), end_noise[1] / sde.sigma(end)
    missing = np.maximum((new - old) * (new + old), 0.0) / ((1 - old) * (1 + old))  # new^2 minus what is carried on of old^2
    c_z = np.stack([middle_noise[1], sde.sigma(end) * np.sqrt(missing)], axis=1)
    c_x = np.stack([c_x0, c_x1], axis=1)
    return Steps(form, np.stack([start, middle], axis=1), c_x, c_p, c_z)


def by_log_rho(sde: Schedule, start: Array, end: Array, form: Form, noise: Noise) -> Steps:
    """Return the steps whose stage, without noise, lies halfway in log rho to the level that they go to.

    In the eps form this is k-diffusion's DPM-Solver-2, in the data form DPM-Solver++ 2S.
    """
    kept, fresh = noise(sde, start, end)
    high = sde.log_rho(start)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_rho = (high + np.log(kept / sde.alpha(end))) / 2
    middle = sde.t_of_log_rho(np.where(np.isposinf(high), FROM_INFINITY, log_rho))
    middle = np.maximum(middle, end)  # at eta = 1 they are equal up to rounding
    return double(sde, (start, middle, end), form, (sde.sigma(middle), np.zeros_like(end)), (kept, fresh), 1.0)


def by_log_sigma(sde: Schedule, start: Array, end: Array, form: Form, noise: Noise) -> Steps:
    """Return the steps of DPM-Solver-2 on the velocity of flow matching, whose stage lies halfway in the log of its sigma."""
    kept, fresh = noise(sde, start, end)
    s = flow_levels(sde, start)[1]
    sigma = np.sqrt(s * kept / (kept + sde.alpha(end)))
    middle = np.maximum(sde.t_of_log_rho(np.log(sigma) - np.log1p(-sigma)), end)
    return double(sde, (start, middle, end), form, (sde.sigma(middle), np.zeros_like(end)), (kept, fresh), s / sigma)
