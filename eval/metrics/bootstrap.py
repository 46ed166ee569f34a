"""Bootstrap intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .features import checked_features

CHUNK = 2**24  # numbers drawn at once
LEVEL = 0.95  # share of the resamples inside an interval


def quantiles(draws: Tensor) -> tuple[float, float]:
    """The ends of the middle 95 % of `draws` (R,)."""
    low, high = torch.quantile(draws, draws.new_tensor([1 - LEVEL, 1 + LEVEL]) / 2).tolist()
    return low, high


def check_resampling(resamples: int) -> None:
    """Refuse fewer than two resamples."""
    if resamples < 2:
        raise ValueError(f"at least 2 resamples are needed, got {resamples}")


def members(groups: Sequence[Hashable]) -> list[Tensor]:
    """The positions of each group, in the order in which groups first occur.

    Raises:
        ValueError: fewer than two groups.
    """
    found: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        found.setdefault(group, []).append(position)
    if len(found) < 2:
        raise ValueError(f"at least 2 groups are needed, got {len(found)}")
    return [torch.tensor(positions) for positions in found.values()]


def interval(
    values: Tensor,
    resamples: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval (95 %) of the mean of values.

    Args:
        values: Values, with shape (N,).
        resamples: Number of resamples.
        seed: Of the resampling.
        groups: The group of each value, e.g. its prompt, where values are independent from group
            to group only: whole groups are resampled. Default: each value is its own.

    Raises:
        ValueError: fewer than two values, groups or resamples; or NaN.
    """
    check_resampling(resamples)
    if values.ndim != 1:
        raise ValueError(f"expected values (N,), got shape {tuple(values.shape)}")
    sums = checked_features(values[:, None].cpu(), least=2)[:, 0]
    counts = torch.ones_like(sums)
    if groups is not None:
        parts = members(groups)
        sums = torch.stack([sums[rows].sum() for rows in parts])
        counts = torch.tensor([len(rows) for rows in parts], dtype=sums.dtype)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(CHUNK // len(sums), 1)
    means = []
    for start in range(0, resamples, at_once):
        shape = (min(at_once, resamples - start), len(sums))
        drawn = torch.randint(len(sums), shape, generator=generator)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return quantiles(torch.cat(means))
