"""Plans whose first call is told another time than that of the start: that they are fitted, kept, and run everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import deis
from benchmarks import levers
from benchmarks.methods import digits, error
from deis.arrays import Array
from deis.calibration.gauss_newton import Direction, _linearise, _Model, _room, _step
from deis.calibration.network import Network, Student
from deis.calibration.table import Table, free, with_free_start

from .oracle import two_modes
from .test_calibration import SDE, bimodal, held_out, noise, torch_model


def fitted(plan: deis.Plan, **options: Any) -> deis.Plan:
    return deis.calibrate(plan, bimodal(), noise(96, 8), teacher=128, stages=("gauss_newton",), **options)


@pytest.mark.parametrize("method", ["tab2", "auto", "unipc3", "dpmpp_2s"])
def test_a_row_that_hands_the_state_on_changes_nothing(method: str) -> None:
    plan = deis.make_plan(SDE, method, nfe=8)
    free_start = with_free_start(plan)
    assert (free_start.hands_on, plan.hands_on) == (True, False)
    assert not deis.make_plan(SDE, method, nfe=8, afs=0.5).hands_on
    assert (free_start.nfe, free_start.num_step, len(free_start.rows)) == (8, plan.num_step, len(plan.rows) + 1)
    assert np.array_equal(free_start.ts, plan.ts)
    expected = deis.sample(plan, bimodal(), noise(8), trajectory=True)
    assert np.array_equal(deis.sample(free_start, bimodal(), noise(8), trajectory=True), expected)


def test_a_free_start_pays() -> None:
    """On the mixture fitted to 8x8 digits, on noise that no fit has seen: the same Gauss-Newton with as many calls."""
    problem = digits(64)
    model = deis.Denoiser(problem.model, problem.sde)
    teacher = deis.make_teacher(model, torch.from_numpy(np.random.default_rng(5).standard_normal((128, 64))), steps=64)
    reference = problem.run(deis.make_plan(problem.sde, "tab3", 300, "log", 1.0))
    plan = deis.calibrate(deis.make_plan(problem.sde, nfe=4), model, teacher=teacher, stages=("grid", "least_squares"))
    plans = [levers.fitted(teacher, start) for start in (plan, levers.task_of(teacher, plan).with_free_start(plan))]
    assert [plan.nfe for plan in plans] == [4, 4]
    at_start, told_later = (error(problem.run(plan), reference) for plan in plans)
    assert told_later < 0.8 * at_start


def test_the_first_call_moves_away_from_the_start() -> None:
    plan = fitted(deis.make_plan(SDE, "tab2", nfe=3))
    assert plan.hands_on
    assert plan.nfe == 3
    assert SDE.sigma(plan.t[1]) < SDE.sigma(plan.t[0])
    assert plan.t[1] < plan.t[0] == SDE.t_start
    assert not fitted(deis.make_plan(SDE, "tab2", nfe=3), times=False).hands_on


def test_a_time_goes_less_than_half_the_way_to_those_beside_it() -> None:
    """However far the linear model would move it: one direction, of a unit of time, whose derivative is 1 and residual +-100."""
    t = np.array([100.0, 100.0, 60.0, 20.0, 0.0])
    table, directions = Table(t, np.ones(4), np.zeros((4, 4))), [Direction(2, 1.0, np.zeros(0))]
    for residual, discrete, move in ((-100.0, False, -0.45 * 40), (100.0, False, 0.45 * 40), (7.4, False, 7.4), (7.4, True, 7.0)):
        right, gram = np.full((4, 1), residual), np.ones((4, 1, 1))
        model = _Model(np.full(4, residual**2), right, gram, 1e4, (np.zeros((1, 1)), np.zeros(1)))
        assert _step(model, 0.0, table, directions, discrete) == pytest.approx([move])
    low, high = _room(t, t[1:-1])
    assert np.allclose(low, 0.45 * np.array([40, 40, 20]))
    assert np.allclose(high, 0.45 * np.array([0, 40, 40]))


@pytest.mark.parametrize(("afs", "guess"), [(0.5, True), (None, False)])
def test_what_a_row_without_a_call_says_again_is_not_fitted(afs: float | None, guess: bool) -> None:
    plan = deis.make_plan(SDE, "tab2", nfe=3, afs=afs)
    plan = plan if guess else with_free_start(plan)
    assert [np.flatnonzero(row).tolist() for row in free(plan)] == [[0] if guess else [], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_derivatives_of_an_analytical_first_step_are_independent_and_cost_no_call() -> None:
    evaluations: list[float] = []

    def counted(x: Array, t: Array) -> Array:
        evaluations.append(float(t.flat[0]))
        return np.sin(3 * x + 5 * evaluations[-1])

    plan = deis.make_plan(SDE, "tab2", nfe=3, afs=0.5)
    student = Student(Network(deis.Denoiser(counted, SDE), noise(16)), plan)
    linear = _linearise(student, Table.of(plan), noise(16), 4, 1e-5, True)
    assert SDE.t_start not in evaluations
    assert len(linear.directions) == 1 + 2 + 3 + 4 + 3
    jacobian = linear.jacobian.reshape(-1, len(linear.directions)).astype(float)
    spread = np.linalg.svd(jacobian / np.linalg.norm(jacobian, axis=0), compute_uv=False)
    assert spread[-1] > 1e-6 * spread[0]


def test_a_plan_that_begins_without_a_call_is_whole_from_its_own_start() -> None:
    plan = fitted(deis.make_plan(SDE, "tab2", nfe=3))
    plans = (plan, with_free_start(deis.make_plan(SDE, nfe=4)), deis.make_plan(SDE, nfe=4, afs=0.5))
    assert not any(plan.calls[0] for plan in plans)
    for whole in plans:
        assert deis.cut_plan(whole, SDE, start=SDE.t_start) == whole
    with pytest.warns(UserWarning, match="takes its place"):
        deis.cut_plan(plan, SDE, start=0.6)


def test_a_fitted_start_runs_in_somebody_elses_loop() -> None:
    from deis.run.stepwise import Stepwise

    plan = fitted(deis.make_plan(SDE, "tab2", nfe=3), iterations=2)
    assert plan.hands_on
    loop, x, model = Stepwise(plan, "eps"), torch.from_numpy(noise(8)), torch_model()
    for t in plan.t[:-1][plan.calls]:
        x = loop.step(model.model(x, torch.full((8,), float(t), dtype=x.dtype)), x)
    assert np.abs(x.numpy() - deis.sample(plan, bimodal(), noise(8))).max() < 1e-10


@pytest.fixture(scope="module")
def discrete() -> tuple[deis.Plan, deis.Denoiser]:
    sde = deis.VPSDE.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    model = deis.Denoiser(two_modes(sde)[0], sde)
    plan = deis.make_plan(sde, "tab2", nfe=4)
    return deis.calibrate(plan, model, noise(96, 8), stages=("gauss_newton",), iterations=4), model


def test_whole_times_are_moved_by_whole_numbers(discrete: tuple[deis.Plan, deis.Denoiser]) -> None:
    plan = discrete[0]
    assert plan.discrete
    assert (plan.t == np.rint(plan.t)).all()
    assert plan.t[1] < plan.t[0] == 999


@pytest.mark.parametrize("told", [False, True])
def test_a_fitted_start_runs_in_diffusers(discrete: tuple[deis.Plan, deis.Denoiser], told: bool) -> None:
    from deis.adapters.diffusers import PlanScheduler

    plan, model = discrete
    config = PlanScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear").config
    scheduler = PlanScheduler.from_plan(plan, config)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == plan.t[1:-1].tolist()
    one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    levels = [float(scheduler.add_noise(*pair, scheduler.timesteps[0])) for pair in ((one, nothing), (nothing, one))]
    assert levels == pytest.approx([plan.alpha[0], plan.sigma[0]], rel=1e-6)  # image-to-image from pure noise
    assert float(scheduler.sigmas[0]) == pytest.approx(plan.sigma[0] / plan.alpha[0], rel=1e-6)
    if told:
        scheduler.set_begin_index(0)
    x = torch.from_numpy(noise(8))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.from_numpy(model.model(x.numpy(), np.full(8, float(t)))), t, x).prev_sample
    assert np.abs(x.numpy() - deis.sample(plan, model, noise(8))).max() < 1e-10


def test_a_fitted_start_tells_k_diffusion_of_each_step(discrete: tuple[deis.Plan, deis.Denoiser]) -> None:
    from deis.adapters.k_diffusion import sample_deis, sigmas_of

    plan, model = discrete
    sde = model.sde

    def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t = float(sde.t_of_rho(float(sigma[0])))
        eps = model.model(x.numpy() * float(sde.alpha(t)), np.full(8, t))
        return x - sigma[:, None] * torch.from_numpy(eps)

    told: list[dict[str, Any]] = []
    sigmas = sigmas_of(plan)
    x = torch.from_numpy(noise(8)) / float(plan.alpha[0])
    denoised.sigmas = torch.from_numpy(sde.rho(np.arange(1000)))  # type: ignore[attr-defined]
    end = sample_deis(denoised, x, sigmas, None, told.append, True, plan=plan)
    assert [entry["i"] for entry in told] == [0, 1, 2, 3]
    expected = deis.sample(plan, model, noise(8)) / plan.alpha[-1]
    assert np.abs(end.numpy() - expected).max() < 1e-3


def test_the_gradient_goes_on_from_a_fitted_start() -> None:
    plan = fitted(deis.make_plan(SDE, "tab2", nfe=3), iterations=1)
    x_T = torch.from_numpy(noise(96, 8))
    polished = deis.calibrate(plan, torch_model(), x_T, teacher=128, stages=("gradient",), steps=40)
    assert polished.hands_on
    assert polished.t[1] != plan.t[1]
    assert held_out(polished, bimodal()) < held_out(plan, bimodal())
