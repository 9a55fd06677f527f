"""The commands `deis compare` and `deis recommend`: methods side by side on one model, and the plan to use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..comparison import Comparison, compare, recommend, usual_methods
from ..comparison.figures import percent, power
from ..comparison.lineup import BUDGETS
from ..comparison.report import PAGE, number
from ..comparison.result import NOT_FINITE
from ..comparison.shelf import WORK, check_folder
from ..extras import needs
from ..model.pretrained import Pretrained
from ..plan import load_plan
from . import shared

_BUDGETS = ",".join(map(str, BUDGETS))


def _common(command: Any) -> Any:
    """Add the options of both commands."""
    for option in (
        click.option("--allow-rough", is_flag=True, help="Take a reference that has not converged, too."),
        click.option("--reference-steps", type=shared.TWO, help="By default doubled until the reference's end stands still."),
        click.option("--batch", default=64, type=shared.POSITIVE, show_default=True, help="Samples a call of the model."),
        click.option("--plan", "files", type=shared.PLAN, multiple=True, help="Plan files to compare, too."),
        click.option("--grid", "grids", multiple=True, help="own (the method's), t, rho, log, vp_t; with a power as in rho:7."),
        click.option(
            "--method",
            "methods",
            type=shared.MethodName("calibrated"),
            multiple=True,
            help="Methods; calibrated: the model's own plans. By default six.",
        ),
    ):
        command = option(command)
    return command


@click.command("compare")
@shared.model_options
@_common
@click.option("--nfe", default=_BUDGETS, show_default=True, type=shared.budgets, help="Budgets of evaluations: 4,8 or 3-10.")
@click.option("--num", default=64, type=shared.POSITIVE, show_default=True, help="Samples of each method.")
@click.option("--real", type=click.Path(path_type=Path, exists=True), help="Real images: a folder of pictures, or an .npz file.")
@click.option("--features", help="A TorchScript file, images in [-1, 1] to features; or inception. Needs --real.")
@click.option("--work", type=shared.FOLDER, help="Keep measurements here; by default in the folder work of the report.")
@click.option("--out", type=shared.FOLDER, default=Path("report"), show_default=True, help="The folder of the report.")
@shared.errors()
def compare_command(**options: Any) -> None:
    """Set methods side by side on a model, from the same noise, and write a report. Ctrl-C keeps what is done."""
    check_folder(options["out"])
    model = _loaded(options)
    settings = _settings(model, options) | _measures(options)
    try:
        found = compare(model, options["num"], nfes=options["nfe"], name=_name(options), out=options["out"], **settings)
    except KeyboardInterrupt:
        kept = options["work"] or options["out"] / WORK
        click.echo(f"\nstopped; what was measured is in {kept}: give the same command to go on", err=True)
        sys.exit(130)
    show(found)
    click.echo(f"wrote {options['out'] / PAGE}: open it in a browser, or mail it")


@click.command("recommend")
@shared.model_options
@_common
@click.option("--nfe", type=shared.POSITIVE, help="The budget: network evaluations.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="The budget: seconds an image, in batches of --batch.")
@click.option("--error", type=click.FloatRange(min=0, min_open=True), help="The error wanted: the fewest evaluations are sought.")
@click.option("--calibrate", is_flag=True, help="Fit plans to the model, too: minutes, and most often the least error.")
@click.option("--num", default=32, type=shared.POSITIVE, show_default=True, help="Samples of each method.")
@click.option("--work", type=shared.FOLDER, help="Keep measurements here, and go on from there.")
@click.option("--out", type=shared.OutFile(), help="Write the plan to this JSON file.")
@shared.errors()
def recommend_command(**options: Any) -> None:
    """Say in three lines which plan to use on a model for a budget: --nfe, --seconds or --error."""
    budget = {name: options[name] for name in ("nfe", "seconds", "error")}
    if sum(value is not None for value in budget.values()) != 1:
        raise ValueError("give one budget: --nfe, --seconds an image, or --error")
    model = _loaded(options)
    found = recommend(model, options["num"], calibrate=options["calibrate"], **budget, **_settings(model, options))
    click.echo("\n".join(found.lines))
    if options["out"] is None:
        click.echo(f"In Python: {found.code}" if not found.fitted_here else "Give --out plan.json to keep this plan.")
        return
    found.plan.save(options["out"])
    click.echo(f"wrote {options['out']}; {use(options['model'], options['out'])}")


def use(model: str | None, out: Path) -> str:
    """Return the line of Python that uses a plan file; of a pipeline, that of diffusers."""
    load = f'deis.load_plan("{out}")'
    spec = None if model is None else Path(model)
    if spec is not None and ((spec / "model_index.json").exists() or not spec.exists()):  # or on the hub
        return (
            "with diffusers: from deis.adapters.diffusers import PlanScheduler; "
            f"pipe.scheduler = PlanScheduler.from_plan({load}, pipe.scheduler.config)"
        )
    return f"in Python: deis.sample({load}, model, x_T)"


def _loaded(options: dict[str, Any]) -> Pretrained:
    if options["backend"] != "torch":
        raise ValueError("--backend jax is not compared by this command; use deis.compare in Python, or leave it out")
    return shared.load(options)


def _name(options: dict[str, Any]) -> str:
    return "The bundled MNIST model" if options["model"] is None else str(options["model"])


def _settings(model: Pretrained, options: dict[str, Any]) -> dict[str, Any]:
    """Return what `compare` and `recommend` take."""
    usual = usual_methods(model.plans if options["guidance"] == 1 else {})
    return {
        "methods": [*(options["methods"] or usual), *map(load_plan, options["files"])],
        "grids": options["grids"] or None,
        "progress": True,
        **{name: options[name] for name in ("guidance", "seed", "batch", "reference_steps", "allow_rough", "work")},
    }


def _measures(options: dict[str, Any]) -> dict[str, Any]:
    """Return the extractor and the features of the real images, where they are asked for."""
    extractor, real = shared.real_features(options["features"], options["real"], options["device"] or "cpu")
    return {"extractor": extractor, "real": real}


def show(found: Comparison) -> None:
    """Print the errors as a table: a line a method, the best of each budget marked."""
    with needs("see", "a table"):
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=f"error to the converged solution, the median of {found.about['samples']} samples"
    )
    table.add_column("method", no_wrap=True)
    for nfe in found.nfes:
        table.add_column(f"{nfe} NFE", justify="right")
    for heading in ("slope", "overhead"):
        table.add_column(heading, justify="right")
    for series in found.series:
        cells = [_cell(found, series, nfe) for nfe in found.nfes]
        table.add_row(series, *cells, power(found.slope(series)), percent(found.overhead(series)))
    narrow = Console()
    wide = narrow.measure(table, options=narrow.options.update(max_width=1000)).maximum
    Console(width=max(narrow.width, wide)).print(table)
    for note in dict.fromkeys(f"{row.series}, {row.nfe} NFE: {row.note}" for row in found.rows if row.note):
        click.echo(note)


def _cell(found: Comparison, series: str, nfe: int) -> str:
    row = found.row(series, nfe)
    if row is None:
        return ""
    if row.note:
        return row.note if row.note == NOT_FINITE else "none"
    best = found.best(nfe)
    return f"[bold green]{number(row.error)}*[/]" if best is not None and best.series == series else number(row.error)
