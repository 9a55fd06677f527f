"""Running schedulers of diffusers, and ours, on a network that is a formula."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(x: Tensor, t: Tensor | float) -> Tensor:
    """Return some smooth function of the state and the training time."""
    s = torch.as_tensor(t).float() / 1000
    return x * (0.3 + 0.5 * s) + 0.1 * torch.sin(3 * x + 3 * s)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(scheduler: Any, *, x: Tensor | None = None, first: int = 0, **kwargs: Any) -> Tensor:
    """Run a scheduler as pipelines do."""
    scheduler.set_timesteps(**({"num_inference_steps": 10} | kwargs))
    x = noise(2, 3, 8, 8) if x is None else x
    timesteps = scheduler.timesteps[first:]  # before the beginning is told, as pipelines do
    if first:
        scheduler.set_begin_index(first)
    return loop(scheduler, timesteps, x)


def loop(scheduler: Any, timesteps: Tensor, x: Tensor) -> Tensor:
    for t in timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, return_dict=False)[0]
    return x


def both(theirs: Any, ours: Any, *, steps: int = 10, own_steps: int | None = None, model: Any = network) -> tuple[Tensor, Tensor]:
    """Run both from the same state, which those of diffusers that have alpha = 1 hold multiplied by sqrt(sigma^2 + 1)."""
    ends = []
    for scheduler, count in ((theirs, steps), (ours, own_steps or steps)):
        scheduler.set_timesteps(count)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # without it, diffusers begins with the second of two equal times
        scaled = type(scheduler).__name__.startswith(("Euler", "Heun"))
        x, generator = noise(2, 3, 8, 8), torch.Generator().manual_seed(3)
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5 if scaled else x
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False, **options)[0]
        ends.append(x)
    return ends[0], ends[1]
