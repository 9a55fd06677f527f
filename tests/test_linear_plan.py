"""Plans of matrix-valued SDEs: their order, what they do exactly, the scalar case, files, frameworks and refusals."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache, partial
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
from deis.machine import run_rows

from .fuzz import check_fuzzed
from .linear_oracle import mixture, model_of
from .oracle import two_modes
from .test_no_silence import JUNK, accepted

Array = NDArray[np.float64]
CLD = deis.CLD()
PLAN = deis.make_linear_plan(CLD, "tab2", 6, corrector=2)
FREQUENCIES = deis.FrequencyVP(1 + np.arange(6.0).reshape(2, 3) / 6)
TRIPLE = deis.LinearSDE(lambda t: [[-1.0, 2.0, 0.0], [-1.0, -2.0, 1.0], [0.0, -1.0, -3.0]], lambda t: np.diag([0.1, 0.5, 2.0]))
IN_DCT = deis.make_linear_plan(FREQUENCIES, "tab1", 4)
X_T = np.random.default_rng(0).standard_normal((2, 5))
SMOOTH = deis.CLD(sampling_eps=0.2, sampling_T=0.4)  # away from 0, where the slope shows well before the rounding does


def linear(x: Any, t: Any) -> Any:
    return 0.3 * x


# --- order and exactness -----------------------------------------------------------------------------------------------


def with_exact_starts(plan: deis.LinearPlan, model: Callable[[Array, Array], Array], exact: Array) -> Array:
    """Run a plan whose first W - 1 states are the exact solution's, so that only the rows of full order err."""
    base = x = exact[0]
    history: tuple[Array, ...] = ()
    for i, row in enumerate(plan.rows):
        history = (model(x, np.array([row.t])), *history)[: plan.window]
        if i >= plan.window - 1:
            base = row.keep_x @ base + sum(c @ p for c, p in zip(row.keep_p, history, strict=True))
            x = base + sum(c @ p for c, p in zip(row.next_p, history, strict=True))
        else:  # with a corrector, base is the corrected state carried on
            x = exact[i + 1]
            base = row.keep_x @ exact[i] if plan.next_p.any() else x
    return x


SCORE, SOLUTION = mixture(SMOOTH)


@cache
def exact_states(n: int) -> Array:
    return SOLUTION(deis.make_linear_plan(SMOOTH, "tab0", n, 1.0).t, X_T)


@pytest.mark.parametrize("K", ["R", "L"])
@pytest.mark.parametrize(("degree", "corrector"), [(0, None), (1, None), (2, None), (3, None), (1, 2), (2, 3)])
def test_order_of_convergence(K: str, degree: int, corrector: int | None) -> None:
    """Degree q has order q + 1; a corrector of degree c makes it min(c + 1, q + 2)."""
    model, errors, counts = model_of(SMOOTH, SCORE, K), [], [80, 113, 160]
    for n in counts:
        plan = deis.make_linear_plan(SMOOTH, f"tab{degree}", n, 1.0, K=K, corrector=corrector)
        exact = exact_states(n)
        errors.append(np.abs(with_exact_starts(plan, model, exact) - exact[-1]).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    theory = degree + 1 if corrector is None else min(corrector + 1, degree + 2)
    assert abs(slope - theory) < 0.2


def dirac(sde: deis.LinearSDE, K: str) -> tuple[Callable[[Array, Array], Array], Array]:
    """The network of data at one position, with the velocity as the SDE starts it: eps = K^-1 (x - Psi x_0); and x_0."""
    x_0 = np.array([[0.7], [0.0]])
    return lambda x, t: np.linalg.solve(sde.K(t[0], K), x - sde.psi(t[0], 0.0) @ x_0), x_0


@pytest.mark.parametrize("sde", [CLD, deis.PSLD()], ids=lambda sde: sde.name)
def test_one_step_is_exact_for_a_dirac_with_r_and_not_with_l(sde: deis.LinearSDE) -> None:
    """gDDIM, arXiv 2206.05564: along the probability flow R^-1 (x - Psi x_0) is constant, and L^-1 (x - Psi x_0) is not."""
    errors = {}
    for K in ("R", "L"):
        model, x_0 = dirac(sde, K)
        x_T = sde.psi(1.0, 0.0) @ x_0 + sde.K(1.0, "L") @ X_T
        eps = np.linalg.solve(sde.K(1.0), x_T - sde.psi(1.0, 0.0) @ x_0)
        exact = sde.psi(sde.t_end, 0.0) @ x_0 + sde.K(sde.t_end) @ eps
        plan = deis.make_linear_plan(sde, "tab0", 1, K=K)
        errors[K] = np.abs(deis.sample_linear(plan, model, x_T, velocity=True) - exact).max()
    assert errors["R"] < 1e-8  # where psi is 4e4
    assert errors["L"] > 1e-2


@pytest.mark.parametrize("predicts", ["R", "L", "score"])
@pytest.mark.parametrize("K", ["R", "L"])
def test_what_the_network_predicts_is_one_more_factor_of_the_table(K: str, predicts: str) -> None:
    score, _ = mixture(CLD)
    plans = [deis.make_linear_plan(CLD, "tab2", 8, K=K, predicts=told, corrector=1) for told in (None, predicts)]
    found = [deis.sample_linear(p, model_of(CLD, score, p.predicts), X_T, velocity=True) for p in plans]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("corrector", [None, 2])
@pytest.mark.parametrize("method", ["tab0", "tab2", "tab3"])
def test_one_block_is_the_scalar_plan(method: str, corrector: int | None) -> None:
    vp = deis.VPSDE.linear()
    eps, _ = two_modes(vp)
    build = deis.adams("eps", "t", int(method[-1]), corrector)
    scalar = deis.make_plan(vp, build, 12)
    wanted = deis.sample(scalar, eps, X_T)

    def beta(t: float) -> float:
        return 0.1 + 19.9 * t

    block = deis.LinearSDE(lambda t: [[-beta(t) / 2]], lambda t: [[beta(t) ** 0.5]])
    plan = deis.make_linear_plan(block, method, 12, corrector=corrector)
    np.testing.assert_allclose(plan.keep_p[..., 0, 0], scalar.keep_p, rtol=0, atol=1e-12 * np.abs(scalar.keep_p).max())
    found = deis.sample_linear(plan, lambda x, t: eps(x[0], t)[None], X_T[None])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    rates = deis.make_linear_plan(deis.FrequencyVP(np.ones(5)), method, 12, corrector=corrector)
    np.testing.assert_allclose(deis.sample_linear(rates, eps, X_T), wanted, rtol=0, atol=2e-12)


def test_blurring_is_exact_for_a_dirac_and_converges_for_a_gaussian() -> None:
    """A Gaussian of covariance c^2 in every frequency has a known flow: each entry scales by its deviation."""
    sde, c = deis.Blurring((4, 3), 2.0), 0.4
    x_T = sde.noise(np.random.default_rng(1).standard_normal((2, 4, 3)))

    def spread(t: float) -> Array:
        return np.asarray(np.sqrt((sde.psi(t, 0.0) * c) ** 2 + sde.Sigma(t)))

    from deis.linear.dct import from_frequencies, to_frequencies

    def in_frequencies(factor: Array, x: Array) -> Array:
        return np.asarray(from_frequencies(factor * to_frequencies(x, 2), 2))

    def model(x: Array, t: Array) -> Array:
        return in_frequencies(sde.K(t[0]) / spread(t[0]) ** 2, x)

    exact = in_frequencies(spread(sde.t_end) / spread(sde.t_start), x_T)
    errors = [np.abs(deis.sample_linear(deis.make_linear_plan(sde, "tab2", n), model, x_T) - exact).max() for n in (40, 160)]
    assert errors[1] < errors[0] / 16
    assert errors[1] < 5e-5
    x_0 = np.random.default_rng(2).standard_normal((1, 4, 3))

    def point(x: Array, t: Array) -> Array:
        return in_frequencies(1 / sde.K(t[0]), x - in_frequencies(sde.psi(t[0], 0.0), x_0))

    eps = point(x_T, np.array([sde.t_start]))
    exact = in_frequencies(sde.psi(sde.t_end, 0.0), x_0) + in_frequencies(sde.K(sde.t_end), eps)
    np.testing.assert_allclose(deis.sample_linear(deis.make_linear_plan(sde, "tab0", 1), point, x_T), exact, atol=1e-9)


def test_there_and_back() -> None:
    model = model_of(SMOOTH, SCORE)
    there = deis.make_linear_plan(SMOOTH, "tab3", 60, direction="encode")
    assert (there.direction, PLAN.direction) == ("encode", "decode")
    noise = deis.sample_linear(there, model, X_T, velocity=True)
    back = deis.sample_linear(deis.make_linear_plan(SMOOTH, "tab3", 60), model, noise, velocity=True)
    np.testing.assert_allclose(back, X_T, atol=2e-3)


# --- running -----------------------------------------------------------------------------------------------------------


RUN = {"corrector": PLAN, "L": deis.make_linear_plan(CLD, "tab3", 6, K="L"), "k=3": deis.make_linear_plan(TRIPLE), "dct": IN_DCT}


@pytest.mark.parametrize("plan", RUN.values(), ids=RUN)
def test_frameworks_agree(plan: deis.LinearPlan) -> None:
    x = np.random.default_rng(0).standard_normal((plan.shape[0], 5, 2, 3))
    wanted = deis.sample_linear(plan, lambda x, t: 0.3 * np.sin(x), x, trajectory=True, velocity=True)
    found = deis.sample_linear(plan, lambda x, t: 0.3 * x.sin(), torch.tensor(x), trajectory=True, velocity=True)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-11)
    with jax.enable_x64(True):
        for run in (deis.sample_linear, jax.jit(deis.sample_linear, static_argnums=(0, 1))):
            y = run(plan, lambda x, t: 0.3 * jax.numpy.sin(x), jax.numpy.asarray(x))
            np.testing.assert_allclose(y, wanted[-1] if plan is IN_DCT else wanted[-1][0], rtol=1e-10, atol=1e-11)
        states = deis.sample_linear(plan, linear, jax.numpy.asarray(x), trajectory=True)
    np.testing.assert_allclose(states, deis.sample_linear(plan, linear, x, trajectory=True), rtol=1e-10, atol=1e-11)
    np.testing.assert_array_equal(wanted[0], x)
    assert len(wanted) == plan.nfe + 1


def test_the_executor_runs_the_table() -> None:
    """The machine's lines with NumPy's own product of matrices, on states (2, batch)."""

    def multiply(c_x: Any, x: Array, c_p: Any, history: Sequence[Array]) -> Array:
        return sum((c @ p for c, p in zip(c_p, history, strict=False)), c_x @ x)

    wanted = run_rows(PLAN.rows, lambda i, x: np.sin(x), multiply, X_T)
    np.testing.assert_allclose(deis.sample_linear(PLAN, lambda x, t: np.sin(x), X_T, velocity=True), wanted, rtol=1e-12)


@pytest.mark.parametrize("plan", [PLAN, IN_DCT], ids=["cld", "dct"])
def test_budget_times_dtypes_and_gradients(plan: deis.LinearPlan) -> None:
    seen: list[float] = []

    def model(x: Any, t: Any) -> Any:
        assert t.shape == ((5,) if plan is PLAN else (2,))
        assert x.dtype == torch.float16
        seen.append(float(t[0]))
        return 0.3 * x

    x = torch.randn(2, 5, 2, 3)
    assert deis.sample_linear(plan, model, x.half()).dtype == torch.float16
    np.testing.assert_allclose(seen, plan.t[:-1], rtol=1e-6)
    x.requires_grad_(True)
    assert not deis.sample_linear(plan, linear, x).requires_grad
    deis.sample_linear(plan, linear, x, grad=True).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_a_model_that_writes_into_one_buffer_does_no_harm() -> None:
    buffer = np.empty_like(X_T)

    def model(x: Array, t: Array) -> Array:
        np.multiply(x, 0.3, out=buffer)
        return buffer

    np.testing.assert_array_equal(deis.sample_linear(PLAN, model, X_T), deis.sample_linear(PLAN, linear, X_T))


def test_guidance_is_a_model_here_too() -> None:
    guided = deis.guided(lambda x, t: 0.3 * x, lambda x, t: 0.1 * x, 2.0)
    np.testing.assert_allclose(
        deis.sample_linear(PLAN, guided, X_T), deis.sample_linear(PLAN, lambda x, t: 0.5 * x, X_T), rtol=1e-12
    )


# --- the table and its file --------------------------------------------------------------------------------------------


def test_a_plan_is_frozen_hashable_and_prints() -> None:
    assert PLAN.nfe == 6
    assert deis.make_linear_plan(CLD, "tab2", 6, corrector=2) == PLAN
    assert hash(PLAN) == hash(pickle.loads(pickle.dumps(PLAN)))
    assert PLAN != IN_DCT
    with pytest.raises(ValueError, match="read-only"):
        PLAN.keep_x[0] = 0.0
    assert repr(PLAN).startswith("LinearPlan tab2 in R with corrector 2: 6 evaluations, coefficients of 2 x 2, eps of R\nCLD(")


@pytest.mark.parametrize("plan", [PLAN, IN_DCT, deis.make_linear_plan(deis.FrequencyVP(np.ones(3)), "tab1", 2)])
def test_files_round_trip(tmp_path: Path, plan: deis.LinearPlan) -> None:
    plan.save(tmp_path / "plan.json")
    assert deis.LinearPlan.load(tmp_path / "plan.json") == plan


@given(st.data())
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_fuzzed_files_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    check_fuzzed(data, IN_DCT, deis.LinearPlan.load, tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda d: d.update(version=3), "version is 3 .*upgrade"),
        (lambda d: d.update(version=2), r"its plan lacks \['accepts', 'next_x'\]"),
        (lambda d: d.update(format="deis.plan"), "format is not 'deis.linear_plan'"),
        (lambda d: d["plan"].update(keep_x=[]), "not a table"),
        (lambda d: d["plan"].update(keep_x=3.0), "not a table"),
        (lambda d: d["plan"]["keep_p"][1][0][0].pop(), "keep_p is not a table"),
        (lambda d: d["plan"]["keep_p"][2][1][0].__setitem__(0, 0.5), "row 2 is inconsistent"),
        (lambda d: d["plan"].update(basis="dct"), "inconsistent"),
        (lambda d: d["plan"].update(method="mine"), "changed after it was saved"),
    ],
)
def test_edited_files_are_refused_with_the_reason(tmp_path: Path, edit: Any, match: str) -> None:
    document = json.loads(json.dumps(PLAN.document()))
    edit(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=match):
        deis.LinearPlan.load(tmp_path / "plan.json")


def test_each_kind_of_plan_refuses_the_others_file(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"format is not 'deis.plan'"):
        deis.load_plan(tmp_path / "plan.json")


def changed(name: str, place: Any, value: float) -> dict[str, Array]:
    values = getattr(PLAN, name).copy()
    values[place] = value
    return {name: values}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changed("keep_x", (3, 0, 1), 0.5), "row 3 is inconsistent"),
        (changed("keep_p", (4, 1, 1, 0), 0.01), "row 4 is inconsistent: .* to sigma"),
        (changed("alpha", (4, 1, 1), 0.01), "row 3 is inconsistent: .* to alpha"),
        (changed("sigma", (2, 0, 0), 0.5), "row 1 is inconsistent: .* to sigma"),
        (changed("next_p", (0, 1, 0, 0), 0.1), "row 0 uses a prediction from before the first"),
        (changed("keep_p", (0, 0, 0, 0), np.nan), r"keep_p\[0, 0, 0, 0\]=nan must be finite"),
        (changed("t", 2, 2.0), "t must decrease"),
        ({"keep_x": PLAN.keep_x[:, :, :1]}, r"keep_x must have shape \(n, k, k\)"),
        ({"next_p": PLAN.next_p[:-1]}, "next_p must have shape"),
        ({"keep_p": PLAN.keep_p * 0, "next_p": PLAN.next_p * 0}, "row 0 wastes an evaluation"),
        ({"basis": "fft"}, "basis='fft' is unknown"),
        ({"predicts": "v"}, "predicts='v' is unknown"),
        ({"method": 3}, "method=3 must be a string"),
    ],
)
def test_a_wrong_table_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(PLAN, **change)


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "ipndm"}, r"method='ipndm' is not among .*tab<q>.*deis.make_plan"),
        ({"method": None}, "method=None"),
        ({"K": "S"}, r"K='S' is unknown; the known ones are 'R', 'L'"),
        ({"predicts": "v"}, "predicts='v' is unknown"),
        ({"num_step": 0}, "num_step=0"),
        ({"ts_order": -1}, "ts_order=-1"),
        ({"corrector": -1}, "corrector=-1"),
        ({"direction": "up"}, "direction='up'"),
        ({"ts": [1.0, 0.5, 0.5]}, r"ts=\[1.0, 0.5, 0.5\] must decrease"),
        ({"ts": [1.0, 0.0]}, r"ts=.* must decrease strictly within \[0.001, 1.0\]"),
        ({"ts": [0.1, 0.5]}, "ts=.* must decrease"),
        ({"ts": [1.0, np.nan]}, "ts=.* must decrease"),
        ({"ts": [1.0, 0.5], "num_step": 3}, "num_step=3, and has"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deis.make_linear_plan(CLD, **options)


@pytest.mark.parametrize(
    ("plan", "model", "x", "error", "match"),
    [
        (PLAN, lambda x, t: x[:1], np.ones((2, 5)), ValueError, r"model\(x, t\) returned shape \(1, 5\).* for x of shape \(2, 5\)"),
        (PLAN, linear, np.ones((3, 5)), ValueError, r"x_T must have shape \(2, batch, ...\)"),
        (IN_DCT, linear, np.ones((5, 3, 3)), ValueError, r"x_T must have shape \(batch, ..., 2, 3\).*data of this size"),
        (IN_DCT, linear, np.ones((2, 3)), ValueError, r"x_T must have shape \(batch, ..., 2, 3\)"),
        (PLAN, 3, np.ones((2, 5)), TypeError, "model must be a function"),
        (PLAN, deis.Denoiser(linear, deis.VPSDE.linear()), np.ones((2, 5)), TypeError, "model is a Denoiser, .* of CLD"),
        (PLAN, linear, [1.0], TypeError, "x_T must be"),
        (deis.make_plan(deis.VPSDE.linear(), "tab2", 4), linear, np.ones((2, 5)), TypeError, r"deis.sample runs a deis.Plan"),
    ],
)
def test_a_run_that_cannot_be_is_refused(plan: Any, model: Any, x: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        deis.sample_linear(plan, model, x)


def test_scalar_schedules_and_matrices_are_told_apart() -> None:
    with pytest.raises(TypeError, match=r"sde must be a deis.LinearSDE, .*deis.make_plan takes the scalar schedules"):
        deis.make_linear_plan(deis.VPSDE.linear())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"plan must be a deis.Plan"):
        deis.sample(PLAN, linear, X_T)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"plan must be a deis.Plan, as deis.make_plan returns, or several, and is LinearPlan"):
        deis.calibrate(PLAN, linear, X_T)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"deis.make_linear_plan takes a deis.LinearSDE\), and is CLD\(4.0"):
        deis.make_grid(CLD, 4, "rho")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="velocity=3 must be"):
        deis.sample_linear(PLAN, linear, X_T, velocity=3)  # type: ignore[arg-type]


VALID: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "LinearSDE": (deis.LinearSDE, {"F": lambda t: -np.eye(2), "G": lambda t: np.eye(2), "covariance": np.eye(2), "basis": "block",
                                   "sampling_eps": 0.1, "sampling_T": 1.0, "name": "mine"}),
    "F": (lambda F: deis.LinearSDE(lambda t: F, lambda t: np.eye(2)), {"F": -np.eye(2)}),
    "G": (lambda G: deis.LinearSDE(lambda t: -np.eye(2), lambda t: G), {"G": np.eye(2)}),
    "CLD": (deis.CLD, {"beta": 4.0, "mass": 0.25, "friction": 1.0, "gamma": 0.04, "sampling_eps": 1e-3, "sampling_T": 1.0}),
    "PSLD": (deis.PSLD, {"beta": 8.0, "mass": 0.25, "Gamma": 0.01, "nu": 4.0, "gamma": 0.04}),
    "beta": (lambda beta: deis.CLD(lambda t: beta), {"beta": 4.0}),
    "FrequencyVP": (deis.FrequencyVP, {"rates": [1.0, 2.0], "beta_0": 0.1, "beta_1": 20.0}),
    "Blurring": (deis.Blurring, {"shape": (2, 2), "blur": 2.0, "least": 0.1, "sampling_eps": 1e-2, "sampling_T": 0.9}),
    "psi": (CLD.psi, {"t": 0.3, "s": 0.5}),
    "Sigma": (CLD.Sigma, {"t": 0.3}),
    "K": (CLD.K, {"t": 0.3, "root": "L"}),
    "noise": (CLD.noise, {"z": X_T}),
    "make_linear_plan": (deis.make_linear_plan, {"sde": CLD, "method": "tab1", "num_step": 2, "ts_order": 2.0, "nfe": 2,
                                                 "ts": [1.0, 0.5, 0.1], "K": "R", "predicts": "L", "corrector": 1,
                                                 "direction": "decode"}),
    "sample_linear": (deis.sample_linear, {"plan": PLAN, "model": linear, "x_T": X_T, "velocity": True, "trajectory": True,
                                           "callback": None, "check_finite": False, "grad": False}),
    "LinearPlan": (deis.LinearPlan, {field.name: getattr(PLAN, field.name) for field in fields(PLAN)}),
    "load": (deis.LinearPlan.from_document, {"document": PLAN.document()}),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_every_argument_takes_or_refuses_every_kind_of_junk(name: str) -> None:
    function, valid = VALID[name]
    assert accepted(partial(function, **valid))
    for argument in valid:
        for junk in JUNK:
            with np.errstate(all="ignore"):
                accepted(partial(function, **(valid | {argument: junk})))
