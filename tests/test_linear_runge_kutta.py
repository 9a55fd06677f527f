"""Runge-Kutta of matrix-valued SDEs: its order, the scalar case, budgets, the table and its file, and who may look at a run."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import deis
from deis.linear.runge_kutta import NESTED, STAGES
from deis.methods.clocks import CLOCKS
from deis.quadrature import lagrange_integrals

from .fuzz import check_fuzzed
from .linear_oracle import mixture, model_of

Array = NDArray[np.float64]
X_T = np.random.default_rng(0).standard_normal((2, 5))
SMOOTH = deis.CLD(sampling_eps=0.2, sampling_T=0.4)  # away from 0, where the slope shows well before the rounding does
CLD = deis.CLD()
PLAN = deis.make_linear_plan(CLD, "trk3", 2)
IN_DCT = deis.make_linear_plan(deis.FrequencyVP(1 + np.arange(6.0).reshape(2, 3) / 6), "trk2", 2)
SCALAR = deis.VPSDE.linear()


def beta(t: float) -> float:
    return 0.1 + 19.9 * t


BLOCK = deis.LinearSDE(lambda t: [[-beta(t) / 2]], lambda t: [[beta(t) ** 0.5]])
ALIKE = deis.LinearSDE(lambda t: -beta(t) / 2 * np.eye(2), lambda t: beta(t) ** 0.5 * np.array([[1.0, 0.0], [0.5, 0.2]]))


# --- order and exactness -----------------------------------------------------------------------------------------------


@cache
def solution() -> tuple[Any, Array]:
    score, solved = mixture(SMOOTH)
    return score, solved(np.array([0.4, 0.2]), X_T)[-1]


@pytest.mark.parametrize("K", ["R", "L"])
@pytest.mark.parametrize("method", STAGES)
def test_order_of_convergence_and_budget(method: str, K: str) -> None:
    (score, exact), errors, counts = solution(), [], [24, 34, 48]
    calls: list[float] = []
    network = model_of(SMOOTH, score, K)

    def model(x: Array, t: Array) -> Array:
        calls.append(float(t[0]))
        return network(x, t)

    for n in counts:
        plan = deis.make_linear_plan(SMOOTH, method, n, 1.0, K=K)
        assert plan.nfe == STAGES[method] * n
        errors.append(np.abs(deis.sample_linear(plan, model, X_T, velocity=True) - exact).max())
    assert len(calls) == sum(STAGES[method] * n for n in counts)
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - int(method[-1])) < 0.2


@pytest.mark.parametrize("stages", STAGES.values())
def test_one_block_is_the_integral_of_the_scalar_library(stages: int) -> None:
    """No scalar method has this name, so the weights are those of its one integral, with t for the clock."""
    method = next(name for name in STAGES if STAGES[name] == stages)
    plan, table = deis.make_linear_plan(BLOCK, method, 4), NESTED[stages]
    for i in range(4):
        start, end = plan.ts[i], plan.ts[i + 1]
        t = start + np.array(table.c) * (end - start)
        np.testing.assert_allclose(plan.t[i * stages : (i + 1) * stages], t, rtol=1e-15)
        for k, nodes in enumerate(table.through):
            target = end if k == stages - 1 else t[k + 1]
            wanted = np.zeros(stages)
            c = lagrange_integrals(SCALAR, CLOCKS["t"], "eps", t[None, list(nodes)], np.array([start]), np.array([target]))
            wanted[[k - node for node in nodes]] = c[0]
            row = i * stages + k
            found = (plan.keep_p if k == stages - 1 else plan.next_p)[row, :, 0, 0]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
            moved = (plan.keep_x if k == stages - 1 else plan.next_x)[row, 0, 0]
            np.testing.assert_allclose(moved, SCALAR.alpha(target) / SCALAR.alpha(start), rtol=1e-12)


@pytest.mark.parametrize("name", ["1euler", "2heun", "3kutta", "3ssprk", "4rk", "6dopri"])
def test_rho_rk_of_one_block_is_the_scalar_plan(name: str) -> None:
    scalar, plan = deis.make_plan(SCALAR, f"rhork_{name}", 7), deis.make_linear_plan(BLOCK, f"rhork_{name}", 7)
    np.testing.assert_allclose(plan.t, scalar.t, rtol=1e-13)
    np.testing.assert_array_equal(plan.accepts, scalar.accepts)
    for column in ("keep_x", "keep_p", "next_x", "next_p"):
        wanted = getattr(scalar, column)
        found = getattr(plan, column)[..., 0, 0]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


def test_rho_rk_of_blocks_that_run_alike_is_exact_for_a_dirac_and_of_its_order() -> None:
    plan = deis.make_linear_plan(ALIKE, "rhork_3kutta", 3)
    x_0 = np.array([[0.7], [-0.2]])
    x_T = ALIKE.psi(1.0, 0.0) @ x_0 + ALIKE.K(1.0) @ X_T

    def point(x: Array, t: Array) -> Array:
        return np.asarray(np.linalg.solve(ALIKE.K(t[0]), x - ALIKE.psi(t[0], 0.0) @ x_0))

    exact = ALIKE.psi(1e-3, 0.0) @ x_0 + ALIKE.K(1e-3) @ X_T
    np.testing.assert_allclose(deis.sample_linear(plan, point, x_T, velocity=True), exact, atol=1e-10)
    score, solved = mixture(ALIKE)
    exact = solved(np.array([1.0, 1e-3]), x_T)[-1]
    errors = [
        np.abs(
            deis.sample_linear(deis.make_linear_plan(ALIKE, "rhork_3kutta", n), model_of(ALIKE, score), x_T, velocity=True) - exact
        )
        for n in (20, 40)
    ]
    assert np.median(errors[0]) > 5.5 * np.median(errors[1])  # 8 of order 3, and 4 of order 2


@pytest.mark.parametrize("sde", [CLD, deis.Blurring((4, 4), 2.0)], ids=["CLD", "blurring"])
def test_rho_rk_needs_a_scalar_rho(sde: deis.LinearSDE) -> None:
    with pytest.raises(ValueError, match=r"rhoRK integrates in a scalar rho, and (CLD|Blurring).* has none: .*use 'trk2'"):
        deis.make_linear_plan(sde, "rhork_3kutta", 4)


@pytest.mark.parametrize("method", ["trk2", "trk3", "trk4"])
def test_a_budget_that_the_stages_do_not_divide_ends_in_cheaper_steps(method: str) -> None:
    for nfe in range(1, 12):
        plan = deis.make_linear_plan(CLD, method, nfe=nfe)
        assert plan.nfe == nfe
    wanted = {"trk2": [2, 2, 2, 1], "trk3": [3, 3, 1], "trk4": [5, 2]}[method]
    plan = deis.make_linear_plan(CLD, method, nfe=7)
    assert np.diff(np.flatnonzero(plan.accepts), prepend=-1).tolist() == wanted
    assert len(plan.ts) == plan.num_step + 1 == len(wanted) + 1
    assert deis.make_linear_plan(ALIKE, "rhork_6dopri", nfe=11).num_step == 3


@pytest.mark.parametrize("predicts", ["R", "L", "score"])
def test_what_the_network_predicts_is_one_more_factor_of_the_table(predicts: str) -> None:
    score, _ = mixture(CLD)
    plans = [deis.make_linear_plan(CLD, "trk4", 4, predicts=told) for told in (None, predicts)]
    found = [deis.sample_linear(p, model_of(CLD, score, p.predicts), X_T, velocity=True) for p in plans]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-8, atol=1e-9)


def test_there_and_back() -> None:
    model = model_of(SMOOTH, solution()[0])
    there, back = (deis.make_linear_plan(SMOOTH, "trk4", 40, direction=way) for way in ("encode", "decode"))
    noise = deis.sample_linear(there, model, X_T, velocity=True)
    np.testing.assert_allclose(deis.sample_linear(back, model, noise, velocity=True), X_T, atol=1e-5)


# --- running -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, IN_DCT, deis.make_linear_plan(CLD, "trk4", 2, K="L")], ids=["trk3", "dct", "trk4 in L"])
def test_frameworks_agree(plan: deis.LinearPlan) -> None:
    x = np.random.default_rng(0).standard_normal((plan.shape[0], 5, 2, 3))
    wanted = deis.sample_linear(plan, lambda x, t: 0.3 * np.sin(x), x, trajectory=True, velocity=True)
    assert len(wanted) == plan.num_step + 1
    found = deis.sample_linear(plan, lambda x, t: 0.3 * x.sin(), torch.tensor(x), trajectory=True, velocity=True)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-10)
    with jax.enable_x64(True):
        run = jax.jit(deis.sample_linear, static_argnums=(0, 1), static_argnames=("velocity", "trajectory"))
        y = run(plan, lambda x, t: 0.3 * jax.numpy.sin(x), jax.numpy.asarray(x), velocity=True, trajectory=True)
        np.testing.assert_allclose(y, wanted, rtol=1e-10, atol=1e-10)


def test_the_stages_are_evaluated_at_their_times() -> None:
    seen: list[float] = []

    def model(x: Array, t: Array) -> Array:
        seen.append(float(t[0]))
        return 0.3 * x

    deis.sample_linear(PLAN, model, X_T)
    np.testing.assert_array_equal(seen, PLAN.t[:-1])


@pytest.mark.parametrize("plan", [PLAN, IN_DCT, deis.make_linear_plan(CLD, "tab1", 3)], ids=["trk3", "dct", "tab1"])
def test_a_callback_sees_every_step_and_no_stage(plan: deis.LinearPlan) -> None:
    x = np.random.default_rng(0).standard_normal((plan.shape[0], 5, 2, 3))
    wanted = deis.sample_linear(plan, lambda x, t: 0.3 * x, x, trajectory=True, velocity=True)
    with jax.enable_x64(True):
        for y in (x, torch.tensor(x), jax.numpy.asarray(x)):
            seen: list[tuple[int, float, Any]] = []

            def callback(i: int, t: float, state: Any, seen: list[Any] = seen) -> None:
                seen.append((i, t, np.asarray(state).copy()))
                if isinstance(state, np.ndarray):
                    state += 1  # what a listener writes stays its own

            deis.sample_linear(plan, lambda x, t: 0.3 * x, y, callback=callback)
            assert [(i, t) for i, t, _ in seen] == list(enumerate(plan.ts[1:].tolist()))
            loose = 1e-5 if isinstance(y, jax.Array) else 1e-9  # JAX's thread for callbacks may have float32 alone
            np.testing.assert_allclose(np.stack([x for *_, x in seen]), wanted[1:], rtol=loose, atol=loose * np.abs(wanted).max())


def test_an_error_in_a_callback_reaches_the_caller() -> None:
    def stop(i: int, t: float, x: Any) -> None:
        raise KeyError("enough")

    for x in (X_T, torch.tensor(X_T), jax.numpy.asarray(X_T)):
        with pytest.raises(KeyError, match="enough"):
            deis.sample_linear(PLAN, lambda x, t: 0.3 * x, x, callback=stop)
    with pytest.raises(TypeError, match=r"callback must be a function of \(i, t, x\)"):
        deis.sample_linear(PLAN, lambda x, t: 0.3 * x, X_T, callback=lambda x: None)  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("plan", [PLAN, IN_DCT], ids=["trk3", "dct"])
def test_output_that_is_not_finite_is_refused_where_asked(plan: deis.LinearPlan) -> None:
    x = np.random.default_rng(0).standard_normal((plan.shape[0], 5, 2, 3)).astype(np.float32)
    late = float(plan.t[2]) * 1.001

    def model(x: Any, t: Any) -> Any:
        return x / ((t.reshape(1, -1, 1, 1) if plan is PLAN else t.reshape(-1, 1, 1, 1)) > late)

    message = rf"model\(x, t\) returned NaN or infinity at t={plan.t[2].item()!r} \(row 2 of {plan.nfe}\)"
    with np.errstate(all="ignore"):
        for y in (x, torch.tensor(x), jax.numpy.asarray(x)):
            with pytest.raises(ValueError, match=message):
                deis.sample_linear(plan, model, y, check_finite=True)
            assert not np.isfinite(np.asarray(deis.sample_linear(plan, model, y))).all()
    with pytest.raises(ValueError, match="check_finite=True cannot look at values under jit"):
        jax.jit(lambda x: deis.sample_linear(plan, model, x, check_finite=True))(jax.numpy.asarray(x))


# --- the table and its file --------------------------------------------------------------------------------------------


def test_a_plan_of_stages_is_hashable_and_prints() -> None:
    assert deis.make_linear_plan(CLD, "trk3", 2) == PLAN
    assert hash(PLAN) == hash(pickle.loads(pickle.dumps(PLAN)))
    assert repr(PLAN).startswith("LinearPlan trk3 in R: 6 evaluations in 2 steps, coefficients of 2 x 2, eps of R\nCLD(")
    with pytest.raises(ValueError, match="read-only"):
        PLAN.accepts[0] = True


@pytest.mark.parametrize("plan", [PLAN, IN_DCT])
def test_files_round_trip(tmp_path: Path, plan: deis.LinearPlan) -> None:
    plan.save(tmp_path / "plan.json")
    assert deis.LinearPlan.load(tmp_path / "plan.json") == plan
    assert plan.document()["version"] == 2


def test_plans_without_stages_keep_the_file_of_version_1() -> None:
    """The text of a file that the first version wrote, byte for byte but for its numbers."""
    plan = deis.make_linear_plan(CLD, "tab1", 2)
    document = plan.document()
    assert document["version"] == 1
    assert sorted(document["plan"]) == [
        *("alpha", "basis", "grid", "keep_p", "keep_x", "method", "next_p", "predicts", "schedule", "sigma", "t", "unit")
    ]
    found = deis.LinearPlan.from_document(json.loads(json.dumps(document)))
    assert found == plan
    assert found.accepts.all()
    np.testing.assert_array_equal(found.next_x, np.tile(np.eye(2), (2, 1, 1)))


def test_a_file_of_the_first_version_loads() -> None:
    """Written by the commit before there were stages: `make_linear_plan(CLD(), "tab0", 1)`."""
    plan = deis.LinearPlan.load(Path(__file__).parent / "data" / "linear_plan_v1.json")
    made = deis.make_linear_plan(CLD, "tab0", 1)
    np.testing.assert_allclose(plan.keep_p, made.keep_p, rtol=1e-12)
    assert (plan.nfe, plan.num_step, plan.staged) == (1, 1, False)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_fuzzed_files_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    check_fuzzed(data, IN_DCT, deis.LinearPlan.load, tmp_path / "plan.json")


def changed(name: str, place: Any, value: Any) -> dict[str, Any]:
    values = getattr(PLAN, name).copy()
    values[place] = value
    return {name: values}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changed("next_x", (0, 0, 1), 0.5), "row 0 is inconsistent"),
        (changed("next_x", (1, 0, 0), np.inf), r"next_x\[1, 0, 0\]=inf must be finite"),
        (changed("next_p", (1, 1, 0, 0), 0.5), "row 1 is inconsistent"),
        (changed("keep_p", (2, 0, 0, 0), 0.5), "row 2 is inconsistent"),
        (changed("keep_x", (3, 0, 0), 1.5), "row 3 is inconsistent"),
        (changed("sigma", (1, 0, 0), 0.5), "row 0 is inconsistent: .* to sigma"),
        (changed("t", 1, 1.5), "t of every stage must lie within its step"),
        (changed("t", 4, 0.9), "t of every stage must lie within its step"),
        (changed("accepts", 5, False), "accepts is False in the last row"),
        ({"accepts": PLAN.accepts[:-1]}, r"accepts must be bool of shape \(6,\)"),
        ({"accepts": PLAN.accepts.astype(float)}, "accepts must be bool"),
        ({"next_x": PLAN.next_x[1:]}, "next_x must have shape"),
        (changed("t", 3, 1.0), "t must decrease from step to step"),
    ],
)
def test_a_wrong_table_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(PLAN, **change)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "trk5"}, r"method='trk5' is not among .*\"trk2\", \"trk3\" and \"trk4\""),
        ({"method": "rhork_heun"}, "method='rhork_heun' is not among"),
        ({"method": "trk3", "corrector": 1}, "corrector=1 is of 'tab<q>', and 'trk3' has stages"),
        ({"method": "rhork_4rk", "K": "L"}, "K='L' has no rho.*predicts='L'"),
        ({"method": "trk3", "nfe": 7, "num_step": 2}, "num_step=2 contradicts nfe, which asks for 3 steps"),
        ({"method": "trk3", "nfe": 7, "ts": [1.0, 0.5]}, "ts must have shape"),
        ({"nfe": 0}, "nfe=0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deis.make_linear_plan(CLD, **options)
