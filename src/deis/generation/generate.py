"""`deis.generate`: samples by the ten thousand, in shards that survive being killed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import kind, number, one_of, shown, whole
from ..extras import needs
from ..model.pretrained import Pretrained
from ..plan import Plan
from .engines import Engine, get_engine
from .formats import FORMATS, Label
from .job import Job, fingerprint, load, missing
from .manifest import NAME, begin, finish, read_manifest, records
from .publish import clean_up
from .ranks import default_engine, prepare
from .record import Record
from .verification import strangers

_MOST = 10**9
_SHARD, _BATCH = 256, 256


def generate(
    out: str | os.PathLike[str],
    num: int,
    *,
    plan: Plan | None = None,
    model: str | os.PathLike[str] | Pretrained | None = None,
    load_options: Mapping[str, Any] | None = None,
    labels: Sequence[Label] | Label | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    format: str = "png",
    shard: int | None = None,
    batch: int | None = None,
    backend: str = "torch",
    device: str | None = None,
    dtype: str = "float32",
    engine: str | None = None,
    workers: int | None = None,
    gpu_share: float | None = None,
    progress: bool = False,
) -> list[Record]:
    """Write samples into a folder, in shards that are whole or not there; run it again to go on after whatever killed it.

    Sample i depends on the seed and on i alone, but the network rounds differently in batches of different sizes. So every call of
    it has the same size, and the shards come out the same, byte by byte, however often a run is killed and however many workers
    there are, on hardware of one kind. Any number of processes may work on one folder.

    Parameters
    ----------
    out : path
        The folder. What else is in it is reported and left alone.
    num : int
        The number of samples, up to 10**9.
    plan : Plan, optional
        By default the model's own for ten evaluations, see `Pretrained.plan`.
    model : path, str or Pretrained, optional
        As `deis.load_model` takes it; or a model, for engines that stay in this process.
    load_options : mapping, optional
        Options of `deis.load_model`.
    labels : int or str, or sequence of num of them, optional
        The class or the prompt of all samples, or of each. Without them each class in turn, where there are classes.
    guidance : float
        The weight of classifier-free guidance.
    seed : int
        Of the noise.
    format : {"png", "npz", "webdataset"}
        A shard is a folder of PNGs; or an .npz file with arr_0, the images in uint8 of shape (n, height, width, channels), and
        arr_1, their labels; or a tar with .png and .cls (for prompts .txt) for each sample.
    shard : int, optional
        Samples of a shard, by default 256.
    batch : int, optional
        Samples of each call of the network, by default 256 or those of a shard. Where memory is short it is halved, with a warning.
    backend, device, dtype
        As for `deis.load_model`.
    engine : {"in_process", "ray", "ranks", "jax"}, optional
        Who makes the shards: this process; workers on a Ray cluster; or each of the processes that torchrun, accelerate launch or
        JAX know of its part. By default ranks where RANK and WORLD_SIZE are set, as torchrun does, and otherwise this process.
    workers : int, optional
        With ray, the most workers at a time; by default as many as the cluster has room for.
    gpu_share : float, optional
        With ray and device="cuda", the part of a GPU that a worker takes, by default all of it.
    progress : bool
        Show a bar, with images per second and the time that is left.

    Returns
    -------
    list of Record
        One for each finished shard, in order; see `deis.generation.record.Record`. All, unless other processes still work on some.

    Raises
    ------
    FileExistsError
        If the folder holds something else.
    OSError
        On a full disk. The message says how much is missing, and what is finished stays.
    ValueError
        If the folder holds samples of another plan, model, seed or anything else that they depend on; the message names it. If a
        shard there is damaged or was written by another version. For labels that the model does not have.
    """
    where: dict[str, Any] = {"backend": one_of("backend", backend, ("torch", "jax")), "device": device, "dtype": dtype}
    where |= {"model": _named(model), "load_options": dict(load_options or {})}
    engine = default_engine() if engine is None else engine
    network = load(**(where | {"device": prepare(engine, backend, device)}))
    num, folder = whole("num", num, most=_MOST), Path(out)
    where |= {"format": one_of("format", format, FORMATS)} | _sizes(folder, num, shard, batch)
    if backend == "jax" and engine != "ray":  # whose workers have devices of their own
        import_module(".mesh", __package__).check_batch(where["batch"])
    job = Job(
        folder,
        _matching(network.plan() if plan is None else plan, network),
        fingerprint(network, where["model"]),
        num,
        _labels(network, num, labels),
        number("guidance", guidance),
        whole("seed", seed, 0, _MOST),
        **where,
    )
    return run_job(job, _engine(engine, workers, gpu_share), progress)


def _named(model: Any) -> str | Pretrained | None:
    """Return a model, or its name as text."""
    if isinstance(model, Pretrained) or model is None:
        return model
    kind("model", model, (str, os.PathLike), "what deis.load_model takes, or a deis.Pretrained,")
    return os.fspath(model)


def _engine(name: str, workers: int | None, gpu_share: float | None) -> Engine:
    """Return an engine with the options that are given; only Ray has any."""
    engine = get_engine(name)
    options: dict[str, Any] = {} if workers is None else {"workers": whole("workers", workers)}
    options |= {} if gpu_share is None else {"gpus": number("gpu_share", gpu_share, above=0.0)}
    if options and name != "ray":
        raise ValueError(f"workers={workers} and gpu_share={gpu_share} are for engine='ray', and engine={name!r}; leave them out")
    return partial(engine, **options)


def run_job(job: Job, engine: Engine, progress: bool = False) -> list[Record]:
    """Let an engine make the shards that are missing; see `generate`."""
    begin(job)
    clean_up(job.out)
    foreign, _ = strangers(job.out, job.format, job.num, job.shard)
    if foreign:
        warnings.warn(f"{str(job.out)!r} holds what deis did not write; it is left alone: {shown(foreign)}", stacklevel=3)
    with needs(job.backend, "a bar of progress"):
        from tqdm.auto import tqdm
    about = f"{job.plan.method}, {job.plan.nfe} evaluations"
    made = sum(record.samples for record in records(job))
    with tqdm(total=job.num, initial=made, desc=about, unit="image", disable=not progress) as bar:
        engine(job, missing(job), lambda record: bar.update(record.samples))
    clean_up(job.out)
    return finish(job)


def _matching(plan: Plan, network: Pretrained) -> Plan:
    kind("plan", plan, Plan, "a deis.Plan, as deis.make_plan returns,")
    if not plan.matches(network.sde):
        raise ValueError(f"plan was made for the schedule {plan.schedule}, and the model's is {network.sde.name}; make one for it")
    return plan


def _sizes(folder: Path, num: int, shard: int | None, batch: int | None) -> dict[str, Any]:
    """Return the sizes of a shard and a batch: as given, or as the samples in the folder have them."""
    there = read_manifest(folder)["samples"] if (folder / NAME).is_file() else {}
    shard = there.get("shard", min(_SHARD, num)) if shard is None else whole("shard", shard)
    batch = there.get("batch", min(_BATCH, shard)) if batch is None else whole("batch", batch)
    return {"shard": shard, "batch": batch}


def _labels(network: Pretrained, num: int, labels: Sequence[Label] | Label | None) -> tuple[Label, ...] | None:
    """Return what each sample is conditioned on."""
    classes = network.num_classes
    if labels is None:
        return None if classes is None else tuple(i % classes for i in range(num))
    if classes is None and network.embed is None:
        raise ValueError(f"labels={shown(labels)} were given, and the model has no classes; leave them out")
    found = (labels,) * num if isinstance(labels, int | str) else tuple(labels)
    if len(found) != num:
        raise ValueError(f"labels must be one for each of the {num} samples, and are {len(found)}")
    return found if classes is None else tuple(_class(i, label, classes) for i, label in enumerate(found))


def _class(i: int, label: Any, classes: int) -> int:
    if not isinstance(label, int | np.integer) or isinstance(label, bool) or not 0 <= label < classes:
        raise ValueError(f"labels[{i}]={shown(label)} is not a class of the model, 0 ... {classes - 1}")
    return int(label)
