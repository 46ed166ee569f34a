"""Improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al.).

arXiv:1904.06991 and arXiv:2002.09797. Every picture has a ball that reaches its k-th nearest
neighbour in its own set (itself not counted):

- precision: share of generated pictures inside a real picture's ball (fidelity);
- recall: share of real pictures inside a generated picture's ball (diversity);
- density: mean number of real balls around a generated picture, divided by k; can exceed 1;
- coverage: share of real balls that hold a generated picture.

k = 3 for the first two, 5 for the others, as published. All depend on N: compare equal N only.
Published figures of the first two use VGG-16 or Inception features and 50,000 or 10,000 pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kid import checked_pair

CHUNK = 1024


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density is at least 0, coverage in [0, 1]."""

    density: float
    coverage: float


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Exact differences: the matrix-product form gives a point a distance > 0 from its copy.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def radii(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, with shape (N,)."""
    if not 1 <= k < len(features):
        raise ValueError(f"k = {k} neighbours need at least {k + 1} pictures, got {len(features)}")
    # The row itself, at distance 0, comes first.
    return torch.cat(
        [_distances(part, features).kthvalue(k + 1, 1).values for part in features.split(CHUNK)]
    )


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall.

    Args:
        real: Features, with shape (N, D).
        fake: Features, with shape (M, D).
        k: Which neighbour a ball reaches.

    Raises:
        ValueError: k pictures or fewer, NaN, or different dimensions.
    """
    real, fake = checked_pair(real, fake, least=2)
    real_radii, fake_radii = radii(real, k), radii(fake, k)
    inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    hits = 0
    start = 0
    for part in fake.split(CHUNK):
        distances = _distances(part, real)
        hits += int((distances <= real_radii).any(1).sum())
        inside |= (distances <= fake_radii[start : start + len(part), None]).any(0)
        start += len(part)
    return PrecisionRecall(hits / len(fake), float(inside.double().mean()))


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage; arguments and errors as for `precision_recall`."""
    real, fake = checked_pair(real, fake, least=2)
    real_radii = radii(real, k)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    around = 0
    for part in fake.split(CHUNK):
        within = _distances(part, real) <= real_radii
        around += int(within.sum())
        covered |= within.any(0)
    return DensityCoverage(around / (k * len(fake)), float(covered.double().mean()))
