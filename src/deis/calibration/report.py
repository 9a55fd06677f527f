"""What a calibrated plan tells of its making."""

from __future__ import annotations

from typing import Any

from ..arguments import kind
from ..plan import Plan
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
        f"{'stage':<15}{'error before':>14}{'after':>10}{'loss before':>13}{'after':>9}{'change':>17}"
        f"{'evaluations':>13}{'seconds':>9}",
    ]
    return "\n".join([*lines, *map(_line, about["stages"])])


def _line(row: dict[str, Any]) -> str:
    """Return the line of a stage; plans of earlier versions were judged by the error, and tell of no loss."""
    before, after = ("loss_before", "loss_after") if "loss_after" in row else ("before", "after")
    losses = f"{'':39}"
    if before == "loss_before":
        change = f"{row[after] - row[before]:.3f} +- {row['standard_error']:.3f}"
        losses = f"{row[before]:>13.3f}{row[after]:>9.3f}{change:>17}"
    unchanged = row["stage"] != "teacher" and row[after] >= row[before]
    return (
        f"{row['stage']:<15}{row['before']:>14.5f}{row['after']:>10.5f}{losses}{row['evaluations']:>13.0f}{row['seconds']:>9.1f}"
        + ("  could not improve it" if unchanged else "")
        + ("  cut short: the time was over" if row.get("cut") else "")
    )
