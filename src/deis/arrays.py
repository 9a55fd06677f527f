"""The types of arrays in annotations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""Coefficients, times, and the states of calibration."""
AnyArray = NDArray[Any]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]
