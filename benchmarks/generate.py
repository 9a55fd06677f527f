"""What the shards of `deis generate` cost: against the plain loop of the same network, and by themselves.

python -m benchmarks.generate [--num 512] [--rounds 3] [--batch 64] [--device cuda]

Part one: samples of the bundled MNIST model by a plan of ten evaluations, a batch a shard, one thread for the network; the loop
calls `deis.sample` and keeps nothing but the last batch. The rounds take turns, and the median of each ratio to the loop of the
same round is printed: of the seconds of the processor, those of all threads together, and of the wall.

Part two: a network that costs nothing, whose samples are noise, the worst case for PNG; so what is left is the drawing of noise,
the packing and the writing to the disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deis
from deis.draws import drawn
from deis.generation.formats import FORMATS


def plain(model: deis.Pretrained, plan: deis.Plan, num: int, batch: int, device: str) -> None:
    """Sample as one would without shards, labels in turn."""
    for first in range(0, num, batch):
        numbers = range(first, first + batch)
        labels = None if model.num_classes is None else np.array(numbers) % model.num_classes
        x_T = torch.from_numpy(drawn(numbers, model.shape, float(plan.sigma[0]), 0)).to(device)
        x_0 = deis.sample(plan, model.conditional(labels), x_T)
    x_0.cpu()


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of the processor and of the wall."""
    processor, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - processor, time.perf_counter() - wall


def in_turns(
    model: deis.Pretrained, plan: deis.Plan, num: int, rounds: int, batch: int, device: str
) -> dict[str, list[tuple[float, float]]]:
    """Time the loop and every format, one after the other, several times."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("loop", *FORMATS)}
    for _ in range(rounds):
        times["loop"].append(timed(partial(plain, model, plan, num, batch, device)))
        for kind in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                settings: dict[str, Any] = {
                    "model": model,
                    "plan": plan,
                    "format": kind,
                    "shard": batch,
                    "batch": batch,
                    "device": device,
                }
                times[kind].append(timed(partial(deis.generate, Path(folder) / "samples", num, **settings)))
    return times


def report(name: str, num: int, times: dict[str, list[tuple[float, float]]]) -> None:
    print(f"{name}: {num} samples")
    loop = np.array(times["loop"])
    for kind, found in times.items():
        seconds, ratio = np.median(found, axis=0), np.median(np.array(found) / loop, axis=0)
        print(
            f"  {kind:<10} {num / seconds[1]:8.1f} images per second; of the loop's seconds of the processor {ratio[0]:.3f}, "
            f"of the wall {ratio[1]:.3f}; beyond the loop {1e3 * (seconds[0] - np.median(loop[:, 0])) / num:.3f} ms an image"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = (arguments.rounds, arguments.batch, arguments.device)
    network = deis.load_model(device=arguments.device)
    times = in_turns(network, network.plan(10), arguments.num, *settings)
    report("the MNIST model, ten evaluations", arguments.num, times)
    for side in (32, 64):
        free = deis.Pretrained(lambda x, t, labels: 0 * x, network.sde, "eps", (3, side, side), None, None, 1.0)
        plan = deis.make_plan(network.sde, "ddim", 1)
        report(f"no network, 3 x {side} x {side}", 1024, in_turns(free, plan, 1024, *settings))


if __name__ == "__main__":
    main()
