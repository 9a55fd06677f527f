"""Trained networks of linear SDEs: what `deis.load_model` returns for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..backends import backend_of
from ..model.mixture import EVERYWHERE
from ..model.pretrained import Network, Pretrained, check_unguided, classes, guided_classes, unlabelled
from .denoiser import LinearDenoiser
from .sde import LinearSDE


@dataclass(frozen=True)
class PretrainedLinear:
    """A trained network of a linear SDE, which `deis.load_model` returns; `conditional` makes a model for `deis.sample_linear`.

    Attributes
    ----------
    net : callable
        net(x, t, labels) -> an output of the shape of x, for x as the model of a `LinearDenoiser` takes it.
    sde : LinearSDE
    predicts : str
        See `LinearDenoiser`.
    shape : tuple of int
        (channels, height, width) of one sample.
    num_classes, null_class, time_scale
        As of `deis.model.pretrained.Pretrained`.
    """

    net: Network
    sde: LinearSDE
    predicts: str
    shape: tuple[int, int, int]
    num_classes: int | None
    null_class: int | None
    time_scale: float

    def conditional(
        self,
        labels: Any = None,
        guidance: Any = 1.0,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = EVERYWHERE,
        threshold: Callable[[Any], Any] | None = None,
    ) -> LinearDenoiser:
        """Return the network for given labels of shape (batch,), as `Pretrained.conditional` does.

        Raises
        ------
        ValueError
            If the network has no classes, a label lies outside them, or guidance was given without labels.
        """
        if labels is None:
            check_unguided(guidance)
            model: Any = partial(unlabelled, self)
        else:
            model = guided_classes(self, *classes(self, labels), guidance, rescale=rescale, interval=interval)
        return LinearDenoiser(model, self.sde, self.predicts, threshold)

    def noise(self, z: Any) -> Any:
        """Return the state at which sampling starts, of standard normal z of shape (batch, channels k, height, width)."""
        if self.sde.basis == "dct":
            return self.sde.noise(z)
        blocks = z.reshape(len(z), self.sde.shape[0], -1, *z.shape[2:])
        return self.sde.noise(backend_of(z).xp.moveaxis(blocks, 1, 0))


def scalar_only(model: Pretrained | PretrainedLinear) -> Pretrained:
    """Return a network, for what takes those of scalar schedules alone.

    Raises
    ------
    ValueError
        If it is one of a linear SDE.
    """
    if isinstance(model, PretrainedLinear):
        raise ValueError(
            f"model is a network of {model.sde.name}, a linear SDE, which runs in Python only, by deis.sample_linear (see "
            "docs/linear.md); name one of a scalar schedule"
        )
    return model
