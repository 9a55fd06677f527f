"""The reference's first demo: a network of continuous time, methods by evaluations.

python examples/continuous.py --nfe 5 10 --num 20
python examples/continuous.py --model checkpoint_8.pth --num 50000 --batch 500 --device cuda --real DIR --features inception

The network is the bundled MNIST model, or any that `deis.load_model` reads. On CIFAR-10 (score_sde, VP; the
second command) the paper has an FID of 15.37 / 4.17 / 3.37 / 2.86 / 2.57 for tAB3 at 5 / 10 / 15 / 20 / 50 evaluations
(arXiv 2204.13902). Give `--real` and `--features` for a Fréchet distance; it is an FID with the images of the training set and
`inception` only. Otherwise the table has the median root mean square distance to the converged solutions from the same noise.
"""

from __future__ import annotations

from common import arguments, measure

import deis
from deis.model.load import read_options


def main() -> None:
    args = arguments(__doc__).parse_args()
    measure(deis.load_model(args.model, device=args.device, **read_options(args.option)), args)


if __name__ == "__main__":
    main()
