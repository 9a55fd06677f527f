"""The figures of a comparison: one each for error, distance to real images, pictures, trajectory, and time."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ..arrays import AnyArray

Comparison: TypeAlias = Any
Row: TypeAlias = Any
"""Those of `deis.comparison.result`, which lies above: in a notebook a comparison draws itself by this module."""
INK = "#1a1a1b"
"""Of text and axes: no other thing has it, so that a page may put its own colour in its place."""
_FAINT = "#8a8a8b"
BLUE = "#0072b2"
"""Too dark for a dark page, which may put a lighter one in its place."""
_COLOURS = (INK, "#D55E00", BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito's, which colour-blind readers tell apart; yellow, which nobody sees on white, is left out."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_RC = {
    "font.size": 11, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "grid.color": _FAINT, "grid.alpha": 0.3, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 10,
    "lines.linewidth": 1.8, "lines.markersize": 6, "svg.fonttype": "none", "svg.hashsalt": "deis", "figure.dpi": 100,
}  # fmt: skip
_WIDTH = 5.0
MINUS = "\N{MINUS SIGN}"


def figures(found: Comparison) -> dict[str, Any]:
    """Return the figures that a comparison has numbers for, by name."""
    import matplotlib as mpl

    made = {"errors": errors, "frechet": frechet, "pictures": pictures, "trajectory": trajectory, "seconds": seconds}
    with mpl.rc_context(_RC):
        drawn = {name: draw(found) for name, draw in made.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def errors_as_svg(found: Comparison) -> str:
    """Return the figure of the errors as an element of a page, on white; empty where there are none to draw."""
    import matplotlib as mpl

    with mpl.rc_context(_RC):
        figure = errors(found)
        if figure is None:
            return ""
        file = io.StringIO()
        figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def style(i: int) -> dict[str, Any]:
    """Return the colour, marker and dashes of the i-th line; in grey the last two tell."""
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": _DASHES[i % len(_DASHES)]}


def errors(found: Comparison) -> Any:
    """Draw the error against NFE, with the measured slopes."""
    figure = _against_nfe(found, lambda row: row.error, lambda series: power(found.slope(series), "slope "))
    if figure is None:
        return None
    axes = figure.axes[0]
    axes.set_ylabel("error to the converged solution")
    low, high = axes.get_ylim()
    if found.self_error > low:
        axes.axhspan(low, found.self_error, color=_FAINT, alpha=0.15, linewidth=0)
        axes.set_ylim(low, high)
    return figure


def frechet(found: Comparison) -> Any:
    """Draw the Fréchet distance to real images against NFE; None where it was not measured."""
    figure = _against_nfe(found, lambda row: row.frechet)
    if figure is not None:
        figure.axes[0].set_ylabel("Fréchet distance to real images")
    return figure


def seconds(found: Comparison) -> Any:
    """Draw the time of an image, and of the network's calls alone."""
    figure = _against_nfe(found, _milliseconds, lambda series: percent(found.overhead(series)), even=True)
    if figure is None:
        return None
    axes = figure.axes[0]
    bare = [(nfe, [1e3 * row.bare for row in found.rows if row.nfe == nfe and row.bare]) for nfe in found.nfes]
    alone = [(nfe, float(np.median(times))) for nfe, times in bare if times]
    axes.plot(*zip(*alone, strict=True), color=_FAINT, linewidth=6, alpha=0.45, zorder=0, label="the network's share")
    axes.set(ylabel="milliseconds an image", ylim=(0, None))
    _legend(axes)
    return figure


def _milliseconds(row: Row) -> float | None:
    return None if row.seconds is None else 1e3 * row.seconds


def power(value: float | None, before: str = "") -> str:
    """Return a slope, as in "slope -1.9"; nothing where there is none."""
    return "" if value is None else before + f"{value:.1f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """Return a fraction in percent, with its sign; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:+.1%}".replace("-", MINUS) if abs(value) < 0.1 else f"{value:+.0%}".replace("-", MINUS)


def _against_nfe(
    found: Comparison,
    value: Callable[[Row], float | None],
    told: Callable[[str], str] = lambda series: "",
    even: bool = False,
) -> Any:
    """Return a figure of one line a method, on logarithmic axes or even ones."""
    lines = [(series, [(row.nfe, value(row)) for row in found.of(series)]) for series in found.series]
    lines = [(series, [point for point in points if point[1] is not None]) for series, points in lines]
    if not any(points for _, points in lines):
        return None
    figure, axes = _axes()
    for i, (series, points) in enumerate(lines):
        if points:
            label = ", ".join(filter(None, (series, told(series))))
            axes.plot(*zip(*points, strict=True), label=label, **style(i))
    if not even:
        axes.set(xscale="log", yscale="log")
    axes.set_xticks(found.nfes, [str(nfe) for nfe in found.nfes])
    axes.minorticks_off() if even else axes.xaxis.set_minor_locator(_nothing())
    axes.set_xlabel("network evaluations (NFE)")
    _legend(axes)
    return figure


def trajectory(found: Comparison) -> Any:
    """Draw where along the way the error arises, at the budget in the middle of those that most methods have."""
    nfe = middle(found)
    rows = [] if nfe is None else [(i, found.row(series, nfe)) for i, series in enumerate(found.series)]
    figure, axes = _axes()
    for i, row in rows:
        points = [] if row is None else [(t, e) for t, e in zip(row.vp_t, row.errors, strict=True) if e is not None and e > 0]
        if row is not None and points:
            axes.plot(*zip(*points, strict=True), label=row.series, **style(i))
    if not axes.lines:
        return None
    axes.set(yscale="log", xlabel="noise  →  data   (time of the linear VP schedule)", ylabel=f"error of $x_t$ at {nfe} NFE")
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set_xticks([1, 0.75, 0.5, 0.25, 0.1, 0.02, 0], ["1", ".75", ".5", ".25", ".1", ".02", "0"])
    axes.set_xlim(1.03, 0)
    _legend(axes)
    return figure


def middle(found: Comparison) -> int | None:
    """Return the budget in the middle of those that most methods were measured at."""
    count = {nfe: sum(row.nfe == nfe and not row.note for row in found.rows) for nfe in found.nfes}
    most = [nfe for nfe in found.nfes if count[nfe] == max(count.values()) > 0]
    return most[len(most) // 2] if most else None


def pictures(found: Comparison) -> Any:
    """Draw the pictures, method by NFE from the same noise, with the reference last; None for models of something else."""
    if found.reference_pictures is None:
        return None
    from matplotlib.figure import Figure

    rows, columns = len(found.series), len(found.nfes) + 1
    figure = Figure(figsize=(_WIDTH, 0.35 + rows * (_WIDTH / columns + 0.24)), facecolor="none")
    grid = figure.add_gridspec(
        rows, columns, left=0.01, right=0.99, bottom=0.005, top=1 - 0.5 / figure.get_figheight(), wspace=0.08
    )
    grid.update(hspace=0.24 * columns / _WIDTH)
    for r, series in enumerate(found.series):
        for c, nfe in enumerate((*found.nfes, None)):
            axes = figure.add_subplot(grid[r, c])
            row = None if nfe is None else found.row(series, nfe)
            shown = found.reference_pictures if nfe is None else found.pictures.get((series, nfe))
            _cell(axes, shown, None if row is None else row.note or None)
            if r == 0:
                heading = "reference" if nfe is None else f"{nfe} NFE"
                axes.annotate(heading, (0.5, 1), (0, 20), "axes fraction", "offset points", ha="center", fontsize=9.5)
            if c == 0:
                axes.annotate(series, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=9.5, weight="bold")
    return figure


def _cell(axes: Any, shown: AnyArray | None, note: str | None) -> None:
    """Draw one cell: pictures two by two, or why there are none."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(False)
    if shown is not None and np.isfinite(shown).all():
        axes.imshow(tiled(shown), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="equal")
        return
    axes.set_box_aspect(1)
    axes.patch.set(facecolor=_FAINT, alpha=0.25)
    short = note if note and len(note) < 14 else "no such plan" if note else ""
    axes.text(0.5, 0.5, short.replace(" ", "\n"), transform=axes.transAxes, ha="center", va="center", fontsize=8)


def tiled(images: AnyArray) -> AnyArray:
    """Return images in [-1, 1] two by two, as bytes of shape (height, width) or with three channels."""
    pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    if len(pixels) >= 4:
        pixels = np.concatenate([np.concatenate(list(pixels[k : k + 2]), axis=1) for k in (0, 2)], axis=0)[None]
    return pixels[0, ..., 0] if pixels.shape[-1] == 1 else pixels[0]


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 4.0), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    return figure, axes


def _legend(axes: Any) -> None:
    """Put the legend below, in two columns, and make the figure as much higher."""
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.figure
    for old in figure.legends:
        old.remove()
    figure.legends.clear()
    columns = 2 if max(map(len, labels)) < 30 else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)
    figure.set_figheight(3.5 + 0.21 * -(-len(labels) // columns))


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
