"""Teachers: dense, converged trajectories of a model, kept in memory or on disk."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import number, whole
from ..arrays import Array
from ..backends.numpy import combine
from ..files import replacing
from ..grids import times_of_levels
from ..machine import run_rows
from ..methods import make_plan
from ..methods.adams import adams
from ..methods.step import choose_form
from ..model.predictions import coefficients
from ..plan import Plan
from ..quadrature import Form
from ..sde import Schedule
from .frames import Frames, Record, writer
from .network import Model, Network, rmse, size

FIRST_STEPS, MOST_STEPS = 32, 1024
PILOTS = 8  # samples by which the number of steps is chosen
ROUGH = 0.05
"""How far twice the steps may move the final states, relative to their root mean square, if the caller gives the steps. The
order is 4, so the remaining error is some sixteen times less."""


@dataclass(frozen=True)
class Teacher:
    """Trajectories x_t of the probability flow from noise; `make_teacher` makes one.

    Attributes
    ----------
    network : Network
        The model and its noise.
    t : array of shape (M + 1,)
        Decreasing times.
    form : {"eps", "data"}
        The form of the predictions.
    states : sequence of M + 1 arrays of shape (N, ...)
    predictions : sequence of M arrays of shape (N, ...)
        At t[0] ... t[M - 1].
    self_error : float
        The median over samples of the root mean square distance of the final state to that of half as many steps.
    """

    network: Network
    t: Array
    form: Form
    states: Sequence[Array]
    predictions: Sequence[Array]
    self_error: float

    @property
    def sde(self) -> Schedule:
        return self.network.sde

    @property
    def end(self) -> Array:
        """The converged samples, in float64."""
        return self.states[-1].astype(np.float64)

    def prediction(self, i: int, form: Form) -> Array:
        """Return the predictions at t[i] in a form, in float64."""
        p = self.predictions[i].astype(np.float64)
        if form == self.form:
            return p
        alpha, sigma = float(self.sde.alpha(self.t[i])), float(self.sde.sigma(self.t[i]))
        c_x, c_m = coefficients(self.form, form, alpha, sigma)
        return c_x * self.states[i] + c_m * p

    def state(self, t: float) -> Array:
        """Return the states at a time between the first and the last, in float64: those kept, or a cubic between the two nearest.

        The cubic is Hermite's, of x/sigma in alpha/sigma, whose derivative is the predicted x_0.
        """
        near = int(np.argmin(np.abs(self.t - t)))
        gap = np.abs(np.diff(self.t)).max()
        j = min(int(np.searchsorted(-self.t, -t, side="right")) - 1, len(self.t) - 2)
        if abs(self.t[near] - t) < 1e-9 * gap or j >= len(self.predictions) - 1:
            return self.states[near].astype(np.float64)
        at = np.array([self.t[j], t, self.t[j + 1]])
        sigma = self.sde.sigma(at)
        u = self.sde.alpha(at) / sigma
        h = u[2] - u[0]
        s = (u[1] - u[0]) / h
        y = [self.states[k] / sigma[m] for k, m in ((j, 0), (j + 1, 2))]
        slope = [h * self.prediction(k, "data") for k in (j, j + 1)]
        cubic = (1 + 2 * s) * (1 - s) ** 2 * y[0] + s**2 * (3 - 2 * s) * y[1]
        return sigma[1] * (cubic + s * (1 - s) ** 2 * slope[0] - s**2 * (1 - s) * slope[1])


def make_teacher(
    model: Model,
    samples: Any,
    *,
    condition: Any = None,
    steps: int | None = None,
    tol: float = 5e-4,
    batch: int = 64,
    memory: int = 2**32,
    folder: str | Path | None = None,
    progress: Any = None,
    allow_rough: bool = False,
) -> Teacher:
    """Integrate the probability flow densely, for `deis.calibrate`; one teacher serves plans of any number of evaluations.

    Parameters
    ----------
    model : Denoiser or Pretrained
        With a condition: a function that takes the conditions of some samples and returns one, such as ``network.conditional``.
    samples : array of shape (N, ...)
        Noise, as `deis.sample` takes it; its type tells the framework of the model.
    condition : array of shape (N, ...), optional
        What each sample is conditioned on, such as its label.
    steps : int, optional
        The number of steps. By default it starts at 32 and is doubled, on the first 8 samples, until the final states move by less
        than `tol` times their root mean square, or a discrete schedule has no more times.
    batch : int
        Samples per call of the model.
    memory : int
        Bytes beyond which the trajectories are kept on disk, in `folder` or a temporary one.
    folder : path, optional
        Keep the trajectories here (safetensors), and read them from here if they exist already.
    progress : optional
        A tqdm bar, or another object with `update(n)`, called after each evaluation of n samples.
    allow_rough : bool
        Accept a teacher that has not converged.

    Raises
    ------
    ValueError
        If the model is not deterministic, the trajectories diverge, or they do not converge within 1024 steps; or if, with given
        steps or those of a discrete schedule, the final states still move by more than 0.05 of their root mean square.
    MemoryError
        Where a batch does not fit the device.
    """
    # Half as many steps show whether the final states have settled.
    steps, tol = None if steps is None else whole("steps", steps, 2), number("tol", tol, above=0)
    network = Network(model, samples, condition, batch, progress)
    pilots = Network(model, samples[:PILOTS], None if condition is None else condition[:PILOTS], batch, progress)
    form = choose_form(network.sde, np.array([network.sde.t_start]))
    first = _check_deterministic(pilots, form)
    kept = None if folder is None else _load(network, Path(folder), form, first)
    if kept is None:
        plan, coarser = _converged(pilots, form, steps, tol, allow_rough)
        network.evaluations = pilots.evaluations
        teacher = _integrated(network, plan, coarser, memory, folder)
    else:
        teacher = kept
    if not allow_rough:
        refuse_rough(teacher)
    if folder is not None and kept is None:
        _finish(teacher, Path(folder))
    return teacher


def refuse_rough(teacher: Teacher) -> None:
    """Raise ValueError if a teacher has not converged."""
    end, steps = size(teacher.end), len(teacher.t) - 1
    if not teacher.self_error <= ROUGH * end:
        raise ValueError(
            f"the teacher has not converged: its final states move by {teacher.self_error:.2g} from {max(steps // 2, 1)} to "
            f"{steps} steps, which is more than {ROUGH:g} of their root mean square of {end:.2g}; give more than steps={steps} (in "
            "an empty folder, if it is kept in one), check the model's schedule and what it predicts, or give allow_rough=True"
        )


def dense_plan(sde: Schedule, steps: int, form: Form) -> Plan:
    """Return the plan of a teacher: order 4, on times that are dense where rho is small and not coarse where it is large.

    A discrete schedule offers only its own times. They are thinned evenly to a half, a quarter, ..., and at most all are used.
    """
    phase, power = ("vp_t", 2.0) if sde.num_times is None else ("t", 1.0)
    return make_plan(sde, adams(form, "vp_t", 3), steps, phase, power)


def _check_deterministic(network: Network, form: Form) -> Array:
    """Return the first predictions, or raise if they are not finite, or differ when they are made twice."""
    x_T, t = network.numpy(), network.sde.t_start
    first, second = (network.predict(x_T, t, form) for _ in range(2))
    if not np.isfinite(first).all():
        raise ValueError(f"model returned NaN or infinity at t={t!r}, at the noise itself; check the samples and the model")
    if rmse(first, second).max() > 1e-3 * size(first):
        raise ValueError(
            "model returned different predictions when it was called twice on the same x and t: turn dropout and other randomness "
            "off, as by model.eval() in torch or nnx.Module.eval() in flax"
        )
    return first


def _converged(pilots: Network, form: Form, steps: int | None, tol: float, allow_rough: bool) -> tuple[Plan, Array]:
    """Return the plan whose final states differ by less than tol from those of half as many steps, and the latter."""
    most = MOST_STEPS if pilots.sde.num_times is None else len(times_of_levels(pilots.sde)) - 1
    number = min(steps or 2 * FIRST_STEPS, most)
    before = _integrate(pilots, dense_plan(pilots.sde, max(number // 2, 1), form))
    while True:
        plan = dense_plan(pilots.sde, number, form)
        if steps is not None:
            return plan, before
        end = _integrate(pilots, plan)
        self_error = _distance(end, before)
        if self_error <= tol * size(end) or (number == most and (pilots.sde.num_times or allow_rough)):
            return plan, before
        if number == most:
            raise ValueError(
                f"the teacher does not converge: its final states move by {self_error:.2g} from {number // 2} to {number} steps; "
                f"give a greater tol than {tol!r}, check the model's schedule and what it predicts, or give allow_rough=True"
            )
        number, before = min(2 * number, most), end


def _distance(end: Array, coarser: Array) -> float:
    """Return the median distance of the first final states to those of half as many steps."""
    return float(np.median(rmse(end[: len(coarser)], coarser)))


def _integrate(network: Network, plan: Plan, record: Record = lambda i, arrays: None) -> Array:
    """Return the final states of a multistep plan; `record` gets the state and prediction of each row, in the precision to keep."""
    dtype = np.float32 if network.x_T.dtype.itemsize <= 4 else np.float64

    def predict(i: int, x: Array) -> Array:
        if not np.isfinite(x).all():
            raise ValueError(
                f"the teacher diverges: its state is not finite at t={plan.t[i].item()!r}; check the model's schedule, what it "
                "predicts, and whether it was trained at these times (start later with sampling_T=)"
            )
        p = network.predict(x, plan.t[i], plan.form)
        record(i, {"x": x.astype(dtype), "p": p.astype(dtype)})
        return p

    end = run_rows(plan.rows, predict, combine, network.numpy())
    if not np.isfinite(end).all():
        raise ValueError("the teacher diverges: its end is not finite; check the model's schedule and what it predicts")
    record(len(plan.rows), {"x": end.astype(dtype)})
    return end.astype(dtype)


def _integrated(network: Network, plan: Plan, coarser: Array, memory: int, folder: str | Path | None) -> Teacher:
    """Return the teacher that a plan makes, on disk where there is a folder or too little memory."""
    m = len(plan.t)
    if folder is None and 2 * m * math.prod(network.x_T.shape) * (4 if network.x_T.dtype.itemsize <= 4 else 8) > memory:
        folder = tempfile.mkdtemp(prefix="deis-teacher-")
        weakref.finalize(network, shutil.rmtree, folder, ignore_errors=True)  # it goes with the teacher
    states: Sequence[Array]
    predictions: Sequence[Array]
    if folder is None:
        frames: list[dict[str, Array]] = []
        end = _integrate(network, plan, lambda i, arrays: frames.append(arrays))
        states, predictions = [arrays["x"] for arrays in frames], [arrays["p"] for arrays in frames[:-1]]
    else:
        end = _integrate(network, plan, writer(Path(folder)))
        states, predictions = Frames(Path(folder), "x", m), Frames(Path(folder), "p", m - 1)
    return Teacher(network, plan.t, plan.form, states, predictions, _distance(end, coarser))


def _finish(teacher: Teacher, folder: Path) -> None:
    """Write the file that marks the others as complete."""
    network = teacher.network
    about = {
        "t": teacher.t.tolist(),
        "self_error": teacher.self_error,
        "x_T": _digest(network.numpy()),
        "schedule": network.sde.name,
    }
    with replacing(folder / "teacher.json") as partial:
        partial.write_text(json.dumps(about | {"evaluations": network.evaluations}))


def _load(network: Network, folder: Path, form: Form, first: Array) -> Teacher | None:
    """Return the teacher in a folder, if one was finished there.

    Raises
    ------
    ValueError
        Where it is a teacher of other noise, another schedule or another model.
    """
    if not (folder / "teacher.json").exists():
        return None
    about = json.loads((folder / "teacher.json").read_text())
    m = len(about["t"])
    predictions = Frames(folder, "p", m - 1)
    same = about["x_T"] == _digest(network.numpy()) and about["schedule"] == network.sde.name
    if not same or rmse(predictions[0][: len(first)], first).max() > 1e-2 * size(first):
        raise ValueError(
            f"folder={str(folder)!r} holds a teacher of other samples, another schedule or another model; give an empty one"
        )
    network.evaluations = about["evaluations"]
    return Teacher(network, np.array(about["t"]), form, Frames(folder, "x", m), predictions, about["self_error"])


def _digest(x_T: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(x_T).tobytes()).hexdigest()
