"""Run CLD-SGM's own network and score, and save a checkpoint by its own code: python original_cld_sgm.py CHECKOUT FOLDER KIND.

In a process of its own, because the checkout's modules have general names. Two things are left out that play no part in this: what
it compiles for a GPU, as its filter has a plain form for CPUs, and the grids of pictures of torchvision.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.utils.cpp_extension

CONFIGURATIONS: dict[str, dict[str, Any]] = {  # as configs/specific_*.txt, but smaller
    "cifar10": {"ch_mult": "1,2,2,2", "n_resblocks": 2, "use_fir": True, "progressive_input": "residual",
                "embedding_type": "fourier", "image_size": 32, "beta1": 0.0, "beta0": 4.0, "numerical_eps": 1e-9},
    "celeba": {"ch_mult": "1,1,2", "n_resblocks": 1, "use_fir": False, "progressive_input": "none",
               "embedding_type": "positional", "image_size": 64, "beta1": 6.9, "beta0": 0.1, "numerical_eps": 1e-6},
}  # fmt: skip
SHARED: dict[str, Any] = {
    "name": "ncsnpp", "sde": "cld", "normalization": "GroupNorm", "nonlinearity": "swish", "n_channels": 16, "mixed_score": True,
    "attn_resolutions": "16", "resamp_with_conv": True, "fir_kernel": "1,3,3,1", "skip_rescale": True, "resblock_type": "biggan",
    "progressive": "none", "progressive_combine": "sum", "attention_type": "ddpm", "init_scale": 1.0, "fourier_scale": 16,
    "conv_size": 3, "dropout": 0.1, "image_channels": 3, "is_image": True, "center_image": True, "m_inv": 4.0, "gamma": 0.04,
    "beta_type": "linear", "cld_objective": "hsm", "device": "cpu",
}  # fmt: skip


def main(checkout: str, folder: str, kind: str) -> None:
    sys.path.insert(0, checkout)
    sys.modules["torchvision"] = sys.modules["torchvision.utils"] = ModuleType("torchvision")
    vars(sys.modules["torchvision"])["make_grid"] = None
    torch.utils.cpp_extension.load = lambda *args, **kwargs: ModuleType("compiled")
    config = ModuleType("config")
    vars(config).update(SHARED | CONFIGURATIONS[kind])
    (models, ema, sde_lib, checkpoint) = (
        importlib.import_module(name) for name in ("models.utils", "models.ema", "sde_lib", "util.checkpoint")
    )
    importlib.import_module("models.ncsnpp")
    torch.manual_seed(0)
    network = models.create_model(config)
    average = ema.ExponentialMovingAverage(network.parameters(), decay=0.9999)
    optimizer = torch.optim.Adam(network.parameters())
    state = {"optimizer": optimizer, "model": torch.nn.DataParallel(network), "ema": average, "step": 7}
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)  # the last weights are not the averaged ones
    checkpoint.save_checkpoint(str(Path(folder) / "checkpoint_7.pth"), state)
    average.copy_to(network.parameters())
    beta_0, beta_1 = vars(config)["beta0"], vars(config)["beta1"]
    sde = sde_lib.CLD(config, lambda t: beta_0 + beta_1 * t, lambda t: beta_0 * t + 0.5 * beta_1 * t**2)
    u = torch.randn(3, 6, config.image_size, config.image_size)
    t = torch.tensor([0.9, 0.3, 0.004], dtype=torch.float64)
    score = models.get_score_fn(config, sde, network, train=False)
    with torch.no_grad():
        x_0 = torch.cat([models.get_x0_prediction(config, sde, network)(u[i : i + 1], t[i : i + 1]) for i in range(len(u))])
        np.savez(Path(folder) / "expected.npz", u=u, t=t, score=score(u, t), drift=sde.sde(u, t)[0], x_0=x_0)


if __name__ == "__main__":
    main(*sys.argv[1:])
