"""A plan in somebody else's loop, in torch: one call for each evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.torch import BACKEND
from ..machine import advance, guessed
from ..model.predictions import conversions, prediction
from ..plan import Plan


class Stepwise:
    """A plan under way.

    Parameters
    ----------
    plan : Plan
        A plan that begins with an evaluation, or with a row that hands its state on to one.
    predicts : {"eps", "x0", "v", "score", "flow"}
        What the network predicts.
    threshold : callable, optional
        See `deis.Denoiser`.

    Raises
    ------
    ValueError
        If what the network predicts does not determine the plan's form, or the plan does not begin with an evaluation.
    """

    def __init__(self, plan: Plan, predicts: str, threshold: Callable[[Any], Any] | None = None) -> None:
        if not (plan.calls[0] or plan.hands_on):
            raise ValueError(f"the plan {plan.method!r} begins without an evaluation, and this loop needs one; use deis.sample")
        self.plan, self.threshold = plan, threshold
        self.factors = conversions(plan, predicts, threshold is not None)
        self.rows, self.combine = plan.once(BACKEND.prepared, torch.float32)
        self.row = int(plan.hands_on)
        self.history: tuple[Tensor, ...] = ()
        self.base: Tensor | None = None
        self.x: Tensor | None = None
        self.sent: Tensor | None = None
        self.version = 0

    def step(self, m: Tensor, sample: Tensor, add_noise: Callable[[float, Tensor], Tensor] | None = None) -> Tensor:
        """Return the next sample to evaluate, after the network returned m at this one.

        The sample may differ from the one returned last, as in inpainting; the plan continues from it. The state is carried in
        float32 or better; only what is returned is rounded to the sample's dtype.
        """
        x = self._state(sample)
        base = x if self.base is None or self.base is self.x else self.base
        p = prediction(BACKEND, m, x, self.factors[self.row], self.threshold)
        while True:
            history = (p, *self.history)
            base, x = advance(self.rows[self.row], base, history, self.combine, add_noise)
            self.history = history[: self.plan.window - 1]
            self.row += 1
            if self.row == len(self.rows) or self.rows[self.row].calls:
                break
            p = guessed(self.rows[self.row], x, self.combine)
        self.base, self.x = base, x
        return self._send(x.to(sample.dtype))

    def _state(self, sample: Tensor) -> Tensor:
        """Return the state: the one that the last step left, unless the caller has changed the sample since."""
        if self.x is not None and sample is self.sent and sample._version == self.version:
            return self.x
        return sample.to(torch.promote_types(sample.dtype, torch.float32))

    def _send(self, sample: Tensor) -> Tensor:
        if sample.is_inference():  # torch keeps no version counter of inference tensors
            self.sent = None
        else:
            self.sent, self.version = sample, sample._version
        return sample
