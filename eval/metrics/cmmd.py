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

from .blocks import own_sum, pair_sum, prepared
from .features import checked_features

SIGMA = 10.0
SCALE = 1000.0


def cmmd(real: Tensor, fake: Tensor) -> float:
    """1000 times the squared MMD of embeddings of unit length, diagonal included.

    Products in float32 blocks, kernels and their sums in float64.

    Args:
        real: Embeddings, with shape (N, D); they are brought to unit length here.
        fake: Embeddings, with shape (M, D).

    Raises:
        ValueError: no pictures, NaN, or different dimensions.
    """
    unit = [torch.nn.functional.normalize(checked_features(x), dim=1) for x in (real, fake)]
    one, other = prepared(*unit)

    def gaussian(dots: Tensor) -> Tensor:
        return ((dots - 1).clamp(max=0) / SIGMA**2).exp()  # |a - b|^2 = 2 - 2 a.b

    n, m = len(one), len(other)
    own = (own_sum(one, gaussian) + n) / n**2 + (own_sum(other, gaussian) + m) / m**2
    return SCALE * (own - 2 * pair_sum(one, other, gaussian) / (n * m))
