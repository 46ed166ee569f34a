"""Guidance and solver steps as fused operations, each beside the eager form that defines it."""

from .guide_step import GuideStep, guide_step
from .solver import SolverStep, network_step

__all__ = ["GuideStep", "SolverStep", "guide_step", "network_step"]
