"""Calibration of several budgets, in a limited time, and after an interruption; time is told by evaluations of the model."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deis
from deis.arrays import Array
from deis.calibration.clock import Clock, TimeIsUp
from deis.calibration.judge import Judge, end_of
from deis.calibration.stages import NEEDS

from .oracle import FEW_STEPS, two_modes

SDE = deis.VPSDE.linear()
EVALUATION = 1e-3
"""Seconds of one sample."""


def noise(n: int = 64, d: int = 8) -> Array:
    return np.random.default_rng(0).standard_normal((n, d))


class Timed:
    """The two modes, whose every evaluation takes a millisecond of a clock of their own."""

    def __init__(self) -> None:
        self.evaluations, self.eps = 0, two_modes(SDE)[0]
        self.model = deis.Denoiser(self.predict, SDE)

    def predict(self, x: Array, t: Array) -> Array:
        self.evaluations += len(x)
        return self.eps(x, t)

    def now(self) -> float:
        return 100 + EVALUATION * self.evaluations


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    timed = Timed()
    monkeypatch.setattr("deis.calibration.clock.perf_counter", timed.now)
    return timed


def loss(plan: deis.Plan, teacher: deis.Teacher) -> float:
    auto = end_of(teacher, deis.make_plan(SDE, nfe=plan.nfe), 48)
    return Judge.of(teacher, 48, "robust", [auto]).of_plan(plan).loss


# --- the clock ---------------------------------------------------------------------------------------------------------


def test_turns_end_before_the_time_does(timed: Timed) -> None:
    clock = Clock(seconds=10.0)
    timed.evaluations += 1000
    clock.update(1000)
    assert clock.spent == pytest.approx(1.0)
    assert clock.needs(500) == pytest.approx(0.5)
    assert clock.allows(8999)
    assert not clock.cut
    assert not clock.allows(9001)
    assert clock.cut
    turns = 0
    for _ in clock.turns(100, 10):
        timed.evaluations += 2000
        turns += 1
    assert turns == 4  # a fifth would end at 11 s
    assert list(Clock(seconds=10.0).turns(3, 1e9)) == [0, 1, 2]  # of which nothing is known yet
    assert list(clock.turns(100, 9001)) == []


def test_a_plan_and_a_stage_take_their_share(timed: Timed) -> None:
    clock = Clock(seconds=10.0)
    timed.evaluations += 2000
    clock.plan_share(0.5)
    clock.share(0.25)
    assert [clock.end, clock.until] == pytest.approx([6.0, 3.0])
    unlimited = Clock()
    unlimited.plan_share(0.5)
    unlimited.share(0.5)
    assert math.isinf(unlimited.until)
    assert unlimited.allows(1e30)


def test_a_strict_clock_ends_what_it_is_told_of(timed: Timed) -> None:
    clock = Clock(seconds=1.0, strict=True)
    clock.update(1)
    timed.evaluations += 1001
    with pytest.raises(TimeIsUp):
        clock.update(1)


# --- a limited time ----------------------------------------------------------------------------------------------------


def test_more_time_is_used_and_never_much_more_than_there_is(timed: Timed) -> None:
    teacher = deis.make_teacher(timed.model, noise(), steps=64)
    losses, spent = [], []
    for seconds in (1.0, 3.0, 9.0, None):
        before = timed.now()
        plan = deis.calibrate(deis.make_plan(SDE, nfe=5), timed.model, teacher=teacher, seconds=seconds, iterations=4)
        spent.append(timed.now() - before)
        losses.append(loss(plan, teacher))
        cut = [row.get("cut", False) for row in plan.provenance["stages"]]
        assert any(cut) == (seconds is not None)
        assert ("cut short" in deis.calibration_report(plan)) == any(cut)
    assert losses[-1] < losses[0] < loss(deis.make_plan(SDE, nfe=5), teacher)
    assert all(spent[k] < 1.15 * seconds for k, seconds in enumerate((1.0, 3.0, 9.0)))
    assert spent == sorted(spent)
    assert spent[-1] > 9.0


@pytest.mark.parametrize("stage", ["least_squares", "gauss_newton"])
def test_seconds_too_short_for_the_first_stage_name_what_would_do(timed: Timed, tmp_path: Path, stage: str) -> None:
    start = deis.make_plan(SDE, nfe=5)

    def run(seconds: float) -> deis.Plan:
        return deis.calibrate(
            start, timed.model, noise(), teacher=64, stages=(stage,), seconds=seconds, iterations=1, folder=tmp_path
        )

    made = EVALUATION * (64 * 64 + 8 * (32 + 2))
    with pytest.raises(ValueError, match=rf"seconds=.* before the stage '{stage}' of 5 evaluations.*teacher is kept in") as refused:
        run(made + 0.1)
    assert (tmp_path / "teacher.json").exists()
    enough = int(re.findall(r"give seconds=(\d+) or more", str(refused.value))[0])
    fitted = run(enough)
    assert fitted.fitted
    assert NEEDS.keys() >= {stage}


def test_seconds_too_short_for_the_teacher(timed: Timed) -> None:
    with pytest.raises(
        ValueError, match=r"seconds=2 are too short for the teacher, which takes 4\.\d+ s or more: 64 steps of 64 samples"
    ):
        deis.calibrate(deis.make_plan(SDE, nfe=5), timed.model, noise(), seconds=2.0)
    assert timed.evaluations < 2.1 / EVALUATION
    with pytest.raises(ValueError, match="seconds=0 must be"):
        deis.calibrate(deis.make_plan(SDE, nfe=5), timed.model, noise(), seconds=0)


def test_a_stage_that_the_time_cut_goes_on(timed: Timed, tmp_path: Path) -> None:
    def run(seconds: float | None, folder: Path, *stages: str) -> tuple[deis.Plan, int]:
        before, start = timed.evaluations, deis.make_plan(SDE, nfe=4)
        options: dict[str, Any] = {"iterations": 6, "stages": stages or "gauss_newton"}
        plan = deis.calibrate(start, timed.model, noise(), teacher=64, seconds=seconds, folder=folder, **options)
        return plan, timed.evaluations - before

    short, _ = run(8.0, tmp_path / "a")
    assert short.provenance["stages"][-1]["cut"]
    assert list((tmp_path / "a").glob("*.part.json"))
    longer, more = run(None, tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.part.json"))
    teacher = deis.make_teacher(timed.model, noise(), folder=tmp_path / "a")
    assert loss(longer, teacher) < loss(short, teacher)
    _, whole = run(None, tmp_path / "b")
    assert more < whole
    again, few = run(None, tmp_path / "a")
    assert again.keep_p.tolist() == longer.keep_p.tolist()
    assert few < 0.2 * whole
    stages = ("grid", "least_squares", "gauss_newton")
    near, last = (run(seconds, tmp_path / "c", *stages)[0] for seconds in (16.0, None))
    assert near.provenance["stages"][-1]["cut"]  # after the iteration that is best by the judge, though not by Gauss-Newton
    assert loss(last, teacher) <= loss(near, teacher)
    assert not list(tmp_path.glob("*/.*"))  # no temporary file is left


# --- several budgets ---------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"stages": ("grid", "least_squares"), "teacher": 64}


def test_a_range_is_the_plans_one_by_one_from_one_teacher(timed: Timed) -> None:
    plans = deis.calibrate_range(timed.model, noise(), (4, 3), **QUICK)
    together = timed.evaluations
    assert list(plans) == [3, 4]
    assert {nfe: plan.nfe for nfe, plan in plans.items()} == {3: 3, 4: 4}
    timed.evaluations = 0
    for nfe, plan in plans.items():
        alone = deis.calibrate(deis.make_plan(SDE, nfe=nfe), timed.model, noise(), **QUICK)
        assert np.array_equal(alone.keep_p, plan.keep_p)
        assert np.array_equal(alone.t, plan.t)
    teacher = 64 * 64 + 8 * (32 + 2)
    assert timed.evaluations - together == teacher


def test_each_plan_is_written_when_it_is_finished_and_the_rest_goes_on(
    timed: Timed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> dict[int, deis.Plan]:
        return deis.calibrate_range(timed.model, noise(), (3, 4), folder=tmp_path / "work", out=tmp_path / "plans", **QUICK)

    found = deis.calibration.budgets.calibrated  # type: ignore[attr-defined]

    def interrupted(starts: list[deis.Plan], *args: Any, **kwargs: Any) -> deis.Plan:
        if starts[0].nfe == 4:
            raise KeyboardInterrupt
        plan: deis.Plan = found(starts, *args, **kwargs)
        return plan

    with monkeypatch.context() as patch:
        patch.setattr("deis.calibration.budgets.calibrated", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert [file.name for file in (tmp_path / "plans").iterdir()] == ["nfe-3.json"]
    first, timed.evaluations = timed.evaluations, 0
    plans = run()
    second, timed.evaluations = timed.evaluations, 0
    assert run()[4].keep_p.tolist() == plans[4].keep_p.tolist()
    assert timed.evaluations < 0.2 * second < 0.2 * first
    assert sorted(file.name for file in (tmp_path / "plans").iterdir()) == ["nfe-3.json", "nfe-4.json"]
    for nfe, plan in plans.items():
        assert deis.load_plan(tmp_path / "plans" / f"nfe-{nfe}.json").keep_p.tolist() == plan.keep_p.tolist()


def test_a_name_with_the_budget_in_it(timed: Timed, tmp_path: Path) -> None:
    deis.calibrate_range(timed.model, noise(), (3,), out=tmp_path / "{nfe} calls.json", **QUICK)
    assert [file.name for file in tmp_path.iterdir()] == ["3 calls.json"]


def test_budgets_share_the_time(timed: Timed) -> None:
    teacher = deis.make_teacher(timed.model, noise(), steps=64)
    before = timed.now()
    plans = deis.calibrate_range(timed.model, nfe=range(3, 6), teacher=teacher, seconds=12.0)
    assert timed.now() - before < 1.15 * 12
    spent = [sum(row["seconds"] for row in plan.provenance["stages"]) for plan in plans.values()]
    assert spent[0] < 1.15 * 12 * 3 / (3 + 4 + 5)
    assert all(loss(plan, teacher) < loss(deis.make_plan(SDE, nfe=nfe), teacher) - 1 for nfe, plan in plans.items())


def test_in_a_short_time_the_coefficients_of_every_plan_are_fitted(timed: Timed) -> None:
    teacher = deis.make_teacher(timed.model, noise(), steps=64)
    plans = deis.calibrate_range(timed.model, nfe=range(3, 6), teacher=teacher, seconds=2.5)
    assert list(plans) == [3, 4, 5]
    for plan in plans.values():
        (row,) = (row for row in plan.provenance["stages"] if row["stage"] == "least_squares")
        assert row["loss_after"] < row["loss_before"] - 0.5


def test_budgets_that_the_time_does_not_suffice_for_are_named(timed: Timed) -> None:
    teacher = deis.make_teacher(timed.model, noise(), steps=64)
    options: dict[str, Any] = {"teacher": teacher, "stages": ("gauss_newton",)}
    with pytest.warns(
        UserWarning, match=r"nfe=\[6\] are missing, \[3\] finished: seconds=1 are too short.*give seconds=\d+ or more"
    ):
        plans = deis.calibrate_range(timed.model, nfe=(3, 6), seconds=1, **options)
    assert list(plans) == [3]
    with pytest.raises(ValueError, match="seconds=1 are too short"):
        deis.calibrate_range(timed.model, nfe=(6,), seconds=1, **options)


@FEW_STEPS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nfe": ()}, "nfe is empty"),
        ({"nfe": (3, 0)}, "nfe=0.0 must be a whole number"),
        ({"nfe": "3-10"}, "nfe must be an array of real numbers"),
        ({"nfe": (3, 4), "method": lambda s, ts, grid: deis.make_plan(s, "rhork_2heun", ts=ts)}, "nfe=3 cannot be met"),
        ({"nfe": (3, 12)}, "64 samples of 8 numbers, 16 of them for validation, are too few"),
        ({"method": "ancestral"}, "adds noise"),
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"stages": ("magic",)}, "stages='magic' is unknown"),
        ({"nfe": (3,), "out": 3}, "out must be the name of a folder"),
        ({"nfe": (3,), "seconds": -1}, "seconds=-1 must be"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_called(timed: Timed, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        deis.calibrate_range(timed.model, noise(), **(QUICK | arguments))
    assert timed.evaluations == 0


def test_a_range_refuses_a_teacher_that_has_not_converged(timed: Timed) -> None:
    with pytest.raises(ValueError, match=r"the teacher has not converged.*give more than steps=6"):
        deis.calibrate_range(timed.model, noise(), (3, 4), teacher=6)
