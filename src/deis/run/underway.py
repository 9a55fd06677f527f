"""Samples under way, each by a plan of its own, in frameworks that compute at once: one call evaluates all that are left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ..arrays import Array, Flags
from ..backends.numpy import add_up
from ..backends.record import AddNoise, Backend
from ..host import take
from ..machine import Row, Sum, advance, guessed
from ..model.predictions import SAME, Levels, Predictor
from ..plan import Plan
from .options import not_finite
from .plans import FACTORS, GUESS, KEEP_Z, numbers_of, row_of


@dataclass(eq=False)
class Request:
    """Samples of one plan that entered together."""

    plan: Plan
    size: int
    name: Any
    """The caller's name for them."""
    add_noise: AddNoise | None = None
    row: int = 0

    @property
    def done(self) -> bool:
        return self.row == len(self.plan.rows)

    @property
    def calls(self) -> bool:
        return self.plan.rows[self.row].calls


class UnderWay:
    """The state of the machine for samples that enter and leave, with one number per sample for each coefficient.

    `settle` moves the samples whose row makes no call, and `leave` takes out those that are done. After that, all wait for a call.
    A sample that enters has zeros in place of earlier predictions; its plan gives them no weight.
    """

    def __init__(self, backend: Backend, predicts: str, thresholds: bool) -> None:
        self.backend, self.predicts, self.thresholds = backend, predicts, thresholds
        self.requests: list[Request] = []
        self.x: Any = None
        self.base: Any = None
        self.history: tuple[Any, ...] = ()

    def enter(self, requests: list[Request], x: Any) -> None:
        """Take in requests with their states, one after the other in x."""
        xp = self.backend.xp
        if self.requests:
            self.history = tuple(xp.concatenate([p, xp.zeros_like(x)]) for p in self.history)
            self.x, self.base = xp.concatenate([self.x, x]), xp.concatenate([self.base, x])
        else:
            self.x = self.base = x
        self.requests = [*self.requests, *requests]

    def settle(self) -> None:
        """Move the samples whose row makes no call, until all wait for one or are done."""
        while any(quiet := [not (request.done or request.calls) for request in self.requests]):
            numbers = self._numbers()
            moves = np.repeat(quiet, self._sizes)
            numbers[KEEP_Z] *= moves
            row, _ = self._row(numbers)
            self._move(row, numbers, guessed(row, self.x, add_up), np.array(quiet), moves)

    def leave(self, leaves: Callable[[Request], bool] = lambda request: request.done) -> list[tuple[Request, Any]]:
        """Take out the requests that are done, or those chosen, and return each with its state."""
        going = [leaves(request) for request in self.requests]
        if not any(going):
            return []
        out = [(request, self.x[place]) for (request, place), goes in zip(self._places(), going, strict=True) if goes]
        stay = np.flatnonzero(np.repeat([not goes for goes in going], self._sizes))
        self.requests = [request for request, goes in zip(self.requests, going, strict=True) if not goes]
        if self.requests:
            self.x, self.base = take(self.x, stay), take(self.base, stay)
            self.history = tuple(take(p, stay) for p in self.history[: self._window - 1])
        else:
            self.x, self.base, self.history = None, None, ()
        return out

    def evaluate(self, predictor: Predictor, samples: Any = None, batch: int | None = None, check_finite: bool = False) -> int:
        """Evaluate all samples in one call and move each by its row; return how many there were.

        `samples` are their indices in a batch for which the model has conditions, and `batch` is the size of that batch.
        """
        numbers = self._numbers()
        row, factors = self._row(numbers)
        whole = all(request.plan.discrete for request in self.requests)
        t = self.backend.full(self.x[:1], numbers[0].tolist(), self.x.dtype, whole)[:, 0]
        m = predictor.output(self.x, t, Levels(row.t, row.alpha, row.sigma, samples=samples, batch=batch))
        if check_finite:
            self._check_finite(m)
        same = len(factors) == 2 and (numbers[FACTORS] == 0).all() and (numbers[FACTORS + 1] == 1).all()
        p = predictor.prediction(m, self.x, SAME if same else factors)
        self._move(row, numbers, p, np.ones(len(self.requests), dtype=bool))
        return len(m)

    @property
    def _sizes(self) -> list[int]:
        return [request.size for request in self.requests]

    @property
    def _window(self) -> int:
        return max(request.plan.window for request in self.requests)

    def _places(self) -> Iterator[tuple[Request, slice]]:
        """Yield each request and the slice of its samples."""
        ends = [0, *accumulate(self._sizes)]
        for request, start, end in zip(self.requests, ends, ends[1:], strict=False):
            yield request, slice(start, end)

    def _numbers(self) -> Array:
        """Return the current rows of the samples, of shape (columns, samples); any row for those that are done."""
        of = (self.predicts, self.thresholds, self._window)
        rows = [request.plan.once(numbers_of, *of)[min(request.row, len(request.plan.rows) - 1)] for request in self.requests]
        return np.repeat(np.stack(rows), self._sizes, axis=0).T

    def _row(self, numbers: Array) -> tuple[Row, Any]:
        """Return a row of whole sums for `add_up`, see `deis.machine.with_sums`, and the factors of its predictions."""
        shape = (*numbers.shape, *(1,) * (self.x.ndim - 1))
        (here, _), (there, factors) = (
            row_of(columns, self._window) for columns in (numbers, self.backend.like(numbers, self.x).reshape(shape))
        )
        keep = _sum([here.keep_x, *here.keep_p], [there.keep_x, *there.keep_p])
        next_ = _sum([here.next_x, *here.next_p], [there.next_x, *there.next_p])
        keep_z = there.keep_z if here.keep_z.any() else None
        stays = len(next_) == 1 and next_[0][0] is None and next_[0][1] == 0
        sums = {
            "keep_x": keep,
            "keep_z": keep_z,
            "next_x": None if stays else next_,
            "guess": _sum([numbers[GUESS]], [there.guess]),
        }
        return there._replace(keep_p=(), next_p=(), **sums), factors

    def _move(self, row: Row, numbers: Array, p: Any, who: Flags, moves: Flags | None = None) -> None:
        """Move requests by a row, given the predictions of all; `moves` marks the samples that move, if not all do."""
        history = (p, *self.history)
        base, x = advance(row, self.base, history, add_up, lambda keep_z, base: self._noised(numbers[KEEP_Z], keep_z, base))
        history = history[: self._window - 1]
        if moves is not None:
            xp, shape = self.backend.xp, (-1, *(1,) * (x.ndim - 1))
            mask = self.backend.like(moves.astype(np.float64), x).reshape(shape) != 0
            base, x = xp.where(mask, base, self.base), xp.where(mask, x, self.x)
            past = (*self.history, *(xp.zeros_like(x) for _ in range(len(history) - len(self.history))))
            history = tuple(xp.where(mask, new, old) for new, old in zip(history, past, strict=False))
        self.base, self.x, self.history = base, x, history
        for request, moved in zip(self.requests, who.tolist(), strict=True):
            request.row += moved

    def _noised(self, numbers: Array, keep_z: Any, base: Any) -> Any:
        """Add noise to the samples whose row adds noise, each from its own stream."""
        xp, parts = self.backend.xp, []
        for request, place in self._places():
            zero = xp.zeros_like(base[place])
            noisy = request.add_noise is not None and numbers[place.start] != 0
            parts.append(request.add_noise(1.0, zero, i=request.row) if noisy and request.add_noise else zero)
        return base + keep_z * xp.concatenate(parts)

    def _check_finite(self, m: Any) -> None:
        for request, place in self._places():
            if not bool(self.backend.xp.isfinite(m[place]).all()):
                raise not_finite(request.row, request.plan, request.name)


def _sum(here: list[Array], there: list[Any]) -> Sum:
    """Return the terms of a sum of states, given its weights on the host and on the device, without those that are 0 for all."""
    made = tuple((None if (c == 1).all() else there[j], j) for j, c in enumerate(here) if c.any())
    return made or ((there[0], 0),)
