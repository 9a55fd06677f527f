"""A loop for servers: requests come and go, each with its own plan, and one call of the network a step evaluates them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import check_state, shown
from ..arrays import Array
from ..backends import backend_of
from ..model.mixture import lifted, weights
from ..model.predictions import Denoiser, Predictor, check_model
from ..model.pretrained import Pretrained
from ..plan import Plan
from .options import told
from .plans import check_factors, check_plan, check_schedule_of
from .underway import Request, UnderWay


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a request asks of the network, with one entry per sample; the condition is None if there is none."""

    id: Hashable
    condition: Any
    null: Any
    weight: Array


class Stepper:
    """A batch that requests enter and leave at any time. Each has its own plan, and one network call per step serves them all.

    ``add`` takes a request, ``step`` evaluates every sample in flight in one call and moves each by its own plan's row,
    ``finished`` returns the results, and ``cancel`` takes a request out. A request gets what `deis.sample` gives for it alone, up
    to rounding, whatever else is in flight. A Stepper holds only the states and last predictions of what is in flight, and results
    until they are returned.

    Parameters
    ----------
    model : callable, Denoiser or Pretrained
        As for `deis.sample`. A `deis.Pretrained` network gets the labels and the guidance of each request. Any other model treats
        all requests alike. A function that holds labels itself cannot be used here, as the batch changes from step to step.
    predicts : {"eps", "x0", "v", "score", "flow"}, optional
        What a plain function predicts, "eps" by default; a `deis.Denoiser` has its own.

    Raises
    ------
    TypeError
        If the model cannot be called with (x, t).
    ValueError
        If predicts is unknown, or contradicts a Denoiser.

    Notes
    -----
    It is not thread-safe: call it from one loop. In JAX each new batch size is a new shape, for which a jitted network is compiled
    again.
    """

    def __init__(self, model: Callable[[Any, Any], Any] | Pretrained, *, predicts: str | None = None) -> None:
        check_model("model", model)
        self._network = model if isinstance(model, Pretrained) else None
        self._model, self._predicts, self._threshold = told(model, predicts)
        self._sde = self._model.sde if isinstance(self._model, Denoiser) else None
        self._first: Plan | None = None
        self._like: tuple[Any, ...] = ()
        self._waiting: list[tuple[Request, Any]] = []
        self._done: dict[Hashable, Any] = {}
        self._way: UnderWay | None = None
        self._predictor: Predictor | None = None

    def add(self, plan: Plan, x_T: Any, id: Hashable, *, labels: Any = None, guidance: Any = 1.0, rng: Any = None) -> None:
        """Take a request; the next `step` makes its first evaluation.

        Parameters
        ----------
        plan : Plan
            A plan for the same schedule as all others; it may lead in either direction and begin anywhere.
        x_T : torch.Tensor, jax.Array or numpy.ndarray of shape (batch, ...)
            The samples of the request. Their number is free; all else must match the samples in flight.
        id : hashable
            The key of its result in `finished`.
        labels, guidance
            See `Pretrained.conditional`.
        rng
            See `deis.sample`; the streams are the same as if the request ran alone.

        Raises
        ------
        TypeError
            If plan is not a plan, x_T is not an array of a floating dtype, or the id is not hashable.
        ValueError
            If the id is in use, the plan is for another schedule or its form is not determined, x_T does not fit what is in
            flight, the network has no such labels, or rng is missing. A request that is refused changes nothing.
        """
        check_plan("plan", plan)
        check_state("x_T", x_T)
        self._check_id(id)
        self._check_schedule(plan)
        check_factors("plan", plan, self._predicts, self._threshold is not None)
        asked = self._asked(id, labels, guidance, len(x_T))
        backend = backend_of(x_T)
        like = (backend, x_T.dtype, tuple(x_T.shape[1:]), getattr(x_T, "device", None), np.shape(asked.condition)[1:])
        self._check_like(like)
        if plan.stochastic and rng is None:
            raise ValueError(f"the plan {plan.method!r} adds noise and rng is missing; give one of the kind of x_T")
        add_noise = backend.noise(rng, len(x_T)) if plan.stochastic else None
        with backend.no_grad():
            x = backend.copy(backend.cast(x_T, backend.carry(x_T.dtype)))
        self._first, self._like = self._first or plan, like
        self._waiting.append((Request(plan, len(x), asked, add_noise), x))

    def step(self) -> int:
        """Evaluate all samples in flight in one call, move each by its plan, and return how many there were; 0 makes no call.

        Raises
        ------
        ValueError
            If the model returns anything but an array of the shape of x. If an evaluation raises any error, including the model's
            own, all samples stay where they were.
        """
        if not len(self):
            return 0
        backend, dtype = self._like[:2]
        with backend.no_grad():
            self._enter()
            self._collect()
            if self._way is None:
                return 0
            if self._predictor is None:
                self._predictor = Predictor(self._told_conditions(self._way), backend, dtype, self._threshold)
            evaluated = self._way.evaluate(self._predictor)
            self._collect()
        return evaluated

    def finished(self) -> dict[Hashable, Any]:
        """Return the results since the last call, by id: x_0 of the shape and dtype of the request's x_T."""
        done, self._done = self._done, {}
        return done

    def cancel(self, id: Hashable) -> None:
        """Take out a request that is not done; no later `step` evaluates its samples, and the others go on as they would.

        Raises
        ------
        ValueError
            If no request of that id is waiting or in flight: it was never added, or it is done.
        """
        if id not in self._names():
            raise ValueError(f"id={shown(id)} is not in flight; cancel a request that was added and is not done")
        self._waiting = [(request, x) for request, x in self._waiting if request.name.id != id]
        if self._way is not None and self._way.leave(lambda request: request.name.id == id):
            self._predictor = None
            self._way = self._way if self._way.requests else None

    def __len__(self) -> int:
        """Return the number of requests that are not done."""
        return len(self._waiting) + (0 if self._way is None else len(self._way.requests))

    def _names(self) -> set[Hashable]:
        """Return the ids of the requests that are not done."""
        flying = [] if self._way is None else self._way.requests
        return {request.name.id for request in [*flying, *(request for request, _ in self._waiting)]}

    def _check_id(self, id: Hashable) -> None:
        if id in self._done or id in self._names():
            raise ValueError(f"id={shown(id)} is in use; give another, or take the result of that request by finished() first")

    def _check_schedule(self, plan: Plan) -> None:
        if self._sde is not None and not plan.matches(self._sde):
            raise ValueError(
                f"plan {plan.method!r} was made for the schedule {plan.schedule!r} and the model has {self._sde.name!r}, whose "
                "levels differ at its times; make or calibrate a plan for this model"
            )
        if self._sde is None and self._first is not None:
            check_schedule_of("plan", plan, self._first, None)

    def _check_like(self, like: tuple[Any, ...]) -> None:
        if not len(self) or like == self._like:
            return
        (_, dtype, shape, device, condition), (_, dtypes, shapes, devices, conditions) = like, self._like
        raise ValueError(
            f"x_T has samples of {dtype}, shape {shape}, on {device} and with conditions of shape {condition}, and those in flight "
            f"of {dtypes}, {shapes}, on {devices} and of {conditions}; one call can only hold one kind: use another Stepper"
        )

    def _asked(self, id: Hashable, labels: Any, guidance: Any, batch: int) -> _Asked:
        """Return what a request asks of the network, checked as `Pretrained.conditional` does."""
        if self._network is None:
            if labels is not None or weights(guidance) != 1:
                raise ValueError(
                    f"labels={shown(labels)} and guidance={shown(guidance)} need a deis.Pretrained network, and model is "
                    f"{shown(self._model)}; make one of it, or leave them out"
                )
            return _Asked(id, None, None, np.ones(batch))
        condition, null = self._network.conditions(labels, guidance, batch)
        weight = weights(guidance)
        if any(len(each) != batch for each in (condition, weight) if hasattr(each, "__len__")):
            raise ValueError(
                f"labels={shown(labels)} and guidance={shown(guidance)} must have one entry a sample, and x_T has {batch}"
            )
        if condition is not None:
            condition, null = lifted("labels", condition), null if null is None else lifted("labels", null)
        return _Asked(id, condition, null, np.broadcast_to(np.array(weight), (batch,)))

    def _enter(self) -> None:
        """Let the waiting requests in."""
        if self._waiting:
            backend = self._like[0]
            self._way = self._way or UnderWay(backend, self._predicts, self._threshold is not None)
            requests, states = zip(*self._waiting, strict=True)
            self._way.enter(list(requests), backend.xp.concatenate(states))
            self._waiting, self._predictor = [], None

    def _collect(self) -> None:
        """Bring all requests to their next call, and take out those that are done."""
        if self._way is None:
            return
        backend, dtype = self._like[:2]
        self._way.settle()
        done = self._way.leave()
        if done:
            self._done |= {request.name.id: backend.copy(backend.cast(x, dtype)) for request, x in done}
            self._predictor = None
        if not self._way.requests:
            self._way = None

    def _told_conditions(self, way: UnderWay) -> Any:
        """Return the model of the samples in flight, with the condition and the weight of each."""
        asked: list[_Asked] = [request.name for request in way.requests]
        if self._network is None or asked[0].condition is None:
            return self._model
        concatenate = backend_of(asked[0].condition).xp.concatenate
        condition = concatenate([one.condition for one in asked])
        null = None if asked[0].null is None else concatenate([one.null for one in asked])
        return self._network.conditioned(condition, null, np.concatenate([one.weight for one in asked]))
