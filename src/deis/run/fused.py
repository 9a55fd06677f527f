"""A sum of states in one kernel of a GPU, for loops that are captured; NVRTC compiles it, through torch's jiterator.

A kernel that waits for the one before takes a microsecond or two, whatever it computes, so that a sum of five terms in as many
kernels costs a small network's loop several percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..backends.record import Backend
from ..backends.torch import add_up
from ..machine import Row, Sum, terms, with_sums

_MOST = 8
"""The most states that the jiterator adds up in one kernel."""


def fusing(backend: Backend, device: torch.device) -> Backend:
    """Return a backend of torch that adds states up in one kernel; as it was where the device compiles none."""
    x = torch.ones(1, device=device)
    with suppress(Exception):  # the jiterator is in beta, and a build may lack NVRTC
        if float(_add_up(((2.0, 0), (3.0, 1)), x, (), (x,))) == 5.0:
            return replace(backend, combine=_combine, prepared=_prepared)
    return backend


def _prepared(plan: Any, dtype: Any) -> tuple[Sequence[Row], Callable[..., Tensor]]:
    return with_sums(plan.rows, float), _add_up


def _combine(c_x: Any, x: Tensor, c_p: Sequence[Any], history: Sequence[Tensor]) -> Tensor:
    return _add_up(terms(c_x, c_p[: len(history)]), x, c_p, history)


def _add_up(total: Sum, x: Tensor, c_p: Any, history: Sequence[Tensor]) -> Tensor:
    """Return what `deis.backends.torch.add_up` returns, bit for bit: a network in TF32 would make a thousandth of a last bit."""
    if len(total) < 2:
        return add_up(total, x, c_p, history)
    states = (x, *history)
    left = [(1.0 if c is None else c, states[j]) for c, j in total]
    while len(left) > 1:
        now, left = left[:_MOST], left[_MOST:]
        left.insert(0, (1.0, _kernel(len(now))(*(v for _, v in now), **{f"c{k}": c for k, (c, _) in enumerate(now)})))
    return left[0][1]


@cache
def _kernel(n: int) -> Callable[..., Tensor]:
    """Return the kernel of c0 x0 + c1 x1 + ... of n states, which rounds as torch's kernels do one after the other."""
    parameters = ", ".join([f"T x{k}" for k in range(n)] + [f"T c{k}" for k in range(n)])
    total = "c0 * x0"
    for k in range(1, n):
        total = f"fma(c{k}, x{k}, {total})"
    code = f"template <typename T> T deis_sum_{n}({parameters}) {{ return {total}; }}"
    made: Callable[..., Tensor] = torch.cuda.jiterator._create_jit_fn(code, **{f"c{k}": 1.0 for k in range(n)})
    return made
