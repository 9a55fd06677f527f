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
from ..arrays import AnyArray, Array, Flags
from ..files import digest, replacing
from ..foreign import is_compiling
from ..machine import Row
from ..plan_checks import as_flags
from ..plan_file import Kind, document_of, read_content, read_document
from .algebra import ALGEBRAS
from .plan_checks import check_block_shapes, check_block_steps, check_block_transport, check_block_use

COLUMNS = ("t", "alpha", "sigma", "unit", "keep_x", "keep_p", "next_p", "next_x")
PREDICTS = ("R", "L", "score")
Made = TypeVar("Made")
_TEXTS = ("predicts", "method", "grid", "schedule")
_STAGES = ("next_x", "accepts")
"""What only plans of several stages have in their files."""


@dataclass(frozen=True, eq=False, repr=False)
class LinearPlan:
    r"""A sampler of a `deis.LinearSDE` as a table; `deis.make_linear_plan` builds one, `deis.sample_linear` runs it.

    Row i of n evaluates the network once and does, with W predictions in the history, newest first::

        p       = what the network returns at (x, t[i])
        history = [p, *history][:W]
        base    = keep_x[i] base + sum_j keep_p[i, j] history[j]
        x       = next_x[i] base + sum_j next_p[i, j] history[j]

    A coefficient, of the shape c, is a matrix (k, k) that acts on the blocks of the state, or with basis="dct" one number for each
    frequency of the last axes.

    Attributes
    ----------
    t : array of shape (n + 1,)
        The times of the evaluations and of the end. Those of steps fall from noise to data, or rise to encode; those of stages lie
        within their step, in any order.
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
    next_x : array of shape (n, \*c), optional
        1 everywhere by default.
    accepts : array of bool of shape (n,), optional
        Whether a step ends with the row: x is then the solution at the next time, and otherwise a stage. True by default.

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
    next_x: Array = None  # type: ignore[assignment]  # 1, in the shape of keep_x
    accepts: Flags = None  # type: ignore[assignment]  # True

    def __post_init__(self) -> None:
        one_of("basis", self.basis, ALGEBRAS)
        one_of("predicts", self.predicts, PREDICTS)
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be a string")
        for name in COLUMNS[:-1]:
            self._freeze(name, array(name, getattr(self, name)))
        check_block_shapes(self, COLUMNS[:-1])
        self._freeze("next_x", self._ones() if self.next_x is None else array("next_x", self.next_x))
        self._freeze("accepts", np.ones(self.nfe, dtype=bool) if self.accepts is None else as_flags("accepts", self.accepts))
        check_block_shapes(self, COLUMNS)
        check_block_steps(self)
        check_block_use(self)
        check_block_transport(self)

    def _freeze(self, name: str, values: AnyArray) -> None:
        values.setflags(write=False)
        object.__setattr__(self, name, values)

    def _ones(self) -> Array:
        """Return the coefficient 1 for each row."""
        return np.broadcast_to(ALGEBRAS[self.basis].one(self.shape), self.keep_x.shape).copy()

    @property
    def nfe(self) -> int:
        """The number of network evaluations, one a row."""
        return len(self.keep_x)

    @property
    def num_step(self) -> int:
        """The number of steps."""
        return int(self.accepts.sum())

    @cached_property
    def ts(self) -> Array:
        """The times of the steps, of shape (num_step + 1,)."""
        return self.t[np.flatnonzero(np.append(True, self.accepts))]

    @cached_property
    def staged(self) -> bool:
        """Whether a row is a stage, or x anything but base with predictions."""
        return not self.accepts.all() or bool((self.next_x != self._ones()).any())

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
        moves = self.staged or bool(self.next_p.any())  # one answer for all rows, which JAX stacks
        levels, flags = (self.t.tolist(), self.alpha, self.sigma), self.accepts.tolist()
        columns = zip(*levels, self.keep_x, self.keep_p, self.next_x, self.next_p, flags, strict=False)
        return tuple(
            Row(t, alpha, sigma, keep_x, keep_p, None, next_x if moves else None, next_p, None, accepts, True)
            for t, alpha, sigma, keep_x, keep_p, next_x, next_p, accepts in columns
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
        steps = "" if self.accepts.all() else f" in {self.num_step} steps"
        lines = [f"LinearPlan {self.method or 'of unknown method'}: {self.nfe} evaluations{steps}, {kind}", about]
        return "\n".join([*(line for line in lines if line), "t = " + " ".join(f"{t:.6g}" for t in self.ts.tolist())])

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, LinearPlan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content)

    def __getstate__(self) -> dict[str, Any]:  # without what was computed from these
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _content(self) -> str:
        """The plan as canonical JSON; Python prints the shortest decimal that reads back as the same float64."""
        names = {field.name for field in fields(self)} - (set() if self.staged else set(_STAGES))
        content = {name: getattr(self, name) for name in names}
        content.update({name: content[name].tolist() for name in names & {*COLUMNS, "accepts"}})
        return json.dumps(content, allow_nan=False, sort_keys=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all, and reads back bit for bit."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.document()) + "\n", encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """Return what `save` writes, with its checksum. Without stages it is of version 1, which has no columns for them."""
        return document_of(self._content, _kind(2, self.staged))

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
        kind = _kind(2)
        if isinstance(document, dict) and isinstance(document.get("plan"), dict):  # its own basis says how deep its tables are
            kind = _kind(_depth(document["plan"].get("keep_x")), document.get("version") == 2)
        names = {field.name for field in fields(cls)} - (set() if kind.version == 2 else set(_STAGES))
        content, checksum = read_content(document, names, kind)
        plan = cls(**content)
        if checksum != digest(plan._content):
            raise ValueError("its numbers were changed after it was saved (the checksum differs); build the plan anew and save it")
        return plan


def _kind(axes: int, staged: bool = False) -> Kind:
    """Return the kind of file whose coefficients have so many axes."""
    columns = COLUMNS if staged else COLUMNS[:-1]
    tables = {name: 1 if name == "t" else axes + 1 + (name in ("keep_p", "next_p")) for name in columns}
    return Kind("deis.linear_plan", 1 + staged, tables, ("accepts",) if staged else ())


def _depth(keep_x: object) -> int:
    """Return how many axes the coefficients of a column have, by the first of them; at most as many as arrays have."""
    axes = -1
    while isinstance(keep_x, list) and axes < 32:
        axes, keep_x = axes + 1, keep_x[0] if keep_x else None
    return max(axes, 1)
