"""A small network, and the shards of its samples, for the tests of `deis.generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import deis

PLAN = deis.make_plan(deis.VPSDE.linear(), "tab1", 3)
SHAPE = (3, 4, 5)


class Tiny(nn.Module):
    """A network of eps with classes, each of which shifts the data in its own way; it remembers the sizes of its batches."""

    def __init__(self, seed: int = 0, most: int = 10**6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shift = nn.Parameter(torch.randn(10, *SHAPE, generator=generator), requires_grad=False)
        self.most, self.batches = most, list[int]()

    def forward(self, x: Any, t: Any, labels: Any) -> Any:
        self.batches.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate room for {len(x)} samples")
        return torch.tanh(x - self.shift[torch.as_tensor(labels)])


def tiny(seed: int = 0, most: int = 10**6) -> deis.Pretrained:
    return deis.Pretrained(Tiny(seed, most), deis.VPSDE.linear(), "eps", SHAPE, 10, None, 1.0)


MODEL = tiny()


def generate(out: Path, num: int = 10, **settings: Any) -> Any:
    own: dict[str, Any] = {"model": MODEL, "plan": PLAN, "shard": 4, "format": "npz"}
    return deis.generate(out, num, **own | settings)


def contents(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "records"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def images(out: Path) -> Any:
    return np.concatenate([pixels for _, pixels in deis.read_samples(out)])
