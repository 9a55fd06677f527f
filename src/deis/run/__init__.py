"""Executors: `sample`, `encode` and `invert` run a plan on NumPy, torch or JAX arrays."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from ..arguments import check_state, flag, function, kind
from ..backends import backend_of
from ..foreign import is_compiling, is_jax
from ..model.predictions import Denoiser, Predictor, check_model, check_sample, conversions
from ..model.pretrained import without_labels
from ..plan import Plan
from ..sde import Schedule
from .eager import run_eager
from .options import Options, told
from .several import check_several, check_together, run_several


def _comparison(plan: Plan) -> Callable[[Schedule], None]:
    return lru_cache(maxsize=16)(partial(_warn_of_schedule, weakref.proxy(plan)))


def _warn_of_schedule(plan: Plan, sde: Schedule) -> None:
    """Warn where a plan was made for another schedule than the model's."""
    if not plan.matches(sde):
        warnings.warn(
            f"the plan {plan.method!r} was made for the schedule {plan.schedule!r} and the model is of {sde.name!r}, whose alpha "
            "and sigma differ at the plan's times; make or calibrate one for this model",
            stacklevel=5,
        )


def told_for_plan(
    model: Any, plan: Plan, predicts: str | None
) -> tuple[Callable[[Any, Any], Any], str, Callable[[Any], Any] | None]:
    """Return the model that is called, what it predicts and its threshold: a Denoiser tells, of a function the caller does."""
    model = without_labels(model)
    if isinstance(model, Denoiser) and not is_compiling():
        plan.once(_comparison)(model.sde)
    return told(model, predicts)


def sample(
    plan: Plan | list[Plan] | tuple[Plan, ...],
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
    plan : Plan, or a list or tuple of one a sample
        That leads to data; `encode` runs those that lead to noise. Where each sample has a plan of its own, the plans may differ in
        everything but their schedule, direction included. Every call evaluates the samples that are left, and those alone: there
        are as many calls as evaluations in the longest plan. A model is told the samples' numbers within the batch, so that
        `deis.classifier_free` and `Pretrained.conditional` pick their conditions; a plain function that holds labels itself cannot
        be used so. In JAX a call is always one on the whole batch. There is no trajectory, callback, progress or parallel then.
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
        Where the plan leads to noise, it is stochastic and rng is missing, what the model predicts does not determine the plan's
        form at one of its times, x_T has no batch axis or is not finite (with check_finite), or the model returns something else
        than an array of its shape; where plans in one batch are of different schedules, or not as many as samples.
    """
    flags = (trajectory, progress, check_finite, grad, parallel)
    if isinstance(plan, list | tuple):
        return _sample_several(plan, model, x_T, flags, predicts, rng, callback)
    check_direction(plan, "decode")
    return _run(plan, model, "x_T", x_T, flags, predicts=predicts, rng=rng, callback=callback)


def check_direction(plan: Any, direction: str) -> None:
    """Raise TypeError unless it is a plan, and ValueError unless it leads from one state in that direction."""
    kind("plan", plan, Plan, "a deis.Plan, as deis.make_plan returns,")
    if plan.pair:
        raise ValueError(f"the plan {plan.method!r} begins with two states; give the one that it was made of to deis.invert")
    if plan.direction != direction:
        leads = "data to noise, which deis.encode runs" if direction == "decode" else "noise to data, which deis.sample runs"
        raise ValueError(
            f"the plan {plan.method!r} leads from {leads}; make another by deis.make_plan(..., direction={direction!r})"
        )


Flags = tuple[bool, bool, bool, bool, bool]
"""trajectory, progress, check_finite, grad and parallel"""


def _run(
    plan: Plan,
    model: Callable[[Any, Any], Any],
    argument: str,
    x: Any,
    flags: Flags,
    *,
    predicts: str | None,
    rng: Any = None,
    callback: Callable[[int, float, Any], Any] | None,
    base: Any = None,
) -> Any:
    """Check what all directions have in common, and run; `argument` is what the caller calls x."""
    check_state(argument, x)
    check_model("model", model)
    if callback is not None:
        function("callback", callback, "i", "t", "x")
    if any(value is not False for value in flags):  # as they are by default
        _check_flags(flags)
    model, predicts, threshold = told_for_plan(model, plan, predicts)
    factors = conversions(plan, predicts, threshold is not None)
    if plan.stochastic and rng is None:
        raise ValueError(
            f"the plan {plan.method!r} adds noise and rng is missing; give a torch.Generator, a jax.random key or a "
            f"numpy.random.Generator, like {argument}"
        )

    trajectory, progress, check_finite, grad, parallel = flags
    predictor = Predictor(model, backend_of(x), x.dtype, threshold)
    options = Options(factors, rng, trajectory, callback, progress, check_finite, grad, parallel and plan.depth < plan.nfe, base)
    if is_jax(x):
        from .jax import run_jax

        return run_jax(plan, predictor, x, options)
    return run_eager(plan, predictor, x, options)


def _check_flags(flags: Flags) -> None:
    for name, value in zip(("trajectory", "progress", "check_finite", "grad", "parallel"), flags, strict=True):
        flag(name, value)


def _sample_several(
    plans: Sequence[Plan], model: Any, x_T: Any, flags: Flags, predicts: str | None, rng: Any, callback: Any
) -> Any:
    """Run a plan for each sample; see `sample`."""
    check_state("x_T", x_T)
    check_model("model", model)
    check_several(plans, x_T)
    _check_flags(flags)
    trajectory, progress, check_finite, grad, parallel = flags
    asked = {"trajectory": trajectory, "callback": callback is not None, "progress": progress, "parallel": parallel}
    for name in (name for name, value in asked.items() if value):
        raise ValueError(
            f"{name} was asked for and plan is a sequence, whose samples take steps of their own; leave it out, or run each sample "
            "by itself"
        )
    model, predicts, threshold = told_for_plan(model, plans[0], predicts)
    check_together(plans, predicts, threshold is not None, getattr(model, "sde", None), rng)
    predictor = Predictor(model, backend_of(x_T), x_T.dtype, threshold)
    return run_several(plans, predictor, predicts, x_T, rng, bool(check_finite), bool(grad))


def encode(
    plan: Plan,
    model: Callable[[Any, Any], Any],
    x_0: Any,
    *,
    predicts: str | None = None,
    trajectory: bool = False,
    callback: Callable[[int, float, Any], Any] | None = None,
    progress: bool = False,
    check_finite: bool = False,
    grad: bool = False,
    parallel: bool = False,
) -> Any:
    """Run a plan that leads to noise: turn data into the noise from which the probability flow makes them.

    Parameters
    ----------
    plan : Plan
        Of ``deis.make_plan(..., direction="encode")``.
    model, predicts, trajectory, callback, progress, check_finite, grad, parallel
        As for `deis.sample`.
    x_0 : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
        The data at the plan's start: clean where sigma is 0 there. Where it is small, as by default, clean data will do, too.

    Returns
    -------
    Array of the type, shape and dtype of x_0: the noise x_T, of standard deviation sigma at the plan's end.

    Raises
    ------
    ValueError
        Where the plan leads to data, or x_0 has not the shape of the model's samples; else as `deis.sample`.
    """
    check_direction(plan, "encode")
    check_sample("x_0", x_0, model)
    flags = (trajectory, progress, check_finite, grad, parallel)
    return _run(plan, model, "x_0", x_0, flags, predicts=predicts, callback=callback)


def invert(
    plan: Plan,
    model: Callable[[Any, Any], Any],
    states: Any,
    *,
    predicts: str | None = None,
    trajectory: bool = False,
    callback: Callable[[int, float, Any], Any] | None = None,
    progress: bool = False,
    check_finite: bool = False,
    grad: bool = False,
) -> Any:
    """Take an exactly invertible plan back: from its last two states to the very state that it began with, to rounding.

    Parameters
    ----------
    plan : Plan
        Of "bdia" or "belm", in either direction: the one that was run, not its `reverse`.
    model, predicts, trajectory, callback, progress, check_finite, grad
        As for `deis.sample`. With another condition or guidance than before, the way back is an edit.
    states : array of shape (2, batch, ...)
        The last two states, the last one last: ``deis.sample(plan, ..., trajectory=True)[-2:]``. In float64 the way there and back
        errs by 1e-12 or so, in float32 by what it makes of the rounding of 1e-7.

    Returns
    -------
    Array of shape (batch, ...): x_T of a plan that samples, x_0 of one that encodes. It costs one call less than the way there.

    Raises
    ------
    ValueError
        Where the plan is not exactly invertible, or states are not two; else as `deis.sample`.
    """
    kind("plan", plan, Plan, "a deis.Plan, as deis.make_plan returns,")
    reverse = plan.reverse()
    check_state("states", states)
    if states.ndim < 2 or len(states) != 2:
        raise ValueError(
            f"states must be the last two, of shape (2, batch, ...), and has shape {tuple(states.shape)}: one state alone does not "
            "tell where it came from; keep two by deis.sample(..., trajectory=True)[-2:]"
        )
    flags = (trajectory, progress, check_finite, grad, False)
    return _run(reverse, model, "states[1]", states[1], flags, predicts=predicts, callback=callback, base=states[0])
