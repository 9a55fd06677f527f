"""What a plan of blocks or frequencies checks of its own table when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import Array, Indices
from ..machine import advance
from .algebra import ALGEBRAS


def check_block_shapes(plan: Any, columns: Sequence[str]) -> None:
    """Raise ValueError if a column has another shape than keep_x asks for, or a number is not finite."""
    c, axes = plan.keep_x.shape[1:], ALGEBRAS[plan.basis].axes
    if not c or (axes == 2 and (len(c) != 2 or c[0] != c[1])) or 0 in plan.keep_x.shape:
        wanted = "(n, k, k)" if plan.basis == "block" else "(n, ...), one number a frequency"
        raise ValueError(f"keep_x must have shape {wanted} with basis={plan.basis!r}, and has {plan.keep_x.shape}")
    n, window = len(plan.keep_x), plan.keep_p.shape[1] if plan.keep_p.ndim > 1 else 0
    shapes = {"t": (n + 1,), "keep_x": (n, *c), "next_x": (n, *c)} | dict.fromkeys(("keep_p", "next_p"), (n, max(window, 1), *c))
    for name in columns:
        values, shape = getattr(plan, name), shapes.get(name, (n + 1, *c))
        if values.shape != shape:
            raise ValueError(f"{name} must have shape {shape} beside keep_x of {plan.keep_x.shape}, and has {values.shape}")
        if not np.isfinite(values).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(f"{name}{list(place)}={values[place].item()!r} must be finite")


def check_block_steps(plan: Any) -> None:
    """Raise ValueError if the last row ends no step, the times of the steps turn back, or a stage leaves its step."""
    if plan.accepts.dtype != np.bool_ or plan.accepts.shape != (plan.nfe,):
        raise ValueError(f"accepts must be bool of shape {(plan.nfe,)}, and is {plan.accepts.dtype} of shape {plan.accepts.shape}")
    if not plan.accepts[-1]:
        raise ValueError("accepts is False in the last row, which must end a step")
    ts, t = plan.ts, plan.t[:-1]
    steps = np.diff(ts)
    if not ((steps < 0).all() or (steps > 0).all()):
        raise ValueError(f"t must decrease from step to step, or increase from step to step, and the steps are at {ts.tolist()}")
    step: Indices = np.cumsum(plan.accepts) - plan.accepts  # of each row
    low, high = np.minimum(ts[:-1], ts[1:])[step], np.maximum(ts[:-1], ts[1:])[step]
    if not ((low <= t) & (t <= high)).all():
        raise ValueError(f"t of every stage must lie within its step, and t is {plan.t.tolist()} with steps at {ts.tolist()}")


def check_block_use(plan: Any) -> None:
    """Raise ValueError if a row uses a prediction from before the first, or makes one that nothing uses."""
    n, window = plan.keep_p.shape[:2]
    weight = ((plan.keep_p != 0) | (plan.next_p != 0)).reshape(n, window, -1).any(axis=2)
    for i in range(n):
        if weight[i, i + 1 :].any():
            raise ValueError(f"row {i} uses a prediction from before the first: it has {i + 1} of {window}")
        if not any(weight[i + j, j] for j in range(min(window, n - i))):
            raise ValueError(f"row {i} wastes an evaluation: no row gives the prediction at t={plan.t[i].item()!r} any weight")


def check_block_transport(plan: Any) -> None:
    """Run each row on alpha x_0 + sigma eps for constant x_0 and eps, as the pair (alpha, sigma), from where it is exact."""
    combine = ALGEBRAS[plan.basis].combine
    exact = np.stack([plan.alpha, plan.sigma], axis=1)
    base, history = exact[0], list[Array]()
    for i, row in enumerate(plan.rows):
        history = [np.stack([np.zeros_like(plan.unit[i]), plan.unit[i]]), *history][: plan.window]
        with np.errstate(all="ignore"):
            size = _size(row, base, history, combine)
            base, x = advance(row, base, history, combine)
            off = exact[i + 1] - x
        if not np.abs(off).max() <= 1e-11 * (size + np.abs(exact[i + 1]).max()):
            part = "alpha" if np.abs(off[0]).max() > np.abs(off[1]).max() else "sigma"
            raise ValueError(
                f"row {i} is inconsistent: it does not carry alpha x_0 + sigma eps to {part} at t={plan.t[i + 1].item()!r}, off by "
                f"{np.abs(off).max():.3g}; check keep_x, keep_p, next_x, next_p and unit"
            )
        if row.accepts:
            base = base + off  # so that no row is charged with the rounding of those before, which psi multiplies


def _size(row: Any, base: Array, history: Sequence[Array], combine: Any) -> float:
    """Return the sum of the terms of a row without their signs, of which its rounding is a part."""
    past = [np.abs(p) for p in history]
    kept = combine(np.abs(row.keep_x), np.abs(base), np.abs(row.keep_p), past)
    moved = kept if row.next_x is None else combine(np.abs(row.next_x), kept, np.abs(row.next_p), past)
    return float(moved.max())
