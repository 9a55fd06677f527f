"""How `auto` is chosen: for every budget from 3 to 20 calls, on five problems, against the best of diffusers' schedulers.

python -m benchmarks.default digits
python -m benchmarks.default cosine
python -m benchmarks.default mnist
python -m benchmarks.default flow
python -m benchmarks.default anime64 --checkpoint ../shared/checkpoints/anime64
python -m benchmarks.default report > docs/default.md

The error is the median over samples of the root mean square difference to the converged solution from the same noise; data lie in
[-1, 1]. The problems are those of benchmarks/methods.py, and two more:

cosine    the digits mixture on the cosine schedule
flow      the bundled MNIST model, told as flow matching: alpha = 1 - t, sigma = t, starting at alpha = 0

SCHEDULERS are the updates of diffusers' classes, which tests/test_diffusers.py shows to be the same, each on the best of the grids
that diffusers has (even times, Karras, exponential) and of one more, times of power 2, for each problem and budget. CANDIDATES are
methods on grids of every problem's own noise levels. Of a network only the candidates are run that could be chosen: those within
--within of the best on the problems that were measured before.

`report` sets `auto` beside the best scheduler of each cell. Rows of anime64 that benchmarks/results/methods_anime64.csv had already
were taken from there: it is the same network, noise and error. Then it chooses for each budget the candidate whose greatest ratio
to the best scheduler over the problems is least: over the other four for each problem, whose ratio is then what a new model may
expect, and over all five.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

import deis
from deis.methods.layout import Builder

from . import methods
from .methods import Problem
from .pages import folded, measured

RESULTS = Path(__file__).parent / "results"
FIELDS = ("kind", "method", "grid", "nfe", "error")
BUDGETS = tuple(range(3, 21))
PROBLEMS = ("digits", "cosine", "flow", "mnist", "anime64")  # the quick ones first
SCHEDULERS = {
    "ddim": "DDIM, EulerDiscrete", "ipndm4": "IPNDM", "lms4": "LMSDiscrete", "edm_heun": "HeunDiscrete",
    "dpm_solver_2": "KDPM2Discrete",
    "dpm_solver_2m": "DEIS of order 2", "dpm_solver_3m": "DEIS of order 3",
    "dpmpp_2m_published": "DPMSolverMultistep of order 2", "dpmpp_3m_published": "DPMSolverMultistep of order 3",
    "dpmpp_2s_published": "DPMSolverSinglestep of order 2", "dpmpp_3s_published": "DPMSolverSinglestep of order 3",
    "unipc2_bh1": "UniPC of order 2, bh1", "unipc2_bh2": "UniPC of order 2", "unipc3_bh2": "UniPC of order 3",
}  # fmt: skip
THEIR_GRIDS = (("t", 1.0), ("t", 2.0), ("rho", 7.0), ("log", 1.0))
POWERS = (1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5)
CANDIDATES: dict[str, Builder] = {
    f"{clock}, degree {degree}" + (f", corrector {corrector}" if corrector else ""): deis.adams("data", clock, degree, corrector)
    for clock in ("vp_t", "log_rho", "arctan_rho")
    for degree, corrector in ((1, None), (1, 2), (2, None), (2, 3))
}


AUTO = ("vp_t, degree 1, corrector 2", "vp_t2")
SHOWN = (4, 5, 6, 8, 10, 15, 20)
INTRODUCTION = """![The error of auto and of the best of diffusers on five problems](figures/default.png)

`auto` is one method on one grid for every budget. Over five problems its error is 0.70 to 0.82 of that of diffusers' best
scheduler, which is chosen anew for every cell. It is the choice that is good at most budgets, so one method serves them all.

`python -m benchmarks.figures default` draws the figure. `python -m benchmarks.default report` makes the page from the measurements
in `benchmarks/results`, which `python -m benchmarks.default digits` and so on write. [Its docstring](../benchmarks/default.py)
describes the problems. The numbers are errors: the median over samples of the root mean square difference to the converged solution
from the same noise, for data in [-1, 1].

`digits` and `cosine` are a mixture of Gaussians fitted to 8x8 digits, whose exact eps is known, on two schedules. `mnist` is the
bundled MNIST model, and `flow` is the same network treated as flow matching. `anime64` is a 64x64 network of 63 million parameters
that this project did not train.

`auto` is `deis.adams("data", "vp_t", 1, 2)` on times of power 2. Diffusers has the advantage of hindsight: for every cell, the
table takes the least error of 14 updates of its schedulers, on each of its three grids. The second row of each problem adds a grid
that diffusers does not have, times of power 2. An empty cell was not measured."""
RATIOS = """The error of `auto` as a multiple of the first row, for every budget:"""
CHOICE = """In this table the order of the problems is digits, cosine, flow, mnist, anime64. The last was measured at five
budgets. Ratios are relative to the best of diffusers, times of power 2 included. After the semicolon comes their
geometric mean. *The best scheduler over all* is the update with the best mean, on the best grid for each problem.
*Left out* is the ratio on each problem for the choice made by the other problems. *Chosen* is the choice made by all.
`auto` is the choice that is good at most budgets, so that a plan of nine calls is made like one of ten. nan: that
pair was out of the running, and was not measured."""


def cells(kind: str) -> Iterator[tuple[str, str, Builder, str, float]]:
    """Yield (method, the grid's name, builder, phase, power)."""
    if kind == "scheduler":
        for name in SCHEDULERS:
            build = deis.get_method(name, **({"lower_order_final": True} if "published" in name or "_bh" in name else {}))
            for phase, power in THEIR_GRIDS:
                yield name, phase if phase == "log" else f"{phase}{power:g}", build, phase, power
    else:
        for name, build in CANDIDATES.items():
            for power in POWERS:
                yield name, f"vp_t{power:g}", build, "vp_t", power


def problem_of(name: str, checkpoint: Path) -> Problem:
    made: dict[str, Callable[[], Problem]] = {
        "digits": methods.digits, "cosine": partial(methods.digits, sde=deis.VPSDE.cosine()), "mnist": methods.mnist,
        "flow": methods.flow, "anime64": partial(methods.anime64, checkpoint),
    }  # fmt: skip
    return made[name]()


def read(name: str) -> list[dict[str, str]]:
    path = RESULTS / f"default_{name}.csv"
    return measured(path)


Cell = tuple[str, str]


def errors(rows: list[dict[str, str]], kind: str, nfe: int) -> dict[Cell, float]:
    """Return the errors of the cells (method, grid) of one kind at one budget."""
    return {(r["method"], r["grid"]): float(r["error"]) for r in rows if r["kind"] == kind and int(r["nfe"]) == nfe}


def of_diffusers(at: dict[Cell, float]) -> dict[Cell, float]:
    """Return the cells on grids that diffusers has."""
    return {cell: error for cell, error in at.items() if cell[1] in {"t1", "rho7", "log"}}


def promising(name: str, kind: str, nfe: int, within: float) -> set[Cell] | None:
    """Return the cells within a factor of the best on some problem measured before; None where none was.

    The schedulers on each grid are judged apart, since not every problem has every grid.
    """
    found: set[Cell] = set()
    for other in PROBLEMS[: PROBLEMS.index(name)]:
        at = errors(read(other), kind, nfe)
        for grid in {cell[1] for cell in at}:
            best = min(error for cell, error in at.items() if kind == "candidate" or cell[1] == grid)
            found |= {cell for cell, error in at.items() if cell[1] == grid and error <= within * best}
    return found or None


def measure(name: str, args: argparse.Namespace) -> None:
    """Measure every cell that is missing, and write a line for each."""
    problem, rows, path = problem_of(name, args.checkpoint), read(name), RESULTS / f"default_{name}.csv"
    done = {tuple(row[field] for field in FIELDS[:-1]) for row in rows}
    start = time.perf_counter()
    reference = problem.run(deis.make_plan(problem.sde, "tab3", problem.reference_steps, problem.reference_phase, 1.0))
    print(f"{name}: the reference took {time.perf_counter() - start:.0f} s", flush=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not rows:
            writer.writeheader()
        for nfe in args.nfe:
            for kind in ("scheduler", "candidate"):
                running = promising(name, kind, nfe, args.within) if name in args.selected else None
                running = running and running | {AUTO}
                for method, grid, build, phase, power in cells(kind):
                    row = {"kind": kind, "method": method, "grid": grid, "nfe": str(nfe)}
                    if tuple(row.values()) in done or (running is not None and (method, grid) not in running):
                        continue
                    error = error_of(problem, reference, build, phase, power, nfe)
                    if error is not None:
                        writer.writerow(row | {"error": f"{error:.5g}"})
            file.flush()
            print(f"{name}, {nfe} calls: {time.perf_counter() - start:.0f} s", flush=True)


def error_of(problem: Problem, reference: torch.Tensor, build: Builder, phase: str, power: float, nfe: int) -> float | None:
    """Return the error of one method on one grid; None where it has no such grid or cannot meet the budget."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the grid is a bad one, which is to be measured
            plan = deis.make_plan(problem.sde, build, None, phase, power, nfe=nfe)
    except ValueError:
        return None
    x = problem.run(plan)
    return methods.error(x, reference) if bool(x.isfinite().all()) else None


def choose(ratios: dict[str, dict[Cell, float]], over: list[str]) -> Cell:
    """Return the cell whose greatest ratio over some problems is least, of those that were measured on all of them."""
    common = set.intersection(*(set(ratios[name]) for name in over))
    return min(common, key=lambda cell: max(ratios[name][cell] for name in over), default=("none", "none"))


def beside(tables: dict[str, list[dict[str, str]]]) -> None:
    """Print the errors of `auto` and those of the best scheduler on the best grid."""
    print("| problem | | " + " | ".join(f"{nfe} NFE" for nfe in SHOWN) + " |\n" + "|---" * (len(SHOWN) + 2) + "|")
    for name, rows in tables.items():
        theirs = {nfe: errors(rows, "scheduler", nfe) for nfe in SHOWN}
        ours = {nfe: errors(rows, "candidate", nfe).get(AUTO, np.nan) for nfe in SHOWN}
        best = {nfe: min(at.values(), default=np.nan) for nfe, at in theirs.items()}
        own = {nfe: min(of_diffusers(at).values(), default=np.nan) for nfe, at in theirs.items()}
        for title, found in (("the best of diffusers", own), ("the same with times of power 2", best), ("`auto`", ours)):
            cells = " | ".join("" if np.isnan(found[nfe]) else f"{found[nfe]:.4f}" for nfe in SHOWN)
            print(f"| {name} | {title} | {cells} |")


def ratios_to_diffusers(tables: dict[str, list[dict[str, str]]], budgets: list[int]) -> None:
    """Print the errors of `auto` as multiples of the best of diffusers on its own grids, for every budget."""
    print(f"{RATIOS}\n\n| NFE | " + " | ".join(tables) + " | geometric mean |\n" + "|---" * (len(tables) + 2) + "|")
    for nfe in budgets:
        found = []
        for rows in tables.values():
            best = min(of_diffusers(errors(rows, "scheduler", nfe)).values(), default=np.nan)
            found.append(errors(rows, "candidate", nfe).get(AUTO, np.nan) / best)
        cells = " | ".join("" if np.isnan(ratio) else f"{ratio:.2f}" for ratio in found)
        print(f"| {nfe} | {cells} | {mean([ratio for ratio in found if not np.isnan(ratio)]):.2f} |")


def report(budgets: list[int]) -> None:
    """Print the page."""
    print(f"# How `auto` was chosen\n\n{INTRODUCTION}\n")
    found = {name: read(name) for name in PROBLEMS if read(name)}
    with folded("The errors"):
        beside(found)
    with folded("auto as a multiple of the best of diffusers, at every budget"):
        ratios_to_diffusers(found, budgets)
    print("## Appendix: what else was in the choice\n")
    with folded("Every budget: the best schedulers, the choice with each problem left out, and the choice by all"):
        choices(budgets)


def choices(budgets: list[int]) -> None:
    """Print for each budget the best schedulers, and what `auto` would be with each problem left out and with none."""
    print(f"{CHOICE}\n")
    print("| NFE | the best of diffusers | the best scheduler over all | left out | chosen | `auto` |")
    print("|---|---|---|---|---|---|")
    for nfe in budgets:
        tables = {name: rows for name in PROBLEMS if errors(rows := read(name), "candidate", nfe)}
        theirs = {name: errors(rows, "scheduler", nfe) for name, rows in tables.items()}
        best = {name: min(at, key=at.__getitem__) for name, at in theirs.items()}
        ratios = {
            name: {cell: error / theirs[name][best[name]] for cell, error in errors(rows, "candidate", nfe).items()}
            for name, rows in tables.items()
        }
        left = {name: ratios[name].get(choose(ratios, [o for o in tables if o != name]), np.nan) for name in tables}
        chosen, at_auto = choose(ratios, list(tables)), [ratios[name].get(AUTO, np.nan) for name in tables]
        single = {
            method: mean([at[method] / theirs[name][best[name]] for name, at in of_methods(theirs).items()])
            for method in SCHEDULERS
            if all(method in at for at in of_methods(theirs).values())
        }
        first = min(single, key=single.__getitem__, default="")
        over_all = f"{SCHEDULERS[first]}, {single[first]:.2f}" if first else ""
        print(
            f"| {nfe} | " + ", ".join(f"{theirs[n][best[n]]:.4f} ({SCHEDULERS[best[n][0]]}, {best[n][1]})" for n in tables)
            + f" | {over_all} | "
            + ", ".join(f"{left[n]:.2f}" for n in tables) + f"; {mean(list(left.values())):.2f} | {chosen[0]} on {chosen[1]}: "
            + ", ".join(f"{ratios[n].get(chosen, np.nan):.2f}" for n in tables) + " | "
            + ", ".join(f"{ratio:.2f}" for ratio in at_auto) + f"; {mean(at_auto):.2f} |"
        )  # fmt: skip


def of_methods(theirs: dict[str, dict[Cell, float]]) -> dict[str, dict[str, float]]:
    """Return for each problem the error of each method on the best of its grids."""
    return {
        name: {method: min(error for cell, error in at.items() if cell[0] == method) for method in {cell[0] for cell in at}}
        for name, at in theirs.items()
    }


def mean(values: list[float]) -> float:
    """Return the geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=[*PROBLEMS, "report"])
    parser.add_argument("--checkpoint", type=Path, default=Path("../shared/checkpoints/anime64"))
    parser.add_argument("--nfe", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--within", type=float, default=1.3)
    parser.add_argument("--selected", nargs="*", default=["anime64"], help="problems on which only promising cells are run")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.problem == "report":
        report(args.nfe)
    else:
        measure(args.problem, args)


if __name__ == "__main__":
    main()
