"""Guidance as fused operations, each beside the reference that defines it."""

from .formulas import has_formula
from .guide_step import guide_step
from .inputs import GuideStep
from .linear_history import linear_history
from .solver import SolverStep, network_step, solver_step

__all__ = [
    "GuideStep",
    "SolverStep",
    "guide_step",
    "has_formula",
    "linear_history",
    "network_step",
    "solver_step",
]
