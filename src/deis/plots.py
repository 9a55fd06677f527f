"""A plan as a picture: its times beside the usual grids, its weights, and the path of its noise level."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from .arrays import AnyArray, Array, Flags
from .extras import needs
from .grids import make_grid
from .sde import EDM, VESDE, VPSDE, FlowMatching, Schedule, SubVPSDE, check_schedule

with needs("see", "a picture of a plan"):
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LinearSegmentedColormap, SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, MaxNLocator

GRIDS = (
    ("t, even", "t", 1.0),
    ("t, power 2", "t", 2.0),
    ("rho, power 7, Karras", "rho", 7.0),
    ("log rho, even", "log", 1.0),
    ("vp_t, power 2", "vp_t", 2.0),
)
"""The grids to compare with: the name in the picture, then ts_phase and ts_order of `deis.make_grid`."""

# Okabe & Ito's colours, which colour-blind readers can tell apart; markers and dashes carry the same information in grey.
_BLUE, _VERMILION, _ORANGE, _GREY = "#0072B2", "#D55E00", "#E69F00", "#666666"
_NEGATIVE_TO_POSITIVE = LinearSegmentedColormap.from_list(
    "weights", [(0, _VERMILION), (0.5, "#F9DCC8"), (0.5, "#D3E7F5"), (1, _BLUE)]
)
_SMALL, _TINY = 8.5, 7.5
_MOST_NUMBERS = (14, 13)  # rows and columns whose weights fit as numbers
_MAKERS: dict[str, Callable[..., Schedule]] = {
    "VPSDE.linear": VPSDE.linear, "VPSDE.cosine": VPSDE.cosine, "SubVPSDE.linear": SubVPSDE.linear, "VESDE": VESDE, "EDM": EDM,
    "FlowMatching": FlowMatching,
}  # fmt: skip


class Table(Protocol):
    """The parts of a `deis.Plan` that are drawn."""

    @property
    def t(self) -> Array: ...
    @property
    def alpha(self) -> Array: ...
    @property
    def sigma(self) -> Array: ...
    @property
    def keep_x(self) -> Array: ...
    @property
    def keep_p(self) -> Array: ...
    @property
    def keep_z(self) -> Array: ...
    @property
    def next_x(self) -> Array: ...
    @property
    def next_p(self) -> Array: ...
    @property
    def accepts(self) -> Flags: ...
    @property
    def calls(self) -> Flags: ...
    @property
    def guess(self) -> Array: ...
    @property
    def schedule(self) -> str: ...
    @property
    def num_step(self) -> int: ...
    @property
    def nfe(self) -> int: ...
    @property
    def direction(self) -> str: ...
    def matches(self, sde: Schedule, /) -> bool: ...


def plot_plan(plan: Table, title: str, about: str, sde: Schedule | None = None) -> Figure:
    """Return the picture of `deis.Plan.plot`, with a title above it and the plan's origin below."""
    rows, columns = plan.keep_x.size, len(weight_columns(plan))
    heights = (2.1, float(np.clip(0.24 * rows, 0.7, 4.0)) + 0.9, 2.3)
    figure = Figure(figsize=(7.0, sum(heights) + 0.6), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.08), facecolor="white")
    figure.suptitle(textwrap.fill(title, 70), fontsize=11, fontweight="bold")
    times, weights, path = figure.subplots(3, 1, height_ratios=heights)
    scale = NoiseScale.of(noise_levels(plan))
    draw_times(times, plan, scale, sde)
    few = columns <= _MOST_NUMBERS[1]
    draw_weights(weights, plan, numbers=few and rows <= _MOST_NUMBERS[0], named=few)
    draw_path(path, plan, scale)
    figure.supxlabel(textwrap.fill(about, 100), fontsize=_TINY, color=_GREY)
    return figure


def plot_small(plan: Table) -> Figure:
    """Return the path and the weights side by side, without numbers, for a notebook."""
    figure = Figure(figsize=(7.0, 2.6), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.08), facecolor="white")
    (path, weights), columns = figure.subplots(1, 2), len(weight_columns(plan))
    draw_path(path, plan, NoiseScale.of(noise_levels(plan)))
    draw_weights(weights, plan, numbers=False, named=columns <= 5, title="Weights")
    return figure


# --- the noise level ----------------------------------------------------------------------------------------------------


def noise_levels(plan: Table) -> Array:
    """Return log rho = log(sigma/alpha) at the plan's times, of shape (n + 1,); infinite where alpha or sigma is 0."""
    with np.errstate(divide="ignore"):
        return np.log(plan.sigma) - np.log(plan.alpha)


class NoiseScale(NamedTuple):
    """An axis of log rho from `low` to `high`; infinite values are drawn in the margin, beyond a dotted line."""

    low: float
    high: float
    ends: tuple[bool, bool]
    """Whether the margin is needed at rho = 0 and at rho = infinity."""

    @classmethod
    def of(cls, levels: Array) -> NoiseScale:
        """Return the axis of these levels."""
        finite = levels[np.isfinite(levels)]
        low, high = (finite.min(), finite.max()) if finite.size else (-1.0, 1.0)
        if high - low < 1:  # of a single level, or nearly
            low, high = low - 1, high + 1
        return cls(float(low), float(high), (bool(np.isneginf(levels).any()), bool(np.isposinf(levels).any())))

    @property
    def margin(self) -> float:
        """How far beyond the ends infinite values are drawn."""
        return 0.1 * (self.high - self.low)

    def place(self, levels: Array) -> Array:
        """Return where noise levels are drawn: at log rho itself if it is finite."""
        return np.clip(levels, self.low - self.margin, self.high + self.margin)

    def show_on(self, axis: Any, line: Callable[..., Any]) -> None:
        """Label an axis with noise levels; `line` draws the border of the margin."""
        bounds = np.exp([self.low, self.high])
        rho = LogLocator(numticks=8).tick_values(*bounds)
        if np.count_nonzero((rho >= bounds[0]) & (rho <= bounds[1])) < 3:
            rho = LogLocator(subs=(1, 2, 5), numticks=8).tick_values(*bounds)
        rho = rho[(rho >= 0.999 * bounds[0]) & (rho <= 1.001 * bounds[1])]
        places, names = list(np.log(rho)), [_power(value) for value in rho]
        for needed, end, sign, name in zip(self.ends, (self.low, self.high), (-1, 1), ("0", r"$\infty$"), strict=True):
            if needed:
                line(end + sign * self.margin / 2, color=_GREY, linestyle=":", linewidth=0.8)
                places.append(end + sign * self.margin)
                names.append(name)
        axis.set_major_locator(FixedLocator(places))
        axis.set_major_formatter(FixedFormatter(names))


def _power(value: float) -> str:
    return f"{value:g}" if 1e-3 < value < 1e3 else rf"$10^{{{np.log10(value):.0f}}}$"


# --- the times ------------------------------------------------------------------------------------------------------------


def schedule_of(plan: Table) -> Schedule | None:
    """Return the schedule that a plan was made for, or None if its name does not tell."""
    match = re.fullmatch(r"([\w.]+)\((.*)\)", plan.schedule)
    if match is None or match[1] not in _MAKERS:
        return None
    parts = [part.rpartition("=") for part in match[2].split(", ") if part]
    try:
        given = [float(value) for name, _, value in parts if not name]
        sde = _MAKERS[match[1]](*given, **{name: float(value) for name, _, value in parts if name})
    except (TypeError, ValueError):  # a name written into a file by hand
        return None
    return sde if plan.matches(sde) else None


def usual_grids(plan: Table, sde: Schedule | None) -> dict[str, Array | None]:
    """Return log rho at the times of each of `GRIDS` between the plan's ends, in as many steps; None if there is no such grid."""
    levels = noise_levels(plan)[[0, -1]]
    ends = plan.t[[0, -1]]
    known = sde is not None
    if sde is None:  # all grids except those in t are grids of noise levels, whatever the schedule
        sde, ends = FlowMatching(), FlowMatching().t_of_log_rho(levels)
    found: dict[str, Array | None] = {}
    for name, phase, power in GRIDS:
        found[name] = None
        if known or phase != "t":
            try:
                ts = make_grid(sde.between(float(ends.max()), float(ends.min())), plan.num_step, phase, power)
            except ValueError:  # rho or its logarithm is infinite at an end
                continue
            with np.errstate(divide="ignore"):
                grid = sde.log_rho(ts)
            found[name] = grid[::-1] if plan.direction == "encode" else grid
    return found


def draw_times(ax: Any, plan: Table, scale: NoiseScale, sde: Schedule | None = None) -> None:
    """Draw the times of the plan's states and stages on an axis of noise levels, and below them those of the usual grids.

    Raises
    ------
    ValueError
        If sde is not the schedule that the plan was made for.
    """
    if sde is not None:
        check_schedule(sde)
        if not plan.matches(sde):
            raise ValueError(f"sde={sde.name} is not the schedule of this plan, which was made for {plan.schedule}; give that one")
    sde = schedule_of(plan) if sde is None else sde
    levels, states = noise_levels(plan), np.concatenate([[True], plan.accepts])
    ax.plot(scale.place(levels[~states]), np.zeros((~states).sum()), "^", color=_ORANGE, markersize=5, label="a stage")
    ax.plot(scale.place(levels[states]), np.zeros(plan.num_step + 1), "o", color=_BLUE, markersize=_size(plan), label="this plan")
    for y, (name, grid) in enumerate(usual_grids(plan, sde).items(), 1):
        if grid is None:
            unknown = name.startswith("t,") and sde is None
            why = "unknown without the schedule: plan.plot(sde)" if unknown else r"none: $\rho$ ends at 0 or $\infty$"
            ax.text(0.5, y, why, fontsize=_TINY, color=_GREY, ha="center", va="center", transform=ax.get_yaxis_transform())
        else:
            ax.plot(scale.place(grid), np.full(len(grid), y), "|", color="black", markersize=9, label=name)
    ax.axhline(0.5, color=_GREY, linewidth=0.8)
    ax.set_yticks(range(len(GRIDS) + 1), ["this plan", *(name for name, *_ in GRIDS)])
    ax.set_ylim(len(GRIDS) + 0.6, -0.6)
    scale.show_on(ax.xaxis, ax.axvline)
    if plan.direction == "decode":
        ax.invert_xaxis()
    way = "noise to data" if plan.direction == "decode" else "data to noise"
    _finish(ax, f"Times, beside the usual grids in as many steps: from {way}", r"noise level $\rho$ = $\sigma/\alpha$, log scale")


# --- the weights ----------------------------------------------------------------------------------------------------------


def staged(plan: Table) -> bool:
    """Return whether x differs from base after some row, so that the next part of the table says something."""
    return bool((plan.next_x != 1).any() or (plan.next_p != 0).any())


def weight_columns(plan: Table) -> dict[str, Array]:
    """Return the columns of the table to draw, by name: keep_x, keep_p, keep_z if there is noise, and next if it says something."""
    columns = {"keep_x": plan.keep_x}
    columns |= {f"keep_p[{j}]": column for j, column in enumerate(plan.keep_p.T)}
    columns |= {"keep_z": plan.keep_z} if plan.keep_z.any() else {}
    if staged(plan):
        columns |= {"next_x": plan.next_x} | {f"next_p[{j}]": column for j, column in enumerate(plan.next_p.T)}
    return columns


def draw_weights(ax: Any, plan: Table, *, numbers: bool, named: bool, title: str = "") -> None:
    """Draw the table as a colour map, row by row and 0 left blank, with its numbers, or hatched where they are negative.

    If not all columns are `named`, only the x columns are, which begin each half.
    """
    columns = weight_columns(plan)
    values = np.ma.masked_equal(np.stack(list(columns.values()), axis=1), 0)
    rows, width = values.shape
    most = float(np.abs(values).max())
    norm = SymLogNorm(most / 100, linscale=0.5, vmin=-most, vmax=most)
    mesh = ax.pcolormesh(values, cmap=_NEGATIVE_TO_POSITIVE, norm=norm, edgecolors="white", linewidth=0.6 if rows <= 40 else 0)
    negative = np.argwhere((values < 0).filled(False))
    if numbers:
        _write_numbers(ax, values, norm)
    elif negative.size:
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) + negative[:, None, ::-1]
        ax.add_collection(PolyCollection(list(corners), facecolor="none", edgecolor="#7A3600", hatch="/////", linewidth=0))
    _name_columns(ax, list(columns), named)
    _name_rows(ax, plan)
    ax.set_xlim(0, width)
    ax.set_ylim(rows, 0)
    _bar(ax, mesh, most)
    _finish(ax, (title or _weights_title(columns)) + ("" if numbers or not negative.size else "; hatched: negative"), "")
    ax.grid(False)


def _weights_title(columns: dict[str, Array]) -> str:
    noise = ", keep_z of noise" if "keep_z" in columns else ""
    after = "\nfrom next_x on: of the x that the next call sees" if "next_x" in columns else ""
    return f"Weights: keep_x of the state, p[0] of the newest prediction{noise}{after}"


def _write_numbers(ax: Any, values: AnyArray, norm: Any) -> None:
    size = _TINY if values.shape[1] <= 10 else 6.5
    for i, j in np.argwhere(~np.ma.getmaskarray(values)):
        colour = "black" if 0.06 < norm(values[i, j]) < 0.86 else "white"
        ax.text(j + 0.5, i + 0.5, _short(values[i, j]), fontsize=size, color=colour, ha="center", va="center")


def _short(value: float) -> str:
    """Return a weight in at most seven characters."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}"


def _name_columns(ax: Any, names: list[str], named: bool) -> None:
    short = [name if name.endswith(("_x", "_z")) else name.partition("_")[2] for name in names]
    ax.set_xticks(np.arange(len(names)) + 0.5, [name if named or name.endswith("_x") else "" for name in short])
    if "next_x" in names:
        ax.axvline(names.index("next_x"), color="black", linewidth=1.6)


def _name_rows(ax: Any, plan: Table) -> None:
    n = plan.keep_x.size
    shown = range(0, n, -(-n // 14))
    ax.set_yticks([i + 0.5 for i in shown], [f"{plan.t[i]:.4g}" + ("" if plan.calls[i] else ", no call") for i in shown])
    ax.set_ylabel("time t of the row", fontsize=_SMALL)


def _bar(ax: Any, mesh: Any, most: float) -> None:
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.01, aspect=14, shrink=0.95)
    ends = [most / 100, most / 10, most]
    places = [*(-value for value in reversed(ends)), 0.0, *ends]
    bar.ax.yaxis.set_major_locator(FixedLocator(places))
    bar.ax.yaxis.set_major_formatter(FixedFormatter([f"{value:.2g}" if abs(value) < 99 else f"{value:.0f}" for value in places]))
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=_TINY)


# --- the path -------------------------------------------------------------------------------------------------------------


def draw_path(ax: Any, plan: Table, scale: NoiseScale) -> None:
    """Draw the noise level of x before each row and at the end: states, stages, rows without a call, and steps that add noise."""
    y, n = scale.place(noise_levels(plan)), plan.keep_x.size
    stage = np.concatenate([[False], ~plan.accepts[:-1]])
    noisy = plan.keep_z != 0
    for chosen, style in ((~noisy, {"color": _GREY}), (noisy, {"color": _VERMILION, "ls": "--", "label": "noise is added"})):
        x_of, y_of = (np.stack([v[:-1], v[1:], np.full(n, np.nan)], axis=1)[chosen].ravel() for v in (np.arange(n + 1.0), y))
        if x_of.size:
            ax.plot(x_of, y_of, linewidth=1.1, zorder=1, **style)
    size = _size(plan)
    for kind, marker, colour, name in ((~stage, "o", _BLUE, "state"), (stage, "^", _ORANGE, "stage")):
        for calls, fill, more in ((plan.calls, colour, ""), (~plan.calls, "white", ", no call")):
            rows = np.flatnonzero(kind & calls)
            if rows.size:
                ax.plot(rows, y[rows], marker, color=colour, markerfacecolor=fill, markersize=size, label=name + more)
    ax.plot([n], y[-1:], "s", color="black", markersize=size, label="result")
    scale.show_on(ax.yaxis, ax.axhline)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ax.set_ylabel(r"noise level $\sigma/\alpha$", fontsize=_SMALL)
    ax.legend(fontsize=_TINY, loc="best", framealpha=0.9)
    called = "each calls the network" if plan.nfe == n else f"{plan.nfe} of {n} call the network"
    _finish(ax, "The noise level given to the network", f"row of the plan; {called}")


def _size(plan: Table) -> int:
    return 6 if plan.keep_x.size <= 30 else 3


def _finish(ax: Any, title: str, xlabel: str) -> None:
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(xlabel, fontsize=_SMALL)
    ax.tick_params(labelsize=_SMALL)
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
