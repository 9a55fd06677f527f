"""Networks in ONNX, run by onnxruntime on NumPy or torch arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...backends import like
from ...extras import needs
from ...foreign import is_torch
from ...sde import Schedule
from ..pretrained import Pretrained
from .torch_files import StrPath

_DTYPES = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


def load_onnx(
    path: StrPath,
    device: str | None = None,
    *,
    sde: Schedule | None = None,
    predicts: str = "eps",
    shape: Sequence[int] | None = None,
    time_scale: float = 1.0,
    num_classes: int | None = None,
    null_class: int | None = None,
) -> Pretrained:
    """Load a network in ONNX: (x, t) -> output, or (x, t, labels) -> output, in this order whatever the names of its inputs.

    Parameters
    ----------
    path : path
    device : str, optional
        "cuda" runs it on the GPU, if onnxruntime has that provider.
    sde : Schedule
        The noise schedule that it was trained on, which the file does not contain.
    predicts : {"eps", "x0", "v", "score", "flow"}
    shape : sequence of int, optional
        (channels, height, width), if the file leaves them open.
    time_scale : float
        The network takes time_scale * t, of shape (batch,) or, if its input is so declared, () or (1,) for the whole batch.
    num_classes, null_class : int, optional
        See `deis.Pretrained`; for a network with labels.

    Returns
    -------
    Pretrained
        Its model takes NumPy arrays or torch tensors, and returns the same kind in the same dtype.

    Raises
    ------
    FileNotFoundError
    ImportError
        Where onnxruntime is not installed; it names the extra.
    ValueError
        Without sde, for inputs that are not those above, an unknown shape, or a file that onnxruntime cannot read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={os.fspath(path)!r} is not a file")
    if sde is None:
        raise ValueError(
            f"path={os.fspath(path)!r}: ONNX does not tell how a network was trained; give sde=, such as deis.VPSDE.linear()"
        )
    session = _session(path, device)
    inputs = _inputs(session, path, num_classes)
    shape = tuple(shape or inputs[0].shape[1:])
    if len(shape) != 3 or not all(isinstance(size, int) for size in shape):
        raise ValueError(
            f"path={os.fspath(path)!r} leaves the shape of samples open, {list(shape)}; give shape=(channels, height, width)"
        )

    def net(x: Any, t: Any, labels: Any) -> Any:
        arrays = [_host(x), _host(t)] + ([] if num_classes is None else [_host(labels)])
        if inputs[1].shape in ([], [1]):  # one time for the whole batch, as sampling always has
            arrays[1] = arrays[1][0].reshape(inputs[1].shape)
        feed = {put.name: np.asarray(array, _DTYPES[put.type]) for put, array in zip(inputs, arrays, strict=True)}
        return like(session.run(None, feed)[0], x)

    return Pretrained(net, sde, predicts, shape, num_classes, null_class, time_scale)


def _inputs(session: Any, path: StrPath, num_classes: int | None) -> list[Any]:
    """Return the inputs of a network, which must be x, t and, with classes, labels."""
    inputs: list[Any] = session.get_inputs()
    expected = 2 if num_classes is None else 3
    if len(inputs) != expected or any(put.type not in _DTYPES for put in inputs):
        raise ValueError(
            f"path={os.fspath(path)!r} has the inputs {[f'{put.name}: {put.type}' for put in inputs]}, and "
            f"{'x and t' if expected == 2 else 'x, t and labels'} were expected; give num_classes= for a network with labels"
        )
    return inputs


def _host(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu() if is_torch(x) else x)


def _session(path: StrPath, device: str | None) -> Any:
    with needs("onnx", "a network in ONNX"):
        import onnxruntime
    wanted = "CPUExecutionProvider" if device in (None, "cpu") else f"{device.partition(':')[0].upper()}ExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise ValueError(f"device={device!r}: onnxruntime has no {wanted} here, only {onnxruntime.get_available_providers()}")
    try:
        return onnxruntime.InferenceSession(path, providers=[wanted])
    except Exception as error:  # onnxruntime has exception classes of its own, one for each reason
        raise ValueError(f"path={os.fspath(path)!r} cannot be read as ONNX: {error}") from None
