"""Rules, one a file: how the predictions of a step combine."""

from .apg import APG, apg
from .cfg import CFG, cfg
from .cfg_plus_plus import CFGPlusPlus, cfg_plus_plus_scale
from .cfg_zero_star import CFGZeroStar, cfg_zero_star
from .frequency_decoupled import FDG, fdg
from .magnitude_aware import MagnitudeAware, magnitude_aware
from .rescale import CFGRescale, cfg_rescale
from .tcfg import TCFG, tangential_damping, tcfg

__all__ = [
    "APG",
    "CFG",
    "FDG",
    "TCFG",
    "CFGPlusPlus",
    "CFGRescale",
    "CFGZeroStar",
    "MagnitudeAware",
    "apg",
    "cfg",
    "cfg_plus_plus_scale",
    "cfg_rescale",
    "cfg_zero_star",
    "fdg",
    "magnitude_aware",
    "tangential_damping",
    "tcfg",
]
