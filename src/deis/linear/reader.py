"""How the loops of linear SDEs ask a network, whatever it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..model.predictions import Level, Predictor
from .denoiser import LinearDenoiser, Reading
from .plan import LinearPlan
from .space import Space


@dataclass(frozen=True)
class Reader:
    """What the loops need from a model: reader(row, x, t) is the prediction that the plan takes.

    Attributes
    ----------
    predictor : Predictor
    space : Space
    rows : list of Reading or Level
        How each row reads the network, in float64; a Level where its output is what the plan takes.
    as_channels : bool
        Whether the network has the blocks one after another as channels.
    """

    predictor: Predictor
    space: Space
    rows: list[Any]
    as_channels: bool

    def __call__(self, row: Any, x: Any, t: Any) -> Any:
        """Return the prediction at a state as the plan combines it, with t of shape (batch,) the time of the row's level."""
        if isinstance(row, Reading):
            return (self._of_frequencies if self.space.axes else self._of_blocks)(row, x, t)
        if not self.as_channels:
            return self.space.prediction(self.predictor, x, t, row)
        return self._stacked(self._output(self._channels(x), t, row, x.dtype), x)

    def _of_blocks(self, row: Reading, x: Any, t: Any) -> Any:
        combine, (first, *others) = self.space.backend.combine, list(x)
        seen = self._channels(x) if row.see is None else combine(row.see[0], first, row.see[1:], others)
        m = self._output(seen, t, row.level, x.dtype)[:, : first.shape[1]]
        x_0 = self._clean(combine(row.linear[0], first, [*row.linear[1:], row.gain], [*others, m]))
        weights = zip(row.inverse, row.data, strict=True)
        return self.space.backend.xp.stack([combine(c[0], first, [*c[1:], d], [*others, x_0]) for c, d in weights])

    def _of_frequencies(self, row: Reading, x: Any, t: Any) -> Any:
        m = self.space.enter(self._output(self.space.leave(x), t, row.level, x.dtype))
        x_0 = row.linear * x + row.gain * m
        if self.predictor.threshold is not None:
            x_0 = self.space.enter(self._clean(self.space.leave(x_0)))
        return row.inverse * x + row.data * x_0

    def _output(self, seen: Any, t: Any, level: Any, dtype: Any) -> Any:
        return self.space.backend.cast(self.predictor.output(seen, t, level), dtype)

    def _clean(self, x_0: Any) -> Any:
        threshold = self.predictor.threshold
        return x_0 if threshold is None else self.space.backend.cast(threshold(x_0), x_0.dtype)

    def _channels(self, x: Any) -> Any:
        return self.space.backend.xp.concatenate(list(x), axis=1)

    def _stacked(self, m: Any, x: Any) -> Any:
        channels = x.shape[2]
        return self.space.backend.xp.stack([m[:, i * channels : (i + 1) * channels] for i in range(len(x))])


def reader_of(plan: LinearPlan, model: Any, space: Space, dtype: Any) -> Reader:
    """Return the reader of a model, a LinearDenoiser or a function, which is given states of a dtype."""
    if isinstance(model, LinearDenoiser):
        rows, as_channels = model.rows(plan), plan.basis == "block"
        predictor = Predictor(model.model, space.backend, dtype, model.threshold)
    else:
        rows, as_channels, predictor = None, False, Predictor(model, space.backend, dtype)
    return Reader(predictor, space, [Level(*row[:3]) for row in plan.rows] if rows is None else rows, as_channels)


def level_of(row: Any) -> Level:
    """Return the level at which a row of a reader asks the network."""
    return row.level if isinstance(row, Reading) else row
