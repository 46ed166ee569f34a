"""Bootstrap intervals: of a statistic of values, and of the Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .features import FeatureStatistics, checked_features
from .frechet import factor, frechet_distance

CHUNK = 2**24  # numbers drawn at once
LEVEL = 0.95


def _quantiles(draws: Tensor, level: float) -> tuple[float, float]:
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
    return _quantiles(torch.cat(draws), level)


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


def frechet_interval(
    real: FeatureStatistics | Tensor,
    fake: Tensor,
    level: float = LEVEL,
    resamples: int = 100,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """Interval of the Fréchet distance under resampling of the generated pictures.

    A resample repeats pictures, which biases its distance upwards as a smaller N does. So the
    quantiles are moved by the resamples' mean: the interval shows the noise at this N, around the
    distance of the pictures themselves. The bias of the distance in N stays in it. The real
    pictures count as given.

    Cost: every resample takes the eigenvalues of a symmetric matrix of side min(rank, N), at most
    D: about a second on one core for D = 1280.

    Args:
        real: Features (N, D) or their statistics.
        fake: Features (M, D).
        level, resamples, seed: As for `interval`.
        groups: The group of each generated picture, e.g. its prompt: whole groups are resampled;
            default: each picture is its own.

    Raises:
        ValueError: fewer than two pictures or groups, NaN, different dimensions, or bad settings.
    """
    check_resampling(resamples, level)
    fake = checked_features(fake, least=2)
    value = frechet_distance(real, fake)
    mean, root = factor(real)
    generator = torch.Generator().manual_seed(seed)
    constant = root.square().sum()
    parts = members(range(len(fake)) if groups is None else groups)
    if len(parts) < 2:
        raise ValueError("at least 2 groups are needed, got 1")
    projected, squares = fake @ root, fake.square().sum(1)  # (M, r), (M,)
    draws = []
    for _ in range(resamples):
        drawn = torch.randint(len(parts), (len(parts),), generator=generator)
        rows = torch.cat([parts[i] for i in drawn.tolist()]).to(fake.device)
        count = len(rows)
        centre = fake[rows].mean(0)
        trace = (squares[rows].sum() - count * centre.square().sum()) / (count - 1)
        part = projected[rows] - centre @ root
        gram = part.T @ part if part.shape[1] <= count else part @ part.T
        roots = (torch.linalg.eigvalsh(gram).clamp(min=0) / (count - 1)).sqrt().sum()
        draws.append((centre - mean).square().sum() + constant + trace - 2 * roots)
    draws = torch.stack(draws)
    low, high = _quantiles(draws - draws.mean() + value, level)
    return max(low, 0.0), high
