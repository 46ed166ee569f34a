"""Samplers whose step is one linear combination with coefficients kept on the device.

Each takes the stock scheduler's configuration and follows its trajectory:
``pipe.scheduler = FusedEulerScheduler.from_config(pipe.scheduler.config)``. Nothing in their steps
waits for the device. A pipeline saved with one of them names the stock class and loads with it.
"""

from .ddim import FusedDDIMScheduler
from .dpmsolver_multistep import FusedDPMSolverMultistepScheduler
from .euler import FusedEulerScheduler
from .flow_match_euler import FusedFlowMatchEulerScheduler
from .fused import FusedScheduler

__all__ = [
    "FusedDDIMScheduler",
    "FusedDPMSolverMultistepScheduler",
    "FusedEulerScheduler",
    "FusedFlowMatchEulerScheduler",
    "FusedScheduler",
]
