"""Nothing passes in silence: what is given is right, or refused by an error of our own that says what is wrong."""

from __future__ import annotations

import dis
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deis
from deis.evaluation import converged, evaluate

from .oracle import gaussian

PACKAGE = str(Path(inspect.getfile(deis)).parent)
SDE = deis.VPSDE.linear()
PLAN = deis.make_plan(SDE, "tab2", 4)
X_T = np.random.default_rng(0).standard_normal((4, 3))


def is_ours(error: BaseException) -> bool:
    """Tell whether an error was raised by a `raise` of the library: not within NumPy, nor by Python on an operation of ours."""
    if not isinstance(error, ValueError | TypeError | ImportError | FileNotFoundError):
        return False
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    assert last is not None
    code = last.tb_frame.f_code
    return code.co_filename.startswith(PACKAGE) and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def accepted(call: Callable[[], Any]) -> bool:
    """Tell whether a call returns, or is refused by an error of our own; any other error fails the test."""
    try:
        call()
    except Exception as error:
        if not is_ours(error):
            pytest.fail("a foreign error:\n" + "".join(traceback.format_exception(error)[-6:]))
        return False
    return True


# --- arguments ---------------------------------------------------------------------------------------------------------


def eps(x: Any, t: Any) -> Any:
    return 0.1 * x


def conditioned(x: Any, t: Any, condition: Any) -> Any:
    return 0.1 * x


def denoiser() -> deis.Denoiser:
    return deis.Denoiser(gaussian(SDE)[0], SDE)


JUNK: tuple[Any, ...] = (
    None, "3", "", float("nan"), float("inf"), -float("inf"), -1, 0, 1, 2, 1.5, 1e300, 1e-300, 10**400, True, False, 1 + 2j,
    [], [1.0], [[1], [1, 2]], [1.0, None], ["a", "b"], (0.5, 0.1), (0.1, 0.5, 0.9), {}, {"a": 1}, {1, 2}, object(), object, b"x",
    lambda: 0, lambda x: "a", lambda x, t: None, lambda x, t: "a", lambda x, t, c: x, lambda *a: None, lambda *a: np.ones(2),
    np.array(["a"]), np.array([1.0, 0.5, 0.1]), np.ones((2, 2)), np.array(1j), np.array(0.5), np.float32(0.5), np.int64(3), np.empty(0),
    np.array([None, 1.0], dtype=object), torch.tensor(0.5), torch.ones(3), torch.ones((2, 2), dtype=torch.complex64),
    SDE, deis.EDM(), PLAN, [PLAN], deis.TABLEAUX["2heun"], np.random.default_rng(0), torch.Generator(), "tab3", "x0", "t", "data",
)  # fmt: skip

VALID: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "VPSDE": (deis.VPSDE, {"t2alpha_fn": lambda t: np.exp(-t), "alpha2t_fn": lambda a: -np.log(a), "sampling_eps": 1e-3,
                           "sampling_T": 1.0, "num_times": None}),
    "VPSDE.linear": (deis.VPSDE.linear, {"beta_0": 0.1, "beta_1": 20.0, "sampling_eps": 1e-3, "sampling_T": 1.0}),
    "VPSDE.cosine": (deis.VPSDE.cosine, {"s": 0.008, "sampling_eps": 1e-3, "sampling_T": 0.99}),
    "VPSDE.discrete": (deis.VPSDE.discrete, {"alphas_cumprod": np.linspace(0.99, 0.01, 10)}),
    "SubVPSDE": (deis.SubVPSDE, {"t2alpha_fn": lambda t: np.exp(-t), "alpha2t_fn": lambda a: -np.log(a), "sampling_eps": 1e-3,
                                 "sampling_T": 1.0}),
    "VESDE": (deis.VESDE, {"sigma_min": 0.01, "sigma_max": 50.0, "sampling_eps": 1e-3, "sampling_T": 1.0}),
    "EDM": (deis.EDM, {"sampling_eps": 0.002, "sampling_T": 80.0}),
    "FlowMatching": (deis.FlowMatching, {"sampling_eps": 0.0, "sampling_T": 1.0}),
    "make_grid": (deis.make_grid, {"schedule": SDE, "num_step": 5, "ts_phase": "t", "ts_order": 2.0}),
    "make_plan": (deis.make_plan, {"sde": SDE, "method": "tab2", "num_step": 5, "ts_phase": "t", "ts_order": 2.0, "nfe": None,
                                   "ts": None, "sigmas": None, "afs": None}),
    "make_plan of nfe": (deis.make_plan, {"sde": SDE, "method": "rhork_3kutta", "nfe": 5}),
    "make_plan of ts": (deis.make_plan, {"sde": SDE, "method": "tab2", "ts": [0.9, 0.5, 0.1]}),
    "make_plan of sigmas": (deis.make_plan, {"sde": SDE, "method": "unipc2", "sigmas": [9.0, 1.0, 0.1]}),
    "sa_solver": (lambda **options: deis.make_plan(SDE, "sa_solver", 5, **options),
                  {"tau": 0.5, "norm": None, "lower_order_final": False}),
    "ddim": (lambda **options: deis.make_plan(SDE, "ddim", 5, **options), {"eta": 0.5, "form": None}),
    "edm_heun": (lambda **options: deis.make_plan(SDE, "edm_heun", 5, **options),
                 {"churn": 1.0, "low": 0.0, "high": 10.0, "noise": 1.0}),
    "dpmpp_2m_published": (lambda **options: deis.make_plan(SDE, "dpmpp_2m_published", 5, **options),
                           {"tau": 0.0, "norm": None, "lower_order_final": False}),
    "unipc2_bh1": (lambda **options: deis.make_plan(SDE, "unipc2_bh1", 5, **options), {"norm": None, "lower_order_final": False}),
    "ipndm": (lambda **options: deis.make_plan(SDE, "ipndm3", 5, **options), {"norm": None}),
    "adams": (lambda **options: deis.make_plan(SDE, deis.adams(**options), 5),
              {"form": None, "clock": "t", "order": 2, "corrector": 1, "lower_order_final": False, "tau": 0.0, "norm": None,
               "name": None}),
    "get_method": (deis.get_method, {"name": "tab3"}),
    "rho_rk": (deis.rho_rk, {"tableau": "3kutta"}),
    "ButcherTableau": (deis.ButcherTableau, {"a": [[1.0]], "b": [0.5, 0.5], "name": "heun"}),
    "Plan": (deis.Plan, {name: getattr(PLAN, name) for name in PLAN.__dataclass_fields__}),
    "Plan.matches": (PLAN.matches, {"sde": SDE, "tolerance": 1e-6}),
    "Plan.from_document": (deis.Plan.from_document, {"document": PLAN.document()}),
    "load_plan": (deis.load_plan, {"path": "/nowhere/plan.json"}),
    "PlanFamily": (deis.PlanFamily, {"values": (1.0, 2.0), "plans": (PLAN, PLAN)}),
    "PlanFamily.at": (deis.PlanFamily((1.0, 2.0), (PLAN, PLAN)).at, {"value": 1.5}),
    "PlanFamily.load": (deis.PlanFamily.load, {"path": "/nowhere/family.json"}),
    "sample": (deis.sample, {"plan": PLAN, "model": eps, "x_T": X_T, "predicts": None, "rng": None, "trajectory": False,
                             "callback": None, "progress": False, "check_finite": False, "grad": False}),
    "sample with noise": (deis.sample, {"plan": deis.make_plan(SDE, "ancestral", 3), "model": eps, "x_T": X_T,
                                        "rng": np.random.default_rng(0)}),
    "sample in torch": (deis.sample, {"plan": deis.make_plan(SDE, "ancestral", 3), "model": eps, "x_T": torch.ones(4, 3),
                                      "rng": torch.Generator(), "grad": False}),
    "Denoiser": (deis.Denoiser, {"model": eps, "sde": SDE, "predicts": "eps", "threshold": None}),
    "Denoiser.predict": (deis.Denoiser(eps, SDE).predict, {"x": X_T, "t": 0.5, "target": "x0"}),
    "edm_preconditioned": (deis.edm_preconditioned, {"network": eps, "sigma_data": 0.5}),
    "static_threshold": (deis.static_threshold, {"limit": 1.0}),
    "dynamic_threshold": (deis.dynamic_threshold, {"quantile": 0.9, "limit": 1.0, "most": None}),
    "guided": (deis.guided, {"strong": eps, "weak": eps, "weight": 2.0, "rescale": 0.0, "interval": (0.1, 0.9)}),
    "guided, sampled": (lambda **options: deis.sample(PLAN, deis.guided(**options), X_T), {"strong": eps, "weak": eps, "weight": 2.0}),
    "classifier_free": (deis.classifier_free, {"net": conditioned, "condition": np.ones(4), "null": np.zeros(4), "weight": 2.0,
                                               "batched": True, "rescale": 0.0, "interval": (0.1, 0.9)}),
    "classifier_free, sampled": (lambda **options: deis.sample(PLAN, deis.classifier_free(**options), X_T),
                                 {"net": conditioned, "condition": np.ones(4), "null": np.zeros(4), "weight": 2.0, "batched": True}),
    "classifier_guided": (deis.classifier_guided, {"denoiser": denoiser(), "log_prob": lambda x, t: -x, "weight": 1.0}),
    "classifier_guided, sampled": (lambda **options: deis.sample(PLAN, deis.classifier_guided(**options), torch.ones(4, 3)),
                                   {"denoiser": deis.Denoiser(eps, SDE), "log_prob": lambda x, t: -x.sum(1)}),
    "measure_norm": (deis.measure_norm, {"plan": PLAN, "denoiser": deis.Denoiser(eps, SDE), "x_T": X_T, "rng": None}),
    "make_teacher": (deis.make_teacher, {"model": denoiser(), "samples": X_T, "condition": None, "steps": 8, "batch": 4, "tol": 1e-2}),
    "calibrate": (deis.calibrate, {"plan": deis.make_plan(SDE, "tab2", 2), "model": denoiser(), "samples": np.tile(X_T, (4, 1)),
                                   "condition": None, "teacher": 64, "stages": ("least_squares",), "validation": 0.25,
                                   "method": None, "window": None, "times": True, "iterations": 1, "loss": "robust", "steps": 2,
                                   "batch": 64}),
    "calibrate_family": (deis.calibrate_family, {"plan": deis.make_plan(SDE, "tab2", 2), "model_at": lambda value: denoiser(),
                                                 "values": (1.0, 2.0), "samples": np.tile(X_T, (4, 1)), "teacher": 64,
                                                 "stages": ("least_squares",)}),
    "calibration_report": (deis.calibration_report, {"plan": PLAN}),
    "evaluate": (evaluate, {"plan": PLAN, "model": denoiser(), "samples": X_T, "condition": None, "extractor": None, "real": None,
                            "reference": None, "perceptual": None, "decode": None, "batch": 4, "rng": None, "tag": ""}),
    "converged": (converged, {"model": denoiser(), "samples": X_T, "steps": 4, "condition": None, "batch": 4}),
}  # fmt: skip


@st.composite
def odd_calls(draw: st.DrawFn) -> tuple[str, dict[str, int]]:
    """A public function, and for one or two of its arguments the place in JUNK of what is given for it."""
    name = draw(st.sampled_from(sorted(VALID)))
    arguments = draw(st.sets(st.sampled_from(sorted(VALID[name][1])), min_size=1, max_size=2))
    return name, {argument: draw(st.integers(0, len(JUNK) - 1)) for argument in sorted(arguments)}


def call_oddly(odd: tuple[str, dict[str, int]]) -> None:
    name, junk = odd
    function, valid = VALID[name]
    with np.errstate(all="ignore"):
        accepted(lambda: function(**(valid | {argument: JUNK[place] for argument, place in junk.items()})))


# --- valid combinations ------------------------------------------------------------------------------------------------

STD, MEAN = 0.5, 0.3
BETAS = np.linspace(1e-4, 0.02, 1000)
SCHEDULES: dict[str, deis.Schedule] = {
    "linear": SDE,
    "cosine": deis.VPSDE.cosine(),
    "own functions": deis.VPSDE(lambda t: np.exp(-5 * t**2), lambda a: np.sqrt(-np.log(a) / 5)),
    "discrete": deis.VPSDE.discrete(np.cumprod(1 - BETAS)),
    "sub-VP": deis.SubVPSDE.linear(),
    "VE": deis.VESDE(),
    "EDM": deis.EDM(),
    "EDM to 0": deis.EDM(sampling_eps=0.0),
    "flow": deis.FlowMatching(),
    "shifted flow": deis.FlowMatching(shift=3.0),
}
NAMES = [
    "auto", "ddim", "tab0", "tab1", "tab2", "tab3", "tab4", "rhoab1", "rhoab3", "lms2", "lms4", "ipndm", "ipndm2", "ipndm3",
    "deis_abm", "deis_abm1", "deis_abm3", "dpm_solver_2m", "dpm_solver_3m", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_published",
    "dpmpp_3m_published", "unipc1", "unipc2", "unipc3", "unipc2_bh1", "unipc2_bh2", "unipc3_bh1", "unipc3_bh2", "edm_heun",
    "dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "dpmpp_3s", *(f"rhork_{name}" for name in deis.TABLEAUX),
    "ancestral", "sde_dpmpp_2m", "sde_dpmpp_2m_published", "sa_solver",
]  # fmt: skip
CLOCKS = ["t", "rho", "log_rho", "sqrt_t", "vp_t", "arctan_rho"]


@st.composite
def combinations(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of a plan, and how to sample it."""
    method: Any = draw(st.sampled_from(NAMES))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        method = "adams"
        options = {
            "form": draw(st.sampled_from([None, "eps", "data"])),
            "clock": draw(st.sampled_from(CLOCKS)),
            "order": draw(st.integers(0, 4)),
            "corrector": draw(st.none() | st.integers(0, 4)),
            "lower_order_final": draw(st.booleans()),
            "tau": draw(st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0, 3.0])),
        }
    grid: dict[str, Any] = {}
    if draw(st.booleans()):
        grid = {"ts_phase": draw(st.sampled_from(["t", "rho", "log", "vp_t"])), "ts_order": draw(st.floats(0.8, 8.0))}
    budget = draw(st.sampled_from(["num_step", "nfe"]))
    return {
        "sde": draw(st.sampled_from(sorted(SCHEDULES))),
        "method": method,
        "options": options,
        "grid": grid | {budget: draw(st.integers(1, 80))},
        "afs": draw(st.booleans()),
        "predicts": draw(st.sampled_from(["eps", "x0", "v", "score", "flow"])),
        "backend": draw(st.sampled_from(["numpy", "numpy", "numpy", "torch"])),
    }


def as_predicted(sde: deis.Schedule, predicts: str, mean: float) -> Callable[[Any, Any], Any]:
    """The exact network of Gaussian data in any prediction: of x = alpha x_0 + sigma eps, E[x_0 | x] and E[eps | x] combined."""

    def model(x: Any, t: Any) -> Any:
        values = np.asarray(t, dtype=np.float64)[:, None]
        alpha, sigma = sde.alpha(values), sde.sigma(values)
        centred = (np.asarray(x) - alpha * mean) / ((alpha * STD) ** 2 + sigma**2)
        x_0, eps = mean + alpha * STD**2 * centred, sigma * centred
        with np.errstate(all="ignore"):
            found = {"eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0, "score": -centred, "flow": eps - x_0}[predicts]
        return torch.from_numpy(found) if isinstance(x, torch.Tensor) else found

    return model


def first_order_error(plan: deis.Plan) -> tuple[float, float]:
    """The error of DDIM's deviation on the plan's times and with its noise, for data of deviation STD; and the greatest step.

    With y = (x - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2) the exact solution keeps y, or with noise its variance of 1. x_0 is the
    cosine of the angle arctan(rho / STD), and eps its sine. A step of DDIM that keeps the share q of eps and draws the rest anew is

        y' = (cos cos' + q sin sin') y + sin' sqrt(1 - q^2) z,

    cos(angle - angle') y where there is no noise. What each step adds to the variance, or takes from it, is summed without its sign.
    """
    rows = np.append(0, np.flatnonzero(plan.accepts) + 1)
    angle = np.arctan2(plan.sigma[rows], STD * plan.alpha[rows])
    before, after = angle[:-1], angle[1:]
    renewed = np.minimum(plan.keep_z[plan.accepts] / np.maximum(plan.sigma[rows[1:]], 1e-300), 1)
    kept = np.cos(before) * np.cos(after) + np.sqrt(1 - renewed**2) * np.sin(before) * np.sin(after)
    error = np.abs(kept**2 + (np.sin(after) * renewed) ** 2 - 1).sum() / 2
    return float(error), float((before - after).max())


def deviation_of_law(plan: deis.Plan) -> float:
    """The deviation of y at the end of a plan, exactly: each state as coefficients on the first noise and on each one added."""
    spread = np.hypot(plan.alpha * STD, plan.sigma)
    n = len(plan.rows)
    x = base = spread[0] * np.eye(n + 1)[0]
    history: list[np.ndarray] = []
    for i in range(n):
        share = plan.sigma[i] if plan.form == "eps" else plan.alpha[i] * STD**2
        history = [x * (share / spread[i] ** 2 if plan.calls[i] else plan.guess[i]), *history]
        base = plan.keep_x[i] * base + sum(c * p for c, p in zip(plan.keep_p[i], history, strict=False))
        base = base + plan.keep_z[i] * np.eye(n + 1)[i + 1]
        x = plan.next_x[i] * base + sum(c * p for c, p in zip(plan.next_p[i], history, strict=False))
    return float(np.linalg.norm(x) / spread[-1])
