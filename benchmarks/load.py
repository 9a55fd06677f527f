"""`deis serve` under half, one and three times the load that it can serve: python -m benchmarks.load [--seconds 30]

It starts the real server with the bundled MNIST model, in a process of its own, and asks it over HTTP for one digit a request, each
of its own class, seed and number of evaluations, 4 to 12.

capacity    as many clients as the queue has places, each of which asks again when it is answered: answers a second
load L      requests at random times (Poisson, seeded), L times the capacity, whether earlier ones are answered or not. The part
            ends when all are answered; one without an answer after two minutes counts as unanswered.

Each request is answered with 200 (accepted) or refused with 503 and Retry-After; "answered" is the share of the two, and must be
1. "bound" is what an accepted request takes at most: one service time for each batch full of requests that fits into the queue,
and its own. The service time is that of the longest request, its evaluations times the seconds between two calls of the network
while the load is on; where the load leaves pauses, those of the capacity. RSS is the server's memory, as its /metrics tell, when
the part begins, at its middle and at its end. "difference" is the greatest one between twelve of the pictures of the part and
those of `deis.sample` alone. "load_average" is that of the machine at the end of a part: above its number of cores, processes
wait for each other.

Write benchmarks/results/load.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import torch

import deis
from deis.arrays import AnyArray
from deis.draws import drawn

RESULTS = Path(__file__).parent / "results" / "load.csv"
FIELDS = (
    *("date", "dtype", "load", "requests", "seconds", "offered_per_second", "done_per_second", "accepted", "refused", "answered"),
    *("median_latency", "p95_latency", "bound", "longest_refusal", "rss_start_mb", "rss_middle_mb", "rss_end_mb", "difference"),
    "load_average",
)
PATIENCE = 60.0
"""The limit of a request in the server, in seconds; the client waits for twice as long."""
STEPS = (4, 12)
CHECKED = 12
Made = TypeVar("Made")


@dataclass(frozen=True)
class Answer:
    """What came back for a request; status 0 if nothing did."""

    body: dict[str, Any]
    status: int
    seconds: float
    content: bytes
    polite: bool
    """Whether a refusal says when to come again."""


@contextmanager
def served(dtype: str, batch: int, queue: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the server, and yield its process and its address; end it by SIGTERM."""
    options = ["--port", "0", "--dtype", dtype, "--max-batch", str(batch), "--queue", str(queue), "--timeout", str(PATIENCE)]
    command = [sys.executable, "-c", "from deis.cli import main; main()", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            while not (found := re.search(r"deis serve is at (http://[\d.:]+)/", line := process.stdout.readline())):
                assert line, "the server did not start"
            yield process, found.group(1)
        finally:
            process.send_signal(signal.SIGTERM)
            print(f"the server ended with exit code {process.wait()}")


async def ask(client: httpx.AsyncClient, number: int) -> Answer:
    """Ask for a digit; all of it follows from the number."""
    rng = np.random.default_rng(number)
    body = {"nfe": int(rng.integers(STEPS[0], STEPS[1] + 1)), "class": int(rng.integers(10)), "seed": number, "format": "npy"}
    start = time.perf_counter()
    try:
        found = await client.post("/v1/generate", json=body)
    except httpx.HTTPError:
        return Answer(body, 0, time.perf_counter() - start, b"", False)
    return Answer(body, found.status_code, time.perf_counter() - start, found.content, "retry-after" in found.headers)


async def metric(client: httpx.AsyncClient, name: str) -> float:
    """Return one of the server's metrics."""
    text = (await client.get("/metrics")).text
    return float(re.findall(rf"^{name} (.*)$", text, re.MULTILINE)[0])


async def memory(client: httpx.AsyncClient) -> float:
    """Return the server's resident memory in MB."""
    return await metric(client, "process_resident_memory_bytes") / 1e6


async def calls_until(client: httpx.AsyncClient, work: Awaitable[Made]) -> tuple[Made, float]:
    """Return what comes of the work, and the seconds between two calls of the network meanwhile."""
    before, start = await metric(client, "deis_network_calls_total"), time.perf_counter()
    made = await work
    seconds = time.perf_counter() - start
    return made, seconds / (await metric(client, "deis_network_calls_total") - before)


async def capacity_of(client: httpx.AsyncClient, clients: int, seconds: float) -> float:
    """Return the requests a second of a server whose batch is always full."""
    end, numbers, done = time.perf_counter() + seconds, iter(range(10**6, 2 * 10**6)), [0]

    async def one() -> None:
        while time.perf_counter() < end:
            answer = await ask(client, next(numbers))
            assert answer.status == 200, answer.content
            done[0] += time.perf_counter() < end

    await asyncio.gather(*(one() for _ in range(clients)))
    return done[0] / seconds


async def send(client: httpx.AsyncClient, load: float, capacity: float, seconds: float) -> tuple[list[asyncio.Task[Answer]], float]:
    """Send requests at random times, and return their tasks and the server's memory in the middle."""
    rng = np.random.default_rng(round(100 * load))
    gaps = rng.exponential(1 / (load * capacity), round(load * capacity * seconds))
    start, tasks, middle = time.perf_counter(), [], 0.0
    for number, at in enumerate(np.cumsum(gaps).tolist()):
        await asyncio.sleep(start + at - time.perf_counter())
        tasks.append(asyncio.create_task(ask(client, 1000 * round(100 * load) + number)))
        if number == len(gaps) // 2:
            middle = await memory(client)
    return tasks, middle


async def part(
    client: httpx.AsyncClient, load: float, capacity: float, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[Answer], float]:
    """Offer a load, and return what came of it, the answers, and the seconds between two calls of the network."""
    before, start = await memory(client), time.perf_counter()
    (tasks, middle), call = await calls_until(client, send(client, load, capacity, arguments.seconds))
    sent = time.perf_counter() - start
    answers = await asyncio.gather(*tasks)
    wall = time.perf_counter() - start
    memories = {"rss_start_mb": before, "rss_middle_mb": middle, "rss_end_mb": await memory(client)}
    head = {"load": load, "requests": len(answers), "seconds": f"{wall:.1f}", "offered_per_second": f"{len(answers) / sent:.2f}"}
    return head | {name: f"{value:.1f}" for name, value in memories.items()} | report(answers, wall), answers, call


def report(answers: list[Answer], wall: float) -> dict[str, Any]:
    accepted = [answer.seconds for answer in answers if answer.status == 200]
    refused = [answer.seconds for answer in answers if answer.status == 503 and answer.polite]
    values = {
        "done_per_second": len(accepted) / wall,
        "accepted": len(accepted) / len(answers),
        "refused": len(refused) / len(answers),
        "answered": (len(accepted) + len(refused)) / len(answers),
        "median_latency": np.median(accepted),
        "p95_latency": np.quantile(accepted, 0.95),
        "longest_refusal": max(refused, default=0.0),
    }
    return {name: f"{value:.3f}" for name, value in values.items()}


def difference(answers: list[Answer], model: deis.Pretrained, dtype: str) -> float:
    """Return the greatest difference of some of the pictures to those of `deis.sample` alone."""
    found = []
    for answer in [answer for answer in answers if answer.status == 200][:CHECKED]:
        plan = model.plan(answer.body["nfe"])
        noise: AnyArray = drawn(range(1), model.shape, float(plan.sigma[0]), answer.body["seed"]).astype(dtype)
        alone = deis.sample(plan, model.conditional([answer.body["class"]]), torch.from_numpy(noise)).numpy()
        found.append(float(np.abs(np.load(io.BytesIO(answer.content)) - alone).max()))
    return max(found)


async def measure(address: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows, clients, model = [], arguments.queue, deis.load_model(dtype=arguments.dtype)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=address, timeout=2 * PATIENCE, limits=limits) as client:
        await capacity_of(client, clients, 5.0)  # until all is warm
        capacity, full = await calls_until(client, capacity_of(client, clients, arguments.seconds))
        print(f"capacity: {capacity:.2f} requests a second, {full:.3f} s a call; load average {os.getloadavg()[0]:.1f}", flush=True)
        for load in arguments.loads:
            row, answers, call = await part(client, load, capacity, arguments)
            row |= {"date": date.today().isoformat(), "dtype": arguments.dtype, "load_average": f"{os.getloadavg()[0]:.1f}"}
            row["bound"] = f"{(arguments.queue / arguments.batch + 1) * STEPS[1] * (full if load < 1 else call):.3f}"
            rows.append(row | {"difference": f"{difference(answers, model, arguments.dtype):.1e}"})
            print(*(f"{name}={rows[-1][name]}" for name in FIELDS[2:]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of the capacity and of each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 3.0])
    parser.add_argument("--batch", type=int, default=8, help="samples in a call")
    parser.add_argument("--queue", type=int, default=16, help="requests that wait")
    parser.add_argument("--dtype", default="float64")
    arguments = parser.parse_args()
    with served(arguments.dtype, arguments.batch, arguments.queue) as (_, address):
        rows = asyncio.run(measure(address, arguments))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {RESULTS.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
