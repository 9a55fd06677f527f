"""Calibrated plans against the best of all untuned methods and grids, on noise that the calibration has not seen.

python -m benchmarks.calibration digits
python -m benchmarks.calibration mnist --nfe 3 4 5 6 7 8 9 10
python -m benchmarks.calibration anime64 --checkpoint ../shared/checkpoints/anime64
python -m benchmarks.calibration report > docs/calibration.md

The problems and the error are those of benchmarks/methods.py, and the held-out noise is its: calibration has noise of its own.
"The best untuned" is the least error of the twelve cells (--cells) of benchmarks/results/methods_<problem>.csv that are best at
this NFE or the nearest, which are run again here, on the same noise (they include the updates of diffusers' schedulers). The stage
"from the best untuned" starts from that of them which is best on the calibration's own noise; the others start from `auto`. "Twice
the calls" is the least error of the four updates and grids of diffusers that benchmarks/default.py found best at twice the
evaluations.

A run writes the plan of each stage to --out, and a line a stage to benchmarks/results/calibration_<problem>.csv; it keeps its
teacher in --work, and goes on from there when it is started again. `report` prints benchmarks/calibration.md with the tables in it.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import deis
from deis.methods.layout import Builder

from . import default, methods
from .pages import folded, measured

RESULTS = Path(__file__).parent / "results"
FIELDS = ("nfe", "stage", "error", "evaluations", "seconds", "detail")
STAGES = {
    "grid + least squares": ("grid", "least_squares"),
    "+ Gauss-Newton": ("gauss_newton",),
    "+ gradient": ("gradient",),
    "from the best untuned": ("least_squares", "gauss_newton"),
}
TWICE = "diffusers, twice the calls"
ASKED = {"digits": {5: (0.4, 0.3), 8: (0.4, 0.3), 10: (0.35, 0.3)}, "mnist": dict.fromkeys((5, 8, 10), (0.6, 0.45))}
ASKED["anime64"] = {5: (0.75, 0.6), 8: (0.65, 0.5), 10: (0.6, 0.5)}


@dataclass(frozen=True)
class Trial:
    """A problem, and what is calibrated on it."""

    problem: methods.Problem
    model: Callable[..., deis.Denoiser] | deis.Denoiser
    samples: Tensor
    condition: np.ndarray | None
    validation: float
    steps: int | None


def digits(args: argparse.Namespace) -> Trial:
    problem = methods.digits(256)
    x_T = torch.from_numpy(np.random.default_rng(5).standard_normal((192, 64)))
    return Trial(problem, deis.Denoiser(problem.model, problem.sde), x_T, None, 0.25, None)


def mnist(args: argparse.Namespace) -> Trial:
    network = deis.load_model()
    x_T = torch.from_numpy(np.random.default_rng(5).standard_normal((96, *network.shape), dtype=np.float32))
    return Trial(methods.mnist(100), network.conditional, x_T, np.arange(len(x_T)) % 10, 1 / 3, 128)


def anime64(args: argparse.Namespace) -> Trial:
    sde, net = methods.anime64_network(args.checkpoint)
    x_T = torch.from_numpy(np.random.default_rng(5).standard_normal((18, 3, 64, 64), dtype=np.float32))
    return Trial(methods.anime64(args.checkpoint), deis.Denoiser(net, sde), x_T, None, 1 / 3, 145)


def untuned(problem: methods.Problem, name: str, nfe: int, cells: int | None = 12) -> Iterator[tuple[str, deis.Plan]]:
    """Yield the methods and grids that were best where they were measured, at this NFE or the nearest; all if cells is None."""
    rows = measured(RESULTS / f"methods_{name}.csv")
    nearest = min((int(row["nfe"]) for row in rows), key=lambda there: abs(there - nfe))
    rows = sorted((row for row in rows if int(row["nfe"]) == nearest), key=lambda row: float(row["error"]))[:cells]
    builders = {methods.title(about): build for about, build in methods.methods(problem)}
    for row in rows:
        phase = row["grid"].rstrip("0123456789")
        power = float(row["grid"][len(phase) :] or 1)
        yield (
            f"{methods.title(row)} on {row['grid']}",
            deis.make_plan(problem.sde, builders[methods.title(row)], None, phase, power, nfe=nfe),
        )


def schedulers(name: str, nfe: int) -> dict[str, tuple[Builder, None, str, float]]:
    """Return the four updates and grids of diffusers' schedulers that benchmarks/default.py found best, as make_plan takes them."""
    at = default.of_diffusers(default.errors(default.read(name), "scheduler", nfe))
    best = sorted(at, key=at.__getitem__)[:4]
    cells = {(method, grid): (build, None, phase, power) for method, grid, build, phase, power in default.cells("scheduler")}
    return {f"{default.SCHEDULERS[method]} on {grid}": cells[method, grid] for method, grid in best}


@dataclass(frozen=True)
class Results:
    """The lines of one problem's measurements, and the file that they are written to."""

    path: Path
    rows: list[dict[str, str]]

    @classmethod
    def of(cls, name: str) -> Results:
        path = RESULTS / f"calibration_{name}.csv"
        return cls(path, measured(path))

    def at(self, nfe: int) -> dict[str, dict[str, str]]:
        """Return the lines of a number of evaluations, by stage."""
        return {row["stage"]: row for row in self.rows if int(row["nfe"]) == nfe}

    def write(self, nfe: int, stage: str, error: float, evaluations: float = 0.0, seconds: float = 0.0, detail: str = "") -> None:
        numbers = (nfe, stage, f"{error:.5g}", f"{evaluations:.0f}", f"{seconds:.0f}", detail)
        self.rows.append(dict(zip(FIELDS, map(str, numbers), strict=True)))
        print(*numbers, sep="  ", flush=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(sorted(self.rows, key=lambda row: int(row["nfe"])))


def run(name: str, trial: Trial, args: argparse.Namespace) -> None:
    """Measure the untuned plans, and calibrate stage by stage, at each number of evaluations."""
    problem, results = trial.problem, Results.of(name)
    start = time.perf_counter()
    reference = reference_of(problem, args.work)

    def error(plan: deis.Plan) -> float:
        return methods.error(problem.run(plan), reference)

    print(f"reference: {time.perf_counter() - start:.0f} s", flush=True)
    for nfe in args.nfe:
        if "untuned" not in results.at(nfe):
            best, detail = min((error(plan), detail) for detail, plan in untuned(problem, name, nfe, args.cells))
            results.write(nfe, "untuned", best, detail=detail)
            results.write(nfe, "auto", error(deis.make_plan(problem.sde, nfe=nfe)))
        if TWICE not in results.at(nfe) and (cells := schedulers(name, 2 * nfe)):
            best, detail = min((error(deis.make_plan(problem.sde, *cell, nfe=2 * nfe)), detail) for detail, cell in cells.items())
            results.write(nfe, TWICE, best, detail=detail)
    if not args.stages:
        return
    start = time.perf_counter()
    teacher = deis.make_teacher(
        trial.model, trial.samples, condition=trial.condition, steps=trial.steps, batch=args.batch, folder=args.work / "teacher"
    )
    made = time.perf_counter() - start
    print(f"teacher: {len(teacher.t) - 1} steps, self-error {teacher.self_error:.2g}, {made:.0f} s", flush=True)
    for nfe in args.nfe:
        plan = deis.make_plan(problem.sde, nfe=nfe)
        for stage in args.stages:
            plan = calibrated(plan, name, trial, teacher, stage, args)
            if stage in results.at(nfe):
                continue
            done = plan.provenance["stages"][-len(STAGES[stage]) :]
            evaluations, seconds = (sum(record[what] for record in done) for what in ("evaluations", "seconds"))
            results.write(nfe, stage, error(plan), evaluations, seconds, f"teacher {made:.0f} s")
            print(deis.calibration_report(plan), plan, sep="\n", flush=True)


def calibrated(plan: deis.Plan, name: str, trial: Trial, teacher: deis.Teacher, stage: str, args: argparse.Namespace) -> deis.Plan:
    """Return the plan of a stage, kept in the folder of the plans."""
    file = args.out / f"{name}-{plan.nfe}-{stage.strip('+ ').replace(' ', '_')}.json"
    if file.exists():
        return deis.load_plan(file)
    starts = [plan for _, plan in untuned(trial.problem, name, plan.nfe, args.cells)] if stage == "from the best untuned" else plan
    options = {"validation": trial.validation, "stages": STAGES[stage], "iterations": args.iterations}
    plan = deis.calibrate(starts, trial.model, teacher=teacher, **options)
    file.parent.mkdir(parents=True, exist_ok=True)
    plan.save(file)
    return plan


def reference_of(problem: methods.Problem, work: Path) -> Tensor:
    """Return the converged solution from the held-out noise, kept in the work folder."""
    path = work / "reference.npy"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        plan = deis.make_plan(problem.sde, "tab3", problem.reference_steps, problem.reference_phase, 1.0)
        np.save(path, problem.run(plan).numpy())
    return torch.from_numpy(np.load(path))


COLUMNS = {"auto": "`auto`"} | {stage: stage for stage in STAGES}


def report() -> None:
    """Print the page: the text beside this file, with the tables in their place."""
    before, after = Path(__file__).with_suffix(".md").read_text().split("TABLES\n\n")
    print(before, end="")
    for name in ASKED:
        with folded(f"The errors on {name}"):
            table(name)
    print(after, end="")


def table(name: str) -> None:
    """Print the table of a problem."""
    results = Results.of(name)
    columns = {stage: title for stage, title in COLUMNS.items() if any(row["stage"] == stage for row in results.rows)}
    print("| NFE | the best untuned | " + " | ".join(columns.values()) + f" | {TWICE} | asked for: least squares, all |")
    print("|---" * (4 + len(columns)) + "|")
    for nfe in sorted({int(row["nfe"]) for row in results.rows}):
        found = results.at(nfe)
        best = found["untuned"]
        cells = [str(nfe), f"{float(best['error']):.4f}, {best['detail']}"]
        cells += [cell(found[stage], best) if stage in found else "" for stage in columns]
        cells.append(f"{float(found[TWICE]['error']):.4f}, {found[TWICE]['detail']}" if TWICE in found else "")
        print("| " + " | ".join([*cells, ", ".join(map(str, ASKED[name].get(nfe, ())))]) + " |")


def cell(row: dict[str, str], best: dict[str, str]) -> str:
    """Return an error, its ratio to the best untuned, and the seconds it took."""
    spent = f", {row['seconds']} s" if int(row["seconds"]) else ""
    return f"{float(row['error']):.4f} ({float(row['error']) / float(best['error']):.2f}{spent})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=[*ASKED, "report"])
    parser.add_argument("--checkpoint", type=Path, default=Path("../shared/checkpoints/anime64"))
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 8, 10])
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=["grid + least squares", "+ Gauss-Newton"])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--cells", type=int, default=12, help="untuned methods and grids to measure again")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--work", type=Path, help="by default a folder of the problem's in work/")
    parser.add_argument("--out", type=Path, help="where to write the plans, by default in the work folder")
    args = parser.parse_args()
    if args.problem == "report":
        report()
        return
    args.work = args.work or Path("work") / f"calibration_{args.problem}"
    args.out = args.out or args.work
    run(args.problem, {"digits": digits, "mnist": mnist, "anime64": anime64}[args.problem](args), args)


if __name__ == "__main__":
    main()
