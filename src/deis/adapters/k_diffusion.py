"""Plans with the calling convention of k-diffusion's samplers, which ComfyUI and others share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..extras import needs

with needs("torch", "deis.adapters.k_diffusion"):
    import torch
    from torch import Tensor

from ..methods import make_plan
from ..model.predictions import Denoiser, Level
from ..plan import Plan
from ..run import sample
from ..sde import EDM, VPSDE, FlowMatching, Schedule
from .levels import FLOAT32, with_data

_ROUNDING = 1e-4  # of noise levels that went through float32 and other people's formulas


def sample_deis(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    method: str = "auto",
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
        Falling; the steps of the method.
    extra_args : dict, optional
        For the model; an entry "seed", as ComfyUI has it, also seeds the noise of stochastic methods.
    callback : callable, optional
        Told {"x", "i", "sigma", "sigma_hat", "denoised"} in every step, from its first evaluation.
    disable : bool, optional
        No progress bar; by default there is one on a terminal.
    method : str
        Any name that `deis.get_method` knows, and its `options`.
    schedule : Schedule, optional
        By default `schedule_of(model)`: the coefficients are those of the model's own schedule.
    plan : Plan, optional
        Instead of a method: one whose noise levels are these, such as a calibrated one (`sigmas_of` gives its levels).
    generator : torch.Generator, optional
        For stochastic methods, instead of the seed.

    Returns
    -------
    Tensor
        The state at sigmas[-1].

    Raises
    ------
    ValueError
        Where the levels do not fall, leave the schedule, or are not the plan's.
    """
    extra_args = extra_args or {}
    levels = np.asarray(sigmas.detach().cpu().double())
    if len(levels) < 2:
        return x
    sde = schedule_of(model) if schedule is None else schedule
    if plan is None:
        plan = make_plan(sde, method, ts=_times(sde, levels), **options)
    else:
        sde = _check_plan(plan, sde, levels)
    wrapped = _Wrapped(model, plan, extra_args, callback)
    flow = _is_flow(plan)
    rng = None
    if plan.stochastic:
        rng = generator or torch.Generator().manual_seed(extra_args.get("seed", int(torch.randint(2**62, ()))))
    progress = sys.stderr.isatty() if disable is None else not disable
    x_0: Tensor = sample(plan, Denoiser(wrapped, sde, "x0"), x if flow else float(plan.alpha[0]) * x, rng=rng, progress=progress)
    return x_0 if flow else x_0 / float(plan.alpha[-1])


def schedule_of(model: Any) -> Schedule:
    """Return the schedule of a model: of ComfyUI's `model_sampling`, or of k-diffusion's table `sigmas`; else `EDM`, t = sigma.

    A table becomes `VPSDE.discrete`, whose clock is the training time, with the data as its last time.
    """
    for part in _inside(model):
        about = getattr(part, "model_sampling", None)
        if about is not None and any(kind.__name__ == "CONST" for kind in type(about).__mro__):
            return FlowMatching()
        table = getattr(part if about is None else about, "sigmas", None)
        if isinstance(table, Tensor) and table.ndim == 1 and len(table) > 1:
            return with_data(1 / (1 + np.square(np.asarray(table.detach().cpu().double()))))
    return EDM(0.0, np.finfo(np.float64).max)


def sigmas_of(plan: Plan) -> Tensor:
    """Return the noise levels of a plan's steps as k-diffusion and ComfyUI count them, shape (num_step + 1,)."""
    places = np.append(0, 1 + np.flatnonzero(plan.accepts))
    alpha, sigma = plan.alpha[places], plan.sigma[places]
    return torch.from_numpy(sigma if _is_flow(plan) else sigma / alpha).float()


def _is_flow(plan: Plan) -> bool:
    return np.allclose(plan.alpha + plan.sigma, 1)


def _inside(model: Any) -> Iterator[Any]:
    """Yield a model and what it wraps."""
    while model is not None:
        yield model
        model = getattr(model, "inner_model", None)


def _times(sde: Schedule, levels: Any) -> Any:
    """Return the times of the levels; where they leave the schedule by a rounding, its ends."""
    if not (np.isfinite(levels).all() and (np.diff(levels) < 0).all() and levels[-1] >= 0):
        raise ValueError(f"sigmas must be finite and fall strictly to at least 0, and are {levels.tolist()}")
    if isinstance(sde, FlowMatching | EDM):
        return levels
    most = float(sde.rho(sde.t_start))
    if levels[0] > most * (1 + _ROUNDING):
        raise ValueError(
            f"sigmas[0]={levels[0].item()!r} is above the greatest noise level of the model, {most!r}; start there, or give "
            "schedule=deis.EDM(0.0, sigmas[0]) to take the level itself for the time"
        )
    return np.minimum(sde.t_of_rho(levels), sde.t_start)


def _check_plan(plan: Plan, sde: Schedule, levels: Any) -> Schedule:
    """Return the schedule that the plan is of: the model's, or that without its noise-free end."""
    own = np.asarray(sigmas_of(plan).double())
    if own.shape != levels.shape or not np.allclose(own, levels, _ROUNDING, 1e-6):
        raise ValueError(
            f"sigmas are {levels.tolist()} and those of the plan {plan.method!r} {own.tolist()}; give it its own, "
            "deis.adapters.k_diffusion.sigmas_of(plan)"
        )
    candidates = [sde]
    if isinstance(sde, VPSDE) and sde.num_times is not None:
        candidates.append(VPSDE.discrete(np.exp(2 * sde.log_alpha(np.arange(1, sde.num_times)))))
    for candidate in candidates:
        if plan.matches(candidate, FLOAT32):
            return candidate
    raise ValueError(
        f"the plan {plan.method!r} was made for the schedule {plan.schedule!r}, whose noise levels are not those of the model at "
        "its times; make or calibrate one for this model"
    )


class _Wrapped:
    """A k-diffusion model as one of x_0 in the plan's own state; it tells the callback of each step."""

    def __init__(
        self, model: Callable[..., Tensor], plan: Plan, extra_args: dict[str, Any], callback: Callable[..., Any] | None
    ) -> None:
        self.model, self.plan, self.extra_args, self.callback = model, plan, extra_args, callback
        starts = np.append(True, plan.accepts[:-1])
        number: NDArray[np.intp] = np.cumsum(plan.accepts) - plan.accepts
        # The step that each evaluation begins, None for its later stages.
        self.steps = [
            i if first else None for i, first in zip(number[plan.calls].tolist(), starts[plan.calls].tolist(), strict=True)
        ]
        self.evaluations = 0

    def at(self, x: Tensor, t: Tensor, level: Level) -> Tensor:
        sigma, scale = (level.sigma, 1.0) if _is_flow(self.plan) else (level.sigma / level.alpha, level.alpha)
        state = x if scale == 1 else x / scale
        denoised = self.model(state, state.new_full((len(state),), sigma), **self.extra_args)
        step = self.steps[self.evaluations]
        self.evaluations += 1
        if self.callback is not None and step is not None:
            self.callback({"x": state, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return denoised

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError("this model is called at a noise level")
