"""The model as a function of NumPy arrays, whatever its framework; and the run of one recurrence from noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..arguments import check_state, function, shown, whole
from ..arrays import Array, Flags
from ..backends import backend_of, to_numpy
from ..backends.numpy import combine
from ..foreign import is_jax
from ..machine import guessed, run_rows
from ..model.predictions import Denoiser, Level, Predictor, factors, times
from ..model.pretrained import Pretrained, without_labels
from ..plan import Plan
from ..sde import Schedule
from .table import Table, free

Model = Denoiser | Pretrained | Callable[[Any], Any]


@dataclass
class Network:
    """The predictions of a model for fixed samples; it counts its evaluations.

    Attributes
    ----------
    model : Denoiser, Pretrained, or with a condition a function from conditions to one
    x_T : array of the model's framework, of shape (N, ...)
    condition : array of shape (N, ...), optional
    batch : int
        Samples per call.
    progress : optional
        An object with `update(n)`, such as a tqdm bar.
    evaluations : int
        Evaluations so far, of one sample each.
    """

    model: Model
    x_T: Any  # noqa: N815 (the paper's symbol)
    condition: Any = None
    batch: int = 64
    progress: Any = None
    evaluations: int = 0
    _calls: dict[tuple[int, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = whole("batch", self.batch)
        check_state("samples", self.x_T)
        if self.x_T.ndim < 2 or 0 in self.x_T.shape:
            raise ValueError(f"samples must be noise of shape (N, ...), and has shape {tuple(self.x_T.shape)}")
        if self.condition is not None:
            function("model, where there is a condition,", self.model, "condition")
            if not hasattr(self.condition, "__len__"):
                raise TypeError(f"condition must be an array or a sequence, one entry per sample, and is {shown(self.condition)}")
            if len(self.condition) != len(self.x_T):
                raise ValueError(f"condition has {len(self.condition)} entries for {len(self.x_T)} samples; give one per sample")
        self.sde: Schedule = self.denoiser(0, min(self.batch, len(self.x_T))).sde

    def denoiser(self, first: int, last: int) -> Denoiser:
        """Return the model of the samples first ... last - 1."""
        make: Any = self.model
        model = make if self.condition is None else make(self.condition[first:last])
        model = without_labels(model)
        if not isinstance(model, Denoiser):
            wanted = "model" if self.condition is None else "model(condition)"
            raise TypeError(
                f"{wanted} must be a deis.Denoiser, as deis.Denoiser(model, sde, predicts='eps'), and is {shown(model)}"
            )
        return model

    def numpy(self) -> Array:
        """Return x_T in float64 on the host, where all of calibration but the model runs."""
        return to_numpy(self.x_T)

    def predict(self, x: Array, t: float, form: str, first: int = 0) -> Array:
        """Return the predictions at (x, t) in a form, where x holds the samples from `first` on.

        Raises
        ------
        MemoryError
            Where a batch does not fit the device; it says what to do.
        """
        parts = []
        for start in range(0, len(x), self.batch):
            part = x[start : start + self.batch]
            try:
                parts.append(self._predict(part, t, form, first + start))
            except (MemoryError, RuntimeError) as error:
                if not (isinstance(error, MemoryError) or "out of memory" in str(error).lower()):
                    raise
                raise MemoryError(f"the model ran out of memory on {len(part)} samples; give a batch below {self.batch}") from error
            if self.progress is not None:
                self.progress.update(len(part))
        self.evaluations += len(x)
        return np.concatenate(parts)

    def _predict(self, x: Array, t: float, form: str, first: int) -> Array:
        denoiser = self.denoiser(first, first + len(x))
        backend = backend_of(self.x_T)
        predictor = Predictor(denoiser, backend, self.x_T.dtype, denoiser.threshold)
        x_in, level = backend.like(x, self.x_T), denoiser.level(t)
        output = self._compiled(predictor.output, (first, len(x))) if is_jax(x_in) else predictor.output
        row = factors(denoiser.predicts, form, level, denoiser.threshold is not None)
        with backend.no_grad():
            m = output(x_in, times(x_in, t, denoiser.sde.num_times), level)
            return backend.to_host(predictor.prediction(m, x_in, row))

    def _compiled(self, output: Callable[..., Any], batch: tuple[int, int]) -> Callable[[Any, Any, Level], Any]:
        """Compile the model once for all times; and for each batch of conditions, which it closes over."""
        import jax

        key = (0, 0) if self.condition is None else batch
        if key not in self._calls:
            self._calls[key] = jax.jit(output)
        call = self._calls[key]
        return lambda x, t, level: call(x, t, Level(t[0], *(backend_of(x).like(np.array(v), x) for v in level[1:])))


def size(x: Array) -> float:
    """Return the root mean square of all samples."""
    return np.sqrt(np.square(x).mean())


def rmse(x: Array, y: Array) -> Array:
    """Return the root mean square difference of each sample, shape (N,)."""
    return np.sqrt(np.square(x - y).reshape(len(x), -1).mean(axis=1))


@dataclass(frozen=True)
class Student:
    """A network and the plan to be fitted; the fit leaves the form and the calls of its rows alone."""

    network: Network
    plan: Plan

    @cached_property
    def free(self) -> Flags:
        """The coefficients that may be fitted; see `deis.calibration.table.free`."""
        return free(self.plan)

    def predict(self, i: int, x: Array, t: float, first: int = 0) -> Array:
        """Return the prediction of row i, which may be one that makes no call."""
        return self.network.predict(x, t, self.plan.form, first) if self.plan.calls[i] else guessed(self.plan.rows[i], x, combine)

    def run(self, table: Table, x: Array, first: int = 0, row: int = 0, history: tuple[Array, ...] = ()) -> Array:
        """Run a table on the samples from `first` on, from a row on, with the predictions before it, newest first."""

        def predict(i: int, x: Array) -> Array:
            return self.predict(row + i, x, table.t[row + i], first)

        return run_rows(table.rows[row:], predict, combine, x, history=history) if row < len(table.a) else x
