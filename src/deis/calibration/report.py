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
        f"{'stage':<15}{'error before':>14}{'after':>10}{'evaluations':>13}{'seconds':>9}",
    ]
    for row in about["stages"]:
        unchanged = row["stage"] != "teacher" and row["after"] >= row["before"]
        lines.append(
            f"{row['stage']:<15}{row['before']:>14.5f}{row['after']:>10.5f}{row['evaluations']:>13.0f}{row['seconds']:>9.1f}"
            + ("  could not improve it" if unchanged else "")
        )
    return "\n".join(lines)
