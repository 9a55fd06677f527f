"""The judge of a calibration, the race between its starts, and what each costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import deis
from deis.arrays import Array
from deis.calibration.clock import Clock
from deis.calibration.judge import C, Judge, Verdict, end_of
from deis.calibration.network import Student, rmse
from deis.calibration.search import Race, Start, search_of
from deis.calibration.stages import STAGES
from deis.calibration.table import Table

from .oracle import two_modes

SDE = deis.VPSDE.linear()


def noise(n: int, d: int = 8, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, d))


def bimodal() -> deis.Denoiser:
    return deis.Denoiser(two_modes(SDE)[0], SDE)


@pytest.fixture(scope="module")
def teacher() -> deis.Teacher:
    return deis.make_teacher(bimodal(), noise(64), steps=128)


# --- the judge ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_of_log_e2_c2_and_its_difference_is_paired(teacher: deis.Teacher) -> None:
    ends = [end_of(teacher, deis.make_plan(SDE, method, nfe=5), 48) for method in ("auto", "ddim")]
    errors = [rmse(end, teacher.end[48:]) for end in ends]
    judge = Judge.of(teacher, 48, "robust", ends)
    assert judge.c == pytest.approx(C * min(np.median(e) for e in errors))
    one, two = map(judge.of_ends, ends)
    losses = [np.log(e**2 + judge.c**2) for e in errors]
    assert one.error == np.median(errors[0])
    assert one.loss == pytest.approx(losses[0].mean())
    difference = losses[1] - losses[0]
    assert two.standard_error(one) == pytest.approx(np.sqrt(np.square(difference - difference.mean()).sum() / 15 / 16))
    assert one.standard_error(one) == 0
    far = judge.of_ends(np.full_like(ends[0], np.inf))
    assert (far.error, far.loss) == (np.inf, np.inf)


def test_a_function_of_the_caller_s_is_the_judge(teacher: deis.Teacher) -> None:
    def loss(x: Any, target: Any) -> Any:
        return abs(x - target).max(1)

    end = end_of(teacher, deis.make_plan(SDE, nfe=4), 48)
    verdict = Judge.of(teacher, 48, loss, [end]).of_ends(end)
    expected = np.abs(end - teacher.end[48:]).max(1)
    assert (verdict.error, verdict.loss) == (np.median(expected), expected.mean())
    with pytest.raises(ValueError, match=r"one number per sample, shape \(16,\), and has shape \(\)"):
        Judge(teacher, 48, lambda x, target: abs(x - target).mean()).of_ends(end)


@pytest.mark.parametrize("method", ["auto", "tab2", "unipc2"])
def test_the_prediction_of_the_noise_is_not_made_again(teacher: deis.Teacher, method: str) -> None:
    plan, network = deis.make_plan(SDE, method, nfe=4), teacher.network
    expected = Student(network, plan).run(Table.of(plan), noise(64)[48:], 48)
    before = network.evaluations
    end = end_of(teacher, plan, 48)
    assert network.evaluations - before == 3 * 16
    assert np.abs(end - expected).max() < 1e-12
    later = deis.make_plan(SDE, method, ts=np.linspace(0.9, SDE.t_end, 5))  # it begins elsewhere
    before = network.evaluations
    end_of(teacher, later, 48)
    assert network.evaluations - before == 4 * 16


@pytest.mark.parametrize(("loss", "kept"), [(-1.0, True), (1.0, False)])
def test_what_has_the_lesser_loss_is_kept_whatever_its_median(
    teacher: deis.Teacher, monkeypatch: pytest.MonkeyPatch, loss: float, kept: bool
) -> None:
    plan, other = deis.make_plan(SDE, "tab2", nfe=4), deis.make_plan(SDE, "tab1", nfe=4)
    spread = np.linspace(-0.1, 0.1, 16)
    before = Judge.of(teacher, 48, "robust", [end_of(teacher, plan, 48)]).of_plan(plan)
    found = Verdict(before.error + (1 if kept else -1), before.losses + loss + spread)
    monkeypatch.setitem(STAGES, "least_squares", lambda task, best, done: other)
    monkeypatch.setattr(Judge, "of_plan", lambda judge, plan: found)
    fitted = deis.calibrate(plan, teacher.network.model, teacher=teacher, stages=("least_squares",))
    assert np.array_equal(fitted.keep_p, (other if kept else plan).keep_p)
    row = fitted.provenance["stages"][-1]
    assert row["loss_before"] == pytest.approx(before.loss)
    assert row["loss_after"] - row["loss_before"] == pytest.approx(loss if kept else 0.0)
    assert row["standard_error"] == pytest.approx(spread.std(ddof=1) / 4 if kept else 0.0)
    assert ("could not improve it" in deis.calibration_report(fitted)) == (not kept)
    assert ("-1.000 +- 0.016" in deis.calibration_report(fitted)) == kept


def test_all_stages_are_judged_with_one_c(teacher: deis.Teacher) -> None:
    fitted = deis.calibrate(deis.make_plan(SDE, nfe=4), teacher.network.model, teacher=teacher, iterations=2)
    rows = fitted.provenance["stages"]
    for one, two in pairwise(rows):
        assert (two["before"], two["loss_before"]) == (one["after"], one["loss_after"])
        assert two["loss_after"] <= two["loss_before"]
    end = end_of(teacher, fitted, 48)
    c = C * rows[0]["after"]
    assert np.log(rmse(end, teacher.end[48:]) ** 2 + c**2).mean() == pytest.approx(rows[-1]["loss_after"], abs=0.05)


# --- the race ----------------------------------------------------------------------------------------------------------


def test_half_of_the_starts_go_on_to_more_samples(teacher: deis.Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [deis.make_plan(SDE, "ddim", None, "t", power, nfe=4) for power in np.linspace(1, 4, 24)]
    asked: list[tuple[int, int]] = []

    def loss(self: Race, plan: deis.Plan, samples: int, predictions: Any = None) -> float:
        place = plans.index(plan)
        asked.append((samples, place))
        return abs(place - 7.2) if samples < 32 else -float(place)

    monkeypatch.setattr(Race, "loss", loss)
    race = Race(teacher, 48, None, 1e-2, Clock())
    few = race.halved([Start(plan, None) for plan in plans])
    assert [sum(samples == n for samples, _ in asked) for n in (8, 16, 32)] == [24, 12, 6]
    assert [plans.index(start.plan) for start in few] == [10, 9, 8]


def test_the_race_is_cheaper_than_the_fit_of_every_start(teacher: deis.Teacher) -> None:
    plans = [deis.make_plan(SDE, method, nfe=4) for method in ("auto", "tab2", "tab3", "ddim", "unipc2", "ipndm3", "lms2", "lms3")]
    network = teacher.network
    before = network.evaluations
    race = Race(teacher, 48, None, 1e-2, Clock())
    few = race.halved([Start(plan, None) for plan in plans])
    assert len(few) == 3
    assert network.evaluations - before == (8 * 8 + 4 * 16) * 3  # the first prediction of four is the teacher's
    assert network.evaluations - before < 0.2 * len(plans) * 64 * 4
    assert race.loss(few[0].plan, 16) <= min(race.loss(start.plan, 16) for start in few)


def test_moves_end_at_a_lesser_loss_and_when_the_time_is_over(teacher: deis.Teacher) -> None:
    start = deis.make_plan(SDE, "tab2", nfe=4)
    search = search_of(start, None, teacher, {})
    race = Race(teacher, 48, None, 1e-2, Clock())
    moved = race.moved([Start(start, search), Start(deis.make_plan(SDE, "tab2", None, "rho", 7.0, nfe=4), search)])
    assert race.loss(moved, 32) < race.loss(start, 32)
    assert all(np.abs(teacher.t - t).min() == 0 for t in moved.ts)
    clock = Clock(seconds=1e-9)
    still = replace(race, clock=clock).moved([Start(start, search)])
    assert clock.cut
    assert np.abs(still.ts - start.ts).max() < np.abs(np.diff(teacher.t)).max()


def test_of_several_plans_the_one_that_is_best_when_fitted_goes_on(teacher: deis.Teacher) -> None:
    model = teacher.network.model
    options: dict[str, Any] = {"teacher": teacher, "stages": ("least_squares",)}
    starts = [deis.make_plan(SDE, "tab2", None, *grid, nfe=5) for grid in (("t", 1.0), ("t", 2.0), ("rho", 7.0))]
    alone = [deis.calibrate([plan], model, **options) for plan in starts]
    judge = Judge.of(teacher, 48, "robust", [end_of(teacher, plan, 48) for plan in starts])
    best = min(alone, key=lambda plan: judge.of_plan(plan).loss)
    fitted = deis.calibrate(starts, model, **options)
    assert np.array_equal(fitted.keep_p, best.keep_p)
    assert np.array_equal(fitted.ts, best.ts)
