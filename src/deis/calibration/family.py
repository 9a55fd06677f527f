"""Plans for a range of guidance weights, or of any other parameter of a model: fitted at some, interpolated between."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing
from ..plan import Plan
from .fit import calibrate
from .network import Model

FORMAT, VERSION = "deis.plan_family", 1


@dataclass(frozen=True)
class PlanFamily:
    """Plans on the same times, fitted at different values of a parameter; `calibrate_family` makes one.

    Attributes
    ----------
    values : tuple of float
        Increasing.
    plans : tuple of Plan

    Raises
    ------
    ValueError
        Where there are fewer than two, the values do not increase, or the plans differ in more than their coefficients.
    """

    values: tuple[float, ...]
    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2 or len(self.plans) != len(self.values) or not (np.diff(self.values) > 0).all():
            raise ValueError(
                f"values={self.values!r} must be two or more, increase, and have a plan each; there are {len(self.plans)}"
            )
        first = self.plans[0]
        for value, plan in zip(self.values, self.plans, strict=True):
            if not (np.array_equal(plan.t, first.t) and plan.form == first.form and np.array_equal(plan.accepts, first.accepts)):
                raise ValueError(f"plans: that of value {value!r} has other times or another form than that of {self.values[0]!r}")

    def at(self, value: float) -> Plan:
        """Return the plan for a value of the parameter: its coefficients are linear between the values that were fitted.

        Raises
        ------
        ValueError
            Outside the values that were fitted.
        """
        if not self.values[0] <= value <= self.values[-1]:
            raise ValueError(f"value={value!r} lies outside what was fitted, {self.values[0]!r} to {self.values[-1]!r}")
        right = int(np.clip(np.searchsorted(self.values, value), 1, len(self.values) - 1))
        low, high = self.plans[right - 1], self.plans[right]
        s = (value - self.values[right - 1]) / (self.values[right] - self.values[right - 1])
        if s in (0.0, 1.0):
            return high if s else low
        window = max(low.window, high.window)
        numbers = {name: (1 - s) * _wide(low, name, window) + s * _wide(high, name, window) for name in _NUMBERS}
        fitted = f"{low.fitted}, between the values {self.values[right - 1]:g} and {self.values[right]:g}"
        return replace(low, **numbers, fitted=fitted, provenance={"value": value, "low": low.provenance, "high": high.provenance})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the family as JSON; the file appears whole or not at all."""
        document = {"format": FORMAT, "version": VERSION, "values": self.values, "plans": [plan.document() for plan in self.plans]}
        with replacing(path) as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlanFamily:
        """Read a family that `save` wrote.

        Raises
        ------
        ValueError
            Where the file is truncated, is no family of plans, or was changed after it was saved; it says which.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"its format is not {FORMAT!r}, version {VERSION}")
            values, plans = document.get("values"), document.get("plans")
            if not (isinstance(values, list) and isinstance(plans, list) and all(type(value) in (int, float) for value in values)):
                raise ValueError("its values and plans are not lists of numbers and plans")
            return cls(tuple(map(float, values)), tuple(Plan.from_document(plan) for plan in plans))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a usable file of plans: {error}") from None


_NUMBERS = ("keep_x", "keep_p", "next_x", "next_p")


def _wide(plan: Plan, name: str, window: int) -> Any:
    array = getattr(plan, name)
    return array if array.ndim == 1 else np.pad(array, ((0, 0), (0, window - array.shape[1])))


def calibrate_family(
    plan: Plan, model_at: Callable[[float], Model], values: Sequence[float], samples: Any = None, **options: Any
) -> PlanFamily:
    """Calibrate a plan at several values of a parameter of the model, such as the weight of its guidance.

    The middle value is fitted first, times and all; from there on each is fitted on the same times, starting from its neighbour,
    so that coefficients vary smoothly and can be interpolated.

    Parameters
    ----------
    model_at : callable
        model_at(value) -> what `calibrate` takes for a model, such as
        ``lambda w: lambda labels: network.conditional(labels, guidance=w)``.
    values : sequence of float
    samples, options
        As for `calibrate`, but a teacher: each value has its own.
    """
    values = tuple(sorted(map(float, values)))
    middle = len(values) // 2
    stages = options.pop("stages", ("grid", "least_squares", "gauss_newton"))
    later = [stage for stage in stages if stage != "grid"]
    plans = {middle: calibrate(plan, model_at(values[middle]), samples, stages=stages, **options)}
    for k in (*range(middle + 1, len(values)), *range(middle - 1, -1, -1)):
        start = replace(plans[k - 1 if k > middle else k + 1], provenance={})
        plans[k] = calibrate(start, model_at(values[k]), samples, stages=later, times=False, **options)
    return PlanFamily(values, tuple(plans[k] for k in range(len(values))))
