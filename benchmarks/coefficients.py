"""Coefficients against mpmath at 40 digits, and the time that a plan takes to build.

python -m benchmarks.coefficients
"""

from __future__ import annotations

import time

import numpy as np

import deis
from tests.oracle import exact_cosine, exact_linear, exact_weights

STEPS = (3, 4, 5, 7, 10, 20, 50, 100)


def worst_error(sde: deis.Schedule, exact: object, order: int, phase: str) -> tuple[float, float]:
    """Return the largest error of a weight, and of the sum of a row, relative to the largest weight of its row."""
    weight_error = sum_error = 0.0
    for num_step in STEPS:
        plan = deis.make_plan(sde, f"tab{order}", num_step, ts_phase=phase)
        for i in np.unique(np.linspace(0, num_step - 1, 6).astype(int)):
            used = min(i, order) + 1
            nodes = plan.t[i - np.arange(used)].tolist()
            weights = exact_weights(exact, nodes, plan.t[i], plan.t[i + 1], "t")  # type: ignore[arg-type]
            ours = plan.keep_p[i].tolist()
            scale = float(max(map(abs, weights)))
            weight_error = max(weight_error, *(abs(float(w - c)) / scale for w, c in zip(weights, ours, strict=False)))
            sum_error = max(sum_error, abs(float(sum(weights)) - sum(ours)) / scale)
    return weight_error, sum_error


def milliseconds(num_step: int, repeat: int) -> float:
    sde, times = deis.VPSDE.linear(), []
    for _ in range(repeat):
        start = time.perf_counter()
        deis.make_plan(sde, "tab3", num_step)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main() -> None:
    milliseconds(10, 20)
    print(f"a plan of tab3: {milliseconds(10, 200):.2f} ms for 10 steps, {milliseconds(1000, 10):.0f} ms for 1000 (median)")
    for name, sde, exact in (
        ("linear", deis.VPSDE.linear(0.1, 20.0), exact_linear(0.1, 20.0)),
        ("cosine", deis.VPSDE.cosine(), exact_cosine()),
    ):
        for phase in ("t", "rho", "log"):
            errors = [worst_error(sde, exact, order, phase) for order in range(6)]
            weights, sums = (" ".join(f"{error[k]:.1e}" for error in errors) for k in (0, 1))
            print(f"{name} VP, {phase:3} grid, orders 0 to 5, steps {STEPS}: weights {weights}; row sums {sums}", flush=True)


if __name__ == "__main__":
    main()
