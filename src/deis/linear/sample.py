"""The executor of plans with matrices or frequencies: the machine's three lines, with another product."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from ..arguments import flag, kind
from ..backends import backend_of
from ..backends.record import Backend
from ..foreign import is_jax
from ..machine import Row, run_rows
from ..model.predictions import Denoiser, Level, Predictor, check_model
from ..model.pretrained import Pretrained
from .plan import LinearPlan
from .sde import check_blocks
from .space import Space, combine_frequencies, prepared_blocks, space_of


def sample_linear(
    plan: LinearPlan,
    model: Callable[[Any, Any], Any],
    x_T: Any,
    *,
    velocity: bool = False,
    trajectory: bool = False,
    grad: bool = False,
) -> Any:
    """Run a plan of a linear SDE: turn noise into samples, or, with a plan that encodes, data into noise.

    Parameters
    ----------
    plan : LinearPlan
        Of `deis.make_linear_plan`.
    model : callable
        model(x, t) -> what the plan's `predicts` says, of the shape of x, with t of shape (batch,). Position and velocity come
        as the blocks of x, and both are to be predicted.
    x_T : torch.Tensor, jax.Array or numpy.ndarray of shape (k, batch, ...), or with basis="dct" (batch, ...)
        The state at the plan's start, all blocks; `LinearSDE.noise` makes it of standard normal noise. Its type chooses the
        executor; float16 and bfloat16 are carried in float32 between evaluations. With basis="dct" it is the data themselves, as
        pixels: the plan is run on their transform, and the model is given pixels.
    velocity : bool
        Return all blocks; without it the first alone, the position. With basis="dct" there is one.
    trajectory : bool
        Return the states at all of plan.t, stacked along a new first axis.
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
        If x_T has not the blocks or the frequencies of the plan, or the model returns another shape.
    """
    kind("plan", plan, LinearPlan, "a deis.LinearPlan, as deis.make_linear_plan returns (deis.sample runs a deis.Plan),")
    check_model("model", model)
    if isinstance(model, Denoiser | Pretrained):
        raise TypeError(
            f"model is a {type(model).__name__}, a network of a scalar schedule, and the plan is of {plan.schedule}; give a "
            "function of (x, t) that returns what the plan's predicts says"
        )
    check_blocks("x_T", x_T, plan.basis, plan.shape)
    for name, value in (("velocity", velocity), ("trajectory", trajectory), ("grad", grad)):
        flag(name, value)
    backend = backend_of(x_T)
    space = space_of(plan, backend)
    predictor = Predictor(model, backend, x_T.dtype)
    if is_jax(x_T):
        from .scan import run_jax as run
    else:
        run = _run_eager
    with nullcontext() if grad else backend.no_grad():
        out = run(plan, predictor, space, x_T, bool(trajectory))
        out = backend.cast(out, x_T.dtype)
    if velocity or plan.basis == "dct":
        return out
    return out[:, 0] if trajectory else out[0]


def _run_eager(plan: LinearPlan, predictor: Predictor, space: Space, x_T: Any, trajectory: bool) -> Any:
    """Run a plan in NumPy or torch: coefficients of blocks are numbers, those of frequencies arrays beside the states."""
    backend = space.backend
    dtype = backend.carry(x_T.dtype)
    x = space.enter(backend.cast(x_T, dtype))
    times = [*backend.full(space.samples(x_T), plan.t[:-1].tolist(), dtype, False)]
    if plan.basis == "block":
        rows, combine = plan.once(prepared_blocks, backend, dtype)
    else:
        rows, combine = [_beside(row, backend, x) for row in plan.rows], combine_frequencies
    keep = [backend.cast(x_T, dtype)]
    observe = (lambda i, x: keep.append(space.leave(x))) if trajectory else None
    x = run_rows(rows, lambda i, x: space.prediction(predictor, x, times[i], Level(*rows[i][:3])), combine, x, observe)
    return backend.xp.stack(keep) if trajectory else space.leave(x)


def _beside(row: Row, backend: Backend, x: Any) -> Row:
    """Return a row whose coefficients are arrays like x."""
    ready = {name: getattr(row, name) for name in ("keep_x", "keep_p", "next_x", "next_p")}
    return row._replace(**{name: None if c is None else backend.like(c, x) for name, c in ready.items()})
