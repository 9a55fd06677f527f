"""PyTorch: coefficients are Python numbers, so that no step waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..foreign import is_torch
from .record import AddNoise, Backend
from .streams import streams


def combine(c_x: Any, x: Tensor, c_p: Sequence[Any] | Tensor, history: Sequence[Tensor]) -> Tensor:
    """Return c_x x + sum_j c_p[j] history[j], without the terms of weight 0; one kernel a term.

    Coefficients that are tensors, which may record gradients, are not looked at.
    """
    if isinstance(c_x, Tensor):
        return sum((c * p for c, p in zip(c_p, history, strict=False)), c_x * x)
    total = None if c_x == 0 else x if c_x == 1 else x * c_x
    for c, p in zip(c_p, history, strict=False):
        if c != 0:
            total = (p if c == 1 else p * c) if total is None else torch.add(total, p, alpha=c)
    return torch.zeros_like(x) if total is None else total


def _full(x: Tensor, t: Sequence[float], dtype: Any, whole: bool) -> Tensor:
    times = torch.tensor(t, dtype=torch.int64 if whole else dtype, device=x.device)
    return times[:, None].repeat(1, len(x))


def _noise(rng: Any, batch: int) -> AddNoise:
    def spawn(generator: Generator) -> list[Generator]:
        # One seed a sample, drawn in order, so that two halves of a batch continue the stream of the whole.
        seeds = [int(torch.randint(2**62, (), generator=generator, device=generator.device)) for _ in range(batch)]
        return [Generator(generator.device).manual_seed(seed) for seed in seeds]

    generators = streams(rng, batch, Generator, spawn)

    def add_noise(keep_z: float, x: Tensor, i: int = 0) -> Tensor:
        z = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in generators]
        return torch.add(x, torch.stack(z).to(x.device), alpha=keep_z)

    return add_noise


def _like(values: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(np.array(values, order="C")).to(x)


BACKEND = Backend(
    xp=torch,
    owns=is_torch,
    carry=lambda dtype: torch.promote_types(dtype, torch.float32),
    cast=lambda x, dtype: x if x.dtype is dtype else x.to(dtype),  # much the quicker question
    full=_full,
    to_host=lambda x: np.asarray(x.detach().cpu().double()),
    like=_like,
    combine=combine,
    noise=_noise,
    copied=lambda p, m, always: p.clone() if always or p is m else p,
    no_grad=torch.no_grad,
)
