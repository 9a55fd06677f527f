"""What the executors share: the options of a run, and its checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..arrays import Array, Flags
from ..backends import backend_of
from ..machine import Row
from ..model.predictions import Denoiser, named
from ..model.pretrained import without_labels


@dataclass(frozen=True)
class Options:
    """How to run a plan; see `deis.sample`."""

    factors: tuple[tuple[float, ...], ...]
    """For each row, in float64, what turns the network's output into a prediction; see `deis.model.predictions.conversions`."""
    rng: Any
    trajectory: bool
    callback: Callable[[int, float, Any], Any] | None
    progress: bool
    check_finite: bool
    grad: bool
    parallel: bool = False
    base: Any = None
    """The second state of a plan that begins with two, see `Plan.pair`."""


def told(model: Any, predicts: str | None) -> tuple[Callable[[Any, Any], Any], str, Callable[[Any], Any] | None]:
    """Return the model to call, what it predicts and its threshold: from a Denoiser, or for a plain function from the caller.

    Raises
    ------
    ValueError
        If the caller contradicts a Denoiser.
    """
    model, predicts = without_labels(model), named(predicts)
    if not isinstance(model, Denoiser):
        return model, "eps" if predicts is None else predicts, None
    if predicts not in (None, model.predicts):
        raise ValueError(f"predicts={predicts!r} contradicts the Denoiser, which predicts {model.predicts!r}; leave it out")
    return model, model.predicts, model.threshold


class Stepped(Protocol):
    """A plan, of whatever coefficients, whose rows are stages of steps."""

    @property
    def method(self) -> str:
        """What made it."""

    @property
    def num_step(self) -> int:
        """The number of steps."""

    @property
    def ts(self) -> Array:
        """The times of the steps."""

    @property
    def accepts(self) -> Flags:
        """Which rows end a step."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows."""


def observer(plan: Stepped, options: Options, keep: list[Any]) -> Callable[[int, Any], None] | None:
    """Return the function to call with each row's state, which skips the stages; None if nobody listens."""
    if not (options.trajectory or options.callback or options.progress):
        return None
    number = np.cumsum(plan.accepts) - 1
    bar: Any = None

    # In JAX one observer serves every later call of a compiled function, so it keeps no count of its own.
    def observe(i: int, x: Any) -> None:
        nonlocal bar
        if not plan.rows[i].accepts:
            return
        step = int(number[i])
        if options.trajectory:
            keep.append(x)
        if options.callback is not None:
            told = options.callback  # called like a model of x alone, so that it cannot change the state in place
            backend_of(x).caller()(lambda x, _: told(step, float(plan.ts[step + 1]), x), x, x, "x of callback(i, t, x)")
        if options.progress:
            bar = progress_bar(plan.method or "plan", "step", plan.num_step) if step == 0 else bar
            bar.update()
            if step == plan.num_step - 1:
                bar.close()

    return observe


def progress_bar(about: str, unit: str, total: int | None = None) -> Any:
    """Return a tqdm bar."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm(total=total, desc=about, unit=unit)


def not_finite(i: int, plan: Stepped, sample: Any = None) -> ValueError:
    """Return the error for a model output that is NaN or infinite; it names the sample if each has its own plan."""
    whose = "" if sample is None else f" for sample {sample!r}"
    return ValueError(
        f"model(x, t) returned NaN or infinity{whose} at t={plan.rows[i].t!r} (row {i} of {len(plan.rows)}); check "
        "that x_T is finite, that the model was trained at this time, and its dtype"
    )
