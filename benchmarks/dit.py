"""What a sample of a large network costs on this device: DiT-XL/2 at 256 x 256 with guidance, an input of docs/scale.md.

python -m benchmarks.dit [--batches 32 64 128] [--calls 10]        # needs diffusers and, for numbers that matter, a GPU

The network is diffusers' DiTTransformer2DModel at its full size with random weights, in bfloat16, as time does not depend on them;
the plan is `auto`, the state float32. Guidance makes one call on a batch of twice the size. The VAE that makes pictures of latents
is not in it. Captured by `deis.compile`, and beside it the loop of `deis.sample`; medians of five runs each, in turns. FLOPs are
twice the 118.6 billion multiply-adds of a call (arXiv 2212.09748).

Append to benchmarks/results/dit.csv.
"""

from __future__ import annotations

import argparse
import csv
from datetime import date
from functools import partial
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

import deis

from .compiled import DEVICE, Run, device_name, in_turns

RESULTS = Path(__file__).parent / "results" / "dit.csv"
FLOPS = 2 * 118.6e9


def network(batch: int) -> deis.Denoiser:
    """Return DiT-XL/2 with guidance, for classes in turn."""
    torch.manual_seed(0)
    shape = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32, "patch_size": 2}
    with torch.device(DEVICE):
        dit = DiTTransformer2DModel(**shape, in_channels=4, out_channels=8, num_embeds_ada_norm=1000).bfloat16().eval()

    def eps(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return dit(x, t, labels, return_dict=False)[0][:, :4]

    loaded = deis.Pretrained(eps, deis.VPSDE.linear(), "eps", (4, 32, 32), 1000, 1000, 1000.0)
    return loaded.conditioned(torch.arange(batch, device=DEVICE), torch.full((batch,), 1000, device=DEVICE), 4.0)


def measure(batch: int, calls: int) -> list[dict[str, object]]:
    model = network(batch)
    plan, x = deis.make_plan(model.sde, nfe=calls), torch.randn(batch, 4, 32, 32, device=DEVICE)
    runs: dict[str, Run] = {}
    for mode in ("cuda graph", "eager") if DEVICE == "cuda" else ("eager",):
        compiled = deis.compile(plan, model, x, mode=mode, network_dtype="bfloat16")
        assert compiled.reason is None, compiled.reason
        runs[mode] = partial(compiled, x)
    rows: list[dict[str, object]] = []
    for mode, seconds in zip(runs, in_turns(list(runs.values()), 0.0), strict=True):
        about: dict[str, object] = {"date": date.today().isoformat(), "device": device_name(), "torch": torch.__version__}
        tflops = calls * 2 * FLOPS * batch / seconds / 1e12
        numbers = {"ms_per_sample": f"{1e3 * seconds / batch:.3f}", "tflops": f"{tflops:.1f}"}
        rows.append(about | {"way": mode, "calls": calls, "batch": batch} | numbers)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--calls", type=int, default=10)
    arguments = parser.parse_args()
    for batch in arguments.batches:
        new, rows = not RESULTS.exists(), measure(batch, arguments.calls)
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            print(" | ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
