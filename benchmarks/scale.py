"""What a million and a billion samples cost, on paper: a small simulation with measured inputs, and plain formulas.

python -m benchmarks.scale_inputs         # measures what this project adds, see there
python -m benchmarks.dit --batches 64     # measures a sample of DiT-XL/2, on an H100
python -m benchmarks.scale simulate       # a minute; needs SimPy: writes benchmarks/results/scale.csv
python -m benchmarks.scale report > docs/scale.md

The life of a GPU and the speed of a store are assumptions, with their sources on the page.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pages import measured
from .scale_inputs import INPUTS

RESULTS = Path(__file__).parent / "results" / "scale.csv"
DIT = next(row for row in measured(RESULTS.with_name("dit.csv")) if row["way"] == "cuda graph")
SAMPLE = float(DIT["ms_per_sample"]) / 1e3  # seconds of a GPU
BYTES = 3 * 256 * 256
LIFE = 54 * 24 * 3600.0 * 16384 / 419  # seconds of a GPU between two failures
STORE = 20e9  # bytes a second, for all workers together
REQUESTS = 2  # of a shard: itself and its record
HEARTBEAT = 100.0  # seconds until JAX misses a process


# The simulation


@dataclass(frozen=True)
class Setting:
    """A run: how many samples, in what shards, by which engine on how many GPUs."""

    samples: int
    shard: int
    engine: str
    workers: int
    life: float = LIFE


def simulate(setting: Setting, inputs: dict[str, float]) -> dict[str, object]:
    """Run one setting, and return its row."""
    import simpy

    env, rng = simpy.Environment(), random.Random(0)
    run = _Run(setting, inputs, env, rng, simpy.Resource(env, 1), simpy.Resource(env, max(1, int(STORE / inputs["write"]))))
    workers = [env.process(_worker(run, rank)) for rank in range(setting.workers)]
    env.run(until=env.all_of(workers))
    hours = env.now / 3600
    spent, useful = hours * setting.workers, setting.samples * SAMPLE / 3600
    return {
        **{name: getattr(setting, name) for name in ("samples", "engine", "workers", "shard")},
        "life": f"{setting.life / 3600:.5g}",
        **{"hours": f"{hours:.4g}", "gpu_hours": f"{spent:.4g}", "busy": f"{useful / spent:.4f}", "failures": run.failures},
        **{"lost_gpu_hours": f"{run.lost / 3600:.4g}", "requests": REQUESTS * setting.samples // setting.shard},
    }


class _Run:
    """What the workers of a run share."""

    def __init__(self, setting: Setting, inputs: dict[str, float], env: Any, rng: random.Random, driver: Any, store: Any) -> None:
        shards = setting.samples // setting.shard
        one = setting.engine == "ray"
        queues = [shards] if one else [len(range(rank, shards, setting.workers)) for rank in range(setting.workers)]
        self.left, self.one = queues, one
        self.setting, self.inputs, self.env, self.rng, self.driver, self.store = setting, inputs, env, rng, driver, store
        self.failures, self.lost = 0, 0.0
        self.broken = env.event()

    def life(self) -> float:
        return self.env.now + self.rng.expovariate(1 / self.setting.life)

    def break_all(self) -> None:
        """Let a failure stop every process, as torchrun and JAX do."""
        self.broken, broken = self.env.event(), self.broken
        broken.succeed()


def _worker(run: _Run, rank: int) -> Iterator[Any]:
    env, inputs, queue = run.env, run.inputs, 0 if run.one else rank
    seconds, writing = run.setting.shard * SAMPLE, run.setting.shard * BYTES / inputs["write"]
    yield env.timeout(inputs["start"])
    dies, written = run.life(), env.timeout(0)
    while run.left[queue] > 0:
        run.left[queue] -= 1
        if run.one:
            with run.driver.request() as turn:
                yield turn
                yield env.timeout(inputs["hand_out_1000"])
        begin, broken = env.now, run.broken
        sampled = env.timeout(min(seconds, max(dies - begin, 0.0)))
        yield sampled if run.one else sampled | broken
        if env.now - begin < seconds * (1 - 1e-9):
            yield from _fail(run, begin, broken, dies)
            run.left[queue] += 1
            dies = run.life()
            continue
        yield written  # a worker writes one shard while it samples the next
        written = env.process(_write(run, writing))
    yield written


def _write(run: _Run, seconds: float) -> Iterator[Any]:
    with run.store.request() as turn:
        yield turn
        yield run.env.timeout(seconds)


def _fail(run: _Run, begin: float, broken: Any, dies: float) -> Iterator[Any]:
    """Lose the shard of a worker; where the engine stops with it, those of all."""
    first = not broken.triggered
    run.failures += first
    if first and not run.one:
        run.break_all()
    again = run.inputs["replace"] if run.one else run.inputs["start"] + (HEARTBEAT if run.setting.engine == "jax" else 0.0)
    run.lost += run.env.now - begin + again
    yield run.env.timeout(again)


SPOT = 24 * 3600.0
SETTINGS = [
    *(Setting(10**6, 1000, engine, workers) for engine in ("ray", "ranks") for workers in (8, 64)),
    *(Setting(10**9, 10**4, engine, 512, life) for life in (LIFE, SPOT) for engine in ("ray", "ranks", "jax")),
    *(Setting(10**9, 10**4, "ray", workers) for workers in (1024, 4096)),
]


def simulate_all() -> None:
    inputs = {row["name"]: float(row["value"]) for row in measured(INPUTS)}
    rows = [simulate(setting, inputs) for setting in SETTINGS]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(RESULTS.read_text())


# The page


def report() -> None:
    """Print docs/scale.md."""
    rows = {row["name"]: row for row in measured(INPUTS)}
    value = {name: float(row["value"]) for name, row in rows.items()}
    print(_HEAD.format(sample=SAMPLE * 1e3, million=1e6 * SAMPLE / 3600, billion=1e9 * SAMPLE / 3600))
    for row in measured(RESULTS):
        print("| " + " | ".join(map(_shown, row.values())) + " |")
    seconds = {shard: shard * SAMPLE for shard in (1000, 10000)}
    driver = {shard: int(each / value["hand_out_1000"]) for shard, each in seconds.items()}
    storing = int(STORE * SAMPLE / BYTES)
    lost = {name: seconds[10000] / 2 + value[name] for name in ("replace", "start")}
    print(
        _BODY.format(
            **value,
            dit=DIT,
            sample=SAMPLE * 1e3,
            HEARTBEAT=HEARTBEAT,
            day=next(iter(rows.values()))["date"],
            driver=driver,
            storing=storing,
            lost=lost,
            life_hours=LIFE / 3600,
            pace=4096 * lost["start"] / 3600,
            hand_ms=value["hand_out"] * 1e3,
            hands_ms=value["hand_out_1000"] * 1e3,
            write_mb=value["write"] / 1e6,
            every=LIFE / 4096 / 3600,
            per_gpu=BYTES / SAMPLE / 1e6,
        )
    )


def _shown(text: str) -> str:
    """Return a value of a table: three digits, or all of a large number."""
    if text.isalpha():
        return text
    value = float(text)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


_HEAD = """# A million samples, and a billion

On paper: what many samples cost, where each engine stops to scale, and what a failure costs. The network is DiT-XL/2 at 256 x 256
with guidance, without its decoder. Ten calls of it take {sample:.1f} milliseconds of an H100 for a sample, so **a million samples
take {million:.1f} GPU hours, and a billion {billion:,.0f}**. The rest costs a percent or two, as long as there are many more shards
than GPUs and the store keeps up.

| samples | engine | GPUs | shard | life of a GPU, h | hours | GPU hours | share that samples | failures | GPU hours lost | writes |
|---|---|---|---|---|---|---|---|---|---|---|"""

_BODY = """
`ranks` is torchrun or accelerate launch. (`python -m benchmarks.scale simulate`, with SimPy. One run of each, seed 0.)

## Formulas

With S samples in a shard, c seconds of a GPU for a sample, N samples and W GPUs:

- GPU hours: N c / 3600. A shard takes T = S c.
- Storage: N x 196,608 bytes for pictures of 3 x 256 x 256 without compression: 0.2 TB for a million, 197 TB for a billion.
- Requests: 2 N / S, a shard and its record. Reading a folder again, as every start does, costs the same number.
- The end: the last shards finish up to T apart, so choose N / S at least ten times W.
- A failure every M / W, where M is the life of a GPU. It costs T / 2 + r of one GPU with Ray, and W (T / 2 + s) with `ranks`,
  where the launcher stops all and starts them again; `jax` needs up to {HEARTBEAT:.0f} seconds more to notice.

## Where each engine stops to scale

| engine | what is full first | at |
|---|---|---|
| `in_process` | the one GPU | 1 |
| `ray` | what hands out the shards: T / {hands_ms:.1f} ms | {driver[1000]:,} GPUs; with shards of 10,000, {driver[10000]:,} |
| `ranks`, `jax` | nothing is shared; but each rank has a fixed part, so the slowest one ends the run | the store |
| `--backend jax` on one machine | a batch of a few samples for each device | batch / devices |
| every one | the store: {per_gpu:.0f} MB a second for each GPU, against 20 GB in all | {storing:,} GPUs |

The memory of the process that starts a run holds the label of every sample, so a billion are better made as a hundred folders of
ten million, each with its own seed.

## What a failure costs

One GPU of 4096 fails every {every:.0f} hours. With Ray that costs {lost[replace]:.0f} seconds of one GPU. With `ranks` all stop,
and it costs {pace:.0f} GPU hours: little beside {every:.0f} hours of 4096. On spot machines that live for a day, one of 512 goes
every three minutes. There take Ray, or shards of a tenth: `ranks` and `jax` lose a third and more. Finished shards are never lost.

## What was measured, and what is assumed

| | | |
|---|---|---|
| a process from its start to its first shard (bundled model) | {start:.0f} s; {start_processor:.1f} s of the processor | measured |
| Ray hands out a shard | {hand_ms:.2f} ms; {hands_ms:.1f} ms while 998 workers wait for room | measured |
| from the death of a Ray worker until another has the model | {replace:.0f} s | measured |
| a shard of 64 MiB to the disk | {write_mb:.0f} MB/s | measured |
| two Ray workers against one, shards a second | {scaling:.2f} | measured, on two cores |
| ten guided calls of DiT-XL/2 in bfloat16, 64 at a time | {sample:.1f} ms a sample, {dit[tflops]} TFLOP/s | measured |
| the life of a GPU | {life_hours:,.0f} hours: 419 failures of 16,384 in 54 days | Llama 3, arXiv 2407.21783 |
| the store | 20 GB/s for all together | a guess; an object store takes 3,500 writes a second for each prefix (AWS) |

DiT-XL/2 was measured on {dit[date]} on an {dit[device]}, with random weights (`python -m benchmarks.dit --batches 64`). All
else was measured on {day} on two virtual cores of an x86 CPU, with a load of {load:.1f} by the measurements themselves.
A worker on a GPU machine loads a network that is larger, from disks that are faster. (`python -m benchmarks.scale_inputs`)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["simulate", "report"])
    {"simulate": simulate_all, "report": report}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
