"""The command `deis edit`: a picture in, image-to-image or inpainting, pictures out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..arrays import AnyArray
from ..draws import streams
from ..edit import edit_plan, image_to_image, inpaint
from ..files import replacing
from ..model.pretrained import Pretrained
from ..plan import Plan
from ..seeded import on_device, precision
from . import shared
from .pictures import picture

_MODES = {1: "L", 3: "RGB"}
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
PICTURE = click.Path(path_type=Path)


@click.command("edit")
@shared.plan_options
@shared.model_options
@click.option("--image", required=True, type=PICTURE, help="The picture to begin with, PNG or JPEG.")
@click.option("--mask", type=PICTURE, help="A picture, white where to paint anew; all other pixels stay unchanged.")
@click.option("--resize", is_flag=True, help="Crop and scale picture and mask to the model's size; else other sizes are refused.")
@click.option(
    "--strength",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="How far back to noise: 1 is all the way. By default 0.5, or 1 with a mask.",
)
@click.option("--resample", default=1, type=shared.POSITIVE, show_default=True, help="RePaint's passes per step; needs --mask.")
@click.option("--plan", "file", type=shared.PLAN, help="A plan file, cut at the strength, in place of a method and grid.")
@click.option("--num", default=1, type=shared.POSITIVE, show_default=True, help="The number of edits, side by side.")
@click.option("--class", "label", type=int, help="The class to edit towards; without it, no class.")
@click.option("--batch", default=50, type=shared.POSITIVE, show_default=True, help="Edits per batch; no edit depends on it.")
@shared.dtype_option
@click.option("--out", type=shared.OutFile(), default=Path("edit.png"), show_default=True)
@shared.errors()
def edit_command(**options: Any) -> None:
    """Edit a picture: sample from it with noise added, or paint a part of it anew."""
    if options["mask"] is None and options["resample"] > 1:
        raise ValueError(f"--resample {options['resample']} repeats steps of inpainting; give --mask, too")
    strength = options["strength"] or (0.5 if options["mask"] is None else 1.0)
    with precision(options):
        model = shared.load(options, options["dtype"])
        x_0 = (_read(options["image"], model, options["resize"]) / 127.5 - 1).astype(options["dtype"])
        mask = None if options["mask"] is None else _read_mask(options["mask"], model, options["resize"])
        plan = _plan(model, strength, options)
        images = _edited(model, plan, x_0, mask, strength, options)
    with replacing(options["out"]) as partial:
        picture(images, smallest=1).save(partial, format="PNG")
    click.echo(f"wrote {options['out']}: {options['num']} edits of {plan.nfe} evaluations each")


def _edited(
    model: Pretrained, plan: Plan, x_0: AnyArray, mask: AnyArray | None, strength: float, options: dict[str, Any]
) -> AnyArray:
    """Return the edits, batch by batch; `plan` is the one that is run, from its start on."""
    num, batch, found = options["num"], options["batch"], []
    labels = shared.labels_of(model, num, options["label"]) if options["label"] is not None else None
    with tqdm(total=-(-num // batch) * plan.num_step, desc=f"{plan.method}, {plan.nfe} evaluations", unit="step") as bar:
        for first in range(0, num, batch):
            indices = range(num)[first : first + batch]
            chosen = None if labels is None else labels[indices.start : indices.stop]
            denoiser = model.conditional(chosen, options["guidance"])
            start = on_device(np.repeat(x_0, len(indices), axis=0), options)
            common: dict[str, Any] = {"rng": streams(start, indices, options["seed"]), "callback": lambda *_: bar.update()}
            if mask is None:
                images = image_to_image(plan, denoiser, start, strength, **common)
            else:
                images = inpaint(plan, denoiser, start, mask, strength=strength, **common)
            found.append(np.asarray(images.cpu() if options["backend"] == "torch" else images))
    return np.concatenate(found)


def _plan(model: Pretrained, strength: float, options: dict[str, Any]) -> Plan:
    """Return the plan to run: a method's plan from the start on, or a part of the plan in a file."""
    if options["file"] is None:
        return edit_plan(shared.build_plan(model.sde.between(strength=strength), options), model.sde, strength, options["resample"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        plan = edit_plan(shared.choose_plan(model, options), model.sde, strength, options["resample"])
    for warning in said:
        click.echo(f"--plan {options['file']}: {warning.message}", err=True)
    return plan


def _read(path: Path, model: Pretrained, resize: bool) -> AnyArray:
    """Return a picture as whole numbers of 0 ... 255 in the shape (1, channels, height, width) of the model."""
    channels, height, width = model.shape
    if model.decode is not None or channels not in _MODES:
        raise ValueError(f"deis edit takes pictures, and this is a model of {channels} channels of latents; use deis.inpaint")
    pixels = np.asarray(_opened("--image", path, (width, height), resize).convert(_MODES[channels]))
    return pixels.reshape(1, height, width, channels).transpose(0, 3, 1, 2)


def _read_mask(path: Path, model: Pretrained, resize: bool) -> AnyArray:
    """Return a mask of shape (1, 1, height, width), true where a picture is nearer to white than to black."""
    _, height, width = model.shape
    found: AnyArray = np.asarray(_opened("--mask", path, (width, height), resize).convert("L"))[None, None] > 127
    return found


def _opened(option: str, path: Path, size: tuple[int, int], resize: bool) -> Image.Image:
    """Return a picture of a size (width, height), upright as its camera says."""
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path} is no file; give the name of a picture")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as error:  # Pillow's decoders raise errors of many kinds on a broken file
        raise ValueError(f"{option} {path} is no picture that can be read: {error}") from error
    if image.mode not in _EIGHT_BITS:
        raise ValueError(f"{option} {path} has pixels of the kind {image.mode}; save it with 8 bits per channel")
    if image.size == size:
        return image
    if not resize:
        raise ValueError(
            f"{option} {path} is {image.width} x {image.height} pixels, and the model takes {size[0]} x {size[1]}; "
            "give --resize to crop and scale it"
        )
    # A mean over areas undoes the enlarging of deis sample exactly; a palette has no means.
    plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    return ImageOps.fit(plain, size, Image.Resampling.BOX)
