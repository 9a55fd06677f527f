"""How far torch and JAX are apart on the bundled MNIST model, after ten steps of tab3, beside the rounding of each.

python -m benchmarks.agreement
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

import deis

LABELS = np.arange(20) % 10
X_T = np.random.default_rng(1).standard_normal((20, 1, 28, 28)).astype(np.float32)


def in_torch(dtype: str) -> np.ndarray:
    model = deis.load_model(dtype=dtype)
    plan = deis.make_plan(model.sde, "tab3", 10)
    return deis.sample(plan, model.conditional(LABELS), torch.from_numpy(X_T.astype(dtype))).numpy()


def in_jax(dtype: str) -> np.ndarray:
    with jax.enable_x64(dtype == "float64"):
        model = deis.load_model(backend="jax", dtype=dtype)
        plan = deis.make_plan(model.sde, "tab3", 10)
        return np.asarray(jax.jit(lambda x: deis.sample(plan, model.conditional(LABELS), x))(jnp.asarray(X_T, dtype)))


def main() -> None:
    samples = {(run.__name__[3:], dtype): run(dtype) for run in (in_torch, in_jax) for dtype in ("float32", "float64")}
    for one, other in (
        (("torch", "float64"), ("jax", "float64")),
        (("torch", "float32"), ("jax", "float32")),
        (("torch", "float32"), ("torch", "float64")),
        (("jax", "float32"), ("jax", "float64")),
    ):
        error = np.abs(samples[one] - samples[other]).max(axis=(1, 2, 3))
        print(f"{one} - {other}: a pixel differs by {error.max():.1e} at most, in the median sample by {np.median(error):.1e}")


if __name__ == "__main__":
    main()
