"""The figures of docs/sde-to-plan.md, on data of one dimension whose exact eps is known: `python -m benchmarks.figures paths`, ...

The data are two Gaussians at -1 and 1.2, of deviations 0.2 and 0.35, with weights 0.4 and 0.6; the schedule is the linear VP one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray

import deis

from .figures import BLACK, BLUE, GREEN, MARKS, ORANGE, PINK, SKY, budgets, line, save

Array = NDArray[np.float64]
SDE = deis.VPSDE.linear()
CENTRES, DEVIATIONS, WEIGHTS = np.array([-1.0, 1.2]), np.array([0.2, 0.35]), np.array([0.4, 0.6])
X_T = np.linspace(-1.8, 1.8, 9)[:, None]


def components(x: Array, t: Array) -> tuple[Array, Array, Array]:
    """Return x - the mean, the variance and the density of each component at time t, on a new last axis."""
    alpha, sigma = SDE.alpha(t)[..., None], SDE.sigma(t)[..., None]
    variance = (alpha * DEVIATIONS) ** 2 + sigma**2
    apart = x[..., None] - alpha * CENTRES
    return apart, variance, WEIGHTS * np.exp(-(apart**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def eps(x: Array, t: Array) -> Array:
    """Return the exact eps-hat, -sigma times the score of the mixture at time t."""
    t = np.broadcast_to(np.reshape(t, (-1,) + (1,) * (x.ndim - 1)), x.shape)
    apart, variance, density = components(x, t)
    return SDE.sigma(t) * (density * apart / variance).sum(axis=-1) / density.sum(axis=-1)


def exact(num_step: int = 400) -> tuple[Array, Array]:
    """Return times and the converged trajectories at them."""
    plan = deis.make_plan(SDE, "tab3", num_step=num_step)
    return plan.ts, deis.sample(plan, eps, X_T, trajectory=True)[..., 0]


def paths() -> None:
    """The densities p_t and the trajectories of the probability-flow ODE."""
    t, x = np.meshgrid(np.linspace(1e-3, 1, 300), np.linspace(-2.8, 2.8, 300))
    density = components(x, t)[2].sum(axis=-1)
    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    axes.pcolormesh(t, x, density / density.max(axis=0), cmap="Greys", vmax=1.6, rasterized=True, shading="auto")
    times, found = exact()
    for trajectory in found.T:
        axes.plot(times, trajectory, color=BLUE, lw=1.6)
    axes.set(xlabel="t", ylabel="x", xlim=(1, 0), title="from noise (t = 1) to data (t = 0)")
    axes.grid(False)
    save(figure, "paths")


def schedules() -> None:
    """alpha, sigma and rho of four schedules."""
    shown = {
        "VPSDE.linear()": (deis.VPSDE.linear(), BLACK),
        "VPSDE.cosine()": (deis.VPSDE.cosine(), ORANGE),
        "FlowMatching()": (deis.FlowMatching(), BLUE),
        "VESDE()": (deis.VESDE(), GREEN),
    }
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.4))
    for label, (sde, colour) in shown.items():
        t = np.linspace(max(sde.t_end, 1e-3), min(sde.t_start, 1 - 1e-3), 200)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        for axes, values in zip(panels, (alpha, sigma, sigma / alpha), strict=True):
            axes.plot(t, values, color=colour, marker=MARKS[colour], markevery=40, ms=5, label=label)
    panels[1].set_ylim(-0.05, 1.3)
    panels[2].set_yscale("log")
    for axes, title in zip(panels, ("alpha(t)", "sigma(t)", "rho(t) = sigma / alpha"), strict=True):
        axes.set(xlabel="t", title=title)
    panels[0].legend(fontsize=8)
    save(figure, "schedules")


def straight() -> None:
    """One set of trajectories in x against t, and in x / alpha against rho, where eps-hat is the slope."""
    t, x = exact()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for trajectory in x.T:
        left.plot(t, trajectory, color=BLUE)
        right.plot(SDE.rho(t), trajectory / SDE.alpha(t), color=BLUE)
    left.set(xlabel="t", ylabel="x", xlim=(1, 0), title="x over t: bent")
    right.set(xlabel="rho", ylabel="x / alpha", xlim=(3, 0), ylim=(-5, 5), title="x / alpha over rho: the slope is eps")
    save(figure, "straight")


def noise() -> None:
    """Nine samples of the ODE and nine of the reverse diffusion, from the same noise."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
    rng = np.random.default_rng(1)
    for axes, tau, colour in zip(panels, (0.0, 1.0), (BLUE, ORANGE), strict=True):
        plan = deis.make_plan(SDE, deis.adams("data", "log_rho", 1, tau=tau), num_step=200)
        states = deis.sample(plan, eps, X_T, rng=rng, trajectory=True)[..., 0]
        axes.plot(plan.ts, states, color=colour, lw=1)
        axes.set(xlabel="t", xlim=(1, 0), title=f"tau = {tau:g}")
    panels[0].set_ylabel("x")
    save(figure, "noise")


def polynomial() -> None:
    """eps-hat along one trajectory, four nodes and the polynomial through them in t and in rho, up to the next time."""
    t, x = exact()
    along = np.array([eps(np.array([[value]]), np.array([time]))[0, 0] for time, value in zip(t, x[:, 5], strict=True)])
    times = np.linspace(1, 1e-3**0.5, 11) ** 2
    nodes, end = times[3:7], times[7]
    values, fine = np.interp(nodes, t[::-1], along[::-1]), np.linspace(nodes[0], end, 100)
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    axes.plot(t, along, color="0.45", lw=3, label="eps along the trajectory")
    for name, clock, colour, style in (("t", lambda t: t, BLUE, "-"), ("log rho", lambda t: np.log(SDE.rho(t)), ORANGE, "--")):
        u = clock(nodes)
        through = np.polynomial.Polynomial.fit(u, values, 3)(clock(fine))
        axes.plot(fine, through, color=colour, ls=style, lw=1.8, label=f"cubic in {name}")
        axes.plot(end, through[-1], color=colour, marker=MARKS[colour], ms=7)
    axes.plot(nodes, values, ls="", color=BLACK, marker="o", ms=7, label="the last four predictions")
    axes.axvspan(end, nodes[-1], color="0.9")
    axes.annotate("the step", ((end + nodes[-1]) / 2, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top")
    axes.set(xlabel="t", ylabel="eps", xlim=(0.65, 0))
    axes.legend(fontsize=9, loc="lower left")
    save(figure, "polynomial")


def plan() -> None:
    """The plan of tab3 in eight calls, as a picture of its weights."""
    made = deis.make_plan(SDE, "tab3", nfe=8)
    weights = np.column_stack([made.keep_x, made.keep_p])
    figure, axes = plt.subplots(figsize=(7, 4))
    image = axes.imshow(weights, cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
    for (row, column), value in np.ndenumerate(weights):
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="white" if abs(value) > 1.8 else "black", fontsize=9)
    axes.set_xticks(range(5), ["keep_x", "newest", "1 before", "2 before", "3 before"])
    axes.xaxis.tick_top()
    axes.set_yticks(range(8), [f"t = {time:.3f}" for time in made.t[:-1]])
    axes.grid(False)
    figure.colorbar(image, shrink=0.8)
    save(figure, "plan")


def order() -> None:
    """The error at the end against the number of calls: the slopes are the orders."""
    reference = exact(3000)[1][-1]
    figure, axes = plt.subplots(figsize=(7, 4))
    shown: dict[str, str] = {"ddim": SKY, "tab1": GREEN, "tab2": ORANGE, "tab3": BLUE, "rhork_3kutta": PINK, "auto": BLACK}
    for name, colour in shown.items():
        points: list[tuple[float, Any]] = []
        for nfe in (6, 9, 12, 18, 24, 36, 48, 72, 96):
            x_0 = deis.sample(deis.make_plan(SDE, name, nfe=nfe), eps, X_T)[:, 0]
            points.append((nfe, np.sqrt(np.mean((x_0 - reference) ** 2))))
        line(axes, points, colour, name)
    budgets(axes, (6, 12, 24, 48, 96))
    axes.set_ylabel("error at the end")
    axes.legend(fontsize=9)
    save(figure, "order")


DRAWN: dict[str, Callable[[], None]] = {
    "paths": paths,
    "schedules": schedules,
    "straight": straight,
    "noise": noise,
    "polynomial": polynomial,
    "plan": plan,
    "order": order,
}
