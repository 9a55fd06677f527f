"""What the loop itself costs: against a hand-written loop, against diffusers' DEIS, beside a real network, and in memory.

python -m benchmarks.overhead

One thread, float32. The free model returns 0.1 x for x of shape (1, 4, 64, 64). Rounds of the compared loops alternate, and
the figures are medians over the rounds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DEISMultistepScheduler
from torch import Tensor

import deis

ROUNDS = 60


def compare(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time the runs in turn, and return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


@torch.no_grad()
def by_hand(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, plan: deis.Plan) -> Tensor:
    """tAB3 as one would write it without the library: the same update, term by term."""
    psi, weights, ts = plan.keep_x.tolist(), plan.keep_p.tolist(), torch.tensor(plan.t[:-1], dtype=x.dtype)
    times = ts[:, None].repeat(1, len(x))
    past: list[Tensor] = []
    for i in range(len(psi)):
        past = [model(x, times[i]), *past[:3]]
        x = psi[i] * x
        for weight, p in zip(weights[i], past, strict=False):
            x = x + weight * p
    return x


def free(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


def run_diffusers(x: Tensor, scheduler: DEISMultistepScheduler, num_step: int) -> Tensor:
    scheduler.set_timesteps(num_step)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    return x


def loop_overhead(num_step: int = 50) -> None:
    x = torch.randn(1, 4, 64, 64)
    plan = deis.make_plan(deis.VPSDE.linear(), "tab3", num_step)
    scheduler = DEISMultistepScheduler(solver_order=3)
    seconds = compare(
        {
            "deis": lambda: deis.sample(plan, free, x),
            "by hand": lambda: by_hand(free, x, plan),
            "diffusers": lambda: run_diffusers(x, scheduler, num_step),
        },
        ROUNDS,
    )
    steps = {name: f"{1e6 * value / num_step:.1f} us" for name, value in seconds.items()}
    print(f"a step of tab3 with a free model, {num_step} steps: {steps}; deis / by hand {seconds['deis'] / seconds['by hand']:.3f}")


def beside_a_network(batch: int = 16) -> None:
    model = deis.load_model()
    network = model.conditional(np.arange(batch) % 10)
    x = torch.randn(batch, 1, 28, 28)
    plan = deis.make_plan(model.sde, "tab3", 10)
    times = torch.full((batch,), 0.5)

    @torch.no_grad()
    def ten_calls() -> None:
        for _ in range(10):
            network(x, times)

    seconds = compare({"ten calls": ten_calls, "ten steps": lambda: deis.sample(plan, network, x)}, 15)
    print(f"the embedded network, batch {batch}: {seconds}; ratio {seconds['ten steps'] / seconds['ten calls']:.4f}")


def memory(num_step: int) -> None:
    """Count the tensors of the state's size that are alive at each evaluation, x and x_T included."""
    most = 0

    def count(x: Tensor, t: Tensor) -> Tensor:
        nonlocal most
        # by type, as isinstance also asks an object for its __class__, of which torch.distributed warns
        alive = {o.data_ptr() for o in gc.get_objects() if issubclass(type(o), Tensor) and o.numel() == x.numel()}
        most = max(most, len(alive))
        return 0.1 * x

    plan = deis.make_plan(deis.VPSDE.linear(), "tab3", num_step)
    deis.sample(plan, count, torch.randn(1, 4, 64, 64))
    print(f"alive at an evaluation, {num_step} steps of tab3: at most {most} tensors of the state's size, window {plan.window}")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loop_overhead()
    for num_step in (10, 200):
        memory(num_step)
    beside_a_network()


if __name__ == "__main__":
    main()
