"""What the lab does: requests to pictures, to their trajectories, to distances, and to code."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import AnyArray, Array
from ..calibration.network import rmse
from ..draws import drawn, streams
from ..evaluation import converged
from ..model.predictions import Denoiser, Level, coefficients, evaluate
from ..model.pretrained import Pretrained
from ..plan import Plan
from ..run import sample
from .choices import Choice, Request
from .library import Library

CONVERGED_STEPS = 64
_KEPT, _MOST_SEEN = 32, 12


@dataclass(frozen=True)
class Evaluation:
    """Evaluation i of the network, from 0: the state x that it was given at the time t, and the data x_0 that it predicts there.

    Both of shape (num, channels, height, width), in float32.
    """

    i: int
    t: float
    alpha: float
    sigma: float
    x: AnyArray
    x_0: AnyArray


@dataclass(frozen=True)
class Result:
    """What a request gave.

    Attributes
    ----------
    plan : Plan
    images : array of shape (num, channels, height, width)
        In [-1, 1], up to what the sampler makes of them.
    evaluations : tuple of Evaluation
        At most twelve, evenly spaced: the first and the last are among them.
    notes : list of str
        What the library warns of.
    seconds : float
        The wall time of sampling.
    """

    plan: Plan
    images: AnyArray
    evaluations: tuple[Evaluation, ...]
    notes: list[str]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Two results from the same noise.

    Attributes
    ----------
    results : pair of Result
    converged : array of shape (num, channels, height, width)
        The images of the probability flow in many steps, from the same noise.
    distances : array of shape (2, num)
        The root mean square difference of each image to its converged one, data in [-1, 1].
    error : float
        The median difference between the converged solution and that of half as many steps.
    """

    results: tuple[Result, Result]
    converged: AnyArray
    distances: Array
    error: float


@dataclass
class _Recorder:
    """A denoiser's model that keeps what it was given and what it predicts, at the evaluations of these numbers."""

    denoiser: Denoiser
    kept: frozenset[int]
    count: int = 0
    seen: list[Evaluation] = field(default_factory=list)

    def __call__(self, x: Any, t: Any) -> Any:
        return self.denoiser(x, t)

    def at(self, x: Any, t: Any, level: Level) -> Any:
        m = evaluate(self.denoiser.model, x, t, level)
        if self.count in self.kept:
            c_x, c_m = coefficients(self.denoiser.predicts, "x0", level.alpha, level.sigma)
            x_0 = _numpy(c_x * x + c_m * m)
            self.seen.append(Evaluation(self.count, level.t, level.alpha, level.sigma, _numpy(x), x_0))
        self.count += 1
        return m


def _numpy(x: Any) -> AnyArray:
    return x.detach().float().cpu().numpy().copy()


def run(request: Request, model: Pretrained) -> Result:
    """Make the pictures of a request.

    Raises
    ------
    ValueError
        For a plan that cannot be built, a class that the model does not have, or predictions that are not finite.
    """
    import torch

    plan, notes = request.choice.plan(model)
    denoiser = model.conditional(request.labels(model), request.guidance)
    kept = np.linspace(0, plan.nfe - 1, min(plan.nfe, _MOST_SEEN)).round().astype(int)
    recorder = _Recorder(denoiser, frozenset(kept.tolist()))
    numbers = range(request.num)
    x_T = torch.from_numpy(drawn(numbers, model.shape, float(plan.sigma[0]), request.seed))
    rng = streams(x_T, numbers, request.seed) if plan.stochastic else None
    start = time.perf_counter()
    x_0 = sample(plan, replace(denoiser, model=recorder), x_T, rng=rng, check_finite=True)
    images = x_0 if model.decode is None else model.decode(x_0)
    seconds = time.perf_counter() - start
    return Result(plan, _numpy(images), tuple(recorder.seen), notes, seconds)


def code_of(request: Request, model: Pretrained, path: Path | None) -> str:
    """Return Python code that makes the pictures of a request and writes them, side by side, to lab.png."""
    plan, _ = request.choice.plan(model)
    labels = request.labels(model)
    guidance = "" if request.guidance == 1 else f", guidance={request.guidance!r}"
    condition = "" if labels is None else _labels_code(labels) + guidance
    x_0 = "deis.sample(plan, denoiser, x_T, rng=rng)" if plan.stochastic else "deis.sample(plan, denoiser, x_T)"
    x_0 = x_0 if model.decode is None else f"model.decode({x_0})"
    return f"""import deis
import numpy as np
import torch
from PIL import Image

model = deis.load_model({"" if path is None else repr(str(path))})
plan = {request.choice.code()}
streams = [np.random.default_rng(({request.seed}, i)) for i in range({request.num})]
noise = np.stack([stream.standard_normal(model.shape, dtype=np.float32) for stream in streams])
x_T = torch.from_numpy(noise * np.float32(plan.sigma[0]))
denoiser = model.conditional({condition})
{_rng_code(request) if plan.stochastic else ""}x_0 = {x_0}.numpy()

pixels = np.rint((x_0.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
row = np.concatenate([*pixels], axis=-1).transpose(1, 2, 0)
Image.fromarray(row.squeeze()).save("lab.png")
"""


def _rng_code(request: Request) -> str:
    return (
        f"seeds = [np.random.SeedSequence(({request.seed}, i, 1)).generate_state(1)[0] for i in range({request.num})]\n"
        "rng = [torch.Generator().manual_seed(int(seed)) for seed in seeds]\n"
    )


def _labels_code(labels: list[Any]) -> str:
    return f"[{labels[0]!r}] * {len(labels)}" if len({*labels}) == 1 else repr(labels)


@dataclass
class Session:
    """The lab at work: its models, and the converged pictures that it has made so far.

    Attributes
    ----------
    library : Library
    """

    library: Library
    _converged: dict[tuple[Any, ...], tuple[AnyArray, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, request: Request) -> Result:
        """Return the pictures of a request; see `run`."""
        return run(request, self.library.load(request.model))

    def code(self, request: Request) -> str:
        """Return the code of a request; see `code_of`."""
        return code_of(request, self.library.load(request.model), self.library.path(request.model))

    def plan(self, request: Request) -> tuple[Plan, list[str]]:
        """Return the plan of a request, and what the library warns of; no network is run."""
        return request.choice.plan(self.library.load(request.model))

    def compare(self, request: Request, other: Choice) -> Comparison:
        """Return the pictures of a request and of another choice from the same noise, and their distances to the converged ones.

        Raises
        ------
        ValueError
            As `run`, of either.
        """
        other.plan(self.library.load(request.model))  # told before the first is run
        results = self.run(request), self.run(replace(request, choice=other))
        images, error = self.converged(request)
        flat = [result.images.astype(np.float64) for result in results]
        return Comparison(results, images, np.stack([rmse(found, images) for found in flat]), error)

    def converged(self, request: Request) -> tuple[AnyArray, float]:
        """Return the pictures of the probability flow in 64 steps, and by how much those of 32 differ; made once for each noise."""
        key = (request.model, request.guidance, request.label, request.prompt, request.seed, request.num)
        with self._lock:
            if key not in self._converged:
                self._converged[key] = _solve(request, self.library.load(request.model))
                while len(self._converged) > _KEPT:
                    self._converged.pop(next(iter(self._converged)))
            return self._converged[key]


def _solve(request: Request, model: Pretrained) -> tuple[AnyArray, float]:
    """Return the converged pictures of a request; see `deis.evaluation.converged`."""
    import torch

    sigma = float(model.sde.sigma(model.sde.t_start))
    x_T = torch.from_numpy(drawn(range(request.num), model.shape, sigma, request.seed))
    labels = request.labels(model)
    make: Callable[..., Any] | Pretrained = model if labels is None else partial(model.conditional, guidance=request.guidance)
    x_0, error = converged(make, x_T, CONVERGED_STEPS, condition=labels)
    images = x_0 if model.decode is None else _numpy(model.decode(torch.from_numpy(x_0.astype(np.float32))))
    return images, error
