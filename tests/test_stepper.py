"""The stepper: whatever comes and goes beside it, a request gets what it gets alone, by one call a step."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deis

from .oracle import two_modes
from .test_plan_batch import BACKENDS, PLANS, SDE, TABLE, X_T, Spy, model, network, streams

EPS = two_modes(SDE)[0]
NAMES = list(PLANS)
X = np.ones((1, 3, 2))


def run(plan: deis.Plan, denoiser: Any, x: Any, rng: Any = None) -> Any:
    if plan.direction == "encode":
        return deis.encode(plan, denoiser, x)
    return deis.sample(plan, denoiser, x, rng=rng)


def drain(stepper: deis.Stepper) -> dict[Any, Any]:
    done: dict[Any, Any] = {}
    while stepper.step():
        done |= stepper.finished()
    return done | stepper.finished()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_requests_that_come_and_go_do_not_mix(data: st.DataObject) -> None:
    """Any plans, batch sizes and times of arrival: results as alone, and each call of just the samples in flight."""
    requests = data.draw(
        st.lists(st.tuples(st.integers(0, 6), st.sampled_from(NAMES), st.integers(1, 3)), min_size=1, max_size=8), "arrivals"
    )
    make: Any = data.draw(st.sampled_from([np.asarray, torch.tensor]), "framework")
    sizes: list[int] = []

    def eps(x: Any, t: Any) -> Any:
        sizes.append(len(x))
        found = EPS(np.asarray(x), np.asarray(t))
        return found if isinstance(x, np.ndarray) else torch.tensor(found)

    def generator(i: int) -> Any:
        return np.random.default_rng(i) if make is np.asarray else torch.Generator().manual_seed(i)

    stepper, left, evaluated = deis.Stepper(eps), [*enumerate(requests)], 0
    done: dict[Any, Any] = {}
    states = [np.random.default_rng(i).standard_normal((size, 2)) for i, (_, _, size) in enumerate(requests)]
    clock = 0
    while left or len(stepper):
        for i, (_, name, _) in [one for one in left if one[1][0] <= clock]:
            stepper.add(PLANS[name], make(states[i]), i, rng=generator(i))
        left = [one for one in left if one[1][0] > clock]
        evaluated += stepper.step()
        done |= stepper.finished()
        clock += 1
    assert sorted(done) == list(range(len(requests)))
    assert evaluated == sum(sizes) == sum(PLANS[name].nfe * size for _, name, size in requests)
    assert len(sizes) <= clock
    for i, (_, name, _) in enumerate(requests):
        expected = np.asarray(run(PLANS[name], eps, make(states[i]), generator(i) if PLANS[name].stochastic else None))
        np.testing.assert_allclose(np.asarray(done[i]), expected, rtol=1e-11, atol=1e-11 * np.abs(expected).max())


def test_one_call_a_step_of_all_that_are_there() -> None:
    spy = Spy()
    stepper = deis.Stepper(spy)
    x = np.ones((2, 3, 2))
    stepper.add(PLANS["ddim"], x, "a")
    assert (len(stepper), spy.sizes) == (1, [])
    assert stepper.step() == 2
    stepper.add(PLANS["afs"], x[:1], "b")
    stepper.add(PLANS["ddim"], x, "c")
    assert [stepper.step() for _ in range(3)] == [5, 5, 3]
    done = stepper.finished()
    assert list(done) == ["a", "c"]
    assert done["a"].shape == x.shape
    assert stepper.finished() == {}
    assert drain(stepper).keys() == {"b"}
    assert (len(stepper), stepper.step()) == (0, 0)
    assert spy.sizes == [2, 5, 5, 3, 1, 1]
    assert sum(spy.sizes) == 2 * 3 + 2 * 3 + 5


def test_jax_steps_too() -> None:
    with jax.enable_x64(True):
        names, keys = ["ancestral", "afs"], streams("jax", 2)
        stepper, x = deis.Stepper(jax.jit(model)), jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 2)))
        for i, name in enumerate(names):
            stepper.add(PLANS[name], x[i : i + 1], name, rng=keys[i : i + 1])
            stepper.step()
        for i, (name, found) in enumerate(sorted(drain(stepper).items(), key=lambda one: names.index(one[0]))):
            noise = {"rng": keys[i : i + 1]} if name == "ancestral" else {}
            one = x[i : i + 1] if noise else np.asarray(x[i : i + 1])
            expected = np.asarray(deis.sample(PLANS[name], model, one, **noise))
            np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_dtypes_are_those_of_the_request(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    stepper = deis.Stepper(deis.Denoiser(model, SDE, "v"))
    stepper.add(PLANS["tab3"], x, 0)
    x_T = x.clone()
    x.zero_()  # the caller's own memory, which the stepper does not hold
    found = drain(stepper)[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found, deis.sample(PLANS["tab3"], deis.Denoiser(model, SDE, "v"), x_T))


# --- cancelling ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_cancelled_is_in_no_later_call_and_the_others_do_not_notice(data: st.DataObject) -> None:
    """Any plans, of windows of any length, cancelled before their first step or after any: calls of just those that are left."""
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=6), "plans")
    ends = {i: data.draw(st.integers(0, PLANS[name].nfe - 1)) for i, name in enumerate(names) if data.draw(st.booleans())}
    spy = Spy()
    stepper, done, sizes = deis.Stepper(spy), dict[Any, Any](), []
    for i, name in enumerate(names):
        stepper.add(PLANS[name], X_T[i : i + 1], i, rng=np.random.default_rng(i))
    for clock in range(max(PLANS[name].nfe for name in names)):
        for i in [i for i, end in ends.items() if end == clock]:
            stepper.cancel(i)
        sizes += [sum(ends.get(i, PLANS[name].nfe) > clock for i, name in enumerate(names))]
        assert stepper.step() == sizes[-1]
        done |= stepper.finished()
    assert (len(stepper), spy.sizes) == (0, [size for size in sizes if size])
    assert done.keys() == {*range(len(names))} - ends.keys()
    for i, found in done.items():
        expected = run(PLANS[names[i]], model, X_T[i : i + 1], np.random.default_rng(i) if PLANS[names[i]].stochastic else None)
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_the_labels_of_what_is_cancelled_go_with_it() -> None:
    seen: list[list[int]] = []
    stepper = deis.Stepper(network(seen))
    for label in range(4):
        stepper.add(PLANS["ddim"], X, label, labels=[label])
    stepper.step()
    stepper.cancel(1)
    stepper.step()
    stepper.cancel(0)
    stepper.add(PLANS["ddim"], X, 1, labels=[3])  # the id is free again
    done = drain(stepper)
    assert seen == [[0, 1, 2, 3], [0, 2, 3], [2, 3, 3], [3], [3]]
    np.testing.assert_allclose(done[2], deis.sample(PLANS["ddim"], network().conditional([2]), X), rtol=1e-12)


def test_when_all_are_cancelled_others_of_another_kind_may_come() -> None:
    stepper = deis.Stepper(model)
    stepper.add(PLANS["tab3"], torch.ones(1, 3, 7), 0)
    stepper.step()
    stepper.cancel(0)
    assert (len(stepper), stepper.step()) == (0, 0)
    stepper.add(PLANS["ddim"], X, 1)
    np.testing.assert_allclose(drain(stepper)[1], deis.sample(PLANS["ddim"], model, X), rtol=1e-12)


def test_only_what_is_not_done_can_be_cancelled() -> None:
    stepper = deis.Stepper(model)
    stepper.add(PLANS["ddim"], X, "done")
    for _ in range(3):
        stepper.step()
    for name in ("done", "never"):
        with pytest.raises(ValueError, match=f"id='{name}' is not in flight"):
            stepper.cancel(name)
    assert stepper.finished().keys() == {"done"}


# --- conditions ----------------------------------------------------------------------------------------------------------

ASKED: list[dict[str, Any]] = [
    {"labels": [3]},
    {},
    {"labels": [1, 2], "guidance": 2.0},
    {"labels": [0, 1], "guidance": [1.0, 3.0]},
    {"labels": [2], "guidance": 0.0},
]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_each_request_has_its_labels_and_its_guidance(backend: str) -> None:
    seen: list[list[int]] = []
    stepper, names, states = deis.Stepper(network(seen)), ["ddim", "tab3", "afs", "dpmpp_2s", "cut"], []
    for i, asked in enumerate(ASKED):
        states.append(np.random.default_rng(i).standard_normal((len(asked.get("labels", [0])), 3, 2)))
        stepper.add(PLANS[names[i]], BACKENDS[backend](states[i]), i, **asked)
        stepper.step()
    assert seen[:4] == [[3], [3, 4], [3, 4, 1, 2, 4, 4], [4, 1, 2, 0, 1, 4, 4, 4]]
    for i, found in drain(stepper).items():
        expected = deis.sample(PLANS[names[i]], network().conditional(**ASKED[i]), states[i])
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-12)


def test_conditions_may_be_arrays_of_the_networks_own() -> None:
    """As those of text: each prompt is embedded once, however many steps it takes."""
    prompts: list[str] = []

    def embed(labels: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        prompts.extend(labels)
        lengths = torch.tensor([[float(len(text))] * 3 for text in labels])
        return lengths, torch.zeros_like(lengths)

    def net(x: Any, t: Any, condition: Any) -> Any:
        return model(x, t) + condition.mean(1).reshape(-1, 1, 1)

    text = deis.Pretrained(net, SDE, "eps", (1, 3, 2), None, None, 1.0, embed=embed)
    stepper, x = deis.Stepper(text), torch.ones(1, 3, 2)
    stepper.add(PLANS["ddim"], x, "a", labels=["a cat"], guidance=3.0)
    stepper.step()
    stepper.add(PLANS["tab3"], x, "b", labels=["two dogs"])
    done = drain(stepper)
    assert prompts == ["a cat", "two dogs"]
    torch.testing.assert_close(done["a"], deis.sample(PLANS["ddim"], text.conditional(["a cat"], 3.0), x))
    torch.testing.assert_close(done["b"], deis.sample(PLANS["tab3"], text.conditional(["two dogs"]), x))
    with pytest.raises(ValueError, match="labels are missing"):
        stepper.add(PLANS["tab3"], x, "c")


# --- refusals ------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"plan": "tab3"}, TypeError, "plan must be a deis.Plan"),
    ({"plan": deis.make_plan(deis.VPSDE.cosine(), "ddim", 3)}, ValueError, "was made for the schedule 'VPSDE.cosine"),
    ({"plan": PLANS["bdia"].reverse()}, ValueError, "begins with two states"),
    ({"plan": PLANS["ancestral"]}, ValueError, "adds noise and rng is missing"),
    ({"plan": PLANS["ancestral"], "rng": torch.Generator()}, TypeError, "rng must be"),
    ({"plan": PLANS["ancestral"], "rng": []}, ValueError, "one generator a sample"),
    ({"x_T": [[1.0]]}, TypeError, "x_T must be"),
    ({"x_T": np.ones((1, 2, 2))}, ValueError, r"x_T has samples of .* shape \(2, 2\)"),
    ({"x_T": np.ones((1, 3, 2), np.float32)}, ValueError, "x_T has samples of float32"),
    ({"x_T": torch.ones(1, 3, 2)}, ValueError, "x_T has samples of torch.float32"),
    ({"id": "old"}, ValueError, "id='old' is in use"),
    ({"id": "done"}, ValueError, "id='done' is in use"),
    ({"id": []}, TypeError, "unhashable"),
    ({"labels": [7]}, ValueError, "labels=.7. must lie in 0"),
    ({"labels": [1, 2]}, ValueError, "must have one entry a sample, and x_T has 1"),
    ({"guidance": 2.0}, ValueError, "needs labels"),
    ({"labels": [1], "guidance": [2.0, 3.0]}, ValueError, "must have one entry a sample, and x_T has 1"),
    ({"labels": [1], "guidance": "much"}, ValueError, "weight='much' must be a finite number"),
]


@pytest.mark.parametrize(("change", "error", "match"), REFUSED, ids=[match for _, _, match in REFUSED])
def test_what_is_refused_changes_nothing(change: dict[str, Any], error: type[Exception], match: str) -> None:
    stepper = deis.Stepper(network())
    stepper.add(deis.make_plan(SDE, "ddim", 1), X, "done", labels=[0])
    stepper.add(PLANS["tab3"], X, "old", labels=[1], guidance=2.0)
    stepper.step()
    add: Any = stepper.add
    with pytest.raises(error, match=match):
        add(**({"plan": PLANS["ddim"], "x_T": X, "id": "new"} | change))
    assert len(stepper) == 1
    done = drain(stepper)
    assert done.keys() == {"done", "old"}
    np.testing.assert_allclose(done["old"], deis.sample(PLANS["tab3"], network().conditional([1], 2.0), X), rtol=1e-12)


def test_a_plain_function_takes_the_schedule_of_the_first_request_and_no_labels() -> None:
    stepper = deis.Stepper(model)
    with pytest.raises(ValueError, match=r"need a deis\.Pretrained network"):
        stepper.add(PLANS["ddim"], X, 0, labels=[1])
    stepper.add(PLANS["ddim"], X, 0)
    with pytest.raises(ValueError, match=r"plan, the plan 'ddim', was made for the schedule"):
        stepper.add(deis.make_plan(TABLE, "ddim", 3), X, 1)
    with pytest.raises(ValueError, match=r"plan: predicts='eps' does not determine x_0 at t=1.0"):
        deis.Stepper(model).add(deis.make_plan(deis.FlowMatching(), "dpmpp_2m", 3), X, 0)
    with pytest.raises(ValueError, match="contradicts the Denoiser"):
        deis.Stepper(deis.Denoiser(model, SDE), predicts="v")
    with pytest.raises(TypeError, match="model must be a function"):
        deis.Stepper(3)  # type: ignore[arg-type]


def test_an_error_of_the_network_leaves_all_where_they_were() -> None:
    fails = [False]

    def eps(x: Any, t: Any) -> Any:
        if fails[0]:
            raise RuntimeError("out of memory")
        return model(x, t)

    stepper = deis.Stepper(eps)
    stepper.add(PLANS["afs"], X, 0)
    stepper.add(PLANS["ancestral"], X, 1, rng=np.random.default_rng(3))
    stepper.step()
    fails[0] = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            stepper.step()
    fails[0] = False
    done = drain(stepper)
    np.testing.assert_allclose(done[0], deis.sample(PLANS["afs"], model, X), rtol=1e-12)
    np.testing.assert_allclose(done[1], deis.sample(PLANS["ancestral"], model, X, rng=np.random.default_rng(3)), rtol=1e-12)


def test_a_nan_stays_in_its_request() -> None:
    stepper = deis.Stepper(model)
    stepper.add(PLANS["afs"], X, "good")
    stepper.add(PLANS["parallel1"], np.full_like(X, np.nan), "bad")
    done = drain(stepper)
    assert np.isnan(done["bad"]).all()
    np.testing.assert_allclose(done["good"], deis.sample(PLANS["afs"], model, X), rtol=1e-12)


def bytes_alive(shape: tuple[int, ...]) -> int:
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[1:] == shape]
    return sum({o.data_ptr(): o.untyped_storage().nbytes() for o in tensors}.values())


def test_a_result_holds_no_memory_of_its_neighbours() -> None:
    stepper = deis.Stepper(model)
    for i in range(3):
        stepper.add(PLANS["ddim"], torch.ones(1, 3, 2), i)
    assert {x_0.untyped_storage().nbytes() for x_0 in drain(stepper).values()} == {6 * 4}


def test_memory_is_that_of_what_is_in_flight() -> None:
    """However many requests have passed: x, base and the history of those in flight."""
    stepper, alive = deis.Stepper(model), []
    for i in range(30):
        stepper.add(PLANS["tab3"], torch.ones(1, 3, 7), i)
        for _ in range(3):
            stepper.step()
        stepper.finished()
        if i in (5, 29):
            alive.append(bytes_alive((3, 7)))
    assert alive[0] == alive[1]
    assert 0 < alive[0] <= 2 * 21 * 4 * (2 + PLANS["tab3"].window - 1)  # two requests, of 21 numbers in float32
