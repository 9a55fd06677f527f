"""Plans that begin in the middle, as image-to-image asks: their error against the converged solution from the same state.

python -m benchmarks.cut digits
python -m benchmarks.cut mnist

The states are those of converged trajectories (200 steps of tab3 down to the start, and the same on to the end), so that the end
of the trajectory is the solution. A plan of ten evaluations begins at the strengths 0.8, 0.5 and 0.3, with its evaluation number
2, 5 and 7, at the level of that row and halfway to the row before it. Beside it stands `auto`, made for the levels and the number
of evaluations that are left, which is also what `deis.cut_plan` puts in the place of a calibrated plan: "calibrated, rows kept" is
what its own rows would do. The error is the median over samples of the root mean square distance, data in [-1, 1].
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import deis

from . import methods

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=["digits", "mnist"])
    warnings.filterwarnings("ignore", ".*was calibrated as a whole")  # that it gives way is what is measured
    model, x_T, plans = problem(parser.parse_args().problem)
    end = dense(model, x_T, model.sde.t_start, model.sde.t_end)
    print("| plan | whole | strength | begins | evaluations | cut | `auto` made for it |\n|---|---|---|---|---|---|---|")
    for name, plan in plans.items():
        whole = error(plan, model, x_T, end)
        for strength, row in STRENGTHS.items():
            for where, share in (("at a row", 0.0), ("between rows", 0.5)):
                start = float(((1 - share) * plan.t[row] ** 0.5 + share * plan.t[row - 1] ** 0.5) ** 2)
                x, part = dense(model, x_T, model.sde.t_start, start), deis.cut_plan(plan, model.sde, start)
                anew = deis.make_plan(model.sde.between(start), "auto", nfe=part.nfe)
                print(
                    f"| {name} | {whole:.4f} | {strength} | {where} | {part.nfe} | {error(part, model, x, end):.4f} | "
                    f"{error(anew, model, x, end):.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
