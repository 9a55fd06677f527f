"""Nothing passes in silence: what is given is right, or refused by an error of our own that says what is wrong."""

from __future__ import annotations

import dis
import inspect
import json
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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

from .oracle import FEW_STEPS, two_modes

FEW = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
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
    return deis.Denoiser(two_modes(SDE)[0], SDE)


JUNK: tuple[Any, ...] = (
    None, "3", "", float("nan"), float("inf"), -float("inf"), -1, 0, 1, 2, 1.5, 1e300, 1e-300, 10**400, True, False, 1 + 2j,
    [], [1.0], [[1], [1, 2]], [1.0, None], ["a", "b"], (0.5, 0.1), (0.1, 0.5, 0.9), {}, {"a": 1}, {1, 2}, object(), object, b"x",
    lambda: 0, lambda x: "a", lambda x, t: None, lambda x, t: "a", lambda x, t, c: x, lambda *a: None, lambda *a: np.ones(2),
    np.array(["a"]), np.array([1.0, 0.5, 0.1]), np.ones((2, 2)), np.array(1j), np.array(0.5), np.float32(0.5), np.int64(3),
    np.empty(0), np.array([None, 1.0], dtype=object), torch.tensor(0.5), torch.ones(3), torch.ones((2, 2), dtype=torch.complex64),
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
    "exponential_rk": (deis.exponential_rk, {"tableau": "res_2s", "form": None}),
    "ExponentialTableau": (deis.ExponentialTableau, {"c": [0, 0.5], "a": [[None]], "b": [None, [(2, 2, 1)]], "name": "mine"}),
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
    "guided, sampled": (lambda **options: deis.sample(PLAN, deis.guided(**options), X_T),
                        {"strong": eps, "weak": eps, "weight": 2.0}),
    "classifier_free": (deis.classifier_free, {"net": conditioned, "condition": np.ones(4), "null": np.zeros(4), "weight": 2.0,
                                               "batched": True, "rescale": 0.0, "interval": (0.1, 0.9)}),
    "classifier_free, sampled": (lambda **options: deis.sample(PLAN, deis.classifier_free(**options), X_T),
                                 {"net": conditioned, "condition": np.ones(4), "null": np.zeros(4), "weight": 2.0}),
    "classifier_guided": (deis.classifier_guided, {"denoiser": denoiser(), "log_prob": lambda x, t: -x, "weight": 1.0}),
    "classifier_guided, sampled": (lambda **options: deis.sample(PLAN, deis.classifier_guided(**options), torch.ones(4, 3)),
                                   {"denoiser": deis.Denoiser(eps, SDE), "log_prob": lambda x, t: -x.sum(1)}),
    "posterior": (deis.posterior, {"denoiser": denoiser(), "operator": deis.operators.mask([1, 0, 1]), "y": X_T, "noise": 0.1,
                                   "method": "dps", "weight": 1.0, "deviation": 1.0}),
    "posterior, sampled": (lambda **options: deis.sample(PLAN, deis.posterior(denoiser(), **options), X_T),
                           {"operator": deis.operators.mask([1, 0, 1]), "y": X_T, "noise": 0.1, "method": "replacement"}),
    "mask, applied": (lambda **options: deis.operators.mask(**options)(X_T), {"known": [1, 0, 1]}),
    "downsample, applied": (lambda **options: deis.operators.downsample(**options)(np.ones((2, 1, 4, 4))), {"factor": 2}),
    "blur, applied": (lambda **options: deis.operators.blur(**options)(X_T), {"kernel": [1.0, 2.0]}),
    "linear": (deis.operators.linear, {"function_of_x": lambda x: x, "shape": (3,), "adjoint": lambda y: y, "iterations": 3}),
    "LinearOperator": (deis.operators.LinearOperator, {"name": "mine", "apply": lambda x: x, "adjoint": lambda y: y,
                                                       "pseudo_inverse": lambda r, s: r, "measured": None}),
    "LinearOperator, called": (deis.operators.mask([1, 0, 1]), {"x": X_T}),
    "check_adjoint": (deis.operators.mask([1, 0, 1]).check_adjoint, {"x": X_T}),
    "cut_plan": (deis.cut_plan, {"plan": PLAN, "sde": SDE, "start": 0.5, "end": None}),
    "between": (SDE.between, {"start": 0.5, "end": 0.1}),
    "between by strength": (SDE.between, {"strength": 0.5, "end": 0.1}),
    "add_noise": (deis.add_noise, {"sde": SDE, "x_0": X_T, "t": 0.5, "rng": np.random.default_rng(0)}),
    "image_to_image": (deis.image_to_image, {"plan": PLAN, "model": denoiser(), "x_0": X_T, "strength": 0.5,
                                             "rng": np.random.default_rng(0), "callback": None, "progress": False,
                                             "check_finite": False, "grad": False, "parallel": False}),
    "inpaint": (deis.inpaint, {"plan": PLAN, "model": denoiser(), "x_0": X_T, "mask": np.ones((1, 3)), "strength": 0.5,
                               "resample": 2, "rng": np.random.default_rng(0)}),
    "load_model": (deis.load_model, {"spec": "/nowhere", "backend": "torch", "device": None, "dtype": "float32"}),
    "measure_norm": (deis.measure_norm, {"plan": PLAN, "denoiser": deis.Denoiser(eps, SDE), "x_T": X_T, "rng": None}),
    "make_teacher": (deis.make_teacher, {"model": denoiser(), "samples": X_T, "condition": None, "steps": 128, "batch": 4,
                                         "tol": 1e-2}),
    "calibrate": (deis.calibrate, {"plan": deis.make_plan(SDE, "tab2", 2), "model": denoiser(), "samples": np.tile(X_T, (12, 1)),
                                   "condition": None, "teacher": 64, "stages": ("least_squares",), "validation": 0.25,
                                   "method": None, "window": None, "times": True, "iterations": 1, "loss": "robust", "steps": 2,
                                   "batch": 64, "seconds": None}),
    "calibrate_range": (deis.calibrate_range, {"model": denoiser(), "samples": np.tile(X_T, (12, 1)), "nfe": (2,), "method": "tab2",
                                               "ts_phase": None, "ts_order": None, "condition": None, "teacher": 64, "batch": 64,
                                               "seconds": None, "stages": ("least_squares",), "window": None}),
    "calibrate_family": (deis.calibrate_family, {"plan": deis.make_plan(SDE, "tab2", 2), "model_at": lambda value: denoiser(),
                                                 "values": (1.0, 2.0), "samples": np.tile(X_T, (12, 1)), "teacher": 256,
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


@FEW_STEPS
@FEW
@given(odd_calls())
def test_odd_arguments_are_taken_or_refused_by_name(odd: tuple[str, dict[str, int]]) -> None:
    call_oddly(odd)


@FEW_STEPS
@pytest.mark.slow
@MANY
@given(odd_calls())
def test_very_many_odd_arguments_are_taken_or_refused_by_name(odd: tuple[str, dict[str, int]]) -> None:
    call_oddly(odd)


@FEW_STEPS
@pytest.mark.parametrize("name", VALID)
def test_every_argument_takes_or_refuses_every_kind_of_junk(name: str) -> None:
    for argument in VALID[name][1]:
        for place in range(len(JUNK)):
            call_oddly((name, {argument: place}))


@FEW_STEPS
def test_the_calls_that_are_made_odd_are_valid_as_they_are() -> None:
    missing = {"load_plan", "PlanFamily.load", "load_model", "calibration_report"}
    assert {name for name, (function, valid) in VALID.items() if not accepted(partial(function, **valid))} == missing


def test_errors_of_numpy_and_of_python_are_not_ours() -> None:
    """The judge of the tests above, judged."""

    def from_numpy(sde: Any, ts: Any, grid: Any) -> Any:
        return np.zeros(2) + np.zeros(3)

    for foreign in (lambda: deis.make_plan(SDE, from_numpy, 3), lambda: float("x")):
        with pytest.raises((ValueError, TypeError)) as caught:
            foreign()
        assert not is_ours(caught.value)
    with pytest.raises(ValueError, match="num_step") as caught:
        deis.make_plan(SDE, "tab2", 0)
    assert is_ours(caught.value)


@pytest.mark.parametrize("Error", [TypeError, ValueError, KeyError])
def test_an_error_of_the_models_own_comes_through_as_it_is(Error: type[Exception]) -> None:
    mine = Error("mine")

    def fails(*arguments: Any) -> Any:
        raise mine

    model = denoiser()
    for call in (
        lambda: deis.sample(PLAN, fails, X_T),
        lambda: deis.sample(PLAN, deis.guided(eps, fails, 2.0), X_T),
        lambda: deis.sample(PLAN, deis.Denoiser(eps, SDE, threshold=fails), X_T),
        lambda: deis.sample(PLAN, eps, X_T, callback=fails),
        lambda: deis.make_plan(SDE, deis.adams(norm=fails), 3),
        lambda: deis.make_plan(SDE, "sa_solver", 3, tau=fails),
        lambda: deis.calibrate(PLAN, deis.Denoiser(fails, SDE), X_T),
        lambda: evaluate(PLAN, model, X_T, extractor=fails, real=np.ones((5, 2))),
    ):
        with pytest.raises(Error) as caught:
            call()
        assert caught.value is mine


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
    "dpm_fast", *(name for name, table in deis.EXPONENTIAL_TABLEAUX.items() if table.exact),
    "ancestral", "sde_dpmpp_2m", "sde_dpmpp_2m_published", "sa_solver",
]  # fmt: skip
CLOCKS = ["t", "rho", "log_rho", "sqrt_t", "vp_t", "arctan_rho"]


@st.composite
def combinations(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of a plan, and how to sample it."""
    method: Any = draw(st.sampled_from(NAMES))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        method, order = "adams", draw(st.integers(0, 4))
        corrector = draw(st.none() | st.integers(0, order + 1))
        options = {
            "form": draw(st.sampled_from([None, "eps", "data"])),
            "clock": draw(st.sampled_from(CLOCKS)),
            "order": order,
            "corrector": corrector,
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


def allowed(plan: deis.Plan) -> float | None:
    """The error of the deviation that a method may have on the plan's times and with its noise; None where they are too coarse.

    With y = (x - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2) the exact solution keeps y, or with noise its variance of 1. x_0 is
    the cosine of the angle arctan(rho / STD), and eps its sine. A step of DDIM that keeps the share q of eps, and draws the rest
    anew, is

        y' = (cos cos' + q sin sin') y + sin' sqrt(1 - q^2) z,

    cos(angle - angle') y where there is no noise. What it adds to the variance, or takes from it, is one part; without its sign, so
    that nothing cancels. A polynomial through predictions errs by a few times their change over the step, times the weight that the
    step gives a constant: cos' (tan - tan') of eps = sin y, and cos' - q sin' cot of x_0 = cos y. That is the other part. Both say
    nothing of steps that are long (0.3 is a fifth of all the way) or several times as long as the one before, in log rho, nor of
    plans of which the start, with fewer predictions than the polynomial wants, is a third.
    """
    rows = np.append(0, np.flatnonzero(plan.accepts) + 1)
    angle = np.arctan2(plan.sigma[rows], STD * plan.alpha[rows])
    before, after = angle[:-1], angle[1:]
    with np.errstate(divide="ignore"):
        log_rho = np.log(plan.sigma[rows]) - np.log(plan.alpha[rows])
    step = -np.diff(log_rho[np.isfinite(log_rho)])
    if (before - after).max() > 0.3 or (step[1:] > 3 * step[:-1]).any() or plan.num_step < 3 * plan.window:
        return None
    renewed = np.minimum(plan.keep_z[plan.accepts] / np.maximum(plan.sigma[rows[1:]], 1e-300), 1)
    q = np.sqrt(1 - renewed**2)
    kept = np.cos(before) * np.cos(after) + q * np.sin(before) * np.sin(after)
    of_first_order = np.abs(kept**2 + (np.sin(after) * renewed) ** 2 - 1).sum() / 2
    if plan.form == "eps":
        weight, change = np.cos(after) * (np.tan(before) - np.tan(after)), np.sin(before) - np.sin(after)
    else:
        weight, change = np.cos(after) - q * np.sin(after) / np.tan(before), np.cos(after) - np.cos(before)
    return float(of_first_order + 2 * np.abs(weight * change).sum())


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


def run_combination(c: dict[str, Any]) -> None:
    """Check that a combination is refused, or warned of, or finite and as right as its times allow."""
    sde, mean = SCHEDULES[c["sde"]], 0.0 if c["afs"] else MEAN  # the analytical first step is that of centred data
    spread_T, spread = (float(np.hypot(sde.alpha(t) * STD, sde.sigma(t))) for t in (sde.t_start, sde.t_end))
    y = np.array([[1.0], [-2.0]])
    x_T: Any = sde.alpha(sde.t_start) * mean + spread_T * y
    plans: list[deis.Plan] = []

    def build() -> None:
        method = deis.adams(**c["options"]) if c["method"] == "adams" else c["method"]
        plans.append(deis.make_plan(sde, method, afs=STD if c["afs"] else None, **c["grid"]))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if not accepted(build):
            return
    plan = plans[0]
    in_torch = c["backend"] == "torch"
    rng = torch.Generator().manual_seed(0) if in_torch else np.random.default_rng(0)
    model = as_predicted(sde, c["predicts"], mean)
    found: list[Any] = []
    if not accepted(
        lambda: found.append(deis.sample(plan, model, torch.from_numpy(x_T) if in_torch else x_T, predicts=c["predicts"], rng=rng))
    ):
        return
    x_0 = np.asarray(found[0])
    assert x_0.shape == x_T.shape
    assert np.isfinite(x_0).all()
    bound = allowed(plan)
    if bound is None or any(warning.category is UserWarning for warning in told):
        return
    error = deviation_of_law(plan) - 1 if plan.stochastic else (x_0 - sde.alpha(sde.t_end) * mean) / spread / y - 1
    assert np.abs(error).max() <= bound + 1e-6, plan


@FEW
@given(combinations())
def test_a_combination_is_right_or_refused(combination: dict[str, Any]) -> None:
    run_combination(combination)


@pytest.mark.slow
@MANY
@given(combinations())
def test_very_many_combinations_are_right_or_refused(combination: dict[str, Any]) -> None:
    run_combination(combination)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_method_is_right_on_its_default_grid(name: str) -> None:
    """At 50 steps a method of first order on even angles errs by (pi/2)^2 / 100 = 0.025; twice that, or with noise four times."""
    for method in NAMES:
        plans: list[deis.Plan] = []

        def build(method: str = method, plans: list[deis.Plan] = plans) -> None:
            plans.append(deis.make_plan(SCHEDULES[name], method, 50))

        if accepted(build):
            assert abs(deviation_of_law(plans[0]) - 1) < (0.1 if plans[0].stochastic else 0.05), method


def test_the_bound_sees_a_wrong_plan() -> None:
    """A weight that is off by a tenth, in a plan that says that it is fitted and so is not checked when it is made."""
    plan = deis.make_plan(SDE, "tab2", 40)
    weights = plan.keep_p.copy()
    weights[20] *= 1.1
    wrong = replace(plan, keep_p=weights, fitted="by a bug")
    limit = allowed(wrong)
    assert limit is not None
    assert abs(deviation_of_law(plan) - 1) < limit
    weights[10:] *= 1.1
    assert abs(deviation_of_law(replace(wrong, keep_p=weights)) - 1) > limit


# --- noise that grows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [SDE, deis.EDM(), deis.FlowMatching()], ids=lambda sde: sde.name)
def test_a_rate_of_noise_that_extrapolation_multiplies_is_refused_or_warned_of(sde: deis.Schedule) -> None:
    with pytest.raises(ValueError, match=r"tau=5.0 adds more noise than .* lower tau or a lower order"):
        deis.make_plan(sde, deis.adams("data", "log_rho", 3, tau=5.0), 20)
    with pytest.warns(UserWarning, match=r"tau=2.0 adds more noise than"):
        warned = deis.make_plan(sde, deis.adams("data", "log_rho", 1, tau=2.0), 20)
    assert deviation_of_law(warned) > 1.4
    for tau in (0.5, 1.0, 3.0, 10.0):  # the first order multiplies nothing: a warning would be an error
        plan = deis.make_plan(sde, deis.adams("data", "log_rho", 0, tau=tau), 20)
        assert 0.5 < deviation_of_law(plan) < 1.1
    deis.make_plan(sde, "sa_solver", 50, tau=lambda t: 0.5)


@FEW_STEPS
def test_no_plan_is_made_whose_samples_spread_three_times_as_far() -> None:
    made, refused = [], 0
    for order in (1, 2, 3):
        for tau in np.arange(1.0, 5.0, 0.25).tolist():
            try:
                made.append(deviation_of_law(deis.make_plan(SDE, deis.adams("data", "log_rho", order, tau=tau), 20)))
            except ValueError:
                refused += 1
    assert 2 < max(made) < 3.1  # the noise is refused from 3 on, and a little is left of what it started with
    assert refused > 5


@pytest.mark.parametrize("tau", [1.0, 3.0, 10.0, 30.0])
@pytest.mark.parametrize("ts", [(1.0, 0.001), (1.0, 0.5, 0.001), (0.9, 0.8, 0.7, 0.6)])
def test_the_weights_of_great_rates_are_exact(tau: float, ts: tuple[float, ...]) -> None:
    """alpha' (1 - (rho'/rho)^(1 + tau^2)), the weight of a constant, however fast the integrand falls."""
    plan = deis.make_plan(SDE, deis.adams("data", "log_rho", 0, tau=tau), ts=ts)
    share = np.exp((1 + tau**2) * np.diff(SDE.log_rho(np.array(ts))))
    np.testing.assert_allclose(plan.keep_p[:, 0], plan.alpha[1:] * (1 - share), rtol=1e-12)


def test_a_grid_on_which_the_order_does_harm_is_warned_of() -> None:
    """EDM's noise levels on even square roots: the last steps are long in log rho, in which unipc3 extrapolates."""
    with pytest.warns(UserWarning, match="'unipc3' with the t grid of power 2 in 47 steps is off by .* and 'ddim' by"):
        plan = deis.make_plan(deis.EDM(), "unipc3", 47, "t", 2.0)
    assert abs(deviation_of_law(plan) - 1) > 0.5
    deis.make_plan(deis.EDM(), "unipc3", 47)  # here and below a warning would be an error
    for steps in (1, 2, 3, 5, 10, 20):
        for sde in SCHEDULES.values():
            deis.make_plan(sde, "auto", steps)


@FEW_STEPS
def test_noise_is_measured_as_sampling_makes_it() -> None:
    """The deviation of 20,000 samples, which errs by 1 / sqrt(40,000), is the one that the law of the rows tells."""
    plan = deis.make_plan(SDE, "sa_solver", 12, tau=0.8)
    x_T = np.random.default_rng(1).standard_normal((1, 20_000)) * np.hypot(plan.alpha[0] * STD, plan.sigma[0])
    x_0 = deis.sample(plan, as_predicted(SDE, "eps", 0.0), x_T, rng=np.random.default_rng(2))
    assert abs(x_0.std() / np.hypot(plan.alpha[-1] * STD, plan.sigma[-1]) / deviation_of_law(plan) - 1) < 4 / np.sqrt(40_000)


def test_an_inverse_that_is_none_is_refused() -> None:
    for schedule in (deis.VPSDE, deis.SubVPSDE):
        with pytest.raises(ValueError, match="alpha2t_fn must be the inverse of t2alpha_fn"):
            schedule(lambda t: np.exp(-5 * t**2), lambda a: -np.log(a) / 5)


def test_the_analytical_first_step_does_not_save_the_only_evaluation() -> None:
    with pytest.raises(ValueError, match=r"afs=0\.5 would save the only evaluation of 'tab2' in 1 steps"):
        deis.make_plan(SDE, "tab2", 1, afs=0.5)


# --- models and callbacks that write into what they are given or return -------------------------------------------------


def changes_x(x: Any, t: Any) -> Any:
    out = 0.1 * x * (1 + t[:, None])
    x *= 3
    return out


def leaves_x(x: Any, t: Any) -> Any:
    return 0.1 * x * (1 + t[:, None])


@pytest.mark.parametrize("method", ["tab2", "rhork_3kutta", "dpmpp_2m", "unipc2"])
def test_a_model_that_changes_its_input_is_refused_or_cannot_hurt(method: str) -> None:
    plan = deis.make_plan(SDE, method, nfe=9)
    x_T = torch.from_numpy(X_T)
    right = deis.sample(plan, leaves_x, x_T)
    for make in (torch.Tensor.clone, lambda x: x.clone().T.contiguous().T, lambda x: torch.cat([x, x])[:4], torch.Tensor.float):
        with pytest.raises(ValueError, match=r"x or t of model\(x, t\) was changed in place .* x = x.clone\(\)"):
            deis.sample(plan, changes_x, make(x_T))
    with torch.inference_mode():
        torch.testing.assert_close(deis.sample(plan, changes_x, torch.tensor(X_T)), right)
    np.testing.assert_allclose(deis.sample(plan, changes_x, X_T.copy()), right.numpy(), rtol=1e-12)
    given_away = X_T.copy()
    deis.sample(plan, changes_x, given_away)
    np.testing.assert_array_equal(given_away, X_T)


def test_a_compiled_loop_is_not_hurt_by_a_model_that_changes_its_input() -> None:
    x_T = torch.from_numpy(X_T)
    compiled = torch.compile(lambda x: deis.sample(PLAN, changes_x, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x_T), deis.sample(PLAN, leaves_x, x_T))
    np.testing.assert_array_equal(x_T.numpy(), X_T)


def test_guidance_and_denoisers_see_a_changed_input_too() -> None:
    right = deis.sample(PLAN, deis.guided(leaves_x, eps, 2.0), X_T)
    np.testing.assert_allclose(deis.sample(PLAN, deis.guided(changes_x, eps, 2.0), X_T), right)

    def changes_t(x: Any, t: Any) -> Any:
        t *= 1000
        return 0.1 * x * (1 + t[:, None] / 1000)

    np.testing.assert_allclose(deis.sample(PLAN, deis.guided(changes_t, leaves_x, 2.0), X_T), deis.sample(PLAN, leaves_x, X_T))
    for model in (deis.guided(changes_x, eps, 2.0), deis.guided(changes_t, eps, 2.0), deis.Denoiser(changes_x, SDE)):
        with pytest.raises(ValueError, match="was changed in place"):
            deis.sample(PLAN, model, torch.from_numpy(X_T))
    with pytest.raises(ValueError, match="was changed in place"):
        deis.Denoiser(changes_x, SDE).predict(torch.tensor(X_T), 0.5, "eps")
    predicted = deis.Denoiser(changes_x, SDE).predict(X_T, 0.5)
    np.testing.assert_allclose(predicted, deis.Denoiser(leaves_x, SDE).predict(X_T, 0.5))


@FEW_STEPS
@pytest.mark.parametrize("method", ["tab3", "ddim", "rhork_4rk", "dpmpp_2m", "unipc2"])
@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_a_model_may_return_one_buffer_again_and_again(method: str, predicts: str) -> None:
    sde = deis.FlowMatching(0.01, 0.99)
    plan = deis.make_plan(sde, method, nfe=6)
    thresholds = (None, lambda x_0: x_0, lambda x_0: x_0[:])
    for threshold in thresholds if predicts == "x0" else thresholds[:1]:
        for x_T in (X_T, torch.tensor(X_T)):
            buffer = 0 * x_T

            def model(x: Any, t: Any, buffer: Any = buffer) -> Any:
                buffer[:] = leaves_x(x, t)
                return buffer[:]

            wanted = deis.sample(plan, deis.Denoiser(leaves_x, sde, predicts, threshold), x_T)
            found = deis.sample(plan, deis.Denoiser(model, sde, predicts, threshold), x_T)
            buffer[:] = 7.0
            np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-12)


@pytest.mark.parametrize("x_T", [X_T, torch.tensor(X_T)], ids=["numpy", "torch"])
def test_a_threshold_may_return_one_buffer_again_and_again(x_T: Any) -> None:
    buffer = 0 * x_T

    def threshold(x_0: Any) -> Any:
        buffer[:] = x_0.clip(-0.5, 0.5)
        return buffer

    sde = deis.FlowMatching(0.01, 0.99)
    wanted, found = (
        deis.sample(deis.make_plan(sde, "dpmpp_2m", nfe=6), deis.Denoiser(leaves_x, sde, "x0", limit), x_T)
        for limit in (lambda x_0: x_0.clip(-0.5, 0.5), threshold)
    )
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-12)


def test_a_model_may_return_its_input() -> None:
    wanted = deis.sample(PLAN, lambda x, t: 1.0 * x, X_T)
    for x_T in (X_T, torch.tensor(X_T)):
        np.testing.assert_allclose(np.asarray(deis.sample(PLAN, lambda x, t: x, x_T)), wanted, rtol=1e-13)


def test_a_callback_that_changes_the_state_is_refused_or_cannot_hurt() -> None:
    def listen(i: int, t: float, x: Any) -> None:
        x *= 0

    np.testing.assert_array_equal(deis.sample(PLAN, eps, X_T, callback=listen), deis.sample(PLAN, eps, X_T))
    with pytest.raises(ValueError, match="the x of callback"):
        deis.sample(PLAN, eps, torch.tensor(X_T), callback=listen)


@pytest.mark.parametrize("method", ["tab2", "rhork_2heun", "rhork_4rk"])
@pytest.mark.parametrize("when", [0, 2])
def test_what_a_callback_raises_reaches_the_caller(method: str, when: int) -> None:
    import jax

    mine = KeyError("mine")
    told: list[int] = []

    def listen(i: int, t: float, x: Any) -> None:
        told.append(i)
        if i == when:
            raise mine

    plan = deis.make_plan(SDE, method, 5)
    for x_T in (X_T, torch.tensor(X_T), jax.numpy.asarray(X_T)):
        told.clear()
        with pytest.raises(KeyError) as caught:
            deis.sample(plan, eps, x_T, callback=listen)
        assert caught.value is mine
        assert told == list(range(when + 1))
    run = jax.jit(lambda x: deis.sample(plan, eps, x, callback=listen))
    with pytest.raises(Exception, match="mine"):  # JAX's own, under jit, which carries the text
        jax.block_until_ready((run(jax.numpy.asarray(X_T)), jax.effects_barrier()))


# --- guidance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "flow"])
def test_guided_denoisers_carry_what_they_predict(predicts: str) -> None:
    strong, weak = (deis.Denoiser(as_predicted(SDE, predicts, mean), SDE, predicts) for mean in (0.4, 0.1))
    in_eps = deis.guided(as_predicted(SDE, "eps", 0.4), as_predicted(SDE, "eps", 0.1), 2.0)
    mixed = deis.guided(strong, weak, 2.0)
    assert isinstance(mixed, deis.Denoiser)
    np.testing.assert_allclose(deis.sample(PLAN, mixed, X_T), deis.sample(PLAN, in_eps, X_T), rtol=1e-9)
    other = "v" if predicts != "v" else "eps"
    with pytest.raises(ValueError, match="contradicts the Denoiser"):
        deis.sample(PLAN, mixed, X_T, predicts=other)
    with pytest.raises(ValueError, match=f"strong predicts {predicts!r} and weak {other!r}"):
        deis.guided(strong, replace(weak, predicts=other, model=eps), 2.0)
    with pytest.raises(TypeError, match="weak is a plain function"):
        deis.guided(strong, eps, 2.0)
    with pytest.raises(ValueError, match="whose levels differ"):
        deis.guided(strong, deis.Denoiser(eps, deis.VPSDE.linear(0.2, 20), predicts), 2.0)
    with pytest.raises(ValueError, match="contradicts the model"):
        deis.Denoiser(strong, SDE, other)


def test_guided_denoisers_keep_the_threshold() -> None:
    clip = deis.static_threshold(0.1)
    strong, weak = deis.Denoiser(eps, SDE, threshold=clip), deis.Denoiser(eps, SDE)
    guided = deis.guided(strong, weak, 2.0)
    assert isinstance(guided, deis.Denoiser)
    assert np.abs(guided.predict(X_T, 0.5)).max() <= 0.1
    with pytest.raises(ValueError, match="weak has a threshold"):
        deis.guided(weak, strong, 2.0)
    with pytest.raises(ValueError, match="which would be dropped"):
        deis.Denoiser(strong, SDE)


@pytest.mark.parametrize("sde", SCHEDULES.values(), ids=SCHEDULES)
def test_a_denoiser_says_nothing_beyond_its_schedule(sde: deis.Schedule) -> None:
    model = deis.Denoiser(lambda x, t: 0 * x, sde)
    for t in (-1.0, -1e-6, float("nan"), float("inf"), 1.01 * sde.t_start + 1e-3):
        with pytest.raises(ValueError, match="t="):
            model.predict(X_T, t, "eps")
    for t in (sde.t_start, 0.5 * (sde.t_start + sde.t_end), sde.t_end):
        assert np.isfinite(model.predict(X_T, t, "eps")).all()


# --- files -------------------------------------------------------------------------------------------------------------

FAMILY = deis.PlanFamily((1.0, 2.0, 3.0), (PLAN, PLAN, PLAN))


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, int, int, str, Any]:
    """How to damage a file: a way, two places, and what to write there."""
    values: Any = [None, True, -1, 0.5, 1e308, 10**400, "", "x", [], {}, [[]], "NaN", "Infinity", "1e999", {"a": [1]}]
    way = draw(st.sampled_from(["cut", "byte", "remove", "repeat", "value", "key", "nest", "swap"]))
    first, second = draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6))
    return way, first, second, chr(draw(st.integers(0, 255))), draw(st.sampled_from(values))


def damaged(text: str, damage: tuple[str, int, int, str, Any]) -> str:
    way, first, second, letter, value = damage
    i, j = sorted((first % len(text), second % len(text)))
    if way == "cut":
        return text[:i]
    if way == "byte":
        return text[:i] + letter + text[i + 1 :]
    if way == "remove":
        return text[:i] + text[j:]
    if way == "repeat":
        return text[:j] + text[i:]
    document = json.loads(text)
    places = list(leaves(document))
    holder, key = places[first % len(places)]
    if way == "value":
        holder[key] = value
    elif way == "swap":
        other, name = places[second % len(places)]
        holder[key], other[name] = other[name], holder[key]
    elif way == "key" and isinstance(holder, dict):
        holder[letter] = holder.pop(key)
    elif way == "nest":
        holder[key] = "NEST"
        depth = 10 ** (second % 6)
        return json.dumps(document).replace('"NEST"', "[" * depth + "]" * depth)
    return json.dumps(document).replace('"NaN"', "NaN").replace('"Infinity"', "Infinity").replace('"1e999"', "1e999")


def leaves(part: Any) -> Any:
    """All (holder, key) of a document."""
    for key, value in list(part.items() if isinstance(part, dict) else enumerate(part)):
        yield part, key
        if isinstance(value, dict | list):
            yield from leaves(value)


def read_damaged(path: Path, damage: tuple[str, int, int, str, Any]) -> None:
    for whole, load in ((PLAN, deis.load_plan), (FAMILY, deis.PlanFamily.load)):
        whole.save(path)
        text = damaged(path.read_text(), damage)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        read: list[Any] = []

        def again(load: Any = load, read: list[Any] = read) -> None:
            read.append(load(path))

        if accepted(again):
            assert read == [whole], "a damaged file was read as another plan"


@FEW
@given(damages())
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, damage: Any) -> None:
    read_damaged(tmp_path_factory.getbasetemp() / "damaged.json", damage)


@pytest.mark.slow
@MANY
@given(damages())
def test_very_many_damaged_files_are_refused_or_read_as_they_were(tmp_path_factory: pytest.TempPathFactory, damage: Any) -> None:
    read_damaged(tmp_path_factory.getbasetemp() / "damaged-often.json", damage)


@pytest.mark.parametrize("name", ["version", "sha256", "plan", "form", "t", "keep_p", "calls", "provenance", "unknown"])
def test_deep_nesting_is_no_recursion_error(tmp_path: Path, name: str) -> None:
    """Near the interpreter's limit of a thousand frames what one step can read another cannot print, write or hash."""
    document = PLAN.document()
    (document if name in document else document["plan"])[name] = {"deep": "NEST"} if name == "provenance" else "NEST"
    path = tmp_path / "plan.json"
    text = json.dumps(document)
    near = range(800, 1000) if name == "provenance" else (900, 990)
    for depth in (10, 101, *near, 2_000, 100_000):
        path.write_text(text.replace('"NEST"', "[" * depth + "]" * depth))
        with pytest.raises(ValueError, match="is not a usable plan file"):
            deis.load_plan(path)


def test_deep_provenance_is_refused_before_it_breaks_a_file() -> None:
    deep: Any = []
    for _ in range(950):
        deep = [deep]
    for levels in (deep, [deep[0]]):
        with pytest.raises(ValueError, match="provenance"):
            replace(PLAN, provenance={"deep": levels})
    with pytest.raises(ValueError, match="its version is"):
        deis.Plan.from_document({"format": "deis.plan", "version": deep})


def test_a_family_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "family.json"
    deis.PlanFamily((1.0, 2.0, 3.0), (PLAN, replace(PLAN, grid="b"), replace(PLAN, grid="c"))).save(path)
    document = json.loads(path.read_text())
    plans, values = document["plans"], document["values"]
    for change in (
        {"values": [1.0, 2.5, 3.0]},
        {"values": values[:2], "plans": plans[:2]},
        {"plans": plans[::-1]},
        {"plans": [plans[0], plans[0], plans[2]]},
        {"note": "by hand"},
        {"sha256": "0" * 64},
        {"version": 1},
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(ValueError, match="is not a usable file of plans"):
            deis.PlanFamily.load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for load in (deis.load_plan, deis.PlanFamily.load):
        for path in (tmp_path / "plan.json", tmp_path):
            with pytest.raises(FileNotFoundError, match=r"path='.*' is no file"):
                load(path)
    with pytest.raises(FileNotFoundError, match="lies in a folder that is not there"):
        PLAN.save(tmp_path / "nowhere" / "plan.json")
