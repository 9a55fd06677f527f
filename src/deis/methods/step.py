"""One step of first order or of a polynomial: what becomes of x, of the predictions and of the noise."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from ..arguments import number, one_of
from ..arrays import Array, Indices
from ..quadrature import Clock, Form, Norm, lagrange_integrals
from ..sde import Schedule
from .clocks import CLOCKS

FORMS: tuple[Form, ...] = get_args(Form)


def check_form(form: Any) -> Form | None:
    """Return a form, where "x0" means "data"; raise ValueError if it is neither None nor a known form."""
    if form is None:
        return None
    one_of("form", "data" if isinstance(form, str) and form == "x0" else form, FORMS)
    return "eps" if form == "eps" else "data"


def check_tau(tau: Any) -> float:
    """Return a rate at which the noise is renewed."""
    return number("tau", tau, least=0, most=100, hint="0 is no noise, 1 the reverse diffusion")


def check_eta(eta: Any) -> float:
    """Return the square of a rate at which the noise is renewed, as used by SEEDS and k-diffusion."""
    return number("eta", eta, least=0, most=1e4, hint="0 is no noise, 1 the reverse diffusion")


def choose_form(sde: Schedule, ts: Array, form: Form | None = None) -> Form:
    """Return the requested form; by default "eps", or "data" if the grid starts at alpha = 0.

    Raises
    ------
    ValueError
        For "eps" at alpha = 0 and "data" at sigma = 0, where they say nothing about the state.
    """
    at_zero = bool(np.isneginf(sde.log_alpha(ts[:1])).any())
    if at_zero and form == "eps":
        raise ValueError(f"form='eps' has no meaning where alpha is 0, at t={ts[0].item()!r}; use the data form, or start later")
    if form == "data" and bool(np.isneginf(sde.log_sigma(ts[:1])).any()):
        raise ValueError(
            f"form='data' has no meaning where sigma is 0, at t={ts[0].item()!r}, from where this plan rises; use a method of the "
            "eps form, such as 'tab3', or begin with a little noise"
        )
    return form or ("data" if at_zero else "eps")


def rises(ts: Array) -> bool:
    """Return whether a grid runs from data to noise."""
    return bool(ts[-1] > ts[0])


def transport(sde: Schedule, ts: Array, form: Form, tau: Array | float = 0.0) -> tuple[Array, Array]:
    """Return psi and the factor of the noise for each step, shape (n,): what a step does to x itself."""
    if form == "eps":
        alpha = sde.alpha(ts)
        return alpha[1:] / alpha[:-1], np.zeros(len(ts) - 1)
    sigma, fall = sde.sigma(ts), np.diff(sde.log_rho(ts))
    power = np.broadcast_to(np.square(tau), fall.shape)
    lost = np.multiply(power, fall, where=power != 0, out=np.zeros_like(fall))  # tau^2 log(rho_{i+1} / rho_i)
    return sigma[1:] / sigma[:-1] * np.exp(lost), sigma[1:] * np.sqrt(-np.expm1(2 * lost))


def step_degrees(
    sde: Schedule,
    ts: Array,
    order: int,
    clock: Clock,
    form: Form,
    lower_order_final: bool = False,
    *,
    ahead: bool = False,
) -> Indices:
    """Return the degree of the polynomial in each step, shape (n,), as the number of predictions and the clock allow."""
    n = len(ts) - 1
    finite = np.isfinite(clock(sde, ts, sde.log_rho(ts)))
    usable = np.cumsum(finite[:-1]) + int(ahead)  # predictions so far where the clock is finite
    degrees = np.minimum(order, np.maximum(usable - 1, 0))
    if lower_order_final:
        degrees = np.minimum(degrees, n - 1 - np.arange(n))
    if not finite[-1] and (form == "data" or ahead or rises(ts)):
        degrees[-1] = 0
    return degrees


def adams_weights(
    sde: Schedule,
    ts: Array,
    degrees: Indices,
    clock: Clock,
    form: Form,
    *,
    tau: Array | float = 0.0,
    norm: Norm | None = None,
    ahead: bool = False,
) -> Array:
    """Return the weights C_ij of shape (n, max(degrees) + 1), newest node first, for step i of degree degrees[i].

    The nodes of step i are t_i, t_{i-1}, ..., and with `ahead` t_{i+1}, t_i, ...
    """
    c_p = np.zeros((len(ts) - 1, degrees.max() + 1))
    rate = np.broadcast_to(tau, degrees.shape)
    for degree in np.unique(degrees):
        (steps,) = np.nonzero(degrees == degree)
        node_t = ts[steps[:, None] + int(ahead) - np.arange(degree + 1)]
        c_p[steps, : degree + 1] = lagrange_integrals(
            sde, clock, form, node_t, ts[steps], ts[steps + 1], tau=rate[steps], norm=norm
        )
    return c_p


def first_order(sde: Schedule, ts: Array, form: Form | None, tau: float = 0.0) -> tuple[Form, Array, Array]:
    """Return the form, and psi and C_i0 of the DDIM step in this form, shape (n,)."""
    chosen = choose_form(sde, ts, form)
    c_0 = adams_weights(sde, ts, np.zeros(len(ts) - 1, dtype=np.intp), CLOCKS["t"], chosen, tau=tau)[:, 0]
    return chosen, transport(sde, ts, chosen, tau)[0], c_0
