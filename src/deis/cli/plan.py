"""The command `deis plan`: a plan in print, as a file and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..files import replacing
from ..sde import EDM, VESDE, VPSDE, FlowMatching, Schedule, SubVPSDE
from . import shared

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "vp-linear": VPSDE.linear, "vp-cosine": VPSDE.cosine, "sub-vp": SubVPSDE.linear, "ve": VESDE, "edm": EDM, "flow": FlowMatching,
}  # fmt: skip


class PictureFile(shared.OutFile):
    """A picture to write; the end of its name says of which kind."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Path = super().convert(value, param, ctx)
        if path.suffix.lower() not in (".png", ".svg", ".pdf"):
            self.fail(f"{str(path)!r} must end in .png, .svg or .pdf", param, ctx)
        return path


@click.command("plan")
@shared.plan_options
@click.option("--schedule", type=click.Choice(list(SCHEDULES)), help="The noise schedule; by default vp-linear.")
@click.option("--plan", "file", type=shared.PLAN, help="A plan file, as deis calibrate writes it, in place of a method and grid.")
@click.option("--out", type=shared.OutFile(), help="Write the plan to this JSON file, too.")
@click.option("--show", type=PictureFile(), help="Draw the plan into this file, too: png, svg or pdf.")
@shared.errors()
def plan_command(schedule: str | None, file: Path | None, out: Path | None, show: Path | None, **options: Any) -> None:
    """Print a plan: its times and its coefficients."""
    if file is None:
        plan = shared.build_plan(SCHEDULES[schedule or "vp-linear"](), options)
    elif schedule is not None:
        raise ValueError(f"--plan {file} and --schedule {schedule} conflict; leave one out")
    else:
        plan = shared.plan_of_file(options | {"file": file})
    click.echo(repr(plan))
    if out is not None:
        plan.save(out)
        click.echo(f"wrote {out}")
    if show is not None:
        with replacing(show) as partial:
            plan.plot().savefig(partial, format=show.suffix.lower()[1:])
        click.echo(f"wrote {show}")
