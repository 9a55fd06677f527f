"""Train the class-conditional MNIST network that will ship inside the package.

    python training/train_mnist.py --data mnist.npz --out src/deis/assets/mnist

The network is diffusers' `UNet2DModel` (16/32/96 channels, 1.26 M parameters) on the continuous linear VP schedule, beta_0 = 0.01
and beta_1 = 20.  It predicts v = alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512) under the mean squared error: MNIST in
[-1, 1] has a mean square of 0.93, for which that is the preconditioning of EDM (Karras et al., arXiv 2206.00364): input and target
have unit variance at every noise level.  The noise levels, ln rho = ln(sigma / alpha), are drawn from a normal distribution, one
in five uniformly from the whole range so that the ends do not starve.  One label in ten is replaced by the null class, so that
classifier-free guidance works.  The rate is constant and decays to zero over the last part.
What is written is the average of the weights with a memory that grows with the training (the power function of Karras et al.,
arXiv 2312.02696), in half precision.

The network in training/mnist took 12,000 steps, up to 5,500 of them with --lr 2e-3, and went on with --steps 21500 --decay 0.45;
losses.csv beside it has its losses.
The state of the training is saved every few minutes; the same command continues from there, and a longer --steps prolongs it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel

from deis.files import replacing

BETA_0, BETA_1, T_END = 0.01, 20.0, 1e-3
TIME_SCALE = 1000.0  # the positional embedding of UNet2DModel resolves times of 0..1000
NUM_CLASSES, NULL_CLASS = 10, 10
LOG_RHO_MEAN, LOG_RHO_STD, UNIFORM_SHARE = -0.3, 1.5, 0.2
EMA_POWER = 16.97  # a relative width of 0.05 of the training so far
Batch = tuple[torch.Tensor, torch.Tensor]


def load_images(data: str) -> tuple[Batch, Batch]:
    """Return the images, (n, 1, 28, 28) uint8, and the labels of the training and of the test set.

    From an .npz file in the layout of keras.datasets.mnist, or from torchvision or datasets.
    """
    if data == "torchvision":
        from torchvision.datasets import MNIST

        both = [MNIST("data", train=train, download=True) for train in (True, False)]
        sets = [(mnist.data, mnist.targets) for mnist in both]
    elif data == "datasets":
        from datasets import load_dataset

        both = [load_dataset("ylecun/mnist", split=split).with_format("numpy") for split in ("train", "test")]
        sets = [(torch.from_numpy(mnist["image"]), torch.from_numpy(mnist["label"])) for mnist in both]
    else:
        with np.load(data) as arrays:
            sets = [(torch.from_numpy(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"])) for part in ("train", "test")]
    (train, test) = [(images.reshape(-1, 1, 28, 28), labels.long()) for images, labels in sets]
    return train, test


def make_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 96),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=8,
        attention_head_dim=32,
        num_class_embeds=NUM_CLASSES + 1,
        resnet_time_scale_shift="scale_shift",
    )


def time_of(log_rho: torch.Tensor) -> torch.Tensor:
    """Return t with sigma/alpha = exp(log_rho), the root of beta_0 t + (beta_1 - beta_0) t^2 / 2 = log(1 + rho^2)."""
    integral = torch.logaddexp(torch.zeros_like(log_rho), 2 * log_rho)
    return 2 * integral / (BETA_0 + torch.sqrt(BETA_0**2 + 2 * (BETA_1 - BETA_0) * integral))


def log_rho_of(t: float) -> float:
    return 0.5 * math.log(math.expm1(BETA_0 * t + 0.5 * (BETA_1 - BETA_0) * t * t))


def draw_times(batch: int) -> torch.Tensor:
    """Return `batch` stratified times in [T_END, 1]."""
    low, high = log_rho_of(T_END), log_rho_of(1.0)
    u = (torch.arange(batch, dtype=torch.float64) + torch.rand(batch)) / batch
    even = round(UNIFORM_SHARE * batch)
    uniform = low + (high - low) * u[torch.randperm(batch)[:even]]
    normal = LOG_RHO_MEAN + LOG_RHO_STD * math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-9, 1 - 1e-9))
    chosen = torch.cat([uniform, normal[torch.randperm(batch)[even:]]])
    return time_of(chosen[torch.randperm(batch)].clamp(low, high)).float().clamp(T_END, 1.0)


def v_loss(net: UNet2DModel, images: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Return the mean of |alpha eps - sigma x_0 - v_theta(alpha x_0 + sigma eps, t)|^2 of each image."""
    x_0 = images.float() / 127.5 - 1
    log_abar = -(BETA_0 * t + 0.5 * (BETA_1 - BETA_0) * t**2)[:, None, None, None]
    alpha, sigma = torch.exp(0.5 * log_abar), torch.sqrt(-torch.expm1(log_abar))
    v = net(alpha * x_0 + sigma * eps, TIME_SCALE * t, labels).sample
    return (v - (alpha * eps - sigma * x_0)).square().mean((1, 2, 3))


def test_loss(net: UNet2DModel, test: Batch) -> float:
    """Return the loss on 2,000 test images, each time of them with the same noise and noise levels."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        losses = []
        for images, labels in zip(test[0][:2000].split(250), test[1][:2000].split(250), strict=True):
            losses.append(v_loss(net, images, labels, draw_times(len(images)), torch.randn(images.shape)))
        return float(torch.cat(losses).mean())


def write_model(net: UNet2DModel, folder: Path) -> None:
    """Write a diffusers model folder in half precision, and beside it `deis.json`, which says what the network predicts."""
    net.half().save_pretrained(folder)
    about = {
        "schedule": {"type": "vp_linear", "beta_0": BETA_0, "beta_1": BETA_1, "t_start": 1.0, "t_end": T_END},
        "predicts": "v",
        "time_scale": TIME_SCALE,
        "num_classes": NUM_CLASSES,
        "null_class": NULL_CLASS,
    }
    (folder / "deis.json").write_text(json.dumps(about, indent=2) + "\n")


def train_step(net: UNet2DModel, ema: UNet2DModel, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> float:
    """Take one step of the training, with random numbers that depend on `step` alone, and return its loss."""
    torch.manual_seed(step)
    images, labels = batch
    labels = torch.where(torch.rand(len(labels)) < 0.1, NULL_CLASS, labels)
    loss = v_loss(net, images, labels, draw_times(len(images)), torch.randn(images.shape)).mean()
    net.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    if norm.isfinite():  # a single overflow would make every weight nan
        optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - (1 - 1 / (step + 1)) ** (EMA_POWER + 1))
    return float(loss.detach())


def batch_of(data: Batch, size: int, step: int) -> Batch:
    """Return the batch of a step: every epoch is a permutation of its own."""
    per_epoch = len(data[0]) // size
    epoch, k = divmod(step, per_epoch)
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(epoch))
    rows = order[k * size : (k + 1) * size]
    return data[0][rows], data[1][rows]


def share_of_rate(step: int, steps: int, decay: float) -> float:
    """Return the share of the rate at a step: a short rise, constant, and linear to zero over the last `decay` of the steps."""
    return min((step + 1) / 200, 1.0, (steps - step) / max(1.0, decay * steps))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file with x_train and y_train, or 'torchvision', or 'datasets'")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--state", type=Path, default=Path("train_mnist.pt"), help="where the training state is kept")
    parser.add_argument("--log", type=Path, default=Path("train_mnist.csv"), help="where the losses are written")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--decay", type=float, default=0.3, help="the share of the steps over which the rate goes to zero")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    train, test = load_images(args.data)
    net, ema = make_network(), make_network()
    ema.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    first = 0
    if args.state.exists():
        saved = torch.load(args.state, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        first = saved["step"]

    losses, start = [], time.perf_counter()
    for step in range(first, args.steps):
        optimizer.param_groups[0]["lr"] = args.lr * share_of_rate(step, args.steps, args.decay)
        losses.append(train_step(net, ema, optimizer, batch_of(train, args.batch, step), step))
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            loss, of_average = np.nanmean(losses), test_loss(ema, test)
            if not (np.isfinite(loss) and np.isfinite(of_average)):
                raise SystemExit(f"the loss is not finite at step {step + 1}; {args.state} holds the last good state: lower --lr")
            row = [step + 1, f"{loss:.5f}", f"{of_average:.5f}"]
            with args.log.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            with replacing(args.state) as partial:
                torch.save({"step": step + 1} | {name: part.state_dict() for name, part in parts.items()}, partial)
            speed = len(losses) * args.batch / (time.perf_counter() - start)
            print(f"step {row[0]}: loss {row[1]}, of the average on test images {row[2]}, {speed:.0f} images/s", flush=True)
            losses, start = [], time.perf_counter()
    write_model(ema, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
