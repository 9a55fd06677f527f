"""The record of a calibration in its plan, and a report of it."""

from __future__ import annotations

from html import escape
from typing import Any

from ..arguments import kind
from ..plan import Plan
from ..plan_html import table_of
from .teacher import Teacher


def provenance(teacher: Teacher, fit: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `Plan.provenance` of a plan that was fitted to the first samples of a teacher, with the records of its stages."""
    return {
        "samples": fit,
        "validation": len(teacher.states[0]) - fit,
        "teacher_steps": len(teacher.t) - 1,
        "teacher_self_error": teacher.self_error,
        "stages": records,
    }


class Report(str):
    """A report as text; a notebook shows it as an HTML table."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def calibration_report(plan: Plan) -> Report:
    """Return a table of what each stage of a plan's calibration did, to print or to show in a notebook.

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
        f"{'stage':<15}{'error before':>14}{'after':>10}{'loss before':>13}{'after':>9}{'change':>17}"
        f"{'evaluations':>13}{'seconds':>9}",
    ]
    report = Report("\n".join([*lines, *map(_line, about["stages"])]))
    report.html = f"<p>{escape(lines[0])}</p>{table_of(_COLUMNS, map(_cells, about['stages']))}"
    return report


def _line(row: dict[str, Any]) -> str:
    """Return the line of a stage."""
    stage, before, after, loss_before, loss_after, change, evaluations, seconds, remark = _cells(row)
    errors, losses = f"{stage:<15}{before:>14}{after:>10}", f"{loss_before:>13}{loss_after:>9}{change:>17}"
    return f"{errors}{losses}{evaluations:>13}{seconds:>9}{remark and '  ' + remark}"


_COLUMNS = ("stage", "error before", "after", "loss before", "after", "change", "evaluations", "seconds", "")


def _cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a stage; plans of earlier versions were judged by the error, and have no loss."""
    before, after = ("loss_before", "loss_after") if "loss_after" in row else ("before", "after")
    losses = ["", "", ""]
    if before == "loss_before":
        change = f"{row[after] - row[before]:.3f} +- {row['standard_error']:.3f}"
        losses = [f"{row[before]:.3f}", f"{row[after]:.3f}", change]
    remarks = ["could not improve it"] if row["stage"] != "teacher" and row[after] >= row[before] else []
    remarks += ["cut short: out of time"] if row.get("cut") else []
    errors = [f"{row['before']:.5f}", f"{row['after']:.5f}"]
    return [row["stage"], *errors, *losses, f"{row['evaluations']:.0f}", f"{row['seconds']:.1f}", "  ".join(remarks)]
