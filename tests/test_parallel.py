"""Evaluations side by side: which rows wait for none of each other, runs that make them in one call, and a method that has some."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import deis
from deis.backends.numpy import combine
from deis.calibration.network import Student
from deis.calibration.regression import fit_rows
from deis.calibration.table import Table, free
from deis.groups import group_rows
from deis.machine import Row, run_rows
from deis.methods.clocks import CLOCKS

from .oracle import FEW_STEPS, two_modes

Array = NDArray[np.float64]
SDE = deis.VPSDE.linear()
PLAN = deis.make_plan(SDE, "parallel2", 5)
X_T = np.random.default_rng(0).standard_normal((4, 3, 2))
BACKENDS: dict[str, Callable[..., Any]] = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


def model(x: Any, t: Any) -> Any:
    """Nonlinear in x and in t, in any framework."""
    return x / (1 + x * x) * (1 + t.reshape(-1, 1, 1))


class Spy:
    """A model that keeps the batch sizes and times that it saw."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.times: list[float] = []

    def __call__(self, x: Any, t: Any) -> Any:
        self.sizes.append(len(x))
        self.times += t.tolist()
        return model(x, t)


# --- depth ---------------------------------------------------------------------------------------------------------------


def waits_by_derivatives(rows: Sequence[Row]) -> NDArray[np.bool_]:
    """Tell whether row i's state changes with evaluation j, by running random weights of the rows' pattern on unit vectors.

    Random weights, because a dependence that numbers happen to cancel is one all the same.
    """
    rng, n, states = np.random.default_rng(0), len(rows), [np.zeros(len(rows))]

    def drawn(values: Any) -> Any:
        return np.where(np.asarray(values) != 0, rng.uniform(1, 2, np.shape(values)), 0.0)

    columns = ("keep_x", "keep_p", "next_x", "next_p", "guess")
    other = [row._replace(keep_z=None, **{name: drawn(getattr(row, name)).tolist() for name in columns}) for row in rows]
    run_rows(other, lambda i, x: np.eye(n)[i], combine, states[0], lambda i, x: states.append(x))
    return np.stack(states[:-1]) != 0


def least_depth(rows: Sequence[Row]) -> int:
    """Return the fewest calls of all ways to part the rows into groups that follow each other, by dynamic programming."""
    waits = waits_by_derivatives(rows)
    least = [0]
    for last in range(1, len(rows) + 1):
        found = []
        for first in range(last):
            group = range(first, last)
            alone = not any(rows[i].calls and waits[i, first:i].any() for i in group)
            quiet = not any(rows[i].keep_z for i in group[:-1])
            if alone and quiet:
                found.append(least[first] + any(rows[i].calls for i in group))
        least.append(min(found))
    return least[-1]


@st.composite
def tables(draw: st.DrawFn) -> list[Row]:
    """Rows with many zeros, some without a call, and some with noise."""
    n, window = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    sparse = st.sampled_from([0.0, 0.0, 1.0, -2.0])

    def row() -> Row:
        weights = [[draw(sparse) for _ in range(window)] for _ in range(2)]
        numbers = [draw(st.sampled_from([0.0, 1.0, 1.0])) for _ in range(3)]
        calls, noise = draw(st.sampled_from([True, True, True, False])), draw(st.sampled_from([0.0] * 6 + [0.5]))
        return Row(1.0, 1.0, 1.0, numbers[0], weights[0], noise, numbers[1], weights[1], numbers[2], True, calls)

    return [row() for _ in range(n)]


@settings(max_examples=150, deadline=None)
@given(rows=tables())
def test_depth_is_the_least_by_brute_force(rows: list[Row]) -> None:
    groups = group_rows(rows)
    assert [i for group in groups for i in group] == list(range(len(rows)))
    assert sum(any(rows[i].calls for i in group) for group in groups) == least_depth(rows)
    waits = waits_by_derivatives(rows)
    for group in groups:
        for i in group:
            assert not rows[i].calls or not waits[i, group.start : i].any()


def by_hand(next_x: float, keep_p: float, next_p: float) -> deis.Plan:
    """Two rows of one step of DDIM: the first makes the second's state of its prediction by these weights."""
    plan = deis.make_plan(SDE, "ddim", 1)
    t = np.array([plan.t[0], 0.5, plan.t[1]])
    numbers: dict[str, Any] = {"keep_x": [1.0, plan.keep_x[0]], "next_x": [next_x, 1.0], "accepts": np.array([False, True])}
    numbers |= {"keep_p": [[keep_p, 0.0], [0.5, plan.keep_p[0, 0] - 0.5]], "next_p": [[next_p, 0.0], [0.0, 0.0]]}
    columns: dict[str, Any] = {name: np.array(values) for name, values in numbers.items()}
    levels: dict[str, Any] = {"t": t, "alpha": SDE.alpha(t), "sigma": SDE.sigma(t), "calls": np.array([True, True])}
    more: dict[str, Any] = {"keep_z": np.zeros(2), "guess": np.zeros(2), "fitted": "nothing, but written by hand"}
    return replace(plan, **levels, **columns, **more)


@pytest.mark.parametrize(
    ("weights", "depth"),
    [
        ((1.0, 0.0, 0.0), 1),
        ((1.0, 0.0, 0.3), 2),
        ((1.0, 0.3, 0.0), 2),
        ((0.0, 0.3, 0.0), 1),  # what x does not take of base does not matter
        ((1.0, 0.3, -0.3), 2),  # cancels in numbers, not in structure
    ],
)
def test_the_newest_prediction_comes_by_base_or_at_once(weights: tuple[float, float, float], depth: int) -> None:
    assert by_hand(*weights).depth == depth


@FEW_STEPS
@pytest.mark.parametrize(
    "name", ["auto", "tab3", "unipc2", "rhork_4rk", "dpm_solver_3", "res_5s", "ancestral", "edm_heun", "heunpp2"]
)
def test_methods_one_after_the_other_have_the_depth_of_their_evaluations(name: str) -> None:
    for afs in (None, 0.5):
        plan = deis.make_plan(SDE, name, 4, afs=afs)
        assert plan.depth == plan.nfe
        assert " calls" not in repr(plan)


def test_the_depth_is_printed_and_kept_in_a_file(tmp_path: Path) -> None:
    assert (PLAN.nfe, PLAN.depth, PLAN.num_step) == (9, 5, 5)
    assert "parallel2: 9 evaluations in 5 calls in 5 steps" in repr(PLAN)
    PLAN.save(tmp_path / "plan.json")
    assert deis.load_plan(tmp_path / "plan.json") == PLAN
    assert deis.load_plan(tmp_path / "plan.json").depth == 5


# --- runs ----------------------------------------------------------------------------------------------------------------

PLANS = {
    "parallel": PLAN,
    "an even budget": deis.make_plan(SDE, "parallel1", nfe=6),
    "a budget of one": deis.make_plan(SDE, "parallel2", nfe=1),
    "an analytical first step": deis.make_plan(SDE, "parallel2", nfe=6, afs=0.5),
    "eps": deis.make_plan(SDE, deis.parallel_adams("eps", "t", 2, 3), 4),
    "discrete": deis.make_plan(deis.VPSDE.discrete(np.linspace(0.99, 0.01, 50)), "parallel2", 4),
    "one after the other": deis.make_plan(SDE, "tab3", 4),
}


@pytest.mark.parametrize("threshold", [None, deis.static_threshold(0.3)], ids=["", "thresholded"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_side_by_side_is_the_same_on_every_backend(plan: deis.Plan, predicts: str, threshold: Any) -> None:
    sde = deis.VPSDE.discrete(np.linspace(0.99, 0.01, 50)) if plan.discrete else SDE
    denoiser = deis.Denoiser(model, sde, predicts, threshold)
    expected = deis.sample(plan, denoiser, X_T, trajectory=True)
    np.testing.assert_array_equal(deis.sample(plan, denoiser, X_T, trajectory=True, parallel=True), expected)
    torch_path = deis.sample(plan, denoiser, torch.tensor(X_T), trajectory=True)
    assert torch.equal(deis.sample(plan, denoiser, torch.tensor(X_T), trajectory=True, parallel=True), torch_path)
    with jax.enable_x64(True):
        path = deis.sample(plan, denoiser, jnp.asarray(X_T), trajectory=True, parallel=True)
        np.testing.assert_allclose(np.asarray(path), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_calls_are_those_of_the_depth(plan: deis.Plan, backend: str) -> None:
    spy, alone = Spy(), Spy()
    deis.sample(plan, spy, BACKENDS[backend](X_T), parallel=True)
    deis.sample(plan, alone, BACKENDS[backend](X_T))
    assert len(spy.sizes) == plan.depth
    assert spy.sizes == [len(X_T) * sum(plan.calls[group.start : group.stop]) for group in plan.groups]
    assert alone.sizes == [len(X_T)] * plan.nfe
    assert spy.times == alone.times


def test_jax_traces_a_call_for_each_kind_of_group() -> None:
    """The first, with its guess, those of two, and the last: however many there are."""
    for num_step in (5, 50):
        sizes: list[int] = []

        def traced(x: jax.Array, t: jax.Array, sizes: list[int] = sizes) -> jax.Array:
            assert x.shape[0] == t.shape[0]
            sizes.append(len(x))
            return model(x, t)

        plan = deis.make_plan(SDE, "parallel2", num_step)
        jax.jit(lambda x, plan=plan, traced=traced: deis.sample(plan, traced, x, parallel=True))(jnp.asarray(X_T))
        assert sizes == [8, 8, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_callbacks_bars_and_the_look_for_nan_work_side_by_side(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, float, Array]] = []
    x = BACKENDS[backend](X_T.astype(np.float32))
    options: dict[str, Any] = {"parallel": True, "check_finite": True, "progress": True}
    x_0 = deis.sample(PLAN, model, x, callback=lambda i, t, x: told.append((i, t, np.asarray(x).copy())), **options)
    jax.effects_barrier()
    assert [(i, t) for i, t, _ in told] == list(enumerate(PLAN.ts[1:].tolist()))
    np.testing.assert_array_equal(told[-1][2], np.asarray(x_0))
    assert "5/5" in capsys.readouterr().err
    xp = jnp if backend == "jax" else torch if backend == "torch" else np

    def late(x: Any, t: Any) -> Any:
        return model(x, t) * xp.where(t < PLAN.t[5], xp.asarray(np.nan), xp.asarray(1.0)).reshape(-1, 1, 1)

    with pytest.raises(ValueError, match=rf"NaN or infinity at t={PLAN.rows[6].t!r} \(row 6 of 10\)"):
        deis.sample(PLAN, late, x, parallel=True, check_finite=True)


def test_torch_compiles_to_one_graph_and_records_gradients() -> None:
    x = torch.tensor(X_T, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: deis.sample(PLAN, model, x, grad=True, parallel=True), (x,))
    single = torch.tensor(X_T.astype(np.float32))
    compiled = torch.compile(lambda x: deis.sample(PLAN, model, x, parallel=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(single), deis.sample(PLAN, model, single))
    assert deis.sample(PLAN, model, torch.empty(4, 3, 2, device="meta"), parallel=True).is_meta


def test_noise_is_drawn_in_the_order_of_the_rows() -> None:
    """Two rows side by side, and the noise of the second: a table written by hand."""
    hand = by_hand(1.0, 0.0, 0.0)
    noisy = replace(hand, keep_z=np.array([0.0, 0.3]))
    assert (noisy.depth, replace(hand, keep_z=np.array([0.3, 0.0])).depth) == (1, 2)
    for plan in (noisy, replace(hand, keep_z=np.array([0.3, 0.2]))):
        runs = [deis.sample(plan, model, X_T, rng=np.random.default_rng(1), parallel=side) for side in (False, True)]
        np.testing.assert_array_equal(*runs)
        key = jax.random.key(0)
        alone, beside = (np.asarray(deis.sample(plan, model, jnp.asarray(X_T), rng=key, parallel=side)) for side in (False, True))
        np.testing.assert_allclose(beside, alone, rtol=1e-5, atol=1e-6)


# --- conditions ----------------------------------------------------------------------------------------------------------

LABELS = np.array([0.0, 1.0, 2.0, 3.0])


class Net:
    """net(x, t, condition), which wants a condition for each sample, and keeps those that it saw."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def __call__(self, x: Any, t: Any, condition: Any) -> Any:
        assert len(condition) == len(x) == len(t)
        self.seen.append(np.asarray(condition).tolist())
        return model(x, t) * (1 + condition.reshape(-1, 1, 1))


def guided(net: Net, make: Callable[..., Any], weight: float, **options: Any) -> deis.Denoiser:
    return deis.Denoiser(deis.classifier_free(net, make(LABELS), make(0 * LABELS - 1), weight, **options), SDE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("weight", "options"),
    [(1.0, {}), (3.0, {}), (3.0, {"rescale": 0.7}), (2.0, {"interval": (0.2, 0.7)}), (2.0, {"interval": (0.3, 0.5)})],
)
def test_conditions_are_repeated_in_the_order_of_the_copies(backend: str, weight: float, options: dict[str, Any]) -> None:
    make = BACKENDS[backend]
    with jax.enable_x64(True):
        net = Net()
        side = deis.sample(PLAN, guided(net, make, weight, **options), make(X_T), parallel=True) if backend != "jax" else None
        expected = deis.sample(PLAN, guided(Net(), np.asarray, weight, **options), X_T)
        if side is None:
            quiet = lambda x, t, c: model(x, t) * (1 + c.reshape(-1, 1, 1))  # noqa: E731
            side = deis.sample(PLAN, guided(quiet, make, weight, **options), make(X_T), parallel=True)  # type: ignore[arg-type]
        np.testing.assert_allclose(np.asarray(side), expected, rtol=1e-11, atol=1e-13)
    if net.seen:
        copies = [2, 2, 2, 2, 1]
        each = [[*LABELS.tolist() * k, *([-1.0] * 4 * k if weight != 1 else [])] for k in copies]
        assert net.seen == each or options.get("interval")


def test_pretrained_networks_repeat_their_labels() -> None:
    seen: list[list[int]] = []

    def net(x: Any, t: Any, labels: Any) -> Any:
        seen.append(np.asarray(labels).tolist())
        return model(x, t) * (1 + torch.as_tensor(labels).reshape(-1, 1, 1))

    network = deis.Pretrained(net, SDE, "eps", (1, 3, 2), 4, 4, 1.0)
    x = torch.tensor(X_T)
    for options in ({}, {"guidance": 2.0}, {"guidance": 2.0, "interval": (0.2, 0.7)}):
        expected = deis.sample(PLAN, network.conditional([3, 0, 1, 2], **options), x)
        seen.clear()
        torch.testing.assert_close(deis.sample(PLAN, network.conditional([3, 0, 1, 2], **options), x, parallel=True), expected)
        assert seen[0] == [3, 0, 1, 2] * 2 + [4] * (8 if options else 0)
    assert torch.equal(deis.sample(PLAN, network, x, parallel=True), deis.sample(PLAN, network, x))
    with pytest.raises(ValueError, match="one entry per sample"):  # a wrong batch is no copy of the labels
        deis.sample(PLAN, network.conditional([3, 0]), x, parallel=True)
    with pytest.raises(ValueError, match="one entry per sample: there are 2 for 4 samples"):
        deis.sample(PLAN, network.conditional([3, 0], guidance=2.0), x, parallel=True)


def test_guidance_by_another_model_and_by_a_classifier_knows_each_level() -> None:
    x = torch.tensor(X_T)
    strong, weak = deis.Denoiser(model, SDE, "v"), deis.Denoiser(lambda x, t: 0.5 * model(x, t), SDE, "v")
    mixed: Any = deis.guided(strong, weak, 2.0, interval=(0.2, 0.7))
    classified = deis.classifier_guided(mixed, lambda x, t: -(x * x).sum((1, 2)) * t, 1.5)
    for denoiser in (mixed, classified, deis.guided(classified, classified, 2.0, interval=(0.2, 0.7))):
        torch.testing.assert_close(
            deis.sample(PLAN, denoiser, x, parallel=True), deis.sample(PLAN, denoiser, x), rtol=1e-12, atol=1e-13
        )


def test_a_condition_that_cannot_be_repeated_is_refused() -> None:
    for weight in (1.0, 2.0):
        alone = deis.classifier_free(lambda x, t, c: model(x, t), {"text": 1}, {"text": 0}, weight, batched=False)
        deis.sample(PLAN, alone, X_T)
        with pytest.raises(ValueError, match="condition is not batched, and cannot be repeated for parallel=True"):
            deis.sample(PLAN, alone, X_T, parallel=True)
    held = torch.tensor(LABELS)
    with pytest.raises(RuntimeError, match="must match the size"):
        deis.sample(PLAN, lambda x, t: model(x, t) * held.reshape(-1, 1, 1), torch.tensor(X_T), parallel=True)
    with pytest.raises(ValueError, match="parallel=2 must be True or False"):
        deis.sample(PLAN, model, X_T, parallel=2)  # type: ignore[arg-type]


# --- the method ----------------------------------------------------------------------------------------------------------


def with_exact_starts(plan: deis.Plan, eps: Callable[..., Array], exact: dict[float, Array], steps: int) -> Array:
    """Run a plan whose rows of the first steps see the solution itself, so that starts of low order do not count."""
    base = x = exact[plan.t[0].item()]
    history: tuple[Array, ...] = ()
    for i, row in enumerate(plan.rows):
        p = eps(x[:, None], np.full(len(x), row.t))[:, 0]
        p = p if plan.form == "eps" else (x - row.sigma * p) / row.alpha
        history = (p, *history)[: plan.window]
        base = combine(row.keep_x, base, row.keep_p, history)
        x = combine(row.next_x, base, row.next_p, history)
        if plan.accepts[: i + 1].sum() <= steps and plan.t[i + 1] >= plan.ts[steps]:
            x = exact[plan.t[i + 1].item()]
            base = exact[plan.ts[plan.accepts[: i + 1].sum()].item()]
    return x


@FEW_STEPS
@pytest.mark.parametrize("form", ["data", "eps"])
@pytest.mark.parametrize(("order", "corrector", "expected"), [(1, 1, 2), (2, 2, 3), (1, 2, 3), (3, 3, 4), (1, 3, 3)])
def test_the_order_of_convergence(form: Literal["eps", "data"], order: int, corrector: int, expected: int) -> None:
    sde = deis.VPSDE.linear(0.1, 20.0, sampling_eps=0.2, sampling_T=0.6)
    eps, solution = two_modes(sde)
    x_T, steps, errors = np.linspace(-1.5, 2.0, 5), [226, 320, 452], []
    for n in steps:
        plan = deis.make_plan(sde, deis.parallel_adams(form, "t", order, corrector), n, "t", 1)
        states = dict(zip(plan.ts.tolist(), solution(plan.ts, x_T), strict=True))
        end = with_exact_starts(plan, eps, states, 5)
        errors.append(np.linalg.norm(end - states[plan.ts[-1].item()]))
    assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - expected) < 0.2


@FEW_STEPS
@pytest.mark.parametrize("nfe", range(1, 10))
def test_a_budget_is_pairs_and_one_or_two_steps_of_one(nfe: int) -> None:
    plan = deis.make_plan(SDE, "parallel2", nfe=nfe)
    assert (plan.nfe, plan.depth, plan.num_step) == (nfe, nfe // 2 + 1, nfe // 2 + 1)
    assert plan.t.tolist() == sorted(plan.t.tolist(), reverse=True)


def test_it_is_the_predictor_corrector_of_adams_on_the_same_weights() -> None:
    """The weights of `deis.adams`: B are those of its predictor, A of its corrector, each where the docstring has it."""
    adams = deis.make_plan(SDE, deis.adams("data", "vp_t", 2, 2), 5)
    parallel = deis.make_plan(SDE, deis.parallel_adams(order=2), 5, "t", 2.0)
    p, q = [0, 3, 5, 7, 9], [1, 2, 4, 6, 8]  # the rows of p_i and of q_i
    b, a = adams.next_p, adams.keep_p[1:] / adams.keep_x[1:, None]
    for i in range(1, 4):
        past = p[:i][::-1]
        for row, nodes, weights in (
            (parallel.next_p[p[i]], [p[i] - r for r in (q[i], *past)], b[i]),
            (parallel.keep_p[q[i + 1]], [q[i + 1] - r for r in (q[i + 1], p[i], *past)], a[i]),
        ):
            expected = np.zeros(parallel.window)
            expected[nodes[:3]] = weights[: len(nodes)]
            np.testing.assert_allclose(row, expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(parallel.keep_x[[2, 4, 6, 8, 9]], adams.keep_x, rtol=1e-12)


@FEW_STEPS
@pytest.mark.parametrize("clock", CLOCKS)
def test_it_runs_on_flow_matching_from_pure_noise(clock: str) -> None:
    """Also where the clock is infinite there, and at the clean end."""
    sde = deis.FlowMatching()

    def velocity(x: Any, t: Any) -> Any:
        t = t[:, None]
        x_0 = 0.7 + (1 - t) * 0.25 * (x - (1 - t) * 0.7) / (((1 - t) * 0.5) ** 2 + t**2)
        return (x - x_0) / np.where(t > 0, t, 1)

    x_T, errors = X_T[:, 0], []
    for n in (20, 80):
        plan = deis.make_plan(sde, deis.parallel_adams("data", clock, 1), n, "t", 1.5)
        assert plan.depth == n
        x_0 = deis.sample(plan, velocity, x_T, predicts="flow", parallel=True)
        errors.append(np.abs(x_0 - (0.7 + 0.5 * x_T)).max())
    assert errors[1] < min(errors[0] / 4, 0.03)


def test_at_as_many_calls_it_is_nearer_than_auto() -> None:
    """On two modes, whose solution is known."""
    eps, solution = two_modes(SDE)
    x_T = np.random.default_rng(0).standard_normal((200, 1))
    exact = solution(np.array([SDE.t_start, SDE.t_end]), x_T[:, 0])[-1]
    for depth in (5, 6, 8):
        plans = deis.make_plan(SDE, "parallel2", depth), deis.make_plan(SDE, "auto", depth)
        errors = [np.abs(deis.sample(plan, eps, x_T)[:, 0] - exact).mean() for plan in plans]
        assert plans[0].depth == plans[1].depth
        assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": 0}, "order=0"),
        ({"corrector": 0}, "corrector=0"),
        ({"deviation": 0.0}, "deviation=0.0"),
        ({"form": "score"}, "form='score'"),
        ({"clock": "u"}, "'arctan_rho'"),
        ({"name": 3}, "name=3 must be a string"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deis.parallel_adams(**options)


# --- calibration ---------------------------------------------------------------------------------------------------------


def test_the_weights_that_are_not_free_are_those_of_the_same_group() -> None:
    found = free(PLAN)[:, 1:]
    n = len(PLAN.rows)
    lower = np.tri(n, dtype=bool)
    held = {(i, j) for i, j in np.argwhere(lower & ~found).tolist()}
    # Row 0 and its guess 1 are beside row 2; rows 3, 5 and 7 have the next beside them.
    assert held == {(0, 0), (1, 1), (3, 0), (5, 0), (7, 0)}
    assert (Table.of(PLAN).c[~found] == 0).all()
    assert free(deis.make_plan(SDE, "unipc2", 4)).sum() == 4 + 10


def two_modes_in_torch(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = (torch.from_numpy(f(t.detach().numpy()))[:, None] for f in (SDE.alpha, SDE.sigma))
    variance = (0.5 * alpha) ** 2 + sigma**2
    return sigma * (x - alpha * torch.tanh(alpha * x / variance)) / variance


def test_least_squares_leave_the_others_at_zero() -> None:
    denoiser, plan = deis.Denoiser(two_modes_in_torch, SDE), deis.make_plan(SDE, "parallel2", 3)
    teacher = deis.make_teacher(denoiser, torch.from_numpy(np.random.default_rng(0).standard_normal((40, 12))), steps=64)
    start = Table.of(plan)
    table, _ = fit_rows(Student(teacher.network, plan), start, teacher, 30, len(plan.rows))
    assert (table.c[~free(plan)[:, 1:]] == 0).all()
    assert (table.c != start.c).any(axis=1)[1:].all()
    assert table.plan(plan, SDE, "a model").depth == plan.depth


@pytest.mark.filterwarnings("ignore:.* is off by:UserWarning", "ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.parametrize("stage", ["gauss_newton", "gradient"])
def test_calibration_keeps_the_depth(stage: str) -> None:
    denoiser = deis.Denoiser(two_modes_in_torch, SDE)
    x_T = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 12)))
    plan = deis.make_plan(SDE, "parallel2", 3)
    fitted = deis.calibrate(plan, denoiser, x_T, stages=(stage,), teacher=64, iterations=4, steps=30)
    assert fitted.fitted
    assert (fitted.nfe, fitted.depth) == (plan.nfe, plan.depth) == (5, 3)
    record = fitted.provenance["stages"][-1]
    assert record["after"] < 0.9 * record["before"]
    torch.testing.assert_close(deis.sample(fitted, denoiser, x_T, parallel=True), deis.sample(fitted, denoiser, x_T))
