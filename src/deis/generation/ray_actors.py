"""The engine on Ray: actors wherever a cluster has room, each of which takes the next shard when it has made one."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..extras import needs
from .job import Job
from .record import Record
from .worker import make_worker

with needs("ray", "--engine ray"):
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

_DEATHS = (NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError)
_MOST_DEATHS = 3  # of workers at one shard; then the shard is to blame
_AT_ONCE = 2  # shards of an actor: it writes one while it samples the other
_MOST_WORKERS = 1000  # those that no machine has room for wait, which costs next to nothing


def ray_actors(
    job: Job, shards: Sequence[int], done: Callable[[Record], None], workers: int = _MOST_WORKERS, gpus: float = 1.0
) -> None:
    """Make the shards in actors on the Ray cluster of RAY_ADDRESS, or else on this machine.

    There is an actor for each shard, up to `workers`; those for which the cluster has no room start when machines join it. One
    that dies is replaced, and the next that is free makes its shard.

    Parameters
    ----------
    job, shards, done
        As for every engine. All machines must see the folder of the job, and a model in a folder, under the same path.
    workers : int
        The most at a time.
    gpus : float
        The share of a GPU that each has where the device of the job is cuda; otherwise each has a core.

    Raises
    ------
    ConnectionError
        If RAY_ADDRESS does not answer.
    TypeError
        If the model is no name.
    ValueError
        If this machine has not got what one worker needs.
    RuntimeError
        If three workers die at the same shard, or three in a row before their first.
    """
    job, needed = _anywhere(job), {"num_cpus": 1, "num_gpus": gpus if (job.device or "cpu").startswith("cuda") else 0}
    with _cluster(needed):
        _work(ray.remote(_Worker).options(max_concurrency=_AT_ONCE, **needed), job, shards, done, workers)


class _Worker:
    """An actor."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def prepare(self) -> None:
        """Load the model: not when the actor is made, because Ray hands on the exceptions of calls alone."""
        self.worker = make_worker(self.job)

    def make(self, k: int) -> Record:
        return self.worker(k)


def _work(hired: Any, job: Job, shards: Sequence[int], done: Callable[[Record], None], workers: int) -> None:
    """Keep the actors busy until all shards are made."""
    there, waiting, left, deaths = ray.put(job), deque(shards), len(shards), Counter[int | None]()
    busy: dict[Any, tuple[Any, int | None]] = {}
    """The actor behind each call, and its shard; None while it prepares."""

    def hire() -> None:
        actor = hired.remote(there)
        busy[actor.prepare.remote()] = actor, None

    try:
        for _ in range(min(workers, left)):
            hire()
        while left:
            (call,), _ = ray.wait(list(busy))
            actor, k = busy[call]
            try:
                record = _result(call)
            except _DEATHS as error:
                lost = _end(busy, [call for call, (other, _) in busy.items() if other is actor])
                deaths.update(lost)
                _check_hope(deaths, error)
                waiting.extendleft(k for k in lost if k is not None)
                hire()
                continue
            del busy[call]
            deaths[k] = 0
            if record is not None:
                done(record)
                left -= 1
            for _ in range(min(_AT_ONCE if record is None else 1, len(waiting))):
                k = waiting.popleft()
                busy[actor.make.remote(k)] = actor, k
            if not waiting:  # nobody needs those that are not there yet, nor this one once it has made its last shard
                _end(busy, [call for call, (_, k) in busy.items() if k is None])
                if all(other is not actor for other, _ in busy.values()):
                    ray.kill(actor)
    finally:  # on an error, too, the cluster may be the caller's
        _end(busy, list(busy))


def _result(call: Any) -> Record | None:
    """Return what a call returned, or raise what it raised on the other machine."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        raise error.cause from error


def _end(busy: dict[Any, tuple[Any, int | None]], calls: list[Any]) -> list[int | None]:
    """End the actors behind calls, and return the shards."""
    ended = [busy.pop(call) for call in calls]
    for actor, _ in ended:
        ray.kill(actor)
    return [k for _, k in ended]


def _check_hope(deaths: Counter[int | None], error: Exception) -> None:
    for k in (k for k, number in deaths.items() if number == _MOST_DEATHS):
        at = "before their first shard" if k is None else f"at shard {k}"
        raise RuntimeError(
            f"{_MOST_DEATHS} workers died {at}; give each more memory or a smaller batch, and start again. Ray says: {error}"
        ) from error


def _anywhere(job: Job) -> Job:
    """Return the job with paths that do not depend on where a process was started."""
    if not isinstance(job.model, str | None):
        raise TypeError(f"engine='ray' loads the model in other processes, and model is a {type(job.model).__name__}; give a name")
    job = replace(job, out=job.out.resolve())
    folder = isinstance(job.model, str) and Path(job.model).exists()
    return replace(job, model=str(Path(str(job.model)).resolve())) if folder else job


@contextmanager
def _cluster(needed: dict[str, float]) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine; where the caller has done so, use that."""
    if ray.is_initialized():
        yield
        return
    check_cluster()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        has = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
        if not os.environ.get("RAY_ADDRESS") and has < needed["num_gpus"]:
            raise ValueError(
                f"device='cuda' needs {needed['num_gpus']:g} GPU for each worker, and Ray finds {has:g} on this machine; leave the "
                "device out, or name a cluster that has GPUs by RAY_ADDRESS=host:6379"
            )
        yield
    finally:
        ray.shutdown()


def check_cluster() -> None:
    """Check that something listens at RAY_ADDRESS; Ray itself would try for minutes, and then end the process.

    Raises
    ------
    ConnectionError
        If nothing does.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"RAY_ADDRESS={address} does not answer ({error}); start Ray there with ray start --head, or unset RAY_ADDRESS to "
            "work on this machine alone"
        ) from error
