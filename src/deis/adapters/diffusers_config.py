"""Configurations of diffusers' schedulers: which plan each stands for, and at which times it runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..extras import needs

with needs("diffusers", "deis.adapters.diffusers_config"):
    import diffusers

from ..grids import distinct_integers
from ..sde import FlowMatching, Schedule
from .levels import with_data

Array = NDArray[np.float64]
Config = Mapping[str, Any]

DPM, FLOW = "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
# What says where the times lie, and nothing of the method.
_SPACING = frozenset(
    """
    num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr timestep_spacing steps_offset
    final_sigmas_type set_alpha_to_one lambda_min_clipped sigma_min sigma_max use_karras_sigmas use_exponential_sigmas
    use_beta_sigmas use_lu_lambdas use_flow_sigmas flow_shift shift use_dynamic_shifting time_shift_type shift_terminal
    """.split()  # noqa: SIM905
)
PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
_ROUNDING = 1e-3  # of times from noise levels in float32
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


def _deis(config: Config) -> tuple[str, dict[str, Any]]:
    """The paper's method of as many predictions; diffusers' class of the name has its polynomial in log rho."""
    return f"tab{config.get('solver_order', 2) - 1}", _final(config)


def _dpm(config: Config) -> tuple[str, dict[str, Any]]:
    order, options = config.get("solver_order", 2), _final(config)
    algorithm, heun = config.get("algorithm_type", "dpmsolver++"), config.get("solver_type", "midpoint") == "heun"
    if order == 1:
        return ("ancestral", {}) if algorithm.startswith("sde") else ("ddim", {})
    if algorithm == "dpmsolver++" and order in (2, 3):
        return (f"dpmpp_{order}m" if heun and order == 2 else f"dpmpp_{order}m_published"), options
    if algorithm == "dpmsolver" and order in (2, 3):
        return f"dpm_solver_{order}m", options
    if algorithm == "sde-dpmsolver++" and order == 2:
        return "sde_dpmpp_2m" if heun else "sde_dpmpp_2m_published", options
    raise ValueError(f"algorithm_type={algorithm!r} of solver_order={order!r} has no plan; give method=, such as 'tab3' or 'auto'")


def _singlestep(config: Config) -> tuple[str, dict[str, Any]]:
    order, algorithm = config.get("solver_order", 2), config.get("algorithm_type", "dpmsolver++")
    if algorithm not in ("dpmsolver", "dpmsolver++") or order not in (1, 2, 3):
        raise ValueError(f"algorithm_type={algorithm!r} of solver_order={order!r} has no plan; give method=, such as 'dpmpp_2s'")
    if order == 1:
        return "ddim", {}
    return (f"dpmpp_{order}s" if algorithm == "dpmsolver++" else f"dpm_solver_{order}"), {}


def _unipc(config: Config) -> tuple[str, dict[str, Any]]:
    if not config.get("predict_x0", True):
        raise ValueError("predict_x0=False has no published plan here; give method=, such as 'deis_abm2' or 'unipc2'")
    if config.get("disable_corrector") or config.get("solver_p"):
        raise ValueError("disable_corrector and solver_p have no plan; give method=, such as 'dpmpp_2m' for no corrector")
    return f"unipc{config.get('solver_order', 2)}_{config.get('solver_type', 'bh2')}", _final(config, always=True)


def _flow_euler(config: Config) -> tuple[str, dict[str, Any]]:
    return ("ancestral", {}) if config.get("stochastic_sampling") else ("ddim", {})


def _final(config: Config, always: bool = False) -> dict[str, Any]:
    return {"lower_order_final": always or WHEN_SHORT} if config.get("lower_order_final", True) else {}


_EULER, _DDIM = "EulerDiscreteScheduler", "DDIMScheduler"
FAMILIES: dict[str, Family] = {
    "DDIMScheduler": Family(_fixed("ddim"), _DDIM),
    "DDPMScheduler": Family(_fixed("ancestral"), "DDPMScheduler"),
    "PNDMScheduler": Family(_fixed("ipndm4"), _DDIM),
    "EulerDiscreteScheduler": Family(_fixed("ddim"), _EULER),
    "EulerAncestralDiscreteScheduler": Family(_fixed("ancestral"), _EULER),
    "LMSDiscreteScheduler": Family(_fixed("lms4"), _EULER),
    "HeunDiscreteScheduler": Family(_fixed("edm_heun"), _EULER),
    "KDPM2DiscreteScheduler": Family(_fixed("dpm_solver_2"), _EULER),
    "DPMSolverMultistepScheduler": Family(_dpm, DPM),
    "DPMSolverSinglestepScheduler": Family(_singlestep, DPM),
    "DEISMultistepScheduler": Family(_deis, DPM),
    "UniPCMultistepScheduler": Family(_unipc, "UniPCMultistepScheduler"),
    "FlowMatchEulerDiscreteScheduler": Family(_flow_euler, FLOW),
}

# What no plan can do, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "invert_sigmas": (None, False),
    "timestep_type": (None, "discrete"),
    "interpolation_type": (None, "linear"),
}


@cache
def parameters(name: str) -> frozenset[str]:
    """Return the names that a configuration of a scheduler of diffusers holds."""
    return frozenset(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}


@cache
def known_keys() -> frozenset[str]:
    """Return every name that a configuration of the schedulers in `FAMILIES` may hold."""
    return frozenset().union(*map(parameters, FAMILIES))


def source(config: Config) -> Any:
    """Return the scheduler of diffusers that spaces the times of a configuration, and holds its betas."""
    names = parameters(config["times"]) & _SPACING
    given = {name: value for name, value in config.items() if name in names and value is not None}
    return getattr(diffusers, config["times"])(**given)


def schedule_of(config: Config, kind: Any) -> Schedule:
    """Return the noise schedule: flow matching, t = sigma; or that of alphas_cumprod, t = timestep + 1, and t = 0 the data."""
    if is_flow(config):
        return FlowMatching()
    return with_data(kind.alphas_cumprod)


def is_flow(config: Config) -> bool:
    """Tell whether a configuration is one of flow matching."""
    return config["times"] == FLOW or bool(config.get("use_flow_sigmas"))


def ends_at_data(config: Config) -> bool:
    """Tell whether the last step goes to sigma = 0, and not to the smallest noise of the training."""
    return config.get("final_sigmas_type") != "sigma_min" and config.get("set_alpha_to_one") is not False


def grid_of(config: Config, sde: Schedule, steps: int, mu: float | None, sigmas: Any = None) -> Array:
    """Return the times that diffusers' scheduler of the configuration takes for so many steps, and the end; shape (steps + 1,)."""
    kind = source(config)
    options = {"mu": mu} if config.get("use_dynamic_shifting") and mu is not None else {}
    if is_flow(config):
        kind.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}), **options)
        return np.append(kind.sigmas[: len(kind.timesteps)].double().numpy(), 0.0)
    if steps > config["num_train_timesteps"]:
        raise ValueError(f"num_inference_steps={steps!r} is more than the {config['num_train_timesteps']} times of the training")
    kind.set_timesteps(steps, **options)
    if any(config.get(f"use_{name}") for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")):
        return _levels(kind, sde, steps)
    ts = np.append(kind.timesteps.double().numpy()[:steps] + 1, 0.0 if ends_at_data(config) else 1.0)
    return distinct_integers(ts, int(config["num_train_timesteps"]) + 1) if (np.diff(ts) >= 0).any() else ts


def _levels(kind: Any, sde: Schedule, steps: int) -> Array:
    """Return the times of noise levels that a scheduler has set; a level that it repeats at the end would waste an evaluation."""
    sigmas = kind.sigmas.double().numpy()
    if sigmas[-1] == sigmas[-2]:
        kind.set_timesteps(steps + 1)
        sigmas = kind.sigmas.double().numpy()[:-1]
    return time_of_sigmas(sde, sigmas)


def time_of_sigmas(sde: Schedule, sigmas: Any) -> Array:
    """Return the times of noise levels sigma / alpha, which may miss training times, and the greatest, by float32's rounding."""
    ts = np.minimum(sde.t_of_rho(sigmas), sde.t_start)
    return np.where(np.abs(ts - np.rint(ts)) < _ROUNDING, np.rint(ts), ts)
