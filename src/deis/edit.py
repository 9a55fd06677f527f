"""Start in the middle: image-to-image, and inpainting with RePaint's resampling.

Both call `deis.sample` with a plan that begins in the middle. Inpainting wraps the model: in the known pixels its prediction is
replaced by the one whose data is x_0. A plan carries alpha x_0 + sigma z exactly for a constant prediction. So these pixels are
the noised x_0 in every state and stage; nothing needs to be pasted in, and no special executor is needed. Their noise z is that of
the state itself. A deterministic plan keeps one z per sample, so the network sees a smooth path and a multistep method keeps its
order. A stochastic plan, and every jump back of RePaint, renews z as it renews all noise, so the known pixels follow the diffusion
that ends in x_0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .arguments import array, check_state, kind, number, shown, whole
from .arrays import AnyArray, Flags
from .backends import backend_of
from .cut import cut_plan
from .foreign import is_torch, is_traced
from .model.predictions import Denoiser, Levels, check_sample, checked_output, output_of
from .model.pretrained import Pretrained, without_labels
from .plan import Plan
from .repaint import resampled
from .run import check_direction, sample
from .sde import Schedule, check_schedule

_STREAM = np.uint32(2**32 - 1)  # a JAX key makes one noise for each row number of a plan; no row has this number


def add_noise(sde: Schedule, x_0: Any, t: Any, rng: Any) -> Any:
    """Return x_t = alpha(t) x_0 + sigma(t) z, with z new standard normal noise.

    Parameters
    ----------
    sde : Schedule
    x_0 : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
    t : float, or array of shape (batch,)
        The time, for all samples or one each, from the data (0, or the schedule's end if that is lower) to `sde.t_start`.
    rng : torch.Generator, jax.random key or numpy.random.Generator, or a sequence (in JAX an array) of them
        Each sample has its own stream, as in `deis.sample`. If the same rng is then passed to `deis.sample`, torch's and NumPy's
        generators continue, and a JAX key makes different noise for the plan.

    Returns
    -------
    Array of the type, shape, dtype and device of x_0. In half precision it is computed in float32.

    Raises
    ------
    TypeError
        If x_0 is not such an array or not of a floating dtype, t is not a number, or rng is of another framework than x_0.
    ValueError
        If t lies outside the schedule or has another shape, or rng does not have one stream per sample.
    """
    check_schedule(sde)
    check_state("x_0", x_0)
    times = array("t", t)
    if times.shape not in ((), (len(x_0),)):
        raise ValueError(f"t={shown(t)} must be a number or have shape ({len(x_0)},), one a sample")
    low, high = min(0.0, sde.t_end), sde.t_start if sde.num_times is None else sde.num_times - 1.0
    if not ((times >= low) & (times <= high)).all():
        raise ValueError(f"t={shown(t)} must lie in [{low:g}, {high:g}], the times of {sde.name}")
    return _noised(x_0, sde.alpha(times), sde.sigma(times), rng)


def image_to_image(
    plan: Plan,
    model: Denoiser | Pretrained,
    x_0: Any,
    strength: float,
    *,
    rng: Any,
    callback: Callable[[int, float, Any], Any] | None = None,
    progress: bool = False,
    check_finite: bool = False,
    grad: bool = False,
    parallel: bool = False,
) -> Any:
    """Add noise to images up to a noise level, and sample from there (SDEdit, Meng et al., arXiv 2108.01073).

    This is `deis.sample(part, model, deis.add_noise(sde, x_0, start, rng), rng=rng)`, where start is the start of
    `sde.between(strength=strength)` and part is `deis.cut_plan(plan, sde, start)`.

    Parameters
    ----------
    plan : Plan
        A plan for the schedule of the model: either a whole one, which is cut, or one that begins at this strength, made by
        `deis.make_plan(sde.between(strength=strength), ...)`.
    model : Denoiser or Pretrained
    x_0 : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
        The images; the array type chooses the executor.
    strength : float in (0, 1]
        How far to go back towards noise; see `Schedule.between`. At 1 nothing of x_0 is left, and sampling starts from pure noise.
    rng
        As in `add_noise`. A stochastic plan takes its noise from it, too.
    callback, progress, check_finite, grad, parallel
        See `deis.sample`.

    Returns
    -------
    Array of the type, shape and dtype of x_0.

    Raises
    ------
    UserWarning
        If the plan is a calibrated one and is cut; see `deis.cut_plan`.
    TypeError
        If model is a plain function, which has no schedule; and as `deis.sample`.
    ValueError
        If strength lies outside (0, 1], x_0 is not finite or not of the model's shape, or the plan is for another schedule or
        begins later; and as `deis.sample`.
    """
    denoiser = _denoiser(model)
    check_sample("x_0", x_0, denoiser)
    backend = backend_of(x_0)
    part = edit_plan(plan, denoiser.sde, strength)
    _check_finite(x_0, None)
    kept = backend.xp.zeros_like(x_0) if strength == 1 else x_0
    start = _noised(kept, part.alpha[:1], part.sigma[:1], rng)
    run = partial(sample, callback=callback, progress=progress, check_finite=check_finite, grad=grad, parallel=parallel)
    return run(part, denoiser, start, rng=rng)


def inpaint(
    plan: Plan,
    model: Denoiser | Pretrained,
    x_0: Any,
    mask: Any,
    *,
    rng: Any,
    strength: float = 1.0,
    resample: int = 1,
    callback: Callable[[int, float, Any], Any] | None = None,
    progress: bool = False,
    check_finite: bool = False,
    grad: bool = False,
    parallel: bool = False,
) -> Any:
    """Repaint some pixels of images, and keep the others.

    In the known pixels every state is alpha(t) x_0 + sigma(t) z. A deterministic plan keeps one z per sample from start to end; a
    stochastic one renews it with its own noise. The unknown pixels are sampled along with them, and the result has x_0 itself in
    the known pixels. With `resample` each step but the last is repeated that many times, with a jump back by the forward
    diffusion in between (RePaint, Lugmayr et al., arXiv 2201.09865), so that the unknown pixels come to agree with the known
    ones. Every pass begins with a step of first order, because the predictions from before a jump belong to another trajectory.

    Parameters
    ----------
    plan, model, rng, callback, progress, check_finite, grad, parallel
        See `image_to_image`. The callback receives the states of the plan, with noise in the known pixels up to the end.
    x_0 : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
        The images. At strength 1 the unknown pixels may hold anything, even NaN.
    mask : array of bool, or of 0 and 1
        True or 1 where to repaint. It has the shape of x_0, or 1 in place of the batch or the channels; for images this is
        (batch or 1, channels or 1, height, width). A mask traced by `jax.jit` must be bool.
    strength : float in (0, 1]
        Below 1 the unknown pixels start from those of x_0, with noise; see `image_to_image`.
    resample : int
        The number of passes through each step but the last.

    Returns
    -------
    Array of the type, shape and dtype of x_0.

    Raises
    ------
    UserWarning
        If the plan is a calibrated one and is cut or resampled; see `deis.cut_plan`.
    TypeError
        If mask is not an array of numbers, or model is a plain function; and as `deis.sample`.
    ValueError
        If mask has another shape, or values other than 0 and 1. If x_0 is NaN or infinite in a known pixel, or below strength 1
        in any pixel; values traced by `jax.jit` are not checked. If the method cannot be resampled. And as `image_to_image`.
    """
    denoiser = _denoiser(model)
    check_sample("x_0", x_0, denoiser)
    unknown = _unknown(mask, x_0)
    part = edit_plan(plan, denoiser.sde, strength, resample)
    _check_finite(x_0, unknown if strength == 1 else None)
    xp = backend_of(x_0).xp
    known = xp.where(unknown, xp.zeros_like(x_0), x_0)  # a mask that multiplies would keep NaN
    start = _noised(known if strength == 1 else x_0, part.alpha[:1], part.sigma[:1], rng)
    run = partial(sample, callback=callback, progress=progress, check_finite=check_finite, grad=grad, parallel=parallel)
    return xp.where(unknown, run(part, _with_known(denoiser, known, unknown), start, rng=rng), x_0)


def edit_plan(plan: Plan, sde: Schedule, strength: float, resample: int = 1) -> Plan:
    """Return the plan that `image_to_image` and `inpaint` run."""
    check_direction(plan, "decode")
    strength = number("strength", strength, above=0, most=1, hint="the share of the way back to noise")
    start, passes = sde.between(strength=strength).t_start, whole("resample", resample)
    with np.errstate(divide="ignore"):
        own, wanted = plan.sigma[0] / plan.alpha[0], sde.rho(start)
    if plan.matches(sde) and not (wanted <= own * (1 + 1e-4)):
        raise ValueError(
            f"strength={strength!r} begins at t={start!r}, and the plan {plan.method!r} later, at t={plan.t[0].item()!r}; give a "
            "lower strength, or a plan that begins there: deis.make_plan(sde.between(strength=...), ...)"
        )
    return resampled(cut_plan(plan, sde, start), sde, passes)


def _denoiser(model: Any) -> Denoiser:
    model = without_labels(model)
    kind("model", model, Denoiser, "a deis.Denoiser or what deis.load_model returns, which have a schedule,")
    found: Denoiser = model
    return found


def _noised(x_0: Any, alpha: AnyArray, sigma: AnyArray, rng: Any) -> Any:
    """Return alpha x_0 + sigma z for levels of shape (), (1,) or (batch,)."""
    backend = backend_of(x_0)
    x = backend.cast(x_0, backend.carry(x_0.dtype))
    z = backend.noise(rng, len(x))(1.0, backend.xp.zeros_like(x), i=_STREAM)
    alpha, sigma = (backend.like(level.reshape(-1, *(1,) * (x.ndim - 1)), x) for level in (alpha, sigma))
    return backend.cast(alpha * x + sigma * z, x_0.dtype)


def _unknown(mask: Any, x_0: Any) -> Any:
    """Return a mask as an array of bool of the framework and on the device of x_0.

    Raises
    ------
    TypeError, ValueError
        See `inpaint`.
    """
    values = mask if is_traced(mask) else _flags(mask)
    shape, whole_shape = tuple(values.shape), tuple(x_0.shape)
    beside = len(shape) == len(whole_shape) and shape[2:] == whole_shape[2:]
    if not (beside and all(n in (1, size) for n, size in zip(shape[:2], whole_shape[:2], strict=True))):
        raise ValueError(
            f"mask of shape {shape} must have that of x_0, {whole_shape}, or 1 in place of the batch or of the channels"
        )
    if values is not mask:
        return backend_of(x_0).like(values.astype(np.float32), x_0) != 0
    if "bool" not in str(mask.dtype):
        raise ValueError(f"mask has dtype {mask.dtype}, and its values cannot be looked at here; give one of bool")
    return mask


def _flags(mask: Any) -> Flags:
    """Return a mask of any framework, or of lists, as a new array of bool."""
    try:
        values = np.array(mask.detach().cpu() if is_torch(mask) else mask)
    except Exception:  # rows of different lengths, or a dtype that NumPy lacks
        values = np.array(None)
    if values.dtype != np.bool_:
        values = array("mask", mask, "of bool, or of 0 and 1")
    wrong = ~np.isin(values, (0, 1))
    if wrong.any():
        odd = values[wrong][0].item()
        raise ValueError(f"mask holds {odd!r}, and must hold only 0 and 1, or bool; it is 1 where to repaint")
    return values.astype(bool)


def _check_finite(x_0: Any, unknown: Any) -> None:
    """Raise ValueError if a known pixel is NaN or infinite."""
    if is_traced(x_0) or is_traced(unknown):
        return
    fine = backend_of(x_0).xp.isfinite(x_0)
    if not bool((fine if unknown is None else fine | unknown).all()):
        raise ValueError(
            "x_0 holds NaN or infinity"
            + (" in pixels that are known; mask them, or fill them in" if unknown is not None else "; fill in every pixel")
        )


@dataclass(frozen=True)
class _Informed:
    """A network whose prediction in the known pixels is replaced by the one whose data is x_0."""

    denoiser: Denoiser
    x_0: Any
    unknown: Any

    def at(self, x: Any, t: Any, level: Any) -> Any:
        m = checked_output("model(x, t)", self.denoiser.at(x, t, level), x, level)
        xp, copies = backend_of(x).xp, level.copies if isinstance(level, Levels) else 1
        x_0 = xp.concatenate([self.x_0] * copies) if copies > 1 else self.x_0
        several = copies > 1 and len(self.unknown) > 1
        unknown = xp.concatenate([self.unknown] * copies) if several else self.unknown
        return xp.where(unknown, m, output_of(self.denoiser.predicts, x_0, x, level))


def _with_known(denoiser: Denoiser, x_0: Any, unknown: Any) -> Denoiser:
    """Return a denoiser whose data in the known pixels is x_0."""
    xp, threshold = backend_of(x_0).xp, denoiser.threshold
    kept = None if threshold is None else lambda x: xp.where(unknown, threshold(x), backend_of(x).cast(x_0, x.dtype))
    informed: Any = _Informed(denoiser, x_0, unknown)
    return replace(denoiser, model=informed, threshold=kept)
