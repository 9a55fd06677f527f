"""The executors: they agree, count, keep dtypes, and compose with compilers and transformations."""

import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deis

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

    before = alive()  # the noise among them

    def spy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, alive() - before)
        return 0.1 * x

    deis.sample(plan, spy, x_T)
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
