"""The plan: a sampler as one small, frozen, validated table of float64 numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arguments import array, number, one_of, shown
from .files import digest, parse, read, replacing
from .machine import run_rows
from .sde import Schedule, check_schedule

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

FORMAT = "deis.plan"
VERSION = 3
_TABLES = {"t": 1, "alpha": 1, "sigma": 1, "keep_x": 1, "keep_p": 2, "keep_z": 1, "next_x": 1, "next_p": 2, "guess": 1}
_FLAGS = ("accepts", "calls")
_TEXTS = ("form", "method", "grid", "schedule", "fitted")


_DEEPEST = 100


class Row(NamedTuple):
    """One row, as plain Python numbers; see `Plan`."""

    t: float
    alpha: float
    sigma: float
    keep_x: float
    keep_p: tuple[float, ...]
    keep_z: float
    next_x: float
    next_p: tuple[float, ...]
    guess: float
    accepts: bool
    calls: bool


def _default() -> Array:
    return np.empty(0)


def _default_flags() -> Flags:
    return np.empty(0, dtype=bool)


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    r"""A sampler as a table; `deis.make_plan` builds one, `deis.sample` runs it.

    With `x` the state that the network sees, `base` the last accepted state and `history` the last W predictions, newest
    first, row i of n evaluates the network once and does::

        p       = prediction at (x, t[i])
        history = [p, *history][:W]
        base    = keep_x[i] * base + sum_j keep_p[i, j] * history[j] + keep_z[i] * fresh standard normal noise
        x       = next_x[i] * base + sum_j next_p[i, j] * history[j]

    Attributes
    ----------
    t : array of shape (n + 1,)
        The time of each evaluation; t[n] is where the sample ends.
    alpha, sigma : arrays of shape (n + 1,)
        The schedule at these times.
    keep_x, next_x : arrays of shape (n,)
    keep_p, next_p : arrays of shape (n, W)
    keep_z : array of shape (n,), optional
        The noise of a stochastic method; by default 0, and no random number is drawn for a row where it is.
    accepts : array of bool of shape (n,), optional
        False for a stage: the x after the row is no state to be reported. By default a row accepts where it changes base.
    calls : array of bool of shape (n,), optional
        False for a row without an evaluation, whose p is guess[i] * x; by default every row makes one.
    guess : array of shape (n,), optional
        See calls; 0 by default, and where a row calls.
    form : {"eps", "data"}
        What p stands for: the noise eps or the data x_0.
    discrete : bool
        Whether the model is given integer times.
    method, grid, schedule : str
        What the plan was made from, for the reader.
    fitted : str
        What the coefficients were fitted to, such as the measured norm of a network's predictions; empty for the exact methods.
    provenance : mapping
        How a calibrated plan was made, as `deis.calibrate` writes it: JSON, by name.

    Raises
    ------
    ValueError
        Where the shapes disagree, a number is not finite, times do not decrease from step to step (within one, noise
        may raise them), a row uses a prediction from before the first or makes one that nothing uses, or the table
        does not carry alpha x_0 + sigma eps exactly from each time to the next, where independent noise adds in squares. That
        last test, for constant x_0 and eps, is the partition of unity of every method at once; a fitted plan is free of it.

    Notes
    -----
    The arrays are read-only and a plan hashes by its content, so that it may be shared by threads, closed over by a jitted
    function or passed to one as a static argument.
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
    form: str = "eps"
    discrete: bool = False
    method: str = ""
    grid: str = ""
    schedule: str = ""
    fitted: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _TABLES:
            self._freeze(name, array(name, getattr(self, name)))
        for name in ("keep_z", "guess"):
            if getattr(self, name).size == 0:
                self._freeze(name, np.zeros(self.keep_x.shape))
        _check_shapes(self)
        moves = (self.keep_x != 1) | (self.keep_p != 0).any(axis=1) | (self.keep_z != 0)
        for name, default in (("accepts", moves), ("calls", np.ones_like(moves))):
            flags = _flags(name, getattr(self, name))
            self._freeze(name, default if flags.size == 0 else flags)
        _check_flags(self)
        _check_times(self)
        _check_use(self)
        if not self.fitted:
            _check_transport(self)
        object.__setattr__(self, "provenance", _json(self.provenance))

    def _freeze(self, name: str, values: NDArray[Any]) -> None:
        values.setflags(write=False)
        object.__setattr__(self, name, values)

    @cached_property
    def nfe(self) -> int:
        """The number of network evaluations."""
        return int(self.calls.sum())

    @cached_property
    def stochastic(self) -> bool:
        """Whether the plan adds noise, so that `deis.sample` needs an `rng`."""
        return bool((self.keep_z != 0).any())

    @property
    def window(self) -> int:
        """W, the number of predictions that are kept."""
        return len(self.rows[0].keep_p)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table row by row, in plain Python numbers, as a loop wants it."""
        columns = {name: getattr(self, name).tolist()[: len(self.keep_x)] for name in Row._fields}
        columns["keep_p"], columns["next_p"] = map(tuple, columns["keep_p"]), map(tuple, columns["next_p"])
        return tuple(Row(*row) for row in zip(*columns.values(), strict=True))

    @property
    def ts(self) -> Array:
        """The times of the accepted states, from the start to the end: those of a trajectory."""
        return np.concatenate([self.t[:1], self.t[1:][self.accepts]])

    @property
    def num_step(self) -> int:
        """The number of steps between accepted states."""
        return len(self.ts) - 1

    def matches(self, sde: Schedule, tolerance: float = 1e-6) -> bool:
        """Tell whether a schedule has the alpha and sigma of this plan at its times: whether it was made for that schedule.

        `tolerance` is relative; other people's tables in float32 err by 1e-3 where sigma is small.
        """
        check_schedule(sde)
        tolerance = number("tolerance", tolerance, least=0)
        if sde.num_times is not None and not (self.t.min() >= 0 and self.t.max() <= sde.num_times - 1):
            return False
        with np.errstate(all="ignore"):
            levels = ((sde.alpha(self.t), self.alpha), (sde.sigma(self.t), self.sigma))
            return all(np.allclose(found, own, tolerance, 1e-3 * tolerance) for found, own in levels)

    def __repr__(self) -> str:
        return _describe(self)

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content)

    @cached_property
    def _content(self) -> str:
        """The plan as canonical JSON; Python prints the shortest decimal that reads back as the same float64."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content.update({name: content[name].tolist() for name in (*_TABLES, *_FLAGS)})
        return json.dumps(content, allow_nan=False, sort_keys=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all, and reads back bit for bit."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """Return what `save` writes, with its checksum."""
        return {"format": FORMAT, "version": VERSION, "sha256": digest(self._content), "plan": json.loads(self._content)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises
        ------
        ValueError
            Where the file is truncated, is no plan, comes from a later version, or was changed after it was saved; it says
            which.
        FileNotFoundError
            Where there is none.
        """
        data = read(path)
        try:
            return cls.from_document(parse(data))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a usable plan file: {error}") from None

    @classmethod
    def from_document(cls, document: object) -> Plan:
        """Return the plan of a `document`, as JSON reads it.

        Raises
        ------
        ValueError
            As `load`.
        """
        return _from_document(document)


load_plan = Plan.load


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_shapes(plan: Plan) -> None:
    for name, ndim in _TABLES.items():
        values = getattr(plan, name)
        if values.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimension(s), and has shape {values.shape}")
        if not np.isfinite(values).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(f"{name}{list(place)}={values[place].item()!r} must be finite")
    n, window = plan.keep_p.shape
    if n < 1 or window < 1:
        raise ValueError(f"keep_p must have at least one row and one column, and has shape {plan.keep_p.shape}")
    shapes: dict[str, tuple[int, ...]] = {"t": (n + 1,), "alpha": (n + 1,), "sigma": (n + 1,), "next_p": (n, window)}
    for name, shape in (shapes | dict.fromkeys(("keep_x", "keep_z", "next_x", "guess"), (n,))).items():
        if getattr(plan, name).shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} beside keep_p of {plan.keep_p.shape}, and has {getattr(plan, name).shape}"
            )
    one_of("form", plan.form, ("eps", "data"))
    if not isinstance(plan.discrete, bool):
        raise ValueError(f"discrete={shown(plan.discrete)} must be True or False")
    for name in _TEXTS:
        if not isinstance(getattr(plan, name), str):
            raise ValueError(f"{name}={shown(getattr(plan, name))} must be a string")


def _check_flags(plan: Plan) -> None:
    for name in _FLAGS:
        flags = getattr(plan, name)
        if flags.dtype != np.bool_ or flags.shape != plan.keep_x.shape:
            raise ValueError(f"{name} must be bool of shape {plan.keep_x.shape}, and is {flags.dtype} of shape {flags.shape}")
    if not plan.calls.any():
        raise ValueError("calls is False in every row: a plan must evaluate the network at least once")
    if (plan.guess[plan.calls] != 0).any():
        raise ValueError(f"guess={plan.guess.tolist()} must be 0 in every row that calls the network")
    if not plan.accepts[-1]:
        raise ValueError("accepts is False in the last row, which must reach a state: its keep_x is 1 and its keep_p is 0")


def _check_times(plan: Plan) -> None:
    step: NDArray[np.intp] = np.cumsum(plan.accepts) - plan.accepts  # of each row
    falls = bool((np.diff(plan.ts) < 0).all())
    within = plan.t[:-1] >= plan.ts[step + 1]
    if not plan.stochastic:  # noise may raise the time within a step
        within &= plan.t[:-1] <= plan.ts[step]
    if not falls:
        raise ValueError(f"t must decrease from step to step, and the steps are at {plan.ts.tolist()}")
    if not within.all():
        raise ValueError(f"t of every stage must lie within its step, and t is {plan.t.tolist()}")
    if plan.discrete and (plan.t != np.rint(plan.t)).any():
        raise ValueError(f"t must be whole numbers in a discrete plan, and is {plan.t.tolist()}")
    if not ((plan.alpha >= 0) & (plan.sigma >= 0) & (plan.alpha + plan.sigma > 0)).all():
        raise ValueError("alpha and sigma must be at least 0, and not both 0 at one time")
    if plan.form == "eps" and plan.alpha[0] == 0:
        raise ValueError(f"form='eps' has no meaning where alpha is 0, at t={plan.t[0].item()!r}; use form='data', or start later")


def _check_use(plan: Plan) -> None:
    n, window = plan.keep_p.shape
    weight = (plan.keep_p != 0) | (plan.next_p != 0)
    for i in range(n):
        if weight[i, i + 1 :].any():
            raise ValueError(
                f"row {i} uses a prediction from before the first: it has {i + 1}, and weights {plan.keep_p[i].tolist()}"
            )
        if plan.calls[i] and not any(weight[i + j, j] for j in range(min(window, n - i))):
            raise ValueError(f"row {i} wastes an evaluation: no row gives the prediction at t={plan.t[i].item()!r} any weight")


def _check_transport(plan: Plan) -> None:
    """Run the table on x = alpha x_0 + sigma eps for constant x_0 and eps, as (alpha, sigma); every consistent method is exact."""
    states: list[Array] = []
    p = np.array([0.0, 1.0]) if plan.form == "eps" else np.array([1.0, 0.0])
    exact = np.stack([plan.alpha, plan.sigma], axis=1)

    def add_noise(keep_z: float, x: Array) -> Array:
        return np.array([x[0], np.hypot(x[1], keep_z)])

    with np.errstate(all="ignore"):
        run_rows(plan, lambda i, x: p, _combine, exact[0], lambda i, x: states.append(x), add_noise)
        error = np.abs(np.stack(states) - exact[1:]) / exact.max(axis=0)
    # A polynomial far outside its nodes has weights of millions, whose own rounding is not an inconsistency.
    weight = np.maximum.accumulate(np.abs(plan.keep_p).sum(axis=1) + np.abs(plan.next_p).sum(axis=1))
    wrong = ~(error.max(axis=1) < 1e-9 + 1e-13 * weight)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"row {i} is inconsistent: from alpha x_0 + sigma eps it goes to {states[i].tolist()} in place of "
            f"(alpha, sigma)={exact[i + 1].tolist()} at t={plan.t[i + 1].item()!r}; check keep_x, keep_p, keep_z, next_x and next_p"
        )


def _combine(c_x: float, x: Array, c_p: tuple[float, ...], history: tuple[Array, ...]) -> Array:
    return c_x * x + sum(c * p for c, p in zip(c_p, history, strict=False))


def _json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of what JSON can hold, of a depth that no reader or writer trips over later."""
    try:
        copy = json.loads(json.dumps(provenance, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"provenance must hold what JSON can, and does not ({error})") from None
    if not isinstance(copy, dict):
        raise ValueError(f"provenance={shown(provenance)} must be a mapping of names")
    level, depth = [copy], 0
    while level:
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
        level, depth = [part for part in level if isinstance(part, dict | list)], depth + 1
    if depth > _DEEPEST:
        raise ValueError(f"provenance={shown(provenance)} is nested {depth} deep; at most {_DEEPEST} can be kept")
    return copy


def _flags(name: str, values: Any) -> NDArray[Any]:
    try:
        return np.asarray(values).copy()
    except ValueError:  # rows of different lengths
        raise TypeError(f"{name} must be an array of bool, and is {shown(values)}") from None


# --- text --------------------------------------------------------------------------------------------------------------


def _describe(plan: Plan, most: int = 12) -> str:
    """Lay the table out like a Butcher tableau: times to the left, weights to the right; the middle of a long one left out."""
    title = f"Plan {plan.method or 'of unknown method'}: {plan.nfe} evaluations in {plan.num_step} steps, {plan.form} form"
    about = ", ".join(text for text in (plan.schedule, plan.grid, plan.fitted and f"fitted to {plan.fitted}") if text)
    staged = not plan.accepts.all() or (plan.next_x != 1).any() or (plan.next_p != 0).any()
    n = len(plan.rows)
    shown = list(range(n)) if n <= most else [*range(most // 2), -1, *range(n - most // 2, n)]

    def numbers(c_x: float, c_p: Array) -> str:
        return f"{c_x:9.5f} | " + " ".join(f"{c:10.6f}" if c else f"{'.':>10}" for c in c_p)

    head = f"{'t':>10} | {'keep_x':>9} | {'keep_p, newest first':<{11 * plan.window - 1}}"
    noise = f" | {'keep_z':>9}" if plan.stochastic else ""
    lines = [title, *([about] if about else []), head + noise + (f" || {'next_x':>9} | next_p" if staged else "")]
    for i in shown:
        if i < 0:
            lines.append(f"{'...':>10} |")
            continue
        line = f"{plan.t[i]:10.6g} | {numbers(plan.keep_x[i], plan.keep_p[i])}"
        line += f" | {plan.keep_z[i]:9.5f}" if plan.stochastic else ""
        line += f" || {numbers(plan.next_x[i], plan.next_p[i])}" if staged else ""
        lines.append(line + ("" if plan.calls[i] else f"  (no call: p = {plan.guess[i]:.5f} x)"))
    return "\n".join([*lines, f"{plan.t[-1]:10.6g} |"])


# --- files -------------------------------------------------------------------------------------------------------------


def _from_document(document: object) -> Plan:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        later = type(version) is int and version > VERSION
        raise ValueError(
            f"its version is {shown(version)} and this library reads {VERSION}" + ("; upgrade deis-samplers" if later else "")
        )
    content = document.get("plan")
    if not isinstance(content, dict) or set(document) != {"format", "version", "sha256", "plan"}:
        raise ValueError(f"it must hold format, version, sha256 and plan, and holds {shown(sorted(map(str, document)))}")
    names = {field.name for field in fields(Plan)}
    if set(content) != names:
        unknown = sorted(map(str, set(content) - names))
        raise ValueError(f"its plan lacks {sorted(names - set(content))} and has the unknown {shown(unknown)}")
    for name, ndim in _TABLES.items():
        if not _is_table(content[name], ndim):
            raise ValueError(f"its {name} is not a table of numbers of {ndim} dimension(s)")
    for name in _FLAGS:
        if not (isinstance(content[name], list) and all(type(flag) is bool for flag in content[name])):
            raise ValueError(f"its {name} is not a list of true and false")
    plan = Plan(**content)
    if document["sha256"] != digest(plan._content):
        raise ValueError("its numbers were changed after it was saved (the checksum differs); build the plan anew and save it")
    return plan


def _is_table(value: Any, ndim: int) -> bool:
    if not isinstance(value, list):
        return False
    if ndim == 1:
        return all(type(number) is float for number in value)
    return all(_is_table(row, ndim - 1) and len(row) == len(value[0]) for row in value)
