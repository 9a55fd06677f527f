"""The command `deis generate`: samples by the ten thousand, in shards that survive being killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..generation.engines import ENGINES
from ..generation.formats import FORMATS, Label
from ..generation.generate import generate
from ..generation.ranks import default_engine, prepare
from ..generation.verification import verify_samples
from ..model.load import read_options
from ..model.pretrained import Pretrained
from ..seeded import precision
from . import shared

_PASSED = ("guidance", "seed", "format", "shard", "batch", "backend", "device", "dtype", "workers", "gpu_share")


@click.command("generate")
@shared.plan_options
@shared.model_options
@click.option("--plan", "file", type=shared.PLAN, help="A plan file, as deis calibrate writes it, in place of a method and grid.")
@click.option("--num", type=shared.POSITIVE, help="The number of samples; with --labels by default as many as there are lines.")
@click.option("--out", type=shared.FOLDER, help="The folder of the samples. Run again to go on after whatever killed it.")
@click.option("--class", "label", type=int, help="The class of every sample; without it and --labels, each class in turn.")
@click.option("--labels", type=shared.PLAN, help="A file with one class, or prompt, a line: one for each sample.")
@click.option("--format", type=click.Choice(list(FORMATS)), default="png", show_default=True, help="What a shard is.")
@click.option("--shard", type=shared.POSITIVE, help="Samples of a shard; by default 256.")
@click.option("--batch", type=shared.POSITIVE, help="Samples of each call of the network; by default 256, halved until they fit.")
@click.option("--dtype", type=click.Choice(["float64", "float32"]), default="float32", show_default=True)
@click.option(
    "--engine", type=click.Choice(list(ENGINES)), help="Who makes the shards; by default this process, or under torchrun each."
)
@click.option("--workers", type=shared.POSITIVE, help="With ray: the most workers; by default as many as the cluster has room for.")
@click.option("--gpu-share", type=click.FloatRange(min=0, min_open=True), help="With ray: the part of a GPU of each worker; 1.")
@click.option("--verify", type=shared.FOLDER, metavar="DIR", help="Check the samples of a folder, and make none.")
@shared.errors()
def generate_command(**options: Any) -> None:
    """Write samples into a folder, in shards that are whole or not there, however often it is killed and run again."""
    if options["verify"] is not None:
        found = verify_samples(options["verify"])
        click.echo(str(found))
        if not found.ok:
            raise click.exceptions.Exit(1)
        return
    engine = options["engine"] or default_engine()
    device = prepare(engine, options["backend"], options["device"])
    with precision(options):
        model = shared.load(options | {"device": device}, options["dtype"])
        labels = _labels(model, options)
        num = options["num"] or (len(labels) if isinstance(labels, list) else None)
        if num is None or options["out"] is None:
            raise ValueError("--num and --out say how many samples to make, and where; give both")
        same = {name: options[name] for name in _PASSED} | {"engine": engine}
        where = {"model": options["model"], "load_options": read_options(options["load_options"])}
        plan = shared.choose_plan(model, options)
        records = generate(options["out"], num, plan=plan, labels=labels, progress=True, **same, **where)
    made = sum(record.samples for record in records)
    click.echo(f"{options['out']} holds {made} of {num} samples in {len(records)} shards; deis generate --verify checks them")


def _labels(model: Pretrained, options: dict[str, Any]) -> list[Label] | int | None:
    """Return one class for all samples, or the lines of a file."""
    file: Path | None = options["labels"]
    if file is None:
        return options["label"]
    if options["label"] is not None:
        raise ValueError(f"--class {options['label']} and --labels {file} conflict; leave one out")
    lines = file.read_text(encoding="utf-8").splitlines()
    return [*lines] if model.num_classes is None else [int(line) if line.strip().isdecimal() else line for line in lines]
