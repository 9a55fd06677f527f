"""Shared parts of the commands: their options, and the model, labels and plan that these stand for."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.shell_completion import CompletionItem
from numpy.typing import NDArray

from ..generation.job import load as load_once
from ..grids import PHASES
from ..methods import make_plan
from ..methods.registry import names
from ..model.load import read_options
from ..model.pretrained import Pretrained
from ..plan import Plan, load_plan
from ..sde import Schedule

COUNT, POSITIVE, TWO = (click.IntRange(min=least) for least in (0, 1, 2))
PLAN, FOLDER = click.Path(path_type=Path, exists=True, dir_okay=False), click.Path(path_type=Path, file_okay=False)


class OutFile(click.Path):
    """A file to write, whose folder must exist: an error before the work is better than one after it."""

    def __init__(self, folders: bool = False) -> None:
        super().__init__(path_type=Path, dir_okay=folders, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"{str(path)!r} cannot be written: {str(path.parent)!r} is not a folder; create it first", param, ctx)
        return path


class MethodName(click.types.StringParamType):
    """The name of a method, which the shell completes; `deis.make_plan` refuses unknown ones."""

    def __init__(self, *others: str) -> None:
        self.others = others

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in (*names(), *self.others) if name.startswith(incomplete.replace("-", "_"))]


@contextmanager
def errors() -> Iterator[None]:
    """Turn the expected errors inside into one line and exit code 1."""
    try:
        yield
    # torch asserts that it was built for a device
    except (AssertionError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise click.ClickException(str(error) or type(error).__name__) from error


def budgets(text: str) -> tuple[int, ...]:
    """Return one number of evaluations or several: of 4, or 3-10, or 3,5,8."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash) and 1 <= int(first) <= int(last or first)):
            raise click.BadParameter(f"{text!r} must be numbers of evaluations from 1 on, such as 4, or 3-10, or 3,5,8")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


METHOD_HELP = "A method; deis methods lists them. By default auto, or a model's own calibrated plan."


def plan_options(
    command: Callable[..., None],
    nfe: Any = POSITIVE,
    about: str = "The number of network evaluations, in place of --steps.",
) -> Callable[..., None]:
    """Add the options that say how a plan is built."""
    for option in (
        click.option("--grid-order", type=float, help="The power of the grid; by default 2 for t and 7 (Karras) for rho."),
        click.option("--grid", type=click.Choice(PHASES), help="What is spaced evenly; by default the method's own choice."),
        click.option("--nfe", type=nfe, help=about),
        click.option("--steps", type=POSITIVE, help="The number of steps; 10 without --nfe."),
        click.option("--method", type=MethodName(), metavar="NAME", help=METHOD_HELP),
    ):
        command = option(command)
    return command


def build_plan(sde: Schedule, options: dict[str, Any]) -> Plan:
    """Return the plan of these options."""
    method = "auto" if options["method"] is None else options["method"]
    return make_plan(sde, method, options["steps"], options["grid"], options["grid_order"], nfe=options["nfe"])


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """Return the given options that say how a plan is built."""
    return {name: options[name] for name in ("method", "grid", "grid_order", "steps", "nfe") if options[name] is not None}


def plan_of_file(options: dict[str, Any]) -> Plan:
    """Return the plan of --plan, which replaces a method and grid."""
    asked = _asked(options)
    if asked:
        raise ValueError(f"--plan {options['file']} and --{next(iter(asked)).replace('_', '-')} conflict; leave one out")
    return load_plan(options["file"])


def choose_plan(model: Pretrained, options: dict[str, Any]) -> Plan:
    """Return the plan to sample with: that of a file, the model's own, or one that is built."""
    if options["file"] is not None:
        plan = plan_of_file(options)
        if not plan.matches(model.sde):
            raise ValueError(
                f"--plan {options['file']} was made for the schedule {plan.schedule}, and the model's is {model.sde.name}; "
                "calibrate one for this model with deis calibrate"
            )
        return plan
    asked = _asked(options)
    if options["guidance"] == 1 and model.num_classes is not None and not asked.keys() - {"nfe"}:
        return model.plan(**asked)
    return build_plan(model.sde, options)


dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="float64: the same picture, bit for bit, whatever the batch. float32: faster, and the same up to rounding.",
)
"""The option of the commands that write pictures."""
OPTION_HELP = "What the file of a model does not say, such as sde=ve or size=32; see deis.load_model."


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which model, and how it runs."""
    for option in (
        click.option("--device", help="The device, such as cuda; torch only."),
        click.option("--backend", type=click.Choice(["torch", "jax"]), default="torch", show_default=True),
        click.option("--seed", default=0, type=COUNT, show_default=True, help="Sample i depends on the seed and on i alone."),
        click.option("--guidance", default=1.0, show_default=True, help="Weight of classifier-free guidance; 1 is none."),
        click.option("--option", "load_options", multiple=True, metavar="NAME=VALUE", help=OPTION_HELP),
        click.option(
            "--model", help="A folder, a file, or a name on the hub, see deis.load_model; by default the bundled MNIST model."
        ),
    ):
        command = option(command)
    return command


def load(options: dict[str, Any], dtype: str = "float32") -> Pretrained:
    """Load the model of a command's options."""
    load_options = read_options(options["load_options"])
    if options["backend"] == "jax" and options["device"] is not None:
        raise ValueError(f"--device {options['device']} is for torch, and JAX runs on its default device; leave it out")
    try:
        return load_once(options["model"], options["backend"], options["device"], dtype, load_options)
    except TypeError as error:
        raise ValueError(f"--option: {error}") from error


def labels_of(model: Pretrained, num: int, label: int | None = None) -> NDArray[np.int64] | None:
    """Return one class for all samples, or without one each class in turn; None for a model without classes."""
    if model.num_classes is None:
        if label is not None:
            raise ValueError(f"--class {label} was given, and this model has no classes; leave it out")
        return None
    if label is None:
        return np.arange(num) % model.num_classes
    if not 0 <= label < model.num_classes:
        raise ValueError(f"--class {label} is not a class of the model, 0 ... {model.num_classes - 1}")
    return np.full(num, label)


def of_labels(model: Pretrained, options: dict[str, Any]) -> Any:
    """Return the model as `calibrate` and `evaluate` take it: where there are classes, a function of labels."""
    return model if model.num_classes is None else partial(model.conditional, guidance=options["guidance"])


def bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address of this machine; port 0 stands for any that is free. It does not listen yet.

    Raises
    ------
    ValueError
        Where the port is in use, or the host is no address of this machine.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ValueError(f"--host {host} --port {port} cannot be listened on ({error.strerror}); give another --port") from error
    return found


def real_features(name: str | None, path: Path | None, device: str) -> tuple[Any, Any]:
    """Return the extractor of --features and the features of the images of --real, or None of both where neither is given."""
    from ..evaluation import features, load_extractor, load_images

    if (path is None) != (name is None):
        raise ValueError("--real and --features belong together: give both, or neither")
    if name is None or path is None:
        return None, None
    extractor, images = load_extractor(name, device), load_images(path)
    return extractor, np.concatenate([features(extractor, images[i : i + 500]) for i in range(0, len(images), 500)])
