"""Trained networks of Langevin and blurring diffusion beside one of the VP schedule, of one size and training: R against L.

for sde in vp cld blurring; do
    python training/train_mnist.py --data mnist.npz --out work/linear/$sde --state work/linear/$sde.pt --log work/linear/$sde.csv \
        --sde $sde --bfloat16 --steps 4500 --decay 0.5
done
python -m benchmarks.linear_networks --data mnist.npz

Frechet distance of --num samples to the 10,000 test images, and the share of the class asked for, by the classifier of
benchmarks/quality.py, for exponential Adams of order 0 to 3 at 10, 20 and 50 evaluations; classes in turn, no guidance. "vp by
Langevin" is the VP network run through critically damped Langevin by `deis.LinearDenoiser`. It writes
benchmarks/results/linear_networks.csv and docs/linear-networks.png. Samples are kept in --work, and a run goes on from
there.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import deis
from deis.files import replacing
from deis.linear.pretrained import PretrainedLinear

from .quality import asked, classifier, distance, load, right

RESULTS = Path(__file__).parent / "results" / "linear_networks.csv"
FIGURE = Path(__file__).parents[1] / "docs" / "linear-networks.png"
BUDGETS, DEGREES, BATCH = (10, 20, 50), (0, 1, 2, 3), 125
Sampler = Callable[[int, int, Tensor, np.ndarray], Tensor]
"""(degree, nfe, z of (batch, 2, 28, 28), labels) -> samples."""


@dataclass(frozen=True)
class Contestant:
    name: str
    K: str
    sample: Sampler
    degrees: tuple[int, ...] = DEGREES


def scalar(model: deis.Pretrained) -> Sampler:
    """The VP schedule itself, by tab<degree> on the same kind of grid."""

    def sample(degree: int, nfe: int, z: Tensor, labels: np.ndarray) -> Tensor:
        plan = deis.make_plan(model.sde, f"tab{degree}" if degree else "ddim", nfe=nfe, ts_phase="t", ts_order=2.0)
        return deis.sample(plan, model.conditional(labels), z[:, :1].contiguous())

    return sample


def langevin(model: deis.Pretrained, K: str) -> Sampler:
    sde = deis.CLD()

    def sample(degree: int, nfe: int, z: Tensor, labels: np.ndarray) -> Tensor:
        plan = deis.make_linear_plan(sde, f"tab{degree}", nfe, K=K)
        network = deis.LinearDenoiser(model.conditional(labels), sde)
        return deis.sample_linear(plan, network, sde.noise(z.transpose(0, 1)[:, :, None]))

    return sample


def trained(model: PretrainedLinear, K: str) -> Sampler:
    def sample(degree: int, nfe: int, z: Tensor, labels: np.ndarray) -> Tensor:
        plan = deis.make_linear_plan(model.sde, f"tab{degree}", nfe, K=K)
        noise = model.noise(z if model.sde.basis == "block" else z[:, :1].contiguous())
        return deis.sample_linear(plan, model.conditional(labels), noise)

    return sample


def contestants(folder: Path) -> list[Contestant]:
    vp, cld, blurring = (deis.load_model(folder / name) for name in ("vp", "cld", "blurring"))
    return [
        Contestant("vp", "", scalar(vp)),
        Contestant("cld", "R", trained(cld, "R")),
        Contestant("cld", "L", trained(cld, "L")),
        Contestant("vp by Langevin", "R", langevin(vp, "R"), (2,)),
        Contestant("blurring", "", trained(blurring, "R")),
    ]


def samples(one: Contestant, degree: int, nfe: int, num: int, work: Path) -> Tensor:
    """Return samples of the classes in turn, which are kept."""
    path = work / f"{one.name.replace(' ', '-')}-{one.K}-{degree}-{nfe}-{num}.npy"
    if not path.exists():
        found = []
        for first in range(0, num, BATCH):
            z = np.random.default_rng((7, first)).standard_normal((BATCH, 2, 28, 28), dtype=np.float32)
            labels = asked(num)[first : first + BATCH].numpy()
            found.append(one.sample(degree, nfe, torch.from_numpy(z), labels).clamp(-1, 1).numpy())
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(found))
    return torch.from_numpy(np.load(path))


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    net, (test, _) = classifier(args.data, args.work), load(args.data, "test")
    training = load(args.data, "train")[0][: args.num]
    print(f"{args.num} training images: Frechet distance {distance(net, test, training):.3f}", flush=True)
    rows = []
    for one in contestants(args.networks):
        for degree in one.degrees:
            row: dict[str, Any] = {"network": one.name, "K": one.K, "order": degree}
            for nfe in BUDGETS:
                fake = samples(one, degree, nfe, args.num, args.work)
                row[f"distance {nfe}"] = f"{distance(net, test, fake):.3g}"
                row[f"right {nfe}"] = f"{right(net, fake, asked(args.num)):.3f}"
            rows.append(row)
            print(*row.values(), flush=True)
    return rows


def figure(args: argparse.Namespace) -> None:
    """Draw ten digits of each at 20 evaluations and order 2, and of L at 50."""
    from matplotlib.figure import Figure

    shown = [(one, 50 if one.K == "L" else 20) for one in contestants(args.networks)]
    picture = Figure(figsize=(7, 0.66 * len(shown)), layout="constrained")
    for axes, (one, nfe) in zip(picture.subplots(len(shown), 1), shown, strict=True):
        digits = samples(one, 2, nfe, args.num, args.work)[:10, 0]
        axes.imshow(digits.transpose(0, 1).reshape(28, 280), cmap="gray", vmin=-1, vmax=1)
        axes.set_ylabel(f"{one.name}\n{one.K}{', ' * bool(one.K)}{nfe} calls", rotation=0, ha="right", va="center", fontsize=7)
        axes.set(xticks=[], yticks=[])
    picture.savefig(FIGURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--networks", type=Path, default=Path("work/linear"), help="the folder with vp, cld and blurring")
    parser.add_argument("--num", type=int, default=250, help=f"samples, a multiple of {BATCH}")
    parser.add_argument("--work", type=Path, default=Path("work/quality"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = table(args)
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        file.write(
            f"# {time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {args.num} samples, virtual cores of an x86 CPU\n"
        )
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure(args)


if __name__ == "__main__":
    main()
