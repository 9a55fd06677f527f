"""Seconds of one `step`: PlanScheduler beside diffusers' own schedulers, on a latent of 1 x 4 x 64 x 64.

python -m benchmarks.scheduler --device cpu

Each scheduler does 50 runs of 20 steps, in turns, with a network output that is ready; the median time of a step is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import diffusers
import torch

from deis.adapters.diffusers import PlanScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedulers() -> dict[str, Any]:
    plans = {f"PlanScheduler, {method}": PlanScheduler(**SD, method=method) for method in ("tab3", "dpmpp_2m", "unipc2", "ddim")}
    return plans | {
        "DEISMultistepScheduler, order 3": diffusers.DEISMultistepScheduler(**SD, solver_order=3),
        "DPMSolverMultistepScheduler": diffusers.DPMSolverMultistepScheduler(**SD),
        "UniPCMultistepScheduler": diffusers.UniPCMultistepScheduler(**SD),
        "DDIMScheduler": diffusers.DDIMScheduler(**SD, clip_sample=False),
    }


def run(scheduler: Any, x: torch.Tensor, m: torch.Tensor, device: str) -> list[float]:
    """Return the seconds of each step."""
    scheduler.set_timesteps(20, device=device)
    seconds = []
    for t in scheduler.timesteps:
        start = time.perf_counter()
        x = scheduler.step(m, t, x, return_dict=False)[0]
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    x, m = torch.randn(2, 1, 4, 64, 64, device=args.device)
    seconds: dict[str, list[float]] = {}
    for _ in range(50):
        for name, scheduler in schedulers().items():
            seconds.setdefault(name, []).extend(run(scheduler, x, m, args.device))
    theirs = statistics.median(seconds["DEISMultistepScheduler, order 3"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<35} {1e6 * median:6.0f} us  {median / theirs:.2f}")


if __name__ == "__main__":
    main()
