"""Distances of pictures by networks, each from a file of weights."""

from __future__ import annotations

from pathlib import Path

import torch

from .dreamsim import DreamSim
from .lpips import LPIPS
from .per_picture import Distance

NETWORKS = {"lpips": LPIPS, "dreamsim": DreamSim}


def load_distances(device: str | torch.device, **files: str | Path | None) -> dict[str, Distance]:
    """The distances whose files are named.

    Args:
        device: Where they compute.
        files: For ``lpips`` and ``dreamsim``; None leaves one out.

    Raises:
        FileNotFoundError, ValueError: see `LPIPS` and `DreamSim`.
    """
    return {n: NETWORKS[n](file).to(device) for n, file in files.items() if file is not None}
