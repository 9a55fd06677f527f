"""A trained network, with what it was trained on: what `deis.load_model` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..methods import make_plan
from ..plan import Plan
from ..sde import Schedule
from .mixture import EVERYWHERE, classifier_free, weights
from .predictions import Denoiser

Network = Callable[[Any, Any, Any], Any]
"""net(x, t, labels) -> output, t in the network's own units."""


@dataclass(frozen=True)
class Pretrained:
    """A trained network: model(x, t) is its unconditional output, and `conditional` makes a model for `deis.sample`.

    Attributes
    ----------
    net : callable
        net(x, t, labels), in the framework it was loaded for, with t in the network's own units.
    sde : Schedule
        The noise schedule that it was trained on.
    predicts : str
        What it predicts; see `deis.Denoiser`.
    shape : tuple of int
        (channels, height, width) of one sample; samples lie in [-1, 1], or are latents, see `decode`.
    num_classes, null_class : int or None
        The labels 0 ... num_classes - 1, and the label for no class; None for an unconditional network.
    time_scale : float
        The network takes time_scale * t.
    plans : mapping of int to Plan
        Calibrated plans by their number of evaluations, for guidance 1; see `plan`.
    embed : callable, optional
        For a network that is conditioned on something other than classes: embed(labels) -> (condition, null), each of shape
        (batch, ...), from what `conditional` is given, such as prompts.
    decode : callable, optional
        For a network of latents: decode(x) -> images in [-1, 1].
    """

    net: Network
    sde: Schedule
    predicts: str
    shape: tuple[int, int, int]
    num_classes: int | None
    null_class: int | None
    time_scale: float
    plans: Mapping[int, Plan] = field(default_factory=dict)
    embed: Callable[[Any], tuple[Any, Any]] | None = None
    decode: Callable[[Any], Any] | None = None

    def plan(self, nfe: int = 10) -> Plan:
        """Return the calibrated plan for nfe evaluations that came with the network; if there is none, the plan of "auto"."""
        return self.plans[nfe] if nfe in self.plans else make_plan(self.sde, nfe=nfe)

    def __call__(self, x: Any, t: Any) -> Any:
        return unlabelled(self, x, t)

    def conditional(
        self,
        labels: Any = None,
        guidance: Any = 1.0,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = EVERYWHERE,
        threshold: Callable[[Any], Any] | None = None,
    ) -> Denoiser:
        """Return the network as a Denoiser, for the given labels of shape (batch,), with classifier-free guidance.

        Parameters
        ----------
        labels : array of int of shape (batch,), optional
            Without them the network runs without a class. A network of text takes a sequence of prompts.
        guidance, rescale, interval
            See `deis.guided`. A guidance of 1 is the plain conditional network, in one call. Any other weight evaluates the network
            with and without the labels in one call on a batch of twice the size. An array has one weight per sample.
        threshold
            See `deis.Denoiser`.

        Raises
        ------
        ValueError
            If the network has no classes, a label lies outside them, or guidance was given without labels.
        """
        if labels is None:
            check_unguided(guidance)
            return Denoiser(self, self.sde, self.predicts, threshold, self._sides)
        condition, null = self._conditions(labels)
        return self.conditioned(condition, null, guidance, rescale=rescale, interval=interval, threshold=threshold)

    def conditioned(
        self,
        condition: Any,
        null: Any,
        guidance: Any,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = EVERYWHERE,
        threshold: Callable[[Any], Any] | None = None,
    ) -> Denoiser:
        """Return the network as a Denoiser for what `conditions` returns; else as `conditional`."""
        model = guided_classes(self, condition, null, guidance, rescale=rescale, interval=interval)
        return Denoiser(model, self.sde, self.predicts, threshold, self._sides)

    def conditions(self, labels: Any, guidance: Any, batch: int) -> tuple[Any, Any]:
        """Return the network's input for labels, and for none, in batches with others that may have labels or not.

        Raises
        ------
        ValueError
            As `conditional`; and if labels are missing for a network that has classes but no label for none.
        """
        if labels is not None:
            condition, null = self._conditions(labels)
            self.conditioned(condition, null, guidance)
            return condition, null
        check_unguided(guidance)
        if self.embed is not None or (self.num_classes is not None and self.null_class is None):
            raise ValueError("labels are missing, and this network has no label for none; give one for each sample")
        null = None if self.num_classes is None else null_classes(self, batch)
        return null, null

    @property
    def _sides(self) -> tuple[int | None, ...]:
        """The shape of a sample; networks of latents accept other sides than those they were trained at."""
        return self.shape if self.decode is None else (self.shape[0], None, None)

    def _conditions(self, labels: Any) -> tuple[Any, Any]:
        """Return the network's input for labels, and for none."""
        if self.embed is not None:
            return self.embed(labels)
        return classes(self, labels)


class ClassNetwork(Protocol):
    """A network of classes, as `Pretrained` is."""

    @property
    def net(self) -> Network: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def null_class(self) -> int | None: ...
    @property
    def time_scale(self) -> float: ...


def unlabelled(network: ClassNetwork, x: Any, t: Any) -> Any:
    """Return the output without a class."""
    return _evaluate(network, x, t, null_classes(network, len(x)))


def null_classes(network: ClassNetwork, batch: int) -> np.ndarray | None:
    """Return the label of no class for each sample; None if there is none."""
    return None if network.null_class is None else np.full(batch, network.null_class)


def classes(network: ClassNetwork, labels: Any) -> tuple[Any, Any]:
    """Return labels as whole numbers, and the label of no class for each.

    Raises
    ------
    ValueError
        If the network has no classes, or a label lies outside them.
    """
    if network.num_classes is None:
        raise ValueError("labels were given, and this network has no classes; leave them out")
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers of shape (batch,), and have shape {labels.shape} and dtype {labels.dtype}")
    if labels.size and not (labels.min() >= 0 and labels.max() < network.num_classes):
        raise ValueError(f"labels={labels.tolist()} must lie in 0 ... {network.num_classes - 1}")
    # data sets keep them in 8 bits, which torch does not look up
    return labels.astype(np.int64), null_classes(network, len(labels))


def guided_classes(network: ClassNetwork, condition: Any, null: Any, guidance: Any, **settings: Any) -> Any:
    """Return model(x, t), the network's output for a condition with classifier-free guidance; see `classifier_free`."""
    return classifier_free(partial(_evaluate, network), condition, null, guidance, **settings)


def _evaluate(network: ClassNetwork, x: Any, t: Any, condition: Any) -> Any:
    if condition is not None and len(condition) != len(x):
        raise ValueError(f"labels must have one entry per sample: there are {len(condition)} for x of shape {tuple(x.shape)}")
    return network.net(x, network.time_scale * t, condition)


def check_unguided(guidance: Any) -> None:
    """Raise ValueError where guidance is given without labels to guide towards."""
    if weights(guidance) != 1:
        raise ValueError(f"guidance={guidance!r} needs labels to guide towards; give them, or guidance=1")


def without_labels(model: Any) -> Any:
    """Return the Denoiser of a Pretrained network without labels; another model itself."""
    return model.conditional() if isinstance(model, Pretrained) else model
