"""Denoisers computed from a data set instead of trained, and the statistics behind them."""

from .denoisers import Denoiser, LSDenoiser, OptimalDenoiser, WienerDenoiser
from .images import decode, load_images, size_for
from .local import LocalDenoiser, SoftLocalDenoiser
from .softmax import Info
from .statistics import DatasetStatistics, Level
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
    "DENOISERS",
    "DatasetStatistics",
    "Denoiser",
    "ELSDenoiser",
    "Info",
    "LSDenoiser",
    "Level",
    "LocalDenoiser",
    "OptimalDenoiser",
    "PSPCDenoiser",
    "SoftLocalDenoiser",
    "WienerDenoiser",
    "decode",
    "load_images",
    "size_for",
]
