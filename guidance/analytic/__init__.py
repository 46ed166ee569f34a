"""Denoisers computed from a data set instead of trained, and the statistics behind them."""

from .accumulate import Accumulator
from .denoisers import Denoiser, LSDenoiser, OptimalDenoiser, WienerDenoiser
from .images import decode, load_images
from .local import TAU, LocalDenoiser, SoftLocalDenoiser, masks, sensitivity
from .posterior import Box, Rows, Source, Whole, posterior
from .schedules import CROPS, WINDOWS
from .softmax import Info
from .statistics import DatasetStatistics
from .translates import ELSDenoiser, PSPCDenoiser

DENOISERS: dict[str, type[Denoiser]] = {
    "optimal": OptimalDenoiser,
    "wiener": WienerDenoiser,
    "local": LocalDenoiser,
    "soft": SoftLocalDenoiser,
    "ls": LSDenoiser,
    "els": ELSDenoiser,
    "pspc": PSPCDenoiser,
}

__all__ = [
    "CROPS",
    "DENOISERS",
    "TAU",
    "WINDOWS",
    "Accumulator",
    "Box",
    "DatasetStatistics",
    "Denoiser",
    "ELSDenoiser",
    "Info",
    "LSDenoiser",
    "LocalDenoiser",
    "OptimalDenoiser",
    "PSPCDenoiser",
    "Rows",
    "SoftLocalDenoiser",
    "Source",
    "Whole",
    "WienerDenoiser",
    "decode",
    "load_images",
    "masks",
    "posterior",
    "sensitivity",
]
