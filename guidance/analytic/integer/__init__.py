"""An optional accelerator of the local denoiser: integer products in AMX tiles, on CPUs only.

`LocalDenoiser` takes it by itself where it can be had; ``accelerator="none"`` rules it out.
"""

from .build import Unavailable, missing
from .products import available, masked_posterior, pack

__all__ = ["Unavailable", "available", "masked_posterior", "missing", "pack"]
