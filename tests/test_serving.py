"""The engine of the server, without the web: pictures as alone, places freed at the next step, and an answer for everybody."""

import gc
import logging
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import deis
from deis.draws import drawn, streams
from deis.serving.engine import BusyError, Engine, Limits, NetworkError, Request

from .test_plan_batch import PLANS, SDE, SHIFT

DDIM = PLANS["ddim"]
assert DDIM.nfe == 3


def network(seen: list[list[int]] | None = None) -> deis.Pretrained:
    """Nonlinear in x and in t, with four classes, and a fifth label for none."""

    def net(x: Any, t: Any, labels: Any) -> Any:
        if seen is not None:
            seen.append(np.asarray(labels).tolist())
        return x / (1 + x * x) * (1 + t.reshape(-1, 1, 1, 1)) + torch.tensor(SHIFT[np.asarray(labels)]).reshape(-1, 1, 1, 1)

    return deis.Pretrained(net, SDE, "eps", (1, 3, 2), 4, 4, 1.0)


def engine_of(seen: list[list[int]] | None = None, **limits: Any) -> Engine:
    return Engine(network(seen), Limits(**{"batch": 4, "queue": 8} | limits), dtype="float64")


def of(label: int, name: str = "ddim", **settings: Any) -> Request:
    """A request for one class."""
    return Request(PLANS[name], [label] * settings.get("num", 1), **settings)


def alone(request: Request, model: deis.Pretrained, dtype: str = "float64") -> NDArray[Any]:
    """Return the pictures of a request by `deis.sample`."""
    numbers = range(request.num)
    x_T = torch.from_numpy(drawn(numbers, model.shape, float(request.plan.sigma[0]), request.seed).astype(dtype))
    rng = streams(x_T, numbers, request.seed) if request.plan.stochastic else None
    return deis.sample(request.plan, model.conditional(request.labels, request.guidance), x_T, rng=rng).numpy()


def idle(engine: Engine) -> None:
    """Take turns until there is nothing to do."""
    while engine.waiting or engine.running:
        engine.turn()


# --- pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", range(4))
def test_pictures_are_those_of_sample_alone_whenever_they_join(gap: int) -> None:
    """Plans of all kinds, with noise of their own or not, guided or not, of one picture or several, some turns apart."""
    engine = engine_of(batch=6, queue=20)
    names = [name for name, plan in PLANS.items() if plan.direction == "decode" and name != "cut"]
    requests = [
        of(i % 4, name, seed=i, num=1 + i % 3, guidance=[1.0, 2.5][i % 2]) for i, name in enumerate(names)
    ]  # fmt: skip
    futures = []
    for request in requests:
        futures.append(engine.submit(request))
        for _ in range(gap):
            engine.turn()
    idle(engine)
    for request, future in zip(requests, futures, strict=True):
        np.testing.assert_allclose(future.result(0), alone(request, network()), rtol=1e-11, atol=1e-11)
    assert engine.counts == {"done": len(requests)}
    assert engine.evaluations == sum(request.plan.nfe * request.num for request in requests)


def test_latents_are_decoded_and_prompts_embedded() -> None:
    def embed(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([[[float(len(text))]] for text in prompts], dtype=torch.float64)
        return lengths, torch.zeros_like(lengths)

    def net(x: Any, t: Any, condition: Any) -> Any:
        return 0.1 * x + 0.01 * condition[..., None]

    model = replace(network(), net=net, num_classes=None, null_class=None, embed=embed, decode=lambda x: x[:, :, :1] + 1)
    engine = Engine(model, Limits(), dtype="float64")
    request = Request(DDIM, ["a cat", "two dogs"], num=2, guidance=3.0)
    future = engine.submit(request)
    idle(engine)
    np.testing.assert_allclose(future.result(0), alone(request, model)[:, :, :1] + 1, rtol=1e-12)


# --- places --------------------------------------------------------------------------------------------------------------


def test_who_waits_joins_at_the_next_step_in_the_order_of_arrival() -> None:
    """One of several pictures waits until all fit, and nobody overtakes it."""
    seen: list[list[int]] = []
    engine = engine_of(seen, batch=3)
    engine.submit(of(0))
    engine.turn()
    for request in (of(1, num=2), of(2, num=3), of(3)):
        engine.submit(request)
    idle(engine)
    assert seen == [[0], [0, 1, 1], [0, 1, 1], [1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [3], [3], [3]]
    assert engine.calls == len(seen)
    with pytest.raises(ValueError, match="num=4 must be at least 1 and at most 3, the places of the batch"):
        engine.submit(of(0, num=4))


def test_to_cancel_frees_the_place_at_the_next_step() -> None:
    seen: list[list[int]] = []
    engine = engine_of(seen, batch=2, queue=2)
    first, second = engine.submit(of(0)), engine.submit(of(1))
    engine.turn()
    third, fourth = engine.submit(of(2)), engine.submit(of(3))
    assert second.cancel()
    assert third.cancel()
    engine.turn()
    assert seen == [[0, 1], [0, 3]]
    assert (engine.waiting, engine.running, engine.counts["cancelled"]) == (0, 2, 2)
    idle(engine)
    np.testing.assert_allclose(first.result(0), alone(of(0), network()), rtol=1e-12)
    np.testing.assert_allclose(fourth.result(0), alone(of(3), network()), rtol=1e-12)


def test_who_cancels_while_the_last_call_runs_gets_nothing_and_the_engine_goes_on() -> None:
    futures: list[Future[Any]] = []

    def net(x: Any, t: Any, labels: Any) -> Any:
        futures[0].cancel()
        return 0 * x

    engine = Engine(replace(network(), net=net), Limits(), dtype="float64")
    futures += [engine.submit(replace(of(0), plan=deis.make_plan(network().sde, "ddim", 1))), engine.submit(of(1))]
    idle(engine)
    assert futures[1].result(0).shape == (1, 1, 3, 2)
    assert engine.counts == {"cancelled": 1, "done": 1}


def test_a_full_queue_refuses_and_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves 4 s in each call: a request alone takes 12 s, and two that wait enter after 24 s."""
    clock = [0.0]

    def net(x: Any, t: Any, labels: Any) -> Any:
        clock[0] += 4.0
        return 0 * x

    monkeypatch.setattr("deis.serving.engine.time", SimpleNamespace(monotonic=lambda: 0.0, perf_counter=lambda: clock[0]))
    engine = Engine(replace(network(), net=net), Limits(batch=1, queue=2), dtype="float64")
    for _ in range(2):
        engine.submit(of(0))
    with pytest.raises(BusyError, match="the queue is full, with 2 requests; come again in 1 s"):  # nothing is measured yet
        engine.submit(of(0))
    idle(engine)
    for _ in range(2):
        engine.submit(of(0))
    with pytest.raises(BusyError, match="come again in 24 s") as raised:
        engine.check_room()
    assert raised.value.seconds == 24
    assert engine.counts["refused"] == 2
    idle(engine)
    assert engine.counts["done"] == 4


def test_the_limit_holds_in_the_queue_and_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = [0.0], list[list[int]]()
    monkeypatch.setattr("deis.serving.engine.time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter))
    engine = engine_of(seen, batch=1, seconds=10.0)
    flying, waits = engine.submit(of(0)), engine.submit(of(1))
    engine.turn()
    clock[0] = 5.0
    later = engine.submit(of(2))
    engine.turn()
    clock[0] = 10.0
    engine.turn()
    assert seen == [[0], [0], [2]]
    for future in (flying, waits):
        with pytest.raises(TimeoutError, match="took more than 10 s, the limit"):
            future.result(0)
    idle(engine)
    np.testing.assert_allclose(later.result(0), alone(of(2), network()), rtol=1e-12)
    assert engine.counts == {"expired": 2, "done": 1}


def test_wrong_limits_are_told() -> None:
    for wrong, message in (({"batch": 0}, "batch=0"), ({"queue": 0}, "queue=0"), ({"seconds": 0}, "seconds=0")):
        with pytest.raises(ValueError, match=message):
            Limits(**wrong)


# --- what goes wrong -------------------------------------------------------------------------------------------------------


def test_a_request_that_does_not_fit_fails_alone() -> None:
    engine = engine_of()
    foreign = deis.make_plan(deis.VPSDE.cosine(), "ddim", 3)
    wrong = [engine.submit(of(7)), engine.submit(Request(foreign, [1])), engine.submit(Request(DDIM, None, 2.0))]
    right = engine.submit(of(1))
    idle(engine)
    for future, message in zip(wrong, ("must lie in 0", "was made for the schedule", "needs labels"), strict=True):
        with pytest.raises(ValueError, match=message):
            future.result(0)
    np.testing.assert_allclose(right.result(0), alone(of(1), network()), rtol=1e-12)
    assert engine.counts == {"invalid": 3, "done": 1}


def test_a_network_that_fails_is_told_to_those_in_the_batch_and_the_engine_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    fails, good = [False], network()

    def net(x: Any, t: Any, labels: Any) -> Any:
        if fails[0]:
            raise RuntimeError("out of memory")
        return good.net(x, t, labels)

    engine = Engine(replace(good, net=net), Limits(batch=2), dtype="float64")
    futures = [engine.submit(of(i)) for i in range(3)]
    engine.turn()
    fails[0] = True
    with caplog.at_level(logging.ERROR):
        assert engine.turn() == 0
    assert "out of memory" in caplog.text
    for future in futures[:2]:
        with pytest.raises(NetworkError, match="the network failed: out of memory"):
            future.result(0)
    fails[0] = False
    idle(engine)
    np.testing.assert_allclose(futures[2].result(0), alone(of(2), good), rtol=1e-12)
    assert engine.counts == {"failed": 2, "done": 1}


def test_pictures_that_are_not_finite_are_none() -> None:
    def net(x: Any, t: Any, labels: Any) -> Any:
        return x * torch.tensor(np.where(np.asarray(labels) == 1, np.nan, 0.0)).reshape(-1, 1, 1, 1)

    engine = Engine(replace(network(), net=net), Limits(), dtype="float64")
    bad, good = engine.submit(of(1)), engine.submit(of(2))
    idle(engine)
    with pytest.raises(NetworkError, match="the pictures are not finite"):
        bad.result(0)
    assert np.isfinite(good.result(0)).all()


# --- the thread ------------------------------------------------------------------------------------------------------------


class Gate:
    """A network whose calls wait to be let through."""

    def __init__(self) -> None:
        self.calls, self.let = threading.Semaphore(0), threading.Semaphore(0)
        self.model = replace(network(), net=self.net)

    def net(self, x: Any, t: Any, labels: Any) -> Any:
        self.calls.release()
        self.let.acquire()
        return network().net(x, t, labels)

    def open(self) -> None:
        self.let.release(1000)


def test_to_close_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    gate = Gate()
    engine = Engine(gate.model, Limits(batch=1), dtype="float64")
    assert not engine.serves
    engine.start()
    assert engine.serves
    running, waits = engine.submit(of(0)), engine.submit(of(1))
    gate.calls.acquire()
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(engine.close, 60.0)
        while engine.serves:
            time.sleep(0.001)
        with pytest.raises(BusyError, match="the server stops; come again in 1 s"):
            engine.submit(of(2))
        assert not running.done()
        gate.open()
        closed.result(60)
    for label, future in enumerate((running, waits)):
        np.testing.assert_allclose(future.result(0), alone(of(label), network()), rtol=1e-12)


def test_what_is_not_done_after_the_grace_is_cancelled_and_the_thread_ends() -> None:
    gate = Gate()
    engine = Engine(gate.model, Limits(batch=1), dtype="float64")
    engine.start()
    futures = [engine.submit(of(0)), engine.submit(of(1))]
    gate.calls.acquire()
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(engine.close, 0.0)
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(60)
        gate.open()
        closed.result(60)
    assert not engine._thread.is_alive()
    assert engine.calls == 1
    assert engine.counts == {"cancelled": 2}


def test_many_threads_get_an_answer_each_and_nothing_is_left() -> None:
    """Twelve threads, of whom some cancel: done, refused or cancelled, and no request or picture stays in memory."""
    engine = Engine(network(), Limits(batch=4, queue=6), dtype="float64")
    engine.start()
    kept: list[weakref.ref[Any]] = []

    def ask(seed: int) -> str:
        request = of(seed % 4, ["ddim", "tab3", "ancestral"][seed % 3], seed=seed)
        kept.append(weakref.ref(request))
        try:
            future = engine.submit(request)
        except BusyError:
            return "refused"
        if seed % 5 == 0 and future.cancel():
            return "cancelled"
        np.testing.assert_allclose(future.result(60), alone(request, network()), rtol=1e-11, atol=1e-11)
        return "done"

    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(ask, seed) for seed in range(120)]
        assert not wait(futures, 120).not_done
    engine.close(60.0)
    found = [future.result() for future in futures]
    assert engine.counts == {name: found.count(name) for name in set(found)}
    assert engine.counts["done"] > 0
    assert (engine.waiting, engine.running) == (0, 0)
    del futures, found
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]
