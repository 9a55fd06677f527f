"""The engine of a server: a thread that owns a Stepper, and a bounded queue before it. It knows nothing of the web."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from ..arguments import number, whole
from ..arrays import AnyArray
from ..draws import drawn, streams
from ..model.pretrained import Pretrained
from ..plan import Plan
from ..run.stepper import Stepper

OUTCOMES = ("done", "refused", "invalid", "cancelled", "expired", "failed")
"""What becomes of a request."""
_LAST_CALL = 10.0
"""Seconds that the end of an engine waits for the call of the network that is under way."""


class BusyError(RuntimeError):
    """A request is refused: the queue is full, or the engine stops. It may come again after so many `seconds`."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class NetworkError(RuntimeError):
    """The network failed, or its pictures are not finite."""


@dataclass(frozen=True)
class Limits:
    """What the engine takes.

    Attributes
    ----------
    batch : int
        The most samples in one call of the network; a guided sample is two rows of the network's batch.
    queue : int
        The most requests that wait for a place in the batch.
    seconds : float
        The most that a request takes, the wait in the queue included.
    """

    batch: int = 16
    queue: int = 64
    seconds: float = 60.0

    def __post_init__(self) -> None:
        whole("batch", self.batch)
        whole("queue", self.queue)
        number("seconds", self.seconds, above=0)


@dataclass(frozen=True, eq=False)
class Request:
    """Pictures by one plan: picture i of a seed is that of `deis.sample` alone, with the noise of `deis sample`.

    Attributes
    ----------
    plan : Plan
    labels : sequence, optional
        One entry a picture, as `Pretrained.conditional` takes them.
    guidance : float
    seed, num : int
        Picture i, of 0 ... num - 1, depends on the seed and on i alone.
    """

    plan: Plan
    labels: Any = None
    guidance: float = 1.0
    seed: int = 0
    num: int = 1


@dataclass(frozen=True, eq=False)
class _Job:
    """An accepted request."""

    request: Request
    deadline: float
    future: Future[AnyArray] = field(default_factory=Future)


class Engine:
    """Continuous batching: at each step those who wait join the batch, those who are done leave it, and one call serves all.

    `submit` is for any thread. The rest happens in one thread, between two calls of the network: `start` begins it and `close`
    ends it. Whoever has a loop already calls `turn` from there instead, and starts nothing.

    Requests enter in the order of arrival. One of many pictures waits until all of them fit, and those behind it wait with it.

    Parameters
    ----------
    model : Pretrained
        In torch.
    limits : Limits
    device, dtype : str
        Those that the model was loaded for.

    Attributes
    ----------
    counts : Counter
        Requests by their outcome, one of `OUTCOMES`.
    calls, evaluations : int
        Calls of the network, and the samples in them.
    """

    def __init__(self, model: Pretrained, limits: Limits, *, device: str = "cpu", dtype: str = "float32") -> None:
        self.model, self.limits = model, limits
        self.counts: Counter[str] = Counter()
        self.calls, self.evaluations = 0, 0
        self._device, self._dtype = device, dtype
        self._stepper = Stepper(model)
        self._pace, self._busy = 0.0, 0.0
        self._news = threading.Condition()  # guards the three below
        self._open = True
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._thread = threading.Thread(target=self._run, name="deis engine", daemon=True)

    # --- for any thread

    def submit(self, request: Request) -> Future[AnyArray]:
        """Take a request, and return the future of its pictures; to cancel the future frees the place at the next step.

        Returns
        -------
        Future of an array of shape (num, channels, height, width)
            It may also raise what `Stepper.add` does where the request does not fit the model, `TimeoutError` after the limit, or
            `NetworkError`. A future that is cancelled though nobody did so was dropped by `close`.

        Raises
        ------
        BusyError
            If the queue is full, or the engine stops.
        ValueError
            If the request has more pictures than the batch has places.
        """
        if not 1 <= request.num <= self.limits.batch:
            raise ValueError(f"num={request.num} must be at least 1 and at most {self.limits.batch}, the places of the batch")
        with self._news:
            self.check_room()
            job = _Job(request, time.monotonic() + self.limits.seconds)
            self._waiting.append(job)
            self._news.notify()
        return job.future

    def check_room(self) -> None:
        """Check that a request would be taken now.

        Raises
        ------
        BusyError
            As `submit`.
        """
        with self._news:
            full = len(self._waiting) >= self.limits.queue
            if self._open and not full:
                return
            self.counts["refused"] += 1
            seconds = max(1, math.ceil(self._pace * len(self._waiting)))  # by then those who wait now have entered
        why = f"the queue is full, with {self.limits.queue} requests" if self._open else "the server stops"
        raise BusyError(f"{why}; come again in {seconds} s", seconds)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self, grace: float = 0.0) -> None:
        """Refuse new requests, finish the accepted ones for so many seconds, cancel those that are left, and end the thread."""
        with self._news:
            self._open = False
            self._news.notify()
        self._thread.join(grace)
        for job in self._jobs():
            job.future.cancel()
        self._thread.join(_LAST_CALL)

    @property
    def serves(self) -> bool:
        """Whether new requests are taken and worked on."""
        return self._open and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """The requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The samples in the batch."""
        with self._news:
            return sum(job.request.num for job in self._running)

    # --- in the thread of the engine

    def _jobs(self) -> list[_Job]:
        """Return the accepted requests that are not done."""
        with self._news:
            return [*self._waiting, *self._running]

    def _run(self) -> None:
        while self._has_work():
            self.turn()

    def _has_work(self) -> bool:
        """Wait until there is work; return False if the engine is closed and there is none."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._running or not self._open)
            return bool(self._waiting or self._running)

    def turn(self) -> int:
        """Take out who is gone, let in who fits, make one call for all and hand over what is done; return the samples in the call.

        If the network fails, the requests that were in the batch fail with its message, and the next turn begins anew.
        """
        start, before = time.perf_counter(), self.counts["done"]
        try:
            self._drop()
            self._admit()
            evaluated = self._stepper.step()
            for job, x_0 in self._stepper.finished().items():
                self._hand_over(job, x_0)
        except Exception as error:
            self._fail(error)
            return 0
        self.calls, self.evaluations = self.calls + bool(evaluated), self.evaluations + evaluated
        self._measure(time.perf_counter() - start, self.counts["done"] - before)
        return evaluated

    def _drop(self) -> None:
        """Take out those who were cancelled, or whose time is over."""
        now = time.monotonic()
        for job in self._jobs():
            if job.future.cancelled() or now >= job.deadline:
                if job in self._running:
                    self._stepper.cancel(job)
                self._leave(job, "expired", TimeoutError(f"the request took more than {self.limits.seconds:g} s, the limit"))

    def _admit(self) -> None:
        """Let in those who fit, in the order of arrival."""
        while (job := self._next()) is not None:
            try:
                self._add(job)
            except (TypeError, ValueError) as error:
                self._leave(job, "invalid", error)
            except Exception as error:  # of a network that reads prompts
                self._leave(job, "failed", _failed(error))

    def _next(self) -> _Job | None:
        """Move the first in the queue into the batch and return it, if it fits."""
        with self._news:
            if not self._waiting or self.running + self._waiting[0].request.num > self.limits.batch:
                return None
            job = self._waiting.popleft()
            self._running.add(job)
            return job

    def _add(self, job: _Job) -> None:
        """Give a request to the stepper; its noise is drawn only here, so that those who wait hold no memory."""
        request, numbers = job.request, range(job.request.num)
        noise = drawn(numbers, self.model.shape, float(request.plan.sigma[0]), request.seed).astype(self._dtype)
        x_T = torch.from_numpy(noise).to(self._device)
        rng = streams(x_T, numbers, request.seed) if request.plan.stochastic else None
        self._stepper.add(request.plan, x_T, job, labels=request.labels, guidance=request.guidance, rng=rng)

    def _hand_over(self, job: Any, x_0: torch.Tensor) -> None:
        """Give a request its pictures, or say that they are none."""
        with torch.no_grad():
            images = x_0 if self.model.decode is None else self.model.decode(x_0)
        if bool(torch.isfinite(images).all()):
            self._leave(job, "done", images.cpu().numpy())
        else:
            self._leave(job, "failed", NetworkError("the pictures are not finite; give another plan, or the network another dtype"))

    def _fail(self, error: Exception) -> None:
        """Let all in the batch fail by an error of the network, and begin with an empty one."""
        logging.getLogger(__name__).error("the network failed", exc_info=error)
        self._stepper = Stepper(self.model)
        for job in [*self._running]:  # no other thread changes it
            self._leave(job, "failed", _failed(error))

    def _leave(self, job: _Job, outcome: str, result: AnyArray | Exception) -> None:
        """Take a request out of the queue or the batch, with its result; whoever cancelled it meanwhile gets none."""
        with self._news:
            if job in self._running:
                self._running.remove(job)
            else:
                self._waiting.remove(job)
        tell: Callable[[Any], None] = job.future.set_exception if isinstance(result, Exception) else job.future.set_result
        waits = job.future.set_running_or_notify_cancel()
        self.counts[outcome if waits else "cancelled"] += 1
        if waits:
            tell(result)

    def _measure(self, seconds: float, done: int) -> None:
        """Keep the seconds that the engine works for a request: a moving average over the last ones."""
        self._busy += seconds
        if done:
            found = self._busy / done
            self._pace = found if self._pace == 0 else self._pace + 0.2 * (found - self._pace)
            self._busy = 0.0


def _failed(error: Exception) -> NetworkError:
    return NetworkError(f"the network failed: {error}")
