"""The executor of plans with matrices or frequencies: the machine's three lines, with another product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..arguments import flag, function, kind
from ..backends import backend_of
from ..foreign import is_jax
from ..machine import run_rows
from ..model.predictions import Denoiser, check_model
from ..model.pretrained import Pretrained
from ..run.options import Options, not_finite, observer
from .denoiser import LinearDenoiser
from .plan import LinearPlan
from .pretrained import PretrainedLinear
from .reader import Reader, level_of, reader_of
from .sde import check_blocks
from .space import combine_frequencies, prepared_blocks, space_of

_COMBINED = ("keep_x", "keep_p", "next_x", "next_p")
_READ = ("see", "linear", "gain", "inverse", "data")


def sample_linear(
    plan: LinearPlan,
    model: Callable[[Any, Any], Any] | LinearDenoiser | PretrainedLinear,
    x_T: Any,
    *,
    velocity: bool = False,
    trajectory: bool = False,
    callback: Callable[[int, float, Any], Any] | None = None,
    check_finite: bool = False,
    grad: bool = False,
) -> Any:
    """Run a plan of a linear SDE: turn noise into samples, or, with a plan that encodes, data into noise.

    Parameters
    ----------
    plan : LinearPlan
        Of `deis.make_linear_plan`.
    model : callable or LinearDenoiser
        model(x, t) -> what the plan's `predicts` says, of the shape of x, with t of shape (batch,). Position and velocity come
        as the blocks of x, and both are to be predicted. A `deis.LinearDenoiser` is a network that predicts the data, which may
        be one of a scalar schedule; x_T then has shape (k, batch, channels, ...).
    x_T : torch.Tensor, jax.Array or numpy.ndarray of shape (k, batch, ...), or with basis="dct" (batch, ...)
        The state at the plan's start, all blocks; `LinearSDE.noise` makes it of standard normal noise. Its type chooses the
        executor; float16 and bfloat16 are carried in float32 between evaluations. With basis="dct" it is the data themselves, as
        pixels: the plan is run on their transform, and the model is given pixels.
    velocity : bool
        Return all blocks; without it the first alone, the position. With basis="dct" there is one.
    trajectory : bool
        Return the states at all of plan.ts, stacked along a new first axis.
    callback : callable, optional
        Called after each step with the step's number (from 0), the time reached, and the state, all blocks or pixels. In JAX under
        `jit` it runs on the host, in order.
    check_finite : bool
        Raise an error if the model returns NaN or infinity. This waits for the device in every row; under `jit` it is refused.
    grad : bool
        Torch only: record gradients.

    Returns
    -------
    Array of the type and dtype of x_T, of shape (batch, ...), or (k, batch, ...) with velocity.

    Raises
    ------
    TypeError
        If the plan is no linear plan, the model no function of (x, t) or one of a scalar schedule, or x_T no array of a floating
        dtype.
    ValueError
        If x_T has not the blocks or the frequencies of the plan, the model returns another shape, or with check_finite what is
        not finite.
    """
    kind("plan", plan, LinearPlan, "a deis.LinearPlan, as deis.make_linear_plan returns (deis.sample runs a deis.Plan),")
    model = _fitting(plan, model, x_T)
    flags = {"velocity": velocity, "trajectory": trajectory, "check_finite": check_finite, "grad": grad}
    for name, value in flags.items():
        flag(name, value)
    if callback is not None:
        function("callback", callback, "i", "t", "x")
    options = Options((), None, bool(trajectory), callback, False, bool(check_finite), bool(grad))
    backend = backend_of(x_T)
    reader = reader_of(plan, model, space_of(plan, backend), x_T.dtype)
    if is_jax(x_T):
        from .scan import run_jax as run
    else:
        run = _run_eager
    with nullcontext() if grad else backend.no_grad():
        out = run(plan, reader, x_T, options)
        out = backend.cast(out, x_T.dtype)
    if velocity or plan.basis == "dct":
        return out
    return out[:, 0] if trajectory else out[0]


def _fitting(plan: LinearPlan, model: Any, x_T: Any) -> Any:
    """Return a model, checked beside the plan and the state; a network of the SDE without a class."""
    if isinstance(model, Denoiser | Pretrained):
        raise TypeError(
            f"model is a {type(model).__name__}, a network of a scalar schedule, and the plan is of {plan.schedule}; give "
            "deis.LinearDenoiser(model, sde), which is a network of this SDE"
        )
    if isinstance(model, PretrainedLinear):
        model = model.conditional()
    if not isinstance(model, LinearDenoiser):
        check_model("model", model)
    check_blocks("x_T", x_T, plan.basis, plan.shape)
    if isinstance(model, LinearDenoiser) and plan.basis == "block" and x_T.ndim < 3:
        raise ValueError(f"x_T has shape {tuple(x_T.shape)}, and a LinearDenoiser takes (k, batch, channels, ...); add that axis")
    return model


def _run_eager(plan: LinearPlan, reader: Reader, x_T: Any, options: Options) -> Any:
    """Run a plan in NumPy or torch: coefficients of blocks are numbers, those of frequencies arrays beside the states."""
    space, backend = reader.space, reader.space.backend
    dtype = backend.carry(x_T.dtype)
    x = space.enter(backend.cast(x_T, dtype))
    times = [*backend.full(space.samples(x_T), [level_of(row).t for row in reader.rows], dtype, False)]
    if plan.basis == "block":
        rows, combine = plan.once(prepared_blocks, backend, dtype)
        readings = [_converted(row, _READ, lambda c: np.asarray(c).tolist()) for row in reader.rows]
    else:
        rows = [_converted(row, _COMBINED, lambda c: backend.like(c, x)) for row in plan.rows]
        readings = [_converted(row, _READ, lambda c: backend.like(c, x)) for row in reader.rows]
        combine = combine_frequencies
    keep = [backend.cast(x_T, dtype)]
    observe = observer(plan, options, keep)

    def predict(i: int, x: Any) -> Any:
        p = reader(readings[i], x, times[i])
        if options.check_finite and not bool(backend.xp.isfinite(p).all()):
            raise not_finite(i, plan)
        return p

    def leave(i: int, x: Any) -> None:
        if observe is not None and rows[i].accepts:
            observe(i, space.leave(x))

    x = run_rows(rows, predict, combine, x, leave)
    return backend.xp.stack(keep) if options.trajectory else space.leave(x)


def _converted(row: Any, names: Sequence[str], convert: Callable[[Any], Any]) -> Any:
    """Return a row with those of its coefficients converted that are there."""
    return row._replace(**{name: convert(getattr(row, name)) for name in names if getattr(row, name, None) is not None})
