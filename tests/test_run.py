"""The executors: they agree, count, keep dtypes, and compose with compilers and transformations."""

import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from time import sleep
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deis
from deis.backends import backend_of
from deis.model import predictions

from .oracle import gaussian

SDE = deis.VPSDE.linear()
METHODS = ["tab3", "ipndm", "rhork_3kutta", "dpmpp_2m", "unipc2", "deis_abm", "dpm_solver_3"]
X_T = np.random.default_rng(0).standard_normal((4, 3, 2))


def model(x, t):  # type: ignore[no-untyped-def]
    """Nonlinear in x and in t, in any framework."""
    return x / (1 + x * x) * (1 + t[:, None, None])


BACKENDS: dict[str, Callable[..., Any]] = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sde", [SDE, deis.VPSDE.discrete(np.linspace(0.99, 0.01, 50))], ids=["continuous", "discrete"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "flow"])
def test_backends_agree_to_rounding(method: str, sde: deis.Schedule, predicts: str) -> None:
    plan = deis.make_plan(sde, method, 7)
    expected = deis.sample(plan, model, X_T, predicts=predicts)
    scale = np.abs(expected).max()
    assert np.abs(deis.sample(plan, model, torch.tensor(X_T), predicts=predicts).numpy() - expected).max() < 1e-12 * scale
    with jax.enable_x64(True):
        assert np.abs(np.asarray(deis.sample(plan, model, jnp.asarray(X_T), predicts=predicts)) - expected).max() < 1e-12 * scale
    # In float32 as exact as the specification is there: this model and a corrector amplify its rounding up to a thousandfold.
    single = X_T.astype(np.float32)
    rounding = np.abs(deis.sample(plan, model, single, predicts=predicts) - expected).max()
    assert rounding < 2e-4 * scale
    for convert in (torch.tensor, jnp.asarray):
        error = np.abs(np.asarray(deis.sample(plan, model, convert(single), predicts=predicts)) - expected).max()
        assert error < 4 * rounding + 1e-6 * scale


@pytest.mark.parametrize("predicts", ["x0", "v", "score", "flow"])
def test_every_prediction_of_one_network_gives_one_sample(predicts: str) -> None:
    sde = deis.VPSDE.linear()
    eps = gaussian(sde)[0]

    def other(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        e, alpha, sigma = eps(x, t), sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        x_0 = (x - sigma * e) / alpha
        return {"x0": x_0, "v": alpha * e - sigma * x_0, "score": -e / sigma, "flow": e - x_0}[predicts]

    plan = deis.make_plan(sde, "tab2", 8)
    x_T = X_T[:, 0]
    np.testing.assert_allclose(deis.sample(plan, other, x_T, predicts=predicts), deis.sample(plan, eps, x_T), rtol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_dtypes_are_kept_and_halves_carried_in_float32(backend: str, dtype: str) -> None:
    if (backend, dtype) in {("numpy", "bfloat16"), ("jax", "float64")}:
        pytest.skip(f"{backend} has no {dtype} by default")
    make: dict[str, Callable[[], Any]] = {
        "numpy": lambda: X_T.astype(dtype),
        "torch": lambda: torch.tensor(X_T).to(getattr(torch, dtype)),
        "jax": lambda: jnp.asarray(X_T, dtype),
    }
    x = make[backend]()
    seen = []

    def spy(x, t):  # type: ignore[no-untyped-def]
        seen.append((str(x.dtype), str(t.dtype)))
        return (0.1 * x).astype(x.dtype) if backend != "torch" else 0.1 * x

    plan = deis.make_plan(SDE, "tab2", 200)
    out = deis.sample(plan, spy, x)
    assert out.dtype == x.dtype
    assert seen[0][0].endswith(dtype)
    assert seen[0][1].endswith("float64" if dtype == "float64" else "float32")
    # Carried in half precision, 200 steps would lose far more than one rounding of the result.
    exact = deis.sample(plan, lambda x, t: 0.1 * x, X_T)
    tolerance = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-13}[dtype]
    got = np.asarray(out.to(torch.float64) if backend == "torch" else out).astype(np.float64)
    assert np.abs(got - exact).max() < tolerance * np.abs(exact).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_discrete_models_get_integer_times(backend: str) -> None:
    sde = deis.VPSDE.discrete(np.linspace(0.99, 0.01, 50))
    plan = deis.make_plan(sde, "tab2", 5)
    seen = []

    def spy(x, t):  # type: ignore[no-untyped-def]
        seen.append((str(t.dtype), t.shape))
        return 0.1 * x

    deis.sample(plan, spy, BACKENDS[backend](X_T.astype(np.float32)))
    assert all("int" in dtype and shape == (4,) for dtype, shape in seen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["tab3", "rhork_3kutta"])
def test_trajectory_callback_and_bar(backend: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = deis.make_plan(SDE, method, 5)
    x = BACKENDS[backend](X_T.astype(np.float32))
    told: list[tuple[int, float, np.ndarray]] = []

    def listen(i: int, t: float, x: Any) -> None:
        told.append((i, t, np.asarray(x).copy()))

    path = deis.sample(
        plan, model, x, trajectory=True, progress=True, callback=lambda i, t, x: told.append((i, t, np.asarray(x).copy()))
    )
    jax.effects_barrier()
    assert path.shape == (6, *x.shape)
    np.testing.assert_array_equal(np.asarray(path[0]), np.asarray(x))
    np.testing.assert_allclose(np.asarray(path[-1]), np.asarray(deis.sample(plan, model, x)), rtol=1e-6, atol=1e-7)
    assert [i for i, _, _ in told] == list(range(5))
    assert [t for _, t, _ in told] == plan.ts[1:].tolist()
    np.testing.assert_allclose(np.stack([x for _, _, x in told]), np.asarray(path[1:]), rtol=1e-6)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_models_and_noise_are_named(backend: str) -> None:
    plan = deis.make_plan(SDE, "tab2", 3)
    convert = BACKENDS[backend]
    x = convert(X_T.astype(np.float32))
    for wrong, match in [
        (lambda x, t: x[:2], r"returned shape \(2, 3, 2\)"),
        (lambda x, t: (x,), r"returned a tuple"),
        (lambda x, t: None, r"returned a NoneType"),
    ]:
        with pytest.raises(ValueError, match=match):
            deis.sample(plan, wrong, x)
    with pytest.raises(ValueError, match=r"returned NaN or infinity at t=1\.0 \(row 0 of 3\)"):
        deis.sample(plan, lambda x, t: x / 0, x, check_finite=True) if backend != "numpy" else deis.sample(
            plan, lambda x, t: x * np.nan, x, check_finite=True
        )
    with pytest.raises(ValueError, match="batch axis"):
        deis.sample(plan, model, convert(np.float32(1.0)) if backend != "numpy" else np.array(1.0))
    with pytest.raises(TypeError, match="floating"):
        deis.sample(plan, model, convert(np.ones((2, 2), np.int32)))
    with pytest.raises(ValueError, match="'eps', 'x0', 'v', 'score', 'flow'"):
        deis.sample(plan, model, x, predicts="noise")
    with pytest.raises(TypeError, match="x_T must be"):
        deis.sample(plan, model, [1.0])
    with pytest.raises(TypeError, match="plan must be"):
        deis.sample("tab3", model, x)  # type: ignore[arg-type]


def test_predictions_that_do_not_determine_the_form_are_refused() -> None:
    cure = r'deis\.Denoiser\(\.\.\., predicts="flow"\) or deis\.sample\(\.\.\., predicts="flow"\)'
    with pytest.raises(ValueError, match=rf"predicts='eps' does not determine x_0 at t=1\.0.*{cure}"):
        deis.sample(deis.make_plan(deis.FlowMatching(), "tab2", 4), model, X_T)


# --- what is prepared once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_a_dropped_plan_is_freed_with_what_was_prepared_for_it(make: Callable[..., Any]) -> None:
    plan, function = deis.make_plan(SDE, "tab3", 5), partial(model)
    denoiser = deis.Denoiser(function, SDE)
    for x in (make(X_T), make(X_T.astype(np.float32))):
        deis.sample(plan, function, x, predicts="v")
        deis.sample(plan, denoiser, x)
    rows = plan.once(backend_of(x).prepared, backend_of(x).carry(x.dtype))[0]
    assert sum(any(thing is rows for thing in pair) for pair in plan._made.values() if isinstance(pair, tuple)) == 1  # those it ran
    plan_, function_ = weakref.ref(plan), weakref.ref(function)
    del plan
    assert plan_() is None  # at once: it is in no circle that only a collection of garbage breaks
    del function, denoiser
    assert function_() is None


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_nothing_is_prepared_twice(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def spy(*args: Any) -> Any:
            made.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, spy)

    counted(sys.modules[backend_of(make(X_T)).prepared.__module__], "with_sums")
    counted(predictions, "factors")
    counted(predictions, "function")
    plan, function = deis.make_plan(SDE, "unipc2", 5), partial(model)
    deis.sample(plan, function, make(X_T))
    assert sorted(set(made)) == ["factors", "function", "with_sums"]
    assert made.count("with_sums") == 1
    made.clear()
    deis.sample(plan, function, make(X_T))
    deis.sample(plan, function, make(X_T[:2]))
    assert made == []


def test_a_plan_gathers_nothing_over_calls_and_no_tensor() -> None:
    plan = deis.make_plan(SDE, "tab3", 4)

    def run(batch: int) -> None:
        for x in (np.ones((batch, 1, 1)), torch.ones(batch, 1, 1)):
            deis.sample(plan, model, x)
            deis.sample(plan, deis.Denoiser(partial(model), deis.VPSDE.linear()), x)

    with torch.inference_mode():
        run(1)
    known = len(plan._made)
    for batch in range(2, 40):
        run(batch)
    assert len(plan._made) == known
    assert plan.once(sys.modules["deis.run"]._comparison).cache_info().currsize <= 16
    stack, seen = list(plan._made.values()), 0
    while stack:
        thing = stack.pop()
        stack += list(thing) if isinstance(thing, tuple) else []
        assert not isinstance(thing, torch.Tensor)
        seen += 1
    assert seen > 100


def test_plans_are_pickled_without_what_was_prepared() -> None:
    plan = deis.make_plan(SDE, "tab3", 4)
    before = pickle.dumps(plan)
    for x in (X_T, torch.tensor(X_T)):
        deis.sample(plan, deis.Denoiser(model, SDE), x)
    assert pickle.dumps(plan) == before
    np.testing.assert_array_equal(deis.sample(pickle.loads(before), model, X_T), deis.sample(plan, model, X_T))


def test_threads_may_share_a_new_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = predictions.factors

    def slowly(*args: Any) -> Any:
        sleep(1e-3)  # in which others run
        return factors(*args)

    monkeypatch.setattr(predictions, "factors", slowly)

    def run(x: Any, predicts: str, plan: deis.Plan) -> np.ndarray:
        return np.asarray(deis.sample(plan, model, x, predicts=predicts))

    runs = [
        partial(run, x, predicts)
        for x in (X_T, X_T.astype(np.float32), torch.tensor(X_T), torch.tensor(X_T).float())
        for predicts in ("eps", "v")
    ]
    serial = [one(deis.make_plan(SDE, "unipc2", 6)) for one in runs]
    for _ in range(5):
        plan, barrier = deis.make_plan(SDE, "unipc2", 6), Barrier(len(runs))

        def task(i: int, plan: deis.Plan = plan, barrier: Barrier = barrier) -> np.ndarray:
            barrier.wait()
            return runs[i](plan)

        with ThreadPoolExecutor(len(runs)) as pool:
            for found, expected in zip(pool.map(task, range(len(runs))), serial, strict=True):
                np.testing.assert_array_equal(found, expected)


def test_a_model_that_changes_its_times_hurts_no_later_call() -> None:
    plan = deis.make_plan(SDE, "tab3", 5)
    expected = deis.sample(plan, model, X_T)

    def changes_t(x: Any, t: Any) -> Any:
        m = x / (1 + x * x) * (1 + t[:, None, None])
        t *= 0
        return m

    np.testing.assert_array_equal(deis.sample(plan, changes_t, X_T), expected)
    x = torch.tensor(X_T)
    with pytest.raises(ValueError, match="was changed in place"):
        deis.sample(plan, changes_t, x)
    with torch.inference_mode():
        changed = deis.sample(plan, changes_t, torch.tensor(X_T))
    for again in (changed, deis.sample(plan, model, x)):
        torch.testing.assert_close(again, torch.tensor(expected), rtol=1e-12, atol=1e-12)


def test_a_plan_first_run_in_inference_mode_records_gradients_later() -> None:
    plan = deis.make_plan(SDE, "unipc2", 4)
    with torch.inference_mode():
        inside = deis.sample(plan, model, torch.tensor(X_T))
    x = torch.tensor(X_T, requires_grad=True)
    outside = deis.sample(plan, model, x, grad=True)
    assert torch.equal(outside, inside.clone())
    assert torch.autograd.grad(outside.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("method", ["tab3", "rhork_3kutta", "unipc2"])
def test_a_transform_may_batch_the_predictions_and_not_the_noise(method: str) -> None:
    """The sums are made in place, where a prediction fits in."""
    plan, x = deis.make_plan(SDE, method, nfe=12), torch.tensor(X_T)

    def run(w: torch.Tensor) -> torch.Tensor:
        return deis.sample(plan, lambda x, t: w * x / (1 + x * x) * (1 + t[:, None, None]), x, grad=True)

    w = torch.tensor([0.5, 1.0, 1.5], dtype=x.dtype)
    alone = torch.stack([run(one) for one in w])
    torch.testing.assert_close(torch.func.vmap(run)(w), alone, rtol=1e-12, atol=1e-12)
    slope = (run(w[1] + 1e-6) - run(w[1] - 1e-6)).sum() / 2e-6
    for found in (torch.func.grad(lambda w: run(w).sum())(w[1]), torch.func.jvp(run, (w[1],), (torch.ones_like(w[1]),))[1].sum()):
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-6)


def test_a_threshold_does_not_change_the_dtype_of_the_state() -> None:
    x = X_T.astype(np.float32)
    predictor = predictions.Predictor(model, backend_of(x), x.dtype, lambda x_0: x_0.astype(np.float64))
    assert predictor.prediction(x, x, (0.5, 0.5, 2.0, -1.0)).dtype == x.dtype


# --- torch -------------------------------------------------------------------------------------------------------------


def test_torch_records_gradients_only_when_asked() -> None:
    plan = deis.make_plan(SDE, "tab2", 4)
    x = torch.tensor(X_T, requires_grad=True)
    assert not deis.sample(plan, model, x).requires_grad
    assert torch.autograd.gradcheck(lambda x: deis.sample(plan, model, x, grad=True), (x,))


@pytest.mark.parametrize("method", ["tab3", "rhork_2heun"])
def test_torch_compiles_to_one_graph(method: str) -> None:
    plan = deis.make_plan(SDE, method, 5)
    x = torch.tensor(X_T.astype(np.float32))
    compiled = torch.compile(lambda x: deis.sample(plan, model, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), deis.sample(plan, model, x))


def test_torch_runs_on_the_meta_device_so_that_no_step_reads_a_value() -> None:
    """A meta tensor has no values: any synchronisation with the device (item, bool, nonzero) would raise."""
    out = deis.sample(deis.make_plan(SDE, "tab3", 5), model, torch.empty(4, 3, 2, device="meta"))
    assert out.is_meta


@pytest.mark.parametrize("num_step", [5, 30])
def test_memory_is_the_state_and_the_window(num_step: int) -> None:
    """At each evaluation, no more earlier predictions are alive than the window needs, whatever the number of steps."""
    plan = deis.make_plan(SDE, "tab3", num_step)
    x_T = torch.tensor(X_T)
    most = 0

    def alive() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor and thing.shape == x_T.shape for thing in gc.get_objects())

    def spy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, alive())
        return 0.1 * x

    gc.freeze()  # what is alive already is not looked at, the noise among it: that would take a minute
    try:
        deis.sample(plan, spy, x_T)
    finally:
        gc.unfreeze()
    assert most == 1 + plan.window - 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_cuda_steps_do_not_wait() -> None:
    x = torch.randn(2, 3, 8, 8, device="cuda")
    plan = deis.make_plan(SDE, "tab3", 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        deis.sample(plan, lambda x, t: 0.1 * x, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- JAX ---------------------------------------------------------------------------------------------------------------


def test_jax_jit_vmap_and_grad() -> None:
    plan = deis.make_plan(SDE, "tab2", 4)
    x = jnp.asarray(X_T, jnp.float32)

    def run(x: jax.Array) -> jax.Array:
        return deis.sample(plan, model, x)

    expected = np.asarray(run(x))
    np.testing.assert_allclose(jax.jit(run)(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(run)(jnp.stack([x, 2 * x]))[0], expected, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        x64 = jnp.asarray(X_T)
        slope = jax.grad(lambda x: run(x).sum())(x64)
        step = 1e-6 * jnp.ones_like(x64)
        difference = (run(x64 + step).sum() - run(x64 - step).sum()) / 2e-6
        np.testing.assert_allclose(slope.sum(), difference, rtol=1e-6)


def test_jax_takes_a_plan_as_a_static_argument_and_calls_back_from_jit() -> None:
    told: list[int] = []
    run = jax.jit(lambda plan, x: deis.sample(plan, model, x, callback=lambda i, t, x: told.append(i)), static_argnums=0)
    for _ in range(2):
        run(deis.make_plan(SDE, "tab2", 4), jnp.asarray(X_T)).block_until_ready()
    jax.effects_barrier()
    assert told == [0, 1, 2, 3] * 2
    with pytest.raises(ValueError, match="check_finite=True cannot look"):
        jax.jit(lambda x: deis.sample(deis.make_plan(SDE, "tab2", 4), model, x, check_finite=True))(jnp.asarray(X_T))


def test_jax_traces_the_model_once_whatever_the_number_of_steps() -> None:
    sizes = []
    for num_step in (5, 500):
        traced: list[int] = []

        def spy(x: jax.Array, t: jax.Array, traced: list[int] = traced) -> jax.Array:
            traced.append(1)
            return 0.1 * x

        plan = deis.make_plan(SDE, "tab3", num_step)
        program = jax.make_jaxpr(lambda x, plan=plan, spy=spy: deis.sample(plan, spy, x))(jnp.asarray(X_T))
        sizes.append(len(program.jaxpr.eqns))
        assert len(traced) == 1
    assert sizes[0] == sizes[1]
