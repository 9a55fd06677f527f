"""What is compared: methods x grids x budgets, each with its plan or the reason why there is none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..arguments import array, kind, number, one_of, whole
from ..grids import DEFAULT_ORDER, PHASES
from ..methods import make_plan
from ..methods.registry import find
from ..plan import Plan
from ..sde import Schedule

CALIBRATED = "calibrated"
"""As the name of a method: the plans that came with the model."""
BUDGETS = (4, 5, 6, 8, 10)
Grid = tuple[str, float | None] | None


@dataclass(frozen=True)
class Entry:
    """A plan of a comparison, or the reason why there is none."""

    method: str
    grid: str
    nfe: int
    plan: Plan | None
    reason: str = ""


def usual_methods(calibrated: Mapping[int, Plan]) -> tuple[str, ...]:
    """Return six methods to compare: the default, the paper's, those most used, and a model's own plans or iPNDM."""
    return (
        *((CALIBRATED,) if calibrated else ()),
        "auto",
        "tab3",
        "unipc2_bh2",
        "dpmpp_2m",
        *(() if calibrated else ("ipndm3",)),
        "ddim",
    )


def entries(
    sde: Schedule, methods: Iterable[str | Plan], grids: Sequence[Grid], nfes: Sequence[int], calibrated: Mapping[int, Plan]
) -> list[Entry]:
    """Return what is compared, method by method; plans that are given are compared at their own evaluations.

    Raises
    ------
    ValueError
        For an unknown method, or a plan of another schedule.
    """
    found: list[Entry] = []
    for method in methods:
        if isinstance(method, Plan):
            found.append(_given(method, sde, found))
        elif method == CALIBRATED:
            found += [_own(nfe, calibrated, sde) for nfe in nfes]
        else:
            kind("methods", method, str, "names of methods, or plans,")
            find(method)
            found += [_made(sde, method, grid, nfe) for grid in grids for nfe in nfes]
    if not found:
        raise ValueError("methods is empty; give at least one name, such as 'auto'")
    return list(dict.fromkeys(found))


def _given(plan: Plan, sde: Schedule, others: Sequence[Entry] = ()) -> Entry:
    if not plan.matches(sde):
        raise ValueError(f"the plan {plan.method!r} is of the schedule {plan.schedule}, and the model of {sde.name}")
    names = {other.method for other in others if other.nfe == plan.nfe and other.plan != plan}
    name = next(name for i in count(1) if (name := f"plan {plan.method}" + (f" ({i})" if i > 1 else "")) not in names)
    return Entry(name, "", plan.nfe, plan)


def _own(nfe: int, calibrated: Mapping[int, Plan], sde: Schedule) -> Entry:
    plan = calibrated.get(nfe)
    if plan is None:
        there = f"only of {', '.join(map(str, sorted(calibrated)))}" if calibrated else "none at all"
        return Entry(CALIBRATED, "", nfe, None, f"the model has no calibrated plan of {nfe} evaluations, {there}")
    return Entry(CALIBRATED, "", nfe, _given(plan, sde).plan)


def _made(sde: Schedule, method: str, grid: Grid, nfe: int) -> Entry:
    phase, order = (None, None) if grid is None else grid
    text = "" if phase is None else grid_name(phase, order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of plans that are far off: how far is what is measured
        try:
            return Entry(method, text, nfe, make_plan(sde, method, None, phase, order, nfe=nfe))
        except ValueError as error:
            return Entry(method, text, nfe, None, str(error))


def grid_name(phase: str, order: float | None) -> str:
    """Return the name of a grid as `read_grid` takes it."""
    return phase if phase == "log" else f"{phase}:{DEFAULT_ORDER[phase] if order is None else order:g}"


def read_grid(text: str) -> Grid:
    """Return the grid of a name: "t", "rho:7", "log", "vp_t:2"; None of "own", the grid of the method or the schedule.

    Raises
    ------
    ValueError
        For another name, or a power that is no positive number.
    """
    if text == "own":
        return None
    phase, colon, power = text.partition(":")
    one_of("grid", phase, (*PHASES, "own"), ", with a power behind a colon, as in 'rho:7'")
    try:
        value = float(power) if colon else None
    except ValueError:
        value = math.nan
    return phase, None if value is None else number(f"the power of grid {text!r}, which", value, above=0)


def checked_grids(grids: Any) -> list[Grid]:
    """Return grids, each a name that `read_grid` takes or a pair of it."""
    found = [read_grid(grid) if isinstance(grid, str) else grid for grid in (["own"] if grids is None else grids)]
    for grid in found:
        if grid is not None:
            if not (isinstance(grid, tuple) and len(grid) == 2):
                raise ValueError(f"grids must be names such as 'own', 't' or 'rho:7', and one is {grid!r}")
            read_grid(grid_name(one_of("grid", grid[0], PHASES), grid[1]))
    if not found:
        raise ValueError("grids is empty; give at least 'own'")
    return found


def checked_budgets(nfes: Any) -> list[int]:
    """Return the budgets from the least on."""
    found = sorted({whole("nfes", nfe) for nfe in array("nfes", nfes, "such as (4, 6, 8)").ravel().tolist()})
    if not found:
        raise ValueError("nfes is empty; give at least one number of evaluations")
    return found
