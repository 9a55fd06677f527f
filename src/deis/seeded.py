"""Samples that depend on the seed and on their number alone, whatever the batch: each has random streams of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .arrays import AnyArray
from .draws import drawn, streams
from .model.pretrained import Pretrained
from .plan import Plan
from .run import sample

Run = Callable[[range, Any, Callable[..., Any] | None], AnyArray]
"""run(indices, labels, callback) -> the samples of these numbers in NumPy; images, where the network is one of latents."""


def draw_noise(model: Pretrained, plan: Plan, options: dict[str, Any], indices: range, dtype: str = "float32") -> Any:
    """Return the noise of the samples of these numbers, in the backend."""
    return on_device(drawn(indices, model.shape, float(plan.sigma[0]), options["seed"]).astype(dtype), options)


def on_device(values: AnyArray, options: dict[str, Any]) -> Any:
    """Return an array in the backend."""
    if options["backend"] == "jax":
        import jax

        return jax.numpy.asarray(values)
    import torch

    return torch.from_numpy(values).to(options["device"] or "cpu")


def precision(options: dict[str, Any]) -> AbstractContextManager[Any]:
    """Return the context in which the backend computes in the dtype."""
    if options["backend"] != "jax":
        return nullcontext()
    import jax

    return jax.enable_x64(options["dtype"] == "float64")


def torch_runner(plan: Plan, model: Pretrained, options: dict[str, Any]) -> Run:
    """Return the function that samples in torch."""

    def run(indices: range, labels: Any, callback: Callable[..., Any] | None) -> AnyArray:
        x_T = draw_noise(model, plan, options, indices, options["dtype"])
        rng = streams(x_T, indices, options["seed"])
        x_0 = sample(plan, model.conditional(labels, options["guidance"]), x_T, rng=rng, callback=callback)
        return (x_0 if model.decode is None else model.decode(x_0)).cpu().numpy()

    return run


def jax_runner(plan: Plan, model: Pretrained, options: dict[str, Any], place: Callable[[Any], Any] = lambda arrays: arrays) -> Run:
    """Return the function that samples in JAX; batches of one size compile once, with the callback of the first one.

    `place` puts the arrays of a batch where they are to be computed, by default on JAX's first device.
    """
    import jax

    compiled: list[Callable[..., Any]] = []

    def run(indices: range, labels: Any, callback: Callable[..., Any] | None) -> AnyArray:
        def sampled(x_T: Any, rng: Any, condition: Any, null: Any) -> Any:
            given = model.conditional() if condition is None else model.conditioned(condition, null, options["guidance"])
            return sample(plan, given, x_T, rng=rng, callback=callback)

        if not compiled:
            compiled.append(jax.jit(sampled))
        x_T = draw_noise(model, plan, options, indices, options["dtype"])
        conditions = (None, None) if labels is None else model.conditions(labels, options["guidance"], len(labels))
        return np.asarray(compiled[0](*place((x_T, streams(x_T, indices, options["seed"]), *conditions))))

    return run
