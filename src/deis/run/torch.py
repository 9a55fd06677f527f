"""The torch executor: coefficients are Python numbers, so that no step waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Generator, Tensor

from ..machine import run_rows
from ..model.predictions import checked_output, convert, evaluate
from ..plan import Plan
from .options import Options, not_finite, observer, streams


def run_torch(plan: Plan, model: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, options: Options, grad: bool) -> Tensor:
    """Run a plan on a tensor, on its device; see `deis.sample`."""
    carry = torch.promote_types(x_T.dtype, torch.float32)
    # One copy to the device for all steps.
    times = torch.tensor([row.t for row in plan.rows], dtype=torch.int64 if plan.discrete else carry, device=x_T.device)
    times = times[:, None].repeat(1, len(x_T))

    def predict(i: int, x: Tensor) -> Tensor:
        row = plan.rows[i]
        if not row.calls:
            return x * row.guess
        x_in = x.to(x_T.dtype)
        m = evaluate(model, x_in, times[i], row)
        checked_output("model(x, t)", m, x_in, row)
        if options.check_finite and not bool(torch.isfinite(m).all()):
            raise not_finite(i, plan)
        p = convert(m.to(carry), x, options.factors[i], options.threshold)
        # m may lie in a buffer that the model writes again, and so may what a threshold returns.
        return p.clone() if p is m or options.threshold is not None else p

    with nullcontext() if grad else torch.no_grad():
        keep = [x_T.to(carry)]
        noise = _add_noise(options.rng, len(x_T)) if plan.stochastic else None
        x = run_rows(plan, predict, combine, keep[0], observer(plan, options, keep), noise)
        return (torch.stack(keep) if options.trajectory else x).to(x_T.dtype)


def combine(c_x: float, x: Tensor, c_p: tuple[float, ...], history: tuple[Tensor, ...]) -> Tensor:
    """Return c_x x + sum_j c_p[j] history[j], without the terms of weight 0; one kernel a term."""
    total = None if c_x == 0 else x if c_x == 1 else x * c_x
    for c, p in zip(c_p, history, strict=False):
        if c != 0:
            total = (p if c == 1 else p * c) if total is None else torch.add(total, p, alpha=c)
    return torch.zeros_like(x) if total is None else total


def _add_noise(rng: object, batch: int) -> Callable[[float, Tensor], Tensor]:
    def spawn(generator: Generator) -> list[Generator]:
        # One seed a sample, drawn in order, so that two halves of a batch continue the stream of the whole.
        seeds = [int(torch.randint(2**62, (), generator=generator, device=generator.device)) for _ in range(batch)]
        return [Generator(generator.device).manual_seed(seed) for seed in seeds]

    generators = streams(rng, batch, Generator, spawn)

    def add_noise(keep_z: float, x: Tensor) -> Tensor:
        z = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in generators]
        return torch.add(x, torch.stack(z).to(x.device), alpha=keep_z)

    return add_noise
