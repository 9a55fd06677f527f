"""The plots of the documentation: docs/figures/*.png, from the tables in benchmarks/results and, for the guide, from the library.

python -m benchmarks.figures
python -m benchmarks.figures error default

Without a name all are drawn. Nothing is measured here but what a figure of the guide says that it shows (benchmarks/guide.py):
the rest is what the other scripts of this folder have written. The colours are those of Okabe and Ito, each with a marker of its
own, so that the lines can be told apart in grey too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from . import calibration, default, methods
from .pages import measured

mpl.use("Agg")
ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
MARKS = dict(zip((BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK), "oDsv^PX", strict=True))
TITLES = {
    "digits": "digits (exact score)",
    "cosine": "digits, cosine schedule",
    "mnist": "the bundled MNIST model",
    "flow": "the same, as flow matching",
    "anime64": "a 64x64 network of others",
}
ERROR = "error to the converged solution"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "savefig.dpi": 130,
    "figure.constrained_layout.use": True,
}


def line(axes: Any, points: Iterable[tuple[float, float]], colour: str, label: str, **style: Any) -> None:
    """Draw a line in one of the colours, with the marker that goes with it."""
    found = sorted(points)
    axes.plot(*np.array(found).T if found else ([], []), color=colour, label=label, **{"marker": MARKS[colour], "ms": 5, **style})


def budgets(axes: Any, ticks: Iterable[int], title: str = "") -> None:
    """Lay out axes of the error against evaluations, both logarithmic."""
    axes.set(xscale="log", yscale="log", xlabel="network calls (NFE)", title=title)
    axes.set_xticks(list(ticks), [str(tick) for tick in ticks])
    axes.minorticks_off()


def save(figure: Any, name: str) -> None:
    """Write a figure in 128 colours, which is a third of the bytes."""
    file = BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    FIGURES.mkdir(exist_ok=True)
    Image.open(file).convert("RGB").quantize(128).save(FIGURES / f"{name}.png", optimize=True)


def best(rows: list[dict[str, str]], of: Callable[[dict[str, str]], bool]) -> list[tuple[float, float]]:
    """Return (NFE, the least error at it) over the rows that are meant."""
    found: dict[int, float] = {}
    for row in filter(of, rows):
        nfe = int(row["nfe"])
        found[nfe] = min(float(row["error"]), found.get(nfe, np.inf))
    return list(found.items())


def is_auto(row: dict[str, str]) -> bool:
    return (row["method"], row["grid"]) == default.AUTO and row["kind"] == "candidate"


def of_diffusers(row: dict[str, str]) -> bool:
    return row["kind"] == "scheduler" and row["grid"] in {"t1", "rho7", "log"}


def stages(name: str, stage: str) -> list[tuple[float, float]]:
    """Return (NFE, error) of a stage of the calibration of a problem."""
    rows = calibration.Results.of(name).rows
    return [(int(row["nfe"]), float(row["error"])) for row in rows if row["stage"] == stage]


def error() -> None:
    """The figure of the README: named schedulers of diffusers, `auto`, and calibrated plans."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True)
    rows = default.read("digits")
    named = {
        "ddim": (SKY, "DDIM"),
        "dpmpp_2m_published": (ORANGE, "DPM-Solver++ 2M"),
        "dpm_solver_3m": (GREEN, "DEIS of order 3"),
        "unipc2_bh2": (PINK, "UniPC of order 2"),
    }
    for method, (colour, label) in named.items():
        line(left, best([row for row in rows if row["method"] == method], of_diffusers), colour, label)
    line(left, best(rows, is_auto), BLACK, "deis, auto", lw=2.2)
    line(left, stages("digits", "+ Gauss-Newton"), RED, "deis, calibrated", lw=2.2)
    rows = default.read("mnist")
    line(right, best(rows, of_diffusers), BLUE, "the best of diffusers")
    line(right, best(rows, is_auto), BLACK, "deis, auto", lw=2.2)
    line(right, stages("mnist", "+ Gauss-Newton"), RED, "deis, calibrated", lw=2.2)
    for axes, name in ((left, "digits"), (right, "mnist")):
        budgets(axes, (3, 4, 5, 6, 8, 10, 15, 20), TITLES[name])
        axes.legend(fontsize=9)
    left.set_ylabel(ERROR)
    save(figure, "error")


def default_() -> None:
    """The error of `auto` and of the best of diffusers on five problems, and their ratio."""
    figure, panels = plt.subplots(2, 3, figsize=(10.5, 6))
    ratio = panels.flat[5]
    for axes, name, colour in zip(panels.flat, default.PROBLEMS, (ORANGE, SKY, GREEN, BLUE, PINK), strict=False):
        rows = default.read(name)
        theirs, ours = best(rows, of_diffusers), best(rows, is_auto)
        line(axes, theirs, BLUE, "the best of diffusers")
        line(axes, ours, BLACK, "auto")
        budgets(axes, (3, 5, 8, 12, 20), TITLES[name])
        line(ratio, [(nfe, error / dict(theirs)[nfe]) for nfe, error in ours if nfe in dict(theirs)], colour, name, lw=1)
    panels.flat[0].legend(fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel(ERROR)
    ratio.axhline(1, color="0.5")
    ratio.set(xlabel="network calls (NFE)", ylabel="auto / the best of diffusers", title="the ratio", ylim=(0, 1.6))
    ratio.legend(fontsize=8, ncols=3, loc="upper center")
    save(figure, "default")


def calibration_() -> None:
    """What each stage of a calibration buys."""
    shown = {
        "untuned": (GREEN, "the best untuned"),
        "auto": (BLACK, "auto"),
        calibration.TWICE: (BLUE, "diffusers, twice the calls"),
        "grid + least squares": (ORANGE, "grid + least squares"),
        "+ Gauss-Newton": (RED, "+ Gauss-Newton"),
    }
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.2))
    for axes, name in zip(panels, calibration.ASKED, strict=True):
        for stage, (colour, label) in shown.items():
            line(axes, stages(name, stage), colour, label, ls="--" if stage == calibration.TWICE else "-")
        budgets(axes, range(3, 11), TITLES[name])
        axes.set_xlim(2.8, 10.6)
    panels[0].set_ylabel(ERROR)
    panels[0].legend(fontsize=9)
    save(figure, "calibration")


def methods_() -> None:
    """The best error of each clock and form, with a corrector and without, at eight calls."""
    clocks = ("t", "vp_t", "sqrt_t", "arctan_rho", "rho", "log_rho")
    kinds = {
        ("eps", ""): (SKY, "eps"),
        ("eps", "c"): (BLUE, "eps, corrected"),
        ("data", ""): (ORANGE, "data"),
        ("data", "c"): (RED, "data, corrected"),
    }
    figure, panels = plt.subplots(1, 3, figsize=(11, 4))
    for axes, name in zip(panels, ("digits", "mnist", "anime64"), strict=True):
        rows = measured(methods.RESULTS / f"methods_{name}.csv")
        rows = [row for row in rows if row["nfe"] == "8"]
        for (form, corrector), (colour, label) in kinds.items():
            places = []
            for place, clock in enumerate(clocks):
                found = [
                    float(row["error"])
                    for row in rows
                    if (row["form"], row["clock"]) == (form, clock) and bool(row["corrector"]) == bool(corrector)
                ]
                places += [(place, min(found))] if found else []
            line(axes, places, colour, label, ls="", ms=8)
        axes.axhline(min(float(row["error"]) for row in rows), color="0.5", lw=1, ls=":")
        axes.set(yscale="log", title=TITLES[name])
        axes.set_xticks(range(len(clocks)), clocks, rotation=40, ha="right")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.yaxis.set_major_formatter("{x:.2g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
    panels[0].set_ylabel("least error at eight calls")
    panels[2].legend(fontsize=9)
    save(figure, "methods")


def choose() -> None:
    """Well-known methods on the problem with an exact score, each on the best of its grids."""
    shown = {
        "`ddim`": (SKY, "ddim"),
        "`edm_heun`": (PINK, "edm_heun"),
        "`dpm_solver_3`": (ORANGE, "dpm_solver_3"),
        "data, log_rho, order 2": (GREEN, "dpmpp_2m"),
        "eps, t, order 4": (BLUE, "tab3"),
        methods.AUTO: (BLACK, "auto"),
    }
    rows = methods.under_both_names(measured(methods.RESULTS / "methods_digits.csv"))
    figure, axes = plt.subplots(figsize=(7, 4.4))
    for title, (colour, label) in shown.items():
        own = [row for row in rows if methods.title(row) == title and (label != "auto" or row["grid"] == "vp_t2")]
        line(axes, best(own, bool), colour, label, lw=2.2 if label == "auto" else 1.5)
    line(axes, stages("digits", "+ Gauss-Newton"), RED, "calibrated", lw=2.2)
    budgets(axes, (4, 5, 6, 8, 10, 15, 20), TITLES["digits"])
    axes.set_ylabel(ERROR)
    axes.legend(fontsize=9, loc="upper right", ncols=2)
    save(figure, "choose")


def anime64() -> None:
    """Every scheduler at ten calls, on the network of others."""
    rows = sorted(measured(methods.RESULTS / "anime64.csv"), key=lambda row: -float(row["error"]))
    kinds = {"diffusers": BLUE, "deis, untuned": ORANGE, "deis, calibrated": RED}
    figure, axes = plt.subplots(figsize=(8, 6.4))
    for kind, colour in kinds.items():
        points = [(place, row) for place, row in enumerate(rows) if kind_of(row) == kind]
        axes.plot(
            [float(row["error"]) for _, row in points],
            [place for place, _ in points],
            ls="",
            marker=MARKS[colour],
            color=colour,
            label=kind,
            ms=7,
        )
    axes.set(xscale="log", xlabel=f"{ERROR}, at ten calls", ylim=(-1, len(rows)))
    axes.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2], ["0.01", "0.02", "0.05", "0.1", "0.2"])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [name_of(row) for row in rows], fontsize=8)
    axes.legend(loc="lower left")
    save(figure, "anime64")


def kind_of(row: dict[str, str]) -> str:
    if row["scheduler"] != "PlanScheduler":
        return "diffusers"
    return "deis, calibrated" if row["settings"].startswith("calibrated") else "deis, untuned"


def name_of(row: dict[str, str]) -> str:
    """Return a scheduler and its settings in few words."""
    settings = row["settings"]
    for long, short in (
        ("use_karras_sigmas=True", "Karras"),
        ("final_sigmas_type=sigma_min", "to sigma_min"),
        ("method=", ""),
        ("method_options={'corrector': 2}", "corrector 2"),
        ("calibrated:", "calibrated,"),
        ("solver_order=", "order "),
        ("clip_sample=False, timestep_spacing=linspace", ""),
        ("ts_phase=rho", "rho"),
        ("ts_phase=", "grid "),
    ):
        settings = settings.replace(long, short)
    scheduler = {"PlanScheduler": "", "DPMSolverMultistepScheduler": "DPM-Solver++"}.get(row["scheduler"], row["scheduler"])
    return ", ".join(part for part in (scheduler.removesuffix("Scheduler").removesuffix("Multistep"), settings) if part)


def cut() -> None:
    """The error of cut plans of ten calls, against the strength at which they begin."""
    shown = {
        "auto": (BLACK, "auto, cut"),
        "tab3": (BLUE, "tab3, cut"),
        "dpm_solver_3": (GREEN, "dpm_solver_3, cut"),
        "calibrated": (RED, "calibrated, made anew"),
        "calibrated, rows kept": (ORANGE, "calibrated, its rows kept"),
    }
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True)
    for axes, name in zip(panels, ("digits", "mnist"), strict=True):
        rows = measured(methods.RESULTS / f"cut_{name}.csv")
        for plan, (colour, label) in shown.items():
            at = [row for row in rows if row["plan"] == plan and row["begins"] == "at a row"]
            line(axes, [(float(row["strength"]), float(row["cut"])) for row in at], colour, label)
        axes.set(yscale="log", xlabel="strength", title=TITLES[name], ylim=(3e-3, 3))
        axes.set_xticks([0.3, 0.5, 0.8])
    panels[0].set_ylabel(ERROR)
    panels[1].legend(fontsize=9)
    save(figure, "cut")


def network() -> None:
    """The loss of the training of the network that ships."""
    steps, loss, average = np.loadtxt(ROOT / "training" / "losses.csv", delimiter=",", unpack=True)
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.plot(steps, loss, color=SKY, label="training loss")
    axes.plot(steps, average, color=BLACK, ls="--", label="loss of the average on 2,000 test images")
    axes.set(xlabel="step of 64 images", ylabel="loss", ylim=(0.09, 0.15))
    axes.legend()
    save(figure, "network")


DRAWN: dict[str, Callable[[], None]] = {
    "error": error,
    "default": default_,
    "calibration": calibration_,
    "methods": methods_,
    "choose": choose,
    "anime64": anime64,
    "cut": cut,
    "network": network,
}


def main() -> None:
    from . import guide

    drawn = DRAWN | guide.DRAWN
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*drawn, []], default=[])
    with plt.rc_context(STYLE):
        for name in parser.parse_args().names or drawn:
            drawn[name]()


if __name__ == "__main__":
    main()
