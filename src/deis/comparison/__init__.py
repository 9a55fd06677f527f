"""Methods side by side on one model: `compare`, its report, and `recommend`."""

from __future__ import annotations

from .advice import Recommendation, recommend
from .lineup import usual_methods
from .measure import compare
from .result import Comparison, Row

__all__ = ["Comparison", "Recommendation", "Row", "compare", "recommend", "usual_methods"]
