"""Flax checkpoints of DDPM++ and NCSN++ (Song et al., arXiv 2011.13456), as weights of the same networks in PyTorch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...extras import needs
from . import torch_files
from .torch_files import Shapes, StrPath

if TYPE_CHECKING:
    from .ncsnpp import Architecture

_KIND = "a checkpoint of DDPM++ or NCSN++ in JAX"

# the class of a module in PyTorch -> in Flax, which numbers the modules of a class in the order of their use
_CLASSES = {
    "FourierFeatures": "GaussianFourierProjection",
    "Linear": "Dense",
    "Conv2d": "Conv",
    "GroupNorm": "GroupNorm",
    "Residual": "ResnetBlockBigGANpp",
    "Attention": "AttnBlockpp",
    "InputSkip": "Combine",
    "StridedBlur": "Downsample",
}
_ORDERS = {2: (1, 0), 4: (3, 2, 0, 1)}  # axes of a kernel: Flax has the in and out channels last, PyTorch has out and in first


def is_flax(path: StrPath) -> bool:
    """Return whether a file begins like a mapping in MessagePack, as `flax.training.checkpoints` writes; torch.save never does."""
    with Path(path).open("rb") as file:
        first = file.read(1)
    return first != b"" and (0x80 < first[0] < 0x90 or first[0] in (0xDE, 0xDF))


def read(path: StrPath) -> dict[str, Any]:
    """Return the nested mappings of arrays that Flax wrote.

    Raises
    ------
    ImportError
        Where flax is not installed; it names the extra that has it.
    ValueError
        Where the file is damaged.
    """
    with needs("jax", "a checkpoint of Flax"):
        from flax.serialization import msgpack_restore
    try:
        return msgpack_restore(Path(path).read_bytes())
    except Exception as error:  # MessagePack has errors of its own for each way in which a file can be damaged
        raise ValueError(f"path={os.fspath(path)!r} cannot be read as Flax's MessagePack: {error}") from None


def weights(params: Mapping[str, Any], path: StrPath, size: int | None) -> dict[str, Any]:
    """Return `params_ema` by the names of the network in PyTorch.

    Raises
    ------
    ValueError
        If it lacks a weight of that network, or has another one; the message gives its name in the file.
    """
    with needs("torch", "a checkpoint of Flax, whose network runs in PyTorch,"):
        import torch

        from .ncsnpp import NCSNpp

    arrays = dict(_flat(params, path))
    found = torch_files.shapes_of(arrays)
    with torch.device("meta"):
        network = NCSNpp(_flax_architecture(found, path, size))
    names = _names(network)
    shapes = torch_files.shapes_of(network.state_dict())
    expected = {name: tuple(shapes[key][i] for i in _inverse(name, len(shapes[key]))) for key, name in names.items()}
    torch_files.check(found, expected, path, _KIND)
    state = {}
    for key, name in names.items():
        array = torch.tensor(arrays[name])
        state[key] = array.permute(_ORDERS[array.ndim]).contiguous() if _is_kernel(name) else array
    return state


def _flat(params: Any, path: StrPath, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, path, f"{prefix}{key}/")
        elif hasattr(value, "shape"):
            yield prefix + key, value
        else:
            raise ValueError(f"path={os.fspath(path)!r} has {prefix + key!r} of type {type(value).__name__}, not an array")


def _is_kernel(name: str) -> bool:
    return name.endswith(("kernel", "weight"))


def _inverse(name: str, ndim: int) -> tuple[int, ...]:
    """Return the axes of the PyTorch weight in the order of Flax's."""
    order = _ORDERS[ndim] if _is_kernel(name) else tuple(range(ndim))
    return tuple(sorted(range(ndim), key=order.__getitem__))


def _names(network: Any) -> dict[str, str]:
    """Return Flax's name of each weight."""
    used: Counter[str] = Counter()
    names = {}
    for i, module in enumerate(network.all_modules):
        kind = _CLASSES[type(module).__name__]
        for key, value in module.state_dict().items():
            names[f"all_modules.{i}.{key}"] = f"{kind}_{used[kind]}/{_leaf(key, value.ndim)}"
        used[kind] += 1
    return names


def _leaf(key: str, ndim: int) -> str:
    """Return Flax's name of a weight within its module; the strided convolution belongs to the code base, with its own names."""
    head, _, name = key.rpartition(".")
    if name == "weight" and not head.startswith("Conv2d"):
        name = "scale" if ndim == 1 else "kernel"
    return f"{head}/{name}" if head else name


def _flax_architecture(found: Shapes, path: StrPath, size: int | None) -> Architecture:
    """Return what the weights imply, with attention at 16 x 16."""
    from .ncsnpp import Architecture

    kinds = Counter(module.rpartition("_")[0] for module in {name.partition("/")[0] for name in found})
    residual = "ResnetBlockBigGANpp_{}/{}".format
    count = kinds["ResnetBlockBigGANpp"]
    convolutions = ("Conv_0/kernel", *(residual(i, "Conv_0/kernel") for i in range(max(count, 1))))
    torch_files.check_convolutions(found, convolutions, path, _KIND)
    resampling = [
        residual(i, "Conv_2/kernel") in found and found[residual(i, "Conv_0/kernel")][2] == found[residual(i, "Conv_0/kernel")][3]
        for i in range(count)
    ]
    levels = sum(resampling) // 2 + 1
    blocks = (count - sum(resampling) - 2 - levels) // (2 * levels)
    if blocks < 1:
        raise ValueError(f"path={os.fspath(path)!r} is not {_KIND}: it has {count} residual blocks for {levels} levels")
    size = size or 4 << (levels - 1)
    input_pyramid = "residual" if kinds["Downsample"] else "sum" if kinds["Combine"] else "none"
    return Architecture(
        channels=found["Conv_0/kernel"][2],
        features=found["Conv_0/kernel"][3],
        widths=tuple(found[residual(i * (blocks + 1), "Conv_0/kernel")][3] for i in range(levels)),
        blocks=blocks,
        attends=tuple(size >> i == 16 for i in range(levels)),
        fourier=kinds["GaussianFourierProjection"] > 0,
        input_pyramid=input_pyramid,
        output_pyramid=kinds["GroupNorm"] > 1,
        fir=input_pyramid != "none" or kinds["GroupNorm"] > 1,
    )
