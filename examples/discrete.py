"""The reference's second demo: a network of integer training times, methods by evaluations.

python examples/discrete.py --anime64 ../shared/checkpoints/anime64 --nfe 5 10 --num 8 --methods DDIM tAB3 auto
python examples/discrete.py --model ema_celeba.ckpt --num 50000 --batch 500 --device cuda --real DIR --features inception

With a checkpoint of the DDIM or PNDM code base (CelebA 64x64: `ema_*.ckpt`) it makes the reference's CelebA table. `--anime64`
takes a folder with the files `unet.py` and `weights_q8.npz` of a 64x64 network with a cosine schedule of 300 times, from t = 290.
Give `--real` and `--features` for a Fréchet distance; it is an FID with the images of the training set and `inception` only.
Otherwise the table has the median root mean square distance to the converged solutions from the same noise.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import arguments, measure

import deis
from deis.model.load import read_options


def anime64(folder: Path, device: str) -> deis.Pretrained:
    """Return the network in a folder whose `unet.py` loads it."""
    spec = importlib.util.spec_from_file_location("anime64_unet", folder / "unet.py")
    if spec is None or spec.loader is None or not (folder / "unet.py").exists():
        raise SystemExit(f"--anime64 {folder} has no unet.py")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    unet = module.load().to(device)
    # At the last times, alpha is nearly 0, and a prediction of eps hardly determines x_0.
    sde = replace(deis.VPSDE.discrete(module.alphas_cumprod()), sampling_T=290.0)
    return deis.Pretrained(lambda x, t, labels: unet(x, t), sde, "eps", (3, 64, 64), None, None, 1.0)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--anime64", type=Path, help="the folder of the 64x64 network, in place of --model")
    args = parser.parse_args()
    if (args.model is None) == (args.anime64 is None):
        parser.error("give one of --model and --anime64")
    if args.anime64 is not None:
        measure(anime64(args.anime64, args.device), args)
    else:
        measure(deis.load_model(args.model, device=args.device, **read_options(args.option)), args)


if __name__ == "__main__":
    main()
