"""What the loop costs as one program: eager, torch.compile, a CUDA graph and JAX's jit, beside the bare calls of the network.

python -m benchmarks.compiled [--steps 10] [--rounds 30] [--ways eager "torch.compile" "cuda graph" jit] [--networks free bundled]

The plan is tab3, the batch 1, the dtype float32; without a GPU one thread. The free model returns 0.1 x for x of shape
(1, 4, 64, 64); the bundled one is the MNIST network with a label. The bare calls are as many calls of the network, each on what
the last one returned, captured in the same way, so that the rest is what the loop itself adds. For torch.compile the network is
marked as a nested region, so that it is compiled once. The two run in turns; the first call of the loop includes compiling it.

Append to benchmarks/results/compiled.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import deis

RESULTS = Path(__file__).parent / "results" / "compiled.csv"
FIELDS = ("date", "device", "torch", "network", "way", "steps", "first_s", "loop_ms", "bare_ms", "loop_over_bare", "off_eager")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Network = Callable[[Any, Any], Any]


def device_name() -> str:
    return torch.cuda.get_device_name() if GPU else f"one of {os.cpu_count()} virtual cores of an x86 CPU"


def network_of(name: str, way: str) -> tuple[deis.Schedule, Network, tuple[int, ...]]:
    if name == "free":
        return deis.VPSDE.linear(), lambda x, t: 0.1 * x, (1, 4, 64, 64)
    if way == "jit":
        loaded = deis.load_model(backend="jax")
        return loaded.sde, loaded.conditional([3]), (1, *loaded.shape)
    loaded = deis.load_model(device=DEVICE)
    labels = torch.tensor([3], device=DEVICE)
    if way == "torch.compile":
        loaded = replace(loaded, net=torch.compiler.nested_compile_region(loaded.net))
    return loaded.sde, loaded.conditioned(labels, None, 1.0), (1, *loaded.shape)


def bare_torch(network: Network, x: Tensor, times: list[float], way: str) -> Callable[[], Any]:
    ts = torch.tensor(times, device=DEVICE)[:, None]

    def calls(x: Tensor) -> Tensor:
        for t in ts:
            x = network(x, t)
        return x

    if way == "torch.compile":
        calls = torch.compile(calls, fullgraph=True, dynamic=False)
    if way != "cuda graph":
        return torch.no_grad()(lambda: calls(x))
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(3):
                calls(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            calls(x)
    return graph.replay


def bare_jax(network: Network, x: jax.Array, times: list[float]) -> Callable[[], Any]:
    ts = jnp.asarray(times)[:, None]
    calls = jax.jit(lambda x: jax.lax.scan(lambda x, t: (network(x, t), None), x, ts)[0]).lower(x).compile()
    return lambda: calls(x)


def wait(value: Any) -> None:
    if isinstance(value, jax.Array):
        value.block_until_ready()
    elif GPU:
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    wait(run())
    return time.perf_counter() - start


def measure(name: str, way: str, num_step: int, rounds: int) -> dict[str, object]:
    """Time the loop and the bare calls in turns."""
    sde, network, shape = network_of(name, way)
    plan = deis.make_plan(sde, "tab3", num_step)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x: Any = jnp.asarray(noise) if way == "jit" else torch.tensor(noise, device=DEVICE)
    start = time.perf_counter()
    compiled = deis.compile(plan, network, x, mode=way, donate=False)
    wait(compiled(x))
    first = time.perf_counter() - start
    assert compiled.reason is None, compiled.reason
    times = plan.t[:-1].tolist()
    bare = bare_jax(network, x, times) if way == "jit" else bare_torch(network, x, times, way)
    runs: dict[str, Callable[[], Any]] = {"loop": lambda: compiled(x), "bare": bare}
    found: dict[str, list[float]] = {key: [] for key in runs}
    for k in range(rounds + 2):
        for key in list(runs)[:: 1 if k % 2 else -1]:
            found[key].append(seconds(runs[key]))
    loop, without = (float(np.median(found[key][2:])) for key in ("loop", "bare"))
    expected = np.asarray(deis.sample(plan, network, x) if way == "jit" else deis.sample(plan, network, x).cpu())
    off = np.abs(np.asarray(compiled(x) if way == "jit" else compiled(x).cpu()) - expected).max() / np.abs(expected).max()
    numbers = {"first_s": f"{first:.1f}", "loop_ms": f"{1e3 * loop:.3f}", "bare_ms": f"{1e3 * without:.3f}"}
    about: dict[str, object] = {
        "date": date.today().isoformat(),
        "device": device_name(),
        "torch": torch.__version__,
        "network": name,
        "way": way,
    }
    return about | {"steps": num_step} | numbers | {"loop_over_bare": f"{loop / without:.4f}", "off_eager": f"{off:.1e}"}


def main() -> None:
    ways = ["eager", "torch.compile", *(["cuda graph"] if GPU else []), "jit"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways)
    parser.add_argument("--networks", nargs="+", default=["free", "bundled"], choices=["free", "bundled"])
    arguments = parser.parse_args()
    if not GPU:
        torch.set_num_threads(1)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for name in arguments.networks:
            for way in arguments.ways:
                row = measure(name, way, arguments.steps, arguments.rounds)
                writer.writerow(row)
                file.flush()
                print(" | ".join(str(row[field]) for field in FIELDS), flush=True)


if __name__ == "__main__":
    main()
