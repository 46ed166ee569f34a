"""Policies: which branches are evaluated at a step, and what fills in for those left out."""

from .adaptive import AdaptiveGuidance
from .fill import Coefficients, ExtrapolateDifference, HoldDifference
from .interval import Interval
from .schedule import Pattern, Schedule, extrapolate, forecast, gate, hold, linear_ag

__all__ = [
    "AdaptiveGuidance",
    "Coefficients",
    "ExtrapolateDifference",
    "HoldDifference",
    "Interval",
    "Pattern",
    "Schedule",
    "extrapolate",
    "forecast",
    "gate",
    "hold",
    "linear_ag",
]
