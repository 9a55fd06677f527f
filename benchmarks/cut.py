"""Plans that begin in the middle, as image-to-image asks: their error against the converged solution from the same state.

python -m benchmarks.cut digits
python -m benchmarks.cut mnist
python -m benchmarks.cut report > docs/cut.md

The states are those of converged trajectories (200 steps of tab3 down to the start, and the same on to the end), so that the end
of the trajectory is the solution. A plan of ten evaluations begins at the strengths 0.8, 0.5 and 0.3, with its evaluation number
2, 5 and 7, at the level of that row and halfway to the row before it. Beside it stands `auto`, made for the levels and the number
of evaluations that are left, which is also what `deis.cut_plan` puts in the place of a calibrated plan: "calibrated, rows kept"
is what its own rows would do. The error is the median over samples of the root mean square distance, data in [-1, 1]. The first
two write benchmarks/results/cut_<problem>.csv, and `report` prints the page."""

from __future__ import annotations

import argparse
import csv
import warnings
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import deis

from . import methods
from .methods import RESULTS
from .pages import folded

FIELDS = ("plan", "whole", "strength", "begins", "evaluations", "cut", "auto")
STRENGTHS = {0.8: 2, 0.5: 5, 0.3: 7}
NAMES = ("auto", "tab3", "dpm_solver_3", "edm_heun")


def problem(name: str) -> tuple[deis.Denoiser, Tensor, dict[str, deis.Plan]]:
    """Return the model, the noise, and the plans of ten evaluations, the calibrated one first."""
    rng = np.random.default_rng(11)
    if name == "mnist":
        network = deis.load_model()
        x_T = torch.from_numpy(rng.standard_normal((48, *network.shape), dtype=np.float32))
        model, calibrated = network.conditional(np.arange(len(x_T)) % 10), network.plan(10)
    else:
        mixture = methods.digits(256)
        model = deis.Denoiser(mixture.model, mixture.sde)
        x_T = torch.from_numpy(rng.standard_normal((256, 64)))
        fitted_to = torch.from_numpy(np.random.default_rng(5).standard_normal((192, 64)))
        calibrated = deis.calibrate(deis.make_plan(mixture.sde, nfe=10), model, fitted_to)
    plans = {"calibrated": calibrated, "calibrated, rows kept": replace(calibrated, provenance={})}
    return model, x_T, plans | {method: deis.make_plan(model.sde, method, nfe=10) for method in NAMES}


def dense(model: deis.Denoiser, x: Tensor, start: float, end: float) -> Tensor:
    """Return the converged state at `end`, from that at `start`."""
    ts = np.linspace(np.sqrt(start), np.sqrt(end), 201) ** 2
    found: Tensor = deis.sample(deis.make_plan(model.sde, "tab3", ts=ts), model, x)
    return found


def error(plan: deis.Plan, model: deis.Denoiser, x: Tensor, end: Tensor) -> float:
    return methods.error(deis.sample(plan, model, x), end)


def measure(name: str) -> None:
    """Write the errors of all plans at all strengths."""
    warnings.filterwarnings("ignore", ".*was calibrated as a whole")  # that it gives way is what is measured
    model, x_T, plans = problem(name)
    end = dense(model, x_T, model.sde.t_start, model.sde.t_end)
    with (RESULTS / f"cut_{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for plan_name, plan in plans.items():
            whole = error(plan, model, x_T, end)
            for strength, row in STRENGTHS.items():
                for where, share in (("at a row", 0.0), ("between rows", 0.5)):
                    start = float(((1 - share) * plan.t[row] ** 0.5 + share * plan.t[row - 1] ** 0.5) ** 2)
                    x, part = dense(model, x_T, model.sde.t_start, start), deis.cut_plan(plan, model.sde, start)
                    anew = deis.make_plan(model.sde.between(start), "auto", nfe=part.nfe)
                    errors = (f"{error(made, model, x, end):.4f}" for made in (part, anew))
                    writer.writerow((plan_name, f"{whole:.4f}", strength, where, part.nfe, *errors))
                    file.flush()


PAGE = """# Plans that begin in the middle

![The error of cut plans against the strength](figures/cut.png)

A method is built on the remaining levels. An existing plan is cut, which costs little for most plans. A calibrated plan is not cut
but made anew, because its own rows go astray where earlier predictions are missing.

`python -m benchmarks.figures cut` draws the figure.

## The rule

Image-to-image adds noise to a picture up to some level and samples from there; [edit.md](edit.md) describes it. Two rules make a
plan for that. The start of a strength is `sde.between(strength=0.6).t_start`.

**A method** is built on the remaining levels: `deis.make_plan(sde.between(start), "tab3", nfe=5)`. `PlanScheduler` in diffusers
and the samplers in ComfyUI do the same.

**An existing plan**, such as one from a file, is cut: `deis.cut_plan(plan, sde, start, end)`. It begins with the row whose noise
level is nearest to the start, and its later times stay. A row that uses no prediction from before the start stays the same, to the
bit. In the others, each such prediction is replaced by the value of the polynomial through the existing ones, in the time of the
linear VP schedule. So the first row is a step of first order, the second one of second order, and so on, as at the start of every
multistep method. A method of several stages may begin with any of them. `bdia` and `belm` use a state from before the start; it is
replaced by the result of a first-order step backwards.

**A calibrated plan** is replaced by `auto`, with as many evaluations on a grid of its own, and a warning says so. Its rows are
fitted together: the weights of old predictions balance each other only on its own trajectory, and cannot be extrapolated. The
tables have both. For the best result at a fixed strength, calibrate a plan for it, starting from
`deis.make_plan(sde.between(start), nfe=5)`.

## What it costs

The error is the median over samples of the root mean square distance to the converged solution from the same state, for data in
[-1, 1]. The plans have ten evaluations. They were measured on two cores on 24 November 2026 (`mnist` on 26 November). "whole" is
the error of the uncut plan from pure noise. The last column is the error of `auto` made for the start, with as many evaluations.
"At a row", the start is at a level of the plan; "between rows", it lies halfway to the one before.
"""


def report() -> None:
    """Print the page."""
    print(PAGE)
    samples = {"digits": "256 samples of a mixture of Gaussians with known eps", "mnist": "48 samples of the bundled MNIST model"}
    for name, of in samples.items():
        with folded(f"The errors on {of}, by python -m benchmarks.cut {name}"), (RESULTS / f"cut_{name}.csv").open() as file:
            print("| plan | whole | strength | begins | evaluations | cut | `auto` made for it |\n|---|---|---|---|---|---|---|")
            for row in csv.DictReader(file):
                print("| " + " | ".join(row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=["digits", "mnist", "report"])
    name = parser.parse_args().problem
    report() if name == "report" else measure(name)


if __name__ == "__main__":
    main()
