"""Calibration, stage by stage."""

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
from ..arrays import Array, Indices
from ..methods import ANALYTICAL, get_method, make_plan
from ..methods.layout import Builder
from ..plan import Plan, load_plan
from ..run.options import progress_bar
from .gauss_newton import fit_ends
from .gradient import fit_gradient
from .grid import GridCost, Jumps, exchange, teacher_grid
from .judge import LOSSES, Loss, measured
from .model_free import model_free_grid
from .network import Model, Student, rmse
from .regression import fit_rows
from .table import Table
from .teacher import Teacher, make_teacher, refuse_rough

_FEW = 32  # samples by which a grid is judged
_MOST_KNOWN = 128
STAGES = ("grid", "least_squares", "gauss_newton", "gradient")


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
    stages = checked_stages(stages)
    if not isinstance(teacher, Teacher | None):
        whole("teacher", teacher)
    plans = list(plan) if isinstance(plan, list | tuple) else [plan]
    _check(plans, loss)
    iterations, steps = whole("iterations", iterations), whole("steps", steps)
    window = None if window is None else whole("window", window)
    validation = number("validation", validation)
    flag("times", times)
    flag("progress", progress)
    with progress_bar(f"calibrating {plans[0].method}", "sample") if progress else nullcontext() as bar:
        began = time.perf_counter()
        if isinstance(teacher, Teacher):
            _check_teacher(teacher, model, samples, condition, allow_rough)
            before = teacher.network.evaluations
        else:
            before = 0
            made = {"condition": condition, "steps": teacher, "batch": batch, "folder": folder, "allow_rough": allow_rough}
            teacher = make_teacher(model, samples, progress=bar, **made)
        teacher.network.progress = bar
        plan = _nearest(plans, teacher, loss)
        build, fit = _builder(plan, method, teacher), _split(plan, teacher, validation)
        records = list(plan.provenance.get("stages", []))
        run = _Run(plan, teacher, fit, window or len(plan.rows), build, folder, loss, records)
        run.start(teacher.network.evaluations - before, time.perf_counter() - began, allow_rough)
        for name in stages:
            run.stage(name, times, iterations, steps)
    return run.best


@dataclass
class _Run:
    """A calibration under way: the best plan so far, and its error."""

    best: Plan
    teacher: Teacher
    fit: int
    """The first samples are fitted to, and the others validate."""
    window: int
    build: Builder | None
    folder: str | Path | None
    loss: Loss
    records: list[dict[str, Any]]
    candidates: list[Plan] = field(default_factory=list)
    """Plans on other grids, which the least squares may do better from than from the best of them."""
    error: float = np.inf

    def student(self, plan: Plan) -> Student:
        return Student(self.teacher.network, plan)

    def measure(self, plan: Plan) -> float:
        return measured(self.student(plan), Table.of(plan), self.teacher, self.fit, self.loss)

    def start(self, evaluations: int, seconds: float, allow_rough: bool) -> None:
        """Measure the plan that was given, and compare it with the teacher."""
        self.error = self.measure(self.best)
        if not np.isfinite(self.error):
            raise ValueError(f"the plan {self.best.method!r} itself diverges on this model; start from another, such as 'ddim'")
        if not allow_rough and self.teacher.self_error > 0.5 * self.error:
            raise ValueError(
                f"the teacher is too coarse: its end moves by {self.teacher.self_error:.2g} when its steps are doubled, and the "
                f"plan is within {self.error:.2g} of it already; make a teacher of more than {len(self.teacher.t) - 1} steps, or "
                "say allow_rough=True"
            )
        self.note("teacher", self.error, evaluations, seconds)

    def note(self, name: str, before: float, evaluations: int, seconds: float) -> None:
        self.records.append(
            {
                "stage": name,
                "before": before,
                "after": self.error,
                "evaluations": evaluations / len(self.teacher.states[0]),
                "seconds": round(seconds, 1),
            }
        )

    def stage(self, name: str, times: bool, iterations: int, steps: int) -> None:
        """Do one stage, or take what an earlier run made of it; keep its plan where the error is smaller."""
        network, began, before = self.teacher.network, time.perf_counter(), self.error
        start = replace(self.best, provenance={}).document()["sha256"]
        key = json.dumps([start, name, self.fit, self.window, times, iterations, repr(self.loss), steps, self.teacher.t.tolist()])
        path = None if self.folder is None else Path(self.folder) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        spent = network.evaluations
        if path is not None and path.exists():
            plan = load_plan(path)
            if name == "grid":
                self.candidates = self.grids()
        else:
            plan = self.found(name, times, iterations, steps)
            if path is not None:
                plan.save(path)
        error = self.measure(plan)
        if error < self.error:
            self.best, self.error = plan, error
        self.note(name, before, network.evaluations - spent, time.perf_counter() - began)
        self.best = replace(self.best, provenance=self.provenance())

    def found(self, name: str, times: bool, iterations: int, steps: int) -> Plan:
        """Return the plan of a stage, better or not."""
        if name == "grid":
            self.candidates = self.grids()
            return min(self.candidates, key=self.measure)
        if name == "least_squares":
            start = min((self.best, *self.candidates), key=lambda plan: self.measure(self.regressed(plan)))
            moved = [self.exchanged(start, self.build)] if self.build and self.candidates and start.accepts.all() else []
            return min((self.regressed(plan) for plan in (start, *moved)), key=self.measure)
        student, table = self.student(self.best), Table.of(self.best)
        if name == "gauss_newton":
            table = fit_ends(student, table, self.teacher, self.fit, self.window, iterations=iterations, times=times)
        else:
            table = fit_gradient(student, table, self.teacher, self.fit, self.window, loss=self.loss, steps=steps, times=times)
        return self.plan(table, self.best)

    def regressed(self, plan: Plan) -> Plan:
        return self.plan(fit_rows(self.student(plan), Table.of(plan), self.teacher, self.fit, self.window)[0], plan)

    def exchanged(self, plan: Plan, build: Builder) -> Plan:
        """Return the method's plan on those of the teacher's times that are best after the regression of a few samples."""
        teacher, few = self.teacher, min(self.fit, _FEW)
        places = np.unique([int(np.argmin(np.abs(teacher.t - t))) for t in plan.ts])
        if len(places) < len(plan.ts):
            return plan

        known: dict[bytes, Array] = {}

        def value(places: Indices) -> float:
            if len(known) > _MOST_KNOWN:
                known.clear()
            moved = self.rebuilt(build, teacher.t[places], "")
            _, end = fit_rows(self.student(moved), Table.of(moved), teacher, few, self.window, 0, known)
            return float(np.log(np.maximum(rmse(end, teacher.end[:few]), 1e-12)).mean())

        return self.rebuilt(build, teacher.t[exchange(value, places, (4, 2, 1))], "teacher grid, by regression")

    def rebuilt(self, build: Builder, ts: Array, grid: str) -> Plan:
        """Return the plan of the method on other times, with the analytical first step of the one that was given."""
        plan = replace(make_plan(self.teacher.sde, build, ts=ts), grid=grid)
        if self.best.calls.all():
            return plan
        return replace(plan, calls=self.best.calls, guess=self.best.guess, method=self.best.method)

    def plan(self, table: Table, like: Plan) -> Plan:
        grid = like.grid if np.array_equal(table.t, like.t) else "fitted times"
        return replace(table.plan(like, self.teacher.sde, f"a model, on {self.fit} samples"), grid=grid)

    def grids(self) -> list[Plan]:
        """Return plans of the method on other grids."""
        if self.build is None:
            raise ValueError(
                f"stages has 'grid', and the plan's method {self.best.method!r} is no registered name that builds this plan on its "
                "own times; give method=, the name or the builder it was made with, or leave the stage out"
            )
        sde, num_step, form = self.teacher.sde, self.best.num_step, self.best.form
        jumps = Jumps(self.teacher, form)
        costs: tuple[GridCost, ...] = ("euler", "fitted", "method") if self.best.accepts.all() else ("euler", "fitted")
        grids = {
            f"teacher grid, {cost} cost": teacher_grid(self.teacher, self.build, form, num_step, cost, jumps) for cost in costs
        }
        grids["model-free grid"] = model_free_grid(sde, self.build, num_step)
        return [self.rebuilt(self.build, ts, name) for name, ts in grids.items()]

    def provenance(self) -> dict[str, Any]:
        """Return what the calibrated plan tells of its making."""
        teacher, samples = self.teacher, len(self.teacher.states[0])
        return {
            "samples": self.fit,
            "validation": samples - self.fit,
            "teacher_steps": len(teacher.t) - 1,
            "teacher_self_error": teacher.self_error,
            "stages": self.records,
        }


def calibration_report(plan: Plan) -> str:
    """Return a table of what each stage of a plan's calibration did.

    Raises
    ------
    ValueError
        For a plan that was not calibrated.
    """
    kind("plan", plan, Plan, "a deis.Plan, as deis.calibrate returns,")
    if "stages" not in plan.provenance:
        raise ValueError(f"plan {plan.method!r} was not calibrated; deis.calibrate does that")
    about = plan.provenance
    lines = [
        f"{plan.method}, {plan.nfe} evaluations, {plan.schedule}; {about['samples']} samples, validated on "
        f"{about['validation']} others; teacher of {about['teacher_steps']} steps, self-error {about['teacher_self_error']:.2g}",
        f"{'stage':<15}{'error before':>14}{'after':>10}{'evaluations':>13}{'seconds':>9}",
    ]
    for row in about["stages"]:
        unchanged = row["stage"] != "teacher" and row["after"] >= row["before"]
        lines.append(
            f"{row['stage']:<15}{row['before']:>14.5f}{row['after']:>10.5f}{row['evaluations']:>13.0f}{row['seconds']:>9.1f}"
            + ("  could not improve it" if unchanged else "")
        )
    return "\n".join(lines)


def _split(plan: Plan, teacher: Teacher, validation: float) -> int:
    """Return the number of samples to fit to."""
    if not 0 < validation < 1:
        raise ValueError(f"validation={validation!r} must lie between 0 and 1: the share of the samples that the fit does not see")
    samples, size = len(teacher.states[0]), teacher.states[0][0].size
    numbers = len(plan.rows) * (len(plan.rows) + 5) // 2

    held = max(1, round(validation * samples))
    needed = max(4, -(-10 * numbers // size))  # to fit to
    if samples - held < needed or held < 2:
        enough = math.ceil(max((needed + 0.5) / (1 - validation), 1.5 / validation))  # whichever way the share is rounded
        raise ValueError(
            f"{samples} samples of {size} numbers, {held} of them for validation, are too few for a table of {numbers} numbers; "
            f"give {enough} or more" + (", better 64" if enough < 64 else "")
        )
    return samples - held


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


def _builder(plan: Plan, method: str | Builder | None, teacher: Teacher) -> Builder | None:
    """Return what builds the plan on other times, where it is known; None else.

    Raises
    ------
    ValueError
        Where the method that was given builds another plan.
    """
    if method is not None and not isinstance(method, str):
        function("method, where it is no name,", method, "sde", "ts", "grid")
    try:
        build = method if callable(method) else get_method(plan.method.removesuffix(ANALYTICAL) if method is None else method)
        rebuilt = build(teacher.sde, plan.ts, "")
        kind("the result of method", rebuilt, Plan, "a deis.Plan,")
        again = Table.of(rebuilt)
    except ValueError:
        if method is None:
            return None
        raise
    table = Table.of(plan)
    if again.c.shape == table.c.shape and np.allclose(again.c, table.c, 1e-6, 1e-9) and np.allclose(again.a, table.a, 1e-6, 1e-9):
        return build
    if method is None:
        return None
    raise ValueError(f"method={method!r} builds another plan than the one given on the same times; give the one it was made with")


def checked_stages(stages: Sequence[str]) -> tuple[str, ...]:
    """Return the names of stages, or raise where they are none."""
    kind("stages", stages, Sequence, "a sequence of names,")
    return tuple(one_of("stages", name, STAGES) for name in ((stages,) if isinstance(stages, str) else stages))


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


def _check_teacher(teacher: Teacher, model: Model, samples: Any, condition: Any, allow_rough: bool) -> None:
    if samples is not None or condition is not None:
        raise ValueError("samples and condition come with the teacher; leave them out, or the teacher")
    if model is not teacher.network.model:
        raise ValueError("teacher was made for another model; make one for this with deis.make_teacher(model, samples)")
    if not allow_rough:
        refuse_rough(teacher)
