"""Pictures of the lab: rows of images and strips of states as HTML, and the animation in two dimensions."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..arrays import AnyArray, Array
from ..sde import Schedule
from .plane import Paths
from .session import Comparison, Evaluation, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FRAMES, _PAUSE, _LAST = 60, 60, 2500
"""Frames of an animation, at most about; milliseconds of each, and of the last."""
_TRUE, _APPROXIMATE, _DATA = "#8A8A8A", "#0072B2", "#D55E00"


def row(images: AnyArray) -> Image.Image:
    """Lay images of shape (n, channels, height, width) in [-1, 1] side by side; of more than three channels the first three."""
    shown = images if images.shape[1] in (1, 3) else images[:, : 3 if images.shape[1] > 3 else 1]
    pixels = np.rint((shown.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(np.concatenate([*pixels], axis=-1).transpose(1, 2, 0).squeeze())


def image_html(image: Image.Image, about: str) -> str:
    """Return an image as HTML, its pixels in the page itself."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f'<img alt="{escape(about, quote=True)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def result_html(result: Result, sde: Schedule) -> str:
    """Return the pictures of a result as HTML, with what they cost, and the schedule of the model."""
    plan = result.plan
    about = f"{len(result.images)} pictures, {plan.method}, {plan.nfe} evaluations each"
    images = f'<div class="lab-row">{image_html(row(result.images), about)}</div>'
    schedule = f"The model's noise schedule is <code>{escape(sde.name)}</code>, from t = {sde.t_start:g} to {sde.t_end:g}."
    return f"{images}<p>{escape(about)}; {result.seconds:.1f} s. {schedule}</p>{notes_html(result.notes)}"


def notes_html(notes: Sequence[str]) -> str:
    """Return what the library warns of as HTML."""
    return "".join(f'<p class="lab-note">Note: {escape(note)}</p>' for note in notes)


def error_html(message: str) -> str:
    """Return what was wrong with an entry as HTML."""
    return f'<p class="lab-error" role="alert">{escape(message)}</p>'


def strip_html(result: Result, number: int) -> str:
    """Return the way of one picture as HTML: what the network is given and predicts, evaluation by evaluation, and the end."""
    number = min(max(number, 0), len(result.images) - 1)
    columns = [("", "the state<br>x<sub>t</sub>", "predicted<br>x<sub>0</sub>")]
    columns += [_column(evaluation, number) for evaluation in result.evaluations]
    end = image_html(row(result.images[number : number + 1]), "the picture")
    columns.append((f"<b>the end</b><br>t = {result.plan.t[-1]:.2g}", end, ""))
    lines = "".join(f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in zip(*columns, strict=True))
    shown, count = len(result.evaluations), result.plan.nfe
    less = "" if shown == count else f"<p>{shown} of {count} evaluations are shown.</p>"
    return f'<div class="lab-strip"><table>{lines}</table></div>{less}'


def _column(evaluation: Evaluation, number: int) -> tuple[str, str, str]:
    """Return the three cells of one evaluation; the state is scaled to a deviation of about 1."""
    scale = np.float32(np.hypot(evaluation.alpha, evaluation.sigma))
    x, x_0 = (
        image_html(row(images[number : number + 1]), f"{what} of evaluation {evaluation.i + 1}")
        for what, images in (("state", evaluation.x / scale), ("prediction", evaluation.x_0))
    )
    return f"<b>{evaluation.i + 1}</b><br>t = {evaluation.t:.2g}", x, x_0


def comparison_html(comparison: Comparison) -> str:
    """Return two results and the converged pictures as HTML, one above the other, with their distances."""
    lines = []
    for name, result, distances in zip("AB", comparison.results, comparison.distances, strict=True):
        noise = " It adds noise of its own, so it need not come near the converged pictures." if result.plan.stochastic else ""
        head = f"<b>{name}: {escape(result.plan.method)}</b>, {result.plan.nfe} evaluations, {result.seconds:.1f} s."
        distance = f"Distance to the converged pictures: <b>{np.median(distances):.4f}</b> in the median."
        lines.append(_line(f"{head} {distance}{noise}", result.images, distances) + notes_html(result.notes))
    about = (
        f"<b>Converged</b>: the probability flow in 64 steps from the same noise. "
        f"It differs from 32 steps by {comparison.error:.4f} in the median."
    )
    return "".join(lines) + _line(about, comparison.converged, None)


def _line(about: str, images: AnyArray, distances: Array | None) -> str:
    """Return a row of pictures below its title, each with its distance."""
    width = 100 / len(images)
    numbers = "" if distances is None else "".join(f'<span style="width:{width}%">{d:.3f}</span>' for d in distances)
    return f'<p>{about}</p><div class="lab-row">{image_html(row(images), "pictures")}<div class="lab-numbers">{numbers}</div></div>'


def figure_html(figure: Figure, about: str) -> str:
    """Return a figure of matplotlib as HTML."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    file.seek(0)
    with Image.open(file) as image:
        return f'<div class="lab-figure">{image_html(image, about)}</div>'


def paths_html(found: Paths) -> str:
    """Return the animation of paths as HTML, with what it shows."""
    plan = found.plan
    moving = "data:image/gif;base64," + base64.b64encode(animation(found)).decode()
    noise = " This method adds noise, so it has no need to follow them." if plan.stochastic else ""
    about = (
        f"{plan.method}, {plan.nfe} evaluations: the ends lie {found.rmse:.4f} from those of the true paths (root mean square). "
        f"The network is exact here, so all of this is the method's own error.{noise}"
    )
    image = f'<img alt="particles from noise to data" src="{moving}">'
    return f'<div class="lab-moving">{image}</div><p>{escape(about)}</p>{notes_html(found.notes)}'


def animation(found: Paths) -> bytes:
    """Return paths as an animated GIF: states joined by straight lines over the true paths, at the same time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, artists = _scene(found)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)
    frames = []
    for step, part in _moments(found.plan.num_step):
        canvas.restore_region(background)
        for artist in _moved(artists, found, step, part):
            figure.axes[0].draw_artist(artist)
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()).quantize(48, dither=Image.Dither.NONE))
    file = io.BytesIO()
    pauses = [_PAUSE] * (len(frames) - 1) + [_LAST]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=pauses, loop=0)
    return file.getvalue()


def _moments(steps: int) -> list[tuple[int, float]]:
    """Return the moments to draw: the number of a step, and how far it has come."""
    parts = max(1, _FRAMES // steps)
    return [(step, part / parts) for step in range(steps) for part in range(parts)] + [(steps - 1, 1.0)]


def _scene(found: Paths) -> tuple[Figure, tuple[Any, ...]]:
    """Return the figure, with all that stands still, and what moves in it."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.4), dpi=90, layout="constrained", facecolor="white")
    axes = figure.subplots()
    side = 1.05 * max(np.abs(places).max() for places in (found.means, found.x, found.true_x))
    axes.set(xlim=(-side, side), ylim=(-side, side), aspect="equal", xticks=[], yticks=[])
    axes.add_collection(LineCollection([*found.true_x.swapaxes(0, 1)], colors="#C4C4C4", linewidths=0.8, label="true paths"))
    axes.plot(*found.means.T, "x", color=_DATA, markersize=9, markeredgewidth=2, label="the data: means of the Gaussians")
    still: dict[str, Any] = {"animated": True, "linestyle": "none"}
    lines = axes.add_collection(LineCollection([], colors=_APPROXIMATE, linewidths=1.0, alpha=0.6, animated=True))
    (true,) = axes.plot([], [], "s", color=_TRUE, markersize=4.5, label="particles on the true paths", **still)
    (own,) = axes.plot([], [], "o", color=_APPROXIMATE, markersize=5, label=f"particles of {found.plan.method}", **still)
    text = axes.text(0.02, 0.98, "", transform=axes.transAxes, va="top", fontsize=11, animated=True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9, frameon=False)
    return figure, (lines, true, own, text)


def _moved(artists: tuple[Any, ...], found: Paths, step: int, part: float) -> tuple[Any, ...]:
    """Return the artists, moved to where the particles are."""
    lines, true, own, text = artists
    t = (1 - part) * found.t[step] + part * found.t[step + 1]
    now = (1 - part) * found.x[step] + part * found.x[step + 1]
    i = int(np.clip(np.searchsorted(-found.true_t, -t), 1, len(found.true_t) - 1))
    before, after = found.true_t[i - 1], found.true_t[i]
    beside = found.true_x[i - 1] + (before - t) / (before - after) * (found.true_x[i] - found.true_x[i - 1])
    lines.set_segments([*np.concatenate([found.x[: step + 1], now[None]]).swapaxes(0, 1)])
    true.set_data(*beside.T)
    own.set_data(*now.T)
    text.set_text(f"step {step + 1} of {found.plan.num_step}, t = {t:.3f}")
    return artists
