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
flow      the network inside, told as flow matching: alpha = 1 - t, sigma = t, starting at alpha = 0

SCHEDULERS are the updates of diffusers' classes, which tests/test_diffusers.py shows to be the same, each on the best of the grids
that diffusers has (even times, Karras, exponential) and of one more, times of power 2, for each problem and budget. CANDIDATES are
methods on grids of every problem's own noise levels. Of a network only the candidates are run that could be chosen: those within
--within of the best on the problems that were measured before.

`report` chooses for each budget the candidate whose greatest ratio to the best scheduler over the problems is least: over the other
four for each problem, whose ratio is then what a new model may expect, and over all five for what ships.
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
    return list(csv.DictReader(path.open())) if path.exists() else []


Cell = tuple[str, str]


def errors(rows: list[dict[str, str]], kind: str, nfe: int) -> dict[Cell, float]:
    """Return the errors of the cells (method, grid) of one kind at one budget."""
    return {(r["method"], r["grid"]): float(r["error"]) for r in rows if r["kind"] == kind and int(r["nfe"]) == nfe}


def promising(name: str, kind: str, nfe: int, within: float) -> set[Cell] | None:
    """Return the cells that were within a factor of the best on some problem measured before; None where none was."""
    found: set[Cell] = set()
    for other in PROBLEMS[: PROBLEMS.index(name)]:
        at = errors(read(other), kind, nfe)
        found |= {cell for cell, error in at.items() if error <= within * min(at.values())}
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
    """Return the cell whose greatest ratio over some problems is least."""
    common = set.intersection(*(set(ratios[name]) for name in over))
    return min(common, key=lambda cell: max(ratios[name][cell] for name in over))


def report(budgets: list[int]) -> None:
    """Print for each budget the best schedulers, and what `auto` would be with each problem left out and with none."""
    tables = {name: read(name) for name in PROBLEMS if read(name)}
    print("| NFE | the best of diffusers: " + ", ".join(tables) + " | the best scheduler over all | left out | `auto` |")
    print("|---|---|---|---|---|")
    for nfe in budgets:
        theirs = {name: errors(rows, "scheduler", nfe) for name, rows in tables.items()}
        best = {name: min(at, key=at.__getitem__) for name, at in theirs.items()}
        ratios = {
            name: {cell: error / theirs[name][best[name]] for cell, error in errors(rows, "candidate", nfe).items()}
            for name, rows in tables.items()
        }
        left = {name: ratios[name].get(choose(ratios, [o for o in tables if o != name]), np.nan) for name in tables}
        chosen = choose(ratios, list(tables))
        single = {
            method: mean([at[method] / theirs[name][best[name]] for name, at in of_methods(theirs).items()])
            for method in SCHEDULERS
            if all(method in at for at in of_methods(theirs).values())
        }
        first = min(single, key=single.__getitem__)
        print(
            f"| {nfe} | " + ", ".join(f"{theirs[n][best[n]]:.4f} ({SCHEDULERS[best[n][0]]}, {best[n][1]})" for n in tables)
            + f" | {SCHEDULERS[first]}, {single[first]:.2f} | "
            + ", ".join(f"{left[n]:.2f}" for n in tables) + f"; {mean(list(left.values())):.2f} | {chosen[0]} on {chosen[1]}: "
            + ", ".join(f"{ratios[n][chosen]:.2f}" for n in tables) + f"; {mean([ratios[n][chosen] for n in tables]):.2f} |"
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
