"""What the loop itself costs: against a loop by hand, against diffusers' DEIS, beside a real network, and in memory.

python -m benchmarks.overhead

One thread, float32. The free model returns 0.1 x for x of shape (1, 4, 64, 64). The loops by hand run over the terms of the plan
that are not 0, and no more. Rounds of the compared loops alternate.
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
from deis.arrays import AnyArray

ROUNDS = 200
Steps = list[tuple[float, list[float]]]
"""For each step, the factor of x and those of the newest predictions."""


def compare(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Time the runs in turn, and return the median and the least seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: (float(np.median(values)), min(values)) for name, values in times.items()}


def steps_of(plan: deis.Plan) -> Steps:
    return [(psi, [c for c in weights if c]) for psi, weights in zip(plan.keep_x.tolist(), plan.keep_p.tolist(), strict=True)]


@torch.no_grad()
def by_hand(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: list[float], steps: Steps) -> Tensor:
    """tAB3 as one would write it without the library: the same update, term by term."""
    past: tuple[Tensor, ...] = ()
    for now, (psi, weights) in zip(torch.tensor(t)[:, None].expand(-1, len(x)), steps, strict=True):
        past = (model(x, now), *past[:3])
        x = x * psi
        for c, p in zip(weights, past, strict=True):
            x = torch.add(x, p, alpha=c)
    return x


def by_hand_numpy(model: Callable[[AnyArray, AnyArray], AnyArray], x: AnyArray, t: list[float], steps: Steps) -> AnyArray:
    """The same in NumPy."""
    past: tuple[AnyArray, ...] = ()
    for now, (psi, weights) in zip(np.repeat(np.array(t, x.dtype)[:, None], len(x), axis=1), steps, strict=True):
        past = (model(x, now), *past[:3])
        x = x * psi
        for c, p in zip(weights, past, strict=True):
            x = x + p * c
    return x


def free(x: Any, t: Any) -> Any:
    return 0.1 * x


def run_diffusers(x: Tensor, scheduler: DEISMultistepScheduler, num_step: int) -> Tensor:
    scheduler.set_timesteps(num_step)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    return x


def loop_overhead(num_step: int, rounds: int = ROUNDS) -> None:
    x = torch.randn(1, 4, 64, 64)
    plan = deis.make_plan(deis.VPSDE.linear(), "tab3", num_step)
    t, steps, scheduler = plan.t[:-1].tolist(), steps_of(plan), DEISMultistepScheduler(solver_order=3)
    seconds = compare(
        {
            "deis, torch": lambda: deis.sample(plan, free, x),
            "by hand, torch": lambda: by_hand(free, x, t, steps),
            "deis, numpy": lambda: deis.sample(plan, free, x.numpy()),
            "by hand, numpy": lambda: by_hand_numpy(free, x.numpy(), t, steps),
        },
        rounds,
    ) | compare({"diffusers": lambda: run_diffusers(x, scheduler, num_step)}, 10)
    print(f"a step of tab3 with a free model, {num_step} steps, median and least:")
    for name, times in seconds.items():
        print(f"  {name}: " + ", ".join(f"{1e6 * value / num_step:.1f} us" for value in times))
    for name in ("torch", "numpy"):
        ratios = (ours / hand for ours, hand in zip(seconds[f"deis, {name}"], seconds[f"by hand, {name}"], strict=True))
        print(f"  deis / by hand, {name}: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))


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
    (steps, _), (calls, _) = seconds["ten steps"], seconds["ten calls"]
    print(f"the embedded network, batch {batch}: ten steps {steps:.4f} s, ten calls {calls:.4f} s; ratio {steps / calls:.4f}")


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
    for num_step in (10, 50):
        loop_overhead(num_step)
    for num_step in (10, 200):
        memory(num_step)
    beside_a_network()


if __name__ == "__main__":
    main()
