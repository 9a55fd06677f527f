"""The web before the engine, by its own interface; and `deis serve`, a real server that is asked over HTTP."""

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import deis
from deis.cli import main
from deis.cli.serve import png
from deis.serving import app as web
from deis.serving.asked import Asked, planner
from deis.serving.engine import Engine, Limits, Request

from .test_serving import Gate, alone, network

PATIENCE = 120
"""Seconds to wait for anything, on a machine that may be busy."""
WAY = "/v1/generate"


def talk(engine: Engine, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Have a conversation with the application of an engine, in this process."""

    async def held() -> Any:
        transport = httpx.ASGITransport(web.build(engine, png))
        async with httpx.AsyncClient(transport=transport, base_url="http://deis", timeout=PATIENCE) as client:
            return await conversation(client)

    return asyncio.run(held())


def engine_of(model: deis.Pretrained | None = None, **limits: Any) -> Engine:
    return Engine(model or network(), Limits(**{"batch": 4, "queue": 2} | limits), dtype="float64")


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine at work."""
    found = engine_of()
    found.start()
    yield found
    found.close(0.0)


def pixels(body: bytes) -> NDArray[Any]:
    with Image.open(io.BytesIO(body)) as image:
        return np.asarray(image)


def numbers_of(text: str) -> dict[str, float]:
    """Return what a page of metrics says, by the name of a sample and the value of its first label."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000 * PATIENCE):
        if true():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError("it did not come")


# --- the application -------------------------------------------------------------------------------------------------------


def test_a_request_gets_the_picture_of_sample(engine: Engine) -> None:
    asked = {"nfe": 20, "class": 2, "seed": 3, "num": 3, "guidance": 2.0, "method": "sa_solver", "options": {"tau": 0.2}}
    plan = deis.make_plan(network().sde, "sa_solver", nfe=20, tau=0.2)
    assert plan.stochastic
    expected = alone(Request(plan, [2] * 3, 2.0, 3, 3), network())

    async def conversation(client: httpx.AsyncClient) -> None:
        as_png, as_npy = await asyncio.gather(*(client.post(WAY, json={**asked, "format": kind}) for kind in ("png", "npy")))
        assert (as_png.status_code, as_png.headers["content-type"]) == (200, "image/png")
        np.testing.assert_array_equal(pixels(as_png.content), pixels(png(expected)))
        assert as_npy.headers["content-type"] == "application/x-npy"
        np.testing.assert_allclose(np.load(io.BytesIO(as_npy.content)), expected, rtol=1e-11, atol=1e-11)
        plain = await client.post(WAY, json={"num": 2, "format": "npy"})  # each class in turn, by auto
        auto = Request(deis.make_plan(network().sde, nfe=10), [0, 1], num=2)
        np.testing.assert_allclose(np.load(io.BytesIO(plain.content)), alone(auto, network()), rtol=1e-11, atol=1e-11)

    talk(engine, conversation)


WRONG: list[tuple[Any, str]] = [
    ({"nfe": 0}, "nfe=0: Input should be greater than or equal to 1"),
    ({"nfe": 101}, "nfe=101: "),
    ({"nfe": 3.5}, "nfe=3.5: "),
    ({"steps": 3}, "steps=3: Extra inputs are not permitted"),
    ({"num": 5}, "num=5 must be at least 1 and at most 4, the places of the batch"),
    ({"seed": -1}, "seed=-1: "),
    ({"class": 9}, "must lie in 0 ... 3"),
    ({"class": "7"}, "class='7': "),
    ({"prompt": "a cat"}, "prompt='a cat', and this model takes none; leave it out"),
    ({"method": "tabb3"}, "method='tabb3' is unknown; did you mean 'tab3'?"),
    (
        {"method": "dpm_solver_2", "nfe": 3, "options": {"x": 1}},
        "options=['x'] are unknown; those of the method 'dpm_solver_2' are",
    ),
    ({"options": {"sde": 1}}, "options=['sde'] are unknown; those of the method 'auto' are lower_order_final"),
    ({"method": "sa_solver", "options": {"tau": -1}}, "tau=-1 must be a finite number, at least 0"),
    ({"options": {"norm": 1.0}}, "norm must be a function of (t)"),
    ([1], "the body must be an object in JSON"),
]


def test_wrong_requests_are_told_what_is_wrong(engine: Engine) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        for body, message in WRONG:
            found = await client.post(WAY, json=body)
            assert found.status_code == 422, body
            assert message in found.json()["detail"], found.text
        for raw in (b'{"nfe": 5', b'{"guidance": NaN}', b""):
            found = await client.post(WAY, content=raw, headers={"content-type": "application/json"})
            assert found.status_code == 422, raw
        found = await client.post(WAY, content=b'{"nfe": 5}')
        assert (found.status_code, "Content-Type: application/json" in found.json()["detail"]) == (422, True)

    talk(engine, conversation)
    assert engine.counts.keys() == {"invalid"}  # the class that there is not; all else never reached the engine


def test_models_without_classes_or_of_text_take_other_fields() -> None:
    plain, text = replace(network(), num_classes=None, null_class=None), replace(network(), embed=lambda prompts: (None, None))
    assert Asked(num=2).labels(plain) is None
    assert Asked(prompt="a cat", num=2).labels(text) == ["a cat", "a cat"]
    for asked, model, message in (
        (Asked.model_validate({"class": 1}), plain, "class=1, and this model has no classes"),
        (Asked.model_validate({"class": 1, "prompt": "a cat"}), text, "class=1, and this model has no classes"),
        (Asked(), text, "prompt=None, and this model is one of text; give one"),
    ):
        with pytest.raises(ValueError, match=message):
            asked.labels(model)


def test_a_plan_is_made_once_and_a_models_own_is_taken_where_it_fits() -> None:
    own = deis.make_plan(network().sde, "ddim", nfe=4)
    plan_of = planner(replace(network(), plans={4: own}))
    assert plan_of(Asked(nfe=4)) is own
    for asked in (Asked(nfe=5), Asked(nfe=4, guidance=2.0), Asked(nfe=4, method="auto"), Asked(nfe=4, method="ddim")):
        assert plan_of(asked) is not own
        assert plan_of(asked) is plan_of(asked.model_copy(update={"seed": 9, "num": 2}))
    two = ({"tau": 0.5, "lower_order_final": True}, {"lower_order_final": True, "tau": 0.5})
    assert plan_of(Asked.model_validate({"options": two[0]})) is plan_of(Asked.model_validate({"options": two[1]}))


def test_a_full_queue_answers_503_with_retry_after() -> None:
    engine = engine_of(batch=1, queue=1)  # it does not work yet
    engine.submit(Request(deis.make_plan(network().sde, "ddim", nfe=2), [0]))

    async def conversation(client: httpx.AsyncClient) -> None:
        found = await client.post(WAY, json={})
        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        assert found.json() == {"detail": "the queue is full, with 1 requests; come again in 1 s"}
        assert (await client.get("/healthz")).status_code == 503
        engine.start()
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        assert (await client.post(WAY, json={"nfe": 2})).status_code == 200
        engine.close(PATIENCE)
        found = await client.post(WAY, json={})
        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        assert "the server stops" in found.json()["detail"]
        assert (await client.get("/healthz")).status_code == 503

    talk(engine, conversation)


def test_a_request_behind_a_network_that_hangs_is_answered_with_504(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    engine = engine_of(gate.model, batch=1, seconds=1000.0)
    monkeypatch.setattr(web, "_HUNG", 0.01 - 1000.0)
    engine.start()
    hung = engine.submit(Request(deis.make_plan(network().sde, "ddim", nfe=2), [0]))
    gate.calls.acquire()
    found = talk(engine, lambda client: client.post(WAY, json={"nfe": 2}))
    assert (found.status_code, "has not answered" in found.json()["detail"]) == (504, True)
    assert not hung.done()
    gate.open()
    engine.close(PATIENCE)
    assert engine.counts == {"done": 1, "cancelled": 1}


def test_after_the_limit_the_answer_is_504() -> None:
    engine = engine_of(seconds=1e-9)
    engine.start()
    found = talk(engine, lambda client: client.post(WAY, json={"nfe": 2}))
    engine.close(PATIENCE)
    assert found.status_code == 504
    assert engine.counts["done"] == 0


def test_a_client_that_goes_away_frees_its_place() -> None:
    gate = Gate()
    engine = engine_of(gate.model, batch=1)
    engine.start()

    async def conversation(client: httpx.AsyncClient) -> None:
        goes, stays = (asyncio.create_task(client.post(WAY, json={"nfe": nfe, "class": 1})) for nfe in (100, 1))
        await until(lambda: engine.waiting == 1)
        goes.cancel()
        await asyncio.wait([goes])
        gate.open()
        assert (await stays).status_code == 200

    talk(engine, conversation)
    engine.close(PATIENCE)
    assert engine.counts == {"cancelled": 1, "done": 1}
    assert engine.calls < 4


def test_a_network_that_fails_answers_500_and_the_next_request_is_served() -> None:
    fails = [True]

    def net(x: Any, t: Any, labels: Any) -> Any:
        if fails:
            raise RuntimeError(f"out of memory {fails.pop()}")
        return 0 * x

    engine = engine_of(replace(network(), net=net))
    engine.start()

    async def conversation(client: httpx.AsyncClient) -> None:
        found = await client.post(WAY, json={})
        assert (found.status_code, found.json()) == (500, {"detail": "the network failed: out of memory True"})
        assert (await client.post(WAY, json={})).status_code == 200

    talk(engine, conversation)
    engine.close(PATIENCE)


def test_a_long_body_is_refused_before_it_is_read(engine: Engine) -> None:
    sent = [0]

    async def parts() -> Any:
        for _ in range(1000):
            sent[0] += 1
            yield b" " * 10_000

    async def conversation(client: httpx.AsyncClient) -> None:
        found = await client.post(WAY, content=parts(), headers={"content-type": "application/json"})
        assert found.status_code == 413
        assert sent[0] == 7

    talk(engine, conversation)


def test_metrics_tell_what_became_of_requests(engine: Engine) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        await client.post(WAY, json={"nfe": 3, "num": 2})
        await client.post(WAY, json={"nfe": 3, "class": 8})
        found = await client.get("/metrics")
        assert found.headers["content-type"].startswith("text/plain")
        numbers = numbers_of(found.text)
        assert numbers["deis_requests_total done"] == numbers["deis_requests_total invalid"] == 1
        assert (numbers["deis_network_calls_total"], numbers["deis_evaluations_total"]) == (3, 6)
        assert numbers["deis_requests_waiting"] == numbers["deis_samples_in_flight"] == 0
        assert numbers["deis_request_seconds_count"] == 1
        assert numbers["process_resident_memory_bytes"] > 1e6

    talk(engine, conversation)


# --- the server ------------------------------------------------------------------------------------------------------------


@contextmanager
def served(said: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process of `deis serve` with the bundled network, and its address; what it says goes into a file."""
    limits = ["--max-batch", "8", "--queue", "40", "--grace", str(PATIENCE)]
    command = ["-c", "from deis.cli import main; main()", "serve", "--port", "0", *limits]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path)}
    with said.open("w") as file, subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment) as process:
        try:
            end = time.monotonic() + PATIENCE
            while not (found := re.search(r"deis serve is at (http://127\.0\.0\.1:\d+)/", said.read_text())):
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < end, "it does not start"
                time.sleep(0.05)
            yield process, found.group(1)
        finally:
            process.kill()


def metrics(address: str) -> dict[str, float]:
    return numbers_of(httpx.get(f"{address}/metrics", timeout=PATIENCE).text)


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
def test_a_real_server_from_its_start_to_its_stop(tmp_path: Path) -> None:
    with served(tmp_path / "said.txt") as (process, address):
        assert "POST /v1/generate" in httpx.get(address, timeout=PATIENCE).text
        twenty_at_once_get_the_pictures_of_sample_alone(address)
        a_connection_that_is_cut_frees_its_place(address)
        sigterm_finishes_what_runs_refuses_what_comes_and_ends_with_0(process, address)
    assert "Traceback" not in (tmp_path / "said.txt").read_text()


def twenty_at_once_get_the_pictures_of_sample_alone(address: str) -> None:
    model = deis.load_model(dtype="float64")
    asked = [{"nfe": 3 + i % 3, "class": i % 10, "seed": i, "guidance": 1.0 if i % 9 else 2.0} for i in range(20)]

    def ask(body: dict[str, Any]) -> httpx.Response:
        return httpx.post(address + WAY, json={**body, "format": "npy"}, timeout=PATIENCE)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, asked))
    assert {answer.status_code for answer in answers} == {200}
    for i in (0, 3, 10, 19):  # with guidance and without
        body: Any = asked[i]
        plan = model.plan(body["nfe"]) if body["guidance"] == 1 else deis.make_plan(model.sde, nfe=body["nfe"])
        request = Request(plan, [body["class"]], body["guidance"], body["seed"])
        found = np.load(io.BytesIO(answers[i].content))
        np.testing.assert_allclose(found, alone(request, model), rtol=0, atol=1e-5)
    numbers = metrics(address)
    assert numbers["deis_requests_total done"] == 20
    assert numbers["deis_network_calls_total"] < numbers["deis_evaluations_total"] / 2  # they shared their calls


def a_connection_that_is_cut_frees_its_place(address: str) -> None:
    body = b'{"nfe": 100}'
    head = f"POST {WAY} HTTP/1.1\r\nHost: deis\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: metrics(address)["deis_samples_in_flight"] == 1)
    wait_for(lambda: metrics(address)["deis_requests_total cancelled"] == 1)
    assert metrics(address)["deis_samples_in_flight"] == 0
    assert metrics(address)["deis_requests_total done"] == 20


def sigterm_finishes_what_runs_refuses_what_comes_and_ends_with_0(process: subprocess.Popen[bytes], address: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(httpx.post, address + WAY, json={"nfe": 30, "class": i}, timeout=PATIENCE) for i in range(4)]
        wait_for(lambda: metrics(address)["deis_samples_in_flight"] == 4)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{address}/healthz", timeout=PATIENCE).status_code == 503)
        refused = httpx.post(address + WAY, json={}, timeout=PATIENCE)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert not any(one.done() for one in running)
        answers = [one.result(PATIENCE) for one in running]
    assert {(answer.status_code, pixels(answer.content).shape) for answer in answers} == {(200, (56, 56))}
    assert process.wait(PATIENCE) == 0


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["serve", "--port", str(port)])
    assert done.exit_code == 1
    assert f"--port {port} cannot be listened on" in done.output


def test_the_command_says_what_fastapi_is_missing_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deis.serving.app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = CliRunner().invoke(main, ["serve", "--port", "0"])
    assert done.exit_code == 1
    assert "deis serve needs the extra 'serve'" in done.output
