"""The names of methods: each an `Entry`, which says what it is and how to build it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from ..arguments import kind
from ..arrays import Array
from ..plan import Plan
from ..quadrature import Form
from ..sde import Schedule
from .adams import adams
from .ancestral import ancestral_rf, by_log_rho, by_log_sigma, ddim_noise, flow_noise, res_multistep_ancestral, tcd, two_stage
from .er_sde import er_sde
from .exponential import EXPONENTIAL_TABLEAUX, dpm_fast, dpm_singlestep, exponential_rk
from .heunpp import HeunPP2
from .invertible import bdia, belm
from .ipndm import gradient_estimation, ipndm, ipndm_v
from .layout import Builder
from .parallel import parallel_adams
from .published import GridStages, dpm_multistep, unipc
from .runge_kutta import TABLEAUX, rho_rk
from .seeds import dpmpp_sde, seeds_2, seeds_3
from .step import rises
from .stochastic import ddim, edm_heun, renoise


@dataclass(frozen=True)
class Entry:
    """A registered name.

    Attributes
    ----------
    name : str
        As users write it. <q> stands for a whole number and <tableau> for a name in `deis.TABLEAUX`; `build` takes it first.
    build : callable
        build(**options) -> builder.
    form, clock, evaluations : str
        What the method is: the form of its plan ("eps*": data if the grid starts at alpha = 0), the variable of its polynomial,
        and its evaluations per step.
    order : int, callable or None
        Its order of convergence on a smooth grid, or a function that gives it from the number or tableau in the name. None for a
        method that does not converge to the probability flow or the reverse diffusion.
    reference : str
        Where it comes from, and what it is equivalent to.
    grid : tuple of (str, float), optional
        The ts_phase and ts_order that it uses by default; None for those of the schedule.
    weak : bool
        Whether the order is a weak one, that of the samples' law, as for methods that add noise.
    """

    name: str
    build: Callable[..., Builder]
    form: str
    clock: str
    order: int | Callable[[Any], int] | None
    evaluations: str
    reference: str
    grid: tuple[str, float] | None = None
    weak: bool = False

    @property
    def pattern(self) -> str:
        """The regular expression of its names."""
        return self.name.replace("<q>", r"(\d{1,3})").replace("<tableau>", "(.*)")

    def order_of(self, name: str) -> int | None:
        """Return the order of convergence of one of its names."""
        return self.order(*self.arguments(name)) if callable(self.order) else self.order

    def arguments(self, name: str) -> tuple[Any, ...]:
        """Return the number or tableau in one of its names."""
        match = re.fullmatch(self.pattern, name.replace("-", "_"))
        return () if match is None else tuple(int(part) if "<q>" in self.name else part for part in match.groups())

    def options_of(self, name: str) -> dict[str, Any]:
        """Return the options that `deis.make_plan` takes with one of its names, and their defaults."""
        arguments, found = self.arguments(name), dict[str, Any]()
        for parameter in list(inspect.signature(self.build).parameters.values())[len(arguments) :]:
            if parameter.kind is parameter.VAR_KEYWORD:  # passed on
                passed = inspect.signature(_PASSES_TO.get(self.build, adams)).parameters
                found |= {option: passed[option].default for option in passed if self._takes(arguments, option, passed)}
            elif parameter.name != "name":  # the plan's label, not an option
                found[parameter.name] = parameter.default
        return found

    def _takes(self, arguments: tuple[Any, ...], option: str, passed: Any) -> bool:
        """Return whether `build` passes an option on, rather than setting it itself."""
        if option == "name":
            return False
        try:
            self.build(*arguments, **{option: passed[option].default})
        except TypeError:  # given twice
            return False
        return True

    @property
    def order_text(self) -> str:
        """The order in print, such as "q + 1"."""
        order = self.order
        if not callable(order):
            return f"{order}, weak" if self.weak else str(order).lower()
        if "<tableau>" in self.name:
            return "the tableau's"
        least, great = order(0), order(100)
        return str(great) if great < 100 else f"q + {least}" if least else "q"


def _plus(more: int) -> Callable[[int], int]:
    return lambda q: q + more


def _up_to_2(q: int) -> int:
    return min(q, 2)


def _ipndm_v(q: int) -> int:
    return q if q < 4 else 2


def _of_tableau(name: str) -> int:
    return TABLEAUX[name].order


def _auto(**options: Any) -> Builder:
    def of(form: Form) -> Builder:
        return adams(form, "vp_t", 1, 2, **{"name": "auto"} | options)

    data = of("data")

    def build(sde: Schedule, ts: Array, grid: str) -> Plan:
        # A plan may rise from clean data, where the data form has no meaning.
        return (of("eps") if rises(ts) and np.isneginf(sde.log_sigma(ts[0])) else data)(sde, ts, grid)

    return build


def _lms(order: int, **options: Any) -> Builder:
    if order < 1:
        raise ValueError(f"method='lms{order}' is unknown: lms has the orders 1, 2, ...")
    return adams(clock="rho", order=order - 1, name=f"lms{order}", **options)


def _tab(q: int, **options: Any) -> Builder:
    return adams(clock="t", order=q, name=f"tab{q}", **options)


def _rhoab(q: int, **options: Any) -> Builder:
    return adams(clock="rho", order=q, name=f"rhoab{q}", **options)


def _abm(q: int = 2, **options: Any) -> Builder:
    return adams(clock="t", order=q, corrector=q + 1, name=f"deis_abm{q}", **options)


def _unipc(order: int, **options: Any) -> Builder:
    if order < 1:
        raise ValueError(f"method='unipc{order}' is unknown: unipc has the orders 1, 2, ...")
    return adams("data", "log_rho", order - 1, order, name=f"unipc{order}", **options)


def _parallel(q: int, **options: Any) -> Builder:
    return parallel_adams(order=q, **{"name": f"parallel{q}"} | options)


def _named(name: str, *arguments: Any) -> Callable[..., Builder]:
    return partial(adams, *arguments, name=name)


_DPM: tuple[tuple[str, Form, str], ...] = (("dpm_solver", "eps", "2206.00927"), ("dpmpp", "data", "2211.01095"))
_ORDERS: tuple[Literal[2, 3], ...] = (2, 3)
_EXPONENTIAL = (
    ("res_2s", "RES, arXiv 2308.02157"),
    ("res_3s", "RES, arXiv 2308.02157"),
    ("res_5s", "Hochbruck & Ostermann, doi 10.1137/040611434"),
    ("etdrk2", "Cox & Matthews, doi 10.1006/jcph.2002.6995"),
    ("etdrk3", "Cox & Matthews, doi 10.1006/jcph.2002.6995"),
    ("etdrk4", "Cox & Matthews, doi 10.1006/jcph.2002.6995"),
    ("lawson2", "Lawson, doi 10.1137/0704033, of `2midpoint`"),
    ("lawson4", "Lawson, doi 10.1137/0704033, of `4rk`"),
)

REGISTRY = (
    Entry(
        "auto", _auto,
        "data", "vp_t", 3, "1", "the default, on one grid of noise levels for every schedule; chosen by docs/default.md",
        ("vp_t", 2.0),
    ),
    Entry("ddim", ddim, "eps*", "any", 1, "1", "arXiv 2010.02502; degree 0 of every family; `eta=` adds noise"),
    Entry("tab<q>", _tab, "eps*", "t", _plus(1), "1", "tAB-DEIS, arXiv 2204.13902; `tab3` is its best"),
    Entry("rhoab<q>", _rhoab, "eps*", "rho", _plus(1), "1", "rhoAB-DEIS, arXiv 2204.13902"),
    Entry("lms<q>", _lms, "eps*", "rho", _plus(0), "1", "k-diffusion's LMS of order q: rhoAB of degree q - 1", ("rho", 7.0)),
    Entry("ipndm<q>", ipndm, "eps*", "none", _up_to_2, "1", "arXiv 2202.09778; q from 1 to 4; order q on even rho"),
    Entry("ipndm", partial(ipndm, 4), "eps*", "none", 2, "1", "`ipndm4`; order 4 on even rho"),
    Entry("deis_abm", _abm, "eps*", "t", 4, "1", "`deis_abm2`"),
    Entry("deis_abm<q>", _abm, "eps*", "t", _plus(2), "1", "tAB with the exponential Adams-Moulton corrector of degree q + 1"),
    Entry("dpm_solver_2m", _named("dpm_solver_2m", "eps", "log_rho", 1), "eps", "log_rho", 2, "1", "arXiv 2206.00927, exact"),
    Entry("dpm_solver_3m", _named("dpm_solver_3m", "eps", "log_rho", 2), "eps", "log_rho", 3, "1", "arXiv 2206.00927, exact"),
    Entry("dpmpp_2m", _named("dpmpp_2m", "data", "log_rho", 1), "data", "log_rho", 2, "1", "arXiv 2211.01095, exact"),
    Entry("dpmpp_3m", _named("dpmpp_3m", "data", "log_rho", 2), "data", "log_rho", 3, "1", "arXiv 2211.01095, exact"),
    *(
        Entry(
            f"{name}_{order}m_published", partial(dpm_multistep, form=form, order=order),
            form, "log_rho", 2, "1", f"arXiv {paper}, as libraries ship it; `solver=`",
        )
        for name, form, paper in _DPM for order in _ORDERS
    ),
    Entry("unipc<q>", _unipc, "data", "log_rho", _plus(1), "1", "UniPC, arXiv 2302.04867, exact; `unipc2`, `unipc3`, ..."),
    Entry("unipc<q>_bh1", partial(unipc, solver="bh1"), "data", "log_rho", _plus(1), "1", "UniPC as published, B(h) = h"),
    Entry("unipc<q>_bh2", partial(unipc, solver="bh2"), "data", "log_rho", _plus(1), "1", "UniPC as published, B(h) = e^h - 1"),
    Entry("rhork_<tableau>", rho_rk, "eps", "rho", _of_tableau, "stages", "rhoRK-DEIS, arXiv 2204.13902"),
    Entry("edm_heun", edm_heun, "eps", "rho", 2, "2, 1 to sigma = 0", "arXiv 2206.00364; `churn=` adds noise", ("rho", 7.0)),
    Entry("dpm_solver_2", partial(dpm_singlestep, "eps", "dpm_solver_2", 2), "eps", "log_rho", 2, "2", "arXiv 2206.00927"),
    Entry("dpm_solver_3", partial(dpm_singlestep, "eps", "dpm_solver_3", 3), "eps", "log_rho", 3, "3", "arXiv 2206.00927"),
    Entry("dpmpp_2s", partial(dpm_singlestep, "data", "dpmpp_2s", 2), "data", "log_rho", 2, "2", "arXiv 2211.01095"),
    Entry("dpmpp_3s", partial(dpm_singlestep, "data", "dpmpp_3s", 3), "data", "log_rho", 3, "3", "arXiv 2211.01095"),
    Entry("dpm_fast", dpm_fast, "eps", "log_rho", 3, "3", "k-diffusion: `dpm_solver_3`, 3 k calls end in 2, 1", ("log", 1.0)),
    *(
        Entry(
            name, partial(exponential_rk, name), "data", "log_rho", EXPONENTIAL_TABLEAUX[name].order,
            str(len(EXPONENTIAL_TABLEAUX[name].c)), f"{paper}; `form=`",
        )
        for name, paper in _EXPONENTIAL
    ),
    *(
        Entry(
            f"{name}_{order}s_published", partial(GridStages, form, order),
            form, "log_rho", order, "1", f"arXiv {paper}, its stages at the grid's times; `solver=`",
        )
        for name, form, paper in _DPM for order in _ORDERS
    ),
    Entry("ancestral", partial(ddim, 1.0), "eps*", "any", 1, "1", "DDPM, arXiv 2006.11239: `ddim` of eta = 1", weak=True),
    Entry("renoise", renoise, "data", "any", None, "1", "all the noise anew, arXiv 2303.01469, algorithm 1"),
    Entry(
        "sde_dpmpp_1m", partial(adams, "data", "log_rho", 0, tau=1.0, name="sde_dpmpp_1m"),
        "data", "any", 1, "1", "SDE-DPM-Solver++ 1, arXiv 2211.01095", weak=True,
    ),
    Entry(
        "sde_dpmpp_2m", partial(adams, "data", "log_rho", 1, tau=1.0, name="sde_dpmpp_2m"),
        "data", "log_rho", 2, "1", "SDE-DPM-Solver++ 2M, arXiv 2211.01095, exact", weak=True,
    ),
    Entry(
        "sde_dpmpp_2m_published", partial(dpm_multistep, form="data", order=2, tau=1.0),
        "data", "log_rho", 2, "1", "SDE-DPM-Solver++ 2M as libraries ship it; `solver=`", weak=True,
    ),
    Entry(
        "sa_solver", partial(adams, "data", "log_rho", 1, 2, tau=1.0, name="sa_solver"),
        "data", "log_rho", 2, "1", "SA-Solver, arXiv 2309.05019; `tau=`, a rate or a function of t", weak=True,
    ),
    Entry("lcm", renoise, "data", "any", None, "1", "`renoise`"),
    Entry("tcd", tcd, "eps*", "any", None, "1", "arXiv 2402.19159, algorithm 4; `gamma=`, 0 is `ddim`"),
    Entry("euler_ancestral", partial(ddim, eta=1.0), "eps*", "any", 1, "1", "`ancestral`; `eta=` too", weak=True),
    Entry(
        "dpm_2_ancestral", partial(two_stage, "dpm_2_ancestral", "eps", by_log_rho, ddim_noise),
        "eps", "log_rho", 2, "2, 1 to sigma = 0", "k-diffusion; `eta=`, 0 is `dpm_solver_2`", weak=True,
    ),
    Entry(
        "dpmpp_2s_ancestral", partial(two_stage, "dpmpp_2s_ancestral", "data", by_log_rho, ddim_noise),
        "data", "log_rho", 2, "2, 1 to sigma = 0", "k-diffusion; `eta=`, 0 is `dpmpp_2s`", weak=True,
    ),
    Entry("ancestral_rf", ancestral_rf, "eps*", "any", 1, "1", "ComfyUI, of flow matching's sigma; `eta=`, 0 is `ddim`", weak=True),
    Entry(
        "dpm_2_ancestral_rf", partial(two_stage, "dpm_2_ancestral_rf", "data", by_log_sigma, flow_noise),
        "data", "log_rho", 2, "2, 1 to sigma = 0", "ComfyUI, DPM-Solver-2 on the velocity; `eta=`", weak=True,
    ),
    Entry(
        "dpmpp_2s_ancestral_rf", partial(two_stage, "dpmpp_2s_ancestral_rf", "data", by_log_rho, flow_noise),
        "data", "log_rho", 2, "2, 1 to sigma = 0", "ComfyUI; `eta=`, 0 is `dpmpp_2s`", weak=True,
    ),
    Entry(
        "res_multistep", _named("res_multistep", "data", "log_rho", 1),
        "data", "log_rho", 2, "1", "RES, arXiv 2308.02157: `dpmpp_2m`",
    ),
    Entry(
        "res_multistep_ancestral", res_multistep_ancestral,
        "data", "log_rho", 2, "1", "ComfyUI; `eta=`, 0 is `dpmpp_2m` and 1 `sde_dpmpp_2m`", weak=True,
    ),
    Entry(
        "dpmpp_2m_sde", partial(dpm_multistep, form="data", order=2, eta=1.0),
        "data", "log_rho", 2, "1", "k-diffusion: `sde_dpmpp_2m_published`; `eta=`, tau^2", weak=True,
    ),
    Entry(
        "dpmpp_3m_sde", partial(dpm_multistep, form="data", order=3, solver="heun", eta=1.0),
        "data", "log_rho", 2, "1", "k-diffusion; `eta=`, tau^2", weak=True,
    ),
    Entry(
        "dpmpp_sde", dpmpp_sde,
        "data", "log_rho", 2, "2, 1 to sigma = 0", "k-diffusion, its noise carried on; `r=`, `eta=`", weak=True,
    ),
    Entry("seeds_2", seeds_2, "data", "log_rho", 2, "2, 1 to sigma = 0", "arXiv 2305.14267; `r=`, `eta=`, `solver=`", weak=True),
    Entry(
        "seeds_3", seeds_3,
        "data", "log_rho", 2, "3, 1 to sigma = 0", "arXiv 2305.14267; `r_1=`, `r_2=`, `eta=`, 0 of order 3", weak=True,
    ),
    Entry(
        "exp_heun_2_x0", partial(seeds_2, r=1.0, eta=0.0, solver="phi_2"),
        "data", "log_rho", 2, "2, 1 to sigma = 0", "exponential Heun: `seeds_2` of r = 1 without noise",
    ),
    Entry(
        "exp_heun_2_x0_sde", partial(seeds_2, r=1.0, solver="phi_2"),
        "data", "log_rho", 2, "2, 1 to sigma = 0", "`seeds_2` of r = 1; `eta=`", weak=True,
    ),
    Entry(
        "parallel<q>", _parallel,
        "data", "vp_t", _plus(1), "2 in one call, 1 in the last", "Miranker & Liniger 1967, exponential; see depth below",
        ("vp_t", 2.0),
    ),
    Entry("er_sde", er_sde, "data", "rho", 2, "1", "ER-SDE-Solver, arXiv 2309.06169; `stages=`, `scaler=`", weak=True),
    Entry("gradient_estimation", gradient_estimation, "eps*", "none", 1, "1", "arXiv 2306.04848; `gamma=`, of order 2 at 3/2"),
    Entry(
        "ipndm_v<q>", ipndm_v,
        "eps", "rho", _ipndm_v, "1", "as ComfyUI has it; q from 1 to 3, of order q, or 4, of 2; `lms<q>` is exact",
    ),
    Entry("bdia", bdia, "eps*", "none", 2, "1", "arXiv 2307.10829, exactly invertible; `gamma=`, of order 1 below 1"),
    Entry("belm", belm, "eps*", "none", 2, "1", "O-BELM, arXiv 2410.07273, exactly invertible"),
    Entry("heunpp2", HeunPP2, "eps", "none", 1, "3, 2, 1 at the end", "ComfyUI; its weights follow the first rho, not the step"),
)  # fmt: skip

KNOWN = ", ".join(repr(entry.name) for entry in REGISTRY)
_PASSES_TO: dict[Callable[..., Builder], Callable[..., Builder]] = {_parallel: parallel_adams}
"""The function that takes a builder's **options, if it is not `adams`."""


@cache
def names() -> tuple[str, ...]:
    """Return the names that users can type: the first few of those with a number, and one per tableau of those with a tableau."""
    found = []
    for entry in REGISTRY:
        parts = TABLEAUX if "<tableau>" in entry.name else range(1, 5) if "<q>" in entry.name else ("",)
        found += [re.sub("<.*>", str(part), entry.name) for part in parts]
    return tuple(found)


def suggestion(name: str) -> str:
    """Return what to say about an unknown name: similar names, if there are any."""
    near = get_close_matches(name.lower().replace("-", "_").replace("+", "p"), names(), cutoff=0.7)
    return f"; did you mean {' or '.join(map(repr, sorted(near)))}? The" if near else "; the"


def find(name: str) -> tuple[Entry, tuple[Any, ...]]:
    """Return the entry of a name, and the number or tableau in it; hyphens count as underscores.

    Raises
    ------
    ValueError
        If the name is unknown; the message suggests similar ones, and lists all.
    """
    for entry in REGISTRY:
        if re.fullmatch(entry.pattern, name.replace("-", "_")):
            return entry, entry.arguments(name)
    raise ValueError(f"method={name!r} is unknown{suggestion(name)} known ones are {KNOWN}, or a function (sde, ts, grid) -> Plan")


def get_method(name: str, **options: Any) -> Builder:
    """Return the builder of a registered name; `deis.methods.registry.REGISTRY` has them all.

    Raises
    ------
    ValueError
        If the name is unknown, or the method does not have one of the options.
    """
    kind("name", name, str, f"one of {KNOWN},")
    entry, arguments = find(name)
    try:
        return entry.build(*arguments, **options)
    except TypeError as error:
        if not options:
            raise
        raise ValueError(f"method={name!r} does not take the options {sorted(options)}: {error}") from None
