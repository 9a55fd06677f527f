"""Plans as a scheduler of diffusers: ``pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, method="tab3")``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ..extras import needs

with needs("diffusers", "deis.adapters.diffusers"):
    import torch
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import FrozenDict, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
    from torch import Tensor

from ..arrays import Array, Indices
from ..backends import to_numpy
from ..cut import between, from_call
from ..methods import evaluations_of_steps, get_method, make_plan
from ..methods.layout import Builder, StagedBuilder
from ..methods.published import GridStages
from ..model.checkpoints.pipelines import FLOW, PREDICTS
from ..model.threshold import dynamic_threshold, static_threshold
from ..plan import Plan
from ..run.stepwise import Stepwise
from ..sde import VPSDE, Schedule
from .diffusers_config import (
    DPM,
    FAMILIES,
    SHORT,
    WHEN_SHORT,
    check_spacing,
    ends_at_data,
    grid_of,
    is_flow,
    names_spacing,
    scheduler_of,
    sde_of,
    time_of_sigmas,
    translated,
)
from .levels import FLOAT32


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    r"""A plan as a scheduler of diffusers: each `step` runs one row.

    The state is x = alpha x_0 + sigma eps, as in diffusers' DDIM, DPM-Solver and UniPC (`init_noise_sigma` is 1), or that of flow
    matching. `set_timesteps(n)` makes a plan of n *network evaluations*, and `timesteps` has one entry for each, the stages of
    singlestep methods and of Heun's included. States are carried in float32 or better from step to step.

    Each evaluation is at the time of its noise level. diffusers' own classes keep the level but round some of these times: those of
    Karras' and Lu's spacings, and those of stages between two times. As in diffusers, a time outside the training times is given to
    the network as the first or last of them. Each step ends at the time of the next. (diffusers' DDIM goes back by a whole number
    of training times instead: their number divided by the steps.) No step has length 0, as theirs have where a level is repeated.

    Parameters
    ----------
    method : str
        Any name that `deis.get_method` accepts.
    method_options : dict, optional
        Its options, such as ``{"corrector": 2}``.
    ts_phase, ts_order
        A grid of `deis.make_grid` in place of diffusers' spacing, such as ``ts_phase="vp_t"``. "auto" runs on its own grid, vp_t of
        power 2, unless a spacing is named: by ts_phase, by use_karras_sigmas and the like, by a shift of flow matching, or by a
        timestep_spacing (in a configuration, one that is not the default of its class).
    plan : dict, optional
        The document of a plan to run, see `from_plan`.
    times : str
        The scheduler of diffusers whose `set_timesteps` spaces the times; `from_config` chooses it.
    prediction_type : {"epsilon", "sample", "v_prediction", "flow_prediction"}
    thresholding, dynamic_thresholding_ratio, sample_max_value, clip_sample, clip_sample_range
        As in diffusers; the prediction of x_0 is thresholded, and that of eps follows it, as in diffusers' DDIM with
        use_clipped_model_output=True.
    variance_type : {"learned", "learned_range"}, optional
        Set it if the network returns a variance after the prediction, in channels of its own; the variance is ignored.
    others
        As in the class that `times` names, with its defaults for those that are None.

    Raises
    ------
    ValueError
        For a method, plan, prediction type or setting that there is no plan for; the message says what to give instead.
    """

    _compatibles: ClassVar[list[str]] = list(FAMILIES)
    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
        beta_schedule: str | None = None,
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        method: str = "auto",
        method_options: dict[str, Any] | None = None,
        ts_phase: str | None = None,
        ts_order: float | None = None,
        plan: dict[str, Any] | None = None,
        times: str = DPM,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        variance_type: str | None = None,
        timestep_spacing: str | None = None,
        steps_offset: int | None = None,
        set_alpha_to_one: bool | None = None,
        final_sigmas_type: str | None = None,
        rescale_betas_zero_snr: bool | None = None,
        lambda_min_clipped: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        use_karras_sigmas: bool | None = None,
        use_exponential_sigmas: bool | None = None,
        use_beta_sigmas: bool | None = None,
        use_lu_lambdas: bool | None = None,
        use_flow_sigmas: bool | None = None,
        flow_shift: float | None = None,
        shift: float | None = None,
        use_dynamic_shifting: bool | None = None,
        time_shift_type: str | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        if prediction_type not in PREDICTS:
            raise ValueError(f"prediction_type={prediction_type!r} is unknown; the known ones are {', '.join(map(repr, PREDICTS))}")
        if times not in {family.times for family in FAMILIES.values()}:
            raise ValueError(f"times={times!r} names no scheduler whose times are known; {DPM!r} is the usual one")
        self._forget_unset()
        check_spacing(self.config)
        if plan is not None and is_flow(self.config):
            self.register_to_config(use_flow_sigmas=True)  # tells pipelines to pass no sigmas of their own
        scheduler = scheduler_of(self.config)
        if not is_flow(self.config):
            self.betas, self.alphas, self.alphas_cumprod = scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod
        self.sde: Schedule = sde_of(self.config, scheduler)
        self._given = None if plan is None else Plan.from_document(plan)
        self._shift = 0.0 if is_flow(self.config) else 1.0 if self._given is None else self._shift_of(self._given)
        self._predicts = "flow" if times == FLOW else PREDICTS[prediction_type]
        self._threshold = _threshold(self.config)
        self._builder(0)  # refuses what is unknown
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.as_tensor(scheduler.timesteps)
        self._times = self._starts = np.empty(0)
        self._values: list[float] = []
        self.sigmas = torch.zeros(0)
        self._plan: Plan | None = None
        self._rewind()
        self._begin_index: int | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the scheduler of a configuration of this class or another of diffusers; the latter gives that family's plan.

        Parameters
        ----------
        config : mapping
            Such as ``pipe.scheduler.config``.
        kwargs
            Parameters that replace those of the configuration, such as ``method="tab3"``.

        Raises
        ------
        ValueError
            For an unknown key, or a setting that there is no plan for.
        """
        asked = set(kwargs)
        own = list(inspect.signature(PlanScheduler.__init__).parameters)[1:]
        config, kwargs, left = translated(dict(config or {}), kwargs, own)
        defaults = config.pop("_defaults_of_origin", [])
        made, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        made.register_to_config(**left)
        if defaults:
            kept = set(made.config.get("_use_default_values", [])) - set(left)
            made.register_to_config(_use_default_values=sorted({*kept, *defaults} - asked))
        return (made, unused) if return_unused_kwargs else made

    def _forget_unset(self) -> None:
        """Remove the None values from the configuration: no other class could read them."""
        config = {name: value for name, value in self.config.items() if value is not None}
        if not set(config.get("_use_default_values", ())).intersection(config):
            config.pop("_use_default_values", None)
        self._internal_dict = FrozenDict(config)

    @classmethod
    def from_plan(cls, plan: Plan, config: Any = None, **kwargs: Any) -> Any:
        """Return the scheduler that runs a plan, such as a calibrated one.

        Parameters
        ----------
        plan : Plan
            Made for ``VPSDE.discrete(scheduler.alphas_cumprod)``, for ``scheduler.sde``, or for `FlowMatching`.
        config : mapping, optional
            The pipeline's, such as ``pipe.scheduler.config``: it says what the network predicts, and its schedule.

        Raises
        ------
        ValueError
            If the plan was made for another schedule than the configuration's.
        """
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be a deis.Plan, and is {plan!r}; deis.load_plan reads a file")
        return cls.from_config(config or {}, plan=plan.document(), method="auto", **kwargs)

    def clone(self) -> PlanScheduler:
        """Return a scheduler of the same plan that runs independently, as in another thread; what does not change is shared."""
        other = copy.copy(self)
        other.timesteps = self.timesteps.clone()  # `set_begin_index` may write into it
        other._rewind()
        return other

    # --- the times --------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan that `set_timesteps` made.

        Raises
        ------
        ValueError
            Before `set_timesteps`.
        """
        if self._plan is None:
            raise ValueError("the scheduler has no plan yet; call set_timesteps first")
        return self._plan

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Make the plan, and start at its beginning.

        Parameters
        ----------
        num_inference_steps : int, optional
            The number of network evaluations.
        device : optional
            Where `timesteps` is wanted.
        timesteps, sigmas : sequence, optional
            In place of the number: where steps start, in training times or noise levels (sigma / alpha, or those of flow matching
            before its shift). The last of sigmas is where the last step ends, if it is 0 or the schedule is not flow matching.
        mu : float, optional
            The dynamic shift of a flow-matching pipeline.

        Raises
        ------
        ValueError
            Where the arguments contradict each other, the plan, or the number of training times.
        """
        if num_inference_steps is not None and (isinstance(num_inference_steps, bool) or num_inference_steps < 1):
            raise ValueError(f"num_inference_steps={num_inference_steps!r} must be a whole number of at least 1")
        given = [name for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None]
        if len(given) > 1 or (num_inference_steps is None and not given and self._given is None):
            raise ValueError("give num_inference_steps, timesteps or sigmas: one of them")
        plan = self._make(num_inference_steps, timesteps, sigmas, mu)
        starts = len(timesteps if timesteps is not None else sigmas) if given else plan.nfe
        if num_inference_steps not in (None, plan.nfe, starts):
            raise ValueError(
                f"num_inference_steps={num_inference_steps!r} contradicts "
                + (f"the {starts} {given[0]}" if given else f"the plan {plan.method!r}, which makes {plan.nfe} evaluations")
                + "; leave one of them out"
            )
        self._use(plan, device)

    def _make(self, steps: int | None, timesteps: Any, sigmas: Any, mu: float | None) -> Plan:
        if self._given is not None:
            if timesteps is not None or sigmas is not None:
                raise ValueError("the plan was given and has times of its own; leave timesteps and sigmas out")
            return self._given
        if timesteps is not None:
            return self._built(self._own_times("timesteps", timesteps))
        if sigmas is not None and not is_flow(self.config):
            return self._built(time_of_sigmas(self.sde, _falling("sigmas", sigmas)))
        if sigmas is not None:
            sigmas = _falling("sigmas", sigmas)
            return self._built(grid_of(self.config, self.sde, len(sigmas), mu, sigmas[:-1] if sigmas[-1] == 0 else sigmas))
        steps, most = int(steps or 0), self.config.num_train_timesteps
        if steps > most and not is_flow(self.config):
            raise ValueError(f"num_inference_steps={steps!r} is more than the {most} times of the training")
        if self.config.get("ts_phase") is not None:
            return make_plan(
                self._span(), self._builder(steps), None, self.config.get("ts_phase"), self.config.get("ts_order"), nfe=steps
            )
        if self.config.method == "auto" and not names_spacing(self.config):
            return make_plan(self._span(), "auto", nfe=steps, **self._options(steps))
        counts = evaluations_of_steps(self._builder(steps), steps, is_flow(self.config) or ends_at_data(self.config))
        return self._built(grid_of(self.config, self.sde, len(counts), mu), steps)

    def _built(self, ts: Array, nfe: int | None = None) -> Plan:
        return make_plan(self.sde, self._builder(len(ts) - 1), ts=ts, nfe=nfe)

    def _span(self) -> Schedule:
        """Return the schedule, down to the smallest noise of the training where the configuration ends there."""
        return self.sde if is_flow(self.config) or ends_at_data(self.config) else self.sde.between(end=1.0)

    def _builder(self, steps: int) -> Builder:
        return get_method(self.config.method, **self._options(steps))

    def _options(self, steps: int) -> dict[str, Any]:
        options = dict(self.config.get("method_options", {}))
        if options.get("lower_order_final") == WHEN_SHORT:
            options["lower_order_final"] = steps < SHORT
        return options

    def _own_times(self, argument: str, timesteps: Any) -> Array:
        """Return the times of the user's timesteps, and the end."""
        values = _falling(argument, timesteps)
        most = self.config.num_train_timesteps
        if is_flow(self.config):
            return np.append(values / most, 0.0) if values[-1] > 0 else values / most
        if values[0] > most - 1 or values[-1] < 0:
            raise ValueError(f"{argument} must lie in 0 ... {most - 1}, and is {values.tolist()}")
        return np.append(values + 1, 0.0 if ends_at_data(self.config) or values[-1] == 0 else 1.0)

    def _use(self, plan: Plan, device: Any) -> None:
        """Take a plan, and lay out what the loop reads from it."""
        if plan.alpha[0] == 0 and self._predicts == "eps":
            raise ValueError(
                "prediction_type='epsilon' does not determine the data where alpha is 0, at the last training time of "
                "rescale_betas_zero_snr; use a network of 'v_prediction' or 'sample', or timestep_spacing='leading'"
            )
        Stepwise(plan, self._predicts, self._threshold)  # refuses what cannot run, before the network is called
        self._plan = plan
        times = self._timestep_of(plan.t[:-1][plan.calls])
        whole = bool((times == np.rint(times)).all()) and not is_flow(self.config)
        self.timesteps = torch.from_numpy(times).to(device=device, dtype=torch.int64 if whole else torch.float32)
        self._lay_out(0, plan)
        self.num_inference_steps, self._begin_index = plan.nfe, None
        self._rewind()

    def _lay_out(self, first: int, rest: Plan) -> None:
        """Replace the rest of the plan, from an evaluation on, by another; write its times and levels after the earlier ones."""
        self._rest = (first, rest)
        parts = [(self.plan, slice(0, first)), (rest, slice(None))]
        self._times = np.concatenate([plan.t[:-1][plan.calls][chosen] for plan, chosen in parts])
        states = [_states(plan)[chosen] for plan, chosen in parts]
        self._starts = np.concatenate([plan.t[rows] for rows, (plan, _) in zip(states, parts, strict=True)])
        self._values = self._timestep_of(self._times).tolist()
        self.timesteps.copy_(torch.tensor(self._values))
        tiny = np.finfo(float).tiny
        levels = [plan.sigma if is_flow(self.config) else plan.sigma / np.maximum(plan.alpha, tiny) for plan, _ in parts]
        own = [level[rows] for level, rows in zip(levels, states, strict=True)]
        self.sigmas = torch.from_numpy(np.concatenate([*own, levels[1][-1:]])).float()

    def _timestep_of(self, t: Array) -> Array:
        """Return the training times of a plan's times."""
        most = self.config.num_train_timesteps
        return t * most if is_flow(self.config) else np.clip(t - self._shift, 0, most - 1)

    def _shift_of(self, plan: Plan) -> float:
        """Return the offset of a given plan's times from the training times: 1, or 0 without a noise-free end."""
        if plan.matches(self.sde, FLOAT32):
            return 1.0
        if not is_flow(self.config) and plan.matches(VPSDE.discrete(self.alphas_cumprod), FLOAT32):
            return 0.0
        raise ValueError(
            f"the plan {plan.method!r} was made for the schedule {plan.schedule!r}, whose noise levels are not those of the "
            f"pipeline's at its times; make one for deis.VPSDE.discrete(scheduler.alphas_cumprod), or for scheduler.sde"
        )

    # --- the loop ---------------------------------------------------------------------------------------------------------

    def _rewind(self) -> None:
        """Forget the run so far."""
        self._step_index: int | None = None
        self._run: Stepwise | None = None

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The number of the step with which the run begins, if `set_begin_index` gave one; else None."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the entry of `timesteps` with which the run begins, as image-to-image pipelines do.

        The rest of a calibrated plan is made anew (`deis.cut_plan`). Its times replace the later entries of `timesteps` in place,
        so that the slices which a pipeline took before this call have them, too.
        """
        self._begin_index = begin_index
        plan = self._plan
        if plan is None or not plan.provenance or not 0 <= begin_index < plan.nfe:
            return
        rest = between(plan, self._own_schedule(), float(plan.t[_states(plan)[begin_index]]), None)
        times = self._timestep_of(rest.t[:-1][rest.calls])
        fits = rest.nfe == plan.nfe - begin_index and (self.timesteps.is_floating_point() or (times == np.rint(times)).all())
        self._lay_out(*((begin_index, rest) if fits else (0, plan)))

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Return the number of an entry of `timesteps`; one of the tensor's own entries is found without waiting for its device.

        Raises
        ------
        ValueError
            If it is not an entry.
        """
        own = self.timesteps if schedule_timesteps is None else schedule_timesteps
        if isinstance(timestep, Tensor) and timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
            return (timestep.storage_offset() - own.storage_offset()) // (own.stride(0) or 1)
        value = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        values = self._values if own is self.timesteps else own.tolist()
        place = self._place_of(value, values)
        if place is None:
            raise ValueError(f"timestep={value!r} is none of the scheduler's, which are {values}")
        return place

    def _place_of(self, timestep: float, values: list[float] | None = None) -> int | None:
        """Return the number of the entry with this value; if several have it, the next one or the first; None if there is none."""
        array = np.array(self._values if values is None else values)
        near: list[int] = np.flatnonzero(np.abs(array - timestep) <= 1e-6 * max(abs(timestep), 1.0)).tolist()
        following = self._begin_index if self._step_index is None else self._step_index
        return following if following in near else near[0] if near else None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample: the network sees the state itself."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Run the row of the plan that this evaluation belongs to.

        Parameters
        ----------
        model_output : Tensor
            What the network returned at (sample, timestep).
        timestep : Tensor or number
            The entry of `timesteps`.
        sample : Tensor
            The state; it may have been changed since the last step, as inpainting does.
        generator : torch.Generator or list of them, optional
            For stochastic plans.
        return_dict : bool
            Return an object with `prev_sample`, or a tuple of it.

        Raises
        ------
        ValueError
            Before `set_timesteps`, out of order, after the end, or if the network's output does not have the sample's shape.
        """
        i = self._expected(timestep)
        assert self._run is not None
        m = self._prediction_of(model_output, sample)
        x = self._run.step(m, sample, _noise(generator) if self._run.plan.stochastic else None)
        self._step_index = i + 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _expected(self, timestep: Any) -> int:
        """Return the number of the step, which must be the next."""
        plan, i = self.plan, self.index_for_timestep(timestep)
        if self._step_index is None:
            self._begin(i if self._begin_index is None else self._begin_index)
        if self._step_index == plan.nfe:
            raise ValueError(f"step was called after the last of {plan.nfe} steps; call set_timesteps to start again")
        if i != self._step_index:
            raise ValueError(
                f"step was called at timestep={self._values[i]!r}, number {i}, and number {self._step_index} is next; each has "
                "one step, in order (set_timesteps starts again, clone() gives another thread a scheduler of its own)"
            )
        return i

    def _begin(self, first: int) -> None:
        """Begin a run; one that begins with a later step takes the rest of the plan, as there are no earlier predictions."""
        plan = self.plan
        if not 0 <= first < plan.nfe:
            raise ValueError(f"begin_index={first!r} must lie in 0 ... {plan.nfe - 1}")
        left = self._rest[1] if self._rest[0] == first else self._left(plan, first)
        self._step_index, self._run = first, Stepwise(left, self._predicts, self._threshold)

    def _left(self, plan: Plan, first: int) -> Plan:
        """Return the rest of a plan: the plan cut or, if a multistep method was named, the method on the remaining times."""
        builder = self._builder(plan.num_step)
        if self._given is not None or isinstance(builder, StagedBuilder):
            return from_call(plan, self._own_schedule(), first)
        if isinstance(builder, GridStages):
            builder = replace(builder, skipped=first)
        return make_plan(self.sde, builder, ts=plan.t[first:], nfe=plan.nfe - first)

    def _own_schedule(self) -> Schedule:
        """Return the schedule of the plan: the scheduler's, or the same without a noise-free end."""
        return self.sde if is_flow(self.config) or self._shift == 1 else VPSDE.discrete(self.alphas_cumprod)

    def _prediction_of(self, m: Tensor, sample: Tensor) -> Tensor:
        if self.config.get("variance_type") in ("learned", "learned_range") and m.ndim > 1 and m.shape[1] == 2 * sample.shape[1]:
            m = m[:, : sample.shape[1]]
        if m.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(m.shape)} for a sample of {tuple(sample.shape)}; for a network that predicts a "
                "variance, too, set variance_type='learned_range'"
            )
        return m

    # --- noise ------------------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Return alpha x_0 + sigma noise at training times of shape (batch,) or ().

        Raises
        ------
        ValueError
            Where a time lies outside the training's.
        """
        t = np.atleast_1d(to_numpy(timesteps))
        most = self.config.num_train_timesteps
        if not ((t >= 0) & (t <= (most if is_flow(self.config) else most - 1))).all():
            raise ValueError(f"timesteps={t.tolist()} must lie within the training's {most} times")
        shape = (-1, *(1,) * (original_samples.ndim - 1))
        alpha, sigma = (torch.from_numpy(level).to(original_samples).reshape(shape) for level in self._levels_of(t))
        return alpha * original_samples + sigma * noise

    def _levels_of(self, timesteps: Array) -> tuple[Array, Array]:
        """Return alpha and sigma at training times: of the plan at its own times, which may lie between, else of the table."""
        flow = is_flow(self.config)
        times = timesteps / self.config.num_train_timesteps if flow else timesteps + 1.0
        for i, t in enumerate(timesteps.tolist()):
            place = self._place_of(t)
            times[i] = times[i] if place is None else self._starts[place] + (0 if flow else 1 - self._shift)
        alpha, sigma = self.sde.alpha(times), self.sde.sigma(times)
        if flow:
            return alpha, sigma
        whole = (times == np.rint(times)) & (times <= self.config.num_train_timesteps)
        abar = self.alphas_cumprod.double().numpy()[times[whole].astype(int) - 1]
        alpha[whole], sigma[whole] = np.sqrt(abar), np.sqrt(1 - abar)
        return alpha, sigma

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """Return `add_noise`, as flow-matching pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _noise(generator: Any) -> Callable[[float, Tensor], Tensor]:
    def add_noise(keep_z: float, x: Tensor) -> Tensor:
        z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return torch.add(x, z, alpha=keep_z)

    return add_noise


def _states(plan: Plan) -> Indices:
    """Return for each evaluation the row of its state's noise level; for the first it is the start, even if its time is later."""
    return np.append(0, np.flatnonzero(plan.calls)[1:])


def _falling(argument: str, values: Any) -> Array:
    falling = np.asarray(values, dtype=np.float64)
    if falling.ndim != 1 or len(falling) < 1 or not (np.diff(falling) < 0).all():
        raise ValueError(f"{argument} must be numbers that fall strictly, and are {falling.tolist()}")
    return falling


def _threshold(config: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    if config["thresholding"] and config["sample_max_value"] < 1:
        # diffusers clamps a quantile to at least 1 and at most a smaller number; torch then takes the latter
        clip = static_threshold(config["sample_max_value"])
        return lambda x_0: clip(x_0) / config["sample_max_value"]
    if config["thresholding"]:
        return dynamic_threshold(config["dynamic_thresholding_ratio"], most=config["sample_max_value"])
    return static_threshold(config["clip_sample_range"]) if config["clip_sample"] else None
