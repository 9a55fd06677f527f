"""Plans for a range of budgets from one teacher: `calibrate_range`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import array, kind, one_of, whole
from ..grids import PHASES
from ..methods import make_plan
from ..methods.layout import Builder
from ..plan import Plan
from .fit import Settings, Shared, TooFewSecondsError, calibrated, check_plans, clock_of, split
from .network import Model, Network
from .teacher import Teacher


def calibrate_range(
    model: Model,
    samples: Any = None,
    nfe: Sequence[int] = range(3, 11),
    *,
    method: str | Builder = "auto",
    ts_phase: str | None = None,
    ts_order: float | None = None,
    condition: Any = None,
    teacher: Teacher | int | None = None,
    batch: int = 64,
    seconds: float | None = None,
    folder: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = False,
    allow_rough: bool = False,
    **settings: Any,
) -> dict[int, Plan]:
    """Fit a plan to a model for each of several budgets: what `calibrate` does, with one teacher for all.

    The teacher, its jumps, and its predictions at the initial noise, with which every plan begins, are made once.

    Parameters
    ----------
    model, samples, condition, teacher, batch, progress, allow_rough
        As for `calibrate`.
    nfe : sequence of int
        The budgets, in network evaluations.
    method, ts_phase, ts_order
        The plans to start from, see `make_plan`; by default "auto".
    seconds : float, optional
        The wall time for all budgets. They are done from the smallest up, and share the time in proportion. What one leaves over,
        as small ones do, goes to the later ones.
    folder : path, optional
        Where to keep the teacher and the plan of each finished stage; an interrupted calibration resumes from there.
    out : path, optional
        Where to write each plan as soon as it is finished: a folder, created if missing, for files such as nfe-4.json; or a file
        name with {nfe} in it.
    settings
        Other settings of `calibrate`: stages, validation, window, times, iterations, loss and steps.

    Returns
    -------
    dict of int to Plan
        The plan of each budget. Budgets for which the time did not suffice are missing, and a warning names them.

    Raises
    ------
    ValueError
        As `calibrate`; and if the method cannot meet one of the budgets, or the time does not suffice for any.
    """
    checked = Settings(method=None if isinstance(method, str) else method, **settings)
    ts_phase = None if ts_phase is None else one_of("ts_phase", ts_phase, PHASES)
    network = teacher.network if isinstance(teacher, Teacher) else Network(model, samples, condition, batch)
    starts: dict[int, Plan] = {}
    for budget in _budgets(nfe):
        starts[budget] = make_plan(network.sde, method, None, ts_phase, ts_order, nfe=budget)
        check_plans([starts[budget]])
        split([starts[budget]], network.x_T.shape, checked.validation)
    path = None if out is None else _pattern(out)
    with clock_of(seconds, progress, f"calibrating {min(starts)} to {max(starts)} evaluations") as clock:
        shared = Shared.of(teacher, model, samples, clock, allow_rough, {"condition": condition, "batch": batch, "folder": folder})
        return _finished(starts, shared, checked, path)


def _budgets(nfe: Any) -> list[int]:
    """Return the budgets in increasing order."""
    found = sorted({whole("nfe", budget) for budget in array("nfe", nfe, "such as range(3, 11)").ravel().tolist()})
    if not found:
        raise ValueError("nfe is empty; give at least one budget")
    return found


def _finished(starts: dict[int, Plan], shared: Shared, settings: Settings, path: str | None) -> dict[int, Plan]:
    """Return the plans that can be finished in time; each is written when it is finished."""
    plans: dict[int, Plan] = {}
    for budget, start in starts.items():
        left = [other for other in starts if other not in plans]
        shared.clock.plan_share(budget / sum(left))
        try:
            plans[budget] = calibrated([start], shared, settings)
        except TooFewSecondsError as error:
            if not plans:
                raise
            warnings.warn(f"nfe={left} are missing, {list(plans)} finished: {error}", stacklevel=3)
            break
        shared.told = (0, 0.0)
        if path is not None:
            plans[budget].save(path.replace("{nfe}", str(budget)))
    return plans


def _pattern(out: str | os.PathLike[str]) -> str:
    """Return the name of a plan's file, with {nfe} in it."""
    kind("out", out, (str, os.PathLike), "the name of a folder, or of a file with {nfe} in it,")
    if "{nfe}" in os.fspath(out):
        return os.fspath(out)
    Path(out).mkdir(parents=True, exist_ok=True)
    return os.fspath(Path(out) / "nfe-{nfe}.json")
