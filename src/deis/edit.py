"""Start in the middle: image-to-image, and inpainting with RePaint's resampling.

Both are `deis.sample` of a plan that begins in the middle. Inpainting is a model that knows: in the known pixels its prediction is
the one whose data is x_0. A plan carries alpha x_0 + sigma z exactly for a constant prediction, so these pixels are the noised x_0
at every state, stages too, with nothing to replace and no executor of its own. Their noise z is that of the state itself. A
deterministic plan keeps one z a sample, so that the network sees a smooth path and a multistep method keeps its order. A
stochastic plan, and every jump back of RePaint, renews it as it renews all noise, so that the known pixels follow the diffusion
that ends in x_0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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

_STREAM = np.uint32(2**32 - 1)  # among the noises that a JAX key makes for rows of a plan, that of none


def add_noise(sde: Schedule, x_0: Any, t: Any, rng: Any) -> Any:
    """Return x_t = alpha(t) x_0 + sigma(t) z, with z new standard normal noise.

    Parameters
    ----------
    sde : Schedule
    x_0 : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
    t : float, or array of shape (batch,)
        The time, of all samples or one each, from the data (0, or the schedule's end where that is lower) to `sde.t_start`.
    rng : torch.Generator, jax.random key or numpy.random.Generator, or a sequence (in JAX an array) of them
        Each sample has a stream of its own, as in `deis.sample`: given there next, torch's and NumPy's go on, and a JAX key makes
        other noise for the plan.

    Returns
    -------
    Array of the type, shape, dtype and device of x_0. In half precision it is computed in float32.

    Raises
    ------
    TypeError
        Where x_0 is no such array, or not of a floating dtype, t is no number, or rng is not of the kind of x_0.
    ValueError
        Where t lies outside the schedule or has another shape, or rng has not one stream a sample.
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
    """Add noise to pictures up to a level, and sample from there (SDEdit, Meng et al., arXiv 2108.01073).

    It is `deis.sample(part, model, deis.add_noise(sde, x_0, start, rng), rng=rng)`, where start is that of
    `sde.between(strength=strength)` and part is `deis.cut_plan(plan, sde, start)`.

    Parameters
    ----------
    plan : Plan
        Of the schedule of the model: a whole one, which is cut, or one that begins at the strength, of
        `deis.make_plan(sde.between(strength=strength), ...)`.
    model : Denoiser or Pretrained
    x_0 : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
        The pictures; its type chooses the executor.
    strength : float in (0, 1]
        How far to go back to noise; see `Schedule.between`. At 1 nothing of x_0 is left: it is sampling from pure noise.
    rng
        As in `add_noise`; a stochastic plan takes its noise from there, too.
    callback, progress, check_finite, grad, parallel
        See `deis.sample`.

    Returns
    -------
    Array of the type, shape and dtype of x_0.

    Raises
    ------
    UserWarning
        Where the plan is a calibrated one and is cut; see `deis.cut_plan`.
    TypeError
        Where model is a plain function, which does not tell its schedule; and as `deis.sample`.
    ValueError
        Where strength lies outside (0, 1], x_0 is not finite or not of the model's shape, or the plan is of another schedule or
        begins later; and as `deis.sample`.
    """
    denoiser = _denoiser(model)
    check_sample("x_0", x_0, denoiser)
    backend = backend_of(x_0)
    part = edit_plan(plan, denoiser.sde, strength)
    _check_finite(x_0, None)
    kept = backend.xp.zeros_like(x_0) if strength == 1 else x_0
    start = _noised(kept, part.alpha[:1], part.sigma[:1], rng)
    options: dict[str, Any] = {
        "callback": callback,
        "progress": progress,
        "check_finite": check_finite,
        "grad": grad,
        "parallel": parallel,
    }
    return sample(part, denoiser, start, rng=rng, **options)


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
    """Paint pixels of pictures anew, and keep the others.

    In the known pixels every state is alpha(t) x_0 + sigma(t) z. A deterministic plan keeps one z a sample, from start to end; a
    stochastic one renews it with its own noise. The unknown pixels are sampled beside them, and what is returned has x_0 itself in
    the known ones. With `resample` each step but the last is made so many times, with a jump back by the forward diffusion
    between (RePaint, Lugmayr et al., arXiv 2201.09865), so that the unknown pixels find to the known ones; every pass begins with
    a step of first order, because predictions from before a jump are those of another trajectory.

    Parameters
    ----------
    plan, model, rng, callback, progress, check_finite, grad, parallel
        See `image_to_image`. The callback is told the states of the plan, with noise in the known pixels up to the end.
    x_0 : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
        The pictures. At strength 1 the unknown pixels may hold anything, NaN too.
    mask : array of bool, or of 0 and 1
        True or 1 where to paint anew. Of the shape of x_0, or 1 in place of the batch or of the channels: of pictures
        (batch or 1, channels or 1, height, width). Under `jax.jit` one of bool, where it is traced.
    strength : float in (0, 1]
        Below 1 the unknown pixels start from those of x_0, with noise; see `image_to_image`.
    resample : int
        The passes of each step but the last.

    Returns
    -------
    Array of the type, shape and dtype of x_0.

    Raises
    ------
    UserWarning
        Where the plan is a calibrated one and is cut or resampled; see `deis.cut_plan`.
    TypeError
        Where mask is no array of numbers, model a plain function; and as `deis.sample`.
    ValueError
        Where mask has another shape, or another value than 0 and 1; x_0 is NaN or infinite in a known pixel, or below strength 1
        anywhere (under `jax.jit` nobody can look); the method does not allow to resample; and as `image_to_image`.
    """
    denoiser = _denoiser(model)
    check_sample("x_0", x_0, denoiser)
    unknown = _unknown(mask, x_0)
    part = edit_plan(plan, denoiser.sde, strength, resample)
    _check_finite(x_0, unknown if strength == 1 else None)
    xp = backend_of(x_0).xp
    known = xp.where(unknown, xp.zeros_like(x_0), x_0)  # NaN times 0 were NaN
    start = _noised(known if strength == 1 else x_0, part.alpha[:1], part.sigma[:1], rng)
    options: dict[str, Any] = {
        "callback": callback,
        "progress": progress,
        "check_finite": check_finite,
        "grad": grad,
        "parallel": parallel,
    }
    return xp.where(unknown, sample(part, _with_known(denoiser, known, unknown), start, rng=rng, **options), x_0)


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
            "lower one, or a plan that begins there: deis.make_plan(sde.between(strength=...), ...)"
        )
    return resampled(cut_plan(plan, sde, start), sde, passes)


def _denoiser(model: Any) -> Denoiser:
    model = without_labels(model)
    kind("model", model, Denoiser, "a deis.Denoiser or what deis.load_model returns, which tell their schedule,")
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
    """Return a mask as an array of bool beside x_0.

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
    """Return a mask of any framework, or of lists, as an array of bool that is none of the caller's."""
    try:
        values = np.array(mask.detach().cpu() if is_torch(mask) else mask)
    except Exception:  # rows of different lengths, or a dtype that NumPy lacks
        values = np.array(None)
    if values.dtype != np.bool_:
        values = array("mask", mask, "of bool, or of 0 and 1")
    wrong = ~np.isin(values, (0, 1))
    if wrong.any():
        odd = values[wrong][0].item()
        raise ValueError(f"mask holds {odd!r} and must hold 0 and 1 alone, or bool; where to paint anew it is 1")
    return values.astype(bool)


def _check_finite(x_0: Any, unknown: Any) -> None:
    """Raise ValueError where a pixel is NaN or infinite that is not unknown."""
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
    """A network that predicts what it did, and in the known pixels the prediction whose data is x_0."""

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
    """Return a denoiser that knows x_0 where it is not unknown."""
    xp, threshold = backend_of(x_0).xp, denoiser.threshold
    kept = None if threshold is None else lambda x: xp.where(unknown, threshold(x), backend_of(x).cast(x_0, x.dtype))
    informed: Any = _Informed(denoiser, x_0, unknown)
    return replace(denoiser, model=informed, threshold=kept)
