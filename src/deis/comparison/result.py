"""What a comparison found: its rows, the reference, the pictures, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from ..arrays import AnyArray
from ..plan import Plan
from ..plan_html import table_of
from .figures import errors_as_svg
from .identity import Identity
from .lineup import CALIBRATED

FITTED = "fitted"
"""The method of a plan that `deis.recommend` fitted."""
NOT_FINITE = "not finite"
"""The note of a plan whose samples are NaN or infinite."""


@dataclass(frozen=True)
class Row:
    """What was measured of one plan.

    Attributes
    ----------
    method, grid : str
        As asked for; the grid is empty where it is the method's own or the schedule's.
    nfe : int
        Network evaluations.
    note : str
        Why there are no numbers: "not finite", or why there is no such plan; else empty.
    error : float
        The median over samples of the root mean square difference to the reference; data in [-1, 1].
    psnr : float
        20 log10(2 / difference), its median, in dB.
    seconds, bare : float
        Seconds an image of sampling, and of these the ones within the network; in JAX those of as many calls of it alone.
    frechet, kid, kid_std, precision, recall : float
        Where real images were given, see `deis.evaluation.distances`.
    vp_t, errors : tuple of float
        Along the trajectory: the times at which the linear VP schedule has the noise levels of the states, and the error of x_t
        over sqrt(alpha^2 + sigma^2); None between the ends of a fitted plan.
    plan : Plan
    """

    method: str
    grid: str
    nfe: int
    note: str = ""
    error: float | None = None
    psnr: float | None = None
    seconds: float | None = None
    bare: float | None = None
    frechet: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    vp_t: tuple[float, ...] = ()
    errors: tuple[float | None, ...] = ()
    plan: Plan | None = field(default=None, repr=False)

    @property
    def series(self) -> str:
        """The line in a figure: the method, and its grid where one was asked for."""
        return f"{self.method}, {self.grid}" if self.grid else self.method

    @property
    def overhead(self) -> float | None:
        """What sampling costs beyond the calls of the network, as a fraction of these."""
        return None if self.seconds is None or not self.bare else self.seconds / self.bare - 1


@dataclass(frozen=True)
class Comparison:
    """Methods side by side on one model and one noise; `deis.compare` makes one, and `deis.write_report` a page of it.

    Attributes
    ----------
    rows : tuple of Row
    reference : array of shape (N, ...)
        The converged samples.
    pictures : mapping of (series, nfe) to arrays of shape (k, channels, height, width)
        The first images of each row, in [-1, 1]; empty for models of something else.
    reference_pictures : array of shape (k, channels, height, width) or None
    self_error : float
        How far the reference lies from the solution in half as many steps, the median.
    about : mapping
        The model, schedule, samples and steps of the reference, by name: JSON.
    identity : Identity
    """

    rows: tuple[Row, ...]
    reference: AnyArray = field(repr=False)
    pictures: Mapping[tuple[str, int], AnyArray] = field(repr=False)
    reference_pictures: AnyArray | None = field(repr=False)
    self_error: float
    about: Mapping[str, Any]
    identity: Identity = field(repr=False)

    @property
    def series(self) -> tuple[str, ...]:
        """The methods (with their grids), in the order of the rows."""
        return tuple(dict.fromkeys(row.series for row in self.rows))

    @property
    def nfes(self) -> tuple[int, ...]:
        """The budgets, from the least on."""
        return tuple(sorted({row.nfe for row in self.rows}))

    def row(self, series: str, nfe: int) -> Row | None:
        """Return the row of a method and a budget, if there is one."""
        return next((row for row in self.rows if (row.series, row.nfe) == (series, nfe)), None)

    def of(self, series: str) -> list[Row]:
        """Return the measured rows of a method, from the least budget on."""
        return sorted((row for row in self.rows if row.series == series and not row.note), key=lambda row: row.nfe)

    def best(self, nfe: int | None = None) -> Row | None:
        """Return the measured row of the least error, of one budget or of all."""
        rows = [row for row in self.rows if row.error is not None and nfe in (None, row.nfe)]
        return min(rows, key=lambda row: row.error or 0.0, default=None)

    def slope(self, series: str) -> float | None:
        """Return the measured slope of log error against log NFE, by least squares; None of fewer than two budgets.

        Errors that the reference is not exact enough to tell, below its own `self_error`, are left out.
        """
        rows = [row for row in self.of(series) if row.error is not None and row.error > self.self_error]
        if len(rows) < 2:
            return None
        return float(np.polyfit(np.log([row.nfe for row in rows]), np.log([row.error or 1.0 for row in rows]), 1)[0])

    def overhead(self, series: str) -> float | None:
        """Return the median overhead of a method over its budgets."""
        found = [row.overhead for row in self.of(series) if row.overhead is not None]
        return float(np.median(found)) if found else None

    def _repr_html_(self) -> str:
        """Return the comparison as a notebook shows it: the errors against NFE, and the numbers to unfold."""
        try:
            picture = errors_as_svg(self)
        except ImportError:  # the numbers do without matplotlib
            picture = ""
        cells = [[series, *(self._error_text(series, nfe) for nfe in self.nfes)] for series in self.series]
        table = table_of(["error to the converged solution", *map(str, self.nfes)], cells)
        return f"<div>{picture}<details{'' if picture else ' open'}><summary>The errors by NFE</summary>{table}</details></div>"

    def _error_text(self, series: str, nfe: int) -> str:
        row = self.row(series, nfe)
        return "" if row is None else row.note or f"{row.error:.3g}"

    def document(self) -> dict[str, Any]:
        """Return all numbers as JSON: those of the tables and figures."""
        return {
            "about": dict(self.about),
            "self_error": self.self_error,
            "rows": [_plain(row) for row in self.rows],
            "slopes": {series: self.slope(series) for series in self.series},
            "overheads": {series: self.overhead(series) for series in self.series},
            "identity": asdict(self.identity),
        }


def _plain(row: Row) -> dict[str, Any]:
    found = {each.name: getattr(row, each.name) for each in fields(row) if each.name != "plan"}
    found |= {"vp_t": list(row.vp_t), "errors": list(row.errors), "overhead": row.overhead}
    return {name: value for name, value in found.items() if value is not None}


def finite(value: float) -> float | None:
    """Return a number, or None for NaN and infinity, which JSON has not."""
    return float(value) if math.isfinite(value) else None


def code_of(row: Row) -> str:
    """Return the line of Python that makes a row's plan for a model."""
    if row.method == CALIBRATED:
        return f"plan = model.plan({row.nfe})"
    if row.method == FITTED or row.method.startswith("plan "):
        return 'plan = deis.load_plan("plan.json")'
    phase, colon, order = row.grid.partition(":")
    grid = f', ts_phase="{phase}"' if phase else ""
    grid += f", ts_order={order}" if colon else ""
    return f'plan = deis.make_plan(model.sde, "{row.method}", nfe={row.nfe}{grid})'
