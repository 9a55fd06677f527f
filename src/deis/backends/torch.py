"""PyTorch: coefficients are Python numbers, so that no step waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..foreign import is_torch
from ..host import on_device
from ..machine import Sum, terms, with_sums
from .record import MODEL, AddNoise, Backend, Call, changed
from .streams import streams


def combine(c_x: Any, x: Tensor, c_p: Sequence[Any] | Tensor, history: Sequence[Tensor]) -> Tensor:
    """Return c_x x + sum_j c_p[j] history[j], without the terms of weight 0; one kernel a term.

    Coefficients that are tensors, which may record gradients, are not looked at.
    """
    if isinstance(c_x, Tensor):
        return sum((c * p for c, p in zip(c_p, history, strict=False)), c_x * x)
    return add_up(terms(c_x, c_p[: len(history)]), x, c_p, history)


def add_up(total: Sum, x: Tensor, c_p: Any, history: Sequence[Tensor]) -> Tensor:
    """Return a sum of states, in the memory of its first term where that is a product."""
    if not total:
        return torch.zeros_like(x)
    states, (c, j) = (x, *history), total[0]
    y, own = (states[j], False) if c is None else (states[j] * c, True)
    for c, j in total[1:]:
        try:
            y, own = y.add_(states[j], alpha=c or 1) if own else torch.add(y, states[j], alpha=c or 1), True
        except RuntimeError:  # under torch.func, a term may have a batch or a derivative that y has no place for
            y = torch.add(y, states[j], alpha=c or 1)
    return y


def _full(x: Tensor, t: Sequence[float], dtype: Any, whole: bool) -> Tensor:
    times = on_device(torch.tensor(t, dtype=torch.int64 if whole else dtype), x.device)
    return times.unsqueeze(1).expand(-1, len(x)).contiguous()  # in half the time of repeat


def _vjp(f: Callable[..., Tensor], x: Tensor, *others: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Differentiate f also where no gradients are recorded, and where they are, so that the result can be differentiated again."""
    again = torch.is_grad_enabled() and x.requires_grad
    with torch.inference_mode(False) if x.is_inference() else nullcontext(), torch.enable_grad():
        # A backward pass keeps no tensor of inference mode, but it keeps a copy.
        others = tuple(v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in others)
        leaf = x if again else (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
        m = f(leaf, *others)

    def pull(u: Tensor) -> Tensor:
        with torch.inference_mode(False):
            u = (u.clone() if u.is_inference() else u).to(m.dtype)
            found = torch.autograd.grad(m, leaf, u, True, again, allow_unused=True)[0] if m.requires_grad else None
        if found is None:
            raise ValueError(
                "a function of x returned what has no derivative in x: it computes without gradients, such as under "
                "torch.no_grad(), or on a detached x; leave these out"
            )
        return found

    return m if again else m.detach(), pull


def _split(rng: Any, batch: int) -> list[Generator]:
    def spawn(generator: Generator) -> list[Generator]:
        # One seed a sample, drawn in order, so that two halves of a batch continue the stream of the whole.
        seeds = [int(torch.randint(2**62, (), generator=generator, device=generator.device)) for _ in range(batch)]
        return [Generator(generator.device).manual_seed(seed) for seed in seeds]

    return streams(rng, batch, Generator, spawn)


def _noise(rng: Any, batch: int) -> AddNoise:
    generators = _split(rng, batch)

    def add_noise(keep_z: float, x: Tensor, i: int = 0) -> Tensor:
        z = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in generators]
        return torch.add(x, on_device(torch.stack(z), x.device), alpha=keep_z)

    return add_noise


def _caller() -> Call:
    return _call_on_copies if torch.compiler.is_compiling() else _call


def _call(model: Callable[[Tensor, Tensor], Any], x: Tensor, t: Tensor, names: str = MODEL) -> Any:
    try:
        changes = x._version + t._version
    except RuntimeError:  # made in inference mode
        return _call_on_copies(model, x, t)
    m = model(x, t)
    if changes != x._version + t._version:
        raise changed(names)
    return m


def _call_on_copies(model: Callable[[Tensor, Tensor], Any], x: Tensor, t: Tensor, names: str = MODEL) -> Any:
    return model(x.clone(), t.clone())


def _like(values: Any, x: Tensor) -> Tensor:
    return on_device(torch.from_numpy(np.array(values, order="C")).to(x.dtype), x.device)


BACKEND = Backend(
    xp=torch,
    owns=is_torch,
    carry=lambda dtype: torch.promote_types(dtype, torch.float32),
    cast=lambda x, dtype: x if x.dtype is dtype else x.to(dtype),  # much the quicker question
    full=_full,
    to_host=lambda x: np.asarray(x.detach().cpu().double()),
    like=_like,
    combine=combine,
    vjp=_vjp,
    prepared=lambda plan, dtype: (with_sums(plan.rows, float), add_up),
    caller=_caller,
    split=_split,
    noise=_noise,
    copy=Tensor.clone,
    copied=lambda p, m, always: p.clone() if always or p is m else p,
    no_grad=torch.no_grad,
    each=lambda f, z: torch.stack([f(v) for v in z]),  # in one batch some layers do not run, and none ran faster
)
