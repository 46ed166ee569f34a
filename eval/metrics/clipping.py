"""Share of clipped pixels: of how many a channel is at its end, 0 or 255.

What guidance drives out of range is cut off there, and its detail is lost. High scales do so even
where the mean saturation falls again. White and black pixels count, so a white background does:
compare with real pictures of the same kind, or the same pictures without guidance. The definition
is ours.
"""

from __future__ import annotations

from torch import Tensor

from .images import checked_pictures

HALF = 0.5 / 255  # rounds to an end of 8 bits


def clipped(images: Tensor) -> Tensor:
    """Share of clipped pixels of each picture, shape (N,), in [0, 1].

    Args:
        images: Pictures, with shape (N, 3, H, W), in [0, 1].

    Raises:
        ValueError: another shape, or NaN.
    """
    images = checked_pictures(images)
    ends = (images < HALF) | (images > 1 - HALF)
    return ends.any(1).flatten(1).double().mean(1).float()
