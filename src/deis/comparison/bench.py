"""Measurements: a plan is run once on the common noise, timed, and set against the reference; what is measured is kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import AnyArray, Array
from ..backends import like, to_numpy
from ..calibration.network import Network, rmse
from ..calibration.teacher import Teacher
from ..draws import streams
from ..features import Extractor, features
from ..files import replacing
from ..foreign import is_jax, is_torch
from ..grids import VP_START, vp_time
from ..methods import make_plan
from ..model.predictions import Denoiser, times
from ..plan import Plan
from ..run import sample

Measured = dict[str, AnyArray]
"""x_0, seconds, bare (those within the network), vp_t and error of shape (num_step + 1,), and features: of all samples."""


@dataclass
class Bench:
    """A network on its noise, the reference, and a folder for what is measured.

    Attributes
    ----------
    network : Network
    teacher : Teacher
        The reference trajectories.
    seed : int
        Of the random numbers of stochastic plans.
    extractor : callable, optional
    decode : callable, optional
        Samples -> images, for the extractor.
    folder : path, optional
        Where each measurement is kept.
    progress : optional
        A tqdm bar, told of the evaluations of each sample.
    """

    network: Network
    teacher: Teacher
    seed: int = 0
    extractor: Extractor | None = None
    decode: Callable[[Any], Any] | None = None
    folder: Path | None = None
    progress: Any = None
    _warm: bool = False

    def measure(self, plan: Plan) -> Measured:
        """Return what is measured of a plan; from the folder where it is there."""
        return self._kept(self._name(plan), partial(self._measured, plan))

    def missing(self, plans: list[Plan]) -> int:
        """Return the evaluations, of a sample each, that measuring these plans still takes."""

        todo = (plan for plan in plans if self.folder is None or not (self.folder / f"{self._name(plan)}.npz").exists())
        return len(self.network.x_T) * sum(plan.nfe for plan in todo)

    def images(self, x_0: AnyArray) -> AnyArray:
        """Return the images of samples: themselves, or what latents decode to."""
        return x_0 if self.decode is None else to_numpy(self.decode(like(x_0, self.network.x_T)))

    def _name(self, plan: Plan) -> str:
        seed = self.seed if plan.stochastic else None
        text = json.dumps(
            [plan.document()["sha256"], seed, self.extractor is not None, self.network.batch]
        )  # which the times are of
        return f"cell-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _kept(self, name: str, measured: Callable[[], Measured]) -> Measured:
        if self.folder is None:
            return measured()
        path = self.folder / f"{name}.npz"
        if path.exists():
            with np.load(path) as arrays:
                return dict(arrays)
        found = measured()
        with replacing(path) as partial_path, partial_path.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        return found

    def _measured(self, plan: Plan) -> Measured:
        network, parts = self.network, []
        self.warm()
        for first in range(0, len(network.x_T), network.batch):
            parts.append(self._batch(plan, first, min(first + network.batch, len(network.x_T))))
        names = set.intersection(*map(set, parts)) - {"seconds", "bare", "errors"}  # a part that is not finite has no features
        found = {name: np.concatenate([part[name] for part in parts]) for name in names}
        errors = np.concatenate([part["errors"] for part in parts], axis=1)
        with np.errstate(invalid="ignore"):
            found["error"] = np.median(errors, axis=1)
        found["vp_t"] = _clock(plan)
        for name in ("seconds", "bare"):
            found[name] = np.array(sum(part[name] for part in parts))
        return found

    def _batch(self, plan: Plan, first: int, last: int) -> Measured:
        x_T, denoiser = self.network.x_T[first:last], self.network.denoiser(first, last)
        rng = streams(x_T, range(first, last), self.seed) if plan.stochastic else None
        watch = _Watch(denoiser.model)
        model = denoiser if is_jax(x_T) else replace(denoiser, model=watch)
        run: Callable[[Any], Any] = partial(sample, plan, model, rng=rng, trajectory=True)
        if is_jax(x_T):
            import jax

            run = jax.jit(run)
            to_numpy(run(x_T))  # compiled, and not timed
        start = time.perf_counter()
        states = run(x_T)
        x_0 = to_numpy(states[-1])
        seconds = time.perf_counter() - start
        if is_jax(x_T):
            watch.seconds = _compiled_calls(denoiser, x_T, plan.nfe)
        self._tell((last - first) * plan.nfe)
        found: Measured = {"seconds": np.array(seconds), "bare": np.array(watch.seconds)}
        found |= {"x_0": x_0.astype(self._dtype), "errors": self._errors(plan, states, first)}
        if self.extractor is not None and np.isfinite(x_0).all():
            found["features"] = features(self.extractor, self.images(x_0))
        return found

    def _errors(self, plan: Plan, states: Any, first: int) -> AnyArray:
        """Return the distance of the states to the reference, over the size of noisy data of deviation 1, shape (steps + 1, batch).

        The states of a fitted plan lie near its times and not at them, so that of such a plan only the end is compared.
        """
        alpha, sigma = _levels(plan)
        errors = np.full((len(plan.ts), states.shape[1]), np.nan)
        for i in range(len(plan.ts)):
            if i == plan.num_step or not plan.fitted:
                x_t = to_numpy(states[i])
                with np.errstate(all="ignore"):
                    apart = rmse(x_t, self.teacher.state(plan.ts[i])[first : first + len(x_t)])
                errors[i] = apart / np.hypot(alpha[i], sigma[i])
        return errors

    @property
    def _dtype(self) -> Any:
        return np.float32 if self.network.x_T.dtype.itemsize <= 4 else np.float64

    def warm(self) -> None:
        """Call the network once, so that what only the first call of a process pays for is timed nowhere."""
        if not self._warm:
            self._warm = True
            last = min(self.network.batch, len(self.network.x_T))
            sample(make_plan(self.network.sde, nfe=1), self.network.denoiser(0, last), self.network.x_T[:last])

    def _tell(self, evaluations: int) -> None:
        if self.progress is not None:
            self.progress.update(evaluations)


@dataclass
class _Watch:
    """A model that times its own calls: the network alone, in the very run that is timed, whatever else the machine does."""

    model: Any
    seconds: float = 0.0

    def __call__(self, x: Any, t: Any) -> Any:
        return self.at(x, t, None)

    def at(self, x: Any, t: Any, level: Any) -> Any:
        _wait(x)
        start = time.perf_counter()
        at = getattr(self.model, "at", None)
        m = self.model(x, t) if at is None else at(x, t, level)
        _wait(m)
        self.seconds += time.perf_counter() - start
        return m


def _wait(x: Any) -> None:
    """Wait for the device that computes an array, where it is not the host."""
    if is_torch(x) and x.device.type != "cpu":
        to_numpy(x[:1])


def _compiled_calls(denoiser: Denoiser, x: Any, calls: int) -> float:
    """Return the seconds of so many calls of a network of JAX alone, compiled: within a compiled run nothing can be timed."""
    import jax

    level, t = denoiser.level(denoiser.sde.t_start), times(x, denoiser.sde.t_start, denoiser.sde.num_times)
    call = jax.jit(lambda x: denoiser.at(x, t, level))
    to_numpy(call(x))
    start = time.perf_counter()
    for _ in range(calls):
        to_numpy(call(x)[:1])
    return time.perf_counter() - start


def _levels(plan: Plan) -> tuple[Array, Array]:
    """Return alpha and sigma at `plan.ts`."""
    accepted = np.concatenate([[True], plan.accepts])
    return plan.alpha[accepted], plan.sigma[accepted]


def _clock(plan: Plan) -> Array:
    """Return the times at which the linear VP schedule has the noise levels of `plan.ts`."""
    alpha, sigma = _levels(plan)
    with np.errstate(divide="ignore"):
        found = vp_time(np.log(sigma) - np.log(alpha))
    return np.where(np.isfinite(found), found, VP_START)
