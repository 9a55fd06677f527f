"""The command line: `deis sample`, `generate`, `edit`, `plan`, `methods`, `calibrate`, `evaluate`, `compare` and others."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import install

try:
    import click
    from click.core import ParameterSource
    from tqdm.auto import tqdm

    from .pictures import picture
except ImportError as error:
    sys.exit(f"the command line needs {error.name}: {install('cli')}")

from ..arrays import AnyArray
from ..files import replacing
from ..methods import make_plan
from ..model.pretrained import Pretrained
from ..plan import Plan, load_plan
from ..seeded import draw_noise, jax_runner, precision, torch_runner
from . import shared
from .compare import compare_command, recommend_command
from .edit import edit_command
from .generate import generate_command
from .lab import lab_command
from .methods import methods_command
from .plan import plan_command
from .serve import serve_command

_EPILOG = """deis methods lists the values of --method. For tab completion, put this line into ~/.bashrc:
eval "$(_DEIS_COMPLETE=bash_source deis)"; other shells have zsh_source and fish_source."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(package_name="deis-samplers")
def main() -> None:
    """Samples from a diffusion model in few network calls."""


for command in (
    plan_command,
    methods_command,
    edit_command,
    generate_command,
    compare_command,
    recommend_command,
    lab_command,
    serve_command,
):
    main.add_command(command)


@main.command("calibrate")
@partial(shared.plan_options, nfe=shared.budgets, about="Network evaluations, or several budgets: 4, or 3-10, or 3,5,8.")
@shared.model_options
@click.option("--out", type=shared.OutFile(True), help="By default plan.json; for several budgets a folder, by default plans.")
@click.option("--samples", default=96, type=shared.POSITIVE, show_default=True, help="Noise samples to fit and validate with.")
@click.option("--batch", default=64, type=shared.POSITIVE, show_default=True, help="Samples per call of the model.")
@click.option("--stages", default="grid,least_squares,gauss_newton", show_default=True, help="In this order; also: gradient.")
@click.option("--iterations", default=10, type=shared.POSITIVE, show_default=True, help="The most Gauss-Newton iterations.")
@click.option("--window", type=shared.POSITIVE, help="Predictions that a row may use; by default all earlier ones.")
@click.option("--teacher-steps", type=shared.TWO, help="By default doubled until the final states settle.")
@click.option("--allow-rough", is_flag=True, help="Accept a teacher that has not converged.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="The wall time; by default there is no limit.")
@click.option("--work", type=shared.FOLDER, help="Keep the teacher and finished stages here, and resume from there.")
@shared.errors()
def calibrate_command(**options: Any) -> None:
    """Fit a plan to a model, or one for each of several budgets, and write it for deis sample --plan."""
    from ..calibration import calibrate, calibration_report

    budgets, model = options["nfe"] or (None,), shared.load(options)
    plans = [shared.build_plan(model.sde, options | {"nfe": budget}) for budget in budgets]
    noise = draw_noise(model, plans[0], options, range(10**6, 10**6 + options["samples"]))  # not those of deis sample
    settings = {
        "condition": shared.labels_of(model, options["samples"]),
        "teacher": options["teacher_steps"],
        "stages": tuple(options["stages"].split(",")),
        "folder": options["work"],
        "progress": True,
        **{name: options[name] for name in ("window", "iterations", "batch", "seconds", "allow_rough")},
    }
    if len(plans) > 1:
        _calibrate_range(shared.of_labels(model, options), noise, settings, options)
        return
    out = options["out"] or Path("plan.json")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give the name of a file for a single plan")
    plan = calibrate(plans[0], shared.of_labels(model, options), noise, method=options["method"], **settings)
    plan.save(out)
    click.echo(f"{calibration_report(plan)}\nwrote {out}: try deis sample --plan {out}")


def _calibrate_range(model: Any, noise: Any, settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Fit the plans of several budgets, and write each when it is finished."""
    from ..calibration import calibrate_range, calibration_report

    out, grid = options["out"] or Path("plans"), {"ts_phase": options["grid"], "ts_order": options["grid_order"]}
    plans = calibrate_range(model, noise, options["nfe"], method=options["method"] or "auto", out=out, **grid, **settings)
    click.echo("\n\n".join(map(calibration_report, plans.values())) + f"\nwrote {out}: plans of {', '.join(map(str, plans))}")
    if len(plans) < len(options["nfe"]):
        missing = ",".join(str(budget) for budget in options["nfe"] if budget not in plans)
        raise ValueError(f"--seconds {options['seconds']:g} did not suffice for --nfe {missing}; give more, and --work to resume")


@main.command("sample")
@shared.plan_options
@shared.model_options
@click.option("--plan", "file", type=shared.PLAN, help="A plan file, as deis calibrate writes it, in place of a method and grid.")
@click.option("--num", default=50, type=shared.POSITIVE, show_default=True, help="The number of samples.")
@click.option("--class", "label", type=int, help="The class of every sample; without it, each class in turn.")
@click.option("--batch", default=50, type=shared.POSITIVE, show_default=True, help="Samples per batch; no sample depends on it.")
@shared.dtype_option
@click.option("--out", type=shared.OutFile(), default=Path("samples.png"), show_default=True)
@click.option("--npz", type=shared.OutFile(), help="Write the samples as arrays, too.")
@shared.errors()
def sample_command(**options: Any) -> None:
    """Sample a model and write a picture, samples side by side."""
    num, batch = options["num"], options["batch"]
    with precision(options):
        model = shared.load(options, options["dtype"])
        labels = shared.labels_of(model, num, options["label"])
        plan = shared.choose_plan(model, options)
        run = (torch_runner if options["backend"] == "torch" else jax_runner)(plan, model, options)
        images: list[AnyArray] = []
        with tqdm(total=-(-num // batch) * plan.num_step, desc=f"{plan.method}, {plan.nfe} evaluations", unit="step") as bar:
            for first in range(0, num, batch):
                chosen = slice(first, min(first + batch, num))
                images.append(run(range(num)[chosen], None if labels is None else labels[chosen], lambda *_: bar.update()))
    x_0 = np.concatenate(images)
    columns = model.num_classes if labels is not None and options["label"] is None else None
    with replacing(options["out"]) as partial:
        picture(x_0, columns).save(partial, format="PNG")
    if options["npz"] is not None:
        with replacing(options["npz"]) as partial, partial.open("wb") as file:
            np.savez_compressed(file, samples=x_0, labels=np.full(num, -1) if labels is None else labels)
        click.echo(f"wrote {options['npz']}")
    click.echo(f"wrote {options['out']}: {num} samples of {plan.nfe} evaluations each")


@main.command("evaluate")
@shared.model_options
@click.option("--plan", "files", type=shared.PLAN, multiple=True, help="Plan files.")
@click.option(
    "--method",
    "methods",
    type=shared.MethodName("calibrated"),
    multiple=True,
    metavar="NAME",
    help="Methods, each at every --nfe; calibrated: the model's own plans.",
)
@click.option("--nfe", "budgets", type=shared.POSITIVE, multiple=True, help="Budgets of evaluations; 10 if none is given.")
@click.option("--num", default=1000, type=shared.POSITIVE, show_default=True, help="Samples of each plan.")
@click.option("--batch", default=100, type=shared.POSITIVE, show_default=True, help="Samples per call of the model.")
@click.option("--real", type=click.Path(path_type=Path, exists=True), help="Real images: a folder of pictures, or an .npz file.")
@click.option("--features", help="A TorchScript file from images in [-1, 1] to features; or inception. Needs --real.")
@click.option("--lpips", help="A distance for --paired: alex, vgg, squeeze, or a TorchScript file of two batches of images.")
@click.option(
    "--paired", default=64, type=shared.COUNT, show_default=True, help="Samples to compare with the converged solution; 0 for none."
)
@click.option("--likelihood", type=shared.TWO, help="Measure the likelihood of this many --real images instead.")
@click.option("--reference-steps", default=128, type=shared.TWO, show_default=True, help="Steps of the converged solution.")
@click.option("--work", type=shared.FOLDER, help="Keep finished batches here, and resume from there.")
@click.option("--samples", type=shared.FOLDER, help="Measure the samples in this folder of deis generate, and make none.")
@click.option("--out", type=shared.OutFile(), default=Path("evaluation.json"), show_default=True)
@shared.errors()
def evaluate_command(**options: Any) -> None:
    """Measure the samples of plans: against real images, and against the converged solution from the same noise.

    With --likelihood, measure the likelihood of real images under the model, by encoding plans on the vp_t grid of power 5.
    """
    if options["backend"] != "torch":
        raise click.BadParameter("evaluation runs in torch only; leave jax out", param_hint="--backend")
    if options["samples"] is not None:
        results = _of_samples(options)
    else:
        results = _evaluate(options) if options["likelihood"] is None else _likelihoods(options)
    with replacing(options["out"]) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")
    click.echo(table(results["plans"]))
    click.echo(f"wrote {options['out']}")


def _evaluate(options: dict[str, Any]) -> dict[str, Any]:
    """Return the results that `deis evaluate` writes."""
    import torch

    from ..evaluation import converged, evaluate

    model, num, device = shared.load(options), options["num"], options["device"] or "cpu"
    plans = _plans(model, options)
    labels, make = shared.labels_of(model, num), shared.of_labels(model, options)
    noise = draw_noise(model, plans[0], options, range(num))
    about = {name: options[name] for name in ("guidance", "seed", "num", "features", "lpips", "paired", "reference_steps")}
    results: dict[str, Any] = {"model": str(options["model"] or "the bundled MNIST model"), **about, "plans": []}
    measures = _measures(options, device) | {"decode": model.decode}
    if measures["real"] is not None:
        results["real"] = {"path": str(options["real"]), "images": len(measures["real"])}
    if options["paired"] > 0:
        paired, condition = noise[: options["paired"]], None if labels is None else labels[: options["paired"]]
        measures["reference"], results["reference_error"] = converged(
            make, paired, options["reference_steps"], condition=condition, batch=options["batch"]
        )
    kept = {"folder": options["work"], "tag": json.dumps([results["model"], options["load_options"], about])}
    with tqdm(total=num * len(plans), desc="sampling", unit="image") as bar:
        for plan in plans:
            rng = torch.Generator(device).manual_seed(options["seed"])
            row = evaluate(plan, make, noise, condition=labels, batch=options["batch"], rng=rng, progress=bar, **measures, **kept)
            results["plans"].append(row)
    return results


def _of_samples(options: dict[str, Any]) -> dict[str, Any]:
    """Return the results that `deis evaluate --samples` writes."""
    from ..evaluation import evaluate_samples
    from ..generation.manifest import read_manifest

    context, folder = click.get_current_context(), options["samples"]
    for param in context.command.params:
        unused = param.name not in ("samples", "real", "features", "batch", "device", "out")
        if unused and context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE:
            raise ValueError(f"--samples {folder} are made already, and measured against --real; leave out {param.opts[0]}")
    if options["real"] is None:
        raise ValueError("--samples are measured against real images; give --real and --features, too")
    extractor, real = shared.real_features(options["features"], options["real"], options["device"] or "cpu")
    samples = read_manifest(folder)["samples"]
    with tqdm(total=samples["num"], desc="features", unit="image") as bar:
        row = evaluate_samples(folder, extractor, real, batch=options["batch"], progress=bar)
    about = {"folder": str(folder), "model": samples["model"], "seed": samples["seed"], "features": options["features"]}
    return about | {"real": {"path": str(options["real"]), "images": len(real)}, "plans": [row]}


def _likelihoods(options: dict[str, Any]) -> dict[str, Any]:
    """Return the results that `deis evaluate --likelihood` writes."""
    from ..evaluation import likelihood, load_images

    num, model = options["likelihood"], shared.load(options)
    for name in ("features", "lpips", "work"):
        if options[name] is not None:
            raise ValueError(f"--likelihood measures real images, not samples, and keeps no batches; leave out --{name}")
    if options["real"] is None or model.decode is not None:
        raise ValueError("--likelihood measures images under a network of pixels; give --real, and no network of latents")
    images = load_images(options["real"], num)
    if len(images) < num:
        raise ValueError(f"--likelihood {num} asks for more images than --real {options['real']} has, {len(images)}; give fewer")
    plans = _plans(model, options, direction="encode", ts_phase="vp_t", ts_order=5.0)
    denoiser = model.conditional(guidance=options["guidance"])
    settings = {"seed": options["seed"], "batch": options["batch"], "device": options["device"] or "cpu"}
    with tqdm(total=num * len(plans), desc="encoding", unit="image") as bar:
        rows = [likelihood(plan, denoiser, images, progress=bar, **settings) for plan in plans]
    return {
        "model": str(options["model"] or "the bundled MNIST model"),
        "real": str(options["real"]),
        "seed": options["seed"],
        "plans": rows,
    }


def _measures(options: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the measures for `deis.evaluation.evaluate`."""
    from ..evaluation import load_perceptual

    extractor, real = shared.real_features(options["features"], options["real"], device)
    if options["lpips"] is not None and options["paired"] < 1:
        raise ValueError("--lpips is a distance of pairs; give --paired, too")
    perceptual = None if options["lpips"] is None else load_perceptual(options["lpips"], device)
    return {"extractor": extractor, "real": real, "perceptual": perceptual, "reference": None}


def _plans(model: Pretrained, options: dict[str, Any], **settings: Any) -> list[Plan]:
    """Return the plans from files, and those of each method at each budget, made with the settings."""
    plans = [load_plan(file) for file in options["files"]]
    methods = options["methods"] or (() if plans else ("auto",))
    for method in methods:
        for nfe in options["budgets"] or (10,):
            own = method == "calibrated"
            plans.append(model.plan(nfe) if own else make_plan(model.sde, method, nfe=nfe, **settings))
    for plan in plans:
        if not plan.matches(model.sde):
            raise ValueError(f"the plan {plan.method!r} was made for the schedule {plan.schedule}, the model for {model.sde.name}")
    return plans


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results of `deis.evaluation.evaluate` as a table, one line per plan."""
    names = list(rows[0])
    cells = [names, *([f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
