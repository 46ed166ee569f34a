"""An optional accelerator of the local denoiser: float32 sums shared between masks, on CPUs only.

`LocalDenoiser` takes it by itself where it can be had; ``accelerator="none"`` rules it out.
"""

from .shared import LARGEST, SUBTRACT, Plan, available, masked_posterior, missing, pack, plan

__all__ = [
    "LARGEST",
    "SUBTRACT",
    "Plan",
    "available",
    "masked_posterior",
    "missing",
    "pack",
    "plan",
]
