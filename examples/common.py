"""What the two demos share: a table of methods by evaluations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import deis
from deis.calibration.network import Model
from deis.evaluation import converged, evaluate, features, load_extractor, load_images

# The methods in the table of the DEIS paper and of its reference implementation, and later ones.
METHODS = {
    "DDIM": "ddim",
    "rhoAB1": "rhoab1", "rhoAB2": "rhoab2", "rhoAB3": "rhoab3",
    "tAB1": "tab1", "tAB2": "tab2", "tAB3": "tab3",
    "iPNDM": "ipndm4",
    "rhoRK2": "rhork_2heun", "rhoRK3": "rhork_3kutta", "rhoRK4": "rhork_4rk",
    "auto": "auto",
}  # fmt: skip


Plans = dict[str, dict[int, deis.Plan]]
"""Plans by the name of the method and the number of evaluations."""


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Return the options that both demos have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="what deis.load_model takes: a checkpoint, a folder, a name on the hub")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of deis.load_model, such as sde=ve")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 15, 20, 50])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "calibrated"], default=list(METHODS))
    parser.add_argument("--num", type=int, default=64, help="samples per cell")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference-steps", type=int, default=200)
    parser.add_argument("--real", type=Path, help="real images, for the Fréchet distance: a folder or an .npz file")
    parser.add_argument("--features", help="the features of these images: a TorchScript file, or inception")
    parser.add_argument("--out", type=Path, default=Path("work") / "demo", help="finished batches, and table.json")
    return parser


def measure(network: deis.Pretrained, args: argparse.Namespace) -> None:
    """Measure the methods on a network, each class in turn where it has classes, and print the table."""
    noise = np.random.default_rng(0).standard_normal((args.num, *network.shape), dtype=np.float32)
    plans = plans_of(network.sde, args, dict(network.plans))
    x_T = torch.from_numpy(noise).to(args.device) * float(network.sde.sigma(network.sde.t_start))
    if network.num_classes is None:
        run(network.conditional(), x_T, None, plans, network.decode, args)
    else:
        run(network.conditional, x_T, np.arange(args.num) % network.num_classes, plans, network.decode, args)


def run(
    model: Model,
    x_T: torch.Tensor,
    condition: Any,
    plans: Plans,
    decode: Callable[[Any], Any] | None,
    args: argparse.Namespace,
) -> None:
    """Measure the plans, name by name and budget by budget, and print the table."""
    extractor = real = None
    if args.features is not None:
        extractor = load_extractor(args.features, args.device)
        real = np.concatenate([features(extractor, part) for part in np.array_split(load_images(args.real), 20)])
    few = slice(0, min(len(x_T), 64))
    labels = None if condition is None else condition[few]
    reference, moved = converged(model, x_T[few], args.reference_steps, condition=labels, batch=args.batch)
    title = "RMSE to the converged samples" if real is None else f"Fréchet distance in the features of {args.features}"
    print(f"reference: {args.reference_steps} steps, which half as many miss by {moved:.2g}")
    rows: dict[str, dict[int, Any]] = {}
    tag = repr((args.features, args.model, args.option, getattr(args, "anime64", None)))
    with tqdm(total=sum(map(len, plans.values())) * len(x_T), unit="image") as bar:
        for name, budgets in plans.items():
            for nfe, plan in budgets.items():
                rows.setdefault(name, {})[nfe] = evaluate(
                    plan, model, x_T, condition=condition, extractor=extractor, real=real, reference=reference, batch=args.batch,
                    folder=args.out, tag=tag, decode=decode, progress=bar,
                )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.json").write_text(json.dumps(rows, indent=1))
    print(f"{title}, {len(x_T)} samples\n")
    print("| | " + " | ".join(f"{nfe} NFE" for nfe in args.nfe) + " |\n|---" + "|---" * len(args.nfe) + "|")
    for name, cells in rows.items():
        values = [cells[nfe]["frechet" if real is not None else "rmse"] if nfe in cells else None for nfe in args.nfe]
        print(f"| {name} | " + " | ".join("" if value is None else f"{value:.4g}" for value in values) + " |")


def plans_of(sde: deis.Schedule, args: argparse.Namespace, own: dict[int, deis.Plan] | None = None) -> Plans:
    """Return the plans of the table; a cell that a method cannot fill is left out."""
    plans: Plans = {}
    for name in args.methods:
        for nfe in args.nfe:
            if name == "calibrated":
                if own and nfe in own:
                    plans.setdefault(name, {})[nfe] = own[nfe]
                continue
            try:
                plans.setdefault(name, {})[nfe] = deis.make_plan(sde, METHODS[name], nfe=nfe)
            except ValueError as error:
                print(f"{name} at {nfe} NFE: {error}")
    return plans
