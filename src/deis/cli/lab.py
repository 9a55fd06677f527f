"""The command `deis lab`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from . import shared


@click.command("lab")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 lets other machines in.")
@click.option("--port", default=7860, type=click.IntRange(0, 65535), show_default=True, help="0 for any that is free.")
@click.option(
    "--models", "folders", type=click.Path(path_type=Path, exists=True, file_okay=False), multiple=True,
    help="A folder whose models may be loaded; may be repeated. The bundled model always may.",
)  # fmt: skip
@click.option("--no-browser", is_flag=True, help="Do not open the page in a browser.")
@shared.errors()
def lab_command(host: str, port: int, folders: tuple[Path, ...], no_browser: bool) -> None:
    """Open a page to try samplers by looking: pictures, their trajectories, plans, and two settings side by side."""
    port = free_port(host, port)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when a loader is imported: no model is fetched
    from ..lab.library import Library
    from ..lab.page import build, launch
    from ..lab.session import Session

    click.echo("loading the bundled model ...")
    launch(build(Session(Library(folders))), host, port, browser=not no_browser)


def free_port(host: str, port: int) -> int:
    """Return a port that can be listened on: the one asked for, or for 0 any.

    Raises
    ------
    ValueError
        Where it is in use, or the host is no address of this machine.
    """
    with shared.bound(host, port) as probe:
        return int(probe.getsockname()[1])
