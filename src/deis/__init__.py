"""deis: exponential-integrator samplers for diffusion models, each one a table, on PyTorch, JAX and NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import operators as operators
    from .calibration import PlanFamily, Teacher, calibrate, calibrate_family, calibrate_range, calibration_report, make_teacher
    from .comparison import Comparison, Recommendation, compare, recommend
    from .comparison.report import write_report
    from .cut import cut_plan
    from .edit import add_noise, image_to_image, inpaint
    from .generation.generate import generate
    from .generation.verification import read_samples, verify_samples
    from .grids import make_grid
    from .likelihood import LogLikelihood, log_likelihood
    from .linear.build import make_linear_plan
    from .linear.denoiser import LinearDenoiser
    from .linear.named import CLD, PSLD, Blurring, FrequencyVP
    from .linear.plan import LinearPlan
    from .linear.sample import sample_linear
    from .linear.sde import LinearSDE
    from .methods import get_method, make_plan
    from .methods.adams import adams
    from .methods.exponential import EXPONENTIAL_TABLEAUX, ExponentialTableau, exponential_rk
    from .methods.parallel import parallel_adams
    from .methods.runge_kutta import TABLEAUX, ButcherTableau, rho_rk
    from .model.guidance import classifier_guided, guided
    from .model.load import load_model
    from .model.mixture import classifier_free
    from .model.posterior import posterior
    from .model.predictions import Denoiser, edm_preconditioned
    from .model.pretrained import Pretrained
    from .model.threshold import dynamic_threshold, static_threshold
    from .norm import measure_norm
    from .plan import Plan, load_plan
    from .run import encode, invert, sample
    from .run.compiled import Compiled, compile
    from .run.stepper import Stepper
    from .sde import EDM, VESDE, VPSDE, FlowMatching, Schedule, SubVPSDE

__version__ = "0.1.0"

__all__ = [
    "CLD", "EDM", "EXPONENTIAL_TABLEAUX", "PSLD", "TABLEAUX", "VESDE", "VPSDE", "Blurring", "ButcherTableau", "Comparison",
    "Compiled", "Denoiser", "ExponentialTableau", "FlowMatching", "FrequencyVP", "LinearDenoiser", "LinearPlan", "LinearSDE",
    "LogLikelihood", "Plan", "PlanFamily", "Pretrained", "Recommendation", "Schedule", "Stepper", "SubVPSDE", "Teacher", "adams",
    "add_noise", "calibrate", "calibrate_family", "calibrate_range", "calibration_report", "classifier_free", "classifier_guided",
    "compare", "compile", "cut_plan", "dynamic_threshold", "edm_preconditioned", "encode", "exponential_rk", "generate",
    "get_method", "guided", "image_to_image", "inpaint", "invert", "load_model", "load_plan", "log_likelihood", "make_grid",
    "make_linear_plan", "make_plan", "make_teacher", "measure_norm", "parallel_adams", "posterior", "read_samples", "recommend",
    "rho_rk", "sample", "sample_linear", "static_threshold", "verify_samples", "write_report",
]  # fmt: skip

_HOME = {
    name: module
    for module, names in {
        "calibration": "PlanFamily Teacher calibrate calibrate_family calibrate_range calibration_report make_teacher",
        "comparison": "Comparison Recommendation compare recommend",
        "comparison.report": "write_report",
        "cut": "cut_plan",
        "edit": "add_noise image_to_image inpaint",
        "generation.generate": "generate",
        "generation.verification": "read_samples verify_samples",
        "grids": "make_grid",
        "likelihood": "LogLikelihood log_likelihood",
        "linear.build": "make_linear_plan",
        "linear.denoiser": "LinearDenoiser",
        "linear.named": "CLD PSLD Blurring FrequencyVP",
        "linear.plan": "LinearPlan",
        "linear.sample": "sample_linear",
        "linear.sde": "LinearSDE",
        "methods": "get_method make_plan",
        "methods.adams": "adams",
        "methods.exponential": "EXPONENTIAL_TABLEAUX ExponentialTableau exponential_rk",
        "methods.parallel": "parallel_adams",
        "methods.runge_kutta": "TABLEAUX ButcherTableau rho_rk",
        "model.guidance": "classifier_guided guided",
        "model.load": "load_model",
        "model.mixture": "classifier_free",
        "model.posterior": "posterior",
        "model.predictions": "Denoiser edm_preconditioned",
        "model.pretrained": "Pretrained",
        "model.threshold": "dynamic_threshold static_threshold",
        "norm": "measure_norm",
        "plan": "Plan load_plan",
        "run": "encode invert sample",
        "run.compiled": "Compiled compile",
        "run.stepper": "Stepper",
        "sde": "EDM VESDE VPSDE FlowMatching Schedule SubVPSDE",
    }.items()
    for name in names.split()
}
"""The module of each public name, imported when the name is first asked for."""


if not TYPE_CHECKING:  # a checker that saw it would take any name for one of this module

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name in _HOME:
            globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
            return globals()[name]
        if name in {"operators", *(module.split(".")[0] for module in _HOME.values())}:
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
