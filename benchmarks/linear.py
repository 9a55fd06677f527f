"""Matrix-valued diffusions: what a 2 x 2 step and a plan cost, and R against L on data whose score is known.

python -m benchmarks.linear

One thread. The loop by hand keeps x and v apart and adds term by term; the free model returns 0.1 of its input. The data are two
Gaussians in x, their velocities as critically damped Langevin starts them; the error of a sample is its distance from the solution
of the probability flow, by an adaptive solver at 1e-11, and the table has the median over 256 samples.
"""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

import deis

from .overhead import compare

Array = NDArray[np.float64]
RESULTS = Path(__file__).parent / "results" / "linear.csv"
FIGURE = Path(__file__).parents[1] / "docs" / "linear.png"
MEANS, STD = (-1.0, 0.8), 0.3
BUDGETS = (5, 10, 20, 50, 100)
METHODS = (*((name, None) for name in ("tab0", "tab1", "tab2", "tab3", "trk2", "trk3", "trk4")), ("tab2", 2))
Steps = list[tuple[list[list[float]], list[list[list[float]]]]]


def free(x: Any, t: Any) -> Any:
    return 0.1 * x


def axpy(c: list[float], blocks: list[Tensor]) -> Tensor:
    y = blocks[0] * c[0]
    for weight, block in zip(c[1:], blocks[1:], strict=True):
        y.add_(block, alpha=weight)
    return y


@torch.no_grad()
def by_hand(u: Tensor, t: list[float], steps: Steps) -> Tensor:
    """tab3 of two blocks as one would write it without the library."""
    x, v = u[0], u[1]
    past: tuple[Tensor, ...] = ()
    for now, (psi, weights) in zip(torch.tensor(t)[:, None].expand(-1, u.shape[1]), steps, strict=True):
        past = (free(torch.stack([x, v]), now), *past[:3])
        blocks = [x, v, *(p[i] for p in past for i in range(2))]
        x, v = (axpy([*psi[i], *(c for weight in weights[: len(past)] for c in weight[i])], blocks) for i in range(2))
    return torch.stack([x, v])


def cost() -> None:
    sde = deis.CLD()
    plan = deis.make_linear_plan(sde, "tab3", 20)
    steps = list(zip(plan.keep_x.tolist(), plan.keep_p.tolist(), strict=True))
    t = plan.t[:-1].tolist()
    for shape in ((2, 1, 3, 32, 32), (2, 16, 3, 32, 32)):
        u = torch.randn(shape)
        runs: dict[str, Callable[[], Any]] = {
            "hand": partial(by_hand, u, t, steps),
            "deis": partial(deis.sample_linear, plan, free, u, velocity=True),
        }
        torch.testing.assert_close(runs["hand"](), runs["deis"](), rtol=1e-3, atol=1e-4)
        seconds = compare(runs, 60)
        ours, hand = seconds["deis"], seconds["hand"]
        print(f"a step of tab3, {shape}: {1e6 * ours[0] / 20:.0f} us, by hand {1e6 * hand[0] / 20:.0f} us; ratio of medians "
              f"{ours[0] / hand[0]:.2f}, of least times {ours[1] / hand[1]:.2f}")  # fmt: skip
    for name, make in (("deis.CLD()", deis.CLD), ("its plan of 10 steps", lambda: deis.make_linear_plan(sde, "tab3", 10))):
        (median, least) = compare({name: make}, 20)[name]
        print(f"making {name}: {1e3 * median:.1f} ms, least {1e3 * least:.1f} ms")
    blurred = deis.make_linear_plan(deis.Blurring((64, 64)), "tab2", 10)
    print(f"the file of a plan of ten steps of tab2, 64 x 64 frequencies: {len(json.dumps(blurred.document())) / 1e6:.1f} MB")


class Mixture:
    """Two equal Gaussians in x with the exact score, and the solution of the probability flow."""

    def __init__(self, sde: deis.LinearSDE) -> None:
        self.sde = sde
        rng = np.random.default_rng(0)
        x_0 = np.stack([rng.choice(MEANS, 256) + STD * rng.standard_normal(256), np.zeros(256)])
        self.x_T = sde.psi(sde.t_start, 0.0) @ x_0 + sde.noise(rng.standard_normal((2, 256)))
        self.exact = self._solve()

    def score(self, x: Array, t: float) -> Array:
        psi = self.sde.psi(t, 0.0)
        inverse = np.linalg.inv(psi @ np.diag([STD**2, 0.0]) @ psi.T + self.sde.Sigma(t))
        away = np.stack([x - (psi @ [m, 0.0])[:, None] for m in MEANS])
        pulls = np.einsum("ij,mjb->mib", inverse, away)
        logs = -0.5 * (away * pulls).sum(axis=1)
        share = np.exp(logs - logs.max(axis=0))
        return np.asarray(-(share / share.sum(axis=0) * pulls.swapaxes(0, 1)).sum(axis=1))

    def network(self, K: str) -> Any:
        return lambda x, t: -self.sde.K(t[0], K).T @ self.score(x, float(t[0]))

    def _solve(self) -> Array:
        def slope(t: float, flat: Array) -> Array:
            x, F, G = flat.reshape(2, -1), np.asarray(self.sde.F(t)), np.asarray(self.sde.G(t))
            return np.asarray(F @ x - 0.5 * G @ G.T @ self.score(x, t)).ravel()

        span = (self.sde.t_start, self.sde.t_end)
        out = solve_ivp(slope, span, self.x_T.ravel(), method="LSODA", rtol=1e-11, atol=1e-11)
        return np.asarray(out.y[:, -1].reshape(2, -1)[0])

    def error(self, plan: deis.LinearPlan, K: str) -> float:
        return float(np.median(np.abs(deis.sample_linear(plan, self.network(K), self.x_T) - self.exact)))


def table() -> list[dict[str, Any]]:
    """Return the errors of both roots, of Adams of degree 0 to 3 and with a corrector, and of Runge-Kutta, by evaluations."""
    found = []
    for sde in (deis.CLD(), deis.PSLD()):
        problem = Mixture(sde)
        for K in ("R", "L"):
            for method, corrector in METHODS:
                row: dict[str, Any] = {"sde": sde.name.partition("(")[0], "K": K, "method": method, "corrector": corrector or ""}
                for n in BUDGETS:
                    row[str(n)] = f"{problem.error(deis.make_linear_plan(sde, method, nfe=n, K=K, corrector=corrector), K):.3g}"
                found.append(row)
                print(*row.values())
    return found


def write(rows: list[dict[str, Any]]) -> None:
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, two virtual cores of an x86 CPU\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def figure() -> None:
    """Draw the paths of position and velocity, and the network's output along them in both roots."""
    from matplotlib.figure import Figure

    sde = deis.CLD()
    problem = Mixture(sde)
    x_T = problem.x_T[:, :24]
    plan = deis.make_linear_plan(sde, "tab3", 200)
    states = deis.sample_linear(plan, problem.network("R"), x_T, velocity=True, trajectory=True)
    picture = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, lines, title in zip(
        picture.subplots(1, 4),
        (states[:, 0], states[:, 1], *(_outputs(problem, plan, states, K) for K in ("R", "L"))),
        ("position x", "velocity v", "eps of R, both blocks", "eps of L, both blocks"),
        strict=True,
    ):
        axes.plot(plan.t[: len(lines)], lines, lw=0.6, color="tab:blue")
        axes.set(title=title, xlabel="t", xlim=(1, 0))
    picture.savefig(FIGURE, dpi=90)


def _outputs(problem: Mixture, plan: deis.LinearPlan, states: Array, K: str) -> Array:
    network = problem.network(K)
    found = np.stack([network(x, np.array([t])) for x, t in zip(states, plan.t, strict=True)])
    return found.reshape(len(found), -1)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cost()
    write(table())
    figure()


if __name__ == "__main__":
    main()
