"""What the time of the first call is worth in a calibration, on noise that no fit has seen: the table of benchmarks/calibration.md.

python -m benchmarks.levers --nfe 4 5 6 8

The problem is the digits mixture, of which 192 samples are fitted to and 64 validate; the error is the median distance of 64 others
to the converged solution. Gauss-Newton goes on from the plan of grid + least squares: as it is, with the first call at the start;
from one with an analytical first step, as many calls on one step more; and with the first call told a time that is fitted.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import torch

import deis
from deis.calibration.clock import Clock
from deis.calibration.gauss_newton import fit_ends
from deis.calibration.judge import Judge, end_of
from deis.calibration.stages import Task
from deis.calibration.table import Table

from .methods import digits, error


def task_of(teacher: deis.Teacher, plan: deis.Plan) -> Task:
    fit = 3 * len(teacher.states[0]) // 4
    return Task(teacher, (), fit, None, Judge.of(teacher, fit, "robust", [end_of(teacher, plan, fit)]), Clock(), True, 10, 0)


def fitted(teacher: deis.Teacher, plan: deis.Plan) -> deis.Plan:
    """Return a plan after Gauss-Newton, without a row ahead of it."""
    task = task_of(teacher, plan)
    table = fit_ends(task.student(plan), Table.of(plan), teacher, task.fit, task.width(plan), iterations=range(10))
    return task.plan(table, plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6, 8])
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # of what polynomials do in few steps: they are fitted
    problem = digits(64)
    model = deis.Denoiser(problem.model, problem.sde)
    teacher = deis.make_teacher(model, torch.from_numpy(np.random.default_rng(5).standard_normal((256, 64))), steps=128)
    reference = problem.run(deis.make_plan(problem.sde, "tab3", 300, "log", 1.0))
    deviation = float(np.sqrt(teacher.end.var(axis=0).mean()))

    for nfe in args.nfe:
        starts = [deis.make_plan(problem.sde, nfe=nfe, afs=afs) for afs in (None, deviation)]
        plain, ahead = (deis.calibrate(plan, model, teacher=teacher, stages=("grid", "least_squares")) for plan in starts)
        plans = (plain, ahead, task_of(teacher, plain).with_free_start(plain))
        errors = [error(problem.run(fitted(teacher, plan)), reference) for plan in plans]
        print(f"{nfe} NFE: " + ", ".join(f"{found:.5f}" for found in errors), flush=True)


if __name__ == "__main__":
    main()
