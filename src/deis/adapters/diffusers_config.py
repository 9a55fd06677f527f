"""Configurations of diffusers' schedulers: which plan each stands for, and at which times it runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..extras import needs

with needs("diffusers", "deis.adapters.diffusers_config"):
    import diffusers

from ..arrays import Array
from ..grids import distinct_integers
from ..model.checkpoints.pipelines import FLOW
from ..sde import FlowMatching, Schedule
from .levels import with_data

Config = Mapping[str, Any]

DPM = "DPMSolverMultistepScheduler"
# What says where the times lie, and nothing of the method.
_SPACING = frozenset(
    """
    num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr timestep_spacing steps_offset
    final_sigmas_type set_alpha_to_one lambda_min_clipped sigma_min sigma_max use_karras_sigmas use_exponential_sigmas
    use_beta_sigmas use_lu_lambdas use_flow_sigmas flow_shift shift use_dynamic_shifting time_shift_type shift_terminal
    """.split()  # noqa: SIM905
)
_LEVEL_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_ROUNDING = 1e-5  # of noise levels in float32, relative
NOT_OF_FLOW = (
    "trained_betas", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr", "timestep_spacing", "steps_offset",
    "set_alpha_to_one", "lambda_min_clipped", "use_lu_lambdas",
)  # fmt: skip
"""What says nothing of the times of flow matching."""
SHORT = 15
WHEN_SHORT = f"below {SHORT} steps"
"""For the option lower_order_final: the rule of diffusers' DPM-Solver and DEIS."""


class Family(NamedTuple):
    """A scheduler of diffusers."""

    method: Callable[[Config], tuple[str, dict[str, Any]]]
    """The name and the options of its method, by its configuration."""
    times: str
    """The class whose `set_timesteps` spaces its times."""


def _fixed(name: str, **options: Any) -> Callable[[Config], tuple[str, dict[str, Any]]]:
    return lambda config: (name, options)


def _step(name: str) -> Callable[[Config], tuple[str, dict[str, Any]]]:
    """Return a method of one step, in the data form where alpha starts at 2^-12 or less: eps / alpha would cost four digits."""

    def method(config: Config) -> tuple[str, dict[str, Any]]:
        tiny = config.get("rescale_betas_zero_snr") or config.get("beta_schedule") == "squaredcos_cap_v2"
        return name, {"form": "data"} if tiny else {}

    return method


_ddim, _ancestral = _step("ddim"), _step("ancestral")


def _deis(config: Config) -> tuple[str, dict[str, Any]]:
    """The paper's method of as many predictions; diffusers' class of the name has its polynomial in log rho."""
    return f"tab{config.get('solver_order', 2) - 1}", _final(config)


def _dpm(config: Config) -> tuple[str, dict[str, Any]]:
    order, options = config.get("solver_order", 2), _final(config)
    algorithm, heun = config.get("algorithm_type", "dpmsolver++"), config.get("solver_type", "midpoint") == "heun"
    euler = {"euler_at_final": True} if config.get("euler_at_final") and not ends_at_data(config) else {}
    solver = euler | ({"solver": "heun"} if heun else {})
    match algorithm, order:
        case "dpmsolver" | "dpmsolver++", 1:
            return _ddim(config)
        case "dpmsolver++", 2 if heun and not euler:
            return "dpmpp_2m", options
        case "dpmsolver++", (2 | 3):
            return f"dpmpp_{order}m_published", options | solver
        case "dpmsolver", (2 | 3):
            return f"dpm_solver_{order}m_published", options | solver
        case "sde-dpmsolver++", 1:
            return "sde_dpmpp_1m", {}
        case "sde-dpmsolver++", 2:
            return ("sde_dpmpp_2m", options) if heun and not euler else ("sde_dpmpp_2m_published", options | solver)
        case "sde-dpmsolver", 1:
            return "dpm_solver_2m_published", {"order": 1, "tau": 1.0}
        case "sde-dpmsolver", 2:
            return "dpm_solver_2m_published", options | solver | {"tau": 1.0}
    raise ValueError(f"algorithm_type={algorithm!r} of solver_order={order!r} has no plan; give method=, such as 'tab3' or 'auto'")


def _singlestep(config: Config) -> tuple[str, dict[str, Any]]:
    order, algorithm = config.get("solver_order", 2), config.get("algorithm_type", "dpmsolver++")
    if order == 1 and algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"):
        return ("sde_dpmpp_1m", {}) if algorithm.startswith("sde") else _ddim(config)
    if algorithm not in ("dpmsolver", "dpmsolver++") or order not in (2, 3):
        raise ValueError(
            f"algorithm_type={algorithm!r} of solver_order={order!r} has no plan; give method=, such as 'sde_dpmpp_2m'"
        )
    options = {"solver": "heun"} if config.get("solver_type") == "heun" else {}
    lower = {"lower_order_final": True} if config.get("lower_order_final") else {}
    return f"{'dpmpp' if algorithm == 'dpmsolver++' else 'dpm_solver'}_{order}s_published", options | lower


def _unipc(config: Config) -> tuple[str, dict[str, Any]]:
    if not config.get("predict_x0", True):
        raise ValueError("predict_x0=False has no published plan here; give method=, such as 'deis_abm2' or 'unipc2'")
    if config.get("disable_corrector") or config.get("solver_p"):
        raise ValueError("disable_corrector and solver_p have no plan; give method=, such as 'dpmpp_2m' for no corrector")
    return f"unipc{config.get('solver_order', 2)}_{config.get('solver_type', 'bh2')}", _final(config, always=True)


def _flow_euler(config: Config) -> tuple[str, dict[str, Any]]:
    return ("renoise", {}) if config.get("stochastic_sampling") else ("ddim", {})


def _final(config: Config, always: bool = False) -> dict[str, Any]:
    return {"lower_order_final": always or WHEN_SHORT} if config.get("lower_order_final", True) else {}


_EULER, _DDIM, _HEUN = "EulerDiscreteScheduler", "DDIMScheduler", "HeunDiscreteScheduler"
FAMILIES: dict[str, Family] = {
    "DDIMScheduler": Family(_ddim, _DDIM),
    "DDPMScheduler": Family(_ancestral, "DDPMScheduler"),
    "PNDMScheduler": Family(_fixed("ipndm4"), _DDIM),
    "EulerDiscreteScheduler": Family(_ddim, _EULER),
    "EulerAncestralDiscreteScheduler": Family(_ancestral, _EULER),
    "LMSDiscreteScheduler": Family(_fixed("lms4"), _EULER),
    "HeunDiscreteScheduler": Family(_fixed("edm_heun"), _HEUN),
    "KDPM2DiscreteScheduler": Family(_fixed("dpm_solver_2"), _EULER),
    DPM: Family(_dpm, DPM),
    "DPMSolverSinglestepScheduler": Family(_singlestep, DPM),
    "DEISMultistepScheduler": Family(_deis, DPM),
    "UniPCMultistepScheduler": Family(_unipc, "UniPCMultistepScheduler"),
    FLOW: Family(_flow_euler, FLOW),
}

# What no plan can do, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "invert_sigmas": (None, False),
    "timestep_type": (None, "discrete"),
    "interpolation_type": (None, "linear"),
}


@cache
def signature(name: str) -> dict[str, Any]:
    """Return the names that a configuration of a scheduler of diffusers holds, in order, and their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(getattr(diffusers, name).__init__).parameters.items()
        if name != "self"
    }


def parameters(name: str) -> frozenset[str]:
    """Return the names that a configuration of a scheduler of diffusers holds."""
    return frozenset(signature(name))


@cache
def known_keys() -> frozenset[str]:
    """Return every name that a configuration of the schedulers in `FAMILIES` may hold."""
    return frozenset().union(*map(parameters, FAMILIES))


def scheduler_of(config: Config, name: str | None = None) -> Any:
    """Return the scheduler of diffusers that holds the betas of a configuration, or the one of a name, with its settings.

    Raises
    ------
    ValueError
        Where that class does not know the beta_schedule.
    """
    kind = getattr(diffusers, name or config["times"])
    names = parameters(kind.__name__) & _SPACING
    given = {name: config[name] for name in names if config.get(name) is not None}
    try:
        made = kind(**given)
    except NotImplementedError:
        raise ValueError(
            f"beta_schedule={config.get('beta_schedule')!r} is unknown to {kind.__name__}; give its betas as trained_betas"
        ) from None
    # diffusers' spacings read these two of any configuration that has them
    bounds = {name: config[name] for name in ("sigma_min", "sigma_max") if config.get(name) is not None and name not in names}
    made.register_to_config(**bounds)
    return made


def sde_of(config: Config, scheduler: Any) -> Schedule:
    """Return the noise schedule: flow matching, t = sigma; or that of alphas_cumprod, t = timestep + 1, and t = 0 the data.

    Where the levels start beyond the training's, at sigma_max, that is a further time, N + 1.
    """
    if is_flow(config):
        return FlowMatching(shift=float(config.get("shift" if config["times"] == FLOW else "flow_shift") or 1.0))
    abar, most = scheduler.alphas_cumprod.double().numpy(), config.get("sigma_max")
    if levels_asked(config) and most is not None and 1 / (1 + most**2) < abar[-1]:
        abar = np.append(abar, 1 / (1 + most**2))
    return with_data(abar)


def is_flow(config: Config) -> bool:
    """Tell whether a configuration is one of flow matching."""
    return config.get("times") == FLOW or bool(config.get("use_flow_sigmas"))


def levels_asked(config: Config) -> list[str]:
    """Return the settings that space noise levels in place of times."""
    return [name for name in _LEVEL_SPACINGS if config.get(name)]


def spacing_of(config: Config) -> str:
    """Return the scheduler of diffusers that spaces the times: the one that `times` names, or DPM-Solver's for what it lacks."""
    own = config.get("times", DPM)
    return own if parameters(own).issuperset(levels_asked(config)) else DPM


def unread(config: Config) -> set[str]:
    """Return the settings of spacing that neither the class that spaces the times of a configuration reads nor this library."""
    return set(_SPACING) - parameters(spacing_of(config)) - {"final_sigmas_type", "sigma_min", "sigma_max", "use_flow_sigmas"}


def names_spacing(config: Config) -> bool:
    """Tell whether a configuration says how to space the times, and does not leave that to the method."""
    shifts = (config.get(name) not in (None, 1.0) for name in ("shift", "flow_shift"))
    others = ("timestep_spacing", "use_dynamic_shifting", "shift_terminal")
    return bool(levels_asked(config)) or any(shifts) or any(config.get(name) for name in others)


def ends_at_data(config: Config) -> bool:
    """Tell whether the last step goes to sigma = 0, and not to the smallest noise of the training."""
    one = config.get("set_alpha_to_one") is not False or "set_alpha_to_one" not in parameters(spacing_of(config))
    return one and config.get("final_sigmas_type") != "sigma_min"


def grid_of(config: Config, sde: Schedule, steps: int, mu: float | None, sigmas: Any = None) -> Array:
    """Return the times that diffusers' scheduler of the configuration takes for so many steps, and the end; shape (steps + 1,)."""
    scheduler = scheduler_of(config, spacing_of(config))
    options = {"mu": mu} if config.get("use_dynamic_shifting") and mu is not None else {}
    if is_flow(config):
        scheduler.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}), **options)
        return np.append(scheduler.sigmas[: len(scheduler.timesteps)].double().numpy(), 0.0)
    scheduler.set_timesteps(steps, **options)
    if levels_asked(config):
        return time_of_sigmas(sde, _sigmas_of(scheduler, sde, steps, ends_at_data(config)))
    end = 0.0 if ends_at_data(config) else 1.0
    ts = np.append(_once(scheduler, scheduler.timesteps)[:steps] + 1, end)
    if (np.diff(ts) < 0).all():
        return ts
    return distinct_integers(ts - end, int(config["num_train_timesteps"] + 1 - end)) + end


def _once(scheduler: Any, values: Any) -> Array:
    """Return what a scheduler has set, without the second entry of Heun's for all but the first."""
    array: Array = values.double().numpy()
    return array[[0, *range(1, len(array), 2)]] if type(scheduler).__name__ == _HEUN else array


def _sigmas_of(scheduler: Any, sde: Schedule, steps: int, clean: bool) -> Array:
    """Return the noise levels that a scheduler has set; one that it repeats at the end would waste an evaluation."""
    sigmas = _once(scheduler, scheduler.sigmas).copy()
    if not clean and sigmas[-1] == 0:
        sigmas[-1] = sde.rho(1.0)
    if sigmas[-1] >= (1 - _ROUNDING) * sigmas[-2]:
        scheduler.set_timesteps(steps + 1)
        sigmas = _once(scheduler, scheduler.sigmas)[:-1]
    return sigmas


def time_of_sigmas(sde: Schedule, sigmas: Any) -> Array:
    """Return the times of noise levels sigma / alpha, which may miss training times, and the greatest, by float32's rounding."""
    ts = sde.t_of_rho(sigmas)
    whole = np.rint(ts)
    ts = np.where(np.isclose(sde.rho(whole), sigmas, _ROUNDING, 0), whole, ts)
    assert sde.num_times is not None
    return np.where(ts >= sde.t_start, sde.num_times - 1.0, ts)
