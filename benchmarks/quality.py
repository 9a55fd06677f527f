"""The embedded network: Fréchet distance of its samples to the test images.

python -m benchmarks.quality --data mnist.npz
python -m benchmarks.quality --data mnist.npz --num 1000 --nfe 4 5 6 8 10 --methods auto calibrated

"calibrated" is the plan that ships with the network.

The features are the 64 of the last hidden layer of a small convolutional classifier that this script trains on the 60,000
training images (three epochs, seed 0) and whose accuracy on the test images it prints. The distance is torchmetrics'
FrechetInceptionDistance on these features, between samples and the 10,000 test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

import deis


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--num", type=int, default=5000, help="samples for the Fréchet distance, a multiple of 250")
    parser.add_argument("--methods", nargs="+", default=["tab3", "auto"])
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20])
    args = parser.parse_args()
    model = deis.load_model()
    net = train_classifier(*load(args.data, "train"))
    real, labels = load(args.data, "test")
    accuracy = float((net.head(net(real)).argmax(dim=1) == labels).float().mean())
    floor = distance(net, real, load(args.data, "train")[0][: args.num])
    print(f"classifier: {accuracy:.4f} of the test images right; Fréchet distance of {args.num} training images {floor:.3f}")
    for nfe in args.nfe:
        for method in args.methods:
            plan = model.plan(nfe) if method == "calibrated" else deis.make_plan(model.sde, method, nfe=nfe)
            fake = generate(model, plan, args.num)
            right = float((net.head(net(fake)).argmax(dim=1) == torch.arange(args.num) % 10).float().mean())
            found = distance(net, real, fake)
            print(f"{method}, {nfe} NFE: Fréchet distance {found:.3f}, {right:.4f} of the class asked for", flush=True)


if __name__ == "__main__":
    main()
