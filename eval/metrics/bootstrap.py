"""Bootstrap intervals of a statistic of values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .features import checked_features

CHUNK = 2**24  # numbers drawn at once
LEVEL = 0.95


def quantiles(draws: Tensor, level: float) -> tuple[float, float]:
    """The ends of the middle `level` of `draws` (R,)."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=draws.dtype, device=draws.device)
    low, high = torch.quantile(draws, ends).tolist()
    return low, high


def check_resampling(resamples: int, level: float = LEVEL) -> None:
    """Refuse fewer than two resamples, and a level that is no share."""
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if resamples < 2:
        raise ValueError(f"at least 2 resamples are needed, got {resamples}")


def interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] | None = None,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent values.

    Args:
        values: Values, with shape (N,).
        statistic: Maps (R, N) to (R,), a resample a row; default: the mean.
        level: Share of the resamples inside.
        resamples: Their number.
        seed: Of the resampling.

    Raises:
        ValueError: fewer than two values, NaN, or bad settings.
    """
    check_resampling(resamples, level)
    if values.ndim != 1:
        raise ValueError(f"expected values (N,), got shape {tuple(values.shape)}")
    values = checked_features(values[:, None].cpu(), least=2)[:, 0]
    statistic = statistic or (lambda rows: rows.mean(1))
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    at_once = max(CHUNK // count, 1)
    draws = []
    for start in range(0, resamples, at_once):
        shape = (min(at_once, resamples - start), count)
        draws.append(statistic(values[torch.randint(count, shape, generator=generator)]))
    return quantiles(torch.cat(draws), level)


def members(groups: Sequence[Hashable]) -> list[Tensor]:
    """The positions of each group, in the order in which groups first occur."""
    found: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        found.setdefault(group, []).append(position)
    return [torch.tensor(positions) for positions in found.values()]


def grouped_interval(
    values: Tensor, groups: Sequence[Hashable], **settings: Any
) -> tuple[float, float]:
    """`interval` of the mean of values that are independent from group to group only.

    Whole groups are resampled.

    Args:
        values: Values, with shape (N,).
        groups: The group of each, e.g. its prompt.
        settings: `level`, `resamples` and `seed` of `interval`.

    Raises:
        ValueError: fewer than two groups, or as for `interval`.
    """
    parts = [checked_features(values[rows, None]) for rows in members(groups)]
    sums = torch.stack([part.sum() for part in parts])
    counts = torch.tensor([len(part) for part in parts], dtype=sums.dtype)

    def mean(drawn: Tensor) -> Tensor:
        return sums[drawn.long()].sum(1) / counts[drawn.long()].sum(1)

    return interval(torch.arange(len(parts)), mean, **settings)
