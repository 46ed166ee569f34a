r"""Kernel distances: unbiased squared MMD with a cubic kernel (KID; Bińkowski et al. 2018).

.. math:: k(a, b) = (a \cdot b / D + 1)^3

arXiv:1801.01401. Unbiased, so small N may be compared with large N; it can be below zero.
torchmetrics has the same for sets of equal size whose kernel matrices fit into memory; this one
takes unequal sizes in chunks. Published figures average 100 subsets of 1,000 (torch-fidelity's
setting), and often state KID x 1000.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .features import checked_features

CHUNK = 2048


class KID(NamedTuple):
    """Mean over subsets and their standard deviation (None for the whole sets at once)."""

    value: float
    std: float | None


def checked_pair(real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both features as float64, on the same device.

    Raises:
        ValueError: as `checked_features`, or different dimensions.
    """
    real, fake = checked_features(real, least), checked_features(fake, least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of different dimensions: {real.shape[1]} and {fake.shape[1]}")
    return real, fake.to(real.device)


def kernel_sum(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum of kernel(a, b) over all pairs, a chunk of rows at a time."""
    return torch.stack([kernel(part, b).sum() for part in a.split(CHUNK)]).sum()


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """The cubic kernel of all pairs, with shape (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mmd(real: Tensor, fake: Tensor) -> float:
    n, m = len(real), len(fake)

    def own(x: Tensor) -> Tensor:
        diagonal = ((x.square().sum(1) / x.shape[1] + 1) ** 3).sum()
        return (kernel_sum(x, x, cubic) - diagonal) / (len(x) * (len(x) - 1))

    return float(own(real) + own(fake) - 2 * kernel_sum(real, fake, cubic) / (n * m))


def kernel_distance(
    real: Tensor,
    fake: Tensor,
    subsets: int | None = None,
    subset_size: int = 1000,
    seed: int = 0,
) -> KID:
    """Unbiased squared MMD with the cubic kernel, in float64.

    Args:
        real: Features, with shape (N, D).
        fake: Features, with shape (M, D).
        subsets: Number of random subsets of both sets; None: the whole sets once.
        subset_size: Rows in a subset, drawn without repetition.
        seed: Of the subsets.

    Raises:
        ValueError: fewer than two pictures, fewer than `subset_size`, NaN, different dimensions.
    """
    real, fake = checked_pair(real, fake, least=2)
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
