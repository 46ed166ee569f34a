r"""Multi-scale structural similarity (Wang, Simoncelli, Bovik 2003).

.. math:: l_5^{\beta_5} \prod_{j=1}^{5} cs_j^{\beta_j}, \qquad
    \beta = (.0448, .2856, .3001, .2363, .1333)

(doi:10.1109/ACSSC.2003.1292216) with the Gaussian window of 11 pixels (sigma 1.5) of SSIM, only
where it fits into the picture; pictures are halved four times by the mean of 2 x 2 pixels. Each
colour channel by itself, then the mean of the three. A scale whose structure is opposite (cs below
0) counts as 0. Ours, since SSIM differs from release to release of torchmetrics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .images import checked_pictures

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
SMALLEST = WINDOW * 2 ** (len(WEIGHTS) - 1)  # 176: the window fits into the last scale


def large_enough(images: Tensor) -> bool:
    """Whether pictures (N, 3, H, W) have at least 176 pixels on either side."""
    return min(images.shape[2:]) >= SMALLEST


def ms_ssim(images: Tensor, reference: Tensor) -> Tensor:
    """MS-SSIM of each picture to its reference, shape (N,), in [0, 1].

    Args:
        images: Pictures, with shape (N, 3, H, W), in [0, 1].
        reference: Others of the same shape.

    Raises:
        ValueError: different shapes, NaN, or a side below 176 pixels.
    """
    images, reference = checked_pictures(images), checked_pictures(reference)
    if images.shape != reference.shape:
        raise ValueError(f"pictures of shapes {tuple(images.shape)} and {tuple(reference.shape)}")
    if not large_enough(images):
        height, width = images.shape[2:]
        raise ValueError(
            f"MS-SSIM needs pictures of at least {SMALLEST}x{SMALLEST} pixels, got "
            f"{width}x{height}: use SSIM for smaller ones"
        )
    product = torch.ones(images.shape[:2], dtype=images.dtype, device=images.device)
    for scale, weight in enumerate(WEIGHTS, 1):
        luminance, structure = _terms(images, reference)
        last = scale == len(WEIGHTS)
        value = (luminance * structure if last else structure).mean((2, 3))
        product = product * value.clamp(min=0) ** weight
        if not last:
            images, reference = (nn.functional.avg_pool2d(x, 2) for x in (images, reference))
    return product.mean(1)


def _terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, at every place where the window fits."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = (-offsets.square() / (2 * SIGMA**2)).exp()
    window = window / window.sum()

    def smooth(z: Tensor) -> Tensor:
        flat = z.flatten(0, 1)[:, None]
        flat = nn.functional.conv2d(flat, window.view(1, 1, -1, 1))
        return nn.functional.conv2d(flat, window.view(1, 1, 1, -1)).view(
            *z.shape[:2], *(side - WINDOW + 1 for side in z.shape[2:])
        )

    mean_x, mean_y = smooth(x), smooth(y)
    variances = smooth(x.square() + y.square()) - mean_x.square() - mean_y.square()
    covariance = smooth(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    return luminance, (2 * covariance + C2) / (variances + C2)
