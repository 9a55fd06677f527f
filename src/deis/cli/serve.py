"""The command `deis serve`."""

from __future__ import annotations

import io
from typing import Any

import click

from ..arrays import AnyArray
from . import shared
from .pictures import picture

_SECONDS = click.FloatRange(min=0, min_open=True)


@click.command("serve")
@click.option("--model", help="A folder, a file, or a name on the hub, see deis.load_model; by default the bundled MNIST model.")
@click.option("--option", "load_options", multiple=True, metavar="NAME=VALUE", help=shared.OPTION_HELP)
@click.option("--device", help="The device, such as cuda.")
@shared.dtype_option
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 lets other machines in.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), show_default=True, help="0 for any that is free.")
@click.option("--max-batch", default=16, type=shared.POSITIVE, show_default=True, help="The most samples in a call of the network.")
@click.option("--queue", default=64, type=shared.POSITIVE, show_default=True, help="The most requests that wait for a place.")
@click.option("--timeout", default=60.0, type=_SECONDS, show_default=True, help="The most seconds of a request, its wait included.")
@click.option("--grace", default=30.0, type=_SECONDS, show_default=True, help="The seconds to finish requests in, at the end.")
@shared.errors()
def serve_command(**options: Any) -> None:
    """Serve samples over HTTP: requests with their own plans share one running batch. SIGTERM finishes them, and ends it."""
    from ..serving.app import build, launch
    from ..serving.engine import Engine, Limits

    limits = Limits(options["max_batch"], options["queue"], options["timeout"])
    with shared.bound(options["host"], options["port"]) as listener:
        click.echo("loading the model ...")
        model = shared.load(options | {"backend": "torch"}, options["dtype"])
        engine = Engine(model, limits, device=options["device"] or "cpu", dtype=options["dtype"])
        launch(build(engine, png), engine, listener, options["grace"])


def png(images: AnyArray) -> bytes:
    """Return images of shape (n, channels, height, width) in [-1, 1] as one picture, a file of PNG."""
    file = io.BytesIO()
    picture(images).save(file, format="PNG")
    return file.getvalue()
