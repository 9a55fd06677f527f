"""The wall-time limit of a calibration, with estimates from the pace of its evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any


def _now() -> float:
    return perf_counter()


class TimeIsUp(Exception):  # noqa: N818 (not an error: the caller decides what is lost)
    """A strict clock has run out."""


@dataclass
class Clock:
    """Takes the place of a network's progress bar, and so counts every evaluation.

    Attributes
    ----------
    seconds : float
        The limit for the whole calibration.
    bar : optional
        An object with `update(n)`, such as a tqdm bar, which is updated as well.
    strict : bool
        Whether an evaluation after the limit raises TimeIsUp; otherwise the caller asks `allows`, and stops by itself.
    cut : bool
        Whether something was refused since this was set to False.
    """

    seconds: float = math.inf
    bar: Any = None
    strict: bool = False
    cut: bool = False
    evaluations: int = 0
    began: float = field(default_factory=_now)
    end: float = math.inf
    """When the time of this plan is over, in seconds since the beginning."""
    until: float = math.inf
    """The same for this stage."""

    def update(self, n: int) -> None:
        self.evaluations += n
        if self.bar is not None:
            self.bar.update(n)
        if self.strict and self.spent > self.seconds:
            raise TimeIsUp

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return _now() - self.began

    def plan_share(self, part: float) -> None:
        """Let the next plan take a part of all the time that is left."""
        self.end = self._after(part, self.seconds)

    def share(self, part: float) -> None:
        """Let the next stage take a part of the time that is left for its plan."""
        self.until = self._after(part, min(self.end, self.seconds))

    def _after(self, part: float, end: float) -> float:
        return self.spent + part * max(end - self.spent, 0.0) if math.isfinite(end) else end

    def needs(self, evaluations: float) -> float:
        """Return the seconds that so many evaluations, of one sample each, will take at the pace so far."""
        return evaluations * self.spent / self.evaluations if self.evaluations else 0.0

    def allows(self, evaluations: float = 0.0) -> bool:
        """Return whether there is time for so many evaluations in this share."""
        return self._within(self.needs(evaluations))

    def turns(self, most: int, evaluations: float) -> Iterator[int]:
        """Yield 0, 1, ... while there is time for another turn, estimated by its evaluations, then by the longest turn so far."""
        longest = self.needs(evaluations)
        for k in range(most):
            if not self._within(longest):
                return
            before = self.spent
            yield k
            longest = max(longest if k else 0.0, self.spent - before)

    def _within(self, seconds: float) -> bool:
        fits = self.spent + seconds <= min(self.until, self.seconds)
        self.cut = self.cut or not fits
        return fits
