r"""How strong colours are as people see them: CIELAB chroma, and its distance to real pictures.

.. math:: C^*_{ab} = \sqrt{a^{*2} + b^{*2}}, \qquad
    W = \int |F_{real}(c) - F_{fake}(c)|\, dc

The chroma of a pixel (CIE 15:2004; sRGB primaries, white D65, 2 degrees) is 0 for grey and at most
134, for sRGB's blue. HSV saturation calls a nearly black pixel as saturated as a bright one, so its
mean falls where pictures get darker; chroma does not. W is the Wasserstein distance of the
distributions F of all pixels of the real and of the generated pictures, every picture with the same
weight: 0 only if weak and strong colours are as frequent in both. It is a mean difference in units
of chroma; about 2 is just visible between two patches side by side. The distance is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .images import checked_pictures

# sRGB (IEC 61966-2-1) to XYZ, divided by the XYZ of white (its row sums).
PRIMARIES = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WIDTH = 0.5  # of a bin of chroma
BINS = 280  # up to 140


def chroma_map(images: Tensor) -> Tensor:
    """Chroma of every pixel, with shape (N, H, W)."""
    images = checked_pictures(images)
    linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(PRIMARIES, dtype=images.dtype, device=images.device)
    xyz = torch.einsum("xc,nchw->nxhw", matrix / matrix.sum(1, keepdim=True), linear)
    edge = 6 / 29
    root = xyz.clamp(min=0) ** (1 / 3)
    f = torch.where(xyz > edge**3, root, xyz / (3 * edge**2) + 4 / 29)
    a, b = 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])
    return (a.square() + b.square()).sqrt()


def chroma(images: Tensor) -> Tensor:
    """Mean chroma of each picture, shape (N,).

    Args:
        images: Pictures, with shape (N, 3, H, W), in [0, 1].
    """
    return chroma_map(images).flatten(1).mean(1)


def chroma_shares(images: Tensor) -> Tensor:
    """Share of each picture's pixels by chroma, in bins of 0.5, with shape (N, 280), float64."""
    bins = (chroma_map(images).flatten(1) / WIDTH).long().clamp(max=BINS - 1)
    counts = torch.zeros(len(bins), BINS, dtype=torch.float64, device=bins.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))
    return counts / bins.shape[1]


def chroma_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Wasserstein distance of distributions of chroma, to within a bin, float64.

    Args:
        real: Shares, with shape (280,): the mean over the real pictures.
        fake: The same of generated ones, with shape (..., 280).

    Returns:
        With shape (...).
    """
    return (real - fake).cumsum(-1).abs().sum(-1) * WIDTH
