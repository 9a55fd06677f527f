"""What a run of a CUDA graph of a loop adds to the bare calls, part by part, and whether it gives the bits of the eager loop.

python -m benchmarks.graph_parts [--checkpoint ../shared/checkpoints/anime64]        # a GPU, a minute

bare       one graph of ten calls of the network, each on what the last one returned; and the same captured again, for the noise
graph      the graph of the loop (tab3) by itself: what the device does more, the sums
unfused    the same with the kernels that the eager loop runs, one for each term of a sum
copied     the graph, after x_T was copied to where it reads it: one more thing that the host does while the device waits
whole      what `deis.compile` returns, called

All take turns; the median and the least milliseconds are written, each from an idle device to an idle device, and the microseconds
that the host was busy with it.

Append to benchmarks/results/graph_parts.csv.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import deis
from deis.backends.torch import BACKEND
from deis.run import compiled_torch
from deis.run.loop import Loop

from .compiled import DEVICE, Case, bare_torch, case_of, device_name

RESULTS = Path(__file__).parent / "results" / "graph_parts.csv"
FIELDS = ("date", "device", "torch", "network", "batch", "what", "median_ms", "least_ms", "over_bare", "host_us")


def variants(case: Case) -> dict[str, Callable[[], Any]]:
    plan, x = deis.make_plan(case.sde, "tab3", 10), torch.randn(case.shape, device=DEVICE)
    backend = replace(BACKEND, noise=compiled_torch._given)
    loop = Loop(plan, case.network, False, case.predicts, False, backend, torch.float32)
    with torch.no_grad():
        own = compiled_torch._graph(loop, None, x.clone(), None, None)
        with patch.object(compiled_torch, "fusing", lambda backend, device: backend):
            unfused = compiled_torch._graph(loop, None, x.clone(), None, None)
    whole = deis.compile(plan, case.network, x, predicts=case.predicts)

    def copied() -> None:
        own.x.copy_(x)
        own.graph.replay()

    bare, again = (bare_torch(case, x, plan, "cuda graph") for _ in range(2))
    found = {"bare": bare, "bare again": again, "graph": own.graph.replay, "unfused": unfused.graph.replay, "copied": copied}
    assert torch.equal(whole(x), deis.sample(plan, case.network, x, predicts=case.predicts))
    return found | {"whole": lambda: whole(x)}


def measure(case: Case, rounds: int) -> list[dict[str, object]]:
    runs = variants(case)
    times: dict[str, list[tuple[float, float]]] = {what: [] for what in runs}
    for k in range(rounds + 2):
        for what in list(runs)[:: 1 if k % 2 else -1]:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            runs[what]()
            done = time.perf_counter()
            torch.cuda.synchronize()
            times[what].append((time.perf_counter() - begin, done - begin))
    found = {what: np.array(pairs[2:]) for what, pairs in times.items()}
    bare = np.median(found["bare"][:, 0])
    about: dict[str, object] = {"date": date.today().isoformat(), "device": device_name(), "torch": torch.__version__}
    about |= {"network": case.name, "batch": case.shape[0]}
    return [
        about
        | {"what": what, "median_ms": f"{1e3 * np.median(pairs[:, 0]):.3f}", "least_ms": f"{1e3 * pairs[:, 0].min():.3f}"}
        | {"over_bare": f"{np.median(pairs[:, 0]) / bare:.4f}", "host_us": f"{1e6 * np.median(pairs[:, 1]):.0f}"}
        for what, pairs in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("../shared/checkpoints/anime64"))
    checkpoint = parser.parse_args().checkpoint
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for name, batch, rounds in (("bundled", 1, 60), ("bundled", 64, 40), ("anime64", 1, 25)):
            rows = measure(case_of(name, "cuda graph", batch, checkpoint, False), rounds)
            writer.writerows(rows)
            for row in rows:
                print(" | ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
