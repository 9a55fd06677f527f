"""deis: exponential-integrator samplers for diffusion models, each one a table, on PyTorch, JAX and NumPy."""

from .grids import make_grid
from .methods import get_method, make_plan
from .methods.adams import rho_ab, t_ab
from .methods.ipndm import ipndm
from .methods.runge_kutta import TABLEAUX, ButcherTableau, rho_rk
from .model.pretrained import Pretrained, load_model
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
    "FlowMatching",
    "Plan",
    "Pretrained",
    "Schedule",
    "SubVPSDE",
    "get_method",
    "ipndm",
    "load_model",
    "load_plan",
    "make_grid",
    "make_plan",
    "rho_ab",
    "rho_rk",
    "sample",
    "t_ab",
]
