"""Calibration, stage by stage: `calibrate`, and what it keeps account of."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import flag, function, kind, number, one_of, whole
from ..methods.layout import Builder
from ..plan import Plan, load_plan
from ..run.options import progress_bar
from .judge import LOSSES, Loss, measured
from .network import Model, Student
from .report import provenance
from .search import search_of
from .stages import STAGES, Task, checked_stages
from .table import Table
from .teacher import Teacher, make_teacher, refuse_rough


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
    folder: str | Path | None = None,
    progress: bool = False,
    allow_rough: bool = False,
) -> Plan:
    """Fit a plan's times and coefficients to a model: as many evaluations, nearer to the solution they approximate.

    The plan is read as x_{i+1} = a_i x_i + sum_j c_ij p_{i-j} (`Table`), and its numbers are fitted to converged trajectories of
    the model from the given noise, the teacher's. The error is the median over the validation samples of the root mean square
    distance of the end to the teacher's. No stage makes it worse: what a stage finds is kept where it is smaller.

    Parameters
    ----------
    plan : Plan, or list or tuple of them
        Where to start; deterministic, of any method, and of the number of evaluations that is wanted. Of several (one method on
        several grids, say), the one whose ends are nearest to the teacher's over all samples, before anything is fitted.
    model : Denoiser or Pretrained
        What will be sampled, guidance and all. With a condition: a function from the conditions of some samples to one, as
        ``network.conditional``, or ``lambda labels: network.conditional(labels, guidance=2.0)``.
    samples : array of shape (N, ...)
        Noise, as `deis.sample` takes it, in the model's framework: a torch.Tensor, a jax.Array or a numpy.ndarray. Some 64 to 256
        samples of an image network suffice. Data x_0 of your own may take part as alpha x_0 + sigma eps at the plan's start.
    condition : array of shape (N, ...), optional
        What each sample is conditioned on, such as its label.
    teacher : Teacher or int, optional
        One made by `deis.make_teacher` for this model, which brings its samples, to be used for several plans; or a number of
        steps. By default the steps are doubled until the end stands still.
    stages : sequence of str
        "grid": times by dynamic programming (`deis.calibration.teacher_grid`) and without a model; "least_squares": coefficients
        step by step (`deis.calibration.regression.fit_rows`), on every grid that was found, and on those that come from the best by
        moving single times; "gauss_newton": all coefficients and times at once on the end, without derivatives of the model
        (`deis.calibration.gauss_newton.fit_ends`); "gradient": all of them by Adam and back-propagation through the model, for any
        loss (`deis.calibration.gradient.fit_gradient`).
    validation : float
        The share of the samples, the last ones, that the fit does not see.
    method : str or callable, optional
        The method by which plans are built on other times; by default the one that the plan names. The stage "grid" needs it.
    window : int, optional
        The number of predictions that a row may use; by default all before it.
    times : bool
        Let "gauss_newton" and "gradient" move the times.
    iterations : int
        Gauss-Newton iterations, at most.
    loss : {"robust", "huber", "l1", "l2"} or callable
        Of the stage "gradient", see `deis.calibration.judge.sample_losses`; or a function (x_0, target) -> shape (batch,), as
        LPIPS is, in the model's framework, whose median is then the error by which every stage is judged.
    steps : int
        Of the stage "gradient": Adam's steps, at most.
    batch : int
        Samples a call of the model.
    folder : path, optional
        Where to keep the teacher and the plan of each finished stage; an interrupted calibration goes on from there.
    progress : bool
        Show a tqdm bar of the evaluations.
    allow_rough : bool
        Take a teacher that has not converged, or is no nearer to the solution than the plan, too.

    Returns
    -------
    Plan
        With the numbers of each stage in `plan.provenance`, which `deis.calibration_report(plan)` prints.

    Raises
    ------
    ValueError
        Where the model is not deterministic, the plan is stochastic or of another schedule than the model's, there are too few
        samples for its coefficients, the teacher diverges, has not converged or is worse than what it is to teach, or a stage needs
        what is missing.
    MemoryError
        Where a batch does not fit the device.
    """
    stages, plans = checked_stages(stages), list(plan) if isinstance(plan, list | tuple) else [plan]
    _check(plans, loss)
    iterations, steps = whole("iterations", iterations), whole("steps", steps)
    window = None if window is None else whole("window", window)
    validation = number("validation", validation)
    flag("times", times)
    flag("progress", progress)
    with progress_bar(f"calibrating {plans[0].method}", "sample") if progress else nullcontext() as bar:
        began = time.perf_counter()
        made = {"condition": condition, "batch": batch, "folder": folder, "progress": bar}
        teacher, spent = _teacher(teacher, model, samples, allow_rough, made)
        plan = _nearest(plans, teacher, loss)
        search, fit = search_of(plan, method, teacher), _split(plan, teacher, validation)
        task = Task(teacher, search, fit, window or len(plan.rows), loss, times, iterations, steps)
        run = _Run(task, plan, None if folder is None else Path(folder), list(plan.provenance.get("stages", [])))
        run.start(teacher.network.evaluations - spent, time.perf_counter() - began, allow_rough)
        for name in stages:
            run.stage(name)
    return run.best


def _teacher(
    given: Teacher | int | None, model: Model, samples: Any, allow_rough: bool, made: dict[str, Any]
) -> tuple[Teacher, int]:
    """Return the teacher that was given, or one that is made, and the evaluations that it had spent before."""
    if not isinstance(given, Teacher | None):
        whole("teacher", given)
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


@dataclass
class _Run:
    """A calibration under way: the best plan so far, its error, and what is told of the stages."""

    task: Task
    best: Plan
    folder: Path | None
    records: list[dict[str, Any]]
    error: float = np.inf
    done: list[str] = field(default_factory=list)

    def start(self, evaluations: int, seconds: float, allow_rough: bool) -> None:
        """Measure the plan that was given, and compare it with the teacher."""
        teacher, self.error = self.task.teacher, self.task.error(self.best)
        if not np.isfinite(self.error):
            raise ValueError(f"the plan {self.best.method!r} itself diverges on this model; start from another, such as 'ddim'")
        if not allow_rough and teacher.self_error > 0.5 * self.error:
            raise ValueError(
                f"the teacher is too coarse: its end moves by {teacher.self_error:.2g} when its steps are doubled, and the "
                f"plan is within {self.error:.2g} of it already; make a teacher of more than {len(teacher.t) - 1} steps, or "
                "say allow_rough=True"
            )
        self.note("teacher", self.error, evaluations, seconds)

    def note(self, name: str, before: float, evaluations: int, seconds: float) -> None:
        """Record a stage: the errors before and after, the evaluations of each sample, and the time it took."""
        numbers = {"evaluations": evaluations / len(self.task.teacher.states[0]), "seconds": round(seconds, 1)}
        self.records.append({"stage": name, "before": before, "after": self.error, **numbers})

    def stage(self, name: str) -> None:
        """Do one stage, and keep its plan where the error is smaller."""
        network, began, before = self.task.teacher.network, time.perf_counter(), self.error
        spent = network.evaluations
        plan = self.found(name)
        error = self.task.error(plan)
        if error < self.error:
            self.best, self.error = plan, error
        self.done.append(name)
        self.note(name, before, network.evaluations - spent, time.perf_counter() - began)
        self.best = replace(self.best, provenance=provenance(self.task.teacher, self.task.fit, self.records))

    def found(self, name: str) -> Plan:
        """Return the plan of a stage, as an earlier run left it in the folder or anew."""
        path = None if self.folder is None else self.folder / f"{name}-{self.key(name)}.json"
        if path is not None and path.exists():
            return load_plan(path)
        plan = STAGES[name](self.task, self.best, self.done)
        if path is not None:
            plan.save(path)
        return plan

    def key(self, name: str) -> str:
        """Return a checksum of all that the plan of a stage depends on."""
        task, start = self.task, replace(self.best, provenance={}).document()["sha256"]
        settings = [task.fit, task.window, task.times, task.iterations, repr(task.loss), task.steps, task.teacher.t.tolist()]
        return hashlib.sha256(json.dumps([start, name, *settings]).encode()).hexdigest()[:16]


def _split(plan: Plan, teacher: Teacher, validation: float) -> int:
    """Return the number of samples to fit to."""
    if not 0 < validation < 1:
        raise ValueError(f"validation={validation!r} must lie between 0 and 1: the share of the samples that the fit does not see")
    samples, size = len(teacher.states[0]), teacher.states[0][0].size
    numbers = len(plan.rows) * (len(plan.rows) + 5) // 2
    validating = max(1, round(validation * samples))
    needed = max(4, -(-10 * numbers // size))  # to fit to
    if samples - validating < needed or validating < 2:
        enough = math.ceil(max((needed + 0.5) / (1 - validation), 1.5 / validation))  # whichever way the share is rounded
        raise ValueError(
            f"{samples} samples of {size} numbers, {validating} of them for validation, are too few for a table of {numbers} "
            f"numbers; give {enough} or more" + (", better 64" if enough < 64 else "")
        )
    return samples - validating


def _nearest(plans: Sequence[Plan], teacher: Teacher, loss: Loss) -> Plan:
    """Return the plan with the least error over all samples.

    Raises
    ------
    ValueError
        Where one is of another schedule than the model.
    """
    for plan in plans:
        if not plan.matches(teacher.sde):
            raise ValueError(
                f"plan is of the schedule {plan.schedule!r} and the model of {teacher.sde.name!r}, whose alpha and sigma differ at "
                "its times; make one with deis.make_plan(model.sde, ...)"
            )
    if len(plans) == 1:
        return plans[0]
    return min(plans, key=lambda plan: measured(Student(teacher.network, plan), Table.of(plan), teacher, 0, loss))


def _check(plans: Sequence[Plan], loss: Loss) -> None:
    if callable(loss):
        function("loss", loss, "x_0", "target")
    else:
        one_of("loss", loss, LOSSES, ", or a function (x_0, target)")
    for plan in plans:
        kind("plan", plan, Plan, "a deis.Plan, as deis.make_plan returns, or several,")
        Table.of(plan)  # refuses what cannot be fitted
    if len({plan.nfe for plan in plans}) != 1:
        raise ValueError(f"plan has plans of {[plan.nfe for plan in plans]} evaluations; give at least one, and all of as many")
