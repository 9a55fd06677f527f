"""What the shards of `deis generate` cost: beside the plain loop of the same network, by themselves, on Ray, and after a kill.

python -m benchmarks.generate [--parts network free ray kill] [--num 512] [--rounds 3] [--batch 64] [--device cuda]

network    samples of the bundled MNIST model by a plan of ten evaluations, a batch a shard, one thread for the network; the loop
           calls `deis.sample` and keeps nothing but the last batch. The rounds take turns, and the median of each ratio to the
           loop of the same round is printed: of the seconds of the processor, those of all threads together, and of the wall.
free       a network that costs nothing, whose samples are noise, the worst case for PNG; so what is left is the drawing of noise,
           the packing and the writing to the disk.
ray        the same samples by one process, which has every core, and by four Ray workers of one thread each, from the first
           shard to the last; how long Ray takes to start stands beside it.
kill       `deis generate` is killed by SIGKILL after its second shard and started again: seconds until the next shard is done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
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

from .scale_inputs import Watcher, ray_of


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
                settings: dict[str, Any] = {"model": model, "plan": plan, "format": kind}
                settings |= {"shard": batch, "batch": batch, "device": device}
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


def on_ray(num: int, batch: int) -> None:
    """Print images per second of one process with all cores, and of four Ray workers."""
    plan = deis.load_model().plan(10)
    for name, engine in (("one process", {}), ("four Ray workers", {"engine": "ray", "workers": 4})):
        with tempfile.TemporaryDirectory() as folder, ray_of(4):
            out, start = Path(folder) / "samples", time.perf_counter()
            watcher = Watcher(out, num // batch)
            deis.generate(out, num, plan=plan, format="npz", shard=batch, batch=batch, **engine)  # type: ignore[arg-type]
            watcher.join()
        done = np.array(watcher.done)
        pace, seconds = batch * (len(done) - 1) / (done[-1] - done[0]), done - start
        print(f"{name}: {pace:.1f} images per second, the first shard after {seconds[0]:.1f} s, all in {seconds[-1]:.1f} s")


def after_a_kill(rounds: int) -> None:
    """Print how long a run that was killed takes until its next shard."""
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "samples"
            command = [sys.executable, "-m", "deis", "generate", "--num", "2000", "--nfe", "10", "--shard", "16", "--out", str(out)]
            for shards in (2, 3):
                start, run = time.perf_counter(), subprocess.Popen(command, stderr=subprocess.DEVNULL)
                watcher = Watcher(out, shards)
                watcher.join()
                run.kill()
                run.wait()
            found.append(watcher.done[-1] - start)
    print(f"killed and started again: {np.median(found):.1f} s until the next shard of 16 ({np.round(found, 1)})")


def main() -> None:
    parts = ["network", "free", "ray", "kill"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=parts[:2], choices=parts)
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if "ray" in arguments.parts:
        on_ray(arguments.num, arguments.batch)
    if "kill" in arguments.parts:
        after_a_kill(arguments.rounds)
    torch.set_num_threads(1)
    settings = (arguments.rounds, arguments.batch, arguments.device)
    network = deis.load_model(device=arguments.device)
    if "network" in arguments.parts:
        times = in_turns(network, network.plan(10), arguments.num, *settings)
        report("the MNIST model, ten evaluations", arguments.num, times)
    for side in (32, 64) if "free" in arguments.parts else ():
        free = deis.Pretrained(lambda x, t, labels: 0 * x, network.sde, "eps", (3, side, side), None, None, 1.0)
        plan = deis.make_plan(network.sde, "ddim", 1)
        report(f"no network, 3 x {side} x {side}", 1024, in_turns(free, plan, 1024, *settings))


if __name__ == "__main__":
    main()
