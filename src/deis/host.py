"""Small arrays of the host that a torch device needs: no step waits for their copies, and a CUDA graph keeps them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .foreign import is_compiling, is_torch

_COPY: ContextVar[Callable[[Any, Any], Any] | None] = ContextVar("_COPY", default=None)
"""What copies in place of `_copied`, in this thread."""


def on_device(values: Any, device: Any) -> Any:
    """Return an array of the host, or a tensor, as a tensor on a device."""
    tensor = sys.modules["torch"].as_tensor(values)
    if tensor.device == device:
        return tensor
    copy = _copied if is_compiling() else _COPY.get() or _copied
    return copy(tensor, device)


def _copied(tensor: Any, device: Any) -> Any:
    # A copy from ordinary memory waits for all that the device has to do; one from pinned memory takes its turn.
    if device.type == "cuda" and not is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type in ("cuda", "meta"))


def labels_like(labels: Any, x: Any) -> Any:
    """Return labels of any framework, or None, as a torch tensor on the device of x."""
    return labels if labels is None or is_torch(labels) else on_device(labels, x.device)


def take(x: Any, index: Any) -> Any:
    """Return x[index], for an array of indices made on the host."""
    return x[on_device(index, x.device)] if is_torch(x) else x[index]


class Kept:
    """What one run copies to the device, for later runs of the same steps, which may not copy: a CUDA graph reads it in place."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []

    def keeping(self) -> Any:
        """Return a context in which what is copied is kept."""

        def copy(tensor: Any, device: Any) -> Any:
            self.tensors.append(_copied(tensor, device))
            return self.tensors[-1]

        return _copying(copy)

    def giving(self) -> Any:
        """Return a context in which what was kept is given in place of copies, in the same order."""
        left = iter(self.tensors)
        return _copying(lambda tensor, device: next(left))


@contextmanager
def _copying(copy: Callable[[Any, Any], Any]) -> Iterator[None]:
    token = _COPY.set(copy)
    try:
        yield
    finally:
        _COPY.reset(token)
