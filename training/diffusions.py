"""What the MNIST network is trained on: the linear VP schedule, or a linear SDE of position and velocity or of frequencies.

A network predicts v, the part of the data that no linear function of the state knows, at unit scale: for data of unit variance,
with the state u = a x_0 + noise of covariance Sigma, S = a a^T + Sigma and c^2 = 1 - a^T S^-1 a,

    v = (a^T S^-1 u - x_0) / c

of one block. That is v = alpha eps - sigma x_0 for the VP schedule. With frequencies each of them has its own a, S and c. A state
of position and velocity enters as two channels, and one comes out: the velocity is noise alone, so that eps of both blocks,
K^-1 (u - a x_0), has no more unknowns than x_0. The velocity at t = 0 belongs to the noise (hybrid score matching, arXiv
2112.07068).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import deis
from deis.linear.dct import from_frequencies, to_frequencies

LOG_RHO_MEAN, LOG_RHO_STD, UNIFORM_SHARE = -0.3, 1.5, 0.2
SIZE = 28


@dataclass(frozen=True)
class Diffusion:
    """A diffusion as a training needs it.

    Attributes
    ----------
    schedule : dict
        What `deis.json` says of it.
    channels : int
        Of the state.
    low, high : float
        The range of ln rho, where rho^2 is the variance of the noise in the best linear estimate of x_0.
    pair : callable
        (ln rho of shape (batch,), x_0, device's generator) -> the state, the time and v.
    """

    schedule: dict[str, Any]
    channels: int
    low: float
    high: float
    pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def draw_log_rho(low: float, high: float, batch: int, device: torch.device) -> Tensor:
    """Return `batch` stratified ln rho: normal, and one in five uniform over the whole range."""
    u = (torch.arange(batch, dtype=torch.float64, device=device) + torch.rand(batch, device=device)) / batch
    even = round(UNIFORM_SHARE * batch)
    uniform = low + (high - low) * u[torch.randperm(batch, device=device)[:even]]
    normal = LOG_RHO_MEAN + LOG_RHO_STD * math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-9, 1 - 1e-9))
    chosen = torch.cat([uniform, normal[torch.randperm(batch, device=device)[even:]]])
    return chosen[torch.randperm(batch, device=device)].clamp(low, high)


# --- the linear VP schedule --------------------------------------------------------------------------------------------


def vp(beta_0: float = 0.01, beta_1: float = 20.0, t_end: float = 1e-3) -> Diffusion:
    def log_rho_of(t: float) -> float:
        return 0.5 * math.log(math.expm1(beta_0 * t + 0.5 * (beta_1 - beta_0) * t * t))

    def pair(log_rho: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # t is the root of beta_0 t + (beta_1 - beta_0) t^2 / 2 = log(1 + rho^2)
        integral = torch.logaddexp(torch.zeros_like(log_rho), 2 * log_rho)
        t = 2 * integral / (beta_0 + torch.sqrt(beta_0**2 + 2 * (beta_1 - beta_0) * integral))
        t = t.float().clamp(t_end, 1.0)
        log_abar = -(beta_0 * t + 0.5 * (beta_1 - beta_0) * t**2)[:, None, None, None]
        alpha, sigma = torch.exp(0.5 * log_abar), torch.sqrt(-torch.expm1(log_abar))
        eps = torch.randn(x_0.shape, device=x_0.device)
        return alpha * x_0 + sigma * eps, t, alpha * eps - sigma * x_0

    about = {"type": "vp_linear", "beta_0": beta_0, "beta_1": beta_1, "t_start": 1.0, "t_end": t_end}
    return Diffusion(about, 1, log_rho_of(t_end), log_rho_of(1.0), pair)


# --- linear SDEs -------------------------------------------------------------------------------------------------------


def linear(sde: deis.LinearSDE, schedule: dict[str, Any]) -> Diffusion:
    """Return the diffusion of a linear SDE: of blocks, or of frequencies, where rho is that of the lowest."""
    times = np.geomspace(sde.t_end, sde.t_start, 2000)
    known = np.log(sde.rho(times).reshape(len(times), -1)[:, 0])

    def pair(log_rho: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = np.exp(np.interp(log_rho.cpu().numpy(), known, np.log(times)))
        u, v = (of_blocks if sde.basis == "block" else of_frequencies)(sde, t, x_0)
        return u, torch.from_numpy(t).float().to(x_0.device), v

    channels = sde.shape[0] if sde.basis == "block" else 1
    return Diffusion(schedule, channels, float(known[0]), float(known[-1]), pair)


def of_blocks(sde: deis.LinearSDE, t: NDArray[np.float64], x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state of (batch, k, height, width), whose blocks are channels, and v."""
    a, L = sde.psi(t, 0.0)[:, :, 0], sde.K(t, "L")
    estimate = np.linalg.solve(a[:, :, None] * a[:, None, :] + sde.Sigma(t), a[:, :, None])[:, :, 0]
    c = (1 + sde.rho(t) ** -2) ** -0.5
    a_, L_, estimate_, c_ = (torch.from_numpy(values).float().to(x_0.device) for values in (a, L, estimate, c))
    z = torch.randn(len(x_0), len(a[0]), *x_0.shape[2:], device=x_0.device)
    u = a_[:, :, None, None] * x_0 + torch.einsum("bij,bjhw->bihw", L_, z)
    return u, (torch.einsum("bi,bihw->bhw", estimate_, u)[:, None] - x_0) / c_[:, None, None, None]


def of_frequencies(sde: deis.LinearSDE, t: NDArray[np.float64], x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state and v, both in pixels."""
    a, sigma = (torch.from_numpy(values).float().to(x_0.device)[:, None] for values in (sde.psi(t, 0.0), sde.K(t, "L")))
    clean, eps = to_frequencies(x_0, 2), torch.randn(x_0.shape, device=x_0.device)
    v = (a * eps - sigma * clean) / torch.sqrt(a**2 + sigma**2)
    return from_frequencies(a * clean + sigma * eps, 2), from_frequencies(v, 2)


DIFFUSIONS: dict[str, Callable[[], Diffusion]] = {
    "vp": vp,
    "cld": lambda: linear(deis.CLD(), {"type": "cld"}),
    "psld": lambda: linear(deis.PSLD(), {"type": "psld"}),
    "blurring": lambda: linear(
        deis.Blurring((SIZE, SIZE), 10.0, 0.01), {"type": "blurring", "shape": [SIZE, SIZE], "blur": 10.0, "least": 0.01}
    ),
}
