"""What the loop costs as one program, beside bare calls of the network and diffusers' pipeline: time, memory, pictures a second.

python -m benchmarks.compiled [--batches 1 64] [--steps 10] [--ways eager "torch.compile" "cuda graph" jit pipeline] [--autocast]
                              [--networks free bundled anime64] [--checkpoint ../shared/checkpoints/anime64]

The plan is tab3. Without a GPU one thread is used; with one, cuDNN may round the inputs of its products to TF32, as torch has it.
The free model returns 0.1 x for x of shape (batch, 4, 64, 64), the bundled one is the MNIST network with labels, anime64 a network
of 63 million weights. With --autocast torch's networks compute in bfloat16, on states that are channels last and float32.

The bare calls are as many calls of the network, each on what the last one returned, captured in the same way, so that the rest is
what the loop itself adds. As a CUDA graph they are one, whose input lies there already; `replays_ms` is as many replays of a graph
of one call. The pipeline is DDPMPipeline of diffusers with DPMSolverMultistepScheduler, beside bare calls that are not captured; it
also draws its noise and brings the pictures to the host. For torch.compile the network is marked as a nested region, so that it is
compiled once.

The two run in turns, for about --seconds; medians are written. `first_s` is from the uncompiled loop to the end of its first call,
and `off_eager` the greatest difference to `deis.sample` over its greatest value. `held_mb` is the memory that torch held before the
loop was made, and `peak_mb` the most with it, of compiling and of its first call.

Append to benchmarks/results/compiled.csv.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import deis

from .methods import anime64_network

RESULTS = Path(__file__).parent / "results" / "compiled.csv"
FIELDS = (
    *("date", "device", "torch", "network", "dtype", "batch", "way", "steps", "first_s", "loop_ms", "bare_ms", "loop_over_bare"),
    *("replays_ms", "loop_over_replays", "images_per_s", "held_mb", "peak_mb", "off_eager"),
)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A network with its labels, and what it is given."""

    name: str
    sde: deis.Schedule
    network: Callable[[Any, Any], Any]
    shape: tuple[int, ...]
    predicts: str = "eps"


def device_name() -> str:
    return torch.cuda.get_device_name() if GPU else f"one of {os.cpu_count()} virtual cores of an x86 CPU"


def case_of(name: str, way: str, batch: int, checkpoint: Path, channels_last: bool) -> Case:
    if name == "free":
        return Case(name, deis.VPSDE.linear(), lambda x, t: 0.1 * x, (batch, 4, 64, 64))
    if name == "anime64":
        sde, net = anime64_network(checkpoint)
        assert isinstance(net, torch.nn.Module)
        net.to(DEVICE, memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # type: ignore[call-overload]
        return Case(name, sde, as_region(net, way), (batch, 3, 64, 64))
    labels = np.arange(batch) % 10
    loaded = deis.load_model(backend="jax") if way == "jit" else deis.load_model(device=DEVICE)
    if way == "jit":
        model = loaded.conditional(labels)
    else:
        loaded = replace(loaded, net=as_region(loaded.net, way))
        model = loaded.conditioned(torch.tensor(labels, device=DEVICE), None, 1.0)
    return Case(name, loaded.sde, model, (batch, *loaded.shape), loaded.predicts)


def as_region(net: Any, way: str) -> Any:
    return torch.compiler.nested_compile_region(net) if way == "torch.compile" else net


def in_bfloat16(case: Case) -> Case:
    def network(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return case.network(x, t).float()

    return replace(case, network=network)


def bare_torch(case: Case, x: Tensor, plan: deis.Plan, way: str) -> Run:
    times = torch.tensor(plan.t[:-1], dtype=torch.int64 if plan.discrete else torch.float32, device=DEVICE)
    ts = times[:, None].expand(-1, len(x)).contiguous()

    def calls(x: Tensor) -> Tensor:
        for t in ts:
            x = case.network(x, t)
        return x

    if way == "torch.compile":
        calls = torch.compile(calls, fullgraph=True, dynamic=False)
    return captured(calls, x) if way == "cuda graph" else torch.no_grad()(lambda: calls(x))


def captured(calls: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(3):
                calls(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            calls(x)
    return graph.replay


def replays(case: Case, x: Tensor, plan: deis.Plan) -> Run:
    one = bare_torch(case, x, deis.make_plan(case.sde, "ddim", 1), "cuda graph")

    def run() -> None:
        for _ in range(plan.nfe):
            one()

    return run


def bare_jax(case: Case, x: jax.Array, plan: deis.Plan) -> Run:
    ts = jnp.repeat(jnp.asarray(plan.t[:-1], jnp.float32)[:, None], len(x), axis=1)
    calls = jax.jit(lambda x: jax.lax.scan(lambda x, t: (case.network(x, t), None), x, ts)[0]).lower(x).compile()
    return lambda: calls(x)


def pipeline(case: Case, num_step: int) -> Run:
    """Return diffusers' own pipeline of the network."""
    from diffusers import ConfigMixin, DDPMPipeline, DPMSolverMultistepScheduler, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.unets.unet_2d import UNet2DOutput

    discrete = case.sde.num_times is not None
    times = np.arange(291.0) if discrete else np.arange(1, 1001) / 1000

    class Unet(ModelMixin, ConfigMixin):  # type: ignore[misc]
        @register_to_config  # type: ignore[untyped-decorator]
        def __init__(self, sample_size: int, in_channels: int) -> None:
            super().__init__()
            self.here = torch.nn.Parameter(torch.zeros(1, device=DEVICE))

        def forward(self, x: Tensor, t: Tensor) -> UNet2DOutput:
            t = t[None].to(x.device).expand(len(x))
            return UNet2DOutput(case.network(x, t if discrete else (t + 1) / 1000))

    abar = np.asarray(case.sde.alpha(times)) ** 2
    betas = 1 - abar / np.array([1.0, *abar[:-1]])
    kind = {"eps": "epsilon", "v": "v_prediction"}[case.predicts]
    pipe = DDPMPipeline(
        Unet(case.shape[-1], case.shape[1]),
        DPMSolverMultistepScheduler(len(betas), trained_betas=betas, prediction_type=kind),
    )
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(case.shape[0], num_inference_steps=num_step, output_type="np")


def wait(value: Any) -> None:
    if isinstance(value, jax.Array):
        value.block_until_ready()
    elif GPU:
        torch.cuda.synchronize()


def seconds(run: Run) -> float:
    start = time.perf_counter()
    wait(run())
    return time.perf_counter() - start


def begun(make: Callable[[], Run]) -> tuple[Run, dict[str, str]]:
    """Return a run, the seconds until its first call has ended, and the memory of torch before it was made and at most since."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    run = make()
    wait(run())
    told = {"first_s": f"{time.perf_counter() - start:.1f}"}
    if GPU:
        told |= {"held_mb": f"{held / 1e6:.0f}", "peak_mb": f"{torch.cuda.max_memory_allocated() / 1e6:.0f}"}
    return run, told


def in_turns(runs: Sequence[Run], budget: float) -> list[float]:
    """Return the median seconds of each, within about a budget of seconds."""
    both = [sum(seconds(run) for run in runs) for _ in range(2)][-1]
    found = np.empty((int(np.clip(budget / both, 5, 300)), len(runs)))
    for k in range(len(found)):
        for j in list(range(len(runs)))[:: 1 if k % 2 else -1]:
            found[k, j] = seconds(runs[j])
    return [float(value) for value in np.median(found, axis=0)]


def measure(case: Case, way: str, num_step: int, budget: float, channels_last: bool) -> dict[str, object]:
    """Time the loop and the bare calls in turns."""
    plan = deis.make_plan(case.sde, "tab3", num_step)
    noise = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32)
    x: Any = jnp.asarray(noise) if way == "jit" else torch.tensor(noise, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def make() -> Run:
        if way == "pipeline":
            return pipeline(case, num_step)
        options = {"predicts": case.predicts, "mode": way, "donate": False, "channels_last": channels_last}
        compiled = deis.compile(plan, case.network, x, **options)  # type: ignore[arg-type]
        assert compiled.reason is None, compiled.reason
        return lambda: compiled(x)

    loop, told = begun(make)
    bare = bare_jax(case, x, plan) if way == "jit" else bare_torch(case, x, plan, way)
    graph = way == "cuda graph"
    loop_s, bare_s, *rest = in_turns((loop, bare, *([replays(case, x, plan)] if graph else [])), budget)
    row: dict[str, object] = {"steps": num_step, "first_s": told["first_s"], "images_per_s": f"{case.shape[0] / loop_s:.1f}"}
    row |= {"loop_ms": f"{1e3 * loop_s:.3f}", "bare_ms": f"{1e3 * bare_s:.3f}", "loop_over_bare": f"{loop_s / bare_s:.4f}"}
    if graph:
        row |= {"replays_ms": f"{1e3 * rest[0]:.3f}", "loop_over_replays": f"{loop_s / rest[0]:.4f}"}
    if way != "jit":  # whose memory is not torch's
        row |= told
    if way != "pipeline":
        found, expected = loop(), deis.sample(plan, case.network, x, predicts=case.predicts)
        row["off_eager"] = f"{float(abs(found - expected).max() / abs(expected).max()):.1e}"
    return row


def main() -> None:
    ways = ["eager", "torch.compile", *(["cuda graph"] if GPU else []), "jit", "pipeline"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways)
    parser.add_argument("--networks", nargs="+", default=["free", "bundled"], choices=["free", "bundled", "anime64"])
    parser.add_argument("--checkpoint", type=Path, default=Path("../shared/checkpoints/anime64"))
    parser.add_argument("--autocast", action="store_true")
    arguments = parser.parse_args()
    if not GPU:
        torch.set_num_threads(1)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if new:
            writer.writeheader()
        about = {"date": date.today().isoformat(), "device": device_name(), "torch": torch.__version__}
        about["dtype"] = "bfloat16" if arguments.autocast else "float32"
        for name, batch, way in product(arguments.networks, arguments.batches, arguments.ways):
            if (name, way) == ("anime64", "jit"):  # which is written in torch
                continue
            case = case_of(name, way, batch, arguments.checkpoint, arguments.autocast)
            case = in_bfloat16(case) if arguments.autocast else case
            row = measure(case, way, arguments.steps, arguments.seconds, arguments.autocast and way != "pipeline")
            row |= about | {"network": name, "batch": batch, "way": way}
            writer.writerow(row)
            file.flush()
            print(" | ".join(str(row.get(field, "")) for field in FIELDS), flush=True)


if __name__ == "__main__":
    main()
