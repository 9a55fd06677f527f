"""Calibration: what it fits, that it never makes a plan worse, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deis
from benchmarks.methods import digits
from deis.arrays import Array
from deis.calibration.gauss_newton import _linearise
from deis.calibration.gradient import _noise_levels, _Objective, _Parameters
from deis.calibration.grid import Jumps, exchange, shortest, teacher_grid
from deis.calibration.judge import sample_losses
from deis.calibration.model_free import end_weights, model_free_grid
from deis.calibration.network import Network, Student, rmse
from deis.calibration.table import Table

from .oracle import FEW_STEPS, gaussian, two_modes

SDE = deis.VPSDE.linear()


def noise(n: int, d: int = 6, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((n, d))


def bimodal() -> deis.Denoiser:
    return deis.Denoiser(two_modes(SDE)[0], SDE)


def torch_model() -> deis.Denoiser:
    """The two modes in torch, with derivatives."""

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha = torch.exp(-0.25 * t**2 * 19.9 - 0.05 * t)[:, None]
        sigma = torch.sqrt(1 - alpha**2)
        variance = (0.5 * alpha) ** 2 + sigma**2
        return sigma * (x - alpha * torch.tanh(alpha * x / variance)) / variance

    return deis.Denoiser(eps, SDE)


def jax_model() -> deis.Denoiser:
    def eps(x: jax.Array, t: jax.Array) -> jax.Array:
        alpha = jnp.exp(-0.25 * t**2 * 19.9 - 0.05 * t)[:, None]
        sigma = jnp.sqrt(1 - alpha**2)
        variance = (0.5 * alpha) ** 2 + sigma**2
        return sigma * (x - alpha * jnp.tanh(alpha * x / variance)) / variance

    return deis.Denoiser(eps, SDE)


def held_out(plan: deis.Plan, denoiser: deis.Denoiser, reference_steps: int = 400) -> float:
    x_T = noise(64, seed=99)
    reference = deis.sample(deis.make_plan(SDE, "tab3", reference_steps), denoiser, x_T)
    return float(np.median(rmse(deis.sample(plan, denoiser, x_T), reference)))


# --- the recurrence ----------------------------------------------------------------------------------------------------

DETERMINISTIC = ["auto", "ddim", "tab3", "ipndm", "unipc3", "unipc2_bh2", "deis_abm2", "rhork_3kutta", "edm_heun", "dpm_solver_3"]


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("afs", [None, 0.5])
def test_every_deterministic_plan_is_a_recurrence(method: str, afs: float | None) -> None:
    plan = deis.make_plan(SDE, method, nfe=9, afs=afs)
    table = Table.of(plan)
    denoiser = bimodal()
    student = Student(Network(denoiser, noise(8)), plan)
    expected = deis.sample(plan, denoiser, noise(8))
    assert np.abs(student.run(table, noise(8)) - expected).max() < 1e-11
    again = table.plan(plan, SDE, "itself")
    assert np.abs(deis.sample(again, denoiser, noise(8)) - expected).max() < 1e-11
    assert again.nfe == plan.nfe
    assert np.array_equal(again.ts, plan.ts)


def test_a_stochastic_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="adds noise"):
        deis.calibrate(deis.make_plan(SDE, "ancestral", 5), bimodal(), noise(32))


# --- the teacher -------------------------------------------------------------------------------------------------------


def test_the_teacher_solves_the_flow_and_interpolates_it() -> None:
    eps, solution = gaussian(SDE)
    teacher = deis.make_teacher(deis.Denoiser(eps, SDE), noise(20), tol=1e-5)
    assert len(teacher.t) >= 65
    for t in (1.0, 0.7312, 0.3, 0.01234, SDE.t_end):
        assert np.abs(teacher.state(t) - solution(t, noise(20))).max() < 1e-4
    assert teacher.self_error < 1e-4
    assert np.abs(teacher.prediction(5, "data") - (teacher.states[5] - SDE.sigma(teacher.t[5]) * teacher.predictions[5])
                  / SDE.alpha(teacher.t[5])).max() < 1e-9  # fmt: skip


@pytest.mark.parametrize("sde", [deis.FlowMatching(), deis.EDM(), deis.VPSDE.discrete(np.linspace(0.999, 0.01, 60))])
def test_other_schedules_have_teachers(sde: deis.Schedule) -> None:
    denoiser = deis.Denoiser(two_modes(sde)[0], sde)
    if isinstance(sde, deis.FlowMatching):
        denoiser = deis.Denoiser(lambda x, t: x / (1 + np.abs(x)), sde, predicts="flow")
    teacher = deis.make_teacher(denoiser, noise(48) * sde.sigma(sde.t_start))
    assert np.isfinite(teacher.end).all()
    plan = deis.calibrate(deis.make_plan(sde, nfe=4), denoiser, teacher=teacher)
    before, after = (plan.provenance["stages"][k]["after"] for k in (0, -1))
    assert after < 0.5 * before
    if sde.num_times is not None:
        assert (plan.t == np.rint(plan.t)).all()
        assert plan.discrete


def test_gauss_newton_moves_whole_times_by_whole_numbers() -> None:
    sde = deis.VPSDE.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    plan = deis.make_plan(sde, "tab2", nfe=4)
    fitted = deis.calibrate(plan, deis.Denoiser(two_modes(sde)[0], sde), noise(96, 8), stages=("gauss_newton",), iterations=4)
    assert fitted.discrete
    assert (fitted.t == np.rint(fitted.t)).all()
    assert not np.array_equal(fitted.t, plan.t)
    assert fitted.provenance["stages"][-1]["after"] < 0.5 * fitted.provenance["stages"][-1]["before"]


def test_a_teacher_on_disk_is_the_same(tmp_path: Path) -> None:
    x_T = noise(20)
    memory = deis.make_teacher(bimodal(), x_T, steps=64)
    disk = deis.make_teacher(bimodal(), x_T, steps=64, folder=tmp_path)
    spilled = deis.make_teacher(bimodal(), x_T, steps=64, memory=1)
    for teacher in (disk, spilled, deis.make_teacher(bimodal(), x_T, folder=tmp_path)):
        assert np.array_equal(teacher.t, memory.t)
        assert all(np.array_equal(a, b) for a, b in zip(teacher.states, memory.states, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(teacher.predictions, memory.predictions, strict=True))
    with pytest.raises(ValueError, match="holds a teacher of other samples"):
        deis.make_teacher(bimodal(), x_T + 1, folder=tmp_path)
    with pytest.raises(ValueError, match="holds a teacher of other samples, another schedule or another model"):
        deis.make_teacher(deis.Denoiser(lambda x, t: 0.1 * x, SDE), x_T, folder=tmp_path)


def test_a_rough_teacher_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    model, x_T = bimodal(), noise(48)
    refused = pytest.raises(ValueError, match=r"the teacher has not converged.*give more than steps=6.*allow_rough=True")
    for where in ({}, {"folder": tmp_path}, {"memory": 1}):
        with refused:
            deis.make_teacher(model, x_T, steps=6, **where)
    assert not (tmp_path / "teacher.json").exists()
    rough = deis.make_teacher(model, x_T, steps=6, folder=tmp_path, allow_rough=True)
    assert rough.self_error > 0.05 * np.sqrt(np.square(rough.end).mean())
    with refused:
        deis.make_teacher(model, x_T, folder=tmp_path)
    with refused:
        deis.calibrate(PLAN, model, teacher=rough)
    plan = deis.calibrate(PLAN, model, teacher=rough, stages=("least_squares",), allow_rough=True)
    assert plan.provenance["teacher_self_error"] == rough.self_error


def test_a_discrete_schedule_too_coarse_for_its_model_is_refused() -> None:
    sde = deis.VPSDE.discrete(np.linspace(0.999, 0.01, 7))
    model = deis.Denoiser(two_modes(sde)[0], sde)
    with pytest.raises(ValueError, match=r"has not converged.*from 3 to 6 steps"):
        deis.make_teacher(model, noise(20))
    assert len(deis.make_teacher(model, noise(20), allow_rough=True).t) == 7


def test_chaos_can_be_taken_as_it_is() -> None:
    def chaos(x: Array, t: Array) -> Array:
        return np.sin(300 * x * t[:, None])

    model = deis.Denoiser(chaos, SDE)
    with pytest.raises(ValueError, match=r"does not converge.*allow_rough=True"):
        deis.make_teacher(model, noise(8))
    assert len(deis.make_teacher(model, noise(8), allow_rough=True).t) == 1025


@pytest.mark.parametrize(("few", "validation"), [(5, 0.25), (14, 0.25), (40, 0.02), (40, 0.97)])
def test_the_number_of_samples_that_is_asked_for_suffices(few: int, validation: float) -> None:
    def calibrated(samples: int) -> deis.Plan:
        return deis.calibrate(PLAN, bimodal(), noise(samples), teacher=64, stages=("least_squares",), validation=validation)

    with pytest.raises(ValueError, match=r"give \d+ or more") as refused:
        calibrated(few)
    enough = int(re.findall(r"give (\d+) or more", str(refused.value))[0])
    assert ("better 64" in str(refused.value)) == (enough < 64)
    assert calibrated(enough).nfe == 3


# --- grids -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_dynamic_programming_is_the_best_of_all_paths(seed: int, steps: int) -> None:
    m = 8
    cost = np.random.default_rng(seed).random((m + 1, m + 1))
    found = shortest(lambda path, ends: cost[path[-1], ends], m, steps)
    paths = [(0, *inner, m) for inner in combinations(range(1, m), steps - 1)]
    totals = [sum(cost[a, b] for a, b in pairwise(path)) for path in paths]
    assert tuple(found) == paths[int(np.argmin(totals))]


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_exchange_finds_what_single_moves_lead_to(seed: int) -> None:
    rng = np.random.default_rng(seed)
    goal = np.array([0, 30, 60, 90, 120, 150])
    start = goal + np.concatenate([[0], rng.integers(-14, 15, 4), [0]])
    assert np.array_equal(exchange(lambda places: 1.0 + float(np.abs(places - goal).sum()), start), goal)
    ordered = exchange(lambda places: float(rng.random()), np.array([0, 1, 2, 3, 4, 40]))
    assert (np.diff(ordered) > 0).all()


def test_a_teacher_grid_lowers_the_jump_errors_it_is_made_of() -> None:
    teacher = deis.make_teacher(bimodal(), noise(32), steps=64)
    build = deis.get_method("tab2")
    jumps = Jumps(teacher, "eps")
    ts = teacher_grid(teacher, build, "eps", 6, "method", jumps)
    places = np.searchsorted(-jumps.t, -ts)
    even = np.rint(np.linspace(0, 64, 7)).astype(int)
    best = jumps.of_plan(places, build(SDE, ts, ""))
    assert best < jumps.of_plan(even, build(SDE, jumps.t[even], ""))
    # a jump of the plan, written out
    plan = build(SDE, ts, "")
    total = 0.0
    for i in range(6):
        x = plan.keep_x[i] * teacher.states[places[i]]
        for j in range(min(i, 2) + 1):
            x = x + plan.keep_p[i, j] * teacher.predictions[places[i - j]]
        total += float(rmse(x, teacher.states[places[i + 1]]).mean() / SDE.alpha(plan.t[i + 1]))
    assert abs(best - total) < 1e-6 * total


@pytest.mark.parametrize("sde", [SDE, deis.FlowMatching(), deis.VPSDE.discrete(np.linspace(0.999, 0.01, 60))])
def test_the_model_free_grid_lowers_its_bound(sde: deis.Schedule) -> None:
    def bound(ts: Array) -> float:
        plan = deis.make_plan(sde, "unipc2", ts=ts)
        return float(np.abs(end_weights(plan)) @ np.minimum(sde.rho(ts[:-1]), 1e3))

    ts = model_free_grid(sde, "unipc2", 6)
    assert (np.diff(ts) < 0).all()
    assert bound(ts) < 0.9 * bound(deis.make_grid(sde, 6, "t", 2.0))


def test_the_weights_of_the_end_are_its_derivatives() -> None:
    plan = deis.make_plan(SDE, "unipc2", 5)
    predictions = noise(5, 3)
    calls = iter(predictions)
    by_hand = deis.sample(plan, lambda x, t: next(calls)[None], np.zeros((1, 3)), predicts="x0")[0]
    assert np.abs(end_weights(plan) @ predictions - by_hand).max() < 1e-12


# --- the fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddim", "tab3", "unipc2", "auto"])
def test_one_evaluation_suffices_where_the_flow_is_affine(method: str) -> None:
    """For a Gaussian x and its prediction span the solution, so that least squares must find it."""
    eps, solution = gaussian(SDE)
    denoiser = deis.Denoiser(eps, SDE)
    plan = deis.calibrate(deis.make_plan(SDE, method, nfe=1), denoiser, noise(64), teacher=256, stages=("least_squares",))
    x_T = noise(16, seed=1)
    assert np.abs(deis.sample(plan, denoiser, x_T) - solution(SDE.t_end, x_T)).max() < 1e-3
    assert rmse(deis.sample(deis.make_plan(SDE, method, nfe=1), denoiser, x_T), solution(SDE.t_end, x_T)).max() > 0.1


def test_held_out_error_falls_by_the_stated_factor() -> None:
    """On the mixture fitted to 8x8 digits: by least squares to 0.4 of the best untuned, and to 0.3 with Gauss-Newton."""
    problem = digits(64)
    denoiser = deis.Denoiser(problem.model, problem.sde)
    x_T = torch.from_numpy(np.random.default_rng(5).standard_normal((128, 64)))
    teacher = deis.make_teacher(denoiser, x_T)
    reference = problem.run(deis.make_plan(problem.sde, "tab3", 300, "log", 1.0))

    def error(plan: deis.Plan) -> float:
        return float(np.median(rmse(problem.run(plan).numpy(), reference.numpy())))

    untuned = min(
        error(deis.make_plan(problem.sde, method, None, "t", 3.0, nfe=5)) for method in ("ipndm3", "deis_abm2", "auto", "tab3")
    )
    fitted = deis.calibrate(deis.make_plan(problem.sde, nfe=5), denoiser, teacher=teacher, stages=("grid", "least_squares"))
    assert error(fitted) < 0.4 * untuned
    best = deis.calibrate(fitted, denoiser, teacher=teacher, stages=("gauss_newton",))
    assert error(best) < 0.3 * untuned
    assert best.nfe == 5


@pytest.mark.parametrize(
    ("method", "form"), [("tab3", "eps"), ("dpmpp_2m", "data"), ("auto", "data"), ("rhork_2heun", "eps"), ("dpm_solver_3", "eps")]
)
@FEW_STEPS
def test_every_kind_of_plan_is_fitted(method: str, form: str) -> None:
    plan = deis.make_plan(SDE, method, nfe=6)
    assert plan.form == form
    fitted = deis.calibrate([plan], bimodal(), noise(96, 8), iterations=4)
    before, after = (held_out(p, bimodal()) for p in (plan, fitted))
    assert after < 0.35 * before
    assert (fitted.nfe, fitted.num_step, fitted.method) == (6, plan.num_step, method)


def test_an_analytical_first_step_stays_one() -> None:
    plan = deis.make_plan(SDE, "auto", nfe=4, afs=1.0)
    fitted = deis.calibrate(plan, bimodal(), noise(96, 8), iterations=3)
    assert (fitted.nfe, len(fitted.rows), fitted.method) == (4, 5, plan.method)
    assert held_out(fitted, bimodal()) < 0.35 * held_out(plan, bimodal())


def test_no_stage_makes_a_plan_worse() -> None:
    plan = deis.make_plan(SDE, "tab2", nfe=5)
    errors, losses = [], []
    for _ in range(3):
        plan = deis.calibrate(plan, bimodal(), noise(48, 8), stages=("least_squares", "gauss_newton"), iterations=3, teacher=128)
        errors += [(row["before"], row["after"]) for row in plan.provenance["stages"][-2:]]
        losses += [(row["loss_before"], row["loss_after"]) for row in plan.provenance["stages"][-2:]]
    assert all(after <= before for before, after in losses)
    assert all(a[1] == pytest.approx(b[0]) for a, b in pairwise(errors))
    assert "could not improve it" in deis.calibration_report(replace(plan, provenance=dict(plan.provenance) | {
        "stages": [{"stage": "grid", "before": 1.0, "after": 1.0, "evaluations": 1.0, "seconds": 0.0}]}))  # fmt: skip


def test_what_a_stage_makes_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(student: Student, table: Table, *args: Any, **kwargs: Any) -> Table:
        return replace(table, a=1.01 * table.a)

    plan = deis.make_plan(SDE, "tab2", nfe=4)
    monkeypatch.setattr("deis.calibration.stages.fit_ends", worse)
    fitted = deis.calibrate(plan, bimodal(), noise(48, 8), stages=("least_squares", "gauss_newton"), teacher=64)
    before = deis.calibrate(plan, bimodal(), noise(48, 8), stages=("least_squares",), teacher=64)
    assert np.array_equal(fitted.keep_x, before.keep_x)
    assert deis.calibration_report(fitted).splitlines()[-1].endswith("could not improve it")


def test_the_derivatives_are_those_of_the_end() -> None:
    """Against central differences of whole runs, for coefficients and times."""
    plan = deis.make_plan(SDE, "tab2", nfe=4)
    student, table, x = Student(Network(bimodal(), noise(8)), plan), Table.of(plan), noise(8)
    directions, jacobian, _, _ = _linearise(student, table, x, 4, 1e-5, True)
    assert len(directions) == sum(i + 2 for i in range(4)) + 3
    for k, direction in enumerate(directions):
        ends = []
        for by in (0.5, -0.5):
            t, a, c = table.t.copy(), table.a.copy(), table.c.copy()
            t[direction.row] += by * direction.time
            if len(direction.theta):
                a[direction.row] += by * direction.theta[0]
                c[direction.row, : len(direction.theta) - 1] += by * direction.theta[1:]
            ends.append(student.run(Table(t, a, c), x))
        expected = ends[0] - ends[1]
        assert np.abs(jacobian[..., k] - expected).max() < 2e-3 * np.abs(expected).max() + 1e-9


def test_the_batch_changes_nothing_and_conditions_reach_their_samples() -> None:
    shift = np.random.default_rng(3).standard_normal((48, 1))

    def conditional(condition: Array) -> deis.Denoiser:
        eps = two_modes(SDE)[0]
        return deis.Denoiser(lambda x, t: eps(x - SDE.alpha(t[:, None]) * condition, t), SDE)

    tables = []
    for batch in (48, 7):
        plan = deis.calibrate(
            deis.make_plan(SDE, "tab2", nfe=4), conditional, noise(48, 8), condition=shift, batch=batch, iterations=2, teacher=64
        )
        tables.append(Table.of(plan))
    assert np.abs(tables[0].c - tables[1].c).max() < 1e-6 * np.abs(tables[0].c).max()
    with pytest.raises(ValueError, match="condition has 3 entries for 48 samples"):
        deis.make_teacher(conditional, noise(48, 8), condition=shift[:3])


# --- frameworks --------------------------------------------------------------------------------------------------------


def test_a_calibrated_plan_is_one_result_on_every_backend(tmp_path: Path) -> None:
    plan = deis.calibrate(deis.make_plan(SDE, "tab2", nfe=4), bimodal(), noise(48, 8), stages=("gauss_newton",), iterations=3)
    assert plan.hands_on
    plan.save(tmp_path / "plan.json")
    assert deis.load_plan(tmp_path / "plan.json") == plan
    x_T = noise(8, seed=4)
    expected = deis.sample(plan, bimodal(), x_T)
    assert np.abs(deis.sample(plan, torch_model(), torch.from_numpy(x_T)).numpy() - expected).max() < 1e-10
    with jax.enable_x64(True):
        assert np.abs(np.asarray(deis.sample(plan, jax_model(), jnp.asarray(x_T))) - expected).max() < 1e-10


def test_frameworks_calibrate_alike() -> None:
    x_T = noise(32, 8)
    options: dict[str, Any] = {"teacher": 64, "stages": ("least_squares", "gauss_newton"), "iterations": 2}
    plan = deis.make_plan(SDE, "tab2", nfe=4)
    expected = Table.of(deis.calibrate(plan, bimodal(), x_T, **options))
    in_torch = Table.of(deis.calibrate(plan, torch_model(), torch.from_numpy(x_T), **options))
    with jax.enable_x64(True):
        in_jax = Table.of(deis.calibrate(plan, jax_model(), jnp.asarray(x_T), **options))
    for table in (in_torch, in_jax):
        assert np.abs(table.c - expected.c).max() < 1e-4 * np.abs(expected.c).max()
        assert np.abs(table.t - expected.t).max() < 1e-5
    single = deis.calibrate(plan, jax_model(), jnp.asarray(x_T, jnp.float32), **options)
    assert held_out(single, bimodal()) < 0.3 * held_out(plan, bimodal())


def test_conditions_reach_the_compiled_calls_of_jax() -> None:
    shift = np.random.default_rng(3).standard_normal((48, 1))

    def conditional(condition: Array) -> deis.Denoiser:
        return deis.Denoiser(lambda x, t: jnp.tanh(x - jnp.asarray(condition)), SDE)

    network = Network(conditional, jnp.asarray(noise(48, 8), jnp.float32), shift, 20)
    x = noise(48, 8, 1)
    for first, last in ((0, 48), (0, 7), (20, 48), (30, 48)):
        expected = np.tanh(x[first:last] - shift[first:last])
        assert np.abs(network.predict(x[first:last], 0.5, "eps", first) - expected).max() < 1e-5


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("loss", ["robust", "l1"])
def test_the_gradient_stage_improves_a_plan(framework: str, loss: Any) -> None:
    x_T: Any = torch.from_numpy(noise(48, 8)) if framework == "torch" else jnp.asarray(noise(48, 8), jnp.float32)
    model = torch_model() if framework == "torch" else jax_model()
    plan = deis.make_plan(SDE, "tab3", nfe=5)
    fitted = deis.calibrate(plan, model, x_T, stages=("gradient",), loss=loss, steps=60, teacher=64)
    assert held_out(fitted, bimodal()) < 0.7 * held_out(plan, bimodal())
    assert not np.array_equal(fitted.t, plan.t)


def test_the_gradient_is_that_of_the_end_in_coefficients_and_times() -> None:
    """Against central differences; the schedule's derivative, which is NumPy's, is part of it."""
    plan, x_T = deis.make_plan(SDE, "unipc2", nfe=4), noise(6)
    student = Student(Network(torch_model(), torch.from_numpy(x_T)), plan)
    parameters = _Parameters.of(student, Table.of(plan), 4, True)
    theta, z = (torch.from_numpy(value).requires_grad_() for value in parameters.zeros())
    levels = torch.from_numpy(_noise_levels(student, parameters.table(*parameters.zeros())))
    objective = _Objective(student, parameters, "robust", 1.0)
    objective.end((theta, z), torch.from_numpy(x_T), levels, torch_model(), lambda f: f).sum().backward()

    def difference(place: tuple[str, tuple[int, ...]]) -> float:
        ends = []
        for by in (1e-5, -1e-5):
            values = {"theta": np.zeros((4, 5)), "z": np.zeros(4)}
            values[place[0]][place[1]] = by
            ends.append(student.run(parameters.table(values["theta"], values["z"]), x_T).sum())
        return float(ends[0] - ends[1]) / 2e-5

    assert theta.grad is not None
    assert z.grad is not None
    for k in range(4):
        assert float(z.grad[k]) == pytest.approx(difference(("z", (k,))), rel=1e-3, abs=1e-4)
    for i, j in ((0, 0), (1, 2), (2, 1), (3, 0), (3, 4)):
        assert float(theta.grad[i, j]) == pytest.approx(difference(("theta", (i, j))), rel=1e-4, abs=1e-5)


def test_a_loss_of_the_users_own_is_what_is_judged() -> None:
    def loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (x.mean(1) - target.mean(1)).abs()

    plan = deis.make_plan(SDE, "ddim", nfe=4)
    fitted = deis.calibrate(
        plan, torch_model(), torch.from_numpy(noise(48, 8)), stages=("gradient",), loss=loss, steps=40, teacher=64
    )
    x_T = noise(48, 8)
    reference = deis.sample(deis.make_plan(SDE, "tab3", 200), bimodal(), x_T)
    mine, before = (np.median(np.abs((deis.sample(p, bimodal(), x_T) - reference).mean(1))) for p in (fitted, plan))
    assert mine < 0.6 * before


@pytest.mark.parametrize("framework", [torch, jnp])
def test_losses(framework: Any) -> None:
    x, y = noise(5, 4), noise(5, 4, 1)
    square = ((x - y) ** 2).mean(1)
    expected = {"l2": square, "l1": np.abs(x - y).mean(1), "huber": np.sqrt(square + 0.04) - 0.2, "robust": np.log(square + 0.04)}
    for name, value in expected.items():
        found = sample_losses(name, framework.asarray(x), framework.asarray(y), 0.2)  # type: ignore[arg-type]
        assert np.abs(np.asarray(found) - value).max() < 1e-6


# --- guidance families ----------------------------------------------------------------------------------------------------


def guided_model(weight: float) -> deis.Denoiser:
    return deis.Denoiser(deis.guided(two_modes(SDE)[0], gaussian(SDE, 0.0, 1.1)[0], weight), SDE)


def test_a_family_is_fitted_and_interpolates(tmp_path: Path) -> None:
    plan = deis.make_plan(SDE, "tab2", nfe=4)
    family = deis.calibrate_family(plan, guided_model, (1.0, 1.5, 2.0), noise(96, 8), iterations=3, teacher=128)
    assert family.at(1.5) == family.plans[1]
    between = family.at(1.125)
    assert np.allclose(between.keep_x, 0.75 * family.plans[0].keep_x + 0.25 * family.plans[1].keep_x)
    for plan_a, plan_b in pairwise(family.plans):  # each from its neighbour's coefficients
        assert np.abs(plan_a.keep_p - plan_b.keep_p).max() < 0.05 * np.abs(plan_b.keep_p).max()
    assert held_out(between, guided_model(1.125)) < 0.2 * held_out(plan, guided_model(1.125))
    family.save(tmp_path / "family.json")
    assert deis.PlanFamily.load(tmp_path / "family.json") == family
    with pytest.raises(ValueError, match="outside what was fitted"):
        family.at(2.5)
    with pytest.raises(ValueError, match="other times"):
        deis.PlanFamily((1.0, 2.0), (family.plans[0], deis.make_plan(SDE, "tab2", nfe=4)))
    text = (tmp_path / "family.json").read_text()
    document = json.loads(text)
    for broken in (
        text[:-40],
        "[]",
        "{}",
        text.replace('"version": 2', '"version": 3', 1),
        text.replace("1.5,", "1.25,", 1),
        text.replace('"values"', '"about": "by hand",\n "values"', 1),
        json.dumps(document | {"plans": document["plans"][::-1]}),
        "[" * 100_000,
        text.replace('"keep_x"', '"keep_y"', 1),
    ):
        (tmp_path / "family.json").write_text(broken)
        with pytest.raises(ValueError, match="is not a usable file of plans"):
            deis.PlanFamily.load(tmp_path / "family.json")


# --- provenance, and schedules --------------------------------------------------------------------------------------------


def test_a_plan_tells_how_it_was_made() -> None:
    plan = deis.calibrate(deis.make_plan(SDE, nfe=3), bimodal(), noise(40, 8), iterations=1, validation=0.2)
    about = plan.provenance
    assert (about["samples"], about["validation"]) == (32, 8)
    assert [row["stage"] for row in about["stages"]] == ["teacher", "grid", "least_squares", "gauss_newton"]
    assert all(row["evaluations"] > 0 for row in about["stages"])
    assert "gauss_newton" in deis.calibration_report(plan)
    assert json.loads(json.dumps(about)) == about
    with pytest.raises(ValueError, match="was not calibrated"):
        deis.calibration_report(deis.make_plan(SDE, nfe=3))
    with pytest.raises(ValueError, match="provenance must hold what JSON can"):
        replace(plan, provenance={"error": float("nan")})


def test_another_schedule_is_warned_of_once() -> None:
    plan = deis.make_plan(deis.VPSDE.linear(0.2, 20), nfe=3)
    denoiser = bimodal()
    with pytest.warns(UserWarning, match="made for the schedule 'VPSDE.linear"):
        deis.sample(plan, denoiser, noise(2))
    deis.sample(plan, denoiser, noise(2))  # a second warning would be an error
    deis.sample(deis.make_plan(SDE, nfe=3), denoiser, noise(2))


# --- what is refused ----------------------------------------------------------------------------------------------------


class Broken:
    """A model with something wrong."""

    def __init__(self, what: str) -> None:
        self.what, self.rng = what, np.random.default_rng(0)

    def __call__(self, x: Array, t: Array) -> Array:
        if self.what == "dropout":
            return x * (self.rng.random(x.shape) > 0.1)
        if self.what == "diverges":
            return -1e30 * x**3
        if self.what == "nan":
            return np.full_like(x, np.nan)
        if self.what == "memory":
            raise MemoryError
        if self.what == "cuda":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return np.sin(3000 * x * t[:, None])


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("dropout", ValueError, r"different predictions when it was called twice.*model\.eval\(\)"),
        ("diverges", ValueError, "the teacher diverges: its state is not finite at t="),
        ("nan", ValueError, "NaN or infinity at t=1.0"),
        ("memory", MemoryError, "ran out of memory on 8 samples; give a batch below 16"),
        ("cuda", MemoryError, "ran out of memory on 8 samples"),
        ("chaos", ValueError, "does not converge: its final states move by"),
    ],
)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # in a model that diverges
def test_broken_models_are_named(what: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        deis.calibrate(deis.make_plan(SDE, nfe=3), deis.Denoiser(Broken(what), SDE), noise(16), batch=16)


PLAN = deis.make_plan(SDE, nfe=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": ("grid", "magic")}, "stages='magic' is unknown"),
        ({"iterations": 0}, "iterations=0 must be"),
        ({"window": 1}, "window=1 is narrower"),
        ({"validation": 1.5}, "validation=1.5 must lie"),
        ({"loss": "lpips"}, "loss='lpips' is unknown"),
        ({"batch": 0}, "batch=0 must be"),
        ({"samples": noise(5)}, "are too few for a table of 12 numbers"),
        ({"samples": noise(14)}, "14 samples of 6 numbers, 4 of them for validation, are too few"),
        ({"samples": [1.0]}, "samples must be a torch.Tensor, a jax.Array or a numpy.ndarray, and is a list"),
        ({"samples": None}, "samples must be a torch.Tensor, a jax.Array or a numpy.ndarray, and is a NoneType"),
        ({"model": lambda x, t: x}, "must be a deis.Denoiser"),
        ({"plan": deis.make_plan(deis.VPSDE.linear(0.2, 20), nfe=3)}, "alpha and sigma differ"),
        ({"plan": [PLAN, deis.make_plan(deis.VPSDE.linear(0.2, 20), nfe=3)]}, "alpha and sigma differ"),
        ({"plan": [PLAN, deis.make_plan(SDE, nfe=4)]}, r"plans of \[3, 4\] evaluations"),
        ({"plan": [PLAN, "auto"]}, "plan must be a deis.Plan.* is 'auto'"),
        ({"plan": "auto"}, "plan must be a deis.Plan.* is 'auto'"),
        ({"plan": []}, "give at least one"),
        ({"plan": deis.make_plan(SDE, deis.adams(order=1), nfe=3)}, "is not a registered name.*give method="),
        ({"method": "tab3"}, "builds another plan"),
        (
            {"teacher": 4},
            r"has not converged: its final states move by 0\.\d+ from 2 to 4 steps, which is more than 0.05 of .* allow_rough=True",
        ),
        ({"teacher": 1}, "steps=1 must be a whole number of at least 2"),
        ({"plan": deis.make_plan(SDE, nfe=12), "teacher": 20, "samples": noise(64, 40)}, "the teacher is too coarse"),
        ({"stages": ("gradient",)}, "NumPy has no derivatives"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"plan": PLAN, "model": bimodal(), "samples": noise(32)} | arguments
    with pytest.raises((ValueError, TypeError), match=message):
        deis.calibrate(options.pop("plan"), options.pop("model"), options.pop("samples"), **options)


def test_a_teacher_brings_its_model_and_samples() -> None:
    model = bimodal()
    teacher = deis.make_teacher(model, noise(48), steps=64)
    with pytest.raises(ValueError, match="come with the teacher"):
        deis.calibrate(PLAN, model, noise(16), teacher=teacher)
    with pytest.raises(ValueError, match="made for another model"):
        deis.calibrate(PLAN, bimodal(), teacher=teacher)
    plans = [deis.calibrate(deis.make_plan(SDE, nfe=nfe), model, teacher=teacher, iterations=1) for nfe in (3, 4)]
    assert [plan.nfe for plan in plans] == [3, 4]


def test_an_interrupted_calibration_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = 0
    eps = two_modes(SDE)[0]

    def counted(x: Array, t: Array) -> Array:
        nonlocal evaluations
        evaluations += len(x)
        return eps(x, t)

    def run() -> deis.Plan:
        nonlocal evaluations
        evaluations = 0
        return deis.calibrate(deis.make_plan(SDE, nfe=4), deis.Denoiser(counted, SDE), noise(32, 8), folder=tmp_path, iterations=2)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("deis.calibration.stages.fit_ends", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    first = evaluations
    plan = run()
    resumed = evaluations
    again = run()
    assert resumed < first
    assert evaluations < 0.2 * first
    assert np.array_equal(again.keep_p, plan.keep_p)
    assert not list(tmp_path.glob(".*"))  # no temporary file is left
