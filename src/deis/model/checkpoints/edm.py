"""Checkpoints of the code base of "Elucidating the design space of diffusion-based generative models" (arXiv 2206.00364)."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...arguments import one_of
from ...host import labels_like
from ...sde import EDM, VPSDE, Schedule
from ..predictions import edm_preconditioned
from ..pretrained import Network, Pretrained
from . import torch_files
from .edm_names import KIND, adm, size_of, song
from .score_sde import exploding
from .torch_files import StrPath

PRECONDITIONINGS = ("edm", "vp", "ve", "iddpm")


def load_edm(
    path: StrPath,
    device: str | None = None,
    dtype: str = "float32",
    *,
    preconditioning: str | None = None,
    sigma_data: float = 0.5,
    allow_pickle: bool = False,
) -> Pretrained:
    """Load a network of Karras et al. (arXiv 2206.00364): DDPM++ and NCSN++ (`SongUNet`) or ADM (`DhariwalUNet`).

    Parameters
    ----------
    path : path
        The network's state dict (`net.state_dict()`), as safetensors or by torch.save; or, with `allow_pickle`, the published
        `.pkl`, from which `ema` is used. Architecture, classes and image size follow from the weights.
    device, dtype
        See `deis.load_model`.
    preconditioning : {"edm", "vp", "ve", "iddpm"}, optional
        The class that wraps the network. By default "iddpm" if the file has its levels `u`, and otherwise "edm", which all networks
        trained in the paper have (`edm-*`). Files do not identify "vp" and "ve", the networks of Song et al. (`baseline-*`). The
        four predict x_0 given sigma, eps in VP, eps in VE, and eps in the times of iDDPM.
    sigma_data : float
        For preconditioning="edm".
    allow_pickle : bool
        Unpickling a file runs the code in it; these files hold the source of the network. Set it for a file that you trust, with
        that code base on the path. It is better to write `net.state_dict()` with safetensors there, once.

    Returns
    -------
    Pretrained
        With classes, the label after the last one stands for none (the code base then passes no class).

    Raises
    ------
    FileNotFoundError
    ImportError
        Where torch, diffusers (ADM) or, for a pickle, that code base is not installed.
    ValueError
        For a pickle without allow_pickle, an unknown preconditioning or dtype, or a file that is not such a checkpoint; the message
        names the first key that differs.
    """
    one_of("dtype", dtype, torch_files.DTYPES)
    saved = _unpickle(path, allow_pickle) if Path(path).suffix == ".pkl" else torch_files.read(path)
    return of_saved(saved, path, device, dtype, preconditioning=preconditioning, sigma_data=sigma_data)


def recognises(saved: Any) -> bool:
    """Return whether the content of a file looks like such a checkpoint."""
    return isinstance(saved, Mapping) and "model.map_layer0.weight" in saved


def of_saved(
    saved: Any, path: StrPath, device: str | None, dtype: str, *, preconditioning: str | None = None, sigma_data: float = 0.5
) -> Pretrained:
    """Return the network from the content of a file; see `load_edm`."""
    state = {key.removeprefix("model."): value for key, value in torch_files.weights(saved, "the file", path).items()}
    state.pop("map_augment.weight", None)  # for the augmentation labels, which are 0 in sampling
    levels = state.pop("u", None)
    kind = one_of("preconditioning", preconditioning or ("edm" if levels is None else "iddpm"), PRECONDITIONINGS)
    if kind == "iddpm" and levels is None:
        raise ValueError(f"preconditioning='iddpm' needs the levels 'u', which path={os.fspath(path)!r} lacks")
    filters = {key: value for key, value in state.items() if key.endswith("resample_filter")}
    found = torch_files.shapes_of({key: value for key, value in state.items() if key not in filters})
    size, fir = size_of(found, path), _has_fir(filters, path)
    module, sources = adm(found, size, path) if "out_conv.weight" in found else song(found, size, fir, path)
    torch_files.check(found, {source.name: source.shape for source in sources.values()}, path, KIND)
    module = torch_files.fill(module, {key: source.take(state[source.name]) for key, source in sources.items()}, device, dtype)
    classes = found["map_label.weight"][1] if "map_label.weight" in found else None
    sde, predicts, scale, net = _preconditioned(_raw(module, classes), kind, levels, sigma_data)
    return Pretrained(net, sde, predicts, (found[f"enc.{size}x{size}_conv.weight"][1], size, size), classes, classes, scale)


def _unpickle(path: StrPath, allow_pickle: bool) -> Any:
    """Return the state dict of the averaged network in a pickle."""
    if not allow_pickle:
        raise ValueError(
            f"path={os.fspath(path)!r} is a pickle, and reading a pickle runs the code in it; give allow_pickle=True if you "
            "trust the file, or write net.state_dict() with safetensors where its code base is installed"
        )
    with Path(path).open("rb") as file:
        try:
            saved = pickle.load(file)
        except ModuleNotFoundError as error:
            raise ImportError(f"path={os.fspath(path)!r} needs its code base on the path: {error}") from error
    try:
        return saved["ema"].state_dict()
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"path={os.fspath(path)!r} is not {KIND}: it must have a network as 'ema', and gave {error!r}") from None


def _preconditioned(network: Network, kind: str, levels: Any, sigma_data: float) -> tuple[Schedule, str, float, Network]:
    """Return the schedule, the prediction, the scale of time and net(x, t, labels) of a raw network F(x, noise, labels)."""

    def net(x: Any, t: Any, labels: Any) -> Any:
        return network(x, t.to(x.dtype), labels)[:, : x.shape[1]]  # iDDPM's network also returns a variance

    def denoised(x: Any, sigma: Any, labels: Any) -> Any:
        return edm_preconditioned(lambda y, noise: network(y, noise, labels), sigma_data)(x, sigma.to(x.dtype))

    if kind == "edm":
        return EDM(), "x0", 1.0, denoised
    if kind == "ve":
        sde, eps = exploding(network, 0.01, 50.0)
        return sde, "eps", 1.0, eps
    if kind == "vp":
        return VPSDE.linear(0.1, 20.0), "eps", 999.0, net
    sigma = np.asarray(levels, dtype=np.float64)[-2::-1]
    return VPSDE.discrete(1 / (1 + sigma**2)), "eps", 1.0, net


def _raw(module: Any, classes: int | None) -> Network:
    """Return F(x, noise, labels), for labels of any framework or None."""
    import torch

    def network(x: Any, noise: Any, labels: Any) -> Any:
        if classes is not None:
            labels = torch.full((len(x),), classes, device=x.device) if labels is None else labels_like(labels, x)
        output = module(x, noise, labels)
        return output if torch.is_tensor(output) else output.sample

    return network


def _has_fir(filters: Mapping[str, Any], path: StrPath) -> bool:
    """Return whether the resolution changes through the filter [1, 3, 3, 1], and not [1, 1]; every resampling has its own copy."""
    taps = {tuple(np.asarray(value)[0, 0, 0] / np.asarray(value)[0, 0, 0, 0]) for value in filters.values()}
    if taps - {(1.0, 3.0, 3.0, 1.0)} and taps - {(1.0, 1.0)}:
        raise ValueError(
            f"path={os.fspath(path)!r} resamples with the filters {sorted(taps)}, and only [1, 1] or [1, 3, 3, 1] is supported"
        )
    return bool(taps - {(1.0, 1.0)})
