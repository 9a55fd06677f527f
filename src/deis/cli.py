"""The command line: `deis sample`, `deis plan`, `deis calibrate` and `deis evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .extras import install

try:
    import click
    from PIL import Image
    from tqdm.auto import tqdm
except ImportError as error:
    sys.exit(f"the command line needs {error.name}: {install('cli')}")

from .files import replacing
from .grids import PHASES
from .methods import KNOWN, make_plan
from .model.load import load_model, read_options
from .model.pretrained import Pretrained
from .plan import Plan, load_plan
from .run import sample
from .sde import EDM, VESDE, VPSDE, FlowMatching, Schedule, SubVPSDE

Images = NDArray[np.floating[Any]]

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "vp-linear": VPSDE.linear,
    "vp-cosine": VPSDE.cosine,
    "sub-vp": SubVPSDE.linear,
    "ve": VESDE,
    "edm": EDM,
    "flow": FlowMatching,
}


COUNT, POSITIVE, TWO = (click.IntRange(min=least) for least in (0, 1, 2))


class OutFile(click.Path):
    """A file to write, in a folder that is there: better told before the work than after it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"{str(path)!r} cannot be written: {str(path.parent)!r} is no folder; make it first", param, ctx)
        return path


@contextmanager
def _errors() -> Iterator[None]:
    """Let what can go wrong within end in one line and exit code 1."""
    try:
        yield
    # torch asserts that it was built for a device
    except (AssertionError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise click.ClickException(str(error) or type(error).__name__) from error


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how a plan is built."""
    for option in (
        click.option("--grid-order", type=float, help="The power of the grid; by default 2 for t and 7 (Karras) for rho."),
        click.option("--grid", type=click.Choice(PHASES), help="What is spaced evenly; by default the method's own choice."),
        click.option("--nfe", type=POSITIVE, help="The number of network evaluations, in place of --steps."),
        click.option("--steps", type=POSITIVE, help="The number of steps; 10 without --nfe."),
        click.option("--method", help=f"One of {KNOWN}; by default auto, or a model's own calibrated plan."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="deis-samplers")
def main() -> None:
    """Samples from a diffusion model in few network calls."""


@main.command("plan")
@plan_options
@click.option("--schedule", type=click.Choice(list(SCHEDULES)), default="vp-linear", show_default=True, help="The noise schedule.")
@click.option("--out", type=OutFile(), help="Write the plan to this JSON file, too.")
@_errors()
def plan_command(schedule: str, out: Path | None, **options: Any) -> None:
    """Print a plan: its times and its coefficients."""
    plan = _plan(SCHEDULES[schedule](), options)
    click.echo(repr(plan))
    if out is not None:
        plan.save(out)
        click.echo(f"wrote {out}")


_OPTION_HELP = "What the file of a model does not tell, such as sde=ve or size=32; see deis.load_model."


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which model, and how it runs."""
    for option in (
        click.option("--device", help="Torch only, such as cuda."),
        click.option("--backend", type=click.Choice(["torch", "jax"]), default="torch", show_default=True),
        click.option("--seed", default=0, type=COUNT, show_default=True, help="Sample i depends on the seed and on i alone."),
        click.option("--guidance", default=1.0, show_default=True, help="Weight of classifier-free guidance; 1 is none."),
        click.option("--option", "facts", multiple=True, metavar="NAME=VALUE", help=_OPTION_HELP),
        click.option("--model", help="A folder, a file, or a name on the hub, see deis.load_model; by default the network inside."),
    ):
        command = option(command)
    return command


def _model(options: dict[str, Any], dtype: str = "float32") -> Pretrained:
    """Load the model of a command's options."""
    facts = read_options(options["facts"])
    if options["backend"] == "jax" and options["device"] is not None:
        raise ValueError(f"--device {options['device']} is for torch, and JAX runs on its default device; leave it out")
    try:
        return load_model(options["model"], options["backend"], options["device"], dtype, **facts)
    except TypeError as error:
        raise ValueError(f"--option: {error}") from error


@main.command("calibrate")
@plan_options
@model_options
@click.option("--out", type=OutFile(), default=Path("plan.json"), show_default=True)
@click.option("--samples", default=96, type=POSITIVE, show_default=True, help="Noises to fit and validate with.")
@click.option("--batch", default=64, type=POSITIVE, show_default=True, help="Samples a call of the model.")
@click.option("--stages", default="grid,least_squares,gauss_newton", show_default=True, help="Which, in order; also: gradient.")
@click.option("--iterations", default=10, type=POSITIVE, show_default=True, help="Gauss-Newton iterations, at most.")
@click.option("--window", type=POSITIVE, help="Predictions that a row may use; by default all before it.")
@click.option("--teacher-steps", type=TWO, help="By default doubled until the teacher's end stands still.")
@click.option("--allow-rough", is_flag=True, help="Take a teacher that has not converged, too.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Keep finished stages here, and go on from there.")
@_errors()
def calibrate_command(**options: Any) -> None:
    """Fit a plan to a model, and write it for deis sample --plan."""
    from .calibration import calibrate, calibration_report

    model = _model(options)
    plan = _plan(model.sde, options)
    labels = _labels(model, None, options["samples"])
    noise: Any = draw_noise(model, plan, options["seed"], range(10**6, 10**6 + options["samples"]))  # not those of deis sample
    if options["backend"] == "torch":
        import torch

        noise = torch.from_numpy(noise).to(options["device"] or "cpu")
    else:
        import jax

        noise = jax.numpy.asarray(noise)
    plan = calibrate(
        plan,
        model if labels is None else partial(model.conditional, guidance=options["guidance"]),
        noise,
        condition=labels,
        teacher=options["teacher_steps"],
        stages=tuple(options["stages"].split(",")),
        method=options["method"],
        window=options["window"],
        iterations=options["iterations"],
        batch=options["batch"],
        folder=options["work"],
        progress=True,
        allow_rough=options["allow_rough"],
    )
    plan.save(options["out"])
    click.echo(f"{calibration_report(plan)}\nwrote {options['out']}: try deis sample --plan {options['out']}")


@main.command("sample")
@plan_options
@model_options
@click.option(
    "--plan",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A plan file, as deis calibrate writes it, in place of a method and grid.",
)
@click.option("--num", default=50, type=POSITIVE, show_default=True, help="The number of samples.")
@click.option("--class", "label", type=int, help="The class of every sample; without it, each class in turn.")
@click.option("--batch", default=50, type=POSITIVE, show_default=True, help="Samples a batch; it changes no sample.")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="float64: the same picture, bit for bit, whatever the batch. float32: faster, and the same up to rounding.",
)
@click.option("--out", type=OutFile(), default=Path("samples.png"), show_default=True)
@click.option("--npz", type=OutFile(), help="Write the samples as arrays, too.")
@_errors()
def sample_command(**options: Any) -> None:
    """Sample a model and write a picture, samples side by side."""
    num, batch = options["num"], options["batch"]
    with _precision(options["backend"], options["dtype"]):
        model = _model(options, options["dtype"])
        labels = _labels(model, options["label"], num)
        plan = _plan_of(model, options)
        run = _runner(plan, model, options)
        images: list[Images] = []
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
@model_options
@click.option("--plan", "files", type=click.Path(path_type=Path, exists=True, dir_okay=False), multiple=True, help="Plan files.")
@click.option("--method", "methods", multiple=True, help="Methods, each at every --nfe; calibrated: the model's own plans.")
@click.option("--nfe", "budgets", type=POSITIVE, multiple=True, help="Budgets of evaluations; 10 where none is given.")
@click.option("--num", default=1000, type=POSITIVE, show_default=True, help="Samples of each plan.")
@click.option("--batch", default=100, type=POSITIVE, show_default=True, help="Samples a call of the model.")
@click.option("--real", type=click.Path(path_type=Path, exists=True), help="Real images: a folder of pictures, or an .npz file.")
@click.option("--features", help="A TorchScript file, images in [-1, 1] to features; or inception. Needs --real.")
@click.option("--lpips", help="alex, vgg, squeeze, or a TorchScript file of two batches of images: a distance for --paired.")
@click.option(
    "--paired",
    default=64,
    type=COUNT,
    show_default=True,
    help="Samples to compare with the converged solution; 0 for none.",
)
@click.option("--reference-steps", default=128, type=TWO, show_default=True, help="Steps of the converged solution.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Keep finished batches here, and go on from there.")
@click.option("--out", type=OutFile(), default=Path("evaluation.json"), show_default=True)
@_errors()
def evaluate_command(**options: Any) -> None:
    """Measure the samples of plans: against real images, and against the converged solution from the same noise."""
    if options["backend"] != "torch":
        raise click.BadParameter("jax is not evaluated; leave it out", param_hint="--backend")
    results = _evaluate(options)
    with replacing(options["out"]) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")
    click.echo(table(results["plans"]))
    click.echo(f"wrote {options['out']}")


def _evaluate(options: dict[str, Any]) -> dict[str, Any]:
    """Return what `deis evaluate` writes."""
    import torch

    from .evaluation import converged, evaluate

    model, num, device = _model(options), options["num"], options["device"] or "cpu"
    plans = _plans(model, options)
    labels = _labels(model, None, num)
    noise = torch.from_numpy(draw_noise(model, plans[0], options["seed"], range(num))).to(device)
    make = model if labels is None else partial(model.conditional, guidance=options["guidance"])
    about = {name: options[name] for name in ("guidance", "seed", "num", "features", "lpips", "paired", "reference_steps")}
    results: dict[str, Any] = {"model": str(options["model"] or "the network inside"), **about, "plans": []}
    measures = _measures(options, device) | {"decode": model.decode}
    if measures["real"] is not None:
        results["real"] = {"path": str(options["real"]), "images": len(measures["real"])}
    few = min(options["paired"], num)
    if few > 0:
        some = None if labels is None else labels[:few]
        measures["reference"], results["reference_error"] = converged(
            make, noise[:few], options["reference_steps"], condition=some, batch=options["batch"]
        )
    kept = {"folder": options["work"], "tag": json.dumps([results["model"], options["facts"], about])}
    with tqdm(total=num * len(plans), desc="sampling", unit="image") as bar:
        for plan in plans:
            rng = torch.Generator(device).manual_seed(options["seed"])
            row = evaluate(plan, make, noise, condition=labels, batch=options["batch"], rng=rng, progress=bar, **measures, **kept)
            results["plans"].append(row)
    return results


def _measures(options: dict[str, Any], device: str) -> dict[str, Any]:
    """Return what `deis.evaluation.evaluate` measures with."""
    from .evaluation import features, load_extractor, load_images, load_perceptual

    if (options["real"] is None) != (options["features"] is None):
        raise ValueError("--real and --features belong together: give both, or neither")
    if options["lpips"] is not None and options["paired"] < 1:
        raise ValueError("--lpips is a distance of pairs; give --paired, too")
    extractor = real = None
    if options["features"] is not None:
        extractor = load_extractor(options["features"], device)
        images = load_images(options["real"])
        real = np.concatenate([features(extractor, images[i : i + 500]) for i in range(0, len(images), 500)])
    perceptual = None if options["lpips"] is None else load_perceptual(options["lpips"], device)
    return {"extractor": extractor, "real": real, "perceptual": perceptual, "reference": None}


def _plans(model: Pretrained, options: dict[str, Any]) -> list[Plan]:
    plans = [load_plan(file) for file in options["files"]]
    methods = options["methods"] or (() if plans else ("auto",))
    for method in methods:
        for nfe in options["budgets"] or (10,):
            plans.append(model.plan(nfe) if method == "calibrated" else make_plan(model.sde, method, nfe=nfe))
    for plan in plans:
        if not plan.matches(model.sde):
            raise ValueError(f"the plan {plan.method!r} is of the schedule {plan.schedule}, and the model of {model.sde.name}")
    return plans


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results of `deis.evaluation.evaluate` as a table, a line a plan."""
    names = list(rows[0])
    cells = [names, *([f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _precision(backend: str, dtype: str) -> AbstractContextManager[Any]:
    """Return the context in which the backend computes in the dtype."""
    if backend != "jax":
        return nullcontext()
    import jax

    return jax.enable_x64(dtype == "float64")


def _plan_of(model: Pretrained, options: dict[str, Any]) -> Plan:
    """Return the plan to sample with: that of a file, the model's own, or one that is built."""
    asked = {name: options[name] for name in ("method", "grid", "grid_order", "steps", "nfe") if options[name] is not None}
    if options["file"] is not None:
        if asked:
            raise ValueError(f"--plan {options['file']} and --{next(iter(asked)).replace('_', '-')} contradict; leave one out")
        plan = load_plan(options["file"])
        if not plan.matches(model.sde):
            raise ValueError(
                f"--plan {options['file']} was made for the schedule {plan.schedule}, and the model's is {model.sde.name}; "
                "calibrate one for this model with deis calibrate"
            )
        return plan
    if options["guidance"] == 1 and model.num_classes is not None and not asked.keys() - {"nfe"}:
        return model.plan(**asked)
    return _plan(model.sde, options)


def _plan(sde: Schedule, options: dict[str, Any]) -> Plan:
    method = "auto" if options["method"] is None else options["method"]
    return make_plan(sde, method, options["steps"], options["grid"], options["grid_order"], nfe=options["nfe"])


def _labels(model: Pretrained, label: int | None, num: int) -> NDArray[np.int64] | None:
    if model.num_classes is None:
        if label is not None:
            raise ValueError(f"--class {label} was given, and this model has no classes; leave it out")
        return None
    if label is None:
        return np.arange(num) % model.num_classes
    if not 0 <= label < model.num_classes:
        raise ValueError(f"--class {label} is none of the model's, 0 ... {model.num_classes - 1}")
    return np.full(num, label)


def draw_noise(model: Pretrained, plan: Plan, seed: int, indices: range) -> Images:
    """Return the noise of the given samples; each has a random stream of its own, so that batches change nothing."""
    noise = [np.random.default_rng((seed, i)).standard_normal(model.shape, dtype=np.float32) for i in indices]
    return np.stack(noise) * np.float32(plan.sigma[0])


def _runner(plan: Plan, model: Pretrained, options: dict[str, Any]) -> Callable[..., Images]:
    """Return run(indices, labels, callback) -> samples in NumPy; each sample has random streams of its own."""
    seed, device, guidance = options["seed"], options["device"] or "cpu", options["guidance"]
    compiled: dict[bytes | None, Callable[..., Any]] = {}

    def noise(indices: range) -> Images:
        return draw_noise(model, plan, seed, indices).astype(options["dtype"])

    def run_torch(indices: range, labels: Any, callback: Any) -> Images:
        import torch

        seeds = [int(np.random.SeedSequence((seed, i, 1)).generate_state(1)[0]) for i in indices]
        rng = [torch.Generator().manual_seed(number) for number in seeds]
        x_T = torch.from_numpy(noise(indices)).to(device)
        x_0 = sample(plan, model.conditional(labels, guidance), x_T, rng=rng, callback=callback)
        return (x_0 if model.decode is None else model.decode(x_0)).cpu().numpy()

    def run_jax(indices: range, labels: Any, callback: Any) -> Images:
        import jax

        def run(x_T: jax.Array, rng: jax.Array) -> jax.Array:
            return sample(plan, model.conditional(labels, guidance), x_T, rng=rng, callback=callback)

        # Batches of the same labels share one compilation; those of whole rounds of classes do.
        key = None if labels is None else labels.tobytes()
        if key not in compiled:
            compiled[key] = jax.jit(run)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.array(indices))
        return np.asarray(compiled[key](noise(indices), keys))

    return run_torch if options["backend"] == "torch" else run_jax


def picture(images: Images, columns: int | None = None) -> Image.Image:
    """Lay images of shape (n, channels, height, width) in [-1, 1] out in a grid; the small ones enlarged."""
    n, channels, height, width = images.shape
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)
    pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    pixels = np.concatenate([pixels, np.zeros((rows * columns - n, channels, height, width), np.uint8)])
    pixels = pixels.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * height, columns * width, channels)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    zoom = max(1, 64 // height)
    return image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
