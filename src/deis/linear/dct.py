"""The orthonormal discrete cosine transform (DCT-II) of the last axes, and its inverse, on NumPy, torch and JAX arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..foreign import is_jax, is_torch


def to_frequencies(x: Any, axes: int) -> Any:
    """Return the DCT-II of the last axes: X_n = sqrt((2 - [n = 0]) / N) sum_j x_j cos(pi n (2 j + 1) / (2 N)) along each."""
    return _transform(x, axes, inverse=False)


def from_frequencies(x: Any, axes: int) -> Any:
    """Return the inverse of `to_frequencies`, which is its transpose."""
    return _transform(x, axes, inverse=True)


def _transform(x: Any, axes: int, *, inverse: bool) -> Any:
    last = tuple(range(-axes, 0))
    if is_torch(x):
        for axis in last:
            x = (_inverse_torch if inverse else _forward_torch)(x.movedim(axis, -1)).movedim(-1, axis)
        return x.contiguous()
    if is_jax(x):
        from jax.scipy import fft as jax_fft

        return (jax_fft.idctn if inverse else jax_fft.dctn)(x, type=2, axes=last, norm="ortho")
    from scipy import fft

    return (fft.idctn if inverse else fft.dctn)(x, type=2, axes=last, norm="ortho")


def _turn(n: int, like: Any) -> Any:
    """Return exp(-i pi m / 2n) sqrt((2 - [m = 0]) / n) for m below n, from float64."""
    import torch

    m = np.arange(n)
    turn = np.sqrt((2.0 - (m == 0)) / n) * np.exp(-0.5j * np.pi * m / n)
    return torch.from_numpy(turn).to(like.dtype.to_complex()).to(like.device)


def _forward_torch(x: Any) -> Any:
    """Return the DCT by a Fourier transform of the even entries and then the odd ones backwards (Makhoul, 1980)."""
    import torch

    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    return (torch.fft.fft(v) * _turn(x.shape[-1], x)).real


def _inverse_torch(x: Any) -> Any:
    """Undo `_forward_torch`: the turned transform of real v is x_m - i x_{n-m}, with each x over its own scale."""
    import torch

    n = x.shape[-1]
    turn = _turn(n, x)
    scale = turn.abs()
    plain = x / scale
    mirrored = torch.cat([torch.zeros_like(x[..., :1]), plain[..., 1:].flip(-1)], dim=-1)
    v = torch.fft.ifft(torch.complex(plain, -mirrored) * (turn / scale).conj()).real
    y = torch.empty_like(v)
    y[..., ::2], y[..., 1::2] = v[..., : (n + 1) // 2], v[..., (n + 1) // 2 :].flip(-1)
    return y
