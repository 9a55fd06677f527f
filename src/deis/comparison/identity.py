"""Which comparison it is: the digest of the weights, the schedule and the noise, and what the model predicts at fixed points."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends import to_numpy
from ..calibration.network import Network
from ..calibration.teacher import dense_plan
from ..methods.step import choose_form

_PROBED, _KEPT = 2, 48
_SAME = 1e-4
"""How far, relative to their size, predictions of one model at one point may lie apart: by the rounding of float32."""


@dataclass(frozen=True)
class Identity:
    """Which comparison it is: of which weights, schedule, noise and conditions; and predictions, which tell guidance apart."""

    key: str
    probe: tuple[float | None, ...]

    def same(self, other: Identity) -> bool:
        """Tell whether two are of one model and noise."""
        if self.key != other.key or len(self.probe) != len(other.probe):
            return False
        a, b = (np.array(each.probe, dtype=np.float64) for each in (self, other))
        scale = _SAME * np.sqrt(np.nanmean(np.square(a))) if np.isfinite(a).any() else 0.0
        return bool(np.allclose(a, b, rtol=0, atol=scale, equal_nan=True))


def identity_of(network: Network, weights: str, *about: object) -> Identity:
    """Return the identity of a network on its noise, and of what else the numbers depend on."""
    sde = network.sde
    levels = np.linspace(sde.t_end, sde.t_start, 33)
    with np.errstate(all="ignore"):
        schedule = [np.round(level(levels), 9).tolist() for level in (sde.alpha, sde.sigma)]
    noise = hashlib.sha256(network.numpy().tobytes()).hexdigest()
    condition = "" if network.condition is None else _digest(network.condition)
    text = json.dumps([weights, schedule, noise, condition, *about])
    return Identity(hashlib.sha256(text.encode()).hexdigest()[:16], _probe(network))


def _digest(condition: Any) -> str:
    values = condition if isinstance(condition, list | tuple) else to_numpy(condition).tolist()
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _probe(network: Network) -> tuple[float | None, ...]:
    """Return some numbers of the predictions for the first samples, at the noise and half way to data."""
    form = choose_form(network.sde, np.array([network.sde.t_start]))
    x = network.numpy()[:_PROBED]
    found = np.concatenate([network.predict(x, t, form).ravel() for t in dense_plan(network.sde, 2, form).t[:2]])
    found = found[:: -(-len(found) // _KEPT)]
    return tuple(float(value) if np.isfinite(value) else None for value in found)
