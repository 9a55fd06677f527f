"""Calibration, stage by stage: `calibrate`, and its records."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import flag, function, kind, number, one_of, whole
from ..methods.layout import Builder
from ..plan import Plan, load_plan
from ..quadrature import Form
from ..run.options import progress_bar
from .clock import Clock, TimeIsUp
from .grid import Jumps
from .judge import LOSSES, Judge, Loss, Verdict, end_of
from .network import Model
from .report import provenance
from .search import search_of
from .stages import NEEDS, SHARES, STAGES, Task, checked_stages
from .table import Table
from .teacher import FIRST_STEPS, PILOTS, Teacher, make_teacher, refuse_rough


def calibrate(
    plan: Plan | list[Plan] | tuple[Plan, ...],
    model: Model,
    samples: Any = None,
    *,
    condition: Any = None,
    teacher: Teacher | int | None = None,
    stages: Sequence[str] = ("grid", "least_squares", "gauss_newton"),
    validation: float = 0.25,
    method: str | Builder | None = None,
    window: int | None = None,
    times: bool = True,
    iterations: int = 10,
    loss: Loss = "robust",
    steps: int = 300,
    batch: int = 64,
    seconds: float | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
    allow_rough: bool = False,
) -> Plan:
    """Fit a plan's times and coefficients to a model: the same number of evaluations, nearer to the exact solution.

    The plan is read as x_{i+1} = a_i x_i + sum_j c_ij p_{i-j} (`Table`). Its numbers are fitted to the teacher, which is a set of
    converged trajectories of the model from the given noise. Let e be the root mean square distance of a sample's final state to
    the teacher's. The loss is the mean of log(e^2 + c^2) over the validation samples, with c a tenth of the median of e for the
    best plan to start from. The result of a stage is kept if this loss is lower. The report has the standard error of the
    difference, sample by sample, and the median of e.

    Parameters
    ----------
    plan : Plan, or list or tuple of them
        Where to start: a deterministic plan of any method, with the wanted number of evaluations. Several (methods, grids,
        analytical first steps) race in the stage "least_squares", and the best goes on.
    model : Denoiser or Pretrained
        The model to sample, with its guidance. With a condition: a function that takes the conditions of some samples and returns
        one, such as ``network.conditional`` or ``lambda labels: network.conditional(labels, guidance=2.0)``.
    samples : array of shape (N, ...)
        Noise, as `deis.sample` takes it, in the model's framework: a torch.Tensor, a jax.Array or a numpy.ndarray. Some 64 to 256
        samples of an image network suffice. Data x_0 of your own may take part as alpha x_0 + sigma eps at the plan's start.
    condition : array of shape (N, ...), optional
        What each sample is conditioned on, such as its label.
    teacher : Teacher or int, optional
        One made by `deis.make_teacher` for this model, to be used for several plans: it brings its samples. Or a number of steps.
        By default the steps are doubled until the final states settle.
    stages : sequence of str
        "grid": times by dynamic programming (`deis.calibration.teacher_grid`), and others without a model. "least_squares":
        coefficients step by step (`deis.calibration.regression.fit_rows`), for every plan on every grid found, by few samples first
        (`deis.calibration.search.Race`), and then with single times of the best ones moved. "gauss_newton": all coefficients and
        times at once, on the final states, without derivatives of the model (`deis.calibration.gauss_newton.fit_ends`).
        "gradient": all of them by Adam and back-propagation through the model, for any loss
        (`deis.calibration.gradient.fit_gradient`).
    validation : float
        The share of the samples, the last ones, that the fit does not see.
    method : str or callable, optional
        The method by which plans are built on other times; by default the one that the plan names. The stage "grid" needs it.
    window : int, optional
        The number of predictions that a row may use; by default all earlier ones.
    times : bool
        Let "gauss_newton" and "gradient" move the times, that of the first call included: "gauss_newton" puts a row in front that
        makes no call and passes the noise on (`Plan.hands_on`).
    iterations : int
        The most Gauss-Newton iterations.
    loss : {"robust", "huber", "l1", "l2"} or callable
        Of the stage "gradient", see `deis.calibration.judge.sample_losses`. Or a function (x_0, target) -> shape (batch,) in the
        model's framework, such as LPIPS; its mean then judges every stage, and its median is the error.
    steps : int
        The most steps of Adam in the stage "gradient".
    batch : int
        Samples per call of the model.
    seconds : float, optional
        The wall time for everything; by default there is no limit. Stages and iterations stop in time, by the pace of the earlier
        evaluations, and the best plan found by then is kept.
    folder : path, optional
        Where to keep the teacher and the plan of each finished stage. An interrupted calibration resumes from there, and so does
        one that ran out of time.
    progress : bool
        Show a tqdm bar of the evaluations.
    allow_rough : bool
        Accept a teacher that has not converged, or is no nearer to the solution than the plan.

    Returns
    -------
    Plan
        With the numbers of each stage in `plan.provenance`, which `deis.calibration_report(plan)` prints.

    Raises
    ------
    ValueError
        If the model is not deterministic; the plan is stochastic or made for another schedule; there are too few samples for its
        coefficients; the teacher diverges, has not converged or is less accurate than the plan; a stage lacks what it needs; or the
        seconds do not suffice for the first stage.
    MemoryError
        Where a batch does not fit the device.
    """
    plans = list(plan) if isinstance(plan, list | tuple) else [plan]
    check_plans(plans)
    settings = Settings(stages, validation, method, window, times, iterations, loss, steps)
    with clock_of(seconds, progress, f"calibrating {plans[0].method}") as clock:
        made = {"condition": condition, "batch": batch, "folder": folder}
        return calibrated(plans, Shared.of(teacher, model, samples, clock, allow_rough, made), settings)


@contextmanager
def clock_of(seconds: float | None, progress: bool, about: str) -> Iterator[Clock]:
    """Start a clock, with a bar where one is wanted."""
    seconds = math.inf if seconds is None else number("seconds", seconds, above=0)
    flag("progress", progress)
    if progress:
        with progress_bar(about, "sample") as bar:
            yield Clock(seconds, bar)
    else:
        yield Clock(seconds)


@dataclass(frozen=True)
class Settings:
    """The settings of a fit, the same for every plan; see `calibrate`."""

    stages: Sequence[str] = ("grid", "least_squares", "gauss_newton")
    validation: float = 0.25
    method: str | Builder | None = None
    window: int | None = None
    times: bool = True
    iterations: int = 10
    loss: Loss = "robust"
    steps: int = 300

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {name: whole(name, getattr(self, name)) for name in ("iterations", "steps")}
        checked |= {"stages": checked_stages(self.stages), "validation": number("validation", self.validation)}
        checked["window"] = None if self.window is None else whole("window", self.window)
        flag("times", self.times)
        if callable(self.loss):
            function("loss", self.loss, "x_0", "target")
        else:
            one_of("loss", self.loss, LOSSES, ", or a function (x_0, target)")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass
class Shared:
    """What the plans of several budgets share: the teacher and its jumps, the time, and where finished stages are kept."""

    teacher: Teacher
    clock: Clock
    folder: Path | None
    allow_rough: bool
    told: tuple[int, float]
    """The evaluations and the seconds that the teacher took."""
    jumps: dict[tuple[Form, float | None], Jumps] = field(default_factory=dict)

    @classmethod
    def of(
        cls, teacher: Teacher | int | None, model: Model, samples: Any, clock: Clock, allow_rough: bool, made: dict[str, Any]
    ) -> Shared:
        """Make the teacher, or take the given one; the clock stops what takes too long."""
        if not isinstance(teacher, Teacher | None):
            whole("teacher", teacher)
        clock.strict = True
        try:
            found, before = _teacher(teacher, model, samples, allow_rough, made | {"progress": clock})
        except TimeIsUp:
            steps = teacher if isinstance(teacher, int) else 2 * FIRST_STEPS
            needed = clock.needs(steps * (len(samples) + 1.5 * min(PILOTS, len(samples))))
            raise TooFewSecondsError(
                f"seconds={clock.seconds:g} are too short for the teacher, which takes {needed:.2g} s or more: {steps} steps of "
                f"{len(samples)} samples at {clock.needs(1):.2g} s per evaluation; give more seconds, or fewer samples"
            ) from None
        clock.strict = False
        folder = made["folder"]
        told = (found.network.evaluations - before, clock.spent)
        return cls(found, clock, None if folder is None else Path(folder), allow_rough, told)


class TooFewSecondsError(ValueError):
    """The time does not suffice for the first stage."""


def _teacher(
    given: Teacher | int | None, model: Model, samples: Any, allow_rough: bool, made: dict[str, Any]
) -> tuple[Teacher, int]:
    """Return the given teacher, or a new one, and the evaluations that it had already used."""
    if not isinstance(given, Teacher):
        return make_teacher(model, samples, steps=given, allow_rough=allow_rough, **made), 0
    if samples is not None or made["condition"] is not None:
        raise ValueError("samples and condition come with the teacher; leave them out, or the teacher")
    if model is not given.network.model:
        raise ValueError("teacher was made for another model; make one for this with deis.make_teacher(model, samples)")
    if not allow_rough:
        refuse_rough(given)
    given.network.progress = made["progress"]
    return given, given.network.evaluations


def calibrated(plans: Sequence[Plan], shared: Shared, settings: Settings) -> Plan:
    """Return the best plan that the stages make of these."""
    teacher, stages = shared.teacher, settings.stages
    for plan in plans:
        if not plan.matches(teacher.sde):
            raise ValueError(
                f"plan was made for the schedule {plan.schedule!r}, the model for {teacher.sde.name!r}; alpha and sigma differ "
                "at its times; make one with deis.make_plan(model.sde, ...)"
            )
    fit = split(plans, teacher.network.x_T.shape, settings.validation)
    searches = [search_of(plan, settings.method, teacher, shared.jumps) for plan in plans]
    ends = [end_of(teacher, search.given, fit) for search in searches]
    judge = Judge.of(teacher, fit, settings.loss, ends)
    verdicts = [judge.of_ends(end) for end in ends]
    best = min(range(len(ends)), key=lambda k: verdicts[k].loss)
    start = searches[best].given
    options = (settings.times, settings.iterations, settings.steps)
    task = Task(teacher, searches, fit, settings.window, judge, shared.clock, *options)
    run = _Run(task, start, verdicts[best], shared.folder, list(start.provenance.get("stages", [])))
    shared.clock.cut = False
    run.start(shared)
    for k, name in enumerate(stages):
        run.stage(name, SHARES[name] / sum(SHARES[later] for later in stages[k:]))
    return run.best


@dataclass
class _Run:
    """A calibration in progress: the best plan so far, its verdict, and the records of its stages."""

    task: Task
    best: Plan
    verdict: Verdict
    folder: Path | None
    records: list[dict[str, Any]]
    done: list[str] = field(default_factory=list)

    def start(self, shared: Shared) -> None:
        """Compare the best plan to start from with the teacher."""
        teacher, error = self.task.teacher, self.verdict.error
        if not np.isfinite(error):
            raise ValueError(f"the plan {self.best.method!r} itself diverges on this model; start from another, such as 'ddim'")
        if not shared.allow_rough and teacher.self_error > 0.5 * error:
            raise ValueError(
                f"the teacher is too coarse: its final states move by {teacher.self_error:.2g} when its steps are doubled, and the "
                f"plan is within {error:.2g} of it already; make a teacher of more than {len(teacher.t) - 1} steps, or "
                "give allow_rough=True"
            )
        self.note("teacher", self.verdict, *shared.told)

    def note(self, name: str, before: Verdict, evaluations: int, seconds: float) -> None:
        """Record a stage: how it was judged before and after, the evaluations of each sample, and the time it took."""
        after = self.verdict
        losses = {"loss_before": before.loss, "loss_after": after.loss, "standard_error": after.standard_error(before)}
        numbers = {"evaluations": evaluations / len(self.task.teacher.states[0]), "seconds": round(seconds, 1)}
        cut = {"cut": True} if self.task.clock.cut else {}
        self.records.append({"stage": name, "before": before.error, "after": after.error, **losses, **numbers, **cut})

    def stage(self, name: str, share: float) -> None:
        """Run one stage in its share of the time, and keep its plan if the mean loss is lower."""
        clock, network, before = self.task.clock, self.task.teacher.network, self.verdict
        began, spent, clock.cut = clock.spent, network.evaluations, False
        plan = self.found(name, share)
        verdict = before if plan is self.best else self.task.judge.of_plan(plan)
        if verdict.loss < before.loss:
            self.best, self.verdict = plan, verdict
        self.done.append(name)
        self.note(name, before, network.evaluations - spent, clock.spent - began)
        self.best = replace(self.best, provenance=provenance(self.task.teacher, self.task.fit, self.records))

    def found(self, name: str, share: float) -> Plan:
        """Return the plan of a stage, from the folder if an earlier run left it there, or anew; one that was cut short goes on."""
        path = None if self.folder is None else self.folder / f"{name}-{self.key(name)}.json"
        if path is not None and path.exists():
            return load_plan(path)
        if not self.allowed(name):
            return self.best
        part = None if path is None else path.with_suffix(".part.json")
        start = load_plan(part) if part is not None and part.exists() else self.best
        self.task.clock.share(share)
        plan = STAGES[name](self.task, start, self.done)
        if start is not self.best:  # a stage minimises a loss of its own, and by the judge's it may have made the plan worse
            plan = min(start, plan, key=lambda plan: self.task.judge.of_plan(plan).loss)
        if path is not None and part is not None:
            plan.save(part if self.task.clock.cut else path)
            if not self.task.clock.cut:
                part.unlink(missing_ok=True)
        return plan

    def allowed(self, name: str) -> bool:
        """Return whether there is time for a stage; the first one that fits coefficients may use the shares of other plans."""
        clock, needed = self.task.clock, NEEDS[name](self.task, self.best)
        clock.share(1.0)
        if {*self.done} - {"grid"}:
            return clock.allows(needed)
        clock.cut = clock.needs(needed) > clock.seconds - clock.spent
        if self.done or not clock.cut:
            return not clock.cut
        kept = "" if self.folder is None else f" (the teacher is kept in {str(self.folder)!r}, and need not be made again)"
        raise TooFewSecondsError(
            f"seconds={clock.seconds:g} are too short: {clock.spent:.2g} s went by before the stage {name!r} of "
            f"{self.best.nfe} evaluations, which needs {clock.needs(needed):.2g} s more; give "
            f"seconds={math.ceil(clock.spent + 1.2 * clock.needs(needed))} or more{kept}"
        )

    def key(self, name: str) -> str:
        """Return a checksum of all that the plan of a stage depends on."""
        task = self.task
        plans = [replace(plan, provenance={}).document()["sha256"] for plan in (self.best, *(s.given for s in task.searches))]
        settings = [task.fit, task.window, task.times, task.iterations, repr(task.judge.loss), task.steps, task.teacher.t.tolist()]
        return hashlib.sha256(json.dumps([plans, name, *settings]).encode()).hexdigest()[:16]


def split(plans: Sequence[Plan], shape: Sequence[int], validation: float) -> int:
    """Return how many of the samples, of shape (N, ...), the plans are fitted to."""
    if not 0 < validation < 1:
        raise ValueError(f"validation={validation!r} must lie between 0 and 1: the share of the samples that the fit does not see")
    samples, size = shape[0], math.prod(shape[1:])
    plan = max(plans, key=lambda plan: len(plan.rows))
    validating = max(1, round(validation * samples))
    needed = _needed(plan, shape)
    if samples - validating < needed or validating < 2:
        enough = math.ceil(max((needed + 0.5) / (1 - validation), 1.5 / validation))  # whichever way the share is rounded
        raise ValueError(
            f"{samples} samples of {size} numbers, {validating} of them for validation, are too few for a table of "
            f"{_numbers(plan)} numbers; give {enough} or more" + (", better 64" if enough < 64 else "")
        )
    return samples - validating


def _numbers(plan: Plan) -> int:
    """Return how many numbers of a plan are fitted."""
    rows = len(plan.rows) - plan.hands_on
    return rows * (rows + 5) // 2


def _needed(plan: Plan, shape: Sequence[int]) -> int:
    """Return how many samples are enough to fit a plan to."""
    return max(4, -(-10 * _numbers(plan) // math.prod(shape[1:])))


def check_plans(plans: Sequence[Plan]) -> None:
    """Raise if a plan cannot be fitted, or the plans cannot be fitted together."""
    for plan in plans:
        kind("plan", plan, Plan, "a deis.Plan, as deis.make_plan returns, or several,")
        if plan.direction != "decode":
            raise ValueError(f"plan {plan.method!r} leads from data to noise, and teachers lead to data; fit a plan that samples")
        Table.of(plan)  # refuses what cannot be fitted
    if len({plan.nfe for plan in plans}) != 1:
        raise ValueError(
            f"plan has plans of {[plan.nfe for plan in plans]} evaluations; give at least one, and all with the same number"
        )
