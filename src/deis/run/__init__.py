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
from ..plan import Plan
from ..sde import Schedule
from .eager import run_eager
from .options import Options, told
from .plans import check_plan
from .several import check_several, check_together, run_several


def _comparison(plan: Plan) -> Callable[[Schedule], None]:
    return lru_cache(maxsize=16)(partial(_warn_of_schedule, weakref.proxy(plan)))


def _warn_of_schedule(plan: Plan, sde: Schedule) -> None:
    """Warn if a plan was made for another schedule than the model's."""
    if not plan.matches(sde):
        warnings.warn(
            f"the plan {plan.method!r} was made for the schedule {plan.schedule!r} and the model has {sde.name!r}, whose alpha "
            "and sigma differ at the plan's times; make or calibrate a plan for this model",
            stacklevel=5,
        )


def told_for_plan(
    model: Any, plan: Plan, predicts: str | None
) -> tuple[Callable[[Any, Any], Any], str, Callable[[Any], Any] | None]:
    """Return the model to call, what it predicts and its threshold: from a Denoiser, or for a plain function from the caller."""
    model, predicts, threshold = told(model, predicts)
    if isinstance(model, Denoiser) and not is_compiling():
        plan.once(_comparison)(model.sde)
    return model, predicts, threshold


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
        A plan that leads to data; `encode` runs those that lead to noise. If each sample has its own plan, the plans may differ in
        everything but their schedule; even their directions may differ. Every call evaluates only the samples that are not
        finished, so there are as many calls as evaluations in the longest plan. `deis.classifier_free` and
        `Pretrained.conditional` pick the conditions of these samples; a plain function that holds labels itself cannot be used in
        this way. In JAX every call evaluates the whole batch. trajectory, callback, progress and parallel are not available then.
    model : callable, Denoiser or Pretrained
        model(x, t) -> prediction of the shape of x, where x has the shape and dtype of x_T and t the shape (batch,).
    x_T : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
        The noise, of standard deviation sigma(t) at the plan's start; its type chooses the executor. float16 and bfloat16 are
        carried in float32 between evaluations, with t in float32, and returned in their own dtype.
    predicts : {"eps", "x0", "v", "score", "flow"}, optional
        What a plain function predicts, "eps" by default; a `deis.Denoiser` has its own.
    rng : torch.Generator, jax.random key or numpy.random.Generator, or a sequence (in JAX an array) of them
        The source of random numbers for a stochastic plan, of the framework of x_T; other plans need none. Each sample has its own
        stream. With one generator per sample, a sample depends on its own generator and on no other sample. With a single one,
        sample i takes the i-th stream split off it; a torch or NumPy generator continues from there, a JAX key does not.
    trajectory : bool
        Return all states at `plan.ts`, of shape (num_step + 1, batch, ...), instead of the last one.
    callback : callable, optional
        Called after each step with the step's number (from 0), the time reached, and the state. In JAX under `jit` it runs on the
        host, in order.
    progress : bool
        Show a tqdm bar that advances once per step.
    check_finite : bool
        Raise an error if the model returns NaN or infinity. This waits for the device in every step.
    grad : bool
        Torch only: record gradients. Without it the loop runs under `torch.no_grad()`. `jax.grad` works without this option.
    parallel : bool
        Make evaluations that do not depend on each other in one call: `plan.depth` calls instead of `plan.nfe`. A call of k
        evaluations runs on k copies of the batch, one after the other, with a time for each sample. If the model treats samples
        independently, the result is the same up to rounding. The conditions of `deis.classifier_free` and
        `Pretrained.conditional` are repeated; a function that holds labels itself must accept as many samples.

    Returns
    -------
    Array of the type, shape and dtype of x_T.

    Raises
    ------
    UserWarning
        Once, if the plan was made for another noise schedule than that of a Denoiser.
    TypeError
        If x_T is not such an array or not of a floating dtype, or rng is of another framework.
    ValueError
        If the plan leads to noise, or is stochastic and rng is missing. If the model's prediction does not determine the plan's
        form at one of its times, or the model returns anything but an array of the shape of x_T. If x_T has no batch axis, or
        the model's output is not finite (with check_finite). If the plans of one batch have different schedules, or there are
        not as many as samples.
    """
    flags = (trajectory, progress, check_finite, grad, parallel)
    if isinstance(plan, list | tuple):
        return _sample_several(plan, model, x_T, flags, predicts, rng, callback)
    check_direction(plan, "decode")
    return _run(plan, model, "x_T", x_T, flags, predicts=predicts, rng=rng, callback=callback)


def check_direction(plan: Any, direction: str) -> None:
    """Raise TypeError unless `plan` is a plan, and ValueError unless it starts from one state and leads in that direction."""
    check_plan("plan", plan)
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
    """Check the arguments that all directions share, and run; `argument` is the caller's name for x."""
    check_state(argument, x)
    check_model("model", model)
    if callback is not None:
        function("callback", callback, "i", "t", "x")
    if any(value is not False for value in flags):  # False is the default, and needs no check
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
            f"{name} was asked for and plan is a sequence, whose samples take different steps; leave it out, or run each sample "
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
    """Run a plan that leads to noise: turn data into the noise from which the probability flow generates them.

    Parameters
    ----------
    plan : Plan
        A plan made by ``deis.make_plan(..., direction="encode")``.
    model, predicts, trajectory, callback, progress, check_finite, grad, parallel
        As for `deis.sample`.
    x_0 : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
        The data at the plan's start. They are clean if sigma is 0 there; if it is small, as by default, clean data will do, too.

    Returns
    -------
    Array of the type, shape and dtype of x_0: the noise x_T, of standard deviation sigma at the plan's end.

    Raises
    ------
    ValueError
        If the plan leads to data, or x_0 does not have the shape of the model's samples; otherwise as `deis.sample`.
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
    """Run an exactly invertible plan backwards: from its last two states to the very state that it began with, up to rounding.

    Parameters
    ----------
    plan : Plan
        A plan of "bdia" or "belm", in either direction. Give the plan that was run, not its `reverse`.
    model, predicts, trajectory, callback, progress, check_finite, grad
        As for `deis.sample`. With another condition or guidance than before, the way back makes an edit.
    states : array of shape (2, batch, ...)
        The last two states, in order: ``deis.sample(plan, ..., trajectory=True)[-2:]``. In float64 the error there and back is
        about 1e-12. In float32 it depends on how the plan amplifies the rounding error of 1e-7.

    Returns
    -------
    Array of shape (batch, ...): x_T of a plan that samples, x_0 of one that encodes. It costs one call less than the way there.

    Raises
    ------
    ValueError
        If the plan is not exactly invertible, or there are not two states; otherwise as `deis.sample`.
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
