"""The bundled MNIST model: whether its digits are digits, and the Fréchet distance of its samples to the test images.

python -m benchmarks.quality network --data mnist.npz
python -m benchmarks.quality plans --data mnist.npz --num 1000 --nfe 4 5 6 8 10 --methods auto calibrated

`network` judges the network itself, by converged samples: of --num samples (a class asked for each, no guidance, 100 calls of
`auto`) the share that the classifier takes for their class and the Fréchet distance, and of the first 1,000 the faulty ones.
`plans` judges plans by the same figures; "calibrated" is the plan that ships with the network.

The classifier is a small convolutional network that this script trains on the 60,000 training images, moved by up to two pixels
(eight epochs, seed 0), and whose accuracy on the test images it prints; the features are the 64 of its last hidden layer. The
distance is torchmetrics' FrechetInceptionDistance on these features, between samples and the 10,000 test images.
A sample counts as noisy where more than a quarter of its border, the outermost two pixels (208 of 784), is off black by more than
0.05, with pixels in [-1, 1]: strokes reach the border, and cover less of it. It counts as speckled where it has a spot of at most
three pixels, brighter than half and apart from the digit, which some true digits have, too: the same of training images is printed
beside it. Samples and classifier are kept in --work, and a run goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

import deis
from deis.files import replacing

BATCH = 250
BORDER = 2


def _convolution(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]


class Classifier(nn.Module):
    """Four convolutions and two linear layers; called, it returns its 64 features."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, 24), nn.MaxPool2d(2), *_convolution(24, 48), nn.MaxPool2d(2), *_convolution(48, 96),
            *_convolution(96, 96), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 9, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(x)
        return features


def moved(images: Tensor, by: int = 2) -> Tensor:
    """Return images moved by up to two pixels, each batch of them alike."""
    down, right = (int(torch.randint(-by, by + 1, ())) for _ in range(2))
    return nn.functional.pad(images, (by + right, by - right, by + down, by - down), value=-1.0)[..., by:-by, by:-by]


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 8, batch: int = 100) -> Classifier:
    torch.manual_seed(0)
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            loss = nn.functional.cross_entropy(net.head(net(moved(images[rows]))), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def classifier(data: Path, work: Path) -> Classifier:
    """Return the trained classifier, kept in the work folder."""
    path = work / "classifier.pt"
    if path.exists():
        net = Classifier()
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval().requires_grad_(False)
    net = train_classifier(*load(data, "train"))
    with replacing(path) as partial:
        torch.save(net.state_dict(), partial)
    return net


def load(data: Path, part: str) -> tuple[Tensor, Tensor]:
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays[f"x_{part}"]).float()[:, None] / 127.5 - 1
        return images, torch.from_numpy(arrays[f"y_{part}"]).long()


def generate(model: deis.Pretrained, plan: deis.Plan, num: int, work: Path) -> Tensor:
    """Return samples of the classes in turn, in batches that are kept in a folder of the plan and the network."""
    folder = work / f"samples-{fingerprint(model)}-{plan.document()['sha256'][:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for first in range(0, num, BATCH):
        path = folder / f"{first:06}.npy"
        if not path.exists():
            noise = np.random.default_rng((7, first)).standard_normal((BATCH, *model.shape), dtype=np.float32)
            found = deis.sample(plan, model.conditional(asked(BATCH).numpy()), torch.from_numpy(noise))
            with replacing(path) as partial, partial.open("wb") as file:
                np.save(file, found.clamp(-1, 1).numpy())
        samples.append(torch.from_numpy(np.load(path)))
    return torch.cat(samples)


def fingerprint(model: deis.Pretrained) -> str:
    """Return a short name of a network's weights: its output at one place."""
    x = torch.linspace(-1, 1, 784).reshape(1, *model.shape)
    return f"{float(model(x, torch.tensor([0.5])).double().square().sum()):.4e}"  # its last digits depend on the number of threads


def asked(num: int) -> Tensor:
    """Return the classes that are asked for: 0 ... 9 in turn."""
    return torch.arange(num) % 10


def off_black(images: Tensor) -> Tensor:
    """Return by how much at least a quarter of each image's outermost two pixels differs from black."""
    inner = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    return (images[..., ~inner] + 1).abs().flatten(1).quantile(0.75, dim=1)


def spots(image: np.ndarray) -> int:
    """Return the number of spots of at most three pixels beside the largest connected part of an image."""
    parts, _ = ndimage.label(image > 0, np.ones((3, 3)))
    sizes = np.sort(np.bincount(parts.ravel())[1:])
    return int((sizes[:-1] <= 3).sum())


def distance(net: Classifier, real: Tensor, fake: Tensor) -> float:
    metric = FrechetInceptionDistance(feature=net, input_img_size=(1, 28, 28))
    for images, is_real in ((real, True), (fake, False)):
        for part in images.split(500):
            metric.update(part, real=is_real)
    return float(metric.compute())


def right(net: Classifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are taken for their class."""
    taken = torch.cat([net.head(net(part)).argmax(dim=1) for part in images.split(500)])
    return float((taken == labels).double().mean())


def faults(images: Tensor) -> str:
    off, speckled = off_black(images), sum(spots(image) > 0 for image in images[:, 0].numpy())
    return f"of {len(images)} {int((off > 0.05).sum())} noisy (the worst border {float(off.max()):.3f}), {speckled} speckled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["network", "plans"])
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--model", help="as deis.load_model takes it; by default the bundled MNIST model")
    parser.add_argument("--num", type=int, help="samples, a multiple of 250; by default 10,000 of a network and 1,000 of a plan")
    parser.add_argument("--methods", nargs="+", default=["tab3", "auto"])
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--work", type=Path, default=Path("work/quality"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    num = args.num or (10000 if args.what == "network" else 1000)
    model, net = deis.load_model(args.model), classifier(args.data, args.work)
    test, labels = load(args.data, "test")
    training = load(args.data, "train")[0][:num]
    print(f"classifier: {right(net, test, labels):.4f} of the test images right")
    print(f"{num} training images: Fréchet distance {distance(net, test, training):.3f}; {faults(training[:1000])}", flush=True)
    methods = [("auto", 100)] if args.what == "network" else [(method, nfe) for nfe in args.nfe for method in args.methods]
    for method, nfe in methods:
        plan = model.plan(nfe) if method == "calibrated" else deis.make_plan(model.sde, method, nfe=nfe)
        fake = generate(model, plan, num, args.work)
        found = f"Fréchet distance {distance(net, test, fake):.3f}, {right(net, fake, asked(num)):.4f} of the class asked for"
        print(f"{method}, {nfe} NFE: {found}; {faults(fake[:1000])}", flush=True)


if __name__ == "__main__":
    main()
