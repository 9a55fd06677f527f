"""Train the class-conditional MNIST network that ships inside the package.

    python training/train_mnist.py --data mnist.npz --out src/deis/assets/mnist --epochs 10

The network is diffusers' `UNet2DModel` (16/32/64 channels, 0.69 M parameters) on the continuous linear VP
schedule, beta_0 = 0.01 and beta_1 = 20, trained to predict eps under the mean squared error with t uniform in
[1e-3, 1].  One label in ten is replaced by the null class, so that classifier-free guidance works.  What ships is
the exponential moving average of the weights, in half precision.

The state of the training is saved after every epoch; the same command continues from there.
"""

from __future__ import annotations

import argparse
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


def load_images(data: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training images, (60000, 1, 28, 28) uint8, and their labels, from an .npz file, torchvision or datasets."""
    if data == "torchvision":
        from torchvision.datasets import MNIST

        mnist = MNIST("data", train=True, download=True)
        images, labels = mnist.data, mnist.targets
    elif data == "datasets":
        from datasets import load_dataset

        mnist = load_dataset("ylecun/mnist", split="train").with_format("numpy")
        images, labels = torch.from_numpy(mnist["image"]), torch.from_numpy(mnist["label"])
    else:
        with np.load(data) as arrays:  # the layout of keras.datasets.mnist
            images, labels = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"])
    return images.reshape(-1, 1, 28, 28), labels.long()


def make_network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=NUM_CLASSES + 1,
    )


def eps_loss(net: UNet2DModel, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of |eps - eps_theta(alpha x_0 + sigma eps, t)|^2 over one batch; the times are stratified over [T_END, 1]."""
    batch = len(images)
    x_0 = images.float() / 127.5 - 1
    u = (torch.arange(batch, device=x_0.device) + torch.rand(batch, device=x_0.device)) / batch
    t = T_END + (1 - T_END) * u[torch.randperm(batch, device=x_0.device)]
    log_abar = -(BETA_0 * t + 0.5 * (BETA_1 - BETA_0) * t**2)
    alpha, sigma = torch.exp(0.5 * log_abar), torch.sqrt(-torch.expm1(log_abar))
    eps = torch.randn_like(x_0)
    x_t = alpha[:, None, None, None] * x_0 + sigma[:, None, None, None] * eps
    drop = torch.rand(batch, device=x_0.device) < 0.1
    labels = torch.where(drop, NULL_CLASS, labels)
    return (net(x_t, TIME_SCALE * t, labels).sample - eps).square().mean()


def write_model(net: UNet2DModel, folder: Path) -> None:
    """Write a diffusers model folder in half precision, and beside it `deis.json`, which says what the network predicts."""
    net.half().save_pretrained(folder)
    about = {
        "schedule": {"type": "vp_linear", "beta_0": BETA_0, "beta_1": BETA_1, "t_start": 1.0, "t_end": T_END},
        "predicts": "eps",
        "time_scale": TIME_SCALE,
        "num_classes": NUM_CLASSES,
        "null_class": NULL_CLASS,
    }
    (folder / "deis.json").write_text(json.dumps(about, indent=2) + "\n")


def save_state(path: Path, **state: object) -> None:
    with replacing(path) as partial:
        torch.save(state, partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file with x_train and y_train, or 'torchvision', or 'datasets'")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--state", type=Path, default=Path("train_mnist.pt"), help="where the training state is kept")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = (a.to(args.device) for a in load_images(args.data))
    net, ema = make_network().to(args.device), make_network().to(args.device)
    ema.load_state_dict(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.0)
    steps = len(images) // args.batch * args.epochs
    warmup = min(200, max(1, steps // 10))

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parts = {"net": net, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    first = 0
    if args.state.exists():
        saved = torch.load(args.state, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        first = saved["epoch"]

    for epoch in range(first, args.epochs):
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(images), device=args.device)
        batches = order[: len(images) // args.batch * args.batch].split(args.batch)
        for rows in batches:
            loss = eps_loss(net, images[rows], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen = schedule.last_epoch
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - min(args.ema, (1 + seen) / (10 + seen)))
            total += float(loss.detach())
        states = {name: part.state_dict() for name, part in parts.items()}
        save_state(args.state, epoch=epoch + 1, rng=torch.get_rng_state(), **states)
        rate_now = len(batches) * args.batch / (time.perf_counter() - start)
        print(f"epoch {epoch + 1}/{args.epochs}: loss {total / len(batches):.5f}, {rate_now:.0f} images/s", flush=True)
    write_model(ema, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
