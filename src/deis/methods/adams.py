"""Exponential Adams: a polynomial through predictions, integrated exactly; every clock, form, order and corrector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..arguments import array, flag, function, number, one_of, shown, whole
from ..grids import vp_time
from ..plan import Plan
from ..quadrature import Clock, Form, Norm, lagrange_integrals
from ..sde import Schedule
from .noise import check_noise

Array = NDArray[np.float64]
Builder = Callable[[Schedule, Array, str], Plan]
"""build(sde, ts, grid) -> Plan, with ts decreasing, one time more than steps, and grid its name."""

FORMS: tuple[Form, ...] = get_args(Form)
CLOCKS: dict[str, Clock] = {
    "t": lambda sde, t, log_rho: t,
    "rho": lambda sde, t, log_rho: np.exp(log_rho),
    "log_rho": lambda sde, t, log_rho: log_rho,
    "sqrt_t": lambda sde, t, log_rho: np.sqrt(t),
    "vp_t": lambda sde, t, log_rho: vp_time(log_rho),
    "arctan_rho": lambda sde, t, log_rho: np.arctan(np.exp(log_rho)),  # the angle of TrigFlow, arXiv 2410.11081
}


def adams(
    form: Form | None = None,
    clock: str | Callable[[Array], Array] = "t",
    order: int = 3,
    corrector: int | None = None,
    lower_order_final: bool = False,
    *,
    tau: float | Callable[[float], float] = 0.0,
    norm: Norm | None = None,
    name: str | None = None,
) -> Builder:
    r"""Return the exponential Adams method of a form, clock, order and corrector.

    x_{i+1} = psi_i x_i + sum_j C_ij p_{i-j}, where C_ij integrates the Lagrange polynomials through the newest order + 1
    predictions exactly (arXiv 2204.13902, eq. 14 and 15, for the eps form in t; `deis.quadrature` for all).

    Parameters
    ----------
    form : {"eps", "data"}, optional
        What the polynomial goes through. By default eps, and data where the grid starts at alpha = 0 or tau is given.
    clock : {"t", "rho", "log_rho", "sqrt_t", "vp_t", "arctan_rho"} or callable
        The variable of the polynomial; vp_t is the time at which the linear VP schedule has the same rho, and a callable any
        strictly monotone u(t) of an array of times.
    order : int
        The degree q of the polynomial; the method has order q + 1. The first steps use the predictions there are, of degree 0,
        1, ...: so does a plan of fewer than order + 1 steps throughout. A node at which the clock is infinite (log rho at alpha =
        0) is left out, and so is the polynomial in the last step of the data form to such an end (log rho at sigma = 0).
    corrector : int, optional
        Integrate each step again, when its end has been evaluated, through that prediction and `corrector` earlier ones
        (exponential Adams-Moulton; UniC, arXiv 2302.04867), at no further evaluation. The last step has none.
    lower_order_final : bool
        Lower the degree towards the end, 0 in the last step.
    tau : float or callable
        The rate of renewal of the noise, or that as a function of t, taken at the start of a step: 0 is the probability flow, 1
        the reverse diffusion (SA-Solver, arXiv 2309.05019). The data form only, as eps is no smooth function of time then. With
        a corrector, predictor and corrector share the noise.
    norm : callable, optional
        c(t), the size of the predictions: the polynomial goes through p / c (DEIS-SN, arXiv 2311.00157). `deis.measure_norm`
        measures one.

    Raises
    ------
    ValueError
        Where an argument is none of these; and, when a plan is built, where the clock is not monotone on the grid.
    """
    order = whole("order", order, 0)
    corrector = None if corrector is None else whole("corrector", corrector, 0)
    check_form(form)
    flag("lower_order_final", lower_order_final)
    u = _clock(clock)
    tau = tau if callable(tau) else check_tau(tau)
    if form == "eps" and tau != 0:
        raise ValueError(f"tau={tau!r} needs form='data': eps is no smooth function of time where noise is added")
    if not isinstance(name, str | None):
        raise ValueError(f"name={shown(name)} must be a string")
    label = name or f"adams({form!r}, {clock if isinstance(clock, str) else 'custom clock'!r}, {order}, {corrector})"

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        rate = _rates(tau, ts)
        chosen = choose_form(sde, ts, "data" if rate.any() else form)
        c = checked_norm(norm, chosen)
        check_clock(sde, ts, u, label)
        degrees = step_degrees(sde, ts, order, u, chosen, lower_order_final)
        c_p = adams_weights(sde, ts, degrees, u, chosen, tau=rate, norm=c)
        c_c = None
        if corrector is not None:
            known = step_degrees(sde, ts, corrector, u, chosen, ahead=True)
            c_c = adams_weights(sde, ts, known, u, chosen, tau=rate, norm=c, ahead=True)
        psi, keep_z = transport(sde, ts, chosen, rate)
        plan = multistep_plan(sde, ts, chosen, psi, c_p, label, grid, corrector=c_c, keep_z=keep_z, fitted=source(norm))
        return check_noise(plan, "the function given" if callable(tau) else repr(tau))

    return build


def choose_form(sde: Schedule, ts: Array, form: Form | None = None) -> Form:
    """Return the form that is asked for; by default "eps", and "data" where the grid starts at alpha = 0.

    Raises
    ------
    ValueError
        For "eps" at alpha = 0, where it says nothing of the state.
    """
    at_zero = bool(np.isneginf(sde.log_alpha(ts[:1])).any())
    if at_zero and form == "eps":
        raise ValueError(f"form='eps' has no meaning where alpha is 0, at t={ts[0].item()!r}; use the data form, or start later")
    return form or ("data" if at_zero else "eps")


def transport(sde: Schedule, ts: Array, form: Form, tau: Array | float = 0.0) -> tuple[Array, Array]:
    """Return psi and the factor of the noise of each step, shape (n,): what becomes of x itself."""
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
) -> NDArray[np.intp]:
    """Return the degree of the polynomial of each step, shape (n,): what the number of predictions and the clock allow."""
    n = len(ts) - 1
    finite = np.isfinite(clock(sde, ts, sde.log_rho(ts)))
    usable = np.cumsum(finite[:-1]) + int(ahead)  # predictions so far where the clock is finite
    degrees = np.minimum(order, np.maximum(usable - 1, 0))
    if lower_order_final:
        degrees = np.minimum(degrees, n - 1 - np.arange(n))
    if not finite[-1] and (form == "data" or ahead):
        degrees[-1] = 0
    return degrees


def adams_weights(
    sde: Schedule,
    ts: Array,
    degrees: NDArray[np.intp],
    clock: Clock,
    form: Form,
    *,
    tau: Array | float = 0.0,
    norm: Norm | None = None,
    ahead: bool = False,
) -> Array:
    """Return the weights C_ij of shape (n, max(degrees) + 1), newest node first, by step i of degree degrees[i].

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


def multistep_plan(
    sde: Schedule,
    ts: Array,
    form: Form,
    psi: Array,
    c_p: Array,
    method: str,
    grid: str,
    *,
    corrector: Array | None = None,
    keep_z: Array | None = None,
    fitted: str = "",
) -> Plan:
    """Lay x_{i+1} = psi_i x_i + sum_j C_ij p_{i-j} (+ keep_z_i z_i) out as a plan of one evaluation a step.

    With a corrector, row i first corrects x_i = base + sum_j corrector[i-1, j] p_{i-j}, where base = psi_{i-1} x_{i-1} + its noise,
    and then carries it on: base = psi_i x_i + new noise, to which next_p adds the predictor of x_{i+1}. So both share the noise.
    """
    n = len(psi)
    noise = np.zeros(n) if keep_z is None else keep_z
    if corrector is None:
        keep_p, next_p = c_p, np.zeros_like(c_p)
    else:
        window = min(n, max(c_p.shape[1], corrector.shape[1]))
        keep_p, next_p = np.zeros((n, window)), np.zeros((n, window))
        keep_p[1:, : corrector.shape[1]] = psi[1:, None] * corrector[:-1, :window]
        next_p[:, : c_p.shape[1]] = c_p
    return Plan(
        t=ts,
        alpha=sde.alpha(ts),
        sigma=sde.sigma(ts),
        keep_x=psi,
        keep_p=keep_p,
        keep_z=noise,
        next_x=np.ones(n),
        next_p=next_p,
        accepts=np.ones(n, dtype=bool),
        form=form,
        discrete=is_discrete(sde, ts),
        method=method,
        grid=grid,
        schedule=sde.name,
        fitted=fitted,
    )


def is_discrete(sde: Schedule, ts: Array) -> bool:
    """Tell whether the schedule's times are integers and all these are."""
    return sde.num_times is not None and bool((ts == np.rint(ts)).all())


def checked_norm(norm: Norm | None, form: Form) -> Norm | None:
    """Return a norm that raises where it is not positive and finite; and raise where it was measured on another form."""
    if norm is None:
        return None
    function("norm", norm, "t")
    measured = getattr(norm, "form", form)
    if measured != form:
        raise ValueError(
            f"norm was measured on predictions of form={measured!r} and this plan has form={form!r}; measure it on such a plan"
        )

    def c(t: Array) -> Array:
        values = array("the result of norm(t)", norm(t))
        if values.shape != t.shape or not ((values > 0) & np.isfinite(values)).all():
            raise ValueError(
                f"norm must return positive, finite numbers of the shape of t, {t.shape}, and returned {shown(values)}"
            )
        return values

    return c


def source(norm: Norm | None) -> str:
    """Return what a plan made with this norm was fitted to."""
    return "" if norm is None else getattr(norm, "source", "a norm of the predictions")


def check_form(form: object) -> None:
    """Raise ValueError for a form that is neither None nor a known one."""
    if form is not None:
        one_of("form", form, FORMS)


def check_tau(tau: Any) -> float:
    """Return a rate of renewal of the noise."""
    return number("tau", tau, least=0, most=100, hint="0 is no noise, 1 the reverse diffusion")


def _clock(clock: str | Callable[[Array], Array]) -> Clock:
    if not callable(clock):
        return CLOCKS[one_of("clock", clock, CLOCKS, ", or a function u(t)")]

    def u(sde: Schedule, t: Array, log_rho: Array) -> Array:
        function("clock", clock, "t")
        return array("the result of clock(t)", clock(t))

    return u


def check_clock(sde: Schedule, ts: Array, clock: Clock, label: str) -> None:
    """Raise unless the clock is strictly monotone at the times of the grid, and turns nowhere between them.

    Between them it may rest, as log rho does where a table repeats a noise level.
    """
    t = np.append((ts[:-1, None] + np.diff(ts)[:, None] * np.array([0.0, 0.25, 0.5, 0.75])).ravel(), ts[-1])
    u = clock(sde, t, sde.log_rho(t))
    if u.shape == t.shape:
        change, step = (np.diff(v[np.isfinite(v)]) for v in (u, u[::4]))
        monotone = ((change >= 0).all() and (step > 0).all()) or ((change <= 0).all() and (step < 0).all())
    if u.shape != t.shape or np.isnan(u).any() or not monotone:
        raise ValueError(f"the clock of {label} is not monotone on the grid: at the times {t.tolist()} it is {u.tolist()}")


def _rates(tau: float | Callable[[float], float], ts: Array) -> Array:
    if not callable(tau):
        return np.full(len(ts) - 1, tau)
    function("tau", tau, "t")
    return np.array([check_tau(tau(t)) for t in ts[:-1].tolist()])
