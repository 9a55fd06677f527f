"""`deis.recommend`: the plan to use for a budget of calls, of seconds, or of error; what it costs, and what half of it gives up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import flag, number, whole
from ..calibration import calibrate as fit
from ..calibration.network import Model
from ..calibration.teacher import Teacher, make_teacher
from ..methods import make_plan
from ..plan import Plan
from .bench import Bench
from .lineup import Entry, checked_grids, entries, usual_methods
from .measure import bar_of, measured
from .noise import fresh_noise
from .result import FITTED, Row, code_of
from .subject import Subject, subject_of, taken

LADDER = (3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50)
"""The budgets that are tried for an error, from the least on."""
MOST = 100
"""Evaluations that seconds are spent on, at most: beyond, errors are those of the reference."""
FIT = 96
"""Noises that a plan is fitted to, and validated with."""


@dataclass(frozen=True)
class Recommendation:
    """What `deis.recommend` recommends.

    Attributes
    ----------
    plan : Plan
        The one of the least error within the budget.
    row : Row
        What was measured of it.
    half : Row or None
        The best at half as many evaluations; None of a single one.
    rows : tuple of Row
        All that was measured.
    """

    plan: Plan
    row: Row
    half: Row | None
    rows: tuple[Row, ...]

    @property
    def lines(self) -> tuple[str, str, str]:
        """Which plan, what it costs, and what half the budget gives up."""
        row = self.row
        grid = self.plan.grid if not row.plan or not row.plan.fitted else "times of its own"
        which = f"Use {row.series} with {calls(row.nfe)} of the network, on {grid}: error {row.error:.3g}."
        cost = f"It costs {duration(row.seconds)} an image, of which the network takes {duration(row.bare)}."
        if self.half is None or self.half.error is None or row.error is None:
            return which, cost, "There is no half of a single call."
        times = self.half.error / row.error
        gives = f"{times:.1f} times the error" if times > 1 else "no more error"
        return which, cost, f"Half of it, {calls(self.half.nfe)}, has {gives}: {self.half.error:.3g}, by {self.half.series}."

    @property
    def code(self) -> str:
        """The line of Python that makes the plan; of one that was fitted here, that reads it once it is saved."""
        return code_of(self.row)

    @property
    def fitted_here(self) -> bool:
        """Whether the plan was fitted by this recommendation, so that nobody else has it."""
        return self.row.method == FITTED


def calls(nfe: int) -> str:
    """Return a number of calls in words."""
    return f"{nfe} call{'' if nfe == 1 else 's'}"


def duration(value: float | None) -> str:
    """Return a time in seconds or milliseconds."""
    if value is None:
        return "an unknown time"
    return f"{value:.2g} s" if value >= 1 else f"{1e3 * value:.2g} ms"


def recommend(
    model: Model,
    samples: Any = 32,
    *,
    nfe: int | None = None,
    seconds: float | None = None,
    error: float | None = None,
    methods: Iterable[str | Plan] | None = None,
    grids: Iterable[Any] | None = None,
    calibrate: bool = False,
    work: str | Path | None = None,
    **settings: Any,
) -> Recommendation:
    """Recommend a plan for a model, by a small comparison.

    Parameters
    ----------
    model, samples, methods, grids, work, settings
        As for `deis.compare`.
    nfe, seconds, error : optional
        The budget, exactly one of the three: network evaluations; seconds an image, in batches of `batch`, as this machine takes
        them now; or the error that is wanted, for which the fewest evaluations are looked for.
    calibrate : bool
        Fit plans to the model, too, at the budget that is found and at half of it, to noise that is not measured with.

    Returns
    -------
    Recommendation

    Raises
    ------
    ValueError
        Unless exactly one budget is given; where the seconds do not suffice for a call, or no budget up to 50 reaches the error;
        where no method can meet the budget; and as `deis.compare` does.
    """
    given = {"nfe": nfe, "seconds": seconds, "error": error}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"give exactly one of nfe, seconds and error; given are {given}")
    flag("calibrate", calibrate)
    subject = subject_of(model, samples, **settings)
    names = list(usual_methods(subject.calibrated) if methods is None else methods)
    with bar_of(subject, []) as bar:
        search = _Search(subject, subject.bench(work, bar), names, checked_grids(grids), calibrate)
        if nfe is not None:
            best = search.best(whole("nfe", nfe))
        elif seconds is not None:
            best = search.within(number("seconds", seconds, above=0))
        else:
            best = search.reaching(number("error", error, above=0))
        half = search.least(best.nfe // 2) if best.nfe > 1 else None
    assert best.plan is not None
    return Recommendation(best.plan, best, half, tuple(search.rows))


@dataclass
class _Search:
    """The rows of one budget after the other."""

    subject: Subject
    bench: Bench
    methods: list[str | Plan]
    grids: list[Any]
    calibrate: bool
    rows: list[Row] = field(default_factory=list)
    _teacher: Teacher | None = None

    def at(self, nfe: int) -> list[Row]:
        """Return the rows of a budget."""
        if not any(row.nfe == nfe for row in self.rows):
            lineup = self._lineup(nfe)
            if self.bench.progress is not None:
                todo = self.bench.missing([entry.plan for entry in lineup if entry.plan is not None])
                self.bench.progress.total = self.bench.progress.n + todo
                self.bench.progress.set_description(f"{nfe} NFE")
            self.rows += [measured(self.bench, entry)[0] for entry in lineup]
        return [row for row in self.rows if row.nfe == nfe]

    def least(self, nfe: int, seconds: float | None = None) -> Row | None:
        """Return the row of the least error at a budget, of those that keep within the seconds an image."""
        rows = [row for row in self.at(nfe) if row.error is not None and (seconds is None or (row.seconds or 0.0) <= seconds)]
        return min(rows, key=lambda row: row.error or 0.0, default=None)

    def best(self, nfe: int) -> Row:
        """Return the row of the least error at a budget."""
        found = self.least(nfe)
        if found is None:
            reasons = "; ".join(f"{row.series}: {row.note}" for row in self.at(nfe)) or "there is no method"
            raise ValueError(f"no method has samples of nfe={nfe}: {reasons}")
        return found

    def within(self, seconds: float) -> Row:
        """Return the row of the least error at the greatest budget that keeps within the seconds an image."""
        one = self.bench.measure(make_plan(self.subject.network.sde, nfe=1))
        pace = float(one["seconds"]) / len(self.subject.network.x_T)
        nfe = min(int(seconds / pace), MOST)
        while nfe >= 1:
            found = self.least(nfe, seconds)
            if found is not None:
                return found
            spent = min((row.seconds for row in self.at(nfe) if row.seconds), default=None)
            nfe = nfe - 1 if spent is None else min(nfe - 1, int(nfe * seconds / spent))
        raise ValueError(
            f"seconds={seconds!r} an image is less than one call of the network takes, {pace:.2g} in batches of "
            f"{self.bench.network.batch}; give more, or a greater batch"
        )

    def reaching(self, error: float) -> Row:
        """Return the row of the least error at the first budget where one is at most `error`."""
        nearest: Row | None = None
        for nfe in LADDER:
            nearest = self.least(nfe) or nearest
            if nearest is not None and nearest.error is not None and nearest.error <= error:
                return nearest
        reached = "none" if nearest is None else f"{nearest.error:.3g}, by {nearest.series}"
        raise ValueError(f"error={error!r} is not reached in {LADDER[-1]} evaluations: the least is {reached}; give a greater one")

    def _lineup(self, nfe: int) -> list[Entry]:
        methods = [method for method in self.methods if not isinstance(method, Plan) or method.nfe == nfe]
        subject = self.subject
        found = entries(subject.network.sde, methods, self.grids, [nfe], subject.calibrated) if methods else []
        return [*found, self._fitted(nfe)] if self.calibrate else found

    def _fitted(self, nfe: int) -> Entry:
        """Return a plan that is fitted to other noise than that of the comparison."""
        try:
            plan = fit(make_plan(self.subject.network.sde, nfe=nfe), self.subject.network.model, teacher=self._fitting())
        except ValueError as error:
            return Entry(FITTED, "", nfe, None, str(error))
        return Entry(FITTED, "", nfe, plan)

    def _fitting(self) -> Teacher:
        """Return the teacher of fitted plans, which is made once."""
        if self._teacher is None:
            network, bench = self.subject.network, self.bench
            noise = fresh_noise(network.x_T, FIT, float(network.sde.sigma(network.sde.t_start)), self.subject.seed)
            self._teacher = make_teacher(
                network.model, noise,
                condition=taken(network.condition, range(FIT)), batch=network.batch, tol=self.subject.tol,
                folder=None if bench.folder is None else bench.folder / "fit", allow_rough=self.subject.allow_rough,
            )  # fmt: skip
        return self._teacher
