"""The command `deis methods`: the registered methods as a table, and one of them in detail."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
import warnings
from typing import Any

import click

from ..methods import make_plan
from ..methods.registry import REGISTRY, Entry, find
from ..sde import VPSDE
from . import shared

_COLUMNS = ("name", "form", "clock", "order", "evaluations", "reference")
_NOTES = (
    "<q> is a whole number, as in tab3, and <tableau> a Runge-Kutta method, as in rhork_2heun.",
    "eps*: data if the grid starts at alpha = 0. Order: of convergence; weak: in law; none: it has no such limit.",
    "Evaluations: network calls per step. Details and options: deis methods NAME.",
)


@click.command("methods")
@click.argument("name", type=shared.MethodName(), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@shared.errors()
def methods_command(name: str | None, as_json: bool) -> None:
    """List the methods that --method takes, or show all about one."""
    if name is not None:
        details = details_of(name)
        click.echo(json.dumps(details, indent=1) if as_json else _in_words(details))
    elif as_json:
        click.echo(json.dumps([record(entry) for entry in REGISTRY], indent=1))
    elif not (sys.stdout.isatty() and _rich_table()):
        click.echo(_plain_table())


def record(entry: Entry) -> dict[str, Any]:
    """Return the record of an entry in the registry as JSON values; an order that depends on the name is text."""
    order = entry.order_text if callable(entry.order) else entry.order
    told = {name: getattr(entry, name) for name in ("name", "form", "clock", "evaluations", "reference", "weak")}
    return told | {"order": order, "grid": None if entry.grid is None else list(entry.grid)}


def details_of(name: str) -> dict[str, Any]:
    """Return all about one method: its record, its options and their defaults, and its plan of a few steps."""
    if "<" in name and any(entry.name == name for entry in REGISTRY):
        example = name.replace("<q>", "3").replace("<tableau>", "2heun")
        raise ValueError(f"{name!r} stands for several methods; name one, such as {example!r}")
    entry, _ = find(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # so few steps are an example, not advice
        plan = make_plan(VPSDE.linear(), name, 4)
    options = {option: _plain(default) for option, default in entry.options_of(name).items()}
    own = {"name": name.replace("-", "_"), "order": entry.order_of(name), "options": options}
    return record(entry) | own | {"plan": repr(plan).splitlines()}


def _plain(default: Any) -> Any:
    """Return a default as JSON can hold it: a function as its name, and infinity as a word."""
    if callable(default):
        return default.__name__
    return str(default) if isinstance(default, float) and not math.isfinite(default) else default


def _in_words(details: dict[str, Any]) -> str:
    grid = "the schedule's own" if details["grid"] is None else "{} of power {:g}".format(*details["grid"])
    order = "none" if details["order"] is None else f"{details['order']}{', weak' if details['weak'] else ''}"
    options = ", ".join(f"{option}={default!r}" for option, default in details["options"].items()) or "none"
    lines = {
        "form": details["form"], "clock": details["clock"], "order": order, "evaluations": "per step: " + details["evaluations"],
        "grid": grid, "options": f"of deis.make_plan: {options}", "reference": details["reference"].replace("`", ""),
    }  # fmt: skip
    head = [details["name"], *(f"  {name:<12} {text}" for name, text in lines.items())]
    return "\n".join([*head, "", *details["plan"]])


def _cells(entry: Entry) -> list[str]:
    return [entry.order_text if name == "order" else str(getattr(entry, name)).replace("`", "") for name in _COLUMNS]


def _plain_table() -> str:
    """Return the table in columns; the last is as wide as it is."""
    rows = [list(_COLUMNS), *map(_cells, REGISTRY)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_NOTES])


def _rich_table() -> bool:
    """Print the table for a terminal; return whether rich, which does that, is installed."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in _COLUMNS:
        style, narrow = ("bold" if name == "name" else ""), (11 if name in ("order", "evaluations") else None)
        table.add_column(name, style=style, no_wrap=name == "name", max_width=narrow)
    for entry in REGISTRY:
        table.add_row(*map(Text, _cells(entry)))
    console = Console()
    console.print(table)
    for note in _NOTES:
        console.print(Text(textwrap.fill(note, shutil.get_terminal_size().columns - 1), style="dim"))
    return True
