"""Calibration: fit the table of a plan to a model; see `calibrate`."""

from .budgets import calibrate_range
from .family import PlanFamily, calibrate_family
from .fit import calibrate
from .grid import teacher_grid
from .model_free import model_free_grid
from .report import calibration_report
from .teacher import Teacher, make_teacher

__all__ = [
    "PlanFamily",
    "Teacher",
    "calibrate",
    "calibrate_family",
    "calibrate_range",
    "calibration_report",
    "make_teacher",
    "model_free_grid",
    "teacher_grid",
]
