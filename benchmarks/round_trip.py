"""There and back: data encoded to noise and decoded again, on the bundled MNIST model; and a picture between two digits.

python -m benchmarks.round_trip
python -m benchmarks.round_trip grids
python -m benchmarks.round_trip report > docs/encode.md
python -m benchmarks.round_trip picture --data mnist.npz

16 digits, labels in turn, are the converged solutions x_0 of noises x_T (200 steps of tab3). For each method and budget, on the
method's own grid, three errors, medians over the samples of the root mean square difference: `encode` of x_T found from x_0,
`decode` of x_0 found from x_T, and `round_trip` of x_0 decoded from what it was encoded to, by as many evaluations each way. Of the
exactly invertible methods `invert` is the round trip of `deis.invert`, in float32 as everything here.

`grids` encodes by `auto` on vp_t grids of other powers, and decodes on the grid that it has by default.

The first writes benchmarks/results/round_trip.csv, a line a measurement, and goes on from there when it is started again; `report`
prints the page and draws docs/round-trip.png; `picture` draws docs/interpolation.png from MNIST's test set (x_test, y_test).
"""

from __future__ import annotations

import argparse
import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import deis
from deis.methods.registry import REGISTRY

from .figures import MARKS
from .methods import RESULTS, error
from .pages import folded, measured

BUDGETS = (5, 10, 20)
FIELDS = ("method", "nfe", "encode", "decode", "round_trip", "invert")
FAMILIES = {
    "tab<q>": (1, 2, 3), "rhoab<q>": (1, 2), "lms<q>": (4,), "ipndm<q>": (2, 3), "deis_abm<q>": (1,), "unipc<q>": (2, 3),
    "unipc<q>_bh1": (2,), "unipc<q>_bh2": (2, 3), "parallel<q>": (2,), "ipndm_v<q>": (2, 3),
    "rhork_<tableau>": ("2heun", "2midpoint", "3kutta", "4rk"),
}  # fmt: skip
PATH, GRIDS_PATH = RESULTS / "round_trip.csv", RESULTS / "round_trip_grids.csv"
POWERS = (1.5, 2.0, 3.0, 4.0, 5.0)
DOCS = Path(__file__).parent.parent / "docs"
SHOWN = ("auto", "tab3", "ddim", "dpmpp_2m", "unipc3", "rhork_3kutta", "bdia", "belm")


def names() -> list[str]:
    """Return the names of the methods without noise, of families some."""
    found = []
    for entry in REGISTRY:
        if not entry.weak and entry.order is not None:
            part = "<tableau>" if "<tableau>" in entry.name else "<q>"
            found += [entry.name.replace(part, str(number)) for number in FAMILIES.get(entry.name, ("",))]
    return found


class Digits:
    """The problem: the network, noises, and the digits that they are of."""

    def __init__(self, num: int = 16) -> None:
        network = deis.load_model()
        self.sde, self.model = network.sde, network.conditional(np.arange(num) % 10)
        self.x_T = torch.from_numpy(np.random.default_rng(7).standard_normal((num, *network.shape), dtype=np.float32))
        self.x_0: Tensor = deis.sample(deis.make_plan(self.sde, "tab3", 200), self.model, self.x_T)

    def measure(self, method: str, nfe: int) -> dict[str, Any]:
        """Return one line of the results."""
        up, down = (deis.make_plan(self.sde, method, nfe=nfe, direction=way) for way in ("encode", "decode"))
        states = deis.encode(up, self.model, self.x_0, trajectory=True)
        found = {
            "encode": error(states[-1], self.x_T),
            "decode": error(deis.sample(down, self.model, self.x_T), self.x_0),
            "round_trip": error(deis.sample(down, self.model, states[-1]), self.x_0),
        }
        if method in ("bdia", "belm"):
            found["invert"] = error(deis.invert(up, self.model, states[-2:]), self.x_0)
        return {"method": method, "nfe": nfe} | {name: f"{value:.4g}" for name, value in found.items()}


def measure() -> None:
    done = {(row["method"], int(row["nfe"])) for row in measured(PATH)}
    problem = Digits()
    with PATH.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not done:
            writer.writeheader()
        for method in names():
            for nfe in BUDGETS:
                if (method, nfe) not in done:
                    try:
                        writer.writerow(problem.measure(method, nfe))
                    except ValueError as reason:  # a budget that the method cannot meet
                        print(f"{method}, {nfe}: {reason}")
                    file.flush()


def measure_grids() -> None:
    problem = Digits()
    with GRIDS_PATH.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["power", "nfe", "encode", "round_trip"])
        for nfe in BUDGETS:
            down = deis.make_plan(problem.sde, nfe=nfe)
            for power in POWERS:
                up = deis.make_plan(problem.sde, nfe=nfe, ts_phase="vp_t", ts_order=power, direction="encode")
                x_T = deis.encode(up, problem.model, problem.x_0)
                again = error(deis.sample(down, problem.model, x_T), problem.x_0)
                writer.writerow([power, nfe, f"{error(x_T, problem.x_T):.4g}", f"{again:.4g}"])


INTRODUCTION = """# Encode and invert

`deis.encode` takes data to the noise that they come from. Its plans are made like all others, with `direction="encode"`: every
method without noise runs upwards, on the same grid, at the same order and cost.

```python
import torch
import deis

network = deis.load_model()
x_0 = deis.sample(network.plan(10), network.conditional([3, 8]), torch.randn(2, *network.shape))
up, down = (deis.make_plan(network.sde, nfe=20, direction=way) for way in ("encode", "decode"))
x_T = deis.encode(up, network.conditional([3, 8]), x_0)
again = deis.sample(down, network.conditional([3, 8]), x_T)
print((again - x_0).square().mean().sqrt())
```

A plan may begin at clean data (sigma = 0) and end at alpha = 0, as in flow matching. Clean data have no direction in the data
form, so that methods of the eps form begin there; `auto` changes to it by itself. What cannot rise says so: methods that add noise,
and stages in log rho at an infinite end.

## There and back

Each way has the error of its method, and the round trip has both.

![Error of the round trip against evaluations each way](round-trip.png)

Made by `python -m benchmarks.round_trip` and `python -m benchmarks.round_trip report` on the bundled MNIST model: {num}
digits, as many evaluations each way, the median root mean square difference, data in [-1, 1].

"""


def report() -> None:
    """Draw the plot and print the page."""
    draw()
    page()


def by_method() -> tuple[list[str], dict[tuple[str, int], dict[str, str]]]:
    """Return the methods in order of their round trip, and the rows by method and budget."""
    rows = measured(PATH)
    by = {(row["method"], int(row["nfe"])): row for row in rows}
    last = {name: float(by.get((name, 20), {"round_trip": 9})["round_trip"]) for name in sorted({row["method"] for row in rows})}
    return sorted(last, key=last.__getitem__), by


def draw() -> None:
    from matplotlib import pyplot as plt

    order, by = by_method()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = dict(zip(SHOWN, [*MARKS.items(), ("0.4", "p")], strict=True))
    for name in order:
        points = [(nfe, float(by[name, nfe]["round_trip"])) for nfe in BUDGETS if (name, nfe) in by]
        colour, marker = colours.get(name, ("0.85", ""))
        style: dict[str, Any] = {"label": name, "lw": 1.8, "zorder": 3, "ms": 5} if name in SHOWN else {"lw": 0.8}
        axes.loglog(*zip(*points, strict=True), color=colour, marker=marker, **style)
    axes.set(xlabel="evaluations each way", ylabel="error of the round trip", ylim=(None, 1))
    axes.set_xticks(BUDGETS, [str(nfe) for nfe in BUDGETS])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(DOCS / "round-trip.png", dpi=130)


def page() -> None:
    order, by = by_method()
    print(INTRODUCTION.format(num=16), end="")
    print(conclusion(by))
    with folded("Every method there and back"):
        table(order, by)
    print(GRIDS)
    for power in POWERS:
        cells = [row for row in measured(GRIDS_PATH) if float(row["power"]) == power]
        print(f"| {power:g} | {' | '.join([row['encode'] for row in cells] + [row['round_trip'] for row in cells])} |")
    print(INVERTIBLE)
    print("| method | 5 | 10 | 20 |\n|---|---|---|---|")
    for name in ("bdia", "belm"):
        print(f"| `{name}` | {' | '.join(by[name, nfe]['invert'] for nfe in BUDGETS)} |")
    print(INTERPOLATION)


def table(order: list[str], by: dict[tuple[str, int], dict[str, str]]) -> None:
    """Print the errors of the methods."""
    print("| method | encode, 20 | decode, 20 | round trip, 5 | 10 | 20 | its ratio to the sum of both ways at 20 |")
    print("|---|---|---|---|---|---|---|")
    for name in order:
        line = [by.get((name, nfe)) for nfe in BUDGETS]
        last = line[-1]
        parts = ["", "", *(row["round_trip"] if row else "" for row in line), ""]
        if last:
            total = float(last["encode"]) + float(last["decode"])
            parts[:2], parts[-1] = [last["encode"], last["decode"]], f"{float(last['round_trip']) / total:.2f}"
        print(f"| `{name}` | {' | '.join(parts)} |")


def conclusion(by: dict[tuple[str, int], dict[str, str]]) -> str:
    ratios = {
        name: float(row["round_trip"]) / (float(row["encode"]) + float(row["decode"]))
        for (name, nfe), row in by.items()
        if nfe == 20
    }
    beyond = {name: ratio for name, ratio in ratios.items() if ratio > 2}
    exceptions = ", ".join(f"`{name}` ({ratio:.1f})" for name, ratio in beyond.items()) or "none"
    return (
        f"At 20 evaluations each way the round trip of `auto` errs by {by['auto', 20]['round_trip']}. "
        f"For {len(ratios) - len(beyond)} "
        f"of {len(ratios)} methods it errs by at most twice what its two ways err by together; beyond that are {exceptions}.\n"
    )


GRIDS = """## The grid

Where you want the noise itself, lay the steps closer at the data: `ts_phase="vp_t", ts_order=5`. Where you want the picture back,
encode on the grid that decodes, as the default does: the errors of both ways are then much alike, and cancel. By `auto`, decoded on
its default grid of power 2; `python -m benchmarks.round_trip grids`:

| power of the grid | encode, 5 | 10 | 20 | round trip, 5 | 10 | 20 |
|---|---|---|---|---|---|---|"""
INVERTIBLE = """
## Exactly

`bdia` and `belm` go back to rounding: `deis.invert` takes the last two states, and one call a step.

```python
import torch
import deis

network = deis.load_model(dtype="float64")
model = network.conditional([3, 8], guidance=2.0)
plan = deis.make_plan(network.sde, "bdia", nfe=10)
x_T = torch.randn(2, *network.shape, dtype=torch.float64)
states = deis.sample(plan, model, x_T, trajectory=True)
print((deis.invert(plan, model, states[-2:]) - x_T).abs().max())  # 1e-13
```

A picture is encoded by a plan of `direction="encode"`, and `deis.invert` of the same plan decodes it: with another class or
guidance it is an edit. A plan that goes back, `plan.reverse()`, is a table like all others, which begins with two states.

The price is accuracy: a single way errs more than that of other methods of order 2, because nothing damps an error that alternates
from step to step. The table has the error of the round trip by `deis.invert` in float32; in float64 it is below 1e-10
(tests/test_invertible.py).
"""
INTERPOLATION = """
## Between two digits

![Two digits of MNIST's test set, encoded, and decoded from the noise between](interpolation.png)

The first and last column are the digits, the others decode x_T = sin((1 - s) w) / sin(w) a + sin(s w) / sin(w) b, where a and b are
their encodings and w is the angle between them. By 20 evaluations of `auto` each way, without a class. Made by `python -m
benchmarks.round_trip picture --data mnist.npz`."""


def interpolation(data: Path, pairs: int = 4, columns: int = 9) -> None:
    from matplotlib import pyplot as plt

    from deis.cli.pictures import picture

    network = deis.load_model()
    with np.load(data) as arrays:
        images, labels = arrays["x_test"], arrays["y_test"]
    chosen = np.array([np.flatnonzero(labels == digit)[10] for digit in range(2 * pairs)])
    x_0 = torch.from_numpy(images[chosen][:, None].astype(np.float32) / 127.5 - 1)
    up, down = (deis.make_plan(network.sde, nfe=20, direction=way) for way in ("encode", "decode"))
    a, b = deis.encode(up, network, x_0).flatten(1).reshape(2, pairs, -1)
    angle = torch.arccos(torch.nn.functional.cosine_similarity(a, b))[:, None]
    rows = [x_0[:pairs]]
    for share in np.linspace(0, 1, columns - 2):
        between = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
        rows.append(deis.sample(down, network, between.reshape(pairs, *network.shape)))
    rows.append(x_0[pairs:])
    stacked = torch.stack(rows, dim=1).flatten(0, 1).numpy()
    plt.imsave(DOCS / "interpolation.png", np.asarray(picture(stacked, columns)), cmap="gray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["measure", "grids", "report", "picture"], default="measure")
    parser.add_argument("--data", type=Path, help="MNIST as arrays, for the picture.")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".* is off by")  # of five evaluations, where it is true and in the table
    if arguments.what == "picture":
        interpolation(arguments.data)
    else:
        {"measure": measure, "grids": measure_grids, "report": report}[arguments.what]()


if __name__ == "__main__":
    main()
