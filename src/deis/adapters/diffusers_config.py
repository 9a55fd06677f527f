"""Configurations of diffusers' schedulers: the plan that each stands for, and its times."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
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
# Settings of the times, not of the method.
_SPACING = frozenset(
    """
    num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr timestep_spacing steps_offset
    final_sigmas_type set_alpha_to_one lambda_min_clipped sigma_min sigma_max use_karras_sigmas use_exponential_sigmas
    use_beta_sigmas use_lu_lambdas use_flow_sigmas flow_shift shift use_dynamic_shifting time_shift_type shift_terminal
    """.split()  # noqa: SIM905
)
_LEVEL_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_ROUNDING = 1e-5  # of noise levels in float32, relative
_NOT_OF_FLOW = (
    "trained_betas", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr", "timestep_spacing", "steps_offset",
    "set_alpha_to_one", "lambda_min_clipped", "use_lu_lambdas",
)  # fmt: skip
"""Settings that do not apply to the times of flow matching."""
_OWN_CLASS = "PlanScheduler"
_OURS = ("method", "method_options", "ts_phase", "ts_order", "plan", "times")
_LOADING = {"subfolder", "revision", "cache_dir", "force_download", "token", "local_files_only", "dtype", "torch_dtype"}
SHORT = 15
WHEN_SHORT = f"below {SHORT} steps"
"""For the option lower_order_final: the rule of diffusers' DPM-Solver and DEIS."""


class Family(NamedTuple):
    """A scheduler of diffusers."""

    method: Callable[[Config], tuple[str, dict[str, Any]]]
    """The name and options of its method, from its configuration."""
    times: str
    """The class whose `set_timesteps` spaces its times."""


def _fixed(name: str, **options: Any) -> Callable[[Config], tuple[str, dict[str, Any]]]:
    return lambda config: (name, options)


def _step(name: str) -> Callable[[Config], tuple[str, dict[str, Any]]]:
    """Return a one-step method, in the data form if alpha starts at 2^-12 or less: eps / alpha would lose four digits."""

    def method(config: Config) -> tuple[str, dict[str, Any]]:
        tiny = config.get("rescale_betas_zero_snr") or config.get("beta_schedule") == "squaredcos_cap_v2"
        return name, {"form": "data"} if tiny else {}

    return method


_ddim, _ancestral = _step("ddim"), _step("ancestral")


def _deis(config: Config) -> tuple[str, dict[str, Any]]:
    """The paper's method with as many predictions; the polynomial of diffusers' class of this name is in log rho."""
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

# Settings that no plan can follow, and the values that leave them off.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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


def _parameters(name: str) -> frozenset[str]:
    """Return the names that a configuration of a scheduler of diffusers holds."""
    return frozenset(signature(name))


@cache
def _known_keys() -> frozenset[str]:
    """Return every name that a configuration of the schedulers in `FAMILIES` may hold."""
    return frozenset().union(*map(_parameters, FAMILIES))


def scheduler_of(config: Config, name: str | None = None) -> Any:
    """Return the scheduler of diffusers that holds the betas of a configuration, or the one of a name, with its settings.

    Raises
    ------
    ValueError
        If that class does not support the beta_schedule.
    """
    kind = getattr(diffusers, name or config["times"])
    names = _parameters(kind.__name__) & _SPACING
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
    """Return the noise schedule: of flow matching with t = sigma; or of alphas_cumprod with t = timestep + 1, and data at t = 0.

    If the levels start beyond those of the training, at sigma_max, that is one more time, N + 1.
    """
    if is_flow(config):
        return FlowMatching(shift=float(config.get("shift" if config["times"] == FLOW else "flow_shift") or 1.0))
    abar, most = scheduler.alphas_cumprod.double().numpy(), config.get("sigma_max")
    if _levels_asked(config) and most is not None and 1 / (1 + most**2) < abar[-1]:
        abar = np.append(abar, 1 / (1 + most**2))
    return with_data(abar)


def is_flow(config: Config) -> bool:
    """Return whether a configuration is one of flow matching."""
    return config.get("times") == FLOW or bool(config.get("use_flow_sigmas"))


def _levels_asked(config: Config) -> list[str]:
    """Return the settings that space noise levels in place of times."""
    return [name for name in _LEVEL_SPACINGS if config.get(name)]


def _spacing_of(config: Config) -> str:
    """Return the scheduler of diffusers that spaces the times: the one that `times` names, or DPM-Solver's for what it lacks."""
    own = config.get("times", DPM)
    return own if _parameters(own).issuperset(_levels_asked(config)) else DPM


def _unread(config: Config) -> set[str]:
    """Return the spacing settings that neither this library reads, nor the class that spaces the configuration's times."""
    return set(_SPACING) - _parameters(_spacing_of(config)) - {"final_sigmas_type", "sigma_min", "sigma_max", "use_flow_sigmas"}


def names_spacing(config: Config) -> bool:
    """Return whether a configuration says how to space the times, and does not leave that to the method."""
    shifts = (config.get(name) not in (None, 1.0) for name in ("shift", "flow_shift"))
    others = ("timestep_spacing", "use_dynamic_shifting", "shift_terminal")
    return bool(_levels_asked(config)) or any(shifts) or any(config.get(name) for name in others)


def ends_at_data(config: Config) -> bool:
    """Return whether the last step goes to sigma = 0, and not to the smallest noise of the training."""
    one = config.get("set_alpha_to_one") is not False or "set_alpha_to_one" not in _parameters(_spacing_of(config))
    return one and config.get("final_sigmas_type") != "sigma_min"


def grid_of(config: Config, sde: Schedule, steps: int, mu: float | None, sigmas: Any = None) -> Array:
    """Return the times that diffusers' scheduler of the configuration takes for so many steps, and the end; shape (steps + 1,)."""
    scheduler = scheduler_of(config, _spacing_of(config))
    options = {"mu": mu} if config.get("use_dynamic_shifting") and mu is not None else {}
    if is_flow(config):
        scheduler.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}), **options)
        return np.append(scheduler.sigmas[: len(scheduler.timesteps)].double().numpy(), 0.0)
    scheduler.set_timesteps(steps, **options)
    if _levels_asked(config):
        return time_of_sigmas(sde, _sigmas_of(scheduler, sde, steps, ends_at_data(config)))
    end = 0.0 if ends_at_data(config) else 1.0
    ts = np.append(_once(scheduler, scheduler.timesteps)[:steps] + 1, end)
    if (np.diff(ts) < 0).all():
        return ts
    return distinct_integers(ts - end, int(config["num_train_timesteps"] + 1 - end)) + end


def _once(scheduler: Any, values: Any) -> Array:
    """Return what a scheduler has set, without the second entry that Heun's has for every time but the first."""
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
    """Return the times of noise levels sigma / alpha; float32 may round them off the training times, and past the greatest."""
    ts = sde.t_of_rho(sigmas)
    whole = np.rint(ts)
    ts = np.where(np.isclose(sde.rho(whole), sigmas, _ROUNDING, 0), whole, ts)
    assert sde.num_times is not None
    return np.where(ts >= sde.t_start, sde.num_times - 1.0, ts)


def check_spacing(config: Config) -> None:
    """Raise ValueError if two settings space the times, or one does not apply to them."""
    levels = _levels_asked(config)
    if config.get("ts_phase") is not None and levels:
        raise ValueError(
            f"ts_phase={config['ts_phase']!r} and {levels[0]}=True name two grids; give ts_phase=None or {levels[0]}=False"
        )
    if not is_flow(config):
        return
    for name in _NOT_OF_FLOW:
        if config.get(name) is not None:
            raise ValueError(f"{name}={config[name]!r} does not apply to flow matching, whose times have a shift; leave it out")
    if config.get("final_sigmas_type") == "sigma_min":
        raise ValueError("final_sigmas_type='sigma_min' has no meaning for flow matching, which ends at the data; leave it out")


def translated(
    config: dict[str, Any], kwargs: dict[str, Any], own: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a configuration and the arguments that replace it, as `PlanScheduler` reads them, and what other classes may read.

    `own` are the parameters of `PlanScheduler`.
    """
    origin = config.get("_class_name") or _class_of(config, "method" in kwargs)
    unknown = {name for name in {*config, *kwargs} if not name.startswith("_")} - _known_keys() - set(own) - _LOADING
    if unknown:
        raise ValueError(f"the configuration has the unknown keys {sorted(unknown)}; a scheduler's config.json has none of these")
    for name, allowed in _UNSUPPORTED.items():
        if config.get(name) not in allowed:
            raise ValueError(f"{name}={config[name]!r} has no plan; only {allowed[-1]!r} has")
    if origin != _OWN_CLASS:
        config, kwargs = _of_family(origin, config, kwargs)
    elif kwargs.get("method") not in (None, config.get("method")):  # the settings of the method before
        config = {name: value for name, value in config.items() if name not in ("method_options", "plan")}
    merged = {**config, **kwargs}
    usual = signature(merged.get("times", DPM)).get("timestep_spacing")
    if kwargs.get("method") == "auto" != config.get("method") and config.get("timestep_spacing") == usual:
        config.pop("timestep_spacing", None)  # it may be a default: a saved configuration does not tell defaults from choices
    for name in _unread(merged).intersection(name for name, value in kwargs.items() if value not in (None, False)):
        raise ValueError(
            f"{name}={kwargs[name]!r} does not apply to the times of a configuration of {merged.get('times', DPM)}; leave it out"
        )
    inert = {*_NOT_OF_FLOW, *({"final_sigmas_type"} - set(signature(merged.get("times", DPM))))} if is_flow(merged) else set()
    left = {name: config.pop(name) for name in inert.intersection(config).difference(kwargs) if config[name] is not None}
    return config, kwargs, left


def _of_family(origin: str, config: dict[str, Any], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration of another class, and the arguments, with the method and the times that it stands for."""
    if origin not in FAMILIES:
        raise ValueError(f"a configuration of {origin!r} has no plan; the known ones are {', '.join(map(repr, FAMILIES))}")
    family = FAMILIES[origin]
    config = {name: value for name, value in config.items() if name not in _OURS}  # an earlier PlanScheduler's
    if kwargs.get("method") is None:
        name, options = family.method({**config, **kwargs})
        kwargs = kwargs | {"method": name} | ({"method_options": options} if options else {})
    # The origin's defaults keep their meaning here, and count as defaults again for the next class.
    config["_defaults_of_origin"] = config.pop("_use_default_values", [])
    return config, {"times": family.times} | kwargs


def _class_of(config: Config, any_method: bool) -> str:
    """Return the class of a configuration without a name, one that was never saved: its own parameters come first, in their order.

    Raises
    ------
    ValueError
        If classes of several methods have these parameters, and the choice matters.
    """
    names = [name for name in config if not name.startswith("_")]
    orders = {family: list(signature(family)) for family in FAMILIES}
    alike = [family for family, own in orders.items() if names[: len(own)] == own or set(names) == set(own)]
    alike = [family for family in alike if len(orders[family]) == max(len(orders[name]) for name in alike)]
    if len(alike) > 1 and not any_method:
        raise ValueError(f"the configuration may be that of {' or '.join(alike)}; give it _class_name, as saving it does")
    return alike[0] if alike else _OWN_CLASS
