"""The plan: a sampler as one small, frozen, validated table of float64 numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .arguments import array, number
from .arrays import AnyArray, Array, Flags
from .files import digest, replacing
from .foreign import is_compiling
from .groups import group_rows
from .machine import Row
from .plan_checks import as_flags, as_json, check_flags, check_shapes, check_times, check_transport, check_use
from .plan_file import FLAGS, TABLES, document_of, read_content, read_document
from .plan_text import describe
from .quadrature import Form
from .sde import Schedule, check_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Made = TypeVar("Made")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _default() -> Array:
    return np.empty(0)


def _default_flags() -> Flags:
    return np.empty(0, dtype=bool)


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    r"""A sampler as a table; `deis.make_plan` builds one, `deis.sample` runs it.

    Let `x` be the state that the network sees, `base` the last accepted state, and `history` the last W predictions, newest
    first. Row i of n evaluates the network once and does::

        p       = prediction at (x, t[i])
        history = [p, *history][:W]
        base    = keep_x[i] * base + sum_j keep_p[i, j] * history[j] + keep_z[i] * fresh standard normal noise
        x       = next_x[i] * base + sum_j next_p[i, j] * history[j]

    Attributes
    ----------
    t : array of shape (n + 1,)
        The time given to the network in each evaluation. The sample starts at t[0] and ends at t[n]. In a fitted plan the times
        in between are only close to those of the states. Times fall from noise to data, or rise in a plan that encodes.
    alpha, sigma : arrays of shape (n + 1,)
        The values of the schedule at these times.
    keep_x, next_x : arrays of shape (n,)
    keep_p, next_p : arrays of shape (n, W)
    keep_z : array of shape (n,), optional
        The noise of a stochastic method; by default 0. A row where it is 0 draws no random number.
    accepts : array of bool of shape (n,), optional
        False for a stage: the x after the row is not reported as a state. By default a row accepts where it changes base.
    calls : array of bool of shape (n,), optional
        False for a row without an evaluation, whose p is guess[i] * x. By default every row makes one.
    guess : array of shape (n,), optional
        See calls. 0 by default, and 0 in every row that calls.
    form : {"eps", "data"}
        What p stands for: the noise eps or the data x_0.
    discrete : bool
        Whether the model takes integer times.
    method, grid, schedule : str
        What the plan was made from, for the reader.
    fitted : str
        What the coefficients were fitted to, such as the measured norm of a network's predictions; empty for the exact methods.
    provenance : mapping
        How a calibrated plan was made, as written by `deis.calibrate`: JSON values by name.

    Raises
    ------
    ValueError
        If the shapes disagree or a number is not finite. If times turn back from step to step; within a step, noise may raise
        them, and a stage may look ahead as far as the end of the next step. If a plan that encodes adds noise. If a row uses a
        prediction from before the first, or makes one that nothing uses. If the table does not carry alpha x_0 + sigma eps
        exactly from each time to the next, where independent noise adds in squares. This last check, for constant x_0 and eps,
        is the partition of unity for every method at once. A fitted plan is exempt from it.

    Notes
    -----
    A row without a call whose guess is 1 puts x itself among the predictions, so that later rows can use past states. The exactly
    invertible methods do this. The reverse of such a plan begins with two states; see `pair`.

    The arrays are read-only and a plan hashes by its content. Threads can share it, and a jitted function can close over it or
    take it as a static argument.
    """

    t: Array
    alpha: Array
    sigma: Array
    keep_x: Array
    keep_p: Array
    next_x: Array
    next_p: Array
    keep_z: Array = field(default_factory=_default)
    accepts: Flags = field(default_factory=_default_flags)
    calls: Flags = field(default_factory=_default_flags)
    guess: Array = field(default_factory=_default)
    form: Form = "eps"
    discrete: bool = False
    method: str = ""
    grid: str = ""
    schedule: str = ""
    fitted: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in TABLES:
            self._freeze(name, array(name, getattr(self, name)))
        for name in ("keep_z", "guess"):
            if getattr(self, name).size == 0:
                self._freeze(name, np.zeros(self.keep_x.shape))
        check_shapes(self)
        moves = (self.keep_x != 1) | (self.keep_p != 0).any(axis=1) | (self.keep_z != 0)
        for name, default in (("accepts", moves), ("calls", np.ones_like(moves))):
            flags = as_flags(name, getattr(self, name))
            self._freeze(name, default if flags.size == 0 else flags)
        check_flags(self)
        check_times(self)
        check_use(self)
        if not self.fitted:
            check_transport(self)
        object.__setattr__(self, "provenance", as_json(self.provenance))

    def _freeze(self, name: str, values: AnyArray) -> None:
        values.setflags(write=False)
        object.__setattr__(self, name, values)

    @cached_property
    def nfe(self) -> int:
        """The number of network evaluations."""
        return int(self.calls.sum())

    @cached_property
    def groups(self) -> tuple[range, ...]:
        """The rows in groups, each of which `deis.sample(..., parallel=True)` evaluates in one call; see `deis.groups`."""
        return group_rows(self.rows)

    @cached_property
    def depth(self) -> int:
        """The number of calls one after the other, where evaluations that do not depend on each other share one call."""
        return sum(any(self.rows[i].calls for i in group) for group in self.groups)

    @cached_property
    def stochastic(self) -> bool:
        """Whether the plan adds noise, so that `deis.sample` needs an `rng`."""
        return bool((self.keep_z != 0).any())

    @cached_property
    def hands_on(self) -> bool:
        """Whether the first row makes no call and leaves x as it is, so that the first call gets a lower time than the start.

        Some fitted plans begin like this: on pure noise a network may do better when its timestep stands for less noise.
        """
        row = self.rows[0]
        moves = (row.keep_x, row.next_x, row.guess, *row.keep_p, *row.next_p) != (1, 1, *[0] * (1 + 2 * self.window))
        return not (row.calls or row.accepts or moves)

    @cached_property
    def pair(self) -> bool:
        """Whether the plan begins with two states: x, and as base the one after it. Its first row passes from x to base."""
        row = self.rows[0]
        passes = (row.keep_x, row.next_x, row.guess, *row.keep_p, *row.next_p) == (1, 1, 1, *[0] * (2 * self.window))
        return passes and row.accepts and not row.calls

    @cached_property
    def direction(self) -> str:
        """Where the plan leads: "decode" from noise to data, where times fall, or "encode" from data to noise, where they rise."""
        return "encode" if self.t[-1] > self.t[0] else "decode"

    @cached_property
    def invertible(self) -> bool:
        """Whether the plan can be reversed exactly, see `reverse`: its steps have only a_i, b_i and c_i, and a_i is not 0."""
        rows, n = len(self.rows), len(self.rows) // 2
        if self.window != 4 or rows < 4 or rows % 2 or self.stochastic:
            return False
        second = np.arange(rows) % 2 == 1
        flags = (self.calls == ~second) & (self.accepts == second) & (self.guess == second) & (self.next_x == 1)
        others = (self.next_p, self.keep_p[::2], self.keep_p[1::2, ::3], self.keep_x[::2] - 1)
        return bool(flags.all() and not any(v.any() for v in others) and np.count_nonzero(self.keep_p[3::2, 2]) == n - 1)

    def reverse(self) -> Plan:
        """Return the plan that takes the last two states of this one exactly back to its first; `deis.invert` runs it.

        Step i of an exactly invertible method is x_{i+1} = a_i x_{i-1} + b_i x_i + c_i p_i. Solved for x_{i-1}, it calls the
        network at the same states as before, and so recovers them up to rounding.

        Raises
        ------
        ValueError
            If the method is not exactly invertible; "bdia" and "belm" are.
        """
        return _reverse(self)

    @property
    def window(self) -> int:
        """W, the number of predictions that are kept."""
        return len(self.rows[0].keep_p)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table row by row, in plain Python numbers, as a loop needs it."""
        columns = {name: getattr(self, name).tolist()[: len(self.keep_x)] for name in Row._fields}
        columns["keep_p"], columns["next_p"] = map(tuple, columns["keep_p"]), map(tuple, columns["next_p"])
        return tuple(Row(*row) for row in zip(*columns.values(), strict=True))

    def once(self, make: Callable[..., Made], *of: Any) -> Made:
        """Return make(plan, *of), made once and freed with the plan. Such values must be few and small, and not tensors."""
        if is_compiling():  # the graph would get a guard on whether the value was made before
            return make(self, *of)
        try:
            return self._made[make, of]
        except KeyError:
            return self._made.setdefault((make, of), make(self, *of))

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    def __getstate__(self) -> dict[str, Any]:  # without the cached values
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def ts(self) -> Array:
        """The times of the accepted states from start to end, which are those of a trajectory."""
        return np.concatenate([self.t[:1], self.t[1:][self.accepts]])

    @property
    def num_step(self) -> int:
        """The number of steps between accepted states."""
        return len(self.ts) - 1

    def matches(self, sde: Schedule, tolerance: float = 1e-6) -> bool:
        """Return whether a schedule has this plan's alpha and sigma at its times, that is, whether the plan was made for it.

        `tolerance` is relative. Tables that other libraries compute in float32 are off by 1e-3 where sigma is small.
        """
        check_schedule(sde)
        tolerance = number("tolerance", tolerance, least=0)
        if sde.num_times is not None and not (self.t.min() >= 0 and self.t.max() <= sde.num_times - 1):
            return False
        with np.errstate(all="ignore"):
            levels = ((sde.alpha(self.t), self.alpha), (sde.sigma(self.t), self.sigma))
            return all(np.allclose(found, own, tolerance, 1e-3 * tolerance) for found, own in levels)

    def __repr__(self) -> str:
        return describe(self.rows, self.t[-1].item(), *self._titles)

    @property
    def _titles(self) -> tuple[str, str]:
        """What the plan is, and what it was made from."""
        calls = f" in {_count(self.depth, 'call')}" if self.depth < self.nfe else ""
        size = f"{_count(self.nfe, 'evaluation')}{calls} in {_count(self.num_step, 'step')}"
        title = f"Plan {self.method or 'of unknown method'}: {size}, {self.form} form"
        return title, ", ".join(text for text in (self.schedule, self.grid, self.fitted and f"fitted to {self.fitted}") if text)

    def _repr_html_(self) -> str:
        """Return the plan as a notebook shows it: a small picture and a table that unfolds."""
        from .plan_html import html_of

        return html_of(self, *self._titles)

    def plot(self, sde: Schedule | None = None) -> Figure:
        """Return the plan as a picture, a matplotlib `Figure`: ``plan.plot().savefig("plan.png")``.

        The top panel shows the times of its states and stages on an axis of log(sigma/alpha), beside the usual grids with as many
        steps. The middle panel shows the table row by row, with 0 left blank. The bottom panel shows the noise level sigma/alpha
        of x at each row.

        Parameters
        ----------
        sde : Schedule, optional
            The schedule that the plan was made for, used to draw the grids in t. By default the one named in `schedule`. A custom
            or a discrete schedule cannot be found by its name.

        Raises
        ------
        ImportError
            If matplotlib is missing; the message says how to install it.
        TypeError, ValueError
            If sde is not a schedule, or not the plan's.
        """
        from .plots import plot_plan

        return plot_plan(self, *self._titles, sde)

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content)

    @cached_property
    def _content(self) -> str:
        """The plan as canonical JSON; Python prints the shortest decimal that reads back as the same float64."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content.update({name: content[name].tolist() for name in (*TABLES, *FLAGS)})
        return json.dumps(content, allow_nan=False, sort_keys=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all, and reads back bit for bit."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """Return what `save` writes, with its checksum."""
        return document_of(self._content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises
        ------
        ValueError
            If the file is truncated, is not a plan, comes from a later version, or was changed after it was saved. The message
            says which.
        FileNotFoundError
            If there is no such file.
        """
        return read_document(path, cls.from_document)

    @classmethod
    def from_document(cls, document: object) -> Plan:
        """Return the plan of a `document` as read from JSON.

        Raises
        ------
        ValueError
            As `load`.
        """
        content, checksum = read_content(document, {field.name for field in fields(cls)})
        plan = cls(**content)
        if checksum != digest(plan._content):
            raise ValueError("its numbers were changed after it was saved (the checksum differs); build the plan anew and save it")
        return plan


load_plan = Plan.load


def _reverse(plan: Plan) -> Plan:
    """See `Plan.reverse`."""
    if not plan.invertible:
        raise ValueError(
            f"the plan {plan.method!r} of {plan.num_step} steps cannot be reversed exactly; use 'bdia' or 'belm' in two steps or "
            "more. For any other method, deis.make_plan(..., direction='encode') leads back up to its discretization error"
        )
    a, b, c = plan.keep_p[3::2, 2][::-1], plan.keep_x[3::2][::-1], plan.keep_p[3::2, 1][::-1]
    n = 2 * len(a) + 1
    keep_x, keep_p, guess, accepts = np.ones(n), np.zeros((n, 4)), np.zeros(n), np.zeros(n, dtype=bool)
    keep_x[2::2], keep_p[2::2, 1], keep_p[2::2, 2] = -b / a, -c / a, 1 / a
    guess[::2], accepts[::2] = 1.0, True
    columns: dict[str, Any] = {"keep_x": keep_x, "keep_p": keep_p, "guess": guess, "accepts": accepts, "calls": guess == 0}
    columns |= {"next_x": np.ones(n), "next_p": np.zeros((n, 4))}
    for name in ("t", "alpha", "sigma"):
        ends = getattr(plan, name)[::2][::-1]
        columns[name] = np.concatenate([ends[:1], np.repeat(ends[1:-1], 2), ends[-1:]])
    texts = {name: getattr(plan, name) for name in ("form", "discrete", "grid", "schedule")}
    return Plan(**columns, **texts, method=f"{plan.method} reversed")
