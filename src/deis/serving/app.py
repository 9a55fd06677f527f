"""The web before the engine: requests in JSON, pictures, health and metrics, by FastAPI; and its life from start to stop."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..arguments import shown
from ..arrays import AnyArray
from ..extras import needs
from .asked import Asked, planner
from .engine import OUTCOMES, BusyError, Engine, NetworkError, Request

with needs("serve", "deis serve"):
    import uvicorn
    from fastapi import FastAPI, HTTPException
    from fastapi import Request as Http
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, ProcessCollector, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 1 << 16
"""The most bytes of a request's body."""
_HUNG = 5.0
"""Seconds after the limit at which a request is answered without the engine, whose network does not come back."""
_LAST_ANSWERS = 10
"""Seconds in which the last answers are sent, at the end."""
_ABOUT = """deis serve: samples of a diffusion model, each request with its own plan, in one running batch.

POST /v1/generate  {"nfe": 10, "class": 7, "seed": 0} and method, options, prompt, guidance, num, format (png or npy)
GET  /healthz      200 while requests are taken
GET  /metrics      for Prometheus
GET  /openapi.json the fields of a request
"""


def build(engine: Engine, png: Callable[[AnyArray], bytes]) -> FastAPI:
    """Return the web application of an engine; `png` writes images of shape (n, channels, height, width) in [-1, 1] as a file."""
    app = FastAPI(title="deis serve", docs_url=None, redoc_url=None)  # whose pages load scripts from elsewhere
    app.add_middleware(Bounded)
    plan_of, (registry, seconds), limit = planner(engine.model), metrics_of(engine), engine.limits.seconds

    @app.post("/v1/generate", response_class=Response)
    async def generate(asked: Asked, http: Http) -> Response:
        start = time.perf_counter()
        with _statuses():
            engine.check_room()
            plan = await asyncio.wait_for(asyncio.to_thread(plan_of, asked), limit)  # neither in this thread nor in the engine's
            request = Request(plan, asked.labels(engine.model), asked.guidance, asked.seed, asked.num)
            images = await result_of(engine.submit(request), http, limit + _HUNG)
        if images is None:
            return Response(status_code=499)  # nobody reads it
        write, kind = (png, "image/png") if asked.format == "png" else (npy, "application/x-npy")
        body = await asyncio.to_thread(write, images)
        seconds.observe(time.perf_counter() - start)
        return Response(body, media_type=kind)

    @app.get("/healthz")
    async def health() -> Response:
        serves = engine.serves
        return JSONResponse({"status": "ok" if serves else "stopping"}, 200 if serves else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def about() -> Response:
        return PlainTextResponse(_ABOUT)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Http, error: RequestValidationError) -> Response:
        return JSONResponse({"detail": "; ".join(map(_told, error.errors()))}, 422)

    return app


def _told(error: dict[str, Any]) -> str:
    """Return what pydantic found wrong with a field as the library says it: the argument, its value and the cure."""
    name = ".".join(map(str, error["loc"][1:]))
    if not name or error["type"] == "json_invalid":
        return "the body must be an object in JSON, under the header Content-Type: application/json"
    return f"{name}={shown(error.get('input'))}: {error['msg']}"


@contextmanager
def _statuses() -> Iterator[None]:
    """Turn the errors inside into statuses of HTTP."""
    try:
        yield
    except BusyError as error:
        raise HTTPException(503, str(error), {"Retry-After": str(error.seconds)}) from error
    except (TimeoutError, asyncio.TimeoutError) as error:  # two classes until Python 3.11
        raise HTTPException(504, str(error) or "making the plan took too long; ask for a plain method") from error
    except NetworkError as error:
        raise HTTPException(500, str(error)) from error
    except (TypeError, ValueError) as error:
        raise HTTPException(422, str(error)) from error


async def result_of(future: Future[AnyArray], http: Http, seconds: float) -> AnyArray | None:
    """Wait for a result; None if the client goes away, which cancels the request.

    Raises
    ------
    BusyError
        If the engine stops before it is done.
    TimeoutError
        If there is no answer after so many seconds.
    """
    result, gone = asyncio.wrap_future(future), asyncio.ensure_future(_gone(http))
    either: set[asyncio.Future[Any]] = {result, gone}
    try:
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if result.cancelled():
            raise BusyError("the server stopped before the request was done; come again in 1 s", 1)
        if result.done():
            return result.result()
        if gone.done():
            return None
        raise TimeoutError(f"the network has not answered for {seconds:g} s")
    finally:
        gone.cancel()
        future.cancel()


async def _gone(http: Http) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def npy(images: AnyArray) -> bytes:
    """Return images as a file that `numpy.load` reads."""
    file = io.BytesIO()
    np.save(file, images)
    return file.getvalue()


class Bounded:
    """Refuse a body that is too long, whatever its headers say, before it is read to the end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MOST_BYTES:
                raise HTTPException(413, f"the body has more than {MOST_BYTES} bytes; a request needs a few hundred")
            return message

        await self.app(scope, counted, send)


class _Numbers:
    """The numbers of an engine, read when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        engine = self.engine
        requests = CounterMetricFamily("deis_requests", "Requests by what became of them.", labels=["outcome"])
        for outcome in OUTCOMES:
            requests.add_metric([outcome], engine.counts[outcome])
        yield requests
        yield CounterMetricFamily("deis_network_calls", "Calls of the network.", engine.calls)
        yield CounterMetricFamily("deis_evaluations", "Samples in the calls of the network.", engine.evaluations)
        yield GaugeMetricFamily("deis_requests_waiting", "Requests in the queue.", engine.waiting)
        yield GaugeMetricFamily("deis_samples_in_flight", "Samples in the batch.", engine.running)


def metrics_of(engine: Engine) -> tuple[CollectorRegistry, Histogram]:
    """Return what `/metrics` shows, and the histogram of the seconds of requests that were done."""
    registry = CollectorRegistry()
    registry.register(_Numbers(engine))
    ProcessCollector(registry=registry)
    buckets = [engine.limits.seconds * part for part in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)]
    return registry, Histogram("deis_request_seconds", "From the request to its pictures.", registry=registry, buckets=buckets)


def launch(app: FastAPI, engine: Engine, listener: socket.socket, grace: float) -> None:
    """Serve until SIGTERM or Ctrl+C; then refuse new requests, finish the accepted ones for `grace` seconds, and return.

    The web has a thread of its own, and this one waits for the signal: while the engine finishes, the web still answers.

    Raises
    ------
    RuntimeError
        If the web server does not start, or ends by itself.
    """
    config = uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=_LAST_ANSWERS)
    server, ended = uvicorn.Server(config), threading.Event()

    def run() -> None:
        try:
            server.run([listener])
        finally:
            ended.set()

    web = threading.Thread(target=run, name="deis web", daemon=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the wait below by KeyboardInterrupt
    try:
        engine.start()
        web.start()
        while not (server.started or ended.wait(0.02)):  # no join: until Python 3.13, one that is interrupted counts as done
            pass
        if not server.started:
            raise RuntimeError("the web server did not start; what it says above is why")
        host, port = listener.getsockname()[:2]
        print(f"deis serve is at http://{f'[{host}]' if ':' in host else host}:{port}/; press Ctrl+C to end it", flush=True)
        ended.wait()
        raise RuntimeError("the web server ended by itself; what it says above is why")
    except KeyboardInterrupt:
        print(f"finishing what was accepted, for at most {grace:g} s; press Ctrl+C again to end at once", flush=True)
        engine.close(grace)
        server.should_exit = True
        web.join()
