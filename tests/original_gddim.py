"""Run gDDIM's own networks, eps and R, and save checkpoints of its own state: python original_gddim.py CHECKOUT FOLDER KIND.

In a process of its own, because the checkout's modules have general names, `deis` among them. It was written for the flax of 2022;
left out is what plays no part in this: its optimizers, its logs, TensorFlow, and the classifier. flax's own checkpoints save the
state.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax.training import checkpoints


class Config:
    """What ml_collections.ConfigDict is to this code: names that hold values."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def update(self, **values: Any) -> None:
        vars(self).update(values)


def rearrange(x: Any, pattern: str, **sizes: int) -> Any:
    """The two patterns of einops that it uses: pairs at the end, as channels one after another and back."""
    if pattern == "b ... d g -> b ...(g d)":
        return jnp.swapaxes(x, -1, -2).reshape(*x.shape[:-2], -1)
    assert pattern == "b ... (g d) -> b ... d g"
    return jnp.swapaxes(x.reshape(*x.shape[:-1], sizes["g"], -1), -1, -2)


def module(name: str, **members: Any) -> None:
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(members)


def stand_ins(folder: str) -> None:
    module("ml_collections", ConfigDict=Config)
    module("ml_collections.config_dict")
    module("ml_collections.config_dict.config_dict", ConfigDict=Config)
    module("tensorflow")
    module("wandb")
    module("einops", rearrange=rearrange)
    module("jammy", io=None)
    module("jammy.utils")
    module("jammy.utils.git", git_rootdir=lambda path: f"{folder}/{path}")
    module("jammy.io", mkdir=lambda path: None, dump=lambda path, value: None)
    vars(sys.modules["jammy"])["io"] = sys.modules["jammy.io"]
    module("models.wideresnet_noise_conditional")
    vars(flax)["optim"] = ModuleType("optim")
    vars(flax)["optim"].Optimizer = Any
    if not hasattr(jax.config, "read"):
        type(jax.config).read = getattr  # type: ignore[method-assign]
    lax_numpy = importlib.import_module("jax._src.numpy.lax_numpy")
    if not hasattr(lax_numpy, "_promote_dtypes_inexact"):  # it has moved since
        vars(lax_numpy)["_promote_dtypes_inexact"] = importlib.import_module("jax._src.numpy.util").promote_dtypes_inexact
    module("fft", fft=jnp.fft.fft, irfft=jnp.fft.irfft)  # the checkout has a copy of these from an older JAX


def configured(kind: str) -> Config:
    """The configuration of the repository, smaller, with random last layers, which it starts at 0."""
    name = {"cld": "accr_dcifar10_config", "blurring": "ddpm_deep_cifar10_config"}[kind]
    config: Config = importlib.import_module(f"configs.{name}").get_config()
    config.model.update(nf=16, ch_mult=(1, 2), num_res_blocks=1, init_scale=1.0)
    return config


def main(checkout: str, folder: str, kind: str) -> None:
    sys.path.insert(0, str(Path(checkout) / ("blur_jax" if kind == "blurring" else "cld_jax")))
    stand_ins(folder)
    config = configured(kind)
    models, sde_lib = importlib.import_module("models.utils"), importlib.import_module("sde_lib")
    importlib.import_module("models.ncsnpp")
    jax.config.update("jax_enable_x64", True)  # in float32 the angles of its Fourier features, of some thousand, differ by 1e-4
    flax.config.update("flax_use_orbax_checkpointing", False)  # as all of flax did then
    flax.config.update("flax_return_frozendict", True)
    config.model.update(x64=True, is_R_rk=True, R_dt=1e-5, used_cache=False)
    network, rest, params = models.init_model(jax.random.key(0), config)
    state = models.State(
        step=7, optimizer={"target": jax.tree.map(lambda v: v + 1, params)}, lr=2e-4, model_state=rest, ema_rate=0.9999,
        params_ema=params, rng=jax.random.PRNGKey(0),
    )  # fmt: skip
    checkpoints.save_checkpoint(str(Path(folder).resolve()), state, step=7, keep=100)
    sde = sde_lib.from_config(config)
    t = jnp.array([0.9, 0.3, 0.004])
    shape = (3, 32, 32, 3) if kind == "blurring" else (3, 32, 32, 3, 2)
    u = jax.random.normal(jax.random.key(1), shape)
    eps = jax.jit(models.get_eps_fn(sde, network, params, rest))(u, t)
    ts = jnp.array([0.001, 0.01, 0.1, 0.5, 0.99])
    if kind == "blurring":
        about = {"mean": sde.y_mean_coef(ts), "std": sde.y_std_coef(ts), "start": sde.sampling_T}
    else:
        sde.mixed_score = True
        mixed = jax.jit(models.get_eps_fn(sde, network, params, rest))(u, t)
        about = {"R": sde.v_R(ts), "psi": jax.vmap(sde.s_psi, (None, 0))(0.0, ts), "mixed": mixed}
    np.savez(Path(folder) / "expected.npz", u=u, t=t, eps=eps, ts=ts, **about)


if __name__ == "__main__":
    main(*sys.argv[1:])
