"""What the simulation of docs/scale.md is given: what this project adds to the network's own time, on this machine.

python -m benchmarks.scale_inputs         # minutes; on a machine with Ray: writes benchmarks/results/scale_inputs.csv

The start of a worker, the handing out of a shard by Ray, the replacement of a worker that was killed, the writing of a shard, and
the speed of two workers over that of one.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import deis
from deis.generation.job import Job
from deis.generation.publish import publish

INPUTS = Path(__file__).parent / "results" / "scale_inputs.csv"


@contextmanager
def ray_of(cores: int) -> Iterator[None]:
    """Start a Ray cluster of so many workers on this machine."""
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=40, object_store_memory=80 * 2**20)
    try:
        yield
    finally:
        ray.shutdown()


def start() -> tuple[float, float]:
    """Return the seconds, of the wall and of the processor, from the start of a process to its first shard, of one sample."""
    with tempfile.TemporaryDirectory() as folder:
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = f"import deis; deis.generate({folder + '/out'!r}, 1, plan=deis.load_model().plan(4))"
        subprocess.run([sys.executable, "-c", command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def hand_out(workers: int = 2, shards: int = 2000) -> float:
    """Return the seconds that Ray and our loop take to hand out a shard, to two workers that return at once; the others wait."""
    import ray

    from deis.generation.ray_actors import _work

    class Idle:
        def __init__(self, job: Job) -> None: ...

        def prepare(self) -> None: ...

        def make(self, k: int) -> int:
            return k

    times: list[float] = []
    job = Job(Path("nowhere"), deis.make_plan(deis.VPSDE.linear(), nfe=1), "", shards, shard=1)
    with ray_of(2):
        hired = ray.remote(Idle).options(num_cpus=1, max_concurrency=2)
        _work(hired, job, range(shards), lambda _: times.append(time.perf_counter()), workers)
    return (times[-1] - times[0]) / (shards - 1)


def ray_run(workers: int, num: int, killed: bool = False) -> tuple[list[float], float | None]:
    """Return when each shard of 8 samples was done, and how long after a worker was killed there were `workers` again."""
    replaced = list[float]()
    with tempfile.TemporaryDirectory() as folder, ray_of(workers):
        out = Path(folder, "out")
        killer = threading.Thread(target=_kill, args=(out, workers, replaced))
        if killed:
            killer.start()
        watcher = Watcher(out, num // 8)
        deis.generate(out, num, plan=deis.load_model().plan(10), shard=8, engine="ray", workers=workers, format="npz")
        watcher.join()
        if killed:
            killer.join()
    return watcher.done, replaced[0] if replaced else None


class Watcher(threading.Thread):
    """Notes when each shard is done."""

    def __init__(self, out: Path, shards: int) -> None:
        super().__init__()
        self.out, self.shards, self.done = out, shards, list[float]()
        self.start()

    def run(self) -> None:
        while len(self.done) < self.shards:
            found = len(list((self.out / "records").glob("*.json")))
            self.done += [time.perf_counter()] * (found - len(self.done))
            time.sleep(0.005)


def _kill(out: Path, workers: int, replaced: list[float]) -> None:
    """Kill a worker after the first shard, and note when another has loaded the model: when its memory is that of the killed."""
    import psutil

    def found() -> list[Any]:
        return [child for child in psutil.Process().children(recursive=True) if child.name().startswith("ray::_Worker")]

    while not any(out.glob("records/*.json")):
        time.sleep(0.01)
    victim = found()[0]
    memory, begin = victim.memory_info().rss, time.perf_counter()
    os.kill(victim.pid, signal.SIGKILL)
    while True:
        living = [child.memory_info().rss for child in found() if child.pid != victim.pid]
        if sum(rss > 0.9 * memory for rss in living) >= workers:
            replaced.append(time.perf_counter() - begin)
            return
        time.sleep(0.05)


def rate(times: list[float]) -> float:
    """Return shards a second, after the first and without the last ones, when a worker may have nothing to do."""
    middle = times[1 : len(times) - 4]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def written(megabytes: int = 64) -> float:
    """Return the bytes a second of writing a shard and flushing it to the disk."""
    content = random.randbytes(megabytes * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        publish(content, Path(folder, "shard"))
        return len(content) / (time.perf_counter() - begin)


def measure(rounds: int, num: int) -> None:
    """Write what this machine says."""
    starts = [start() for _ in range(rounds)]
    one_two = [[rate(ray_run(workers, num)[0]) for workers in (1, 2)] for _ in range(rounds)]
    replaced = [found for _ in range(rounds) if (found := ray_run(2, num, killed=True)[1]) is not None]
    values = {
        "start": (statistics.median(wall for wall, _ in starts), "s", "a process from its start to its first shard, of the wall"),
        "start_processor": (statistics.median(own for _, own in starts), "s", "the same, of the processor"),
        "hand_out": (hand_out(), "s", "Ray hands out one shard"),
        "hand_out_1000": (hand_out(1000), "s", "the same, while 998 workers wait for room"),
        "replace": (statistics.median(replaced), "s", "from the death of a Ray worker until another has the model in memory"),
        "write": (statistics.median(written() for _ in range(rounds)), "B/s", "writing a shard of 64 MiB to the disk"),
        "scaling": (statistics.median(two / one for one, two in one_two), "", "shards a second of two Ray workers over one"),
        "load": (os.getloadavg()[0], "", "processes that wanted to run, on two cores"),
    }
    with INPUTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "value", "unit", "what", "date"])
        writer.writerows(
            [name, f"{value:.5g}", unit, what, date.today().isoformat()] for name, (value, unit, what) in values.items()
        )
    print(INPUTS.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement; the median is written")
    parser.add_argument("--num", type=int, default=320, help="samples of each run on Ray")
    arguments = parser.parse_args()
    measure(arguments.rounds, arguments.num)


if __name__ == "__main__":
    main()
