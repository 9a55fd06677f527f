"""Train the class-conditional MNIST network that ships inside the package.

    python training/train_mnist.py --data mnist.npz --out src/deis/assets/mnist

The network is diffusers' `UNet2DModel` (16/32/96 channels, 1.26 M parameters) on the continuous linear VP schedule, beta_0 = 0.01
and beta_1 = 20.  It predicts v = alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512) under the mean squared error: MNIST in
[-1, 1] has a mean square of 0.93, for which that is the preconditioning of EDM (Karras et al., arXiv 2206.00364): input and target
have unit variance at every noise level.  The noise levels, ln rho = ln(sigma / alpha), are drawn from a normal distribution, one
in five uniformly from the whole range so that the ends do not starve.  One label in ten is replaced by the null class, so that
classifier-free guidance works.  The rate is constant and decays to zero over the last part.
The weights written are an average whose memory grows with the training (the power function of Karras et al., arXiv 2312.02696),
in half precision.

That network misses the class asked for in one of forty samples. So the second part of the training, with --teacher, goes on from it
towards its own guided prediction (Meng et al., arXiv 2210.03142): v(x, c) + w (v(x, c) - v(x, null)). The weight w is a bell curve
over ln rho, as guidance helps at middle noise levels (Kynkaanniemi et al., arXiv 2404.07724); it is smooth, and so is the result.
The weights written lie between the two: (1 - share) of the teacher's and --share of the new ones, as fine-tuned networks are
averaged with their starting point (Wortsman et al., arXiv 2109.01903). The result is nearer to the data than either.

The bundled MNIST model took 12,000 steps, up to 5,500 of them with --lr 2e-3, and continued with --steps 21500 --decay 0.45; then
--teacher with --steps 1200 --lr 5e-4 --decay 0.9 --share 0.75. training/losses.csv has the losses of the first part,
docs/network.md what the network is good for. With --sde the network is one of another diffusion, see training/diffusions.py: the
bundled one of blurring took --sde blurring --bfloat16 --steps 4500 --decay 0.5 (training/losses_blurring.csv).
With --device cuda every step is one CUDA graph.
The state of the training is saved every few minutes; the same command continues from there, and a longer --steps prolongs it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusions import DIFFUSIONS, SIZE, Diffusion, draw_log_rho

from deis.files import replacing

TIME_SCALE = 1000.0  # the positional embedding of UNet2DModel resolves times of 0..1000
NUM_CLASSES, NULL_CLASS = 10, 10
GUIDANCE, GUIDED_LOG_RHO_MEAN, GUIDED_LOG_RHO_STD = 0.35, 1.2, 0.9
EMA_POWER = 16.97  # a relative width of 0.05 of the training so far
VP = DIFFUSIONS["vp"]().schedule
Batch = tuple[torch.Tensor, torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Update = Callable[..., torch.Tensor]


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


def make_network(channels: int = 1) -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=channels,
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


def noisy(diffusion: Diffusion, images: torch.Tensor, labels: torch.Tensor) -> Inputs:
    """Return the inputs of the network, the noisy state with 1000 t and the labels, and v."""
    log_rho = draw_log_rho(diffusion.low, diffusion.high, len(images), images.device)
    u, t, v = diffusion.pair(log_rho, images.float() / 127.5 - 1)
    return u, TIME_SCALE * t, labels, v


def guided(teacher: UNet2DModel, inputs: Inputs) -> Inputs:
    """Return inputs with the guided prediction of a trained network in place of v: v(x, c) + w (v(x, c) - v(x, null))."""
    x, times, labels, _ = inputs
    beta_0, beta_1, t = VP["beta_0"], VP["beta_1"], times / TIME_SCALE
    log_rho = 0.5 * torch.log(torch.expm1(beta_0 * t + 0.5 * (beta_1 - beta_0) * t**2))
    w = GUIDANCE * torch.exp(-0.5 * ((log_rho - GUIDED_LOG_RHO_MEAN) / GUIDED_LOG_RHO_STD) ** 2)[:, None, None, None]
    with torch.no_grad():
        of_both = teacher(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, torch.full_like(labels, NULL_CLASS)])).sample
    v, without = of_both.chunk(2)
    return x, times, labels, v + w * (v - without)


def v_loss(net: UNet2DModel, x: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the mean of |v - v_theta(x, t)|^2."""
    loss: torch.Tensor = (net(x, times, labels).sample.float() - v).square().mean()
    return loss


def test_loss(net: UNet2DModel, diffusion: Diffusion, test: Batch) -> float:
    """Return the loss on 2,000 test images, always with the same noise and noise levels."""
    device = test[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        parts = zip(test[0][:2000].split(250), test[1][:2000].split(250), strict=True)
        return float(torch.stack([v_loss(net, *noisy(diffusion, *part)) for part in parts]).mean())


def between(teacher: UNet2DModel, net: UNet2DModel, share: float) -> UNet2DModel:
    """Return `net` with the weights (1 - share) teacher + share net."""
    with torch.no_grad():
        for weight, first in zip(net.parameters(), teacher.parameters(), strict=True):
            weight.copy_(torch.lerp(first, weight, share))
    return net


def write_model(net: UNet2DModel, diffusion: Diffusion, folder: Path) -> None:
    """Write a diffusers model folder in half precision, and beside it `deis.json`, which says what the network predicts."""
    net.cpu().half().save_pretrained(folder)
    about = {
        "schedule": diffusion.schedule,
        "predicts": "v",
        "time_scale": TIME_SCALE,
        "num_classes": NUM_CLASSES,
        "null_class": NULL_CLASS,
    }
    (folder / "deis.json").write_text(json.dumps(about, indent=2) + "\n")


def inputs_of(diffusion: Diffusion, data: Batch, size: int, step: int) -> Inputs:
    """Return the inputs of a step, with random numbers that depend on `step` alone; one label in ten is the null class."""
    torch.manual_seed(step)
    images, labels = batch_of(data, size, step)
    dropped = torch.rand(len(labels), device=labels.device) < 0.1
    return noisy(diffusion, images, torch.where(dropped, NULL_CLASS, labels))


def batch_of(data: Batch, size: int, step: int) -> Batch:
    """Return the batch of a step: every epoch is a permutation of its own."""
    epoch, k = divmod(step, len(data[0]) // size)
    rows = order_of(epoch, len(data[0]), data[0].device)[k * size : (k + 1) * size]
    return data[0][rows], data[1][rows]


@lru_cache(maxsize=1)
def order_of(epoch: int, num: int, device: torch.device) -> torch.Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(epoch)).to(device)


def updating(net: UNet2DModel, optimizer: torch.optim.Optimizer, bfloat16: bool) -> Update:
    """Return a function that takes one step on inputs and returns its loss."""

    def update(*inputs: torch.Tensor) -> torch.Tensor:
        net.zero_grad()
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=bfloat16):
            loss = v_loss(net, *inputs)
        loss.backward()
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)  # a single overflow would make every weight nan
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return update


def captured(update: Update, inputs: Inputs) -> Update:
    """Return `update` as one CUDA graph: the network is small, and its kernels take less time than their launches."""
    held = tuple(value.clone() for value in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = update(*held)

    def replay(*values: torch.Tensor) -> torch.Tensor:
        for buffer, value in zip(held, values, strict=True):
            buffer.copy_(value)
        graph.replay()
        return loss.clone()

    return replay


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
    parser.add_argument("--every", type=int, default=500, help="steps between two lines of losses")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sde", default="vp", choices=sorted(DIFFUSIONS), help="the diffusion")
    parser.add_argument("--bfloat16", action="store_true", help="convolve in bfloat16: 1.6 times as fast where the CPU has it")
    parser.add_argument("--teacher", type=Path, help="a model folder: go on from it, towards its own guided prediction")
    parser.add_argument("--share", type=float, default=1.0, help="with --teacher: the share of the new weights in those written")
    args = parser.parse_args()
    if not 0 <= args.share <= 1 or (args.share < 1 and args.teacher is None):
        parser.error(f"--share {args.share:g} must be from 0 to 1, and below 1 it needs --teacher for the rest")
    if args.teacher is not None and args.sde != "vp":
        parser.error(f"--teacher goes on from a network of --sde vp, and --sde is {args.sde}")
    return args


def train(
    args: argparse.Namespace, parts: dict[str, Any], teacher: UNet2DModel | None, data: tuple[Batch, Batch], first: int
) -> None:
    """Train from step `first` on, on the data or on what a teacher predicts, and keep the state and the losses."""
    net, ema, optimizer = parts["net"], parts["ema"], parts["optimizer"]
    diffusion = DIFFUSIONS[args.sde]()
    update, rate = updating(net, optimizer, args.bfloat16), optimizer.param_groups[0]["lr"]
    if args.device == "cuda":
        rate.zero_()  # the steps before the capture change nothing
        update = captured(update, inputs_of(diffusion, data[0], args.batch, first))
    weights, average = list(net.parameters()), list(ema.parameters())
    losses, start = [], time.perf_counter()
    for step in range(first, args.steps):
        rate.fill_(args.lr * share_of_rate(step, args.steps, args.decay))
        inputs = inputs_of(diffusion, data[0], args.batch, step)
        losses.append(update(*(inputs if teacher is None else guided(teacher, inputs))))
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - (1 - 1 / (step + 1)) ** (EMA_POWER + 1))
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            loss, of_average = float(torch.stack(losses).nanmean()), test_loss(ema, diffusion, data[1])
            speed = len(losses) * args.batch / (time.perf_counter() - start)
            if not (math.isfinite(loss) and math.isfinite(of_average)):
                raise SystemExit(f"the loss is not finite at step {step + 1}; {args.state} holds the last good state: lower --lr")
            row = [step + 1, f"{loss:.6f}", f"{of_average:.5f}"]
            with args.log.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            with replacing(args.state) as partial:
                torch.save({"step": step + 1} | {name: part.state_dict() for name, part in parts.items()}, partial)
            print(f"step {row[0]}: loss {row[1]}, of the average on test images {row[2]}, {speed:.0f} images/s", flush=True)
            losses, start = [], time.perf_counter()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")  # TF32, where available
    train_set, test_set = ((images.to(args.device), labels.to(args.device)) for images, labels in load_images(args.data))
    diffusion = DIFFUSIONS[args.sde]()
    net, ema = (make_network(diffusion.channels).to(args.device) for _ in range(2))
    teacher = None
    if args.teacher is not None:
        teacher = UNet2DModel.from_pretrained(args.teacher, low_cpu_mem_usage=False).float().to(args.device).eval()
        net.load_state_dict(teacher.state_dict())
    ema.load_state_dict(net.state_dict())
    rate = torch.tensor(args.lr, device=args.device)  # a tensor: what a CUDA graph reads can change
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, betas=(0.9, 0.99), fused=True, capturable=args.device == "cuda")
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    first = 0
    if args.state.exists():
        saved = torch.load(args.state, weights_only=True, map_location=args.device)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        first = saved["step"]
    train(args, parts, teacher, (train_set, test_set), first)
    write_model(ema if teacher is None else between(teacher, ema, args.share), diffusion, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
