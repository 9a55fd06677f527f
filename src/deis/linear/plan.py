"""The plan of a matrix-valued SDE: the table of `deis.Plan` with a block, or a number a frequency, for each number."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from ..arguments import array, one_of, shown
from ..arrays import Array
from ..files import digest, replacing
from ..foreign import is_compiling
from ..machine import Row, advance
from ..plan_file import Kind, document_of, read_content, read_document
from .algebra import ALGEBRAS

COLUMNS = ("t", "alpha", "sigma", "unit", "keep_x", "keep_p", "next_p")
PREDICTS = ("R", "L", "score")
Made = TypeVar("Made")
_TEXTS = ("predicts", "method", "grid", "schedule")


@dataclass(frozen=True, eq=False, repr=False)
class LinearPlan:
    r"""A sampler of a `deis.LinearSDE` as a table; `deis.make_linear_plan` builds one, `deis.sample_linear` runs it.

    Row i of n evaluates the network once and does, with W predictions in the history, newest first::

        p       = what the network returns at (x, t[i])
        history = [p, *history][:W]
        base    = keep_x[i] base + sum_j keep_p[i, j] history[j]
        x       = base + sum_j next_p[i, j] history[j]

    A coefficient, of the shape c, is a matrix (k, k) that acts on the blocks of the state, or with basis="dct" one number for each
    frequency of the last axes.

    Attributes
    ----------
    t : array of shape (n + 1,)
        The times, falling from noise to data, or rising to encode.
    alpha : array of shape (n + 1, \*c)
        Psi(t, 0), by which the data enter the state.
    sigma : array of shape (n + 1, \*c)
        By which a constant eps enters it along the probability flow, from K at the plan's start; with K = R it is R_t.
    unit : array of shape (n + 1, \*c)
        What the network returns where eps is 1: 1 where it predicts the eps of the plan's own K.
    keep_x : array of shape (n, \*c)
    keep_p, next_p : arrays of shape (n, W, \*c)
    basis : {"block", "dct"}
    predicts : {"R", "L", "score"}
        What the network returns: eps = -K^T score with this K, or the score.
    method, grid, schedule : str
        What the plan was made from, for the reader.

    Raises
    ------
    ValueError
        If the shapes disagree, a number is not finite, the times turn back, a row uses a prediction from before the first or
        makes one that nothing uses, or the table does not carry alpha x_0 + sigma eps, for constant x_0 and eps, exactly from each
        time to the next: the mean by alpha, and each column of sigma.

    Notes
    -----
    The arrays are read-only and a plan hashes by its content, as a `deis.Plan` does.
    """

    t: Array
    alpha: Array
    sigma: Array
    unit: Array
    keep_x: Array
    keep_p: Array
    next_p: Array
    basis: str = "block"
    predicts: str = "R"
    method: str = ""
    grid: str = ""
    schedule: str = ""

    def __post_init__(self) -> None:
        one_of("basis", self.basis, ALGEBRAS)
        one_of("predicts", self.predicts, PREDICTS)
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be a string")
        for name in COLUMNS:
            values = array(name, getattr(self, name))
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        _check_shapes(self)
        _check_use(self)
        _check_transport(self)

    @property
    def nfe(self) -> int:
        """The number of network evaluations, one a step."""
        return len(self.keep_x)

    @property
    def window(self) -> int:
        """W, the number of predictions that are kept."""
        return int(self.keep_p.shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a coefficient."""
        return tuple(self.keep_x.shape[1:])

    @property
    def direction(self) -> str:
        """Where the plan leads: "decode" from noise to data, or "encode" from data to noise."""
        return "encode" if self.t[-1] > self.t[0] else "decode"

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table row by row, in arrays of NumPy."""
        one = ALGEBRAS[self.basis].one(self.shape)
        corrects = bool(self.next_p.any())
        columns = zip(self.t.tolist(), self.alpha, self.sigma, self.keep_x, self.keep_p, self.next_p, strict=False)
        return tuple(
            Row(t, alpha, sigma, keep_x, keep_p, None, one if corrects else None, next_p, None, True, True)
            for t, alpha, sigma, keep_x, keep_p, next_p in columns
        )

    def once(self, make: Callable[..., Made], *of: Any) -> Made:
        """Return make(plan, *of), which is made once and freed with the plan, as `deis.Plan.once`."""
        if is_compiling():
            return make(self, *of)
        try:
            return self._made[make, of]
        except KeyError:
            return self._made.setdefault((make, of), make(self, *of))

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        about = ", ".join(text for text in (self.schedule, self.grid) if text)
        kind = f"coefficients of {size}, {'eps of ' if self.predicts != 'score' else ''}{self.predicts}"
        lines = [f"LinearPlan {self.method or 'of unknown method'}: {self.nfe} evaluations, {kind}", about]
        return "\n".join([*(line for line in lines if line), "t = " + " ".join(f"{t:.6g}" for t in self.t.tolist())])

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, LinearPlan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content)

    def __getstate__(self) -> dict[str, Any]:  # without what was computed from these
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _content(self) -> str:
        """The plan as canonical JSON; Python prints the shortest decimal that reads back as the same float64."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content.update({name: content[name].tolist() for name in COLUMNS})
        return json.dumps(content, allow_nan=False, sort_keys=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all, and reads back bit for bit."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.document()) + "\n", encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """Return what `save` writes, with its checksum."""
        return document_of(self._content, _KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearPlan:
        """Read a plan that `save` wrote.

        Raises
        ------
        ValueError
            If the file is truncated, is no plan of an SDE of this kind, comes from a later version, or was changed after it was
            saved; it says which.
        FileNotFoundError
            If there is none.
        """
        return read_document(path, cls.from_document)

    @classmethod
    def from_document(cls, document: object) -> LinearPlan:
        """Return the plan of a `document`, as JSON reads it.

        Raises
        ------
        ValueError
            As `load`.
        """
        kind = _KIND
        if isinstance(document, dict) and isinstance(document.get("plan"), dict):  # its own basis says how deep its tables are
            kind = _kind_of(document["plan"].get("keep_x"))
        content, checksum = read_content(document, {field.name for field in fields(cls)}, kind)
        plan = cls(**content)
        if checksum != digest(plan._content):
            raise ValueError("its numbers were changed after it was saved (the checksum differs); build the plan anew and save it")
        return plan


def _kind(axes: int) -> Kind:
    tables = {name: 1 if name == "t" else axes + 1 + (name in ("keep_p", "next_p")) for name in COLUMNS}
    return Kind("deis.linear_plan", 1, tables, ())


_KIND = _kind(2)


def _kind_of(keep_x: object) -> Kind:
    """Return the kind of file whose coefficients have as many axes as the first of a column; at most as many as arrays have."""
    axes = -1
    while isinstance(keep_x, list) and axes < 32:
        axes, keep_x = axes + 1, keep_x[0] if keep_x else None
    return _kind(max(axes, 1))


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_shapes(plan: LinearPlan) -> None:
    c, axes = plan.keep_x.shape[1:], ALGEBRAS[plan.basis].axes
    if not c or (axes == 2 and (len(c) != 2 or c[0] != c[1])) or 0 in plan.keep_x.shape:
        wanted = "(n, k, k)" if plan.basis == "block" else "(n, ...), one number a frequency"
        raise ValueError(f"keep_x must have shape {wanted} with basis={plan.basis!r}, and has {plan.keep_x.shape}")
    n, window = len(plan.keep_x), plan.keep_p.shape[1] if plan.keep_p.ndim > 1 else 0
    shapes = {"t": (n + 1,), "keep_p": (n, max(window, 1), *c), "next_p": (n, max(window, 1), *c)}
    for name, shape in (shapes | dict.fromkeys(("alpha", "sigma", "unit"), (n + 1, *c))).items():
        values = getattr(plan, name)
        if values.shape != shape:
            raise ValueError(f"{name} must have shape {shape} beside keep_x of {plan.keep_x.shape}, and has {values.shape}")
    for name in COLUMNS:
        values = getattr(plan, name)
        if not np.isfinite(values).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(f"{name}{list(place)}={values[place].item()!r} must be finite")
    steps = np.diff(plan.t)
    if not ((steps < 0).all() or (steps > 0).all()):
        raise ValueError(f"t must decrease from step to step, or increase from step to step, and is {plan.t.tolist()}")


def _check_use(plan: LinearPlan) -> None:
    n, window = plan.keep_p.shape[:2]
    weight = ((plan.keep_p != 0) | (plan.next_p != 0)).reshape(n, window, -1).any(axis=2)
    for i in range(n):
        if weight[i, i + 1 :].any():
            raise ValueError(f"row {i} uses a prediction from before the first: it has {i + 1} of {window}")
        if not any(weight[i + j, j] for j in range(min(window, n - i))):
            raise ValueError(f"row {i} wastes an evaluation: no row gives the prediction at t={plan.t[i].item()!r} any weight")


def _check_transport(plan: LinearPlan) -> None:
    """Run each row on alpha x_0 + sigma eps for constant x_0 and eps, as the pair (alpha, sigma), from where it is exact."""
    combine = ALGEBRAS[plan.basis].combine
    exact = np.stack([plan.alpha, plan.sigma], axis=1)
    base = exact[0]
    history: tuple[Array, ...] = ()
    for i, row in enumerate(plan.rows):
        history = (np.stack([np.zeros_like(plan.unit[i]), plan.unit[i]]), *history)[: plan.window]
        past = [np.abs(p) for p in history]
        with np.errstate(all="ignore"):
            size = combine(np.abs(row.keep_x), np.abs(base), np.abs(row.keep_p) + np.abs(row.next_p), past).max()
            base, x = advance(row, base, history, combine)
            off = exact[i + 1] - x
        if not np.abs(off).max() <= 1e-11 * (size + np.abs(exact[i + 1]).max()):
            part = "alpha" if np.abs(off[0]).max() > np.abs(off[1]).max() else "sigma"
            raise ValueError(
                f"row {i} is inconsistent: it does not carry alpha x_0 + sigma eps to {part} at t={plan.t[i + 1].item()!r}, off by "
                f"{np.abs(off).max():.3g}; check keep_x, keep_p, next_p and unit"
            )
        base = base + off  # so that no row is charged with the rounding of those before, which psi multiplies
