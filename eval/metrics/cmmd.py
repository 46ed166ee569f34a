r"""CMMD: squared MMD of CLIP embeddings with a Gaussian kernel (Jayasumana et al. 2024).

.. math:: k(a, b) = exp(-|a - b|^2 / (2 \sigma^2)), \quad \sigma = 10, \quad \times 1000

arXiv:2401.09603. The authors' code (google-research/cmmd) takes the image embeddings of CLIP
ViT-L/14 at 336 pixels as the model returns them, that is with unit length (the PyTorch port that
reproduces its value divides by the norm), and the estimator with the diagonal, which is biased
upwards for small N. Both are done so here. Figures compare with published ones with the command's
default extractor, ``clip:openai/clip-vit-large-patch14-336``, and square pictures only (of others
the middle is cut out here; the authors squash them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kid import checked_pair, kernel_sum

SIGMA = 10.0
SCALE = 1000.0


def cmmd(real: Tensor, fake: Tensor) -> float:
    """1000 times the squared MMD of embeddings of unit length, diagonal included, in float64.

    Args:
        real: Embeddings, with shape (N, D); they are brought to unit length here.
        fake: Embeddings, with shape (M, D).

    Raises:
        ValueError: no pictures, NaN, or different dimensions.
    """
    pair = checked_pair(real, fake, least=1)
    real, fake = (torch.nn.functional.normalize(x, dim=1) for x in pair)

    def gaussian(a: Tensor, b: Tensor) -> Tensor:
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return (squares.clamp(min=0) / (-2 * SIGMA**2)).exp()

    def mean(a: Tensor, b: Tensor) -> float:
        return float(kernel_sum(a, b, gaussian)) / (len(a) * len(b))

    return SCALE * (mean(real, real) + mean(fake, fake) - 2 * mean(real, fake))
