"""The embedded network: Fréchet distance of its samples, and the error of every method at a few evaluations.

python -m benchmarks.quality --data mnist.npz

The features are the 64 of the last hidden layer of a small convolutional classifier that this script trains on the 60,000
training images (three epochs, seed 0) and whose accuracy on the test images it prints. The distance is torchmetrics'
FrechetInceptionDistance on these features, between samples and the 10,000 test images. The error is the median over samples
of the root mean square difference to the converged solution (200 steps of tab3) from the same noise; pixels lie in [-1, 1].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

import deis

EVALUATIONS = (5, 6, 8, 10, 15, 20)


class Classifier(nn.Module):
    """Two convolutions and two linear layers; called, it returns its 64 features."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 49, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(x)
        return features


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 3) -> Classifier:
    torch.manual_seed(0)
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(200):
            loss = nn.functional.cross_entropy(net.head(net(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def load(data: Path, part: str) -> tuple[Tensor, Tensor]:
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays[f"x_{part}"]).float()[:, None] / 127.5 - 1
        return images, torch.from_numpy(arrays[f"y_{part}"]).long()


def generate(model: deis.Pretrained, plan: deis.Plan, num: int, batch: int = 250) -> Tensor:
    samples = []
    for first in range(0, num, batch):
        labels = np.arange(first, first + batch) % 10
        noise = np.random.default_rng((7, first)).standard_normal((batch, *model.shape), dtype=np.float32)
        samples.append(deis.sample(plan, model.conditional(labels), torch.from_numpy(noise)))
    return torch.cat(samples).clamp(-1, 1)


def distance(net: Classifier, real: Tensor, fake: Tensor) -> float:
    metric = FrechetInceptionDistance(feature=net, input_img_size=(1, 28, 28))
    for images, is_real in ((real, True), (fake, False)):
        for part in images.split(500):
            metric.update(part, real=is_real)
    return float(metric.compute())


def error_table(model: deis.Pretrained, num: int) -> None:
    labels = np.arange(num) % 10
    x_T = torch.from_numpy(np.random.default_rng(3).standard_normal((num, *model.shape), dtype=np.float32))

    def run(plan: deis.Plan) -> Tensor:
        x_0: Tensor = deis.sample(plan, model.conditional(labels), x_T)
        return x_0

    reference = run(deis.make_plan(model.sde, "tab3", 200))
    finer = run(deis.make_plan(model.sde, "tab3", 400))
    rmse: Callable[[Tensor], float] = lambda x: float((x - reference).square().mean(dim=(1, 2, 3)).sqrt().median())  # noqa: E731
    print(f"the reference of 200 steps moves by {rmse(finer):.1e} when its steps are doubled")
    grids = [("t", 1.0), ("t", 2.0), ("t", 3.0), ("rho", 7.0), ("log", 1.0)]
    methods = [
        "ddim",
        "tab1",
        "tab2",
        "tab3",
        "rhoab1",
        "rhoab2",
        "rhoab3",
        "ipndm2",
        "ipndm4",
        "rhork_2heun",
        "rhork_3kutta",
        "rhork_4rk",
    ]
    print("| method | " + " | ".join(f"{nfe} NFE" for nfe in EVALUATIONS) + " |\n" + "|---" * (len(EVALUATIONS) + 1) + "|")
    for method in methods:
        cells = []
        stages = len(deis.TABLEAUX[method[6:]].b) if method.startswith("rhork") else 1
        for nfe in EVALUATIONS:
            if nfe % stages:
                cells.append("")
                continue
            errors = {g: rmse(run(deis.make_plan(model.sde, method, nfe // stages, *g))) for g in grids}
            best = min(errors, key=errors.__getitem__)
            cells.append(f"{errors[best]:.4f} ({best[0]}{'' if best[0] == 'log' else f'{best[1]:g}'})")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--num", type=int, default=5000, help="samples for the Fréchet distance, a multiple of 250")
    parser.add_argument("--pairs", type=int, default=40, help="samples for the error table")
    args = parser.parse_args()
    model = deis.load_model()
    error_table(model, args.pairs)
    net = train_classifier(*load(args.data, "train"))
    real, labels = load(args.data, "test")
    accuracy = float((net.head(net(real)).argmax(dim=1) == labels).float().mean())
    floor = distance(net, real, load(args.data, "train")[0][: args.num])
    print(f"classifier: {accuracy:.4f} of the test images right; Fréchet distance of {args.num} training images {floor:.3f}")
    for nfe in (5, 10, 20, 50):
        fake = generate(model, deis.make_plan(model.sde, "tab3", nfe), args.num)
        right = float((net.head(net(fake)).argmax(dim=1) == torch.arange(args.num) % 10).float().mean())
        print(f"tab3, {nfe} NFE: Fréchet distance {distance(net, real, fake):.3f}, {right:.4f} of the class asked for", flush=True)


if __name__ == "__main__":
    main()
