"""Checkpoints of the code base of "Score-based generative modelling through SDEs" (Song et al., arXiv 2011.13456)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...arguments import one_of
from ...sde import VESDE, VPSDE, SubVPSDE
from ..pretrained import Network, Pretrained
from . import flax_files, torch_files
from .torch_files import Shapes, StrPath

if TYPE_CHECKING:
    from .ncsnpp import Architecture

_KIND = "a checkpoint of DDPM++ or NCSN++"


def load_score_sde(
    path: StrPath, device: str | None = None, dtype: str = "float32", *, sde: str = "vp", size: int | None = None
) -> Pretrained:
    r"""Load DDPM++ or NCSN++ as trained in continuous time by Song et al. (arXiv 2011.13456), in PyTorch or in JAX.

    The network F takes x in the scale of data in [-1, 1] and predicts eps = F(x, 999 t) with sde="vp" or "subvp". With "ve" the
    code base has data in [0, 1], and the score is F(2 x - 1, sigma) / sigma. That means eps = -F(x, sigma / 2) if x and sigma
    refer to data in [-1, 1], as they do here.

    Parameters
    ----------
    path : path
        The file that training wrote. In PyTorch (`checkpoint_8.pth`) a dict of `model` (weights), `ema` (averaged weights, to be
        used), `optimizer` and `step`; in JAX (`checkpoint_8`) the same in Flax's MessagePack, with `params_ema`. The architecture
        is inferred from the weights.
    device, dtype
        See `deis.load_model`.
    sde : {"vp", "subvp", "ve"}
        The SDE of the training, named as in the published folders. VP and sub-VP have beta from 0.1 to 20. VE has sigma from 0.01
        to 50 for data in [0, 1], unless the file has other levels. A file does not distinguish VP from sub-VP, nor training in
        continuous time from training in discrete time.
    size : int, optional
        Height and width of the images. By default the size at which attention is at 16 x 16 (PyTorch), or the smallest level is
        4 x 4 (JAX, whose files do not say where attention is). Both hold in the published networks up to 256 x 256.

    Returns
    -------
    Pretrained

    Raises
    ------
    FileNotFoundError
    ImportError
        Where torch, or for JAX's files flax, is not installed; it names the extra.
    ValueError
        For an unknown sde or dtype; if the file is not such a checkpoint (the message names the first key that differs); or if the
        embedding of the noise level is not that of the sde: features of log sigma with "ve", positions with the others.

    Notes
    -----
    It supports the published configurations `*_ddpmpp_*` and `*_ncsnpp_*`: residual blocks after BigGAN, divided by sqrt 2; sums
    for the skips from the input; and a blur at changes of resolution where the image joins on the way down or up (NCSN++), but
    none elsewhere (DDPM++). The older networks `ddpm`, `ncsn` and `ncsnv2` of that code base are refused.
    """
    one_of("dtype", dtype, torch_files.DTYPES)
    saved = flax_files.read(path) if flax_files.is_flax(path) else torch_files.read(path)
    return of_saved(saved, path, device, dtype, sde=sde, size=size)


def recognises(saved: Any) -> bool:
    """Return whether the content of a file looks like such a checkpoint."""
    return isinstance(saved, Mapping) and ("params_ema" in saved or {"model", "ema"} <= set(saved))


def of_saved(saved: Any, path: StrPath, device: str | None, dtype: str, *, sde: str = "vp", size: int | None = None) -> Pretrained:
    """Return the network from the content of a file; see `load_score_sde`."""
    one_of("sde", sde, ("vp", "subvp", "ve"))
    levels = (0.01, 50.0)
    if isinstance(saved, Mapping) and "params_ema" in saved:
        state = flax_files.weights(saved["params_ema"], path, size)
        network = network_of(torch_files.shapes_of(state), path)
        size = size or 4 << (len(network.architecture.widths) - 1)
    else:
        last, averages, sigmas = _parts(saved, path)
        network, levels = network_of(torch_files.shapes_of(last), path), _range(sigmas)
        size = size or torch_files.size_of(network.architecture.attends, path)
        state = averaged(last, averages, path)
    architecture = network.architecture
    if architecture.outputs not in (0, architecture.channels):
        raise ValueError(
            f"path={os.fspath(path)!r} has {architecture.outputs} channels out and {architecture.channels} in: a network of "
            "position and velocity; give sde='cld'"
        )
    if architecture.fourier != (sde == "ve"):
        embedding = "features of log sigma, as with sde='ve'" if sde != "ve" else "positions, as with sde='vp' or 'subvp'"
        raise ValueError(f"sde={sde!r} does not fit path={os.fspath(path)!r}, where the noise level enters by {embedding}")
    network = torch_files.fill(network, state, device, dtype)
    shape = (architecture.channels, size, size)
    if sde == "ve":
        schedule, net = exploding(network, *levels)
        return Pretrained(net, schedule, "eps", shape, None, None, 1.0)
    preserving = VPSDE.linear(0.1, 20.0) if sde == "vp" else SubVPSDE.linear(0.1, 20.0)
    return Pretrained(lambda x, t, labels: network(x, t.to(x.dtype)), preserving, "eps", shape, None, None, 999.0)


def _range(sigmas: Any) -> tuple[float, float]:
    """Return the least and the greatest of the training levels, which are powers and so correct to rounding only."""
    low, high = (float(f"{float(value):.6g}") for value in (sigmas.min(), sigmas.max()))
    return low, high


def exploding(network: Network, low: float, high: float) -> tuple[VESDE, Network]:
    """Return the schedule and the eps of F(x, log sigma, labels), where sigma, from low to high, is of data in [0, 1]."""
    sde = VESDE(2 * low, 2 * high, sampling_eps=1e-5)
    ratio = math.log(high / low)

    def net(x: Any, t: Any, labels: Any) -> Any:
        return -network(x, t.to(x.dtype) * ratio + math.log(low), labels)

    return sde, net


def _parts(saved: Any, path: StrPath) -> tuple[dict[str, Any], list[Any], Any]:
    """Return the last weights by their names, the list of averaged ones, and the training levels of sigma."""
    try:
        state = torch_files.weights(saved["model"], "entry 'model'", path)
        return state, saved["ema"]["shadow_params"], state.pop("sigmas")
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"path={os.fspath(path)!r} is not {_KIND}: 'model' with 'sigmas', and 'ema' with 'shadow_params', were expected, and "
            f"reading them raised {error!r}; a network of position and velocity has no 'sigmas' and takes sde='cld'"
        ) from None


def averaged(state: Mapping[str, Any], averages: list[Any], path: StrPath) -> dict[str, Any]:
    """Return the averaged weights by their names.

    The averages are in the order of the weights, without the frequencies of Fourier features, which are not trained.
    """
    trained = [key for key in state if key != "all_modules.0.W"]
    if len(averages) != len(trained):
        raise ValueError(f"path={os.fspath(path)!r} has {len(trained)} trained weights, and averages of {len(averages)}")
    for key, average in zip(trained, averages, strict=True):
        if average.shape != state[key].shape:
            raise ValueError(
                f"path={os.fspath(path)!r} has {key!r} of shape {tuple(state[key].shape)}, and an average of it of shape "
                f"{tuple(average.shape)}; the averages must be in the order of the weights"
            )
    return {**state, **dict(zip(trained, averages, strict=True))}


def network_of(found: Shapes, path: StrPath) -> Any:
    """Return the network of these weights, without values."""
    import torch

    from .ncsnpp import NCSNpp

    architecture = _torch_architecture(_modules(found, path), path)
    with torch.device("meta"):
        network = NCSNpp(architecture)
    torch_files.check(found, torch_files.shapes_of(network.state_dict()), path, _KIND)
    return network


def _modules(found: Shapes, path: StrPath) -> list[dict[str, tuple[int, ...]]]:
    """Return for each of `all_modules` the shapes of its weights."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in found.items():
        head, _, rest = key.partition(".")
        number, _, name = rest.partition(".")
        if head != "all_modules" or not number.isdigit():
            raise ValueError(f"path={os.fspath(path)!r} is not {_KIND}: it has {key!r}, and 'all_modules.0...' was expected")
        modules.setdefault(number, {})[name] = shape
    return [modules[number] for number in sorted(modules, key=int)]


def _kind(shapes: Shapes) -> str:
    """Return what a module is, by the names and shapes of its weights."""
    if "NIN_0.W" in shapes and "GroupNorm_1.weight" not in shapes:
        return "attention"
    if {"GroupNorm_0.weight", "Conv_0.weight", "Dense_0.weight"} <= set(shapes):
        wide = shapes["GroupNorm_0.weight"][0] != shapes["Conv_0.weight"][0]
        return "residual" if wide or "Conv_2.weight" not in shapes else "resampling"
    for name, kind in {"W": "fourier", "Conv2d_0.weight": "strided", "Conv_0.weight": "skip"}.items():
        if name in shapes:
            return kind
    return {1: "norm", 4: "conv"}.get(len(shapes.get("weight", ())), "other")


def _torch_architecture(modules: Sequence[Shapes], path: StrPath) -> Architecture:
    """Return what the modules imply; the comparison of all shapes finds what does not follow from it."""
    from .ncsnpp import Architecture

    kinds = [_kind(shapes) for shapes in modules]
    levels = kinds.count("resampling") // 2 + 1
    residuals = [i for i, kind in enumerate(kinds) if kind == "residual"]
    blocks = (len(residuals) - 2 - levels) // (2 * levels)  # of levels * blocks, 2 in the middle, levels * (blocks + 1)
    if blocks < 1 or "conv" not in kinds:
        raise ValueError(
            f"path={os.fspath(path)!r} is not {_KIND}: its all_modules have {len(residuals)} residual blocks for {levels} levels, "
            "and at least 3 for each and 2 in the middle were expected; older networks of that code base are not supported"
        )
    firsts = residuals[: levels * blocks : blocks]
    convolutions = [shapes["weight"] for kind, shapes in zip(kinds, modules, strict=True) if kind == "conv"]
    conv_in, conv_out = convolutions[0], convolutions[-1]
    input_pyramid = "residual" if "strided" in kinds else "sum" if "skip" in kinds else "none"
    output_pyramid = kinds.count("norm") > 1
    return Architecture(
        channels=conv_in[1],
        features=conv_in[0],
        widths=tuple(modules[i]["Conv_0.weight"][0] for i in firsts),
        blocks=blocks,
        attends=tuple(kinds[i + 1] == "attention" for i in firsts),
        fourier=kinds[0] == "fourier",
        input_pyramid=input_pyramid,
        output_pyramid=output_pyramid,
        fir=input_pyramid != "none" or output_pyramid,  # in every published network with a pyramid, and in no other
        outputs=conv_out[0],
    )
