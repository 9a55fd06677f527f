"""DEIS-SN: polynomials through predictions that are divided by their size (arXiv 2311.00157)."""

from __future__ import annotations

import numpy as np

from ..arguments import array, function, shown
from ..arrays import Array
from ..quadrature import Form, Norm
from ..sde import Schedule
from .clocks import CLOCKS
from .step import adams_weights


def checked_norm(norm: Norm | None, form: Form) -> Norm | None:
    """Return a norm that raises where it is not positive and finite; and raise where it was measured on another form."""
    if norm is None:
        return None
    function("norm", norm, "t")
    measured = getattr(norm, "form", form)
    if measured != form:
        raise ValueError(
            f"norm was measured on predictions of form={measured!r} and this plan has form={form!r}; measure it on such a plan"
        )

    def c(t: Array) -> Array:
        values = array("the result of norm(t)", norm(t))
        if values.shape != t.shape or not ((values > 0) & np.isfinite(values)).all():
            raise ValueError(
                f"norm must return positive, finite numbers of the shape of t, {t.shape}, and returned {shown(values)}"
            )
        return values

    return c


def fitted_to(norm: Norm | None) -> str:
    """Return what a plan made with this norm was fitted to."""
    return "" if norm is None else getattr(norm, "source", "a norm of the predictions")


def normed(sde: Schedule, ts: Array, form: Form, c_p: Array, norm: Norm | None, *, ahead: bool = False) -> Array:
    """Return weights of p as weights of p / c(t), each step multiplied by its mean c; the weights themselves without a norm.

    The newest node of step i is t_i, and with `ahead` t_{i+1}.
    """
    scale = checked_norm(norm, form)
    if scale is None:
        return c_p
    zeros = np.zeros(len(ts) - 1, dtype=np.intp)
    plain, with_c = (adams_weights(sde, ts, zeros, CLOCKS["t"], form, norm=c)[:, 0] for c in (None, scale))
    mean = with_c / plain * scale(ts[:-1])
    node = np.arange(len(ts) - 1)[:, None] + int(ahead) - np.arange(c_p.shape[1])
    return c_p * mean[:, None] / scale(ts[np.maximum(node, 0)])
