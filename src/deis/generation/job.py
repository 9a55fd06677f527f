"""What is to be generated: all that a worker needs to know, on whatever machine it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ..linear.pretrained import scalar_only
from ..model.load import load_model
from ..model.pretrained import Pretrained
from ..model.weights import weights_digest
from ..plan import Plan
from .formats import Label, shard_name

_LOADED: WeakValueDictionary[str, Pretrained] = WeakValueDictionary()
"""Models that somebody holds: whoever prepares a job has loaded its model, and a worker in the same process need not again."""


@dataclass(frozen=True)
class Job:
    """Samples 0 ... num - 1 of a plan, in shards of consecutive numbers; it can be pickled where `model` is a name.

    Attributes
    ----------
    out : Path
        The folder of the shards.
    plan : Plan
        What is run.
    weights : str
        The fingerprint of the model.
    num : int
        The number of samples.
    labels : tuple of num int or str, optional
        What each sample is conditioned on.
    guidance, seed
        As for `deis sample`.
    model : str or Pretrained, optional
        As `deis.load_model` takes it; or the model itself, for engines that stay in this process.
    load_options, backend, device, dtype
        As `deis.load_model` takes them.
    format : str
        One of `deis.generation.formats.FORMATS`.
    shard : int
        The number of samples of a shard; the last one may have fewer.
    batch : int
        The number of samples of a call of the network, the first that is tried; out of memory halves it.
    """

    out: Path
    plan: Plan
    weights: str
    num: int
    labels: tuple[Label, ...] | None = None
    guidance: float = 1.0
    seed: int = 0
    model: str | Pretrained | None = None
    load_options: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "torch"
    device: str | None = None
    dtype: str = "float32"
    format: str = "png"
    shard: int = 256
    batch: int = 256

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(-(-self.num // self.shard))

    def samples(self, k: int) -> range:
        """Return the numbers of the samples of shard k."""
        return range(k * self.shard, min((k + 1) * self.shard, self.num))

    def path(self, k: int) -> Path:
        """Return the place of shard k."""
        return self.out / shard_name(k, self.format)

    def record_path(self, k: int) -> Path:
        """Return the place of the record of shard k."""
        return self.out / "records" / f"{k:05d}.json"

    @property
    def options(self) -> dict[str, Any]:
        """The options of a run, as `deis.seeded` takes them."""
        return {name: getattr(self, name) for name in ("backend", "device", "dtype", "seed", "guidance")}


def is_made(job: Job, k: int) -> bool:
    """Tell whether there are both shard k and its record, which is written after it."""
    return job.path(k).exists() and job.record_path(k).exists()


def missing(job: Job) -> list[int]:
    """Return the numbers of the shards that are still to be made, in order; others may make them at the same time."""
    return [k for k in job.shards if not is_made(job, k)]


def load(
    model: str | Pretrained | None, backend: str, device: str | None, dtype: str, load_options: Mapping[str, Any]
) -> Pretrained:
    """Return the model, the same one as long as somebody holds it."""
    if isinstance(model, Pretrained):
        return model
    key = repr((model, backend, device, dtype, sorted(load_options.items())))
    found = _LOADED.get(key)
    if found is None:
        found = _LOADED[key] = scalar_only(load_model(model, backend, device, dtype, **load_options))
    return found


def fingerprint(network: Pretrained, model: str | Pretrained | None) -> str:
    """Return the digest of a network's weights; of its file where the weights are out of reach; empty for a function of its own."""
    found = weights_digest(network)
    if not found and isinstance(model, str) and Path(model).is_file():
        return hashlib.sha256(Path(model).read_bytes()).hexdigest()
    return found
