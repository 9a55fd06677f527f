"""Singlestep methods of the reverse diffusion in log rho, whose stages lie on one path of the noise: SEEDS, and DPM-Solver++ SDE.

eta is the rate at which noise is renewed, tau^2 elsewhere in this library: 0 is the probability flow, 1 the reverse diffusion. A
step goes from rho to rho e^-h, and its stages lie at rho e^(-c h).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np

from ..arguments import number, one_of
from ..arrays import Array
from ..quadrature import lagrange_integrals
from ..sde import Schedule
from .ancestral import ddim_noise, double, single
from .clocks import CLOCKS
from .singlestep import SingleStep, StepBuilder, Steps, stage_times
from .step import check_eta


def seeds_2(r: float = 0.5, eta: float = 1.0, solver: Literal["phi_1", "phi_2"] = "phi_1") -> SingleStep:
    """Return SEEDS-2 (Gonzalez et al., arXiv 2305.14267): a stage at c = r, and the polynomial through it and the start.

    "phi_2" integrates that line exactly, and with r = 1 is the exponential Heun method; "phi_1" takes the derivative at the middle
    of the step for all of it, in the weights 1 - 1/2r and 1/2r.

    Raises
    ------
    ValueError
        Where r lies outside (0, 1], or eta is negative.
    """
    r, eta = number("r", r, above=0, most=1), check_eta(eta)
    share = 1 / (2 * r) if one_of("solver", solver, ("phi_1", "phi_2")) == "phi_1" else None
    family = {
        1: partial(seeds_steps, c=(0.0,), through=((0,),), eta=eta),
        2: partial(seeds_steps, c=(0.0, r), through=((0,), (0, 1)), eta=eta, share=share),
    }
    return SingleStep(f"seeds_2(r={r:g}, eta={eta:g}, {solver})", family, clean_end=True)


def seeds_3(r_1: float = 1 / 3, r_2: float = 2 / 3, eta: float = 1.0) -> SingleStep:
    """Return SEEDS-3 (arXiv 2305.14267): stages at c = r_1 and r_2, and lines through the start and the stage before the target.

    Without noise its order is 3 where r_2 = 2/3, and otherwise 2.

    Raises
    ------
    ValueError
        Where 0 < r_1 < r_2 <= 1 does not hold, or eta is negative.
    """
    r_2, eta = number("r_2", r_2, above=0, most=1), check_eta(eta)
    r_1 = number("r_1", r_1, above=0, most=r_2, hint="r_2 is the greater of the two")
    tables: tuple[tuple[tuple[float, ...], tuple[tuple[int, ...], ...]], ...] = (
        ((0.0,), ((0,),)),
        ((0.0, r_1), ((0,), (0, 1))),
        ((0.0, r_1, r_2), ((0,), (0, 1), (0, 2))),
    )
    family = {len(c): partial(seeds_steps, c=c, through=through, eta=eta) for c, through in tables}
    return SingleStep(f"seeds_3(r_1={r_1:g}, r_2={r_2:g}, eta={eta:g})", family, clean_end=True)


def seeds_steps(
    sde: Schedule,
    start: Array,
    end: Array,
    *,
    c: tuple[float, ...],
    through: tuple[tuple[int, ...], ...],
    eta: float,
    share: float | None = None,
) -> Steps:
    """Return steps whose states come from the start by the integrals of polynomials in log rho through the stages `through`.

    The state at c has (sigma_c / sigma_0) e^(-eta c h) times the start: the exact transport of the noise, also from stage to stage,
    to which that of the diffusion between them is added. A `share` weighs the stage in the end in place of the integral.
    """
    t = stage_times(sde, start, end, c)
    target = np.append(t[:, 1:], end[:, None], axis=1)
    h = sde.log_rho(start)[:, None] - sde.log_rho(target)
    lost = eta * h if eta else np.zeros_like(h)
    sigma = sde.sigma(target)
    c_z = sigma * np.sqrt(-np.expm1(-2 * np.diff(lost, axis=1, prepend=0.0)))
    c_p = np.zeros((len(start), len(c), len(c)))
    for k, nodes in enumerate(through):
        c_p[:, k, list(nodes)] = lagrange_integrals(
            sde, CLOCKS["log_rho"], "data", t[:, nodes], start, target[:, k], tau=np.sqrt(eta)
        )
    if share is not None:
        c_p[:, -1] = c_p[:, -1].sum(axis=1, keepdims=True) * np.array([1 - share, share])
    return Steps("data", t, sigma / sde.sigma(start)[:, None] * np.exp(-lost), c_p, c_z)


def dpmpp_sde(r: float = 0.5, eta: float = 1.0) -> SingleStep:
    """Return k-diffusion's DPM-Solver++ SDE: DDIM's step with eta to c = r, and another from the start along both predictions.

    The noise of the stage is carried to the end. Libraries draw that of the end anew, and so are of weak order 1, or take both from
    one Brownian path in sigma; the law of each state is the same. eta is DDIM's; at eta = 1 this is `seeds_2`.

    Raises
    ------
    ValueError
        Where r lies outside (0, 1], or eta outside [0, 1].
    """
    r, eta = number("r", r, above=0, most=1), number("eta", eta, least=0, most=1)
    noise = partial(ddim_noise, eta=eta)

    def steps(sde: Schedule, start: Array, end: Array) -> Steps:
        middle = stage_times(sde, start, end, (0.0, r))[:, 1]
        return double(sde, (start, middle, end), "data", noise(sde, start, middle), noise(sde, start, end), 1 / (2 * r))

    family: dict[int, StepBuilder] = {1: partial(single, form="data", noise=noise), 2: steps}
    return SingleStep(f"dpmpp_sde(r={r:g}, eta={eta:g})", family, clean_end=True)
