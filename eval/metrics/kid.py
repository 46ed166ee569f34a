r"""Kernel distances: unbiased squared MMD with a cubic kernel (KID; Bińkowski et al. 2018).

.. math:: k(a, b) = (a \cdot b / D + 1)^3

arXiv:1801.01401. Unbiased, so small N may be compared with large N; it can be below zero.
torchmetrics has the same for sets of equal size whose kernel matrices fit into memory; this one
takes unequal sizes in blocks (see `blocks`): products in float32, kernels and their sums in
float64. Published figures average 100 subsets of 1,000 (torch-fidelity's setting), and often state
KID x 1000.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Rows, own_sum, pair_sum, prepared


class KID(NamedTuple):
    """Mean over subsets and their standard deviation (None for the whole sets at once)."""

    value: float
    std: float | None


def cubic(dots: Tensor, dimension: int) -> Tensor:
    """The cubic kernel of dot products of features with so many dimensions, in their place."""
    return dots.div_(dimension).add_(1).pow_(3)


def own_mean(rows: Rows) -> float:
    """Mean of the kernel over all pairs of different pictures of a set."""
    count = len(rows)
    return own_sum(rows, lambda dots: cubic(dots, rows.dimension)) / (count * (count - 1))


def _mmd(real: Tensor, fake: Tensor) -> float:
    one, other = prepared(real, fake, least=2)
    cross = pair_sum(one, other, lambda dots: cubic(dots, one.dimension))
    return own_mean(one) + own_mean(other) - 2 * cross / (len(one) * len(other))


def kernel_distance(
    real: Tensor,
    fake: Tensor,
    subsets: int | None = None,
    subset_size: int = 1000,
    seed: int = 0,
) -> KID:
    """Unbiased squared MMD with the cubic kernel.

    Args:
        real: Features, with shape (N, D).
        fake: Features, with shape (M, D).
        subsets: Number of random subsets of both sets; None: the whole sets once.
        subset_size: Rows in a subset, drawn without repetition.
        seed: Of the subsets.

    Raises:
        ValueError: fewer than two pictures, fewer than `subset_size`, NaN, different dimensions.
    """
    if subsets is None:
        return KID(_mmd(real, fake), None)
    if subsets < 1 or not 2 <= subset_size <= min(len(real), len(fake)):
        raise ValueError(
            f"{subsets} subsets of {subset_size} cannot be drawn from {len(real)} and "
            f"{len(fake)} pictures"
        )
    generator = torch.Generator().manual_seed(seed)

    def subset(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:subset_size].to(x.device)]

    drawn = [_mmd(subset(real), subset(fake)) for _ in range(subsets)]
    values = torch.tensor(drawn, dtype=torch.float64)
    return KID(float(values.mean()), float(values.std(correction=0)))
