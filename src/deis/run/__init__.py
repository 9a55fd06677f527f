"""Executors: `sample` runs a plan on NumPy, torch or JAX arrays."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from ..arguments import check_state, flag, function, kind
from ..backends import backend_of
from ..foreign import is_compiling, is_jax
from ..model.predictions import Denoiser, Predictor, check_model, conversions, named
from ..model.pretrained import without_labels
from ..plan import Plan
from ..sde import Schedule
from .eager import run_eager
from .options import Options


def _comparison(plan: Plan) -> Callable[[Schedule], None]:
    return lru_cache(maxsize=16)(partial(_warn_of_schedule, weakref.proxy(plan)))


def _warn_of_schedule(plan: Plan, sde: Schedule) -> None:
    """Warn where a plan was made for another schedule than the model's."""
    if not plan.matches(sde):
        warnings.warn(
            f"the plan {plan.method!r} was made for the schedule {plan.schedule!r} and the model is of {sde.name!r}, whose alpha "
            "and sigma differ at the plan's times; make or calibrate one for this model",
            stacklevel=4,
        )


def _told(model: Any, plan: Plan, predicts: str | None) -> tuple[Callable[[Any, Any], Any], str, Callable[[Any], Any] | None]:
    """Return the model that is called, what it predicts and its threshold: a Denoiser tells, of a function the caller does."""
    model, predicts = without_labels(model), named(predicts)
    if not isinstance(model, Denoiser):
        return model, "eps" if predicts is None else predicts, None
    if not is_compiling():
        plan.once(_comparison)(model.sde)
    if predicts not in (None, model.predicts):
        raise ValueError(f"predicts={predicts!r} contradicts the Denoiser, which predicts {model.predicts!r}; leave it out")
    return model, model.predicts, model.threshold


def sample(
    plan: Plan,
    model: Callable[[Any, Any], Any],
    x_T: Any,
    *,
    predicts: str | None = None,
    rng: Any = None,
    trajectory: bool = False,
    callback: Callable[[int, float, Any], Any] | None = None,
    progress: bool = False,
    check_finite: bool = False,
    grad: bool = False,
    parallel: bool = False,
) -> Any:
    """Run a plan: turn noise into samples.

    Parameters
    ----------
    plan : Plan
    model : callable, Denoiser or Pretrained
        model(x, t) -> prediction of the shape of x, where x has the shape and dtype of x_T and t the shape (batch,).
    x_T : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
        The noise, of standard deviation sigma(t) at the plan's start; its type chooses the executor. float16 and bfloat16 are
        carried in float32 between evaluations, with t in float32, and returned in their own dtype.
    predicts : {"eps", "x0", "v", "score", "flow"}, optional
        What a plain function predicts, "eps" by default; a `deis.Denoiser` says so itself.
    rng : torch.Generator, jax.random key or numpy.random.Generator, or a sequence (in JAX an array) of them
        The random numbers of a stochastic plan, of the kind of x_T; others need none. Each sample has a stream of its own: given
        one generator a sample, a sample depends on its own and on no other sample; given a single one, sample i takes the i-th
        stream split off it (a torch or NumPy generator goes on from there, a JAX key does not).
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
    parallel : bool
        Make the evaluations that do not wait for each other in one call: `plan.depth` calls in place of `plan.nfe`, those of k
        evaluations on k times the batch, one copy of it after the other, with a time for each sample. The samples are the same, to
        rounding, of a model that treats samples independently. The conditions of `deis.classifier_free` and
        `Pretrained.conditional` are repeated; a function that holds labels itself must take as many samples.

    Returns
    -------
    Array of the type, shape and dtype of x_T.

    Raises
    ------
    UserWarning
        Once, where the plan was made for another noise schedule than that of a Denoiser.
    TypeError
        Where x_T is no such array, or not of a floating dtype, or rng is not of its kind.
    ValueError
        Where the plan is stochastic and rng is missing, what the model predicts does not determine the plan's form at one of
        its times, x_T has no batch axis or is not finite (with check_finite), or the model returns something else than an array of
        its shape.
    """
    kind("plan", plan, Plan, "a deis.Plan, as deis.make_plan returns,")
    check_state("x_T", x_T)
    check_model("model", model)
    if callback is not None:
        function("callback", callback, "i", "t", "x")
    if not (trajectory is progress is check_finite is grad is parallel is False):  # as they are by default
        flags = {"trajectory": trajectory, "progress": progress, "check_finite": check_finite, "grad": grad, "parallel": parallel}
        for argument, value in flags.items():
            flag(argument, value)
    model, predicts, threshold = _told(model, plan, predicts)
    factors = conversions(plan, predicts, threshold is not None)
    if plan.stochastic and rng is None:
        raise ValueError(
            f"the plan {plan.method!r} adds noise and rng is missing; give a torch.Generator, a jax.random key or a "
            "numpy.random.Generator, like x_T"
        )

    predictor = Predictor(model, backend_of(x_T), x_T.dtype, threshold)
    options = Options(factors, rng, trajectory, callback, progress, check_finite, grad, parallel and plan.depth < plan.nfe)
    if is_jax(x_T):
        from .jax import run_jax

        return run_jax(plan, predictor, x_T, options)
    return run_eager(plan, predictor, x_T, options)
