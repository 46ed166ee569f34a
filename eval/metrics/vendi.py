r"""Vendi score: how many different pictures there are, in effect (Friedman & Dieng 2023).

.. math:: \exp\Big(-\sum_i \lambda_i \log \lambda_i\Big), \qquad \lambda \text{ of } K / N

arXiv:2210.02410, with the cosine of features as the kernel K. N equal pictures score 1, N pictures
with orthogonal features N. No reference is needed, and none says whether the variety is wanted:
noise scores high too. It rises with N, so compare equal N and the same extractor only.

Cost: the eigenvalues of one matrix, whose side is N or the number D of features, whichever is
smaller. PyPI's ``vendi-score`` is not used: it asks for parts of scipy that are gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .features import checked_features


def vendi_score(features: Tensor) -> float:
    """Vendi score in float64, from 1 to N.

    Args:
        features: With shape (N, D).

    Raises:
        ValueError: no pictures, NaN, or features that are zero, which have no cosine.
    """
    features = checked_features(features)
    lengths = features.norm(dim=1, keepdim=True)
    if len(empty := (lengths[:, 0] == 0).nonzero()):
        raise ValueError(f"the features of picture {int(empty[0])} are all zero: no cosine")
    rows = features / lengths
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    shares = (torch.linalg.eigvalsh(gram) / len(rows)).clamp(min=0)
    return float((-torch.xlogy(shares, shares).sum()).exp())
