"""Samples that depend on the seed and on their number alone, whatever the batch: each has random streams of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ..arrays import AnyArray
from ..model.pretrained import Pretrained
from ..plan import Plan
from ..run import sample

Run = Callable[[range, Any, Callable[..., Any]], AnyArray]
"""run(indices, labels, callback) -> the samples of these numbers in NumPy."""


def draw_noise(model: Pretrained, plan: Plan, options: dict[str, Any], indices: range, dtype: str = "float32") -> Any:
    """Return the noise of the samples of these numbers, in the backend."""
    streams = [np.random.default_rng((options["seed"], i)) for i in indices]
    noise = np.stack([stream.standard_normal(model.shape, dtype=np.float32) for stream in streams])
    return on_device((noise * np.float32(plan.sigma[0])).astype(dtype), options)


def on_device(values: AnyArray, options: dict[str, Any]) -> Any:
    """Return an array in the backend."""
    if options["backend"] == "jax":
        import jax

        return jax.numpy.asarray(values)
    import torch

    return torch.from_numpy(values).to(options["device"] or "cpu")


def streams(options: dict[str, Any], indices: range) -> Any:
    """Return the random streams of the samples of these numbers, in the backend."""
    if options["backend"] == "jax":
        import jax

        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(options["seed"]), i))(np.array(indices))
    import torch

    seeds = [int(np.random.SeedSequence((options["seed"], i, 1)).generate_state(1)[0]) for i in indices]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def precision(options: dict[str, Any]) -> AbstractContextManager[Any]:
    """Return the context in which the backend computes in the dtype."""
    if options["backend"] != "jax":
        return nullcontext()
    import jax

    return jax.enable_x64(options["dtype"] == "float64")


def torch_runner(plan: Plan, model: Pretrained, options: dict[str, Any]) -> Run:
    """Return the function that samples in torch."""

    def run(indices: range, labels: Any, callback: Callable[..., Any]) -> AnyArray:
        x_T, rng = draw_noise(model, plan, options, indices, options["dtype"]), streams(options, indices)
        x_0 = sample(plan, model.conditional(labels, options["guidance"]), x_T, rng=rng, callback=callback)
        return (x_0 if model.decode is None else model.decode(x_0)).cpu().numpy()

    return run


def jax_runner(plan: Plan, model: Pretrained, options: dict[str, Any]) -> Run:
    """Return the function that samples in JAX; batches with the same labels, such as whole rounds of classes, compile once."""
    import jax

    compiled: dict[bytes | None, Callable[..., Any]] = {}

    def run(indices: range, labels: Any, callback: Callable[..., Any]) -> AnyArray:
        def sampled(x_T: jax.Array, rng: jax.Array) -> jax.Array:
            return sample(plan, model.conditional(labels, options["guidance"]), x_T, rng=rng, callback=callback)

        key = None if labels is None else labels.tobytes()
        compiled.setdefault(key, jax.jit(sampled))
        x_T, keys = draw_noise(model, plan, options, indices, options["dtype"]), streams(options, indices)
        return np.asarray(compiled[key](x_T, keys))

    return run
