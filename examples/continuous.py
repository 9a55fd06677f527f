"""The reference's first demo: a network of continuous time, methods by evaluations.

python examples/continuous.py --nfe 5 10 --num 20
python examples/continuous.py --model FOLDER --num 50000 --batch 500 --device cuda --real DIR --features inception

The network is the one inside, trained on MNIST, or that of a folder as `training/train_mnist.py` writes it. On score_sde's CIFAR-10
network (VP) the paper has an FID of 15.37 / 4.17 / 3.37 / 2.86 / 2.57 for tAB3 at 5 / 10 / 15 / 20 / 50 evaluations
(arXiv 2204.13902). Give `--real` and `--features` for a Fréchet distance; it is an FID with the images of the training set and
`inception` only. Otherwise the table has the median root mean square distance to the converged solutions from the same noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import arguments, plans_of, run

import deis


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="a model folder; by default the network inside")
    args = parser.parse_args()
    network = deis.load_model(args.model, device=args.device)
    noise = np.random.default_rng(0).standard_normal((args.num, *network.shape), dtype=np.float32)
    x_T = torch.from_numpy(noise).to(args.device)
    plans = plans_of(network.sde, args, dict(network.plans))
    if network.num_classes is None:
        run(network, x_T, None, plans, args)
    else:
        run(network.conditional, x_T, np.arange(args.num) % network.num_classes, plans, args)


if __name__ == "__main__":
    main()
