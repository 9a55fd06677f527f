"""Two evaluations side by side: errors at as many calls one after the other (depth), and how many evaluations that takes.

python -m benchmarks.parallel digits --depth 4 5 6 8
python -m benchmarks.parallel digits --depth 4 5 --fit
python -m benchmarks.parallel mnist --depth 4 8

The problems and the error are those of benchmarks/methods.py. `auto` is measured at as many evaluations as the depth, and at twice
as many; `parallel2` on three grids. With --fit both are calibrated, on other noise, by all stages; on digits only, as a network
takes its time.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import deis

from . import methods

GRIDS = (("vp_t", 2.0), ("vp_t", 3.0), ("t", 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=["digits", "mnist"])
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 5, 6, 8])
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    problem = methods.digits(256) if args.problem == "digits" else methods.mnist()
    reference = problem.run(deis.make_plan(problem.sde, "tab3", problem.reference_steps, problem.reference_phase, 1.0))

    def tell(name: str, plan: deis.Plan) -> None:
        error = methods.error(problem.run(plan), reference)
        print(f"{name:<30} depth {plan.depth:>2}  nfe {plan.nfe:>2}  error {error:.4f}", flush=True)

    for depth in args.depth:
        plans = [(f"auto, {n} evaluations", deis.make_plan(problem.sde, nfe=n)) for n in (depth, 2 * depth)]
        plans += [
            (f"parallel2, {grid} of {power:g}", deis.make_plan(problem.sde, "parallel2", depth, grid, power))
            for grid, power in GRIDS
        ]
        for name, plan in plans:
            tell(name, plan)
    if args.fit:
        model = deis.Denoiser(problem.model, problem.sde)
        x_T = torch.from_numpy(np.random.default_rng(5).standard_normal((192, *problem.noise.shape[1:])))
        teacher = deis.make_teacher(model, x_T)
        for depth in args.depth:
            starts = {n: deis.make_plan(problem.sde, nfe=n) for n in (depth, 2 * depth)}
            for name, plan in (*starts.items(), ("parallel2", deis.make_plan(problem.sde, "parallel2", depth))):
                tell(f"calibrated, from {name}", deis.calibrate(plan, model, teacher=teacher))


if __name__ == "__main__":
    main()
