"""The likelihood of 8x8 digits: its error against the closed form, at as many evaluations, beside adaptive Dormand-Prince.

python -m benchmarks.likelihood            measures, and writes benchmarks/results/likelihood.csv
python -m benchmarks.likelihood report     prints the table of docs/likelihood.md

The model is the exact eps of a mixture of 30 Gaussians fitted to scikit-learn's digits, VP linear, float64; its density at the
schedule's end, t = 0.001, is known. 32 digits, noised to there, with the divergence exact. The error is |log p - the closed form|
per dimension, in nats; the prior N(0, sigma^2) in place of the mixture at t = 1 is part of it.

deis         plans that encode, through `deis.log_likelihood`
torchdiffeq  dopri5 of (x, log |det|) in t, as score_sde's likelihood has it, and of x / alpha in log rho; rtol = atol
diffrax      Dopri5 with its PID controller, the same equation in t; an evaluation for each of its 6 new stages, and the first

Each adaptive run takes one step size for all 32 digits. They integrate the whole volume, as is usual; `deis.log_likelihood` leaves
out what Gaussian data of `data_deviation` have.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch import Tensor

import deis

from .methods import digits

Array = NDArray[np.float64]
RESULTS = Path(__file__).parent / "results" / "likelihood.csv"
FIELDS = ("solver", "method", "grid", "data_deviation", "tolerance", "nfe", "median", "worst", "seconds")
EVALUATIONS = (6, 8, 9, 10, 12, 14, 16, 18, 20, 24, 32)
TOLERANCES = (3.0, 1.0, 0.3, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)
GOALS = (1e-2, 1e-3)
PLANS: dict[str, tuple[Any, str | None, float | None]] = {
    "auto": ("auto", None, None),
    "auto on t5": ("auto", "t", 5.0),
    "data, t, order 3, corrector 3": (deis.adams("data", "t", 2, 3), "t", 5.0),
    "data, arctan_rho, order 3, corrector 3": (deis.adams("data", "arctan_rho", 2, 3), "t", 5.0),
    "unipc3": ("unipc3", "t", 5.0),
    "tab3": ("tab3", "t", 5.0),
    "rhork_3kutta": ("rhork_3kutta", "rho", 7.0),
}
DEVIATIONS = (0.1, 0.2)
SDE = deis.VPSDE.linear()
BETA = (0.1, 19.9)


def problem(num: int = 32) -> tuple[Callable[[Tensor, Tensor], Tensor], GaussianMixture, Array, Array]:
    """Return the model, the mixture, the noised digits and their log densities."""
    data = load_digits().data / 8 - 1
    mixture = GaussianMixture(30, reg_covar=1e-3, random_state=0).fit(data)
    alpha, sigma = float(SDE.alpha(SDE.t_end)), float(SDE.sigma(SDE.t_end))
    rng = np.random.default_rng(1)
    x = alpha * data[rng.choice(len(data), num, replace=False)] + sigma * rng.standard_normal((num, 64))
    parts = zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True)
    noised = [(np.log(w), alpha * mean, alpha**2 * cov + sigma**2 * np.eye(64)) for w, mean, cov in parts]
    truth = logsumexp([log_w + multivariate_normal(mean, cov).logpdf(x) for log_w, mean, cov in noised], axis=0)
    return digits(1, sde=SDE).model, mixture, x, truth


def prior(x_T: Array) -> Array:
    sigma = float(SDE.sigma(SDE.t_start))
    found: Array = -((x_T / sigma) ** 2).sum(1) / 2 - 64 * (np.log(sigma) + np.log(2 * np.pi) / 2)
    return found


def ours(model: Any, x: Array) -> Iterator[tuple[dict[str, Any], Array]]:
    for name, (method, phase, power) in PLANS.items():
        for nfe in EVALUATIONS:
            plan = deis.make_plan(SDE, method, None, phase, power, nfe=nfe, direction="encode")
            for deviation in DEVIATIONS:
                found = deis.log_likelihood(model, torch.tensor(x), plan, exact=True, data_deviation=deviation)
                yield {"method": name, "grid": plan.grid, "data_deviation": deviation, "nfe": found.nfe}, found.nats.numpy()


def divergence(model: Any, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return eps, and the trace of its derivative."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        eps = model(leaf, torch.full((len(x),), t, dtype=x.dtype))
        rows = [torch.autograd.grad(eps[:, k].sum(), leaf, retain_graph=True)[0][:, k] for k in range(x.shape[1])]
    return eps.detach(), torch.stack(rows).sum(0)


def with_torchdiffeq(model: Any, x: Array) -> Iterator[tuple[dict[str, Any], Array]]:
    from torchdiffeq import odeint

    calls = 0

    def in_t(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        eps, trace = divergence(model, state[0], float(t))
        half, sigma = (BETA[0] + BETA[1] * float(t)) / 2, float(SDE.sigma(float(t)))
        return half * (eps / sigma - state[0]), half * (trace / sigma - 64)

    def in_log_rho(log_rho: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        t, rho = float(SDE.t_of_log_rho(float(log_rho))), float(log_rho.exp())
        eps, trace = divergence(model, float(SDE.alpha(t)) * state[0], t)
        return rho * eps, rho * float(SDE.alpha(t)) * trace

    ends = np.array([SDE.t_end, SDE.t_start])
    for grid, field, clock, alpha in (
        ("t", in_t, ends, np.ones(2)),
        ("log rho", in_log_rho, SDE.log_rho(ends), SDE.alpha(ends)),
    ):
        for tolerance in TOLERANCES:
            calls, start = 0, (torch.tensor(x / alpha[0]), torch.zeros(len(x), dtype=torch.float64))
            v, change = odeint(field, start, torch.tensor(clock), rtol=tolerance, atol=tolerance, method="dopri5")
            nats = prior(alpha[1] * v[-1].numpy()) + change[-1].numpy() + 64 * np.log(alpha[1] / alpha[0])
            yield {"method": "dopri5", "grid": grid, "tolerance": tolerance, "nfe": calls}, nats


def with_diffrax(mixture: GaussianMixture, x: Array) -> Iterator[tuple[dict[str, Any], Array]]:
    import diffrax
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        variance, basis = map(jnp.asarray, np.linalg.eigh(mixture.covariances_))
        mean, log_weight = jnp.asarray(mixture.means_), jnp.log(mixture.weights_)

        def velocity(t: Any, x: Any) -> Any:
            alpha = jnp.exp(-(BETA[0] * t + BETA[1] * t**2 / 2) / 2)
            spread = alpha**2 * variance + 1 - alpha**2
            y = jnp.einsum("kji,kj->ki", basis, x - alpha * mean)
            weight = jax.nn.softmax(log_weight - 0.5 * (y**2 / spread + jnp.log(spread)).sum(-1))
            score = -jnp.einsum("k,kij,kj->i", weight, basis, y / spread)
            return -(BETA[0] + BETA[1] * t) / 2 * (x + score)

        jacobian: Any = jax.jacfwd(velocity, argnums=1)

        def field(t: Any, state: Any, _: Any) -> Any:
            return jax.vmap(lambda x: (velocity(t, x), jnp.trace(jacobian(t, x))))(state[0])

        @jax.jit
        def solve(tolerance: Any) -> Any:
            control = diffrax.PIDController(rtol=tolerance, atol=tolerance)
            start, terms = (jnp.asarray(x), jnp.zeros(len(x))), diffrax.ODETerm(field)
            ends = float(SDE.t_end), float(SDE.t_start)
            return diffrax.diffeqsolve(terms, diffrax.Dopri5(), *ends, None, start, stepsize_controller=control)

        for tolerance in TOLERANCES:
            solution = solve(tolerance)
            x_T, change = (np.asarray(part[-1]) for part in solution.ys)
            nfe = 6 * int(solution.stats["num_steps"]) + 1
            yield {"method": "Dopri5", "grid": "t", "tolerance": tolerance, "nfe": nfe}, prior(x_T) + change


def measure() -> None:
    model, mixture, x, truth = problem()
    solvers = {"deis": ours(model, x), "torchdiffeq": with_torchdiffeq(model, x), "diffrax": with_diffrax(mixture, x)}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for solver, runs in solvers.items():
            start = time.perf_counter()
            for about, nats in runs:
                error = np.abs(nats - truth) / 64
                row = {"median": f"{np.median(error):.3g}", "worst": f"{error.max():.3g}"}
                writer.writerow({"solver": solver, **about, **row, "seconds": f"{time.perf_counter() - start:.2f}"})
                file.flush()
                start = time.perf_counter()


def below(rows: list[dict[str, str]], goal: float) -> int | None:
    """Return the least evaluations from which on the median error stays below a goal."""
    kept = None
    for row in sorted(rows, key=lambda row: -int(row["nfe"])):
        if not float(row["median"]) < goal:
            break
        kept = int(row["nfe"])
    return kept


def report() -> None:
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    keys = ("solver", "method", "grid", "data_deviation")
    series = {tuple(row[key] for key in keys): [] for row in rows}  # type: ignore[var-annotated]
    for row in rows:
        series[tuple(row[key] for key in keys)].append(row)
    print("| | grid | data_deviation | NFE below 1e-2 | NFE below 1e-3 |\n|---|---|---|---|---|")
    for (solver, method, grid, deviation), of in series.items():
        found = [below(of, goal) for goal in GOALS]
        print(f"| {solver}, {method} | {grid} | {deviation} | {' | '.join('' if n is None else str(n) for n in found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["report"])
    if parser.parse_args().what == "report":
        report()
    else:
        torch.set_num_threads(1)
        measure()


if __name__ == "__main__":
    main()
