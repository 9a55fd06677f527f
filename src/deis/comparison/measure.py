"""`deis.compare`: methods x grids x budgets from the same noise, against a converged reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import kind
from ..arrays import AnyArray, Array
from ..calibration.network import Model, rmse
from ..extras import needs
from ..features import distances
from ..plan import Plan
from .bench import Bench
from .lineup import BUDGETS, Entry, Grid, checked_budgets, checked_grids, entries, usual_methods
from .result import NOT_FINITE, Comparison, Row, finite
from .shelf import WORK, claim
from .subject import Subject, subject_of

SHOWN = 4
"""Samples in a picture."""


def compare(
    model: Model,
    samples: Any = 64,
    *,
    methods: Iterable[str | Plan] | None = None,
    grids: Iterable[str | Grid] | None = None,
    nfes: Iterable[int] = BUDGETS,
    name: str = "",
    out: str | Path | None = None,
    work: str | Path | None = None,
    **settings: Any,
) -> Comparison:
    """Sample a model by several methods on several budgets from the same noise, and set them against the converged solution.

    Parameters
    ----------
    model : Denoiser or Pretrained
        Or, with a condition, a function from the conditions of some samples to one. A Pretrained network with classes is asked for
        each class in turn where there is no condition.
    samples : array of shape (N, ...), or int
        The noise, as `deis.sample` takes it; or how many to draw, by a model that tells their shape.
    methods : sequence of str or Plan, optional
        Names that `deis.get_method` knows; "calibrated", the plans that came with the model; plans, at their own
        budgets. By default six methods, see `deis.comparison.usual_methods`.
    grids : sequence of str, optional
        "own" (the default, the method's own or the schedule's), "t", "rho", "log", "vp_t", with a power as in "rho:7".
    nfes : sequence of int
        Budgets: network evaluations.
    condition : array or sequence of N entries, optional
        Such as labels or prompts.
    guidance : float
        Of a Pretrained network with a condition or classes: the weight of classifier-free guidance.
    calibrated : mapping of int to Plan, optional
        The plans of the method "calibrated"; by default the model's own, which are for a guidance of 1.
    seed : int
        Of the noise, where `samples` is a number, and of methods that add noise: sample i depends on the seed and on i alone.
    batch : int
        Samples a call.
    reference_steps : int, optional
        Steps of the reference, a multistep method of order 4; by default doubled from 64 until the end moves by less than `tol`
        times its own root mean square (of the first 8 samples).
    allow_rough : bool
        Take a reference that has not converged, too.
    extractor, real : callable and array of shape (m, d), optional
        Images -> features, and the features of real images, for the Fréchet distance; see `deis.evaluation.evaluate`.
    decode : callable, optional
        Of a network of latents: samples -> images in [-1, 1]; by default that of a Pretrained network.
    name : str
        What the report calls the model.
    out : path, optional
        Write the report here, see `deis.write_report`; and keep what is measured in its folder `work`.
    work : path, optional
        Keep each measurement here instead, and take it from here when it is there: of the same weights, schedule, noise and plan.
    progress : bool
        Show a bar with the time left.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        For an unknown method or grid; where the reference diverges or does not converge; where `out` holds another comparison or
        something else; and as `deis.evaluation.evaluate` does. A method that cannot meet a budget, or gives NaN, is a row with a
        note.
    ImportError
        Where `out` is given and matplotlib or jinja2 is missing; it names the extra.
    """
    kind("name", name, str, "a string,")
    if out is not None:
        with needs("see", "a report"):
            from .report import write_report
    subject = subject_of(model, samples, **settings)
    chosen = usual_methods(subject.calibrated) if methods is None else methods
    lineup = entries(subject.network.sde, chosen, checked_grids(grids), checked_budgets(list(nfes)), subject.calibrated)
    if out is not None:
        claim(out, subject.identity)
        work = Path(out) / WORK if work is None else work
    with bar_of(subject, lineup) as bar:
        bench = subject.bench(work, bar)
        found = compared(subject, bench, lineup, name)
    if out is not None:
        write_report(found, out)
    return found


@contextmanager
def bar_of(subject: Subject, lineup: list[Entry]) -> Iterator[Any]:
    """Yield a bar of evaluations, as long as it will be if the reference converges at once, or None where none is wanted."""
    if not subject.progress:
        yield None
        return
    with needs("torch", "progress=True"):
        from tqdm.auto import tqdm
    todo = len(subject.network.x_T) * sum(entry.nfe for entry in lineup if entry.plan is not None)
    with tqdm(total=subject.estimate() + todo, desc="the reference", unit="evaluation") as bar:
        yield bar


def compared(subject: Subject, bench: Bench, lineup: list[Entry], name: str = "") -> Comparison:
    """Measure what is compared, one entry after the other."""
    todo = bench.missing([entry.plan for entry in lineup if entry.plan is not None])
    if bench.progress is not None:
        bench.progress.total = bench.progress.n + todo
        bench.progress.refresh()
    rows: list[Row] = []
    pictures: dict[tuple[str, int], AnyArray] = {}
    for entry in lineup:
        if bench.progress is not None:
            bench.progress.set_description(f"{entry.method}, {entry.nfe} NFE")
        row, x_0 = measured(bench, entry, subject.real)
        rows.append(row)
        shown = None if x_0 is None else _shown(bench, x_0)
        if shown is not None:
            pictures[row.series, row.nfe] = shown
    reference = bench.teacher.end
    return Comparison(
        tuple(rows), reference, pictures, _shown(bench, reference), bench.teacher.self_error, _about(bench, name), subject.identity
    )


def measured(bench: Bench, entry: Entry, real: AnyArray | None = None) -> tuple[Row, AnyArray | None]:
    """Return the row of an entry, and the samples where there are any."""
    if entry.plan is None:
        return Row(entry.method, entry.grid, entry.nfe, entry.reason), None
    try:
        found = bench.measure(entry.plan)
    except ValueError as error:
        return Row(entry.method, entry.grid, entry.nfe, str(error), plan=entry.plan), None
    x_0 = found["x_0"].astype(np.float64)
    about: dict[str, Any] = {"plan": entry.plan, "vp_t": tuple(found["vp_t"].tolist())}
    about["errors"] = tuple(finite(value) for value in found["error"].tolist())
    if not np.isfinite(x_0).all():
        return Row(entry.method, entry.grid, entry.nfe, NOT_FINITE, **about), x_0
    about |= _errors(x_0, bench.teacher.end)
    about |= {name: float(found[name]) / len(x_0) for name in ("seconds", "bare")}
    if real is not None:
        about |= distances(found["features"], real)
    return Row(entry.method, entry.grid, entry.nfe, **about), x_0


def _errors(x_0: Array, reference: Array) -> dict[str, float]:
    apart = rmse(x_0, reference)
    psnr = 20 * np.log10(2 / np.maximum(apart, 1e-12))
    return {"error": float(np.median(apart)), "psnr": float(np.median(psnr))}


def _shown(bench: Bench, x_0: AnyArray) -> AnyArray | None:
    """Return the first images in [-1, 1], or None of samples that are no images."""
    images = x_0[:SHOWN]
    if images.ndim != 4:
        return None
    images = bench.images(images)
    return images if images.ndim == 4 and images.shape[1] in (1, 3) and min(images.shape[2:]) > 1 else None


def _about(bench: Bench, name: str) -> dict[str, Any]:
    network = bench.network
    return {
        "model": name,
        "schedule": network.sde.name,
        "samples": len(network.x_T),
        "shape": list(network.x_T.shape[1:]),
        "batch": network.batch,
        "reference_steps": len(bench.teacher.t) - 1,
        "seed": bench.seed,
    }
