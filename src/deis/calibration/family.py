"""Plans for a range of guidance weights, or of any other parameter of a model: fitted at some, interpolated between."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arguments import array, function, number, shown
from ..files import digest, parse, read, replacing
from ..plan import Plan
from .fit import calibrate
from .network import Model
from .stages import checked_stages

FORMAT, VERSION = "deis.plan_family", 2


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
        values = array("values", self.values)
        if not isinstance(self.plans, tuple | list) or not all(isinstance(plan, Plan) for plan in self.plans):
            raise TypeError(f"plans must be a tuple of deis.Plan, and is {shown(self.plans)}")
        if values.shape != (len(self.plans),) or len(values) < 2 or not (np.isfinite(values).all() and (np.diff(values) > 0).all()):
            raise ValueError(
                f"values={shown(self.values)} must be two or more increasing numbers, one for each of the {len(self.plans)} plans"
            )
        object.__setattr__(self, "values", tuple(values.tolist()))
        object.__setattr__(self, "plans", tuple(self.plans))
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
        value = number("value", value)
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
        content = {"values": list(self.values), "plans": [plan.document() for plan in self.plans]}
        document = {"format": FORMAT, "version": VERSION, "sha256": _checksum(content), **content}
        with replacing(path) as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlanFamily:
        """Read a family that `save` wrote.

        Raises
        ------
        ValueError
            Where the file is truncated, is no family of plans, or was changed after it was saved; it says which.
        FileNotFoundError
            Where there is none.
        """
        data = read(path)
        try:
            document = parse(data)
            if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"its format is not {FORMAT!r}, version {VERSION}; fit the family anew and save it")
            if set(document) != {"format", "version", "sha256", "values", "plans"}:
                raise ValueError(f"it must hold format, version, sha256, values and plans, and holds {shown(sorted(document))}")
            values, plans = document["values"], document["plans"]
            if document["sha256"] != _checksum({"values": values, "plans": plans}):
                raise ValueError("it was changed after it was saved (the checksum differs); fit the family anew and save it")
            if not (isinstance(values, list) and isinstance(plans, list) and all(type(value) in (int, float) for value in values)):
                raise ValueError("its values and plans are not lists of numbers and plans")
            return cls(tuple(values), tuple(Plan.from_document(plan) for plan in plans))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a usable file of plans: {error}") from None


def _checksum(content: dict[str, Any]) -> str:
    """Return the checksum of all that a family holds: the values, the plans and the order of both."""
    try:
        return digest(json.dumps(content, sort_keys=True))
    except RecursionError:
        raise ValueError("it is nested too deep for a family of plans") from None


_NUMBERS = ("keep_x", "keep_p", "next_x", "next_p")


def _wide(plan: Plan, name: str, window: int) -> Any:
    array = getattr(plan, name)
    return array if array.ndim == 1 else np.pad(array, ((0, 0), (0, window - array.shape[1])))


def calibrate_family(
    plan: Plan, model_at: Callable[[float], Model], values: Sequence[float], samples: Any = None, **options: Any
) -> PlanFamily:
    """Calibrate a plan at several values of a parameter of the model, such as the weight of its guidance.

    The middle value is fitted first, times included. The others are then fitted one by one on the same times, each starting from
    its neighbour, so that coefficients vary smoothly and can be interpolated.

    Parameters
    ----------
    model_at : callable
        model_at(value) -> what `calibrate` takes for a model, such as
        ``lambda w: lambda labels: network.conditional(labels, guidance=w)``.
    values : sequence of float
    samples, options
        As for `calibrate`, except for the teacher: each value has its own.
    """
    function("model_at", model_at, "value")
    values = tuple(sorted(array("values", values).ravel().tolist()))
    if len(set(values)) < 2:
        raise ValueError(f"values={values!r} must be two different numbers or more")
    middle = len(values) // 2
    stages = checked_stages(options.pop("stages", ("grid", "least_squares", "gauss_newton")))
    # Predictions at successive times are almost parallel: a new least-squares fit would find coefficients far from the neighbour's.
    later = [stage for stage in stages if stage not in ("grid", "least_squares")] or ["least_squares"]
    plans = {middle: calibrate(plan, model_at(values[middle]), samples, stages=stages, **options)}
    for k in (*range(middle + 1, len(values)), *range(middle - 1, -1, -1)):
        start = replace(plans[k - 1 if k > middle else k + 1], provenance={})
        plans[k] = calibrate(start, model_at(values[k]), samples, stages=later, times=False, **options)
    return PlanFamily(values, tuple(plans[k] for k in range(len(values))))
