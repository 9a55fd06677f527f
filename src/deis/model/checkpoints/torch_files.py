"""What the loaders of PyTorch checkpoints share: reading a file safely, checking its weights, and putting them into a network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...extras import needs

DTYPES = ("float32", "float64")
"""The precisions in which networks can be loaded."""
Shapes = Mapping[str, tuple[int, ...]]
StrPath = str | os.PathLike[str]


def read(path: StrPath) -> Any:
    """Return the content of a file of torch.save or safetensors, on the CPU: only tensors and plain containers, so no code runs.

    Raises
    ------
    FileNotFoundError
    ImportError
        Where torch is not installed; it names the extra that has it.
    ValueError
        If the file was written by neither, or holds other objects.
    """
    with needs("torch", "a PyTorch checkpoint"):
        import torch
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the reader of pickles raises any error on other files, such as an IndexError on plain text
        reason = str(error).partition("\n")[0]
        raise ValueError(f"path={os.fspath(path)!r} is not a file of tensors that torch.save wrote: {reason}") from None


def _read_safetensors(path: StrPath) -> Any:
    with needs("torch", "a checkpoint in safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"path={os.fspath(path)!r} cannot be read as safetensors: {error}") from None


def weights(saved: Any, part: str, path: StrPath) -> dict[str, Any]:
    """Return a state dict by the names of its tensors, without the `module.` that `torch.nn.DataParallel` puts before them.

    Raises
    ------
    ValueError
        Where `part` of the file, as the message calls it, is not a mapping of names to tensors.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"path={os.fspath(path)!r}: {part} must map names to tensors, and is a {type(saved).__name__}")
    for key, value in saved.items():
        if not hasattr(value, "shape"):
            raise ValueError(f"path={os.fspath(path)!r}: {part} must map names to tensors, and {key!r} is a {type(value).__name__}")
    return {key.removeprefix("module."): value for key, value in saved.items()}


def size_of(attends: Sequence[bool], path: StrPath) -> int:
    """Return the size of the images at which the first level with attention is at 16 x 16.

    Raises
    ------
    ValueError
        If no level has attention.
    """
    if not any(attends):
        raise ValueError(f"path={os.fspath(path)!r} has no attention by which to tell the size of its images; give size=")
    return 16 << list(attends).index(True)


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its name."""
    return {key: tuple(value.shape) for key, value in state.items()}


def check(found: Shapes, expected: Shapes, path: StrPath, kind: str) -> None:
    """Raise ValueError, naming the first key, unless the file has the keys and shapes of the network and no others."""
    for key in (*expected, *found):
        if key not in found:
            wrong = f"lacks {key!r}, of shape {expected[key]}"
        elif key not in expected:
            wrong = f"has {key!r}, of shape {found[key]}, which that network does not"
        elif found[key] != expected[key]:
            wrong = f"has {key!r} of shape {found[key]}, and not {expected[key]}"
        else:
            continue
        raise ValueError(f"path={os.fspath(path)!r} is not {kind}: it {wrong}; use the loader of the code base that wrote it")


def check_convolutions(found: Shapes, keys: Iterable[str], path: StrPath, kind: str) -> None:
    """Raise ValueError, naming the first key, unless the file has a convolution by each of these names."""
    for key in keys:
        if len(found.get(key, ())) != 4 or 0 in found[key]:
            wrong = f"has {key!r} of shape {found[key]}" if key in found else f"lacks {key!r}"
            raise ValueError(f"path={os.fspath(path)!r} is not {kind}: it {wrong}, and a convolution was expected there")


def for_sampling(network: Any, device: str | None, dtype: str) -> Any:
    """Return a network on the device and in the precision, without dropout or gradients."""
    import torch

    # not the module's own `to`: that of diffusers warns about casts, because of half precision
    return torch.nn.Module.to(network, device or "cpu", getattr(torch, dtype)).eval().requires_grad_(False)


def fill(network: Any, state: Mapping[str, Any], device: str | None, dtype: str) -> Any:
    """Return a network that was made on the meta device with these weights, for sampling."""
    import torch

    network.load_state_dict({key: value.to(getattr(torch, dtype)) for key, value in state.items()}, assign=True)
    return for_sampling(network, device, dtype)
