"""Requests of different lengths on one network: alone, in batches of equal ones, or step by step together.

python -m benchmarks.serving [--seconds 80] [--loads 0.7 3] [--batch 64]

Part one is a queue. Requests for one digit each arrive at random (Poisson, seeded); each asks for its own number of steps, 4 to 50,
and its own class, of the bundled MNIST model. Three servers work through the same arrivals:

alone       one request after the other, in the order of arrival, by `deis.sample`
equal       the oldest request, together with all that wait and have the same plan
stepper     `deis.Stepper`: every request enters at the next step

Time passes in a simulated clock: it jumps to the next arrival where a server waits, and goes on by the measured seconds of what the
server computes. So the three can take turns, a slice of work each, and what else the machine does falls on all alike. A load of 1
is what `alone` can just serve, by the time of a call measured before: 3 asks for three times as much. Latency is from arrival to
result.

Part two is `deis.sample` of a list of 64 plans, against the bare calls of the network on the same sub-batches with the same
labels, in turns; and against the network's time within its own run, which is the steadier one. Of seconds the least of the rounds
is written, and of ratios the median.

Write benchmarks/results/serving.csv.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import deis
from deis.arrays import Array

RESULTS = Path(__file__).parent / "results" / "serving.csv"
FIELDS = (
    *("part", "load", "server", "requests", "seconds", "requests_per_second"),
    *("mean_latency", "median_latency", "p95_latency", "mean_batch"),
)
STEPS = (4, 50)
ENDED = object()


@dataclass(frozen=True)
class Request:
    number: int
    arrival: float
    plan: deis.Plan
    label: int
    noise: Tensor


@dataclass
class Queue:
    """One server's arrivals in its own simulated time."""

    left: list[Request]
    now: float = 0.0
    waiting: list[Request] = field(default_factory=list)
    latency: dict[int, float] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)
    """The samples of each call of the network."""
    results: dict[int, Tensor] = field(default_factory=dict)

    def arrive(self, idle: bool) -> None:
        """Let in what has arrived by now; an idle server waits for the next."""
        if idle and not self.waiting and self.left:
            self.now = max(self.now, self.left[0].arrival)
        while self.left and self.left[0].arrival <= self.now:
            self.waiting.append(self.left.pop(0))

    def done(self, request: Request, x_0: Tensor) -> None:
        self.latency[request.number], self.results[request.number] = self.now - request.arrival, x_0


def timed(queue: Queue, work: Callable[[], object]) -> object:
    start = time.perf_counter()
    result = work()
    queue.now += time.perf_counter() - start
    return result


def by_batches(queue: Queue, network: deis.Pretrained, most: int) -> Iterator[None]:
    """Serve the oldest request, with up to `most` in all of the same plan; yield after each slice of work."""
    while queue.left or queue.waiting:
        queue.arrive(idle=True)
        plan = queue.waiting[0].plan
        batch = [request for request in queue.waiting if request.plan is plan][:most]
        queue.waiting = [request for request in queue.waiting if request not in batch]
        x_T = torch.cat([request.noise for request in batch])
        denoiser = network.conditional([request.label for request in batch])
        x_0 = timed(queue, lambda plan=plan, denoiser=denoiser, x_T=x_T: deis.sample(plan, denoiser, x_T))  # type: ignore[misc]
        assert isinstance(x_0, Tensor)
        queue.calls += [len(batch)] * plan.nfe
        for request, x in zip(batch, x_0, strict=True):
            queue.done(request, x[None])
        yield


def by_steps(queue: Queue, network: deis.Pretrained, most: int) -> Iterator[None]:
    """Serve all by one Stepper, with up to `most` in flight; yield after each step."""
    stepper, requests = deis.Stepper(network), {request.number: request for request in queue.left}
    while queue.left or queue.waiting or len(stepper):
        queue.arrive(idle=not len(stepper))

        def step() -> int:
            while queue.waiting and len(stepper) < most:
                request = queue.waiting.pop(0)
                stepper.add(request.plan, request.noise, request.number, labels=[request.label])
            return stepper.step()

        size = timed(queue, step)
        assert isinstance(size, int)
        queue.calls.append(size)
        for number, x_0 in stepper.finished().items():
            assert isinstance(number, int)
            queue.done(requests[number], x_0)
        yield


def requests_of(network: deis.Pretrained, count: int, rate: float) -> list[Request]:
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    plans = {n: deis.make_plan(network.sde, nfe=n) for n in range(STEPS[0], STEPS[1] + 1)}
    numbers, labels = rng.integers(STEPS[0], STEPS[1] + 1, count).tolist(), rng.integers(0, 10, count).tolist()
    noise = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return [
        Request(i, arrival, plans[numbers[i]], labels[i], noise[i : i + 1] * float(plans[numbers[i]].sigma[0]))
        for i, arrival in enumerate(arrivals.tolist())
    ]


def seconds_of_a_call(network: deis.Pretrained, batch: int, rounds: int = 7) -> float:
    denoiser, x, t = network.conditional([0] * batch), torch.zeros(batch, 1, 28, 28), torch.full((batch,), 0.5)
    found = []
    with torch.no_grad():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            denoiser(x, t)
            found.append(time.perf_counter() - start)
    return float(np.median(found[1:]))


def queue_part(network: deis.Pretrained, seconds: float, load: float, most: int) -> list[dict[str, object]]:
    one = seconds_of_a_call(network, 1) * sum(STEPS) / 2
    count = max(8, round(seconds / 2.2 / one))  # the three together: 1 for alone, a little less for equal, a part for the stepper
    print(f"a request alone takes {one:.3f} s; {count} requests at {load} times that rate")
    servers: dict[str, Callable[[Queue], Iterator[None]]] = {
        "alone": lambda queue: by_batches(queue, network, 1),
        "equal": lambda queue: by_batches(queue, network, most),
        "stepper": lambda queue: by_steps(queue, network, most),
    }
    arrivals = requests_of(network, count, load / one)
    queues = {name: Queue(list(arrivals)) for name in servers}
    runs = {name: server(queues[name]) for name, server in servers.items()}
    while runs:  # the one that is behind in its own time goes next, so that all see the same machine
        name = min(runs, key=lambda name: queues[name].now)
        if next(runs[name], ENDED) is ENDED:
            del runs[name]
    for queue in queues.values():
        for number, x_0 in queues["alone"].results.items():
            torch.testing.assert_close(queue.results[number], x_0, rtol=1e-3, atol=1e-3)
    return [{"part": "queue", "load": load} | report(name, queue) for name, queue in queues.items()]


def report(name: str, queue: Queue) -> dict[str, object]:
    latency: Array = np.array(list(queue.latency.values()))
    row: dict[str, object] = {"server": name, "requests": len(latency), "seconds": f"{queue.now:.2f}"}
    row["requests_per_second"] = f"{len(latency) / queue.now:.2f}"
    values = {"mean_latency": latency.mean(), "median_latency": np.median(latency), "p95_latency": np.quantile(latency, 0.95)}
    return row | {key: f"{value:.3f}" for key, value in values.items()} | {"mean_batch": f"{np.mean(queue.calls):.2f}"}


def batch_part(network: deis.Pretrained, batch: int, rounds: int) -> list[dict[str, object]]:
    """Time a list of plans against the bare network on the same sub-batches, in turns, call by call."""
    requests = requests_of(network, batch, 1.0)
    plans, labels = [request.plan for request in requests], np.array([request.label for request in requests])
    x_T = torch.cat([request.noise for request in requests])
    left = [np.flatnonzero([plan.nfe > k for plan in plans]) for k in range(max(plan.nfe for plan in plans))]
    times_of = [torch.tensor([plans[i].t[k] for i in rows], dtype=torch.float32) for k, rows in enumerate(left)]
    inputs = [(x_T[rows], t, labels[rows]) for rows, t in zip(left, times_of, strict=True)]

    @torch.no_grad()
    def bare() -> None:
        for x, t, c in inputs:
            network.net(x, network.time_scale * t, c)

    inside: list[float] = []

    def net(x: Tensor, t: Tensor, c: object) -> Tensor:
        start = time.perf_counter()
        m = network.net(x, t, c)
        inside[-1] += time.perf_counter() - start
        return m

    denoiser = replace(network, net=net).conditional(labels)

    def several() -> None:
        inside.append(0.0)
        deis.sample(plans, denoiser, x_T)

    runs: dict[str, Callable[[], object]] = {"list of plans": several, "bare network": bare}
    times: dict[str, list[float]] = {name: [] for name in runs}
    bare()
    for k in range(rounds):
        for name in list(runs)[:: 1 if k % 2 else -1]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    ratios = np.divide(times["list of plans"], times["bare network"])
    own = np.divide(times["list of plans"], inside)
    print(f"{batch} samples, {sum(map(len, left))} evaluations in {len(left)} calls")
    print(f"list of plans over bare network: {ratios.round(3)}; over the network's time in its own run: {own.round(4)}")
    mean = float(np.mean([len(rows) for rows in left]))
    return [
        {"part": "batch", "server": name, "requests": batch, "seconds": f"{min(found):.3f}", "mean_batch": f"{mean:.2f}"}
        for name, found in times.items()
    ] + [
        {"part": "batch", "server": f"list of plans over {name}", "requests": batch, "seconds": f"{np.median(found):.4f}"}
        for name, found in (("bare network", ratios), ("the network in its own run", own))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80, help="of work in the queues, about")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 3.0], help="a queue each, see above")
    parser.add_argument("--most", type=int, default=64, help="in one batch of the queue")
    parser.add_argument("--batch", type=int, default=64, help="plans in the list")
    parser.add_argument("--rounds", type=int, default=5, help="of the list and the bare network")
    arguments = parser.parse_args()
    network = deis.load_model()
    each = arguments.seconds / len(arguments.loads)
    rows = [row for load in arguments.loads for row in queue_part(network, each, load, arguments.most)]
    rows += batch_part(network, arguments.batch, arguments.rounds)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(" | ".join(str(row.get(name, "")) for name in FIELDS))


if __name__ == "__main__":
    main()
