r"""CMMD: squared MMD of CLIP embeddings with a Gaussian kernel (Jayasumana et al. 2024).

.. math:: k(a, b) = exp(-|a - b|^2 / (2 \sigma^2)), \quad \sigma = 10, \quad \times 1000

arXiv:2401.09603. The authors' code (google-research/cmmd) takes the image embeddings of CLIP
ViT-L/14 at 336 pixels as the model returns them, that is with unit length (the PyTorch port that
reproduces its value divides by the norm), and the estimator with the diagonal, which is biased
upwards for small N. Both are done so here. Figures compare with published ones with the command's
default extractor, ``clip:openai/clip-vit-large-patch14-336``, and square pictures only (of others
the middle is cut out here; the authors squash them).

    pilotage cmmd REAL FAKE
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kid import checked_pair, kernel_sum

SIGMA = 10.0
SCALE = 1000.0


def cmmd(
    real: Tensor,
    fake: Tensor,
    sigma: float = SIGMA,
    scale: float = SCALE,
    normalize: bool = True,
) -> float:
    """Squared MMD with a Gaussian kernel, diagonal included, times `scale`, in float64.

    Args:
        real: Embeddings, with shape (N, D).
        fake: Embeddings, with shape (M, D).
        sigma: Width of the kernel.
        scale: Factor, for readability.
        normalize: Bring embeddings to unit length first, as the authors' are.

    Raises:
        ValueError: no pictures, NaN, different dimensions, or a `sigma` that is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    real, fake = checked_pair(real, fake, least=1)
    if normalize:
        real, fake = (torch.nn.functional.normalize(x, dim=1) for x in (real, fake))

    def gaussian(a: Tensor, b: Tensor) -> Tensor:
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return (squares.clamp(min=0) / (-2 * sigma**2)).exp()

    def mean(a: Tensor, b: Tensor) -> float:
        return float(kernel_sum(a, b, gaussian)) / (len(a) * len(b))

    return scale * (mean(real, real) + mean(fake, fake) - 2 * mean(real, fake))
