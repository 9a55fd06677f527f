"""Engines of processes that somebody else has started: torchrun, accelerate launch, or JAX on several machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..extras import needs
from .engines import get_engine, in_process
from .job import Job
from .record import Record

_LAUNCHERS = "start it by torchrun or accelerate launch, which set it"


def started_as_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher has started this process as one of several."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def default_engine() -> str:
    """Return the name of the engine where none is asked for."""
    return "ranks" if started_as_rank() else "in_process"


def rank_and_world(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return this process' number and how many there are, from RANK and WORLD_SIZE.

    Raises
    ------
    ValueError
        If one is missing, or they are not such numbers.
    """
    rank, world = _number("RANK", environ), _number("WORLD_SIZE", environ)
    if not rank < world:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={world}; {_LAUNCHERS}")
    return rank, world


def rank_device(device: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return this process' own device: cuda is the GPU of number LOCAL_RANK.

    Raises
    ------
    ValueError
        If LOCAL_RANK is missing or no number.
    """
    return f"cuda:{_number('LOCAL_RANK', environ)}" if device == "cuda" else device


def _number(name: str, environ: Mapping[str, str]) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r} in the environment must be a number for engine='ranks'; {_LAUNCHERS}")
    return int(value)


def ranks(job: Job, shards: Sequence[int], done: Callable[[Record], None]) -> None:
    """Make this process' part of the shards, of which there are WORLD_SIZE; nothing is sent between the processes.

    Raises
    ------
    ValueError
        If RANK, WORLD_SIZE or LOCAL_RANK is missing in the environment.
    """
    in_process(replace(job, device=rank_device(job.device)), part(shards, *rank_and_world()), done)


def part(shards: Sequence[int], rank: int, world: int) -> list[int]:
    """Return the shards of a process: by their numbers, since a process that starts late finds fewer missing than the first."""
    return [k for k in shards if k % world == rank]


def join_jax() -> None:
    """Join the other JAX processes; it must be done before JAX has computed anything.

    JAX finds them itself on TPU pods, under Slurm, MPI and Kubernetes. Elsewhere JAX_COORDINATOR_ADDRESS says where the first one
    is, and RANK and WORLD_SIZE which one this is of how many.

    Raises
    ------
    ConnectionError
        If that fails; the message says what JAX says.
    """
    with needs("jax", "engine='jax'"):
        import jax
    if jax.distributed.is_initialized():
        return
    rank, world = rank_and_world() if started_as_rank() else (None, None)
    try:
        jax.distributed.initialize(num_processes=world, process_id=rank)
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"engine='jax' cannot join the other processes ({error}); set JAX_COORDINATOR_ADDRESS=host:port of the first one, RANK "
            "and WORLD_SIZE, or leave the engine out to work on this machine alone"
        ) from error


def jax_processes(job: Job, shards: Sequence[int], done: Callable[[Record], None]) -> None:
    """Make this process' part of the shards, each batch on all devices of its machine; see `join_jax`.

    Every machine makes whole shards and writes them itself, so that no sample crosses the network and no machine waits for another.
    """
    import jax

    in_process(job, part(shards, jax.process_index(), jax.process_count()), done)


def prepare(engine: str, backend: str, device: str | None) -> str | None:
    """Join the other processes of an engine, before any model is loaded, and return the device to load it on in this one.

    Raises
    ------
    ConnectionError, ImportError, ValueError
        If the engine is unknown, is not installed, cannot be reached, or cannot use the backend or the device.
    """
    get_engine(engine)
    if engine == "jax":
        if backend != "jax":
            raise ValueError(f"engine='jax' is for backend='jax', and backend={backend!r}; give engine='ranks' or 'ray' for torch")
        join_jax()
    elif engine == "ranks":
        rank_and_world()
        if backend == "jax" and "LOCAL_RANK" in os.environ:
            import jax

            jax.config.update("jax_cuda_visible_devices", os.environ["LOCAL_RANK"])
        return rank_device(device)
    elif engine == "ray":
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device={device!r} names one GPU, and engine='ray' gives each worker its own; give cuda")
        from .ray_actors import check_cluster

        check_cluster()
        return None  # the process that hands out the shards needs the model for its fingerprint only, and may have no GPU
    return device
