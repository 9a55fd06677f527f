"""Plans with the calling convention of k-diffusion's samplers, which ComfyUI and others share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..extras import needs

with needs("torch", "deis.adapters.k_diffusion"):
    import torch
    from torch import Tensor

from ..arrays import Array, Indices
from ..cut import between
from ..grids import make_grid
from ..methods import Builder, make_plan
from ..model.predictions import Denoiser, Level
from ..plan import Plan
from ..run import sample
from ..sde import EDM, VPSDE, FlowMatching, Schedule
from .levels import FLOAT32, with_data

_ROUNDING = 1e-4  # of noise levels that went through float32 and other programs' formulas
_FLOAT32 = 1e-6  # of noise levels that float32 alone tells apart
_LEVEL = EDM(0.0, np.finfo(np.float64).max)  # the noise level is the time
# The schedules of ComfyUI's classes, by name, the special ones first. Those of a table are not here.
_CONTINUOUS: dict[str, Schedule] = {
    "CONST": FlowMatching(),
    "ModelSamplingCosmosRFlow": FlowMatching(),
    "ModelSamplingContinuousV": VPSDE.cosine(0.0, 0.0, 1.0),
    "ModelSamplingContinuousEDM": _LEVEL,
}


def sample_deis(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    method: str | Builder = "auto",
    schedule: Schedule | None = None,
    plan: Plan | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """Sample with a plan on the given noise levels.

    Parameters
    ----------
    model : callable
        model(x, sigma, **extra_args) -> x_0, where x = x_0 + sigma eps, or (1 - sigma) x_0 + sigma eps for flow matching.
    x : Tensor
        The noise at sigmas[0], in the same sense.
    sigmas : Tensor of shape (steps + 1,)
        Falling: the steps of the method. Some schedulers repeat a level; of equal ones the last counts.
    extra_args : dict, optional
        Passed to the model. An entry "seed", as in ComfyUI, also seeds the noise of stochastic methods.
    callback : callable, optional
        Called with {"x", "i", "sigma", "sigma_hat", "denoised"} in every step, at its first evaluation; i is the index in sigmas.
    disable : bool, optional
        No progress bar; by default there is one on a terminal.
    method : str or callable
        Any name that `deis.get_method` accepts, with its `options`; or a builder, as for `deis.make_plan`.
    schedule : Schedule, optional
        By default `schedule_of(model)`: the coefficients are those of the model's own schedule. If sigmas[0] is above its greatest
        noise level, the noise levels themselves are the times.
    plan : Plan, optional
        A plan in place of a method, such as a calibrated one: `sigmas_of` gives its noise levels. If sigmas are a part of them, or
        begin between two of them, as for image-to-image, the plan is cut (`deis.cut.cut_plan`).
    generator : torch.Generator, optional
        For stochastic methods, instead of the seed.

    Returns
    -------
    Tensor
        The state at sigmas[-1].

    Raises
    ------
    ValueError
        If the levels rise, leave the given schedule, or are not those of the plan.
    """
    extra_args = extra_args or {}
    levels, places = _falling(sigmas)
    if len(levels) < 2:
        return x
    straight = _is_straight(model, schedule)
    if straight and abs(1 - levels[0]) < _ROUNDING:
        levels[0] = 1.0  # alpha = 0; float32 cannot resolve a smaller one
    sde = _schedule(model, levels) if schedule is None else schedule
    if plan is None:
        plan = make_plan(sde, method, ts=_times(sde, levels, straight), **options)
    else:
        plan, sde = _check_plan(plan, sde, levels, straight)
    # The index at which each step begins, among the given sigmas.
    begins = places[[int(np.argmin(np.abs(levels - level))) for level in _levels_of(plan, straight)]]
    wrapped = _Wrapped(model, plan, extra_args, callback, straight, begins)
    rng = (generator or _seeded(extra_args.get("seed"))) if plan.stochastic else None
    progress = sys.stderr.isatty() if disable is None else not disable
    start, end = (1.0, 1.0) if straight else (float(plan.alpha[0]), float(plan.alpha[-1]))
    x_0: Tensor = sample(plan, Denoiser(wrapped, sde, "x0"), start * x, rng=rng, progress=progress)
    return x_0 / end


def schedule_of(model: Any) -> Schedule:
    """Return the schedule of a model: from ComfyUI's `model_sampling`, or from k-diffusion's table `sigmas`; else `EDM`, t = sigma.

    A table becomes `VPSDE.discrete`, whose clock is the training time, with the data as its last time. The coefficients of a
    method whose clock is not t depend on the noise levels alone, so that any schedule is right for an unknown model.
    """
    about = _sampling_of(model)
    for kind, schedule in _CONTINUOUS.items():
        if _is_a(about, kind):
            return schedule
    for part in _inside(model) if about is None else [about]:
        table = getattr(part, "sigmas", None)
        if isinstance(table, Tensor) and _is_table(table):
            return with_data(1 / (1 + np.square(np.asarray(table.detach().cpu().double()))))
    return _LEVEL


def _is_table(sigmas: Tensor) -> bool:
    """Return whether levels rise with their times, as those of a model do; the levels of one run, which a wrapper keeps, fall."""
    return sigmas.ndim == 1 and len(sigmas) > 1 and bool((sigmas.diff() >= 0).all() and sigmas[-1] > sigmas[0])


def sigmas_of(plan: Plan) -> Tensor:
    """Return the noise levels of a plan's steps as k-diffusion and ComfyUI count them, shape (num_step + 1,)."""
    return torch.from_numpy(_levels_of(plan, _is_flow(plan))).float()


def sigmas_of_auto(model_sampling: Any, steps: int) -> Tensor:
    """Return noise levels on the grid of the method "auto", shape (steps + 1,), for a `model_sampling` of ComfyUI.

    t^(1/2) of the linear VP schedule falls evenly from the model's greatest noise level to 0; see `deis.make_grid`.
    """
    most = float(model_sampling.sigma_max)
    sde = FlowMatching(0.0, min(most, 1.0)) if _is_a(model_sampling, "CONST") else EDM(0.0, most)
    return torch.from_numpy(make_grid(sde, steps, "vp_t", 2.0)).float()


def _is_flow(plan: Plan) -> bool:
    return np.allclose(plan.alpha + plan.sigma, 1)


def _levels_of(plan: Plan, straight: bool) -> Array:
    places = np.append(0, 1 + np.flatnonzero(plan.accepts))
    alpha, sigma = plan.alpha[places], plan.sigma[places]
    with np.errstate(divide="ignore"):
        return sigma if straight else sigma / alpha


def _inside(model: Any) -> Iterator[Any]:
    """Yield a model and what it wraps."""
    while model is not None:
        yield model
        model = getattr(model, "inner_model", None)


def _sampling_of(model: Any) -> Any:
    """Return ComfyUI's `model_sampling` of the innermost model that has one, or None."""
    found = [getattr(part, "model_sampling", None) for part in _inside(model)]
    return next((about for about in reversed(found) if about is not None), None)


def _is_a(about: Any, kind: str) -> bool:
    """Return whether an object has a class of this name among its bases: ComfyUI cannot be imported here."""
    return any(base.__name__ == kind for base in type(about).__mro__)


def _is_straight(model: Any, schedule: Schedule | None) -> bool:
    """Return whether x = (1 - sigma) x_0 + sigma eps, and not x_0 + sigma eps."""
    about = _sampling_of(model)
    return isinstance(schedule, FlowMatching) if about is None else _is_a(about, "CONST")


def _falling(sigmas: Tensor) -> tuple[Array, Indices]:
    """Return the distinct noise levels, and the index of each, the last of its run: steps of length 0 are left out."""
    given = np.asarray(sigmas.detach().cpu().double())
    if not (np.isfinite(given).all() and (given >= 0).all() and (given[1:] <= given[:-1] * (1 + _FLOAT32)).all()):
        raise ValueError(f"sigmas must be finite, at least 0, and never rise, and are {given.tolist()}")
    places = np.flatnonzero(np.append(given[1:] < given[:-1] * (1 - _FLOAT32), len(given) > 0))
    return given[places], places


def _schedule(model: Any, levels: Array) -> Schedule:
    """Return the model's schedule; where levels lie beyond it, that of the levels themselves."""
    sde = schedule_of(model)
    return sde if levels[0] <= _most(sde) else _LEVEL


def _most(sde: Schedule) -> float:
    """Return the greatest noise level sigma/alpha of a schedule, with its rounding added."""
    return float(sde.rho(sde.t_start)) * (1 + _ROUNDING)


def _times(sde: Schedule, levels: Array, straight: bool) -> Array:
    """Return the times of the levels; levels that leave the schedule by rounding get its ends."""
    most = 1.0 if straight else _most(sde)
    if levels[0] > most:
        raise ValueError(
            f"sigmas[0]={levels[0].item()!r} is above the greatest noise level of the schedule {sde.name}, {most:.6g}; start there"
        )
    if straight or isinstance(sde, EDM):
        return levels
    ts = np.full(len(levels), sde.t_end)
    noisy = levels > 0
    ts[noisy] = np.minimum(sde.t_of_rho(levels[noisy]), sde.t_start)
    return ts


def _seeded(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


def _same(a: Any, b: Any) -> bool:
    return np.shape(a) == np.shape(b) and np.allclose(a, b, _ROUNDING, 1e-6)


def _check_plan(plan: Plan, sde: Schedule, levels: Array, straight: bool) -> tuple[Plan, Schedule]:
    """Return the part of the plan that runs on the levels, and the plan's schedule: the model's, or the same without the data."""
    own = _levels_of(plan, straight)
    k = 1 + int(np.argmin(np.abs(own[1:] - levels[1])))
    if not (_same(own[k : k + len(levels) - 1], levels[1:]) and levels[0] <= own[0] * (1 + _ROUNDING)):
        raise ValueError(
            f"sigmas are {levels.tolist()} and those of the plan {plan.method!r} are {own.tolist()}; give it its own, "
            "deis.adapters.k_diffusion.sigmas_of(plan), or a part of them, of which the first may lie between two"
        )
    candidates = [sde]
    if isinstance(sde, VPSDE) and sde.num_times is not None:
        candidates.append(VPSDE.discrete(np.exp(2 * sde.log_alpha(np.arange(1, sde.num_times)))))
    for candidate in candidates:
        if plan.matches(candidate, FLOAT32):
            return _part(plan, candidate, levels, own, straight), candidate
    raise ValueError(
        f"the plan {plan.method!r} was made for the schedule {plan.schedule!r}, whose noise levels are not those of the model at "
        "its times; make or calibrate one for this model"
    )


def _part(plan: Plan, sde: Schedule, levels: Array, own: Array, straight: bool) -> Plan:
    """Return the part of a plan between the first and the last level, without a cut where these are the plan's own ends."""
    ts = _times(sde, levels, straight)
    start, end = (None if _same(levels[i], own[i]) else float(ts[i]) for i in (0, -1))
    return between(plan, sde, start, end)


class _Wrapped:
    """A k-diffusion model as a model of x_0 in the plan's own state; it calls the callback at each step."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        plan: Plan,
        extra_args: dict[str, Any],
        callback: Callable[..., Any] | None,
        straight: bool,
        places: Indices,
    ) -> None:
        self.model, self.plan, self.extra_args, self.callback, self.straight = model, plan, extra_args, callback, straight
        number: Indices = (np.cumsum(plan.accepts) - plan.accepts)[plan.calls]
        starts = np.diff(number, prepend=-1) > 0
        # The step that each evaluation begins, as the caller counts them; None for its later stages.
        self.steps = [i if first else None for i, first in zip(places[number].tolist(), starts.tolist(), strict=True)]
        self.evaluations = 0

    def at(self, x: Tensor, t: Tensor, level: Level) -> Tensor:
        sigma, scale = (level.sigma, 1.0) if self.straight else (level.sigma / level.alpha, level.alpha)
        state = x if scale == 1 else x / scale
        denoised = self.model(state, state.new_full((len(state),), sigma), **self.extra_args)
        step = self.steps[self.evaluations]
        self.evaluations += 1
        if self.callback is not None and step is not None:
            self.callback({"x": state, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return denoised

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError("this model is called at a noise level")
