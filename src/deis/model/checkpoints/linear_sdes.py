"""Checkpoints of networks of linear SDEs: of CLD-SGM (arXiv 2112.07068) and of gDDIM (arXiv 2206.05564)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...arguments import flag, number, one_of, shown
from ...arrays import Array
from ...linear.named import CLD, Blurring
from ...linear.pretrained import PretrainedLinear
from ...linear.sde import LinearSDE
from ..pretrained import Network
from . import flax_files, score_sde, torch_files
from .torch_files import StrPath

SDES = ("cld", "blurring")
_MASS, _GAMMA = 0.25, 0.04  # of every published configuration
_KIND = "a checkpoint of CLD-SGM or gDDIM"


def load_linear_sde(
    path: StrPath, device: str | None = None, dtype: str = "float32", *, sde: str = "cld", **options: Any
) -> PretrainedLinear:
    r"""Load NCSN++ or DDPM++ as CLD-SGM (arXiv 2112.07068, PyTorch) or gDDIM (arXiv 2206.05564, Flax) trained it.

    The file does not say of which SDE and parameterisation the network is. So these are options, by default as the authors
    published the networks. x has position and velocity one after another as channels, (batch, 2 c, height, width), for data in
    [-1, 1].

    With sde="cld", a network F of CLD-SGM returns the velocity's part of eps of L alone, and with mixed scores what a Gaussian
    leaves of it. Since the data are a position, that of the position follows, and so what is returned here, the score -L^-T eps::

        eps_v = F(x, v, t) + mixed L_vv v / Sigma_vv
        x_0   = (v - L_vx/L_xx x - L_vv eps_v) / (Psi_vx - L_vx/L_xx Psi_xx),   eps_x = (x - Psi_xx x_0) / L_xx

    where L L^T = Sigma has numerical_eps more on its diagonal. A plan wants predicts="score". A network of gDDIM returns eps of R,
    with mixed scores less R^-1 (0, v); R is L at t = 0, where the position has the variance numerical_eps. R of `LinearSDE` is L at
    sampling_eps, so eps is turned by the rotation between them. A plan wants predicts="R".

    With sde="blurring" the network is gDDIM's of blurring diffusion, and predicts eps of pixels.

    Parameters
    ----------
    path : path
        PyTorch's `checkpoint_*.pth`, a dict of `model`, `ema`, `optimizer` and `step`; or Flax's `checkpoint_*` with `params_ema`.
    device, dtype
        See `deis.load_model`.
    sde : {"cld", "blurring"}
    options
        size, as of `load_score_sde`. With "cld": beta=4.0, or [b_0, b_1] for b_0 + b_1 t, as [0.1, 6.9] of CelebA-HQ "post paper";
        mixed, True for CLD-SGM and False for gDDIM; numerical_eps, 1e-9 for CLD-SGM with Fourier features (CIFAR-10), else 1e-6.
        With "blurring": blur=10.0, the greatest deviation in pixels.

    Raises
    ------
    FileNotFoundError
    ImportError
        Where torch, or for Flax's files flax, is not installed; it names the extra.
    TypeError
        For an unknown option.
    ValueError
        For an unknown sde or dtype; or if the file is not such a checkpoint: the message names the first key that differs.
    """
    one_of("dtype", dtype, torch_files.DTYPES)
    saved = flax_files.read(path) if flax_files.is_flax(path) else torch_files.read(path)
    return of_saved(saved, path, device, dtype, sde=sde, **options)


def of_saved(
    saved: Any, path: StrPath, device: str | None, dtype: str, *, sde: str = "cld", size: int | None = None, **options: Any
) -> PretrainedLinear:
    """Return the network from the content of a file; see `load_linear_sde`."""
    one_of("sde", sde, SDES)
    is_flax = isinstance(saved, Mapping) and "params_ema" in saved
    state = flax_files.weights(saved["params_ema"], path, size) if is_flax else _averages(saved, path)
    empty = score_sde.network_of(torch_files.shapes_of(state), path)
    a = empty.architecture
    if size is None:
        size = 4 << (len(a.widths) - 1) if is_flax else torch_files.size_of(a.attends, path)
    network = torch_files.fill(empty, state, device, dtype)
    if sde == "blurring":
        net, schedule = _blurring(network, size, **options)
        return PretrainedLinear(net, schedule, "R", (a.channels, size, size), None, None, 1.0)
    told = "R" if a.outputs == a.channels else "score"
    if a.channels % 2 or (told == "score" and 2 * a.outputs != a.channels):
        raise ValueError(
            f"path={os.fspath(path)!r} has {a.channels} channels in and {a.outputs} out, and a network of position and velocity "
            "has twice those of the data in, and as many or half as many out; without a velocity, see deis.load_model of score SDEs"
        )
    net, schedule = (_gddim if told == "R" else _cld_sgm)(network, **options)
    return PretrainedLinear(net, schedule, told, (a.channels // 2, size, size), None, None, 1.0)


def _averages(saved: Any, path: StrPath) -> dict[str, Any]:
    """Return the averaged weights of a file of PyTorch by their names."""
    try:
        state = torch_files.weights(saved["model"], "entry 'model'", path)
        averages = saved["ema"]["shadow_params"]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"path={os.fspath(path)!r} is not {_KIND}: 'model', and 'ema' with 'shadow_params', were expected, and reading them "
            f"raised {error!r}"
        ) from None
    return score_sde.averaged(state, averages, path)


def _blurring(network: Any, size: int, *, blur: float = 10.0) -> tuple[Network, LinearSDE]:
    """Return gDDIM's network of blurring; sampling starts where sigma / a is 80 more than at t = 0."""
    offset = 0.004
    start = math.pi / 2 * offset / (1 + 2 * offset)
    theta = math.atan2(math.sin(start) + 80, math.cos(start))
    schedule = Blurring(
        (size, size), blur, 1e-3, offset, sampling_eps=1e-5, sampling_T=theta * 2 / math.pi * (1 + 2 * offset) - offset
    )
    return lambda x, t, labels: network(x, _noise(network, 999 * t.to(x.dtype))), schedule


def _gddim(network: Any, *, beta: Any = 4.0, mixed: bool = False, numerical_eps: float = 1e-6) -> tuple[Network, LinearSDE]:
    import torch

    flag("mixed", mixed)
    floor = number("numerical_eps", numerical_eps, above=0)
    plain = _langevin(beta)
    name = f"{plain.name} + {floor!r}"
    schedule = replace(plain, covariance=np.diag([floor, _GAMMA * _MASS + floor]), name=name)
    turn = rotation(schedule)

    def net(x: Any, t: Any, labels: Any) -> Any:
        out = network(x, _noise(network, 999 * t.to(x.dtype)))
        blocks = out.chunk(2, dim=1)
        eps = [sum(c * block for c, block in zip(row, blocks, strict=True)) for row in turn.tolist()]
        if mixed:
            velocity = x.chunk(2, dim=1)[1]
            inverse = _at(schedule, t, x, lambda t: schedule.algebra.inverse(schedule.K(t))[:, :, 1])
            eps = [part + c * velocity for part, c in zip(eps, inverse, strict=True)]
        return torch.cat(eps, dim=1)

    return net, schedule


def rotation(sde: LinearSDE) -> Array:
    """Return Q with eps of R = Q eps of the R that is L at t = 0: both solve one linear equation, so R_0 = R Q for all times."""
    first = replace(sde, sampling_eps=1e-12)
    return np.asarray(np.linalg.solve(sde.K(sde.t_end), first.K(sde.t_end)))


def _cld_sgm(network: Any, *, beta: Any = 4.0, mixed: bool = True, numerical_eps: float | None = None) -> tuple[Network, LinearSDE]:
    import torch

    flag("mixed", mixed)
    floor = (1e-9 if network.architecture.fourier else 1e-6) if numerical_eps is None else numerical_eps
    added = number("numerical_eps", floor, least=0) * np.eye(2)
    schedule = _langevin(beta)

    def levels(t: Array) -> Array:
        L, psi = np.linalg.cholesky(schedule.Sigma(t) + added), schedule.psi(t, 0.0)
        slope = L[:, 1, 0] / L[:, 0, 0]
        apart = psi[:, 1, 0] - slope * psi[:, 0, 0]
        share = mixed * L[:, 1, 1] / (L[:, 1, 0] ** 2 + L[:, 1, 1] ** 2)
        return np.stack([L[:, 0, 0], L[:, 1, 1], slope, psi[:, 0, 0], apart, share], axis=1, dtype=np.float64)

    def net(x: Any, t: Any, labels: Any) -> Any:
        L_xx, L_vv, slope, psi_xx, apart, share = _at(schedule, t, x, levels)
        position, velocity = x.chunk(2, dim=1)
        eps_v = network(x, _noise(network, t.to(x.dtype))) + share * velocity
        x_0 = (velocity - slope * position - L_vv * eps_v) / apart
        score_v = -eps_v / L_vv
        return torch.cat([(psi_xx * x_0 - position) / L_xx**2 - slope * score_v, score_v], dim=1)

    return net, schedule


def _noise(network: Any, t: Any) -> Any:
    """Return how the network is told of a time: Fourier features are of its logarithm."""
    return t.log() if network.architecture.fourier else t


def _at(sde: LinearSDE, t: Any, x: Any, numbers: Callable[[Array], Array]) -> Any:
    """Return numbers(t), of shape (batch, m), as m tensors that multiply x of shape (batch, ...)."""
    import torch

    times = np.clip(t.detach().double().cpu().numpy(), sde.t_end, sde.t_start)  # a rounding of float32 may leave the SDE's
    found = torch.from_numpy(numbers(times)).to(x)
    return found.T.reshape(found.shape[1], -1, *(1,) * (x.ndim - 1))


def _langevin(beta: Any) -> LinearSDE:
    """Return the SDE of a speed, a number or the two of b_0 + b_1 t."""
    if not isinstance(beta, Sequence):
        return CLD(number("beta", beta, above=0), _MASS, gamma=_GAMMA)
    if len(beta) != 2:
        raise ValueError(f"beta={shown(beta)} must be a number, or [b_0, b_1] for b_0 + b_1 t")
    low, slope = number("beta[0]", beta[0], above=0), number("beta[1]", beta[1], least=0)
    plain = CLD(lambda t: low + slope * t, _MASS, gamma=_GAMMA)
    return replace(plain, name=plain.name.replace("beta(t)", f"{low!r} + {slope!r} t"))
