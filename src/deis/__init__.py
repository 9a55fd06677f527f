"""deis: exponential-integrator samplers for diffusion models, each one a table, on PyTorch, JAX and NumPy."""

from .calibration import PlanFamily, Teacher, calibrate, calibrate_family, calibration_report, make_teacher
from .cut import cut_plan
from .grids import make_grid
from .methods import get_method, make_plan
from .methods.adams import adams
from .methods.runge_kutta import TABLEAUX, ButcherTableau, rho_rk
from .model.guidance import classifier_free, classifier_guided, guided
from .model.load import load_model
from .model.norm import measure_norm
from .model.predictions import Denoiser, edm_preconditioned
from .model.pretrained import Pretrained
from .model.threshold import dynamic_threshold, static_threshold
from .plan import Plan, load_plan
from .run import sample
from .sde import EDM, VESDE, VPSDE, FlowMatching, Schedule, SubVPSDE

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "TABLEAUX",
    "VESDE",
    "VPSDE",
    "ButcherTableau",
    "Denoiser",
    "FlowMatching",
    "Plan",
    "PlanFamily",
    "Pretrained",
    "Schedule",
    "SubVPSDE",
    "Teacher",
    "adams",
    "calibrate",
    "calibrate_family",
    "calibration_report",
    "classifier_free",
    "classifier_guided",
    "cut_plan",
    "dynamic_threshold",
    "edm_preconditioned",
    "get_method",
    "guided",
    "load_model",
    "load_plan",
    "make_grid",
    "make_plan",
    "make_teacher",
    "measure_norm",
    "rho_rk",
    "sample",
    "static_threshold",
]
