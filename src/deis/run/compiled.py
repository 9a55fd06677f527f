"""`deis.compile`: the whole loop of a plan as one program, made once for arrays of one shape."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from ..arguments import check_state, flag, function, one_of, shown, whole
from ..backends import backend_of
from ..extras import needs
from ..foreign import is_jax, is_torch, is_traced
from ..model.predictions import check_model
from ..plan import Plan
from .loop import Loop
from .plans import check_plan

_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Compiled:
    """A plan and a model as one program: compiled(x_T, rng=None, inputs=None) -> x_0; `deis.compile` makes it.

    Attributes
    ----------
    plan : Plan
    how : {"cuda graph", "torch.compile", "jit", "eager"}
        How the loop runs.
    reason : str or None
        Why it runs eagerly where that was not asked for.
    shape, dtype
        Those of the arrays that it takes.
    """

    plan: Plan = field(repr=False)
    how: str
    reason: str | None
    shape: tuple[int, ...]
    dtype: Any
    array: Any = field(repr=False)
    """torch.Tensor or jax.Array"""
    device: Any = field(repr=False)
    """In torch; None in JAX, where an array may lie on several."""
    takes_inputs: bool = field(repr=False)
    run: Callable[[Any, Any, Any], Any] = field(repr=False)

    def __call__(self, x_T: Any, rng: Any = None, inputs: Any = None) -> Any:
        """Return what `deis.sample` (or, for a plan that leads to noise, `deis.encode`) returns, up to rounding.

        Parameters
        ----------
        x_T : torch.Tensor or jax.Array
            Of the shape, dtype and device that was compiled for.
        rng : torch.Generator or jax.random key, or one for each sample
            See `deis.sample`; for a stochastic plan.
        inputs : array, or tuple, list or dict of them, optional
            In place of those that were given to `deis.compile`, of the same shapes and dtypes.

        Raises
        ------
        TypeError, ValueError
            If x_T or inputs differ from what was compiled for, or rng is missing.
        """
        own = isinstance(x_T, self.array) and x_T.shape == self.shape and x_T.dtype == self.dtype
        if not own or (self.device is not None and x_T.device != self.device):
            self._refuse(x_T)
        if rng is None and self.plan.stochastic:
            raise ValueError(f"the plan {self.plan.method!r} adds noise and rng is missing; give a generator or key like x_T's")
        if inputs is not None and not self.takes_inputs:
            raise ValueError("inputs were given, and none to deis.compile; compile again with inputs= and a model made of them")
        return self.run(x_T, rng, inputs)

    def _refuse(self, x: Any) -> NoReturn:
        """Say what is wrong with x_T; apart from the questions, which delay every call."""
        check_state("x_T", x)
        if not isinstance(x, self.array):
            raise TypeError(f"x_T is a {type(x).__name__}, and another framework was compiled for; compile again for it")
        found, wanted = (tuple(x.shape), x.dtype), (self.shape, self.dtype)
        if found != wanted:
            raise ValueError(
                f"x_T has shape {found[0]} and dtype {found[1]}, and {wanted[0]} and {wanted[1]} were compiled for; compile again "
                "for others"
            )
        raise ValueError(f"x_T is on {x.device}, and {self.device} was compiled for; compile again, or move it there")


def compile(
    plan: Plan,
    model: Callable[..., Any],
    shape: Any,
    *,
    predicts: str | None = None,
    inputs: Any = None,
    mode: str | None = None,
    device: Any = None,
    network_dtype: str | None = None,
    channels_last: bool = False,
    parallel: bool = False,
    donate: bool = True,
) -> Compiled:
    """Compile the whole loop of a plan for arrays of one shape, into a program that runs without Python between its calls.

    On a GPU torch captures the loop in a CUDA graph; elsewhere `torch.compile` makes one graph of it, which takes as long as
    compiling the network `plan.nfe` times. JAX jits it, once for a plan of any length. Where a model cannot be captured (it reads
    values on the host, or there is no compiler), the loop runs eagerly, a UserWarning says why, and so does `reason`.

    Parameters
    ----------
    plan : Plan
        Of either direction.
    model : callable, Denoiser or Pretrained
        As for `deis.sample`; with `inputs` a function that makes one of them, make(inputs) -> model.
    shape : torch.Tensor, jax.Array, jax.ShapeDtypeStruct or tuple of int
        An array like x_T, whose values are not used. A tuple stands for a float32 tensor of torch on `device`.
    predicts : str, optional
        See `deis.sample`.
    inputs : array, or tuple, list or dict of them, optional
        What differs from call to call: labels, embeddings of prompts, a guidance weight, or weights in JAX. These are examples;
        each call of the program may give others of the same shapes and dtypes. In torch they are on the device of x_T.
    mode : {"cuda graph", "torch.compile", "jit", "eager"}, optional
        Another way than the default.
    device : str or torch.device, optional
        Where `shape` is a tuple; the CPU by default.
    network_dtype : {"bfloat16", "float16", "float32", "float64"}, optional
        The dtype in which the network is given x, which must be that of its weights; the default is that of x_T. The states keep
        their own, float32 or better.
    channels_last : bool
        Torch only, for x of four dimensions: keep the states in this memory format. A torch.nn.Module that is the model, or that
        of a Denoiser, is put into it in place; convert one that a function calls by ``module.to(memory_format=...)``.
    parallel : bool
        See `deis.sample`.
    donate : bool
        JAX only: x_T is donated, so that x_0 takes its memory, and x_T cannot be used again.

    Returns
    -------
    Compiled

    Notes
    -----
    torch reads weights where they lie: a step of an optimizer, or anything else that changes them in place, holds in the next
    call. After weights have been replaced, compile again. JAX takes them as they are now, as arguments of the program, so that it
    holds no copy; those that change are `inputs`. The program keeps its model alive. A CUDA graph has memory of its own, one call
    runs at a time, and while it is captured no other thread may use the device. The noise of a stochastic plan is drawn before
    each call of torch, which takes one array of the state's size for each row that adds noise. No gradients are recorded.

    Raises
    ------
    TypeError
        If plan is not a Plan, the model cannot be called, or shape is an array of NumPy, which computes at once.
    ValueError
        For an option that does not apply, such as channels_last in JAX; otherwise as `deis.sample`.
    """
    check_plan("plan", plan)
    x = _example(shape, device)
    if inputs is None:
        check_model("model", model)
    else:
        function("model", model, "inputs")
    for name, value in (("channels_last", channels_last), ("parallel", parallel), ("donate", donate)):
        flag(name, value)
    mode, backend = _mode(mode, x), backend_of(x)
    _check_layout(channels_last, x)
    dtype = None if network_dtype is None else getattr(backend.xp, one_of("network_dtype", network_dtype, _DTYPES))
    loop = Loop(plan, model, inputs is not None, predicts, bool(parallel), backend, dtype)
    reason: str | None = None
    run: Callable[[Any, Any, Any], Any]
    if is_torch(x):
        from .compiled_torch import capture

        mode, reason, run = capture(loop, x, inputs, mode, bool(channels_last))
    else:
        from .compiled_jax import capture_jax

        run = capture_jax(loop, x, inputs, mode, bool(donate))
    if reason is not None:
        warnings.warn(f"deis.compile leaves this loop eager: {reason}", stacklevel=2)
    array, device = (sys.modules["torch"].Tensor, x.device) if is_torch(x) else (sys.modules["jax"].Array, None)
    return Compiled(plan, mode, reason, tuple(x.shape), x.dtype, array, device, inputs is not None, run)


def _example(shape: Any, device: Any) -> Any:
    """Return an array like those to come."""
    jax = sys.modules.get("jax")
    if isinstance(shape, tuple | list):
        with needs("torch", "a shape in numbers"):
            import torch
        sides = [whole(f"shape[{i}]", side) for i, side in enumerate(shape)]
        return torch.zeros(sides, dtype=torch.float32, device=device)
    if device is not None:
        raise ValueError(f"device={shown(device)} goes with a shape in numbers, and shape is an array; leave it out")
    if isinstance(shape, np.ndarray):
        raise TypeError("shape is an array of NumPy, which computes at once; use deis.sample, or give a torch.Tensor or jax.Array")
    x = jax.numpy.zeros(shape.shape, shape.dtype) if jax is not None and isinstance(shape, jax.ShapeDtypeStruct) else shape
    check_state("shape", x)
    if is_traced(x):
        raise ValueError("deis.compile was called while another program is being traced; call it outside, on an array")
    return x


def _mode(mode: str | None, x: Any) -> str:
    """Return how to capture the loop of x."""
    if is_jax(x):
        return one_of("mode", mode or "jit", ("jit", "eager"), "; the others are torch's")
    gpu = x.device.type == "cuda"
    known = (*(("cuda graph",) if gpu else ()), "torch.compile", "eager")
    also = "" if gpu else f"; a CUDA graph needs an array on a GPU, and shape is on {x.device}; 'jit' is JAX's"
    return one_of("mode", mode or known[0], known, also)


def _check_layout(channels_last: bool, x: Any) -> None:
    if channels_last and not (is_torch(x) and x.ndim == 4):
        where = f"x has shape {tuple(x.shape)}" if is_torch(x) else "XLA chooses the layout itself"
        raise ValueError(f"channels_last=True is for torch and x of four dimensions, and {where}; leave it out")
