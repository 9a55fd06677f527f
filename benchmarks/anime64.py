"""A network that this project did not train, behind schedulers of diffusers and of this library, from the same noise.

python -m benchmarks.anime64 --checkpoint ../shared/checkpoints/anime64 --nfe 10
python -m benchmarks.anime64 report > docs/anime64.md

Sampling starts at t = 290 of the discrete cosine schedule; the error is the median over 16 samples of the root mean square
distance to the converged solution (145 steps), data in [-1, 1]. Every scheduler runs as a pipeline runs it, with the betas of the
times up to 290, so that its own grids start there. `--plans` names calibrated plans, as benchmarks/calibration.py writes them.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

import deis
from deis.adapters.diffusers import PlanScheduler

from . import methods
from .pages import folded, measured

PATH = Path(__file__).parent / "results" / "anime64.csv"
FIELDS = ("nfe", "scheduler", "settings", "error")
KARRAS, SIGMA_MIN = {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}
THEIRS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", KARRAS),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", KARRAS),
    ("DPMSolverMultistepScheduler", KARRAS | SIGMA_MIN),
    ("DPMSolverMultistepScheduler", KARRAS | {"solver_order": 3}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", KARRAS),
    ("UniPCMultistepScheduler", KARRAS | SIGMA_MIN),
    ("UniPCMultistepScheduler", KARRAS | {"solver_order": 3}),
    ("EulerDiscreteScheduler", KARRAS),
    ("LMSDiscreteScheduler", KARRAS),
)
OURS: tuple[dict[str, Any], ...] = (
    {"method": "auto", "ts_phase": "vp_t"},
    {"method": "auto"} | KARRAS | SIGMA_MIN,
    {"method": "tab3", "ts_phase": "t"},
    {"method": "dpmpp_2m"} | KARRAS,
    {"method": "unipc2"} | KARRAS,
    {"method": "dpm_solver_2m"} | KARRAS | SIGMA_MIN,
    {"method": "unipc2"} | KARRAS | SIGMA_MIN,
    {"method": "dpm_solver_2m"} | KARRAS,
    {"method": "dpm_solver_3m", "ts_phase": "rho"},
    {"method": "dpm_solver_3m", "method_options": {"corrector": 2}, "ts_phase": "rho"},
    {"method": "dpm_solver_2m", "method_options": {"corrector": 2}, "ts_phase": "rho"},
    {"method": "dpm_solver_2m", "method_options": {"corrector": 2}} | KARRAS | SIGMA_MIN,
)


def run(scheduler: Any, net: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, nfe: int) -> Tensor:
    """Run a scheduler as a pipeline does."""
    scheduler.set_timesteps(nfe)
    x = x_T * (scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else 1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            m = torch.cat([net(part, t.repeat(len(part))) for part in scaled.float().split(8)])
            x = scheduler.step(m, t, x).prev_sample
    assert len(scheduler.timesteps) == nfe
    return x


def schedulers(betas: Any, plans: list[Path], nfe: int) -> Iterator[tuple[str, str, Any]]:
    """Yield who makes a scheduler, how it is set, and the scheduler."""
    common = {"trained_betas": betas, "num_train_timesteps": len(betas)}
    for name, settings in THEIRS:
        yield name, ", ".join(map(_text, settings.items())), getattr(diffusers, name)(**common, **settings)
    for settings in OURS:
        yield "PlanScheduler", ", ".join(map(_text, settings.items())), PlanScheduler(**common, **settings)
    for path in plans:
        plan = deis.load_plan(path)
        if plan.nfe == nfe:
            config = PlanScheduler(**common).config
            yield (
                "PlanScheduler",
                f"calibrated: {path.stem.split('-', 2)[2].replace('_', ' ')}",
                PlanScheduler.from_plan(plan, config),
            )


def _text(item: tuple[str, Any]) -> str:
    return f"{item[0]}={item[1]}"


def measure(args: argparse.Namespace) -> None:
    sde, net = methods.anime64_network(args.checkpoint)
    assert isinstance(sde, deis.VPSDE)
    alphas = np.exp(2 * sde.log_alpha(np.arange(291)))
    betas = 1 - alphas / np.append(1.0, alphas[:-1])
    x_T = torch.from_numpy(np.random.default_rng(3).standard_normal((16, 3, 64, 64), dtype=np.float32))
    args.work.mkdir(parents=True, exist_ok=True)
    reference = _reference(sde, net, x_T, args.work / "reference.npy")
    rows = measured(PATH)
    for nfe in args.nfe:
        for name, settings, scheduler in schedulers(betas, args.plans, nfe):
            key = {"nfe": str(nfe), "scheduler": name, "settings": settings}
            if any(key.items() <= row.items() for row in rows):
                continue
            x_0 = run(scheduler, net, x_T, nfe).float()
            error = methods.error(x_0, reference)
            rows.append(key | {"error": f"{error:.5g}"})
            print(nfe, name, settings, f"{error:.4f}", sep="  ", flush=True)
            with PATH.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows)


def _reference(sde: deis.Schedule, net: Any, x_T: Tensor, path: Path) -> Tensor:
    """Return the converged solutions, kept in a file half by half."""
    plan = deis.make_plan(sde, "tab3", 145, "t", 1.0)
    halves = []
    for number, part in enumerate(x_T.split(8)):
        half = path.with_stem(f"{path.stem}-{number}")
        if not half.exists():
            np.save(half, deis.sample(plan, net, part).numpy())
        halves.append(torch.from_numpy(np.load(half)))
    return torch.cat(halves)


ABOUT = """# A network from elsewhere

![The error of every scheduler at ten calls](figures/anime64.png)

On a network of 63 million parameters that this project did not train, plans fitted to it have a third of the error of diffusers'
best scheduler at ten calls. The best plan that is not fitted has two thirds of it, and `auto` is on a par with DPM-Solver++.

`python -m benchmarks.figures anime64` draws the figure.

`python -m benchmarks.anime64 report` makes this page from what `python -m benchmarks.anime64 --nfe 10 --plans ...` measured on 23
November 2026, on two cores of an AMD EPYC server processor, with diffusers 0.42. Sampling starts at t = 290 of the discrete cosine
schedule, from the same 16 noise samples. The error is the median (the eighth smallest) of their root mean square distances to the
converged solution (145 steps), for data in [-1, 1]. Every scheduler runs as in a pipeline: `set_timesteps(10)`, and one `step` per
call, with the betas of the times up to 290. The calibrated plans are those of [calibration.md](calibration.md), fitted to other
noise.
"""


def report() -> None:
    """Print the table."""
    print(ABOUT)
    rows = sorted(measured(PATH), key=lambda row: (int(row["nfe"]), float(row["error"])))
    with folded("Every scheduler and its settings"):
        print("| NFE | scheduler | settings | error |\n|---|---|---|---|")
        for row in rows:
            print(f"| {row['nfe']} | {row['scheduler']} | {row['settings']} | {float(row['error']):.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["measure", "report"], default="measure")
    parser.add_argument("--checkpoint", type=Path, default=Path("../shared/checkpoints/anime64"))
    parser.add_argument("--nfe", type=int, nargs="+", default=[10])
    parser.add_argument("--plans", type=Path, nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path("work") / "anime64")
    args = parser.parse_args()
    report() if args.what == "report" else measure(args)


if __name__ == "__main__":
    main()
