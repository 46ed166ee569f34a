"""Improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al.).

arXiv:1904.06991 and arXiv:2002.09797. Every picture has a ball that reaches its k-th nearest
neighbour in its own set (itself not counted):

- precision: share of generated pictures inside a real picture's ball (fidelity);
- recall: share of real pictures inside a generated picture's ball (diversity);
- density: mean number of real balls around a generated picture, divided by k; can exceed 1;
- coverage: share of real balls that hold a generated picture.

k = 3 for the first two, 5 for the others, as published. All depend on N: compare equal N only.
Published figures of the first two use VGG-16 or Inception features and 50,000 or 10,000 pictures.
Distances are float32 in blocks; what that leaves open is decided in float64 (see `blocks`), so the
counts are those of float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Rows, blocks, nearest, prepared


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density is at least 0, coverage in [0, 1]."""

    density: float
    coverage: float


class Near(NamedTuple):
    """Which pairs are near, for some generated pictures and all N real ones.

    Args:
        part: Which generated pictures.
        in_real: Whether each lies in a real picture's ball, with shape (part, N).
        in_fake: Whether a real picture lies in its ball, with shape (part, N).
        in_wide: As `in_real`, with the balls of density and coverage.
    """

    part: slice
    in_real: Tensor | None
    in_fake: Tensor | None
    in_wide: Tensor | None


def radii(rows: Rows, *ks: int) -> list[Tensor]:
    """Distance of each row to its k-th nearest other row, float64 (N,), for every k asked for.

    Raises:
        ValueError: a k below 1, or k rows or fewer.
    """
    if not ks:
        return []
    if min(ks) < 1:
        raise ValueError(f"k = {min(ks)} neighbours: at least 1 is needed")
    found = nearest(rows, rows, max(ks))[0]
    return [found[:, k - 1] for k in ks]


def neighbourhoods(
    real: Rows, fake: Rows, k: int | None = None, k_density: int | None = None
) -> Iterator[Near]:
    """Which pictures lie in whose balls, some generated pictures at a time.

    Args:
        real, fake: The two sets, prepared together.
        k: Which neighbour a ball reaches, for precision and recall; None: not wanted.
        k_density: The same for density and coverage.

    Raises:
        ValueError: see `radii`.
    """
    ks = [count for count in (k, k_density) if count is not None]
    real_radii = dict(zip(ks, radii(real, *ks), strict=True))
    fake_radii = None if k is None else radii(fake, k)[0]
    for block in blocks(fake, real):
        yield Near(
            block.rows,
            None if k is None else block.within(real_radii[k]),
            None if fake_radii is None else block.within(fake_radii[block.rows, None]),
            None if k_density is None else block.within(real_radii[k_density]),
        )


def neighbour_metrics(
    real: Tensor, fake: Tensor, k: int | None = 3, k_density: int | None = 5
) -> tuple[PrecisionRecall | None, DensityCoverage | None]:
    """Precision and recall, density and coverage, with one look at all pairs.

    Args:
        real: Features, with shape (N, D).
        fake: Features, with shape (M, D).
        k: Which neighbour a ball reaches, for precision and recall; None: not wanted.
        k_density: The same for density and coverage.

    Raises:
        ValueError: k pictures or fewer, NaN, or different dimensions.
    """
    one, other = prepared(real, fake, least=2)
    inside, covered = torch.zeros(2, len(one), dtype=torch.bool, device=one.given.device)
    hits = around = 0
    for near in neighbourhoods(one, other, k, k_density):
        if near.in_real is not None and near.in_fake is not None:
            hits += int(near.in_real.any(1).sum())
            inside |= near.in_fake.any(0)
        if near.in_wide is not None:
            around += int(near.in_wide.sum())
            covered |= near.in_wide.any(0)
    n, m = len(one), len(other)
    shares = PrecisionRecall(hits / m, int(inside.sum()) / n)
    wide = None
    if k_density is not None:
        wide = DensityCoverage(around / (k_density * m), int(covered.sum()) / n)
    return None if k is None else shares, wide


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall; arguments and errors as for `neighbour_metrics`."""
    found = neighbour_metrics(real, fake, k, None)[0]
    assert found is not None
    return found


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage; arguments and errors as for `neighbour_metrics`."""
    found = neighbour_metrics(real, fake, None, k)[1]
    assert found is not None
    return found
