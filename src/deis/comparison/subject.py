"""What is compared on: a model, its noise and conditions, and the reference from that noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import check_state, flag, function, kind, number, whole
from ..arrays import AnyArray
from ..calibration.network import Model, Network
from ..calibration.teacher import FIRST_STEPS, PILOTS, make_teacher
from ..features import Extractor
from ..model.pretrained import Pretrained
from ..model.weights import weights_digest
from ..plan import Plan
from .bench import Bench
from .identity import Identity, identity_of
from .noise import noise_for
from .shelf import shelf

TOLERANCE = 2e-3
"""How far twice the steps may move the reference's end, over its size. The order is 4: what is left is some sixteen times less."""


@dataclass(frozen=True)
class Subject:
    """A model on its noise, checked; see `deis.compare` for the attributes."""

    network: Network
    calibrated: Mapping[int, Plan]
    decode: Callable[[Any], Any] | None
    seed: int
    reference_steps: int | None
    tol: float
    allow_rough: bool
    extractor: Extractor | None
    real: AnyArray | None
    identity: Identity
    progress: bool

    def estimate(self) -> int:
        """Return the evaluations of the reference, of a sample each, if it converges at once."""
        steps, samples = self.reference_steps or 2 * FIRST_STEPS, len(self.network.x_T)
        pilots = steps // 2 if self.reference_steps else 3 * steps // 2
        return steps * samples + (2 + pilots) * min(PILOTS, samples)

    def bench(self, folder: str | Path | None, progress: Any = None) -> Bench:
        """Return what measures, with the reference, which is made unless the folder has it."""
        kept = None if folder is None else shelf(folder, self.identity)
        teacher = make_teacher(
            self.network.model, self.network.x_T,
            condition=self.network.condition, batch=self.network.batch, steps=self.reference_steps, tol=self.tol,
            folder=None if kept is None else kept / f"reference-{self.reference_steps or self.tol}",
            progress=progress, allow_rough=self.allow_rough,
        )  # fmt: skip
        return Bench(self.network, teacher, self.seed, self.extractor, self.decode, kept, progress)


def subject_of(
    model: Model,
    samples: Any,
    *,
    condition: Any = None,
    guidance: float = 1.0,
    calibrated: Mapping[int, Plan] | None = None,
    seed: int = 0,
    batch: int = 64,
    reference_steps: int | None = None,
    tol: float = TOLERANCE,
    allow_rough: bool = False,
    extractor: Extractor | None = None,
    real: AnyArray | None = None,
    decode: Callable[[Any], Any] | None = None,
    progress: bool = False,
) -> Subject:
    """Return what is compared on, checked; see `deis.compare`."""
    _check(extractor, real, decode, allow_rough, progress)
    seed, tol = whole("seed", seed, 0), number("tol", tol, above=0)
    steps = None if reference_steps is None else whole("reference_steps", reference_steps, 2)
    x_T = samples if hasattr(samples, "shape") else noise_for(model, whole("samples", samples), _sigma(model), seed)
    check_state("samples", x_T)
    made, labels = _conditional(model, condition, number("guidance", guidance), len(x_T))
    network = Network(made, x_T, labels, batch)
    own = _own_plans(model, guidance) if calibrated is None else calibrated
    about = "" if real is None else weights_digest(extractor) + hashlib.sha256(np.ascontiguousarray(real).tobytes()).hexdigest()
    identity = identity_of(network, weights_digest(made), about, steps or tol)
    decode = model.decode if decode is None and isinstance(model, Pretrained) else decode
    return Subject(network, own, decode, seed, steps, tol, allow_rough, extractor, real, identity, progress)


def _check(extractor: Any, real: Any, decode: Any, allow_rough: Any, progress: Any) -> None:
    flag("allow_rough", allow_rough)
    flag("progress", progress)
    if (extractor is None) != (real is None):
        raise ValueError("extractor and real belong together: give both, or neither")
    if extractor is not None:
        function("extractor", extractor, "images")
        kind("real", real, np.ndarray, "a NumPy array,")
    if decode is not None:
        function("decode", decode, "x")


def _sigma(model: Any) -> float:
    sde = getattr(model, "sde", None)
    if sde is None:
        raise ValueError("samples is a number, and the model does not tell its schedule; give the noise itself, or a deis.Denoiser")
    return float(sde.sigma(sde.t_start))


def _conditional(model: Any, condition: Any, guidance: float, num: int) -> tuple[Model, Any]:
    """Return the model as `Network` takes it: of a Pretrained network with classes one of each in turn where none are given."""
    if isinstance(model, Pretrained) and (condition is not None or model.num_classes is not None):
        labels = np.arange(num) % (model.num_classes or 1) if condition is None else condition
        return partial(model.conditional, guidance=guidance), labels
    if guidance != 1:
        raise ValueError(f"guidance={guidance!r} is for a Pretrained network with classes or a condition; leave it out")
    return model, condition


def _own_plans(model: Any, guidance: float) -> Mapping[int, Plan]:
    """Return the plans that came with a network, which are for a guidance of 1."""
    return model.plans if isinstance(model, Pretrained) and guidance == 1 else {}


def taken(condition: Any, indices: Sequence[int]) -> Any:
    """Return the conditions of these numbers, going round."""
    if condition is None:
        return None
    chosen = [i % len(condition) for i in indices]
    return [condition[i] for i in chosen] if isinstance(condition, list | tuple) else condition[np.array(chosen)]
