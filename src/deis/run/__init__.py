"""Executors: `sample` runs a plan on NumPy, torch or JAX arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..foreign import is_jax, is_torch
from ..model.predictions import conversion
from ..plan import Plan
from .options import Options


def sample(
    plan: Plan,
    model: Callable[[Any, Any], Any],
    x_T: Any,
    *,
    predicts: str = "eps",
    trajectory: bool = False,
    callback: Callable[[int, float, Any], Any] | None = None,
    progress: bool = False,
    check_finite: bool = False,
    grad: bool = False,
) -> Any:
    """Run a plan: turn noise into samples.

    Parameters
    ----------
    plan : Plan
    model : callable
        model(x, t) -> prediction of the shape of x, where x has the shape and dtype of x_T and t the shape (batch,).
    x_T : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
        The noise, of standard deviation sigma(t) at the plan's start; its type chooses the executor. float16 and bfloat16 are
        carried in float32 between evaluations, with t in float32, and returned in their own dtype.
    predicts : {"eps", "x0", "v", "score", "flow"}
        What the model predicts; see `deis.model.predictions.conversion`.
    trajectory : bool
        Return all states at `plan.ts`, of shape (num_step + 1, batch, ...), in place of the last.
    callback : callable, optional
        Called after each step with its number (from 0), the time arrived at, and the state. In JAX under `jit` it runs on the
        host, in order.
    progress : bool
        Show a tqdm bar, one tick a step.
    check_finite : bool
        Raise where the model returns NaN or infinity, at the price of waiting for the device in every step.
    grad : bool
        Torch only: record gradients; without it the loop runs under `torch.no_grad()`. JAX and its `grad` need nothing.

    Returns
    -------
    Array of the type, shape and dtype of x_T.

    Raises
    ------
    TypeError
        Where x_T is no such array, or not of a floating dtype.
    ValueError
        Where x_T has no batch axis or is not finite (with check_finite), or the model returns something else than an array of
        its shape.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a deis.Plan, as deis.make_plan returns, and is {plan!r}")
    options = Options(conversion(plan, predicts), trajectory, callback, progress, check_finite)
    if is_torch(x_T):
        from .torch import run_torch

        return run_torch(plan, model, x_T, options, grad)
    if is_jax(x_T):
        from .jax import run_jax

        return run_jax(plan, model, x_T, options)
    if isinstance(x_T, np.ndarray):
        from .numpy import run_numpy

        return run_numpy(plan, model, x_T, options)
    raise TypeError(f"x_T must be a torch.Tensor, a jax.Array or a numpy.ndarray, and is a {type(x_T).__name__}")
