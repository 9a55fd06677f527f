"""A plan for each sample: what each gets is what it gets alone, in one call a round for all that are left."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import deis
from deis.run.plans import rounds_of

from .oracle import two_modes

Array = NDArray[np.float64]
SDE = deis.VPSDE.linear()
TABLE = deis.VPSDE.discrete(np.linspace(0.99, 0.01, 50))


def plans_of(sde: deis.Schedule) -> dict[str, deis.Plan]:
    with warnings.catch_warnings(action="ignore"):  # of few steps
        tab3 = deis.make_plan(sde, "tab3", 8)
        return {
            "ddim": deis.make_plan(sde, "ddim", 3),
            "tab3": deis.make_plan(sde, "tab3", 7),
            "auto": deis.make_plan(sde, nfe=6),
            "dpmpp_2s": deis.make_plan(sde, "dpmpp_2s", 4),
            "ancestral": deis.make_plan(sde, "ancestral", 5),
            "dpmpp_sde": deis.make_plan(sde, "dpmpp_sde", 4),
            "afs": deis.make_plan(sde, "tab2", 6, afs=0.5),
            "cut": deis.cut_plan(tab3, sde, float(tab3.t[3])),
            "parallel1": deis.make_plan(sde, "parallel1", nfe=6),
            "bdia": deis.make_plan(sde, "bdia", 5),
            "encode": deis.make_plan(sde, "ddim", 5, direction="encode"),
        }


PLANS = plans_of(SDE)
X_T = np.random.default_rng(0).standard_normal((len(PLANS), 3, 2))
BACKENDS: dict[str, Callable[..., Any]] = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


def model(x: Any, t: Any) -> Any:
    """Nonlinear in x and in t, in any framework."""
    return x / (1 + x * x) * (1 + t.reshape(-1, 1, 1) / 64)  # exact in float32, which torch makes of an integer t


class Spy:
    """A model that keeps the batch sizes and the dtypes of t that it saw."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.dtypes: set[str] = set()

    def __call__(self, x: Any, t: Any) -> Any:
        assert t.shape == (len(x),)
        self.sizes.append(len(x))
        self.dtypes.add(str(t.dtype).removeprefix("torch."))
        return model(x, t)


def streams(backend: str, batch: int) -> Any:
    if backend == "jax":
        return jax.vmap(jax.random.key)(jnp.arange(batch))
    if backend == "torch":
        return [torch.Generator().manual_seed(i) for i in range(batch)]
    return [np.random.default_rng(i) for i in range(batch)]


def alone(plans: Sequence[deis.Plan], denoisers: Sequence[Any], x: Any, backend: str) -> Array:
    """Run each sample by itself, with its own generator; in JAX the deterministic ones as NumPy does, in less time to compile."""
    rngs, found = streams(backend, len(x)), []
    for i, (plan, denoiser) in enumerate(zip(plans, denoisers, strict=True)):
        run: Any = deis.encode if plan.direction == "encode" else deis.sample
        one = np.asarray(x[i : i + 1]) if backend == "jax" and not plan.stochastic else x[i : i + 1]
        found.append(np.asarray(run(plan, denoiser, one, **({"rng": rngs[i : i + 1]} if plan.stochastic else {}))))
    return np.concatenate(found)


# --- equality ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "predicts", "threshold"),
    [
        *((backend, predicts, None) for backend in ("numpy", "torch") for predicts in ("eps", "x0", "v")),
        *((backend, "v", deis.static_threshold(0.3)) for backend in BACKENDS),
        ("jax", "eps", None),
    ],
)
def test_each_sample_is_as_alone(backend: str, predicts: str, threshold: Any) -> None:
    with jax.enable_x64(True):
        plans, x, denoiser = list(PLANS.values()), BACKENDS[backend](X_T), deis.Denoiser(model, SDE, predicts, threshold)
        expected = alone(plans, [denoiser] * len(plans), x, backend)
        found = np.asarray(deis.sample(plans, denoiser, x, rng=streams(backend, len(x)), check_finite=True))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_times_stay_integers_where_all_plans_have_them(backend: str) -> None:
    whole = [deis.make_plan(TABLE, "tab2", 4), deis.make_plan(TABLE, "dpmpp_2m", 6)]
    between = deis.make_plan(TABLE, "tab2", ts=[49.0, 30.5, 10.0, 0.0])
    assert [plan.discrete for plan in (*whole, between)] == [True, True, False]
    with jax.enable_x64(True):
        for plans, kinds in ((whole, {"int64", "int32"}), ([*whole, between], {"float64"})):
            x, spy = BACKENDS[backend](X_T[: len(plans)]), Spy()
            found = np.asarray(deis.sample(plans, spy, x))
            expected = alone(plans, [model] * len(plans), x, backend)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
            assert len(spy.dtypes & kinds) >= 1
            assert plans is not whole or spy.dtypes <= kinds


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_are_carried_in_float32(backend: str) -> None:
    plans, half = [PLANS["ddim"], PLANS["tab3"]], X_T[:2].astype(np.float16)
    found = deis.sample(plans, model, BACKENDS[backend](half))
    assert str(found.dtype).endswith("float16")
    np.testing.assert_allclose(np.asarray(found), alone(plans, [model] * 2, half, "numpy"), rtol=1e-3)


def test_a_single_generator_gives_sample_i_its_i_th_stream() -> None:
    plan = PLANS["ancestral"]
    together = deis.sample([plan] * 3, model, X_T[:3], rng=np.random.default_rng(7))
    np.testing.assert_allclose(together, deis.sample(plan, model, X_T[:3], rng=np.random.default_rng(7)), rtol=1e-12)
    make = torch.Generator().manual_seed
    mixed = deis.sample([plan, PLANS["tab3"], plan], model, torch.tensor(X_T[:3]), rng=make(7))
    torch.testing.assert_close(mixed[::2], deis.sample(plan, model, torch.tensor(X_T[:3]), rng=make(7))[::2], rtol=1e-12, atol=0)


def test_the_samples_converge_to_their_own_solutions() -> None:
    """Of starts in the middle and at the end of time, in both directions, on a problem with a known solution."""
    eps, solution = two_modes(SDE)
    down, part = deis.make_plan(SDE, "tab3", 60), deis.make_plan(SDE.between(0.4), "unipc2", 60)
    plans = [down, part, deis.make_plan(SDE, "tab3", 80, direction="encode")]
    x = np.array([[1.1], [0.3], [0.9]])
    found = deis.sample(plans, eps, x)
    for plan, start, end in zip(plans, x, found, strict=True):
        exact = solution(np.array([plan.t[0], plan.t[-1]]), start)[-1]
        assert abs(end - exact).max() < 1e-3


# --- cost ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_every_call_evaluates_the_samples_that_are_left_and_no_other(backend: str) -> None:
    plans, spy = list(PLANS.values()), Spy()
    deis.sample(plans, spy, BACKENDS[backend](X_T), rng=streams(backend, len(X_T)))
    budgets = [plan.nfe for plan in plans]
    assert spy.sizes == [sum(nfe > k for nfe in budgets) for k in range(max(budgets))]
    assert sum(spy.sizes) == sum(budgets)


def test_jax_traces_the_model_once_however_long_the_plans_are() -> None:
    for num_step in (4, 40):
        spy, plans = Spy(), [deis.make_plan(SDE, "tab3", num_step), deis.make_plan(SDE, "tab2", 6, afs=0.5), PLANS["dpmpp_2s"]]
        jax.jit(lambda x, plans=plans, spy=spy: deis.sample(plans, spy, x))(jnp.asarray(X_T[:3]))
        assert spy.sizes == [3]


def test_a_round_is_a_call_of_all_or_moves_those_without_one() -> None:
    plans = list(PLANS.values())
    rows, moves, calls = rounds_of(plans)
    assert calls.sum() == max(plan.nfe for plan in plans)
    for b, plan in enumerate(plans):
        assert rows[moves[:, b], b].tolist() == list(range(len(plan.rows)))
        assert (plan.calls[rows[moves[:, b], b]] == calls[moves[:, b]]).all()
        assert plan.calls[rows[calls, b]].all()  # those that are done show their last call, whose level and factors are sound


def test_gradients_flow_as_alone() -> None:
    plans, x = [PLANS["ddim"], PLANS["tab3"], PLANS["afs"]], torch.tensor(X_T[:3], requires_grad=True)
    deis.sample(plans, model, x, grad=True).square().sum().backward()
    with jax.enable_x64(True):
        traced = jax.jit(jax.grad(lambda x: (deis.sample(plans, model, x) ** 2).sum()))(jnp.asarray(X_T[:3]))
    for i, plan in enumerate(plans):
        one = torch.tensor(X_T[i : i + 1], requires_grad=True)
        deis.sample(plan, model, one, grad=True).square().sum().backward()
        assert x.grad is not None
        assert one.grad is not None
        np.testing.assert_allclose(x.grad[i], one.grad[0], rtol=1e-10)
        np.testing.assert_allclose(traced[i], one.grad[0], rtol=1e-10)


# --- conditions ----------------------------------------------------------------------------------------------------------

LABELS = [3, 0, 1, 2]
MIX = [PLANS["ddim"], PLANS["tab3"], PLANS["afs"], PLANS["dpmpp_2s"]]
SHIFT = np.array([0.5, -0.5, 1.0, 0.2, 0.0])


def network(seen: list[list[int]] | None = None) -> deis.Pretrained:
    def net(x: Any, t: Any, labels: Any) -> Any:
        if seen is not None:
            seen.append(np.asarray(labels).tolist())
        shift: Any = SHIFT[np.asarray(labels)].reshape(-1, 1, 1)
        return model(x, t) + (torch.tensor(shift) if isinstance(x, torch.Tensor) else shift)

    return deis.Pretrained(net, SDE, "eps", (1, 3, 2), 4, 4, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 2.0},
        {"guidance": [1.0, 2.0, 3.5, 1.0]},
        {"guidance": np.array([2.0, 0.5, 0.0, 4.0]), "rescale": 0.5},
        {"guidance": 2.0, "interval": (0.2, 0.7)},
        {"guidance": [1.0, 2.0, 3.0, 1.0], "interval": (0.2, 0.7)},
    ],
    ids=str,
)
def test_each_sample_keeps_its_label_and_its_guidance(backend: str, options: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        x = BACKENDS[backend](X_T[:4])
        found = np.asarray(deis.sample(MIX, network().conditional(LABELS, **options), x))
        own = np.broadcast_to(np.array(options.get("guidance", 1.0)), 4).tolist()
        each = [network().conditional([label], **options | {"guidance": w}) for label, w in zip(LABELS, own, strict=True)]
        np.testing.assert_allclose(found, alone(MIX, each, x, backend), rtol=1e-12, atol=1e-12)


def test_the_network_sees_the_labels_of_the_samples_that_are_left() -> None:
    assert [plan.nfe for plan in MIX] == [3, 7, 5, 8]  # so that these are left, call by call
    left = [[3, 0, 1, 2]] * 3 + [[0, 1, 2]] * 2 + [[0, 2]] * 2 + [[2]]
    guidance = {3: 1.0, 0: 2.0, 1: 3.0, 2: 1.0}  # of each label
    for weights in (dict.fromkeys(LABELS, 1.0), dict.fromkeys(LABELS, 2.0), guidance):
        seen: list[list[int]] = []
        denoiser = network(seen).conditional(LABELS, guidance=[weights[label] for label in LABELS])
        deis.sample(MIX, denoiser, torch.tensor(X_T[:4]))
        assert seen == [[*labels, *(4 for label in labels if weights[label] != 1)] for labels in left]


def test_guidance_by_two_models_and_by_a_classifier_goes_sample_by_sample() -> None:
    x = torch.tensor(X_T[:4])
    strong, weak = deis.Denoiser(model, SDE, "v"), deis.Denoiser(lambda x, t: 0.5 * model(x, t), SDE, "v")
    weights = [1.0, 2.0, 0.5, 3.0]
    found = deis.sample(MIX, deis.guided(strong, weak, weights), x).numpy()
    np.testing.assert_allclose(found, alone(MIX, [deis.guided(strong, weak, w) for w in weights], x, "torch"), rtol=1e-12)
    classified = deis.classifier_guided(strong, lambda x, t: -(x * x).sum((1, 2)) * t, 1.5)
    np.testing.assert_allclose(deis.sample(MIX, classified, x).numpy(), alone(MIX, [classified] * 4, x, "torch"), rtol=1e-12)


def test_conditions_and_weights_that_do_not_fit_are_refused() -> None:
    x = torch.tensor(X_T[:4])
    for count in (2, 5):
        for guidance in (1.0, 2.0):
            denoiser = network().conditional([1] * count, guidance=guidance)
            with pytest.raises(ValueError, match=f"one entry per sample: there are {count} for 4 samples"):
                deis.sample(MIX, denoiser, x)
        with pytest.raises(ValueError, match=f"weight must have one entry per sample: there are {count} for 4 samples"):
            deis.sample(MIX, deis.guided(model, model, [2.0] * count), x)
    for wrong in ([], [[2.0]], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match=r"weight=.* must be a finite number, or an array of them of shape"):
            deis.guided(model, model, wrong)
    text = deis.classifier_free(lambda x, t, c: model(x, t), {"text": 1}, {"text": 0}, 2.0, batched=False)
    with pytest.raises(ValueError, match="condition is not batched"):
        deis.sample(MIX, text, x)
    with pytest.raises(ValueError, match=r"guidance=\[1.0, 2.0\] needs labels"):
        network().conditional(guidance=[1.0, 2.0])


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"plan": []}, ValueError, "one plan a sample: there are 0 for x_T of shape"),
        ({"plan": MIX[:3]}, ValueError, "one plan a sample: there are 3 for x_T of shape"),
        ({"plan": [*MIX[:3], "tab3"]}, TypeError, r"plan\[3\] must be a deis.Plan"),
        ({"plan": [*MIX[:3], PLANS["bdia"].reverse()]}, ValueError, r"plan\[3\].* begins with two states"),
        ({"plan": [*MIX[:3], PLANS["ancestral"]]}, ValueError, r"plan\[3\], .* adds noise and rng is missing"),
        ({"trajectory": True}, ValueError, "trajectory was asked for and plan is a sequence"),
        ({"callback": print}, ValueError, "callback was asked for"),
        ({"progress": True}, ValueError, "progress was asked for"),
        ({"parallel": True}, ValueError, "parallel was asked for"),
        ({"check_finite": "yes"}, ValueError, "check_finite='yes' must be True or False"),
        ({"predicts": "noise"}, ValueError, "predicts='noise' is unknown"),
        ({"x_T": [1.0, 2.0]}, TypeError, "x_T must be"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"plan": MIX, "model": model, "x_T": X_T[:4]} | change
    with pytest.raises(error, match=match):
        deis.sample(**arguments)


def test_plans_of_two_schedules_are_refused() -> None:
    cosine, other = deis.make_plan(deis.VPSDE.cosine(), "ddim", 3), deis.VPSDE.discrete(np.linspace(0.999, 0.02, 50))
    for plans, told in (
        ([PLANS["ddim"], cosine], model),
        ([PLANS["ddim"], cosine], deis.Denoiser(model, SDE)),
        ([PLANS["ddim"], cosine], deis.Denoiser(model, TABLE)),
        ([deis.make_plan(TABLE, "ddim", 7), deis.make_plan(other, "ddim", 7)], model),  # of one name, and two levels at one time
    ):
        with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=r"plan\[1\].* was made for the schedule"):
            deis.sample(plans, told, X_T[:2])
    cosine_model = deis.Denoiser(model, deis.VPSDE.cosine())
    for plan in ([deis.make_plan(SDE, "ddim", 3), PLANS["tab3"]], deis.make_plan(SDE, "ddim", 4)):  # all of another, as for one
        with pytest.warns(UserWarning, match="was made for the schedule") as told_of:
            deis.sample(plan, cosine_model, X_T[:2])
        assert [warning.filename for warning in told_of] == [__file__]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_is_told_with_its_sample_and_stays_there(backend: str) -> None:
    x = X_T[:4].copy()
    x[2, 0, 0] = np.nan
    found = np.asarray(deis.sample(MIX, model, BACKENDS[backend](x.astype(np.float32))))
    assert np.isfinite(found).all(axis=(1, 2)).tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match=r"NaN or infinity for sample 2 at t="):
        deis.sample(MIX, model, BACKENDS[backend](x.astype(np.float32)), check_finite=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_that_is_done_cannot_raise(backend: str) -> None:
    """JAX goes on to evaluate it, at the level of its last call, where the model need not make sense of x_0."""

    def eps(x: Any, t: Any) -> Any:
        return x * (1 - 2 * ((abs(x) > 500) & (t.reshape(-1, 1, 1) > 0.9))) ** 0.5 * 0

    plans, x = [deis.make_plan(SDE, "ddim", 1), deis.make_plan(SDE, "ddim", 3)], np.full((2, 3, 2), 10.0, np.float32)
    with np.errstate(all="ignore"):
        assert np.isnan(eps(np.full((1, 3, 2), 1e3), np.ones(1))).all()
    found = np.asarray(deis.sample(plans, eps, BACKENDS[backend](x), check_finite=True))
    np.testing.assert_allclose(found, 10 / SDE.alpha(1.0) * SDE.alpha(plans[0].t[-1]), rtol=1e-5)
