"""Engines: who makes the shards, and where. An engine is a function, and has no schedule of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

from ..arguments import one_of
from .job import Job
from .record import Record
from .worker import make_worker

Engine = Callable[[Job, Sequence[int], Callable[[Record], None]], None]
"""engine(job, shards, done): make these shards, in any order, anywhere, and call done(record) here for each."""

ENGINES = {
    "in_process": "engines:in_process",
    "ray": "ray_actors:ray_actors",
    "ranks": "ranks:ranks",
    "jax": "ranks:jax_processes",
}
"""The module in this package of each engine, and the function in it; the module is imported when the engine is asked for."""


def get_engine(name: str) -> Engine:
    """Return the engine of a name.

    Raises
    ------
    ValueError
        If there is none.
    """
    module, _, function = ENGINES[one_of("engine", name, ENGINES)].partition(":")
    return getattr(import_module(f".{module}", __package__), function)


def in_process(job: Job, shards: Sequence[int], done: Callable[[Record], None]) -> None:
    """Make the shards in this process: while one is encoded and written, the next one is sampled.

    They are made in a random order: processes that work on one folder then seldom make the same shard twice.
    """
    worker = make_worker(job)
    order = random.Random().sample(list(shards), len(shards))
    with ThreadPoolExecutor(2) as pool:
        for record in pool.map(worker, order):
            done(record)
