"""The machine knows neither arrays nor coefficients: what `combine` multiplies by may be one a sample, a block, one a frequency."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import fft
from scipy.stats import ortho_group

import deis
from deis.arrays import Array
from deis.backends import backend_of
from deis.backends.numpy import combine
from deis.machine import Row, advance, run_rows

SDE = deis.VPSDE.linear()
X_T = np.random.default_rng(0).standard_normal((4, 3, 2))
NUMBERS = ("t", "alpha", "sigma", "keep_x", "next_x", "guess")


def data(x: Array, row: Row) -> Array:
    """A nonlinear prediction of x_0 that knows its noise level."""
    return np.tanh(row.alpha * x + row.sigma)


def stacked(plans: Sequence[deis.Plan], lay: Any) -> list[Row]:
    """Return rows whose coefficients are `lay(numbers)` of the number of each plan; their windows are made one."""
    window = max(plan.window for plan in plans)

    def weights(rows: Sequence[Row], name: str) -> list[Any]:
        padded = np.array([np.pad(getattr(row, name), (0, window - len(row.keep_p))) for row in rows])
        return [lay(column) for column in padded.T]

    made = []
    for rows in zip(*(plan.rows for plan in plans), strict=True):
        numbers = {name: lay(np.array([getattr(row, name) for row in rows])) for name in NUMBERS}
        made.append(rows[0]._replace(**numbers, keep_p=weights(rows, "keep_p"), next_p=weights(rows, "next_p")))
    return made


def test_two_plans_share_one_batch() -> None:
    """A coefficient a sample: the loop is the same, and so is `combine`, because arrays broadcast."""
    plans = [deis.make_plan(SDE, "dpmpp_3m", 6), deis.make_plan(deis.VPSDE.cosine(), "unipc2", 6)]
    rows = stacked(plans, lambda numbers: numbers[[0, 1, 1, 0], None, None])

    def broadcast(c_x: Array, x: Array, c_p: Sequence[Array], history: Sequence[Array]) -> Array:
        return c_x * x + sum(c * p for c, p in zip(c_p, history, strict=False))

    mixed = run_rows(rows, lambda i, x: data(x, rows[i]), broadcast, X_T)
    for number, samples in ((0, [0, 3]), (1, [1, 2])):
        own = plans[number]
        alone = run_rows(own.rows, lambda i, x, own=own: data(x, own.rows[i]), combine, X_T[samples])  # type: ignore[misc]
        np.testing.assert_allclose(mixed[samples], alone, rtol=1e-13, atol=1e-13)


def test_blocks_mix_two_channels() -> None:
    """2 x 2 coefficients Q diag(c, c') Q^T are two plans in the coordinates Q^T x; so matrix-valued diffusions will run."""
    plans = [deis.make_plan(SDE, "dpmpp_2m", 5), deis.make_plan(deis.VPSDE.cosine(), "dpmpp_2m", 5)]
    q = ortho_group.rvs(2, random_state=1)
    rows = stacked(plans, lambda numbers: q @ np.diag(numbers) @ q.T)

    def block(c_x: Array, x: Array, c_p: Sequence[Array], history: Sequence[Array]) -> Array:
        return x @ c_x.T + sum(p @ c.T for c, p in zip(c_p, history, strict=False))

    def predict(i: int, x: Array) -> Array:  # of each coordinate, at the level of its own plan
        y = x @ q
        return np.stack([data(y[..., k], plans[k].rows[i]) for k in (0, 1)], axis=-1) @ q.T

    x_0 = run_rows(rows, predict, block, X_T) @ q
    for k, plan in enumerate(plans):
        alone = run_rows(plan.rows, lambda i, y, plan=plan: data(y, plan.rows[i]), combine, (X_T @ q)[..., k])  # type: ignore[misc]
        np.testing.assert_allclose(x_0[..., k], alone, rtol=1e-13, atol=1e-13)


def test_one_coefficient_a_frequency() -> None:
    """Numbers for each frequency of an orthonormal cosine transform; blurring diffusions have these."""
    plans = [deis.make_plan(deis.VPSDE.linear(beta_1=beta), "tab2", 5, ts_order=1) for beta in (10.0, 15.0, 20.0)]
    rows = stacked(plans, lambda numbers: numbers[:, None])  # along axis 1

    def filtered(c: Array, x: Array) -> Array:
        return fft.idct(c * fft.dct(x, axis=1, norm="ortho"), axis=1, norm="ortho")

    def multiply(c_x: Array, x: Array, c_p: Sequence[Array], history: Sequence[Array]) -> Array:
        return filtered(c_x, x) + sum(filtered(c, p) for c, p in zip(c_p, history, strict=False))

    x_0 = fft.dct(run_rows(rows, lambda i, x: 0.1 * x, multiply, X_T), axis=1, norm="ortho")
    for k, plan in enumerate(plans):
        alone = run_rows(plan.rows, lambda i, x: 0.1 * x, combine, fft.dct(X_T, axis=1, norm="ortho")[:, k])
        np.testing.assert_allclose(x_0[:, k], alone, rtol=1e-13, atol=1e-13)


def test_noise_is_never_dropped_in_silence() -> None:
    plan = deis.make_plan(SDE, "ancestral", 4)
    with pytest.raises(ValueError, match=r"row at t=1\.0 adds noise, keep_z=0\.\d+, and add_noise is missing"):
        run_rows(plan.rows, lambda i, x: 0.1 * x, combine, X_T)
    with pytest.raises(ValueError, match="add_noise is missing"):
        advance(plan.rows[0]._replace(keep_z=np.zeros(3)), X_T, (X_T,), combine)  # one a sample: none of them is asked
    drawn: list[float] = []

    def add_noise(keep_z: float, x: Array) -> Array:
        drawn.append(keep_z)
        return x

    quiet = [plan.rows[0]._replace(keep_z=0.0), plan.rows[1]._replace(keep_z=None), plan.rows[2]]
    run_rows(quiet, lambda i, x: 0.1 * x, combine, X_T, add_noise=add_noise)
    assert drawn == [plan.rows[2].keep_z]


def test_jax_scans_a_row_of_arrays() -> None:
    """A Row is a pytree: its leaves are columns, and `advance` is what the scan runs."""
    plan = deis.make_plan(SDE, "dpmpp_2m", 5)
    with jax.enable_x64(True):
        row = Row(*(jnp.asarray(getattr(plan, name)[: len(plan.rows)]) for name in Row._fields))._replace(keep_z=None)
        multiply = backend_of(jnp.zeros(1)).combine

        def step(carry: tuple[Any, Any, Any], row: Row) -> tuple[Any, None]:
            x, base, p_last = carry
            p = jnp.tanh(row.alpha * x + row.sigma)
            base, x = advance(row, base, (p, p_last), multiply)
            return (x, base, p), None

        x = jnp.asarray(X_T)
        x_0 = np.asarray(jax.lax.scan(step, (x, x, jnp.zeros_like(x)), row)[0][0])
    np.testing.assert_allclose(x_0, run_rows(plan.rows, lambda i, x: data(x, plan.rows[i]), combine, X_T), rtol=1e-13)


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, jnp.asarray])
def test_every_backend_fills_its_record(make: Any) -> None:
    x = make(X_T.astype(np.float32))
    backend = backend_of(x)
    assert backend.owns(x)
    assert not any(other.owns(x) for other in map(backend_of, (X_T, torch.zeros(1), jnp.zeros(1))) if other is not backend)
    assert backend.carry(x.dtype) == x.dtype
    assert backend.cast(x, x.dtype).dtype == x.dtype
    times = backend.full(x, [3, 1], x.dtype, True)
    assert times.shape == (2, 4)
    assert "int" in str(times.dtype)
    assert backend.full(x, [0.5], x.dtype, False).dtype == x.dtype
    np.testing.assert_array_equal(backend.to_host(x), X_T.astype(np.float32).astype(np.float64))
    assert backend.like(X_T, x).dtype == x.dtype
    expected = 0.5 * X_T + 2.0 * X_T - X_T
    np.testing.assert_allclose(
        backend.to_host(backend.combine(0.5, x, (2.0, 0.0, -1.0), (x, x, x))), expected, rtol=1e-6, atol=1e-6
    )
    with backend.no_grad():
        assert bool(backend.xp.isfinite(x).all())
    assert backend_of([1.0]) is backend_of(X_T)
